"""The gradients of a sample's training steps become those of its rows: `GradientPool`.

gradient -> mean of the draws of a timestep -> one row
gradient -> mean of the draws of a timestep -> divided by its norm -> mean of a group of timesteps -> one row

In a query for a concept, two gradients are taken at each draw, and one is subtracted from the other.
"""

from collections.abc import Iterator

import torch

from dmin_trace.capture.pinning import PinnedTimestep
from dmin_trace.errors import CaptureError
from dmin_trace.project import Mean, normalised
from dmin_trace.settings import Settings


class GradientPool:
    """Pools gradients, one training step after another in the order of `pinned_timesteps`.

    It holds one gradient in float32 where there are several draws or differences, and one more where timesteps are
    pooled.
    """

    def __init__(self, settings: Settings) -> None:
        self._draws = settings.draws
        self._groups = {k: group for group in settings.groups for k in group} if settings.group_count else {}
        self._of_draws: Mean | None = None
        self._of_group: Mean | None = None

    def add(
        self, pinned: PinnedTimestep, taken: Iterator[torch.Tensor], sign: int = 0
    ) -> Iterator[torch.Tensor] | None:
        """Takes the gradient of a training step. Returns that of a row after the row's last step, None before.

        sign: as in `CaptureStep`; of a difference, the gradient that is subtracted comes first.
        """
        if self._draws > 1 or sign:
            if pinned.draw == 0 and sign < 1:
                self._of_draws = Mean(self._draws)
            mean = _begun(self._of_draws)
            mean.add(taken, sign or 1)
            if pinned.draw < self._draws - 1 or sign < 0:
                return None
            taken, self._of_draws = mean.hand_out(), None
        if (group := self._groups.get(pinned.number)) is None:
            return taken
        if pinned.number == group[0]:
            self._of_group = Mean(len(group))
        mean = _begun(self._of_group)
        mean.add(normalised(taken))
        if pinned.number < group[-1]:
            return None
        taken, self._of_group = mean.hand_out(), None
        return taken


def _begun(mean: Mean | None) -> Mean:
    if mean is None:
        raise CaptureError("The first training step of a row is missing. This is an error of dmin_trace; report it.")
    return mean
