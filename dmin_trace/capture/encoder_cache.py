"""Remembers what frozen modules answered, for the length of one sample.

A script encodes a sample's image and caption in its loop body, so a capture would encode them again at each of the T
timesteps. Modules in which no parameter trains (autoencoders, text encoders) are asked once for each sample instead,
and answer the same question from memory. The answer is bit for bit the same: a question is the module and its exact
inputs, and only what depends on nothing else is remembered.

Not remembered: calls whose inputs carry a gradient, calls that draw random numbers, modules in train mode (batch norms
would count a batch less), and modules that never hear a question twice, such as a frozen denoiser.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch

from dmin_trace.capture.randomness import RandomState

logger = logging.getLogger(__name__)

MOST_ANSWERS = 4
"""Of one module within one sample: a script may encode a prompt and an empty one."""

HOPELESS = 16
"""A module that has been asked so many things, and none of them twice, is left alone."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Answer:
    """A call of a module: its inputs and the conditions of the call, and what it returned.

    The version of a tensor says how often it was changed in place: one that was changed since answers nothing.
    """

    question: tuple[Any, ...]
    tensors: list[torch.Tensor]
    versions: list[int]
    output: Any

    def fits(self, question: tuple[Any, ...]) -> bool:
        """Whether the question is the same, to the bit."""
        unchanged = all(t._version == version for t, version in zip(self.tensors, self.versions, strict=True))
        return unchanged and _same(self.question, question)


@dataclass
class _Listener:
    """One frozen module: its own forward, what it answered within this sample, and how often in vain."""

    module: torch.nn.Module
    forward: Callable[..., Any]
    hidden: bool
    answers: list[_Answer] = field(default_factory=list)
    in_vain: int = 0


class EncoderCache:
    """While entered, the frozen ones among some modules answer from memory what they were asked within one sample."""

    def __init__(self, values: Iterable[Any], trained: Iterable[torch.nn.Module]) -> None:
        """Looks for modules in which no parameter trains.

        Args:
            values: anything; modules are looked for, and in lists, tuples and dicts of them.
            trained: the modules that train, which are left alone with all that they consist of.
        """
        own = {id(part) for model in trained for part in model.modules()}
        roots = {id(m): m for m in _modules_in(values) if _is_frozen(m) and own.isdisjoint(map(id, m.modules()))}
        # A script may go past a module's own call (`vae.encode` calls the encoder), so its parts listen too.
        parts = {id(part): part for root in roots.values() for part in root.children() if _is_frozen(part)}
        self._modules = list((roots | parts).values())
        self._listeners: list[_Listener] = []
        self._inside = False

    def __enter__(self) -> EncoderCache:
        for module in self._modules:
            hidden = "forward" in vars(module)
            listener = _Listener(module, module.forward, hidden)
            # An attribute of the instance hides the class's method.
            module.forward = partial(self._ask, listener)
            self._listeners.append(listener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._listeners:
            listener = self._listeners.pop()
            if listener.hidden:
                listener.module.forward = listener.forward
            else:
                del listener.module.forward

    def forget(self) -> None:
        """Ends a sample: nothing is remembered beyond it."""
        for listener in self._listeners:
            listener.answers.clear()

    def _ask(self, listener: _Listener, /, *args: Any, **named: Any) -> Any:
        # What a remembered module asks its own parts is remembered with its answer.
        if self._inside or listener.in_vain >= HOPELESS:
            return listener.forward(*args, **named)
        try:
            asked = self._question(listener, args, named)
            known = None if asked is None else next((a for a in listener.answers if a.fits(asked[0])), None)
            if known is not None:
                listener.in_vain = 0
                return _handed_out(known.output)
            before = RandomState.take()
        except Exception:
            # Remembering is for speed alone: what cannot be compared is asked again.
            logger.debug("A frozen module's question could not be looked at.", exc_info=True)
            asked = None
        if asked is None:
            return listener.forward(*args, **named)
        listener.in_vain += 1
        self._inside = True
        try:
            output = listener.forward(*args, **named)
        finally:
            self._inside = False
        try:
            return self._remembered(listener, *asked, output, before)
        except Exception:
            logger.debug("A frozen module's answer could not be remembered.", exc_info=True)
            return output

    def _question(
        self, listener: _Listener, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], list[torch.Tensor]] | None:
        """What a module is asked, and the tensors in it; None where the answer is not to be remembered."""
        if any(part.training for part in listener.module.modules()):
            return None
        question = (args, named, *_conditions(listener.module))
        given = _tensors_in(question)
        if given is None or any(t.requires_grad or t.is_inference() for t in given):
            return None
        return question, given

    def _remembered(
        self,
        listener: _Listener,
        question: tuple[Any, ...],
        given: list[torch.Tensor],
        output: Any,
        before: RandomState,
    ) -> Any:
        """The output of a module, kept as the answer to its question if it depends on nothing else."""
        made = _tensors_in(output)
        if made is None or any(t.requires_grad or t.is_inference() for t in made) or not before.is_now():
            return output
        tensors = [*given, *made]
        answer = _Answer(_kept(question), tensors, [t._version for t in tensors], output)
        listener.answers = [answer, *listener.answers][:MOST_ANSWERS]
        return _handed_out(output)


def _handed_out(output: Any) -> Any:
    """The output in a container of its own. The tensors stay the same ones: a copy would have a version of its own."""
    return output if isinstance(output, torch.Tensor) else copy.copy(output)


def _modules_in(values: Iterable[Any]) -> Iterator[torch.nn.Module]:
    for value in values:
        if isinstance(value, torch.nn.Module):
            yield value
        elif type(value) in (list, tuple, dict):
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if isinstance(item, torch.nn.Module))


def _is_frozen(module: torch.nn.Module) -> bool:
    # What is compiled has its own idea of forward.
    compiled = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
    parameters = list(module.parameters())
    return not compiled and bool(parameters) and not any(p.requires_grad for p in parameters)


def _conditions(module: torch.nn.Module) -> tuple[Any, ...]:
    """What else an answer depends on: whether a graph is built, and the precision."""
    kind = next(module.parameters()).device.type
    return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _tensors_in(value: Any) -> list[torch.Tensor] | None:
    """The tensors in nested containers; None if there is anything in them that cannot be compared."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, _PLAIN):
        return []
    if not isinstance(value, (list, tuple, Mapping)):
        return None
    found: list[torch.Tensor] = []
    for item in value.values() if isinstance(value, Mapping) else value:
        inside = _tensors_in(item)
        if inside is None:
            return None
        found += inside
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two questions are the same, tensors compared bit by bit."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_same(a[name], b[name]) for name in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
        return a is b or (alike and torch.equal(_bits(a), _bits(b)))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _kept(question: Any) -> Any:
    """The question with containers of its own: the script may go on filling its lists. Tensors have versions."""
    if isinstance(question, Mapping):
        return {name: _kept(item) for name, item in question.items()}
    if type(question) in (list, tuple):
        return type(question)(map(_kept, question))
    return question
