"""Finds out whether capture batches can go through a script's loop without changing what it saves.

Every capture batch runs the loop's body. Its optimizer does not step, and `if accelerator.sync_gradients:` is not
entered; all else runs. So the loop must be `for batch in loader`, or that through enumerate or tqdm, over a prepared
loader; and what it does outside that block must be the training step itself, or leave nothing behind: variables, which
are put back, logs and progress bars. A script that averages weights or writes files there is found by its source.
"""

import ast
import builtins
import linecache
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeGuard

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LRScheduler

from dmin_trace.capture.accelerate.loop_variables import is_ours

READING_FUNCTIONS = (
    *("abs", "all", "any", "bool", "dict", "enumerate", "float", "format", "getattr", "hasattr", "int", "isinstance"),
    *("len", "list", "max", "min", "next", "print", "range", "repr", "round", "set", "sorted", "str", "sum", "tuple"),
    "zip",
)
"""Built-in functions that change nothing but what they return."""
READING_METHODS = (
    # Of tensors, arrays, numbers and texts.
    *("abs", "all", "any", "arange", "clone", "cpu", "detach", "exp", "float", "format", "isfinite", "isinf", "isnan"),
    *("item", "join", "log1p", "max", "mean", "min", "norm", "numel", "numpy", "repeat", "reshape", "sqrt", "std"),
    *("sum", "to", "tolist", "view"),
    # Of containers, schedulers, the clock and the device.
    *("copy", "get", "items", "keys", "values", "get_last_lr", "get_lr", "time", "perf_counter", "monotonic"),
    *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
    *("reset_peak_memory_stats", "synchronize", "empty_cache", "collect"),
    # Of loggers, of models, and of an accelerator, which logs and clips nothing during a capture.
    *("debug", "info", "warning", "log", "print", "gather", "gather_for_metrics", "reduce", "unwrap_model"),
    *("wait_for_everyone", "clip_grad_norm_", "clip_grad_value_", "parameters", "named_parameters"),
    "get_input_embeddings",
)
"""Methods that change nothing that a script saves."""
CONTAINER_METHODS = ("add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update")
"""Methods of lists, dicts and sets, which are put back if they are variables of the loop."""
HEAD_METHODS = (
    *("disable_adapters", "enable_adapters", "train", "eval", "requires_grad_", "zero_grad", "to", "set_timesteps"),
    *("register_to_config", "set_rng_state", "manual_seed"),
)
"""What a step calls, besides, before its loss is computed: for its result it calls anything."""
DRAWING_MODULES = ("random", "numpy.random", "torch.random")
PARAMETER_ATTRIBUTES = ("weight", "bias", "data")
TORCH_EFFECTS = ("save", "set_", "manual_seed", "use_")
"""How the names of torch's functions begin that do more than return a tensor."""
WRAPPERS = ("enumerate", "tqdm", "trange")
LOOPS = (ast.For, ast.While, ast.AsyncFor)
Chain = list[tuple[ast.AST, list[ast.stmt], int]]
"""Running statements, outermost first: each with its parent, and its place among the parent's statements."""
_UNKNOWN = object()


class UnsuitableLoopError(Exception):
    """Why capture batches cannot go through a loop, as a sentence without its full stop."""


def check_loop(frame: FrameType, is_driven: Callable[[Any], bool]) -> None:
    """Raises UnsuitableLoopError if capture batches would change what the script saves.

    `frame` is the one that calls `accelerator.backward`; `is_driven` says whether a value is the driven loader.
    """
    for here, chain in _frames_to_loop(frame):
        if not chain:
            raise UnsuitableLoopError(f"The source of {Path(here.f_code.co_filename).name} cannot be read")
        loops = [parent for parent, _, _ in chain if isinstance(parent, LOOPS)]
        changing = loops[-1].body if loops else chain[0][1]
        targets = {ast.unparse(target) for target in _targets(changing, everywhere=True)}
        checks = _Checks(here, targets, _new_containers(changing))
        for parent, siblings, at in reversed(chain):
            for statement in siblings[:at]:
                checks.before(statement)
            checks.after(siblings[at + 1 :])
            if not isinstance(parent, LOOPS):
                continue
            if not isinstance(parent, ast.For):
                raise UnsuitableLoopError(
                    f"The loop at {_place(here, parent)} takes its batches by itself (next, while)"
                )
            _check_source(parent, here, is_driven)
            _check_exits(parent, checks)
            return
    raise UnsuitableLoopError("The training step is not inside a loop of the script")


