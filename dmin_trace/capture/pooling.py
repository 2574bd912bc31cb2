"""The gradients of a sample's training steps become those of its rows: `GradientPool`.

gradients at the draws and timesteps of a row -> their mean, which is the gradient of the row's mean loss

In a query for a concept, two gradients are taken at each draw, and one is subtracted from the other.
"""

from collections.abc import Iterator

import torch

from dmin_trace.capture.pinning import PinnedTimestep
from dmin_trace.errors import CaptureError
from dmin_trace.project import Mean
from dmin_trace.settings import Settings


class GradientPool:
    """Pools gradients, one training step after another in the order of `pinned_timesteps`.

    It holds one gradient in float32 where a row has several draws, timesteps or differences.
    """

    def __init__(self, settings: Settings) -> None:
        self._draws = settings.draws
        self._groups = {k: group for group in settings.groups for k in group}
        self._mean: Mean | None = None

    def add(
        self, pinned: PinnedTimestep, taken: Iterator[torch.Tensor], sign: int = 0
    ) -> Iterator[torch.Tensor] | None:
        """Takes the gradient of a training step. Returns that of a row after the row's last step, None before.

        sign: as in `CaptureStep`; of a difference, the gradient that is subtracted comes first.
        """
        group = self._groups[pinned.number]
        count = self._draws * len(group)
        if count == 1 and not sign:
            return taken
        if (pinned.number, pinned.draw) == (group[0], 0) and sign < 1:
            self._mean = Mean(count)
        _begun(self._mean).add(taken, sign or 1)
        if (pinned.number, pinned.draw) != (group[-1], self._draws - 1) or sign < 0:
            return None
        taken, self._mean = _begun(self._mean).hand_out(), None
        return taken


def _begun(mean: Mean | None) -> Mean:
    if mean is None:
        raise CaptureError("The first training step of a row is missing. This is an error of dmin_trace; report it.")
    return mean
