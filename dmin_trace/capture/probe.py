"""Finds which random call of a training step draws its timestep: `TimestepProbe`.

A step may draw many single numbers: a timestep, the strength of an offset, whether a caption is left out. On the first
sample the step is run once as it is, and once more for each such draw with that draw moved and all else the same. The
timestep's draw is the one that moves the timestep with which the denoiser is called. Where no model is called with a
timestep, it is the one that moves the denoiser's inputs.
"""

from dataclasses import replace

from dmin_trace.capture.pinning import Candidate, Draw, PinnedTimestep, show_calls
from dmin_trace.capture.step import TIMESTEP_ARGUMENTS, CaptureStep
from dmin_trace.errors import CaptureError

MAX_CANDIDATES = 32
"""A step is run once for each candidate."""


class TimestepProbe:
    """The training steps that find the draw of the timestep.

    pin: the draw that was found; None before that, and for a loop that takes its timestep from the step.
    done: no more steps are needed.
    steps: how many it took.
    """

    def __init__(self, known: Draw | None = None, *, done: bool = False) -> None:
        """With a `known` draw, or where it is `done`, nothing is probed: the trace says how its steps were pinned."""
        self.pin = known
        self.done = done or known is not None
        self.steps = 0
        self._first: CaptureStep | None = None
        self._left: list[Candidate] = []
        self._moved: list[Draw] = []

    def next(self, timestep: PinnedTimestep) -> tuple[PinnedTimestep, Draw | None]:
        """What the next training step is opened with, instead of the first timestep of the capture."""
        if self._first is None:
            return timestep, None
        return replace(timestep, fraction=self._left[0].far, timestep=None), self._left[0].draw

    def take(self, step: CaptureStep) -> None:
        """Takes a closed step. Raises CaptureError after the last one if not exactly one draw moves the timestep."""
        self.steps += 1
        if self._first is None:
            self._first = step
            # A loop may take its timestep from the step, and draw nothing.
            self._left = [] if step.draws.pins else step.draws.candidates
            if len(self._left) > MAX_CANDIDATES:
                self.done = True
                raise CaptureError(
                    f"The training step draws {len(self._left)} single numbers; expected {MAX_CANDIDATES} at most, of "
                    "which one is the timestep."
                )
        else:
            candidate, *self._left = self._left
            if step.moved_from(self._first):
                self._moved.append(candidate.draw)
        if self._left:
            return
        self.done = True
        if self._first.draws.pins:
            return
        if len(self._moved) != 1:
            raise CaptureError(self._refusal(self._first))
        self.pin = self._moved[0]

    def _refusal(self, first: CaptureStep) -> str:
        drawn = f"Random calls in it: {show_calls(first.draws.calls)}."
        if first.seen is None and not first.inputs:
            return (
                f"No model was called with a timestep in {first.name} (an argument named "
                f"{', '.join(TIMESTEP_ARGUMENTS)}). Is this a diffusion model? {drawn}"
            )
        found = "no random call that is seen moves the timestep of the denoiser, so every sample would have its own"
        advice = (
            "Draw the timestep by one call in the training step: torch.randint, rand, randn, normal or multinomial, or "
            "a function of numpy.random or random, not of a generator of the script's own of numpy or python."
        )
        if self._moved:
            found = f"several random calls move the timestep of the denoiser, {' and '.join(map(str, self._moved))}"
            advice = "Draw the timestep by one call in the training step."
        return (
            f"The timestep cannot be pinned in {first.name}: {found}. {drawn} {advice} A loop of your own may take it "
            "from the step instead: in dmin_trace.recording, step.timestep(n) or step.fraction()."
        )