def check_length(frame: FrameType, batches: int) -> None:
    """Raises UnsuitableLoopError if a loop over `range` ends before it has taken so many capture batches.

    On demand little else matters: the script does not train, and is ended with the last capture batch.
    """
    for here, chain in _frames_to_loop(frame):
        for parent, _, _ in reversed(chain):
            if isinstance(parent, LOOPS):
                limit = _limit(parent.iter, here) if isinstance(parent, ast.For) else None
                if limit is not None and limit < batches:
                    raise UnsuitableLoopError(
                        f"The loop at {_place(here, parent)} takes {limit:,} batches; the capture needs {batches:,}. "
                        "Give the script's argument for them (such as --max_train_steps) that number"
                    )
                return


def _frames_to_loop(frame: FrameType) -> Iterator[tuple[FrameType, Chain]]:
    """The script's frames from `frame` outwards, each with the statements that run in it."""
    here: FrameType | None = frame
    while here is not None:
        if not is_ours(here) and here.f_globals.get("__name__") != "contextlib":
            yield here, _running_statements(here)
        here = here.f_back


def _limit(source: ast.expr, frame: FrameType) -> int | None:
    """The number of steps of a loop over `range(n)`, also in a `zip` or a progress bar; None for any other."""
    if not isinstance(source, ast.Call) or not source.args:
        return None
    if _last_name(source.func) != "range":
        wraps = _last_name(source.func) in (*WRAPPERS, "zip")
        limits = [_limit(argument, frame) for argument in source.args] if wraps else []
        return min((limit for limit in limits if limit is not None), default=None)
    bounds = [a.value if isinstance(a, ast.Constant) else _value(a, frame) for a in source.args]
    numbers = [bound for bound in bounds if isinstance(bound, int)]
    return len(range(*numbers)) if len(numbers) == len(bounds) else None


def _check_source(loop: ast.For, frame: FrameType, is_driven: Callable[[Any], bool]) -> None:
    """Raises unless the loop takes its batches from the driven loader, and from nothing beside it."""
    source: ast.expr = loop.iter
    while isinstance(source, ast.Call) and source.args and _last_name(source.func) in WRAPPERS:
        source = source.args[0]
    value = _value(source, frame)
    if type(value).__module__.partition(".")[0] == "tqdm":
        value = getattr(value, "iterable", None)
    if not is_driven(value):
        shown = ast.unparse(loop.iter)[:80]
        raise UnsuitableLoopError(
            f"The loop at {_place(frame, loop)} runs over {shown}; expected the dataloader that accelerator.prepare "
            "returned, by itself or through enumerate or tqdm"
        )


def _check_exits(loop: ast.For | ast.While | ast.AsyncFor, checks: "_Checks") -> None:
    """Raises if the loop is left by a count that goes on without `sync_gradients`: it would be left too early."""
    changed = {ast.unparse(target) for target in _targets(loop.body)}
    tests = list(checks.exits(loop.body))
    if isinstance(loop, ast.While):
        tests.append(loop.test)
    else:
        changed |= {ast.unparse(name) for name in _names(loop.target)}
    for test in tests:
        for part in ast.walk(test):
            if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)) and (name := ast.unparse(part)) in changed:
                raise UnsuitableLoopError(
                    f"The loop at {_place(checks.frame, loop)} is left by {name}, which changes outside `if "
                    "accelerator.sync_gradients:`"
                )


