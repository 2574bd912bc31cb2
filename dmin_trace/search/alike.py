"""How alike samples are to each other, by their gradients alone: near-copies, nearest samples, self-influence.

What all samples share is taken out of both sides, by the square root of what deflation takes out of a query: an inner
product is then the deflated score of one sample for the other. Divided by both norms it is 1 for copies, and about 0
for samples that have nothing of their own in common. Rows are folded first (`index.Reduction` says what that is), so
that those of many samples fit into memory: a similarity errs by about 1 / sqrt(its numbers).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.search.deflation import Progress, choose_directions, principal_directions, row_blocks
from dmin_trace.search.exact import Floats
from dmin_trace.store import Store, core_count

DIRECTIONS = 16
"""The principal directions that are taken out at each timestep, or group of timesteps, at most: those that samples
share. More would take out what samples of a kind have in common, and take longer."""
NEAR_COPY = 0.75
"""The similarity from which a sample is a near-copy of another."""
LENGTH, MIN_LENGTH = 4096, 256
"""Numbers of a folded row: as many as LENGTH where memory allows, or a little more."""
MAX_NUMBERS = 2**28
"""Of all folded rows: a gibibyte."""
BLOCK_NUMBERS = 2**24
"""Similarities that are in memory at a time."""

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OwnParts:
    """What samples have of their own.

    rows: (n,) the rows of the store that can be ranked.
    vectors: (n, L) float32, folded and of norm one; zero where a sample has nothing of its own.
    self_influence: (n,) the deflated score of each sample for itself, over R: from 0, if others have all that it has,
        to 1.
    """

    rows: Places
    vectors: Floats
    self_influence: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Alike:
    """How alike n samples are, by their places among `OwnParts.rows`.

    nearest, similarity: (n, k) the nearest other samples, nearest first, and how alike they are.
    original: (n,) of a near-copy the first sample that it is alike, of which all near-copies form a cluster; of any
        other sample itself.
    """

    nearest: Places
    similarity: Floats
    original: Places


def own_parts(store: Store, progress: Progress | None = None) -> OwnParts:
    """What the samples of a store have of their own, in a few passes over it.

    Raises TraceError if the store is damaged or no sample can be ranked, SettingsError if there are too many samples.
    """
    progress = progress or (lambda what, done, of: None)
    rows, header = np.flatnonzero(store.valid), store.header
    if not len(rows):
        raise TraceError(f"{store.path} holds no sample that has gradients to rank.")
    fold = _fold(len(rows), header.gradient_count, header.dimension)
    found = principal_directions(store, min(DIRECTIONS, len(rows)), progress)
    found = found.largest(choose_directions(found.eigenvalues))
    real = np.where(found.eigenvalues > 0, found.eigenvalues, 0.0)
    smallest = np.where(real > 0, real, np.inf).min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        taken = np.where(real > 0, real / (real + smallest), 0.0)  # d / (d + d_r)
    half = (1 - np.sqrt(1 - taken)).astype(np.float32)
    folded = found.vectors.reshape(*found.vectors.shape[:2], -1, fold).sum(axis=2)
    vectors = np.empty((len(rows), header.gradient_count * fold), np.float32)
    influence = np.empty(len(rows))
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(core_count()) as pool:
        for here in row_blocks(store, rows):
            block = store.gradients(rows[here])

            def of_timestep(t: int, block: Floats = block, here: slice = here) -> NDArray[np.float64]:
                along = block[:, t] @ found.vectors[t].T
                own = block[:, t].reshape(len(block), -1, fold).sum(axis=1) - (along * half[t]) @ folded[t]
                vectors[here, t * fold : (t + 1) * fold] = own
                squares = np.vecdot(block[:, t], block[:, t]).astype(np.float64)
                left: NDArray[np.float64] = squares - (along.astype(np.float64) ** 2) @ taken[t]
                return left

            influence[here] = np.maximum(sum(pool.map(of_timestep, range(header.gradient_count))), 0)
            progress("taking out what samples share", here.stop, len(rows))
    if not np.isfinite(influence).all():
        raise TraceError(f"{store.path} is damaged: it holds numbers that are not finite.")
    # The norm of what was folded is known; that of the fold would add its error.
    norms = np.sqrt(influence)[:, None].astype(np.float32)
    np.divide(vectors, norms, out=vectors, where=norms > 1e-6)
    vectors[norms[:, 0] <= 1e-6] = 0
    return OwnParts(rows, vectors, influence / header.gradient_count)


def find_alike(vectors: Floats, k: int, *, near_copy: float = NEAR_COPY, progress: Progress | None = None) -> Alike:
    """The k nearest others of each sample by vectors (n, L), or as many as there are, and its near-copies."""
    progress, count = progress or (lambda what, done, of: None), len(vectors)
    k = min(k, count - 1)
    nearest, similarity = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    original = np.arange(count)
    for start, block in _blocks(vectors):
        own = np.arange(start, start + len(block))
        for place, similarities in zip(own, block, strict=True):
            # A near-copy of a near-copy is none of the first sample: clusters do not grow into chains.
            if original[place] == place:
                copies = place + 1 + np.flatnonzero(similarities[place + 1 :] >= near_copy)
                original[copies[original[copies] == copies]] = place
        block[np.arange(len(block)), own] = -np.inf
        if k:
            best = np.argpartition(block, count - k, axis=1)[:, count - k :]
            found = np.take_along_axis(block, best, axis=1)
            order = np.lexsort((best, -found), axis=1)
            nearest[own] = np.take_along_axis(best, order, axis=1)
            similarity[own] = np.take_along_axis(found, order, axis=1)
        progress("comparing samples with each other", start + len(block), count)
    return Alike(nearest, similarity, original)


def near_copies(store: Store, progress: Progress | None = None) -> list[Places]:
    """Clusters of near-copies among the samples of a store, by data set index: each begins with the sample that the
    others are alike. Raises what `own_parts` does."""
    parts = own_parts(store, progress)
    found = find_alike(parts.vectors, 0, progress=progress)
    return clusters(found.original, store.sample[parts.rows])


def clusters(original: Places, samples: Places) -> list[Places]:
    """The clusters of near-copies, (n,) as in `Alike`, by the data set indices (n,) of the samples."""
    order = np.argsort(original, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(original[order])) + 1)
    # Of the same first sample, which is the lowest place.
    return [samples[group] for group in groups if len(group) > 1]


def _blocks(vectors: Floats) -> Iterator[tuple[int, Floats]]:
    """Where blocks of rows of all similarities start, and they, (n', n)."""
    size = max(1, BLOCK_NUMBERS // len(vectors))
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size] @ vectors.T


def _fold(samples: int, groups: int, dimension: int) -> int:
    """How many numbers the row of a timestep is folded into: a part of the dimension, which is a power of two."""
    wanted = max(MIN_LENGTH, min(LENGTH, MAX_NUMBERS // samples))
    if MIN_LENGTH * samples > MAX_NUMBERS:
        most = MAX_NUMBERS // MIN_LENGTH
        raise SettingsError(f"The trace has {samples:,} samples; up to {most:,} can be compared with each other.")
    fold = dimension
    while fold > 1 and fold * groups >= 2 * wanted:
        fold //= 2
    return fold
