"""Averages of the weights that a script keeps by itself, and optimizers that keep their own.

Of diffusers' `EMAModel` the host knows what the script saves. An average of another class (torch's `AveragedModel`, one
of the script's own) is found by what it holds: tensors of the shapes of the trained parameters, which the training
changes, and which are not the parameters.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)
MAX_DEPTH = 3
"""How deep tensors are looked for: `self.ema.shadow["weight"]` is three deep in `self`."""
MAX_ITEMS = 10_000
"""Larger containers hold data, and are not looked through."""
WATCHED_TENSORS = 3
"""The tensors of a copy by which it is seen to change."""
PASSED_OVER = ("torch", "accelerate", "datasets", "argparse", "builtins")
"""Packages whose objects keep no average of a script's weights, but for modules of torch."""
_Seen = dict[int, tuple[tuple[int, int], ...]]


class Averages:
    """Finds the averages among a loop's variables: what it sees now is compared with what it saw first."""

    def __init__(self, variables: Mapping[str, Any], trained: Sequence[torch.Tensor]) -> None:
        """`variables` are those of the loop at its first step; `trained` the parameters that train."""
        self._trained = trained
        self._first: _Seen = {id(owner): _marks(tensors) for _, owner, tensors in self._copies(variables)}

    def changed(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The copies of the weights that are new or were changed since then: each name, and what it names."""
        found = self._copies(variables)
        return {name: owner for name, owner, tensors in found if self._first.get(id(owner)) != _marks(tensors)}

    def _copies(self, variables: Mapping[str, Any]) -> Iterator[tuple[str, Any, list[torch.Tensor]]]:
        """What holds a tensor of the shape of each trained parameter, and none of the parameters."""
        shapes, ours = Counter(t.shape for t in self._trained), {t.data_ptr() for t in self._trained}
        for name, owner in variables.items():
            if isinstance(owner, (torch.optim.Optimizer, torch.Tensor)) or name.startswith("__"):
                continue
            inner = vars(owner).items() if hasattr(owner, "__dict__") and not isinstance(owner, torch.nn.Module) else ()
            # `self.ema` of a trainer is named, and not the trainer, which also holds the model.
            for full, one in ((name, owner), *((f"{name}.{part}", value) for part, value in inner)):
                if isinstance(one, torch.optim.Optimizer):
                    continue
                tensors = list(_tensors_in(one, MAX_DEPTH, set()))
                has_ours = any(tensor.data_ptr() in ours for tensor in tensors)
                if tensors and not has_ours and shapes <= Counter(tensor.shape for tensor in tensors):
                    yield full, one, tensors
                    break


def _tensors_in(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.state_dict(keep_vars=True).values()
    elif depth and isinstance(value, (list, tuple, dict)):
        if len(value) <= MAX_ITEMS:
            for part in value.values() if isinstance(value, dict) else value:
                yield from _tensors_in(part, depth - 1, seen)
    elif depth and hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in PASSED_OVER:
        for part in list(vars(value).values()):
            yield from _tensors_in(part, depth - 1, seen)


def _marks(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes if tensors are written to, or replaced."""
    return tuple((id(tensor), tensor._version) for tensor in tensors[:WATCHED_TENSORS])


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While entered, a schedule-free optimizer is in eval mode: its parameters hold the average that is saved.

    Afterwards it is in training mode, and the parameters are as before, bit for bit. Of others nothing changes.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if not keeps_average(optimizer) or not any(group.get("train_mode", True) for group in inner.param_groups):
        yield
        return
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    weights = [parameter.detach().clone() for parameter in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


def keeps_average(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a mode for training and one for evaluation, as those of `schedulefree` do."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))
