"""Vectors of the index: what projected gradients are reduced to, so that a graph over them is small.

A projected gradient is folded: adding bins j, j + F, j + 2 F and so on leaves F numbers, whose inner products err by
about the product of the norms over sqrt(F). Gradients of a diffusion model are much alike, and an error in what they
share would hide what tells them apart. So each timestep is first split into its parts along r common directions, which
are kept as exact numbers, and the rest, which is folded. A vector holds both for all timesteps, T (F + r) numbers, and
its inner product with that of a query estimates the score. Inner product and not cosine: a fold keeps no norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dmin_trace.store import Store

COMMON_DIRECTIONS = 8
"""r, the directions that are kept apart; they halve the candidates that are needed."""
DIRECTIONS_SAMPLES = 256
"""Samples, spread over the store, that the common directions are taken from."""


@dataclass(frozen=True)
class Reduction:
    """How projected gradients become vectors of the index.

    common: (T, r, v) float32, the directions that are kept apart; at each timestep orthonormal, or zero.
    fold: F.
    """

    common: NDArray[np.float32]
    fold: int

    @property
    def length(self) -> int:
        """The numbers of a vector."""
        timesteps, directions, _ = self.common.shape
        return int(timesteps) * (self.fold + int(directions))

    def vectors(self, gradients: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, T, v) to (n, T (F + r)) float32: for each timestep the parts along the directions and the folded rest."""
        along = np.matmul(gradients.transpose(1, 0, 2), self.common.transpose(0, 2, 1))  # (T, n, r)
        rest = _folded(gradients, self.fold) - np.matmul(along, self._folded_common).transpose(1, 0, 2)
        return np.concatenate([along.transpose(1, 0, 2), rest], axis=2).reshape(len(gradients), -1)

    @cached_property
    def _folded_common(self) -> NDArray[np.float32]:
        return _folded(self.common, self.fold)


def common_directions(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(T, r, v) float32, the principal directions of some of these rows at each timestep; zero where there are fewer.

    The mean is not taken out.
    """
    timesteps, dimension = len(store.header.timesteps), store.header.dimension
    count = min(DIRECTIONS_SAMPLES, len(rows), max(2 * COMMON_DIRECTIONS, 2**26 // dimension))
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
    scale = store.numbers(rows).scale
    found = np.zeros((timesteps, COMMON_DIRECTIONS, dimension), np.float32)
    some = np.empty((count, dimension), np.float32)
    for t in range(timesteps):
        for n, row in enumerate(rows):
            chunk, place = divmod(int(row), store.header.chunk_rows)
            some[n] = store.grad_chunk(chunk)[place, t]
        some *= scale[:, t, None]
        _, mixtures = np.linalg.eigh(some @ some.T)  # the smallest eigenvalues first
        directions = mixtures[:, : -1 - COMMON_DIRECTIONS : -1].T @ some
        norms = np.linalg.norm(directions, axis=1)
        real = norms > 1e-3 * norms.max()
        found[t, : len(norms)][real] = directions[real] / norms[real, None]
    return found


def _folded(gradients: NDArray[np.float32], fold: int) -> NDArray[np.float32]:
    """Adds bins j, j + F, j + 2 F and so on."""
    folded: NDArray[np.float32] = gradients.reshape(*gradients.shape[:-1], -1, fold).sum(axis=-2)
    return folded
