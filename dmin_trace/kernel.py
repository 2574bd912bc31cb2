"""Kernel scores: the query is freed of what all samples share, and then scored by inner products like any other.

G has a row for each sample that can be ranked: its concat vector, the T v numbers of all timesteps one after another.
K = G G', with eigenvalues d and the principal directions V of the rows (not centred). Plain inner products say what
looks like the query; most of them is the same for every sample. Kernel ridge regression, which TRAK's scores are (arXiv
2303.14186), weighs each direction by lambda / (d + lambda), so that what few samples have counts for more:

    ridge       q' = q - G' (K + lambda I)^-1 G q       whose scores are G q' = lambda (K + lambda I)^-1 G q
    deflated    q' = q - V diag(d / (d + d_r)) V' q     the same in the r largest directions, with lambda = d_r

Only the query changes, so the exact scan, the index and the rerank serve both as they are. Ridge needs K, of N x N
numbers; deflation needs V, of r x T v numbers, found in a few passes over the store whatever N is.

Everything is multiplied by BLAS on one thread, a thread for each timestep, and added up in one order: the numbers do
not depend on how many threads there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace import score
from dmin_trace.errors import QueryError, SettingsError, TraceError
from dmin_trace.store import Trace

DENSE = 2048
"""Samples up to which K is decomposed as it is: exact, and less work than passes over the store."""
SOLVED = 4096
"""Samples that ridge scores are made for at the most."""
LEAST_CHOSEN, MOST_CHOSEN = 8, 256
"""Between these lies the number of directions that is chosen where none is given."""
MOST_DIRECTIONS = 4096
"""Directions at the most, whoever asks."""
PASSES = 3
"""Over the store, where it has more samples than DENSE."""
NULL = 1e-6
"""Eigenvalues below this part of the largest are rounding errors, and their directions are none."""
BLOCK = 2**24
"""Numbers of gradients that are converted to float32 at a time."""
LARGEST = 2**28
"""Numbers of directions, r T v, that are chosen at the most: a gibibyte."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Directions:
    """The r largest principal directions of a store's samples.

    vectors: (T, r, v) float32; each is of T v numbers, and they are orthonormal.
    eigenvalues: (r,) float64, of K, the largest first.
    """

    vectors: NDArray[np.float32]
    eigenvalues: NDArray[np.float64]

    def largest(self, count: int) -> Directions:
        """The first of them, as if no more had been looked for."""
        return Directions(self.vectors[:, :count], self.eigenvalues[:count])

    def deflate(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The queries (Q, T, v) for deflated scores, with lambda the last eigenvalue; float32, of the same shape."""
        if not len(self.eigenvalues):
            return queries
        shrunk = self.eigenvalues / (self.eigenvalues + self.eigenvalues[-1])
        freed = np.empty(queries.shape, np.float32)
        with threadpool_limits(1, "blas"):
            along = np.zeros((len(queries), len(shrunk)))
            for t, vectors in enumerate(self.vectors):
                along += queries[:, t].astype(np.float64) @ vectors.T.astype(np.float64)
            along *= shrunk
            for t, vectors in enumerate(self.vectors):
                freed[:, t] = queries[:, t] - along @ vectors.astype(np.float64)
        return freed


def choose_directions(trace: Trace) -> int:
    """How many directions to take out where nobody says: an eighth as many as there are samples, 8 to 256.

    Not so many that they take more than a gibibyte.
    """
    header = trace.header
    samples = int(trace.rankable.sum())
    room = LARGEST // (len(header.timesteps) * header.dimension)
    return min(samples, max(1, room), min(max(samples // 8, LEAST_CHOSEN), MOST_CHOSEN))


def principal_directions(trace: Trace, count: int, progress: Progress | None = None) -> Directions:
    """The largest principal directions of the samples that can be ranked, fewer than `count` where there are no more.

    Of up to DENSE samples they are exact. Of more they come from PASSES passes over the store: a random basis is
    multiplied by G' G in each (Halko, Martinsson and Tropp, arXiv 0909.4061), and the last one gives a Nystroem
    approximation (Tropp et al., arXiv 1706.05736). The largest are then as good as exact; of the last, which follow
    each other closely, some are mixed with those beyond them. Memory is twice the directions and a tenth, and a block.

    Args:
        trace: the store.
        count: r, at least 1.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        SettingsError: count is out of range.
        TraceError: the store is damaged, or has no sample that can be ranked.
    """
    if not 1 <= count <= MOST_DIRECTIONS:
        raise SettingsError(f"directions is {count}; expected 1 to {MOST_DIRECTIONS}.")
    slots = _ranked(trace)
    progress = progress or (lambda what, done, of: None)
    with _pool() as pool, np.errstate(invalid="ignore", over="ignore"):
        if len(slots) <= DENSE:
            return _exact_directions(trace, slots, count, pool, progress)
        return _approximate_directions(trace, slots, count, pool, progress)


def gram(trace: Trace, progress: Progress | None = None) -> NDArray[np.float64]:
    """K of the samples that can be ranked, (n, n). Raises TraceError as `principal_directions` does."""
    with _pool() as pool, np.errstate(invalid="ignore", over="ignore"):
        return _gram(trace, _ranked(trace), pool, progress or (lambda what, done, of: None))


def ridge(
    trace: Trace,
    queries: NDArray[np.float32],
    strength: float,
    *,
    kernel: NDArray[np.float64] | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The queries for ridge scores, float32, of the same shape.

    Args:
        trace: the store, of SOLVED samples at the most.
        queries: (Q, T, v), compressed gradients.
        strength: lambda, over the mean of K's diagonal.
        kernel: K, from `gram`, if it is there already.
        progress: as for `principal_directions`.

    Raises:
        SettingsError: the strength is out of range.
        QueryError: the store has too many samples, or the queries are not finite or not of the store's shape.
        TraceError: the store is damaged.
    """
    if not 0 < strength < float("inf"):
        raise SettingsError(f"ridge is {strength}; expected a number above 0.")
    score.check_queries(trace, queries)
    slots = _ranked(trace)
    if len(slots) > SOLVED:
        raise QueryError(
            f"Ridge scores multiply all samples with each other, which is done for up to {SOLVED:,} of them, and this "
            f"trace has {len(slots):,}. Ask for deflated scores: they come near, and cost no more than others."
        )
    progress = progress or (lambda what, done, of: None)
    with _pool() as pool, np.errstate(invalid="ignore", over="ignore"):
        if kernel is None:
            kernel = _gram(trace, slots, pool, progress)
        damped = kernel + np.eye(len(slots)) * (strength * np.trace(kernel) / len(slots))
        basis = queries.transpose(1, 0, 2)
        products = np.concatenate([_along(rows, basis, pool) for rows in _blocks(trace, slots, progress)])
        mixture = np.linalg.solve(damped, products)
        shared = _mixed(trace, slots, mixture, pool, progress)
    freed: NDArray[np.float32] = (queries - shared.transpose(1, 0, 2)).astype(np.float32)
    return freed


def _exact_directions(
    trace: Trace, slots: NDArray[np.int64], count: int, pool: ThreadPoolExecutor, progress: Progress
) -> Directions:
    eigenvalues, mixtures = _largest(_gram(trace, slots, pool, progress), count)
    vectors = _mixed(trace, slots, mixtures / np.sqrt(eigenvalues), pool, progress)
    return Directions(vectors, eigenvalues)


def _approximate_directions(
    trace: Trace, slots: NDArray[np.int64], count: int, pool: ThreadPoolExecutor, progress: Progress
) -> Directions:
    timesteps, dimension = len(trace.header.timesteps), trace.header.dimension
    width = min(count + max(16, count // 8), len(slots), timesteps * dimension)
    basis = np.random.default_rng(0).standard_normal((timesteps, width, dimension), np.float32)
    for n in range(PASSES):
        image = np.zeros_like(basis)  # G' G of the basis
        for rows in _blocks(trace, slots, progress, n, PASSES):
            along = _along(rows, basis, pool).astype(np.float32)
            list(pool.map(partial(_add, image, along, rows), range(timesteps)))
        if n < PASSES - 1:
            # Orthonormal again, and near to the principal directions: then the small ones lose nothing to rounding.
            squares, mixtures = _largest(_products(image, image), width, NULL**2)
            basis = _rotated(image, mixtures / np.sqrt(squares))
    # G' G is about Z (W' Z)^-1 Z' for a basis W and its image Z.
    small, mixtures = _largest(_products(basis, image), width)
    root = mixtures / np.sqrt(small)
    eigenvalues, mixtures = _largest(root.T @ _products(image, image) @ root, count)
    return Directions(_rotated(image, root @ (mixtures / np.sqrt(eigenvalues))), eigenvalues)


def _gram(trace: Trace, slots: NDArray[np.int64], pool: ThreadPoolExecutor, progress: Progress) -> NDArray[np.float64]:
    """(n, n) the products of these samples with each other."""
    kernel = np.empty((len(slots), len(slots)))
    size = 4 * _block_rows(trace)
    for start in range(0, len(slots), size):
        some = trace.rows(slots[start : start + size]).transpose(1, 0, 2)
        end, at = start + some.shape[1], start
        for rows in _blocks(trace, slots[start:]):
            here = slice(at, at + len(rows))
            kernel[here, start:end] = _along(rows, some, pool)
            kernel[start:end, here] = kernel[here, start:end].T
            at += len(rows)
        progress("multiplying samples with each other", end * (2 * len(slots) - end), len(slots) ** 2)
    return kernel


def _along(rows: NDArray[np.float32], basis: NDArray[np.float32], pool: ThreadPoolExecutor) -> NDArray[np.float64]:
    """(n, width) the products of rows (n, T, v) with vectors (T, width, v): float32 in a timestep, their sum float64."""
    products = np.zeros((len(rows), basis.shape[1]))
    for product in pool.map(np.matmul, rows.transpose(1, 0, 2), basis.transpose(0, 2, 1)):
        products += product
    if not np.isfinite(products).all():
        raise TraceError("The trace is damaged: it holds numbers that are not finite.")
    return products


def _mixed(
    trace: Trace, slots: NDArray[np.int64], mixtures: NDArray[np.float64], pool: ThreadPoolExecutor, progress: Progress
) -> NDArray[np.float32]:
    """(T, width, v) the sums of the samples' vectors, weighted by mixtures (n, width)."""
    timesteps = len(trace.header.timesteps)
    sums = np.zeros((timesteps, mixtures.shape[1], trace.header.dimension), np.float32)
    at = 0
    for rows in _blocks(trace, slots, progress):
        weights = mixtures[at : at + len(rows)].astype(np.float32)
        list(pool.map(partial(_add, sums, weights, rows), range(timesteps)))
        at += len(rows)
    return sums


def _add(sums: NDArray[np.float32], weights: NDArray[np.float32], rows: NDArray[np.float32], t: int) -> None:
    sums[t] += weights.T @ rows[:, t]


def _products(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """(width, width) the products of vectors (T, width, v), made symmetric: but for rounding they are."""
    products = np.zeros((some.shape[1], others.shape[1]))
    for one, other in zip(some, others, strict=True):
        products += one.astype(np.float64) @ other.T.astype(np.float64)
    return (products + products.T) / 2


def _rotated(vectors: NDArray[np.float32], mixtures: NDArray[np.float64]) -> NDArray[np.float32]:
    """(T, r, v) mixtures (width, r) of vectors (T, width, v)."""
    return np.stack([(mixtures.T @ part.astype(np.float64)).astype(np.float32) for part in vectors])


def _largest(
    symmetric: NDArray[np.float64], count: int, least: float = NULL
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest eigenvalues, largest first, and (n, r) their vectors; only those that are no rounding errors."""
    values, vectors = np.linalg.eigh(symmetric)  # the smallest first
    values, vectors = values[: -1 - count : -1], vectors[:, : -1 - count : -1]
    real = values > least * values[0]
    return values[real], vectors[:, real]


def _ranked(trace: Trace) -> NDArray[np.int64]:
    slots = np.flatnonzero(trace.rankable)
    if not len(slots):
        raise TraceError(f"{trace.path} holds no sample that has gradients to rank.")
    return slots


def _block_rows(trace: Trace) -> int:
    return max(1, BLOCK // (len(trace.header.timesteps) * trace.header.dimension))


def _blocks(
    trace: Trace, slots: NDArray[np.int64], progress: Progress | None = None, turn: int = 0, turns: int = 1
) -> Iterator[NDArray[np.float32]]:
    """The samples' gradients in order, in blocks (n, T, v) that are few enough to be held as float32."""
    size = _block_rows(trace)
    for start in range(0, len(slots), size):
        yield trace.rows(slots[start : start + size])
        if progress is not None:
            progress("looking for what samples share", turn * len(slots) + start + size, turns * len(slots))


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """A thread a core, with BLAS on one thread each."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield pool
