"""Deflated scores: what all samples share is taken out of the query, which is then scored like any other.

For each timestep t on its own, G has a row for each sample that can be ranked, its v numbers. K = G G', with
eigenvalues d and the principal directions V of the rows (not centred). Plain inner products say what looks like the
query; most of them is the same for every sample. Deflation weighs each of the r largest directions by
lambda / (d + lambda), so that what few samples have counts for more:

    q' = q - V diag(d / (d + lambda)) V' q        with lambda = d_r

Along the directions it takes out, this is kernel ridge regression, which TRAK's scores are (arXiv 2303.14186). Ridge
regression along all directions gains nothing over it, and needs all N x N numbers of K (docs/quality.md).

Each timestep has a matrix K of its own. One K of all timesteps together was no better at finding causes wherever both
were measured (docs/quality.md), and is no smaller.

Only the query changes, so the exact scan, the index and the rerank serve deflated queries as they are. V has r x v
numbers a timestep, and is found in a few passes over the store whatever N is.

Everything is multiplied by BLAS on one thread, a thread for each timestep: the numbers do not depend on how many
threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.store import Store
from dmin_trace.store.cores import core_count

Score = Literal["dmin", "deflated"]
"""The scores that samples are ranked by: the paper's inner products, or those of deflated queries (`scores`)."""

DENSE = 1024
"""Samples up to which K is decomposed as it is: exact, and less work than passes over the store."""
SHARED = 3.0
"""A direction with more than this many times what one sample alone has, 1, is shared. Kaiser's rule for principal
components is 1. Fewer directions cost a little of the datamodeling score, and gain as much where only the best few are
looked at (docs/quality.md)."""
FOUND = 2**31
"""Numbers of gradients, N T v, in which a query finds the directions itself where none are kept: about a minute."""
MOST_CHOSEN = 256
"""Directions that are looked for where no number is given."""
MOST_DIRECTIONS = 4096
"""Directions at the most, whoever asks."""
PASSES = 3
"""Over the store, where it has more samples than DENSE."""
NULL = 1e-6
"""Eigenvalues below this part of the largest are rounding errors, and their directions are none."""
BLOCK = 2**24
"""Numbers of gradients that are converted to float32 at a time."""
LARGEST = 2**28
"""Numbers of directions, r T v, where no number is given, at the most: a gibibyte."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Directions:
    """The r largest principal directions of a store's samples at each timestep.

    vectors: (T, r, v) float32; those of a timestep are orthonormal, or zero where it has no more of them.
    eigenvalues: (T, r) float64, of each timestep's K, the largest first; zero where the vector is.
    """

    vectors: NDArray[np.float32]
    eigenvalues: NDArray[np.float64]

    def largest(self, count: int) -> Directions:
        """The first of them, as if no more had been looked for."""
        return Directions(self.vectors[:, :count], self.eigenvalues[:, :count])

    def deflate(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The queries (Q, T, v) for deflated scores, with lambda the last eigenvalue; float32, of the same shape."""
        freed = np.array(queries, np.float32)
        with threadpool_limits(1, "blas"):
            for t, (vectors, eigenvalues) in enumerate(zip(self.vectors, self.eigenvalues, strict=True)):
                real = eigenvalues > 0
                if not real.any():
                    continue
                shrunk = eigenvalues[real] / (eigenvalues[real] + eigenvalues[real][-1])
                basis = vectors[real].astype(np.float64)
                freed[:, t] -= (queries[:, t].astype(np.float64) @ basis.T * shrunk) @ basis
        return freed


def choose_directions(eigenvalues: NDArray[np.float64]) -> int:
    """How many of the principal directions all samples share, where nobody says; at least one.

    Those along which more lies than SHARED times what one sample alone has: its own direction, shared with none, has
    the eigenvalue 1, the mean of K's diagonal. It is Kaiser's rule for principal components (more than the mean) with a
    margin, of the timestep that has most of them; it needs nothing but the store.

    Args:
        eigenvalues: (T, r), of each timestep.
    """
    return max(1, int((eigenvalues > SHARED).sum(axis=1).max()))


