"""One run of a training step for a capture, on one sample at one timestep: `CaptureStep`, opened by a `StepGuard`.

guard.open(sample, timestep)    generators seeded, draws of timesteps pinned; then the loop's own code runs
guard.close()                   its generators are put back
guard.check(step, moved)        raises if its gradient cannot be compared with those of other samples
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dmin_trace.capture.dataset import hash_value
from dmin_trace.capture.pinning import Draw, PinnedDraws, PinnedTimestep
from dmin_trace.capture.random_state import seed_everything
from dmin_trace.errors import CaptureError

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "time", "time_step")


@dataclass
class CaptureStep:
    """One run of a training step for a capture.

    A loop that draws its timestep needs nothing of this: its draw is found and pinned (`probe`). One that takes its
    timestep from outside takes it from `timestep` or `fraction`.

    sample, pinned, draws: the dataset index, the timestep with its seed, and the random calls of the step.
    kept: whether its gradient is recorded; that of a step that only looks for the timestep's draw is not.
    sign: 1 and -1 for the two steps whose gradients' difference is recorded, 0 for a step that is recorded by itself.
    seen: the timestep that the denoiser was called with, a tensor on its device; None before that.
    rows: how many samples the denoiser was called with, by its timestep and its first tensor; 0 before that.
    inputs: in a step that is not kept, or is one of two, a digest of what the denoiser was called with.
    given: the timestep that `timestep` or `fraction` gave first; None before that.
    backwards: how often the step called backward.
    gradient, norm, loss: the projected gradient (v,), the norm of the gradient, and the loss; None before backward.
    """

    sample: int
    pinned: PinnedTimestep
    draws: PinnedDraws
    kept: bool = True
    sign: int = 0
    seen: torch.Tensor | None = None
    rows: int = 0
    inputs: str = ""
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
        """The timestep, in a schedule of so many steps. Raises CaptureError if a given one lies beyond the schedule."""
        timestep = self.pinned.index_in(steps)
        self._give(timestep)
        return timestep

    def fraction(self) -> float:
        """The time, in a schedule that runs from 0 to 1. Raises CaptureError if timesteps were given as a list."""
        fraction = self.pinned.fraction_in_schedule()
        self._give(fraction)
        return fraction

    def _give(self, timestep: float) -> None:
        self.given = timestep if self.given is None else self.given
        self.draws.calls.append(("timestep*", ()))
        self.draws.pins += 1

    def see_call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the timestep that a denoiser is called with, if this is its first call with one."""
        if self.seen is not None:
            return
        if (self.sign or not self.kept) and not self.inputs:
            digest = sha256()
            hash_value(digest.update, (args, kwargs))
            self.inputs = digest.hexdigest()
        given = {**dict(zip(_forward_names(module), args, strict=False)), **kwargs}
        timestep = next((given[name] for name in TIMESTEP_ARGUMENTS if given.get(name) is not None), None)
        first = next((value for value in given.values() if value is not timestep and _rows(value)), None)
        latents = 0 if first is None else _rows(first)
        if timestep is None:
            self.rows = self.rows or latents
            return
        timestep = torch.as_tensor(timestep).detach()
        batched = timestep.dim() > 0 or getattr(first, "dim", lambda: 4)() >= 4
        self.rows = max(len(timestep) if timestep.dim() else 1, latents if batched else 1)
        self.seen = timestep.reshape(-1).float().clone()

    def moved_from(self, first: Self) -> bool:
        """Whether the timestep of the denoiser, or its inputs if it takes none, differ from those of another step."""
        if self.seen is None or first.seen is None:
            return self.inputs != first.inputs
        return not torch.equal(self.seen, first.seen)