class _Checks:
    """The statements of one frame that run for capture batches."""

    def __init__(self, frame: FrameType, changing: set[str], made: set[str]) -> None:
        """`changing`: what the loop assigns, which may differ from batch to batch; `made`: names of new containers."""
        self.frame, self._changing, self._made = frame, changing, made

    def before(self, statement: ast.stmt) -> None:
        """A statement before the backward: it may compute anything, but a call for its effect must be harmless."""
        if isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
            owner = _value(call.func.value, self.frame) if isinstance(call.func, ast.Attribute) else None
            draws = isinstance(owner, ModuleType) and owner.__name__ in DRAWING_MODULES
            if not (draws or _last_name(call.func) in HEAD_METHODS or _last_name(call.func).endswith("_")):
                self._check_call(call)
        elif isinstance(statement, ast.AugAssign):
            self._check_target(statement.target, statement)
        else:
            for body in self._entered(statement):
                for inner in body:
                    self.before(inner)

    def exits(self, statements: Sequence[ast.stmt], tests: Sequence[ast.expr] = ()) -> Iterator[ast.expr]:
        """The conditions under which statements leave the loop, on batches that do not wait for `sync_gradients`."""
        for statement in statements:
            if isinstance(statement, (ast.Break, ast.Return)):
                yield from tests
            if not isinstance(statement, LOOPS):
                inner = [*tests, statement.test] if isinstance(statement, ast.If) else tests
                for block in self._entered(statement):
                    yield from self.exits(block, inner)
            if _skips_without_sync(statement):
                return

    def after(self, statements: Sequence[ast.stmt]) -> None:
        """Statements after the backward."""
        for statement in statements:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Delete)):
                continue
            if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                    self._check_target(target, statement)
            if _skips_without_sync(statement):
                # What follows it is the block that waits for sync_gradients.
                self.after(statement.body)
                return
            for expression in _expressions(statement, self._is_never):
                for call in _calls(expression):
                    self._check_call(call)
            for body in self._entered(statement):
                self.after(body)

    def _entered(self, statement: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
        """The blocks of a statement that a capture batch may enter."""
        if isinstance(statement, ast.If):
            if not (_waits_for_sync(statement.test) or self._is_never(statement.test)):
                yield statement.body
            yield statement.orelse
        elif not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            for name in ("body", "orelse", "finalbody"):
                yield getattr(statement, name, [])
            for handler in getattr(statement, "handlers", []):
                yield handler.body

    def _is_never(self, test: ast.expr) -> bool:
        """Whether a condition is false for the whole run: an option that is not given, or a thing that is not there."""
        if isinstance(test, ast.BoolOp):
            of = any if isinstance(test.op, ast.And) else all
            return of(self._is_never(part) for part in test.values)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._lasting(test.operand) is True
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            value, other, operator = self._lasting(test.left), test.comparators[0], test.ops[0]
            if value is _UNKNOWN or not isinstance(other, ast.Constant):
                return False
            if isinstance(operator, (ast.Is, ast.IsNot)) and other.value is None:
                return (value is None) != isinstance(operator, ast.Is)
            words = isinstance(other.value, str) and isinstance(value, (str, type(None)))
            return (
                words
                and isinstance(operator, (ast.Eq, ast.NotEq))
                and ((value == other.value) != isinstance(operator, ast.Eq))
            )
        value = self._lasting(test)
        return value is None or value is False or value == "" and isinstance(value, str)

    def _lasting(self, node: ast.expr) -> Any:
        """The value of a name or attribute that the loop does not set; numbers may be counts, and are not known."""
        if not isinstance(node, (ast.Name, ast.Attribute)) or ast.unparse(node) in self._changing:
            return _UNKNOWN
        if "process" in _last_name(node):
            # All processes must come to the same answer.
            return _UNKNOWN
        value = _value(node, self.frame)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return _UNKNOWN if number else value

    def _check_target(self, target: ast.expr, statement: ast.stmt) -> None:
        """Raises for a target that is not put back: variables are, and the items of those that are containers.

        A script may write to rows of a parameter what was there; the recorder sees if it was something else.
        """
        for part in _names(target):
            owner = part.value if isinstance(part, ast.Subscript) else part
            of_parameter = owner is not part and _last_name(owner) in PARAMETER_ATTRIBUTES
            if not (isinstance(owner, ast.Name) or of_parameter):
                raise UnsuitableLoopError(f"{self._says(statement)}, which would also change for every capture batch")

    def _check_call(self, call: ast.Call) -> None:
        function, name = call.func, _last_name(call.func)
        if isinstance(function, ast.Name):
            value = _value(function, self.frame)
            if name in READING_FUNCTIONS and value in (_UNKNOWN, getattr(builtins, name)):
                return
        elif isinstance(function, ast.Attribute):
            owner = _value(function.value, self.frame)
            if name in READING_METHODS and not isinstance(owner, torch.nn.Module):
                return
            # The name of a new list may be given to what is made of it later: `latents = torch.cat(latents)`.
            if (
                name in CONTAINER_METHODS
                and isinstance(function.value, ast.Name)
                and (type(owner) in (list, dict, set) or function.value.id in self._made)
            ):
                return
            if name in ("step", "zero_grad") and isinstance(
                owner, (AcceleratedOptimizer, AcceleratedScheduler, LRScheduler)
            ):
                return
            if type(owner).__module__.partition(".")[0] in ("tqdm", "logging"):
                return
            if owner is torch and not name.startswith(TORCH_EFFECTS):
                return
        raise UnsuitableLoopError(f"{self._says(call)}, which would also run for every capture batch")

    def _says(self, node: ast.stmt | ast.expr) -> str:
        shown = ast.unparse(node).splitlines()[0][:80]
        return f"{_place(self.frame, node)} has `{shown}` outside `if accelerator.sync_gradients:`"


def _running_statements(frame: FrameType) -> Chain:
    """The statements of a frame's code that are running; none if its source cannot be read."""
    line, _, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    tree = _parsed(frame.f_code.co_filename, "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    chain: Chain = []
    if tree is None or line is None or column is None:
        return chain
    parent: ast.AST | None = tree
    while parent is not None:
        found = None
        for siblings in _blocks(parent):
            for at, statement in enumerate(siblings):
                begin = statement.lineno, statement.col_offset
                end = statement.end_lineno or 0, statement.end_col_offset or 0
                if begin <= (line, column) < end:
                    found = parent, siblings, at
        if found is None:
            break
        parent = found[1][found[2]]
        # A function's code is that of the innermost function.
        chain = [] if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) else [*chain, found]
    return chain


@cache
def _parsed(name: str, source: str) -> ast.Module | None:
    try:
        return ast.parse(source) if source else None
    except SyntaxError:
        return None


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, [])
        if isinstance(block, list):
            yield block
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def _expressions(statement: ast.stmt, is_never: Callable[[ast.expr], bool]) -> Iterator[ast.expr]:
    """The expressions of a statement itself, without those of its blocks."""
    for _, value in ast.iter_fields(statement):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.withitem):
                yield part.context_expr
            elif isinstance(part, ast.BoolOp) and isinstance(part.op, ast.And) and is_never(part):
                continue
            elif isinstance(part, ast.expr):
                yield part


