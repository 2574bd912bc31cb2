"""One run of a training step for a capture, on one sample at one timestep: `CaptureStep`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dmin_trace.capture.pinning import PinnedDraws, PinnedTimestep
from dmin_trace.errors import CaptureError

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "time", "time_step")


@dataclass
class CaptureStep:
    """One run of a training step for a capture.

    A loop that draws its timestep by torch.randint or torch.multinomial needs nothing of this: those are pinned. One
    that takes its timestep from outside takes it from `timestep` or `fraction`.

    sample: the dataset index.
    pinned: the timestep, with its seed.
    draws: the random calls of the step.
    seen: the timestep that the denoiser was called with, a tensor on its device; None before that.
    given: the timestep that `timestep` or `fraction` gave first; None before that.
    backwards: how often the step called backward.
    gradient, norm, loss: the projected gradient (v,), the norm of the gradient, and the loss; None before backward.
    """

    sample: int
    pinned: PinnedTimestep
    draws: PinnedDraws
    seen: torch.Tensor | None = None
    given: float | None = None
    backwards: int = 0
    gradient: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """The sample and the number of the timestep, for a person to read."""
        return f"the training step of sample {self.sample}, timestep {self.pinned.number}"

    def timestep(self, steps: int) -> int:
        """The timestep, in a schedule of so many steps.

        Raises CaptureError if timesteps were given as a list, and this one lies beyond the schedule.
        """
        timestep = self.pinned.index_in(steps)
        self._give(timestep)
        return timestep

    def fraction(self) -> float:
        """The time, in a schedule that runs from 0 to 1.

        Raises CaptureError if timesteps were given as a list.
        """
        if self.pinned.timestep is not None:
            raise CaptureError("Timesteps were given as a list, which has no fractions of a schedule. Give a count.")
        self._give(self.pinned.fraction)
        return self.pinned.fraction

    def _give(self, timestep: float) -> None:
        self.given = timestep if self.given is None else self.given
        self.draws.hand_out("timestep")

    def see_timestep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the timestep that a module is called with, if it is the first one."""
        if self.seen is not None:
            return
        names = _forward_names(module)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in TIMESTEP_ARGUMENTS:
            if given.get(name) is not None:
                self.seen = torch.as_tensor(given[name]).detach().reshape(-1).float().clone()
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