def principal_directions(trace: Store, count: int | None = None, progress: Progress | None = None) -> Directions:
    """The largest principal directions of the samples that can be ranked, fewer than `count` where there are no more.

    Of up to DENSE samples they are exact. Of more they come from PASSES passes over the store: a random basis is
    multiplied by G' G in each (Halko, Martinsson and Tropp, arXiv 0909.4061), and the last one gives a Nystroem
    approximation (Tropp et al., arXiv 1706.05736). The largest are then as good as exact; of the last, which follow
    each other closely, some are mixed with those beyond them. Memory is twice the directions and a tenth, and a block.

    Args:
        trace: the store.
        count: r; `choose_directions` says how many of up to 256 if it is not given.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        SettingsError: count is out of range.
        TraceError: the store is damaged, or has no sample that can be ranked.
    """
    if count is not None and not 1 <= count <= MOST_DIRECTIONS:
        raise SettingsError(f"directions is {count}; expected 1 to {MOST_DIRECTIONS}.")
    slots = _ranked(trace)
    progress = progress or (lambda what, done, of: None)
    most = min(count or _most_chosen(trace), len(slots), trace.header.dimension)
    find = _exact_directions if len(slots) <= DENSE else _approximate_directions
    with _pool() as pool, np.errstate(invalid="ignore", over="ignore"):
        found = find(trace, slots, most, pool, progress)
    return found if count else found.largest(choose_directions(found.eigenvalues))


def memory(trace: Store, count: int | None = None) -> int:
    """Bytes that `principal_directions` takes at the most, but for a block."""
    header = trace.header
    width = min(_width(count or _most_chosen(trace)), header.dimension, header.samples)
    return 12 * len(header.timesteps) * header.dimension * width


def _exact_directions(
    trace: Store, slots: NDArray[np.int64], count: int, pool: ThreadPoolExecutor, progress: Progress
) -> Directions:
    found = list(pool.map(partial(_largest, count=count), _grams(trace, slots, pool, progress)))
    eigenvalues, mixtures = (np.stack(parts) for parts in zip(*found, strict=True))
    return Directions(_mixed(trace, slots, _over_root(mixtures, eigenvalues), pool, progress), eigenvalues)


def _approximate_directions(
    trace: Store, slots: NDArray[np.int64], count: int, pool: ThreadPoolExecutor, progress: Progress
) -> Directions:
    timesteps, dimension = len(trace.header.timesteps), trace.header.dimension
    width = min(_width(count), len(slots), dimension)
    basis = np.random.default_rng(0).standard_normal((timesteps, width, dimension), np.float32)
    for n in range(PASSES):
        image = np.zeros_like(basis)  # G' G of the basis
        for rows in _blocks(trace, slots, progress, n, PASSES):
            along = _along(rows, basis, pool).astype(np.float32)
            list(pool.map(partial(_add, image, along, rows), range(timesteps)))
        if n < PASSES - 1:
            # Orthonormal again, and near to the principal directions: then the small ones lose nothing to rounding.
            basis = np.stack(list(pool.map(_orthonormal, image)))
    found = list(pool.map(partial(_nystroem, count=count), basis, image))
    return Directions(*(np.stack(parts) for parts in zip(*found, strict=True)))


