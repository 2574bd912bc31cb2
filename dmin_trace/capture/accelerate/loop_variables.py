"""Restores the variables of the script's loop, which its training step changes on capture batches.

What the script does next (its log line, its last checkpoint) must see the values that the last training batch left.
Restored are the variables of every frame from the loop outwards, the items of their lists, dicts and sets, and the
values of small tensors. The state of other objects (a meter class, say) is not.
"""

import ctypes
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

MAX_TENSOR_ELEMENTS = 4096
"""The largest tensor that is remembered: one that holds records of the loop, and no weights or images."""
_PACKAGE = str(Path(__file__).parents[2])


class LoopVariables:
    """The variables of the frames on the stack that belong to the script, at the moment when this is made."""

    def __init__(self) -> None:
        self._frames = [(frame, dict(frame.f_locals)) for frame in _script_frames(sys._getframe(1))]
        unique = {id(value): value for value in self.values()}.values()
        self._undo = [undo for value in unique if (undo := undo_of(value)) is not None]

    def values(self) -> Iterator[Any]:
        """Returns every remembered value, those of the loop's own frame first."""
        for _, variables in self._frames:
            yield from variables.values()

    def named(self) -> dict[str, Any]:
        """Returns the remembered values by name; if a name is in several frames, that of the innermost."""
        return {name: value for _, variables in reversed(self._frames) for name, value in variables.items()}

    def restore(self) -> None:
        """Restores variables and what was changed in place. Variables that are new since then stay."""
        # A training step that is a function of its own runs in another frame by now.
        running = {frame.f_code: frame for frame in _script_frames(sys._getframe(1))}
        for remembered, variables in self._frames:
            frame = running.get(remembered.f_code, remembered)
            current = frame.f_locals
            changed = {name: old for name, old in variables.items() if current.get(name, self) is not old}
            if changed:
                current.update(changed)
                if sys.version_info < (3, 13) and current is not frame.f_globals:
                    # Before PEP 667 a function's f_locals is a copy, and this call writes it back.
                    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
        for undo in self._undo:
            undo()


def is_ours(frame: FrameType) -> bool:
    """Whether a frame runs this package, and no example that comes with it."""
    name = frame.f_code.co_filename
    return name.startswith(_PACKAGE) and not name.startswith(f"{_PACKAGE}/examples")


def _script_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The loop's frame, and those outside it that run the same file: its function, the module around it."""
    script: str | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        # Generators between them (a tqdm around the loader), contextlib and this package are not the loop.
        is_generator = bool(frame.f_code.co_flags & inspect.CO_GENERATOR)
        if not is_generator and not is_ours(frame) and frame.f_globals.get("__name__") != "contextlib":
            script = script or name
            if name == script:
                yield frame
        frame = frame.f_back


def undo_of(value: Any) -> Callable[[], None] | None:
    """Returns what restores `value` in place; None for a kind of value that training steps do not change in place."""
    if type(value) in (list, dict, set):
        return partial(_restore_container, value, value.copy())
    if isinstance(value, LRScheduler):
        return partial(_restore_scheduler, value, value.state_dict(), [g["lr"] for g in value.optimizer.param_groups])
    if type(value) is torch.Tensor and not value.requires_grad and value.numel() <= MAX_TENSOR_ELEMENTS:
        return partial(_restore_tensor, value, value.clone())
    return None


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Gives an object an attribute of its own, which hides that of its class. Returns what takes it back."""
    hidden = name in vars(owner)
    undo = partial(setattr, owner, name, vars(owner)[name]) if hidden else partial(delattr, owner, name)
    setattr(owner, name, value)
    return undo


def _restore_container(value: Any, old: Any) -> None:
    """Restores a container only if it changed: an outer loop may be iterating over it."""
    if _identities(value) != _identities(old):
        # Looked up before: a module's variables include the dict of python's builtins.
        refill = value.extend if isinstance(value, list) else value.update
        value.clear()
        refill(old)


def _identities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: id(item) for name, item in value.items()}
    return list(map(id, value)) if isinstance(value, list) else value


def _restore_scheduler(value: LRScheduler, state: dict[str, Any], rates: list[Any]) -> None:
    value.load_state_dict(state)
    for group, rate in zip(value.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _restore_tensor(value: torch.Tensor, old: torch.Tensor) -> None:
    with torch.no_grad():
        value.copy_(old)
