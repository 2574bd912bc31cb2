"""One run of a training step, on one sample at one timestep: what it drew, what its model saw, what it gave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dmin_trace.capture.randomness import PinnedDraws, PinnedTimestep

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "time", "time_step")


@dataclass
class CaptureStep:
    """One run of a training step for a capture.

    sample: the dataset index.
    slot: the timestep that it is pinned to.
    draws: what the step draws.
    timestep: what the denoiser was called with, a tensor on its device; None before that.
    backwards: how often the step called backward.
    sketch, norm, loss: the projected gradient (v,), the norm of the gradient, and the loss; None before backward.
    """

    sample: int
    slot: PinnedTimestep
    draws: PinnedDraws
    timestep: torch.Tensor | None = None
    backwards: int = 0
    sketch: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    @property
    def place(self) -> str:
        """The sample and the timestep, for a person to read."""
        return f"the training step of sample {self.sample}, timestep {self.slot.number}"

    def see_timestep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the timestep that a module is called with, if it is the first one."""
        if self.timestep is not None:
            return
        names = _forward_names(module)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in TIMESTEP_ARGUMENTS:
            if given.get(name) is not None:
                self.timestep = torch.as_tensor(given[name]).detach().reshape(-1).float().clone()
                return


def takes_timestep(module: torch.nn.Module) -> bool:
    """Whether a module is called with a timestep."""
    return not set(TIMESTEP_ARGUMENTS).isdisjoint(_forward_names(module))


def _forward_names(module: torch.nn.Module) -> list[str]:
    """The names of a module's positional arguments; those of the model inside, for a PEFT wrapper."""
    base = getattr(module, "get_base_model", None)
    # The class's own method: accelerate hides the instance's behind a wrapper for autocast.
    return _argument_names(type(base() if callable(base) else module).forward)


@cache
def _argument_names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