def _orthonormal(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (width, v) in the same span, orthonormal, or zero where the span has no more."""
    squares, mixtures = _largest(_products(vectors, vectors), len(vectors), NULL**2)
    return _mixtures_of(vectors, _over_root(mixtures, squares))


def _nystroem(
    basis: NDArray[np.float32], image: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Directions (r, v) and eigenvalues (r,) of G' G, which is about Z (W' Z)^-1 Z' for a basis W and its image Z."""
    small, mixtures = _largest(_products(basis, image), len(basis))
    root = _over_root(mixtures, small)
    eigenvalues, mixtures = _largest(root.T @ _products(image, image) @ root, count)
    return _mixtures_of(image, root @ _over_root(mixtures, eigenvalues)), eigenvalues


def _grams(trace: Store, slots: NDArray[np.int64], pool: ThreadPoolExecutor, progress: Progress) -> NDArray[np.float64]:
    """(T, n, n) the products of these samples with each other."""
    kernels = np.empty((len(trace.header.timesteps), len(slots), len(slots)))
    size = 4 * _block_rows(trace)
    for start in range(0, len(slots), size):
        some = trace.gradients(slots[start : start + size]).transpose(1, 0, 2)
        end, at = start + some.shape[1], start
        for rows in _blocks(trace, slots[start:]):
            here = slice(at, at + len(rows))
            kernels[:, here, start:end] = _along(rows, some, pool)
            kernels[:, start:end, here] = kernels[:, here, start:end].transpose(0, 2, 1)
            at += len(rows)
        progress("multiplying samples with each other", end * (2 * len(slots) - end), len(slots) ** 2)
    return kernels


def _along(rows: NDArray[np.float32], basis: NDArray[np.float32], pool: ThreadPoolExecutor) -> NDArray[np.float64]:
    """(T, n, width) the products of rows (n, T, v) with vectors (T, width, v)."""
    products = np.stack(list(pool.map(np.matmul, rows.transpose(1, 0, 2), basis.transpose(0, 2, 1)))).astype(np.float64)
    if not np.isfinite(products).all():
        raise TraceError("The trace is damaged: it holds numbers that are not finite.")
    return products


def _mixed(
    trace: Store, slots: NDArray[np.int64], mixtures: NDArray[np.float64], pool: ThreadPoolExecutor, progress: Progress
) -> NDArray[np.float32]:
    """(T, width, v) the sums of the samples' vectors at each timestep, weighted by mixtures (T, n, width)."""
    sums = np.zeros((len(mixtures), mixtures.shape[2], trace.header.dimension), np.float32)
    at = 0
    for rows in _blocks(trace, slots, progress):
        weights = mixtures[:, at : at + len(rows)].astype(np.float32)
        list(pool.map(partial(_add, sums, weights, rows), range(len(sums))))
        at += len(rows)
    return sums


def _add(sums: NDArray[np.float32], weights: NDArray[np.float32], rows: NDArray[np.float32], t: int) -> None:
    sums[t] += weights[t].T @ rows[:, t]


def _products(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """(width, width) the products of vectors (width, v), made symmetric: but for rounding they are."""
    products = some.astype(np.float64) @ others.T.astype(np.float64)
    return (products + products.T) / 2


def _mixtures_of(vectors: NDArray[np.float32], mixtures: NDArray[np.float64]) -> NDArray[np.float32]:
    """(r, v) mixtures (width, r) of vectors (width, v)."""
    mixed: NDArray[np.float32] = (mixtures.T @ vectors.astype(np.float64)).astype(np.float32)
    return mixed


def _largest(
    symmetric: NDArray[np.float64], count: int, least: float = NULL
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The `count` largest eigenvalues, largest first, and (n, count) their vectors; zero what is a rounding error."""
    values, vectors = np.linalg.eigh(symmetric)  # the smallest first
    values, vectors = values[: -1 - count : -1], vectors[:, : -1 - count : -1]
    real = values > least * values[0]
    return np.where(real, values, 0.0), vectors * real


def _over_root(vectors: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (..., n, r) over the roots of their values (..., r); zero where those are."""
    return vectors / np.sqrt(np.where(values > 0, values, 1.0))[..., None, :]


def _most_chosen(trace: Store) -> int:
    return min(MOST_CHOSEN, max(1, LARGEST // (len(trace.header.timesteps) * trace.header.dimension)))


def _width(count: int) -> int:
    """How many directions are looked for, so that the wanted ones are good."""
    return count + max(16, count // 8)


def _ranked(trace: Store) -> NDArray[np.int64]:
    slots = np.flatnonzero(trace.valid)
    if not len(slots):
        raise TraceError(f"{trace.path} holds no sample that has gradients to rank.")
    return slots


def _block_rows(trace: Store) -> int:
    return max(1, BLOCK // (len(trace.header.timesteps) * trace.header.dimension))


def _blocks(
    trace: Store, slots: NDArray[np.int64], progress: Progress | None = None, turn: int = 0, turns: int = 1
) -> Iterator[NDArray[np.float32]]:
    """The samples' gradients in order, in blocks (n, T, v) that are few enough to be held as float32."""
    size = _block_rows(trace)
    for start in range(0, len(slots), size):
        yield trace.gradients(slots[start : start + size])
        if progress is not None:
            progress("looking for what samples share", turn * len(slots) + start + size, turns * len(slots))


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """A thread a core, with BLAS on one thread each."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(core_count()) as pool:
        yield pool
