"""Pins the timestep of a training step, and records its random calls.

For the gradients of two samples to be comparable, noise and timestep must be the same (paper, equations 7 to 9): before
each training step the generators are seeded, and the draw of the timestep is replaced by the pinned one. Every random
call is recorded by name and shape: two samples with other sequences of calls did not get the same noise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dmin_trace.capture.random_state import generator_marks, seed_of
from dmin_trace.errors import CaptureError
from dmin_trace.settings import Settings

Call = tuple[str, tuple[int, ...]]
"""One random call: its name, with a star where its result was pinned, and the shape that it gave."""

RECORDED_CALLS = frozenset(
    {"bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal"}
    | {"normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_"}
    | {"randperm", "uniform_", "dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"}
)
MIN_SCHEDULE_LENGTH = 50
"""A draw from fewer values than this is not taken for a timestep draw (a crop corner, a flip, a class)."""


@dataclass(frozen=True)
class PinnedTimestep:
    """One of the T timesteps of a capture, with one of the D noises drawn there: one training step for each sample.

    number: k of the timestep, from 0.
    fraction: the place in the schedule, (k + 1/2) / T, if no timestep is given.
    timestep: the timestep itself, as the script's draw would give it, or None.
    seed: of every generator at the start of the training step.
    draw: d of the noise, from 0.
    """

    number: int
    fraction: float
    timestep: int | None
    seed: int
    draw: int = 0

    def index_in(self, length: int) -> int:
        """The timestep in a schedule of `length` steps. Raises CaptureError if the schedule is shorter."""
        if self.timestep is None:
            return int(self.fraction * length)
        if self.timestep >= length:
            raise CaptureError(
                f"The settings have timestep {self.timestep}, but the script draws its timesteps from 0 to "
                f"{length - 1}. Give timesteps within the schedule."
            )
        return self.timestep

    def fraction_in(self, length: int | None) -> float:
        """The place in a schedule, from 0 to 1. Raises CaptureError if its length must be known, and is None."""
        if self.timestep is None:
            return self.fraction
        if length is None:
            raise CaptureError("Timesteps were given as a list, but the schedule's length is not known. Give a count.")
        return (self.index_in(length) + 0.5) / length


def pinned_timesteps(settings: Settings) -> tuple[PinnedTimestep, ...]:
    """The T timesteps of a capture in the order they are stored, each with its D draws one after the other."""
    given = settings.timesteps
    listed: Sequence[int | None] = [None] * given if isinstance(given, int) else given
    return tuple(
        PinnedTimestep(k, (k + 0.5) / len(listed), t, seed_of(settings.seed, k + 1, d), d)
        for k, t in enumerate(listed)
        for d in range(settings.draws)
    )


class PinnedDraws(TorchFunctionMode):
    """While entered: records torch's random calls, and replaces draws of a timestep by the pinned one.

    backward: what is called instead of `Tensor.backward`, with the same arguments; None leaves it as it is.
    calls: the random calls so far, in order; a pinned one is marked with a star.
    pins: how many draws were pinned.
    error: why a draw could not be pinned, or None.
    """

    def __init__(self, timestep: PinnedTimestep, backward: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.timestep, self.backward = timestep, backward
        self.calls: list[Call] = []
        self.pins = 0
        self.error: CaptureError | None = None
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self._entered = ExitStack()
        self._depth = 0
        self._marks: tuple[int, ...] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self.backward is not None and func is torch.Tensor.backward:
            return self.backward(*args, **(kwargs or {}))
        if name not in RECORDED_CALLS:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self._generators:
            # Seeding the global generators does not reach one of the script's own.
            self._generators[id(generator)] = (generator, generator.get_state())
            generator.manual_seed(self.timestep.seed)
        result = func(*args, **kwargs)
        try:
            if "dropout" in name and not kwargs.get("training", args[2] if len(args) > 2 else True):
                return result
            length = _schedule_length(name, args, kwargs, result)
            if length is not None:
                return self.pin(result, lambda: self.timestep.index_in(length), name)
            self.calls.append((name, tuple(result.shape) if isinstance(result, torch.Tensor) else ()))
        except Exception as error:
            self.keep(error)
        return result

    def keep(self, error: Exception) -> None:
        """Keeps an error until the step is checked: raised inside the script's own call it would end the script."""
        if not isinstance(error, CaptureError):
            error = CaptureError(f"A call in the training step was not understood: {type(error).__name__}: {error}")
        self.error = self.error or error

    def pin(self, drawn: torch.Tensor, value: Callable[[], float], name: str) -> torch.Tensor:
        """Replaces a draw of a timestep by a value, and records that. An error of `value` is kept."""
        self.pins += 1
        self.calls.append((name + "*", tuple(drawn.shape)))
        try:
            return torch.full_like(drawn, value())
        except Exception as error:
            self.keep(error)
            return drawn

    def start(self) -> None:
        """Enters the mode. Not a `with` block, since the training step that it covers is the script's."""
        self._entered.enter_context(self)

    def stop(self) -> None:
        """Leaves the mode for good, and puts back the states of the script's own generator objects."""
        self._entered.close()
        for generator, state in self._generators.values():
            generator.set_state(state)
        self._generators.clear()

    def enter_model(self) -> None:
        """Leaves the mode while a model runs: to see each of its thousands of calls would take time."""
        self._depth += 1
        if self._depth == 1:
            self._marks = generator_marks()
            self._entered.close()

    def leave_model(self) -> None:
        """Enters the mode again, and records that the model drew, if it did: the states of the generators tell."""
        self._depth -= 1
        if self._depth == 0:
            self.start()
            if (marks := generator_marks()) != self._marks:
                self.calls.append(("model", marks))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the mode during a `with` block, which must not stop it."""
        self._entered.close()
        try:
            yield
        finally:
            self.start()


def show_calls(calls: Sequence[Call]) -> str:
    return ", ".join(f"{name}({', '.join(map(str, shape))})" for name, shape in calls) or "none of torch's"


def _schedule_length(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> int | None:
    """The length of the schedule that this call draws a timestep from; None if it draws something else."""
    if not isinstance(result, torch.Tensor) or result.dim() != 1:
        return None
    length: object = None
    if name == "multinomial":
        weights = kwargs.get("input", args[0] if args else None)
        length = weights.numel() if isinstance(weights, torch.Tensor) and weights.dim() == 1 else None
    elif name == "randint":
        # randint(high, size) or randint(low, high, size); a timestep draw starts at 0.
        bounds = [argument for argument in args[:2] if isinstance(argument, (int, torch.Tensor))]
        low = kwargs.get("low", bounds[0] if len(bounds) == 2 else 0)
        high = kwargs.get("high", bounds[-1] if bounds else None)
        length = high if low == 0 else None
    # A schedule length may be a 0-d tensor. Reading it waits for the device, but only if the script made it so.
    if isinstance(length, torch.Tensor):
        length = int(length)
    return length if isinstance(length, int) and length >= MIN_SCHEDULE_LENGTH else None