def _rows(value: Any) -> int:
    """How many samples a tensor, or a list of tensors, holds; 0 for other values."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else 0
    return len(value) if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor) else 0


@dataclass(frozen=True)
class Advice:
    """What to do about a training step that cannot be captured, in terms of the loop that it belongs to.

    `backward` is the call by which the loop computes gradients. The others are for steps that do not make that call
    once, that change parameters, and that call no model with a timestep.
    """

    backward: str
    once: str
    changed: str
    seen: str


class StepGuard:
    """Runs training steps of models in eval mode, and sees what they draw, change and call.

    On leaving it the models are as they were before. `step` is the training step that is under way, or None.
    """

    def __init__(
        self,
        models: Iterable[torch.nn.Module],
        denoisers: Sequence[torch.nn.Module],
        advice: Advice,
        backward: Callable[..., None] | None = None,
    ) -> None:
        """Steps may change `models`, and call `denoisers` with the timestep.

        `backward` replaces `Tensor.backward` for loops that call it; no optimizer may step then, nor `.grad` be set.
        """
        self.step: CaptureStep | None = None
        self._models = list(models)
        self._denoisers, self._advice, self._backward = denoisers, advice, backward
        self._parameters: list[torch.nn.Parameter] = []
        self._versions: list[int] = []
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self._parameters = [parameter for model in self._models for parameter in model.parameters()]
        with ExitStack() as undo:
            for model in self._models:
                for module in model.modules():
                    undo.callback(setattr, module, "training", module.training)
                model.eval()
            for module in self._denoisers:
                undo.callback(module.register_forward_pre_hook(self._enter_model, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(self._leave_model, always_call=True).remove)
            if self._backward is not None:
                for parameter in self._parameters:
                    undo.callback(setattr, parameter, "grad", parameter.grad)
                    parameter.grad = None
                undo.callback(register_optimizer_step_pre_hook(_refuse_optimizer_step).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._undo.close()

    def open(
        self,
        sample: int,
        timestep: PinnedTimestep,
        pin: Draw | None = None,
        *,
        observed: bool = False,
        kept: bool = True,
        sign: int = 0,
    ) -> CaptureStep:
        """Begins the training step of a sample at a timestep. Between here and `close` stands the loop's own code.

        `pin` is the draw of the timestep; `observed`, `kept` and `sign` are as in `PinnedDraws` and `CaptureStep`.
        """
        draws = PinnedDraws(timestep, pin, observed=observed, backward=self._backward)
        step = CaptureStep(sample, timestep, draws, kept=kept, sign=sign)
        self._versions = [parameter._version for parameter in self._parameters]
        seed_everything(timestep.seed)
        step.draws.start()
        self.step = step
        return step

    def close(self) -> None:
        """Ends the training step that is under way, if one is."""
        if self.step is not None:
            self.step.draws.stop()
            self.step = None

    def check(self, step: CaptureStep, moved: Callable[[Sequence[torch.nn.Parameter]], bool]) -> None:
        """Raises CaptureError if a closed step's gradient is not comparable. `moved` tells if written values differ."""
        if step.draws.error is not None:
            raise step.draws.error
        advice = self._advice
        reached = [p for p in self._parameters if p.grad is not None] if self._backward is not None else []
        for parameter in reached:
            parameter.grad = None
        if reached:
            raise CaptureError(
                f"Gradients reached .grad in {step.name} by another call than {advice.backward}, such as "
                f"torch.autograd.backward. {advice.once}"
            )
        if step.backwards != 1:
            found = f"{advice.backward} was called {step.backwards} times in {step.name}; expected once."
            raise CaptureError(f"{found} {advice.once}")
        written = [p for p, before in zip(self._parameters, self._versions, strict=True) if p._version != before]
        # A step may write back what was there: textual inversion does so to the words that it does not train.
        if written and moved(written):
            raise CaptureError(f"The model's parameters were changed in {step.name}. {advice.changed}")
        if step.seen is None and step.rows and step.draws.value is not None:
            # The denoiser takes no timestep; the draw is known to reach its inputs.
            step.seen = torch.tensor([step.draws.value], dtype=torch.float32)
        if step.kept and step.seen is None:
            raise CaptureError(
                f"No model was called with a timestep in {step.name} (an argument named "
                f"{', '.join(TIMESTEP_ARGUMENTS)}), so it is not known whether it was the pinned one. {advice.seen}"
            )

    def _enter_model(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.step is not None:
            try:
                self.step.see_call(module, args, kwargs)
            except Exception as error:
                self.step.draws.keep(error)
            self.step.draws.enter_model()

    def _leave_model(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.step is not None:
            self.step.draws.leave_model()


def _refuse_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    raise CaptureError(
        "An optimizer stepped during the capture, which is of a model that is trained already. Compute the loss and "
        "its gradient in the training step, and nothing more."
    )


def takes_timestep(module: torch.nn.Module) -> bool:
    return not set(TIMESTEP_ARGUMENTS).isdisjoint(_forward_names(module))


def _forward_names(module: torch.nn.Module) -> list[str]:
    """The names of a module's positional arguments; those of the model inside, for a PEFT wrapper."""
    base = getattr(module, "get_base_model", None)
    # The class's own method: accelerate hides the instance's behind a wrapper for autocast.
    return _argument_names(type(base() if callable(base) else module).forward)


@cache
def _argument_names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
