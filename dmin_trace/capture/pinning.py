"""Pins the timestep of a training step, and records its random calls.

For the gradients of two samples to be comparable, noise and timestep must be the same (paper, equations 7 to 9): before
each training step the generators are seeded, and the draw of the timestep is replaced by the pinned one. Every random
call is recorded by name and shape: two samples with other sequences of calls did not get the same noise. Which draw is
the timestep's is found by `probe`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from dmin_trace.capture.dataset import hash_value
from dmin_trace.capture.distributions import Distribution, distance
from dmin_trace.capture.random_calls import RandomCall, RandomCalls
from dmin_trace.capture.random_state import generator_marks, seed_of
from dmin_trace.errors import CaptureError
from dmin_trace.settings import Settings

Call = tuple[str, tuple[int, ...]]
"""One random call: its name, with a star where its result was pinned, and the shape that it gave."""

MAX_TIMESTEP_NUMBERS = 2
"""A draw of more numbers than this is not taken for a timestep draw: one for the sample, one for its class picture."""
FAR_FRACTIONS = 0.2, 0.8
"""A draw is moved to the one of these quantiles that is farther from what was drawn."""


@dataclass(frozen=True)
class Draw:
    """Which random call of a training step: its name, the shape that it gives, and how many such came before it."""

    name: str
    shape: tuple[int, ...]
    before: int = 0

    def __str__(self) -> str:
        return _show((self.name, self.shape)) + (f", number {self.before + 1} of these" if self.before else "")


@dataclass(frozen=True)
class Candidate:
    """A draw that may be the timestep's, and a fraction at which it is far from what was drawn."""

    draw: Draw
    far: float


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

    def fraction_in_schedule(self) -> float:
        """The place in a schedule that runs from 0 to 1. Raises CaptureError if timesteps were given as a list."""
        if self.timestep is not None:
            raise CaptureError("Timesteps were given as a list, but the schedule's length is not known. Give a count.")
        return self.fraction

    def value_of(self, distribution: Distribution, name: str) -> float:
        """What the script's draw of its timestep gives. Raises CaptureError if it cannot give a listed timestep."""
        if self.timestep is None:
            return distribution.quantile(self.fraction)
        return distribution.integer(self.timestep, name)


def pinned_timesteps(settings: Settings) -> tuple[PinnedTimestep, ...]:
    """The T timesteps of a capture in the order they are stored, each with its D draws one after the other."""
    given = settings.timesteps
    listed: Sequence[int | None] = [None] * given if isinstance(given, int) else given
    return tuple(
        PinnedTimestep(k, (k + 0.5) / len(listed), t, seed_of(settings.seed, k + 1, d), d)
        for k, t in enumerate(listed)
        for d in range(settings.draws)
    )


class PinnedDraws:
    """While started: records the random calls of a training step, and pins the draw of its timestep.

    calls: the random calls so far, in order; a pinned one is marked with a star.
    pins: how many draws were pinned.
    value: what the timestep's draw was replaced by; None before that.
    candidates: while observed, the draws that may be the timestep's.
    digest: while observed, SHA-256 of the values that were drawn, where they do not depend on the sample.
    error: why a draw could not be pinned, or None.
    """

    def __init__(
        self,
        timestep: PinnedTimestep,
        pin: Draw | None = None,
        *,
        observed: bool = False,
        backward: Callable[..., None] | None = None,
    ) -> None:
        """`pin` is the draw of the timestep, if one is pinned. `backward` is called instead of `Tensor.backward`."""
        self.timestep, self._pin, self._observed = timestep, pin, observed
        self.calls: list[Call] = []
        self.pins = 0
        self.value: float | None = None
        self.candidates: list[Candidate] = []
        self.digest = sha256()
        self.error: CaptureError | None = None
        self._counts: dict[Call, int] = {}
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self._calls = RandomCalls(self._take, use=self._seed, backward=backward)
        self._depth = 0
        self._marks: tuple[int, ...] = ()

    def _seed(self, generator: torch.Generator) -> None:
        """Seeds a generator of the script's own, which seeding the global ones does not reach."""
        if id(generator) not in self._generators:
            self._generators[id(generator)] = (generator, generator.get_state())
            generator.manual_seed(self.timestep.seed)

    def _take(self, call: RandomCall) -> Any:
        """Records a random call, and gives what the script gets of it."""
        key = call.name, call.shape
        draw = Draw(*key, self._counts.get(key, 0))
        self._counts[key] = draw.before + 1
        try:
            if draw == self._pin:
                return self._pinned(call)
            self.calls.append(key)
            if self._observed:
                self._observe(call, draw)
        except Exception as error:
            self.keep(error)
        return call.drawn

    def _pinned(self, call: RandomCall) -> Any:
        self.pins += 1
        self.calls.append((call.name + "*", call.shape))
        distribution = call.distribution
        if distribution is None:
            raise CaptureError(f"The arguments of {_show((call.name, call.shape))} are not understood.")
        self.value = self.timestep.value_of(distribution, call.name)
        return call.replaced(self.value)

    def _observe(self, call: RandomCall, draw: Draw) -> None:
        hash_value(self.digest.update, (call.name, call.values))
        if call.numbers > MAX_TIMESTEP_NUMBERS or call.drawn is None or (distribution := call.distribution) is None:
            return
        drawn = call.drawn.flatten()[0] if hasattr(call.drawn, "flatten") else call.drawn
        number = float(drawn) if isinstance(drawn, (int, float)) or hasattr(drawn, "__float__") else float("nan")
        low, high = FAR_FRACTIONS
        far = (
            low
            if distance(distribution.quantile(low), number) > distance(distribution.quantile(high), number)
            else high
        )
        self.candidates.append(Candidate(draw, far))

    def keep(self, error: Exception) -> None:
        """Keeps an error until the step is checked: raised inside the script's own call it would end the script."""
        if not isinstance(error, CaptureError):
            error = CaptureError(f"A call in the training step was not understood: {type(error).__name__}: {error}")
        self.error = self.error or error

    def start(self) -> None:
        """Starts. Not a `with` block, since the training step that it covers is the script's."""
        self._calls.start()

    def stop(self) -> None:
        """Stops for good, and puts back the states of the script's own generator objects."""
        self._calls.stop()
        for generator, state in self._generators.values():
            generator.set_state(state)
        self._generators.clear()

    def enter_model(self) -> None:
        """Stops while a model runs: to see each of its thousands of calls would take time."""
        self._depth += 1
        if self._depth == 1:
            self._marks = generator_marks()
            self._calls.stop()

    def leave_model(self) -> None:
        """Starts again, and records that the model drew, if it did: the states of the generators tell."""
        self._depth -= 1
        if self._depth == 0:
            self.start()
            if (marks := generator_marks()) != self._marks:
                self.calls.append(("model", marks))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops during a `with` block, which must not end the step."""
        self._calls.stop()
        try:
            yield
        finally:
            self.start()


def pin_among(calls: Sequence[Call]) -> Draw | None:
    """The draw that was pinned among recorded calls; None if none was, or the step gave its timestep itself."""
    for at, (name, shape) in enumerate(calls):
        if name.endswith("*") and name != "timestep*":
            return Draw(name[:-1], shape, sum(call == (name[:-1], shape) for call in calls[:at]))
    return None


def show_calls(calls: Sequence[Call]) -> str:
    return ", ".join(map(_show, calls)) or "none"


def _show(call: Call) -> str:
    name, shape = call
    return f"{name}({', '.join(map(str, shape))})"