def _calls(expression: ast.expr) -> Iterator[ast.Call]:
    return (node for node in ast.walk(expression) if isinstance(node, ast.Call))


def _waits_for_sync(test: ast.expr) -> bool:
    """Whether a condition holds only if `sync_gradients` is True."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(map(_waits_for_sync, test.values))
    return isinstance(test, ast.Attribute) and test.attr == "sync_gradients"


def _skips_without_sync(statement: ast.stmt) -> TypeGuard[ast.If]:
    """Whether a statement is `if not accelerator.sync_gradients: ...; continue`."""
    if not isinstance(statement, ast.If) or not isinstance(statement.test, ast.UnaryOp):
        return False
    negated = isinstance(statement.test.op, ast.Not) and _waits_for_sync(statement.test.operand)
    return negated and isinstance(statement.body[-1], (ast.Continue, ast.Return))


def _new_containers(statements: Iterable[ast.stmt]) -> set[str]:
    """The names to which statements assign an empty list, dict or set."""
    return {
        target.id
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in ("[]", "{}", "list()", "dict()", "set()")
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _targets(statements: Iterable[ast.stmt], *, everywhere: bool = False) -> Iterator[ast.expr]:
    """What statements assign outside blocks that wait for `sync_gradients`, or everywhere."""
    for statement in statements:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                yield from _names(target)
        elif isinstance(statement, (ast.AugAssign, ast.AnnAssign, ast.For)) and (
            everywhere or not _adds_only_at_sync(statement)
        ):
            yield from _names(statement.target)
        waits = isinstance(statement, ast.If) and _waits_for_sync(statement.test) and not everywhere
        for number, block in enumerate(_blocks(statement)):
            if not (waits and number == 0):
                yield from _targets(block, everywhere=everywhere)


def _adds_only_at_sync(statement: ast.stmt) -> bool:
    """Whether a statement is `step += accelerator.sync_gradients`, which adds nothing on a capture batch."""
    if not isinstance(statement, ast.AugAssign) or not isinstance(statement.op, ast.Add):
        return False
    return _waits_for_sync(statement.value)


def _names(target: ast.expr) -> Iterator[ast.expr]:
    """The single targets in a target."""
    if isinstance(target, (ast.Tuple, ast.List)):
        for part in target.elts:
            yield from _names(part)
    else:
        yield target.value if isinstance(target, ast.Starred) else target


def _value(node: ast.expr, frame: FrameType) -> Any:
    """The value of a name, or of an attribute of one, in a frame; _UNKNOWN for anything else."""
    if isinstance(node, ast.Name):
        for names in (frame.f_locals, frame.f_globals, vars(builtins)):
            if node.id in names:
                return names[node.id]
    elif isinstance(node, ast.Attribute) and (owner := _value(node.value, frame)) is not _UNKNOWN:
        return getattr(owner, node.attr, _UNKNOWN)
    return _UNKNOWN


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _place(frame: FrameType, node: ast.AST) -> str:
    return f"line {getattr(node, 'lineno', 0)} of {Path(frame.f_code.co_filename).name}"
