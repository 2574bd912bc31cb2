"""Deflation: what all samples share is taken out of the query, which is then scored like any other.

At each timestep G has a row for each sample that can be ranked, its v numbers; d are the eigenvalues of K = G G', and V
are the principal directions of the rows (not centred). Each of the r largest is weighed by d_r / (d + d_r):

    q' = q - V diag(d / (d + d_r)) V' q

Along these directions it is kernel ridge regression, which TRAK's scores are (arXiv 2303.14186); docs/quality.md says
what was compared. BLAS runs on one thread, in a thread for each timestep: results do not depend on how many there are.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.search.exact import Floats, Rows
from dmin_trace.store import Store, core_count

Score = Literal["dmin", "deflated"]
"""The built-in scores (`scores`): the paper's inner products, or those of deflated queries."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
Doubles = NDArray[np.float64]

MAX_DENSE_SAMPLES = 1024  # up to which K is decomposed as it is: exact, and less work than passes over the store
PASSES = 3  # over a store of more samples
SHARED_EIGENVALUE = 3.0
"""A direction is shared if its eigenvalue is larger; that of a direction of one sample alone is 1, the mean of K's
diagonal and Kaiser's rule. docs/quality.md compares other values."""
SMALLEST_EIGENVALUE = 1e-6  # below this part of the largest, eigenvalues are rounding errors
MAX_DIRECTIONS = 4096  # that can be wanted
MAX_CHOSEN_DIRECTIONS, MAX_DIRECTION_NUMBERS = 256, 2**28  # r and r R v, a gibibyte, where no number is given
BLOCK_NUMBERS = 2**24  # numbers of gradients that are converted to float32 at a time


@dataclass(frozen=True)
class Directions:
    """The r largest principal directions of a store's samples at each timestep: vectors (R, r, v), orthonormal, or zero
    where there are no more; and their eigenvalues of K, (R, r), the largest first, zero where the vector is."""

    vectors: Floats
    eigenvalues: Doubles

    def largest(self, count: int) -> Self:
        """The first of them, as if no more had been looked for."""
        return type(self)(self.vectors[:, :count], self.eigenvalues[:, :count])

    def deflate(self, queries: Floats) -> Floats:
        """The queries for deflated scores, (Q, R, v) float32 as given; d_r is the last eigenvalue of a timestep."""
        deflated = np.array(queries, np.float32)
        with threadpool_limits(1, "blas"):
            for t, (vectors, eigenvalues) in enumerate(zip(self.vectors, self.eigenvalues, strict=True)):
                real = eigenvalues > 0
                part = eigenvalues[real] / (eigenvalues[real] + eigenvalues[real][-1:])
                basis = vectors[real].astype(np.float64)
                deflated[:, t] -= (queries[:, t].astype(np.float64) @ basis.T * part) @ basis
        return deflated


def choose_directions(eigenvalues: Doubles) -> int:
    """How many directions all samples share, by eigenvalues (R, r), at the timestep with the most; at least one."""
    return max(1, int((eigenvalues > SHARED_EIGENVALUE).sum(axis=1).max()))


def principal_directions(store: Store, count: int | None = None, progress: Progress | None = None) -> Directions:
    """The largest principal directions of the samples that can be ranked.

    For up to MAX_DENSE_SAMPLES samples they are exact. For more, each pass over the store multiplies a random basis by
    G' G (Halko, Martinsson and Tropp, arXiv 0909.4061), and the last one gives a Nystroem approximation (Tropp et al.,
    arXiv 1706.05736). The largest are then as good as exact; the last ones are mixed with those beyond them.

    There are `count` at each timestep, or less where there are no more; if not given, `choose_directions` of up to 256.
    Raises SettingsError if it is out of range, TraceError if the store is damaged or no sample can be ranked.
    """
    if count is not None and not 1 <= count <= MAX_DIRECTIONS:
        raise SettingsError(f"directions is {count}; expected 1 to {MAX_DIRECTIONS}.")
    rows = np.flatnonzero(store.valid)
    if not len(rows):
        raise TraceError(f"{store.path} holds no sample that has gradients to rank.")
    progress = progress or (lambda what, done, of: None)
    most = min(count or _most_chosen(store), len(rows), store.header.dimension)
    find = _exact_directions if len(rows) <= MAX_DENSE_SAMPLES else _approximate_directions
    blas, quiet = threadpool_limits(1, "blas"), np.errstate(invalid="ignore", over="ignore")
    with blas, quiet, ThreadPoolExecutor(core_count()) as pool:
        found = find(store, rows, most, pool, progress)
    return found if count else found.largest(choose_directions(found.eigenvalues))


def directions_memory(store: Store, count: int | None = None) -> int:
    """The bytes that `principal_directions` takes at the most, but for a block of gradients."""
    header = store.header
    width = min(_basis_size(count or _most_chosen(store)), header.dimension, header.samples)
    return 12 * header.gradient_count * header.dimension * width


def row_blocks(store: Store, rows: Rows, numbers: int | None = None, start: int = 0) -> list[slice]:
    """Where blocks of the rows are, from `start` on, of at most `numbers` (BLOCK_NUMBERS) in gradients, or one row."""
    size = max(1, (numbers or BLOCK_NUMBERS) // (store.header.gradient_count * store.header.dimension))
    return [slice(first, min(first + size, len(rows))) for first in range(start, len(rows), size)]


def _exact_directions(store: Store, rows: Rows, count: int, pool: ThreadPoolExecutor, progress: Progress) -> Directions:
    products = _gram_matrices(store, rows, pool, progress)
    found = list(pool.map(partial(_largest, count=count), products))
    eigenvalues, mixtures = (np.stack(parts) for parts in zip(*found, strict=True))
    mixtures = _over_root(mixtures, eigenvalues)
    vectors = np.zeros((len(mixtures), mixtures.shape[2], store.header.dimension), np.float32)
    for here, block in _blocks(store, rows, progress):
        _add(vectors, mixtures[:, here].astype(np.float32), block, pool)
    return Directions(vectors, eigenvalues)


def _gram_matrices(store: Store, rows: Rows, pool: ThreadPoolExecutor, progress: Progress) -> Doubles:
    """(R, n, n) the inner products of these rows with each other."""
    products = np.empty((store.header.gradient_count, len(rows), len(rows)))
    for some in row_blocks(store, rows, 4 * BLOCK_NUMBERS):
        columns = store.gradients(rows[some]).transpose(1, 0, 2)
        for here in row_blocks(store, rows, start=some.start):
            products[:, here, some] = _along(store.gradients(rows[here]), columns, pool)
            products[:, some, here] = products[:, here, some].transpose(0, 2, 1)
        done = some.stop * (2 * len(rows) - some.stop)
        progress("multiplying samples with each other", done, len(rows) ** 2)
    return products


def _approximate_directions(
    store: Store, rows: Rows, count: int, pool: ThreadPoolExecutor, progress: Progress
) -> Directions:
    header, width = store.header, min(_basis_size(count), len(rows), store.header.dimension)
    basis = np.random.default_rng(0).standard_normal((header.gradient_count, width, header.dimension), np.float32)
    for n in range(PASSES):
        image = np.zeros_like(basis)  # G' G of the basis
        for _, block in _blocks(store, rows, progress, n, PASSES):
            _add(image, _along(block, basis, pool).astype(np.float32), block, pool)
        if n < PASSES - 1:
            # Orthonormal again, and near to the principal directions: the small ones then lose nothing to rounding.
            basis = np.stack(list(pool.map(_orthonormal, image)))
    found = list(pool.map(partial(_nystroem, count=count), basis, image))
    return Directions(*(np.stack(parts) for parts in zip(*found, strict=True)))


def _orthonormal(vectors: Floats) -> Floats:
    """Vectors (width, v) in the same span, orthonormal, or zero where the span has no more."""
    squares, mixtures = _largest(_products(vectors, vectors), len(vectors), SMALLEST_EIGENVALUE**2)
    return _mixtures_of(vectors, _over_root(mixtures, squares))


def _nystroem(basis: Floats, image: Floats, count: int) -> tuple[Floats, Doubles]:
    """Directions (r, v) and eigenvalues (r,) of G' G, which is about Z (W' Z)^-1 Z' for a basis W and its image Z."""
    small, mixtures = _largest(_products(basis, image), len(basis))
    root = _over_root(mixtures, small)
    eigenvalues, mixtures = _largest(root.T @ _products(image, image) @ root, count)
    return _mixtures_of(image, root @ _over_root(mixtures, eigenvalues)), eigenvalues


def _along(block: Floats, basis: Floats, pool: ThreadPoolExecutor) -> Doubles:
    """(R, n, width) the inner products of rows (n, R, v) with vectors (R, width, v)."""
    products = np.stack(list(pool.map(np.matmul, block.transpose(1, 0, 2), basis.transpose(0, 2, 1))))
    if not np.isfinite(products).all():
        raise TraceError("The trace is damaged: it holds numbers that are not finite.")
    return products.astype(np.float64)


def _add(sums: Floats, weights: Floats, block: Floats, pool: ThreadPoolExecutor) -> None:
    """Adds to sums (R, width, v) the rows (n, R, v), weighted by (R, n, width)."""

    def add(t: int) -> None:
        sums[t] += weights[t].T @ block[:, t]

    list(pool.map(add, range(len(sums))))


def _products(some: Floats, others: Floats) -> Doubles:
    """(width, width) the inner products of vectors (width, v), made symmetric: but for rounding they are."""
    products = some.astype(np.float64) @ others.T.astype(np.float64)
    return (products + products.T) / 2


def _mixtures_of(vectors: Floats, mixtures: Doubles) -> Floats:
    """(r, v) mixtures (width, r) of vectors (width, v)."""
    return np.asarray(mixtures.T @ vectors.astype(np.float64), np.float32)


def _largest(symmetric: Doubles, count: int, least: float = SMALLEST_EIGENVALUE) -> tuple[Doubles, Doubles]:
    """The `count` largest eigenvalues, largest first, and (n, count) their vectors; zero what is a rounding error."""
    values, vectors = np.linalg.eigh(symmetric)  # the smallest first
    values, vectors = values[: -1 - count : -1], vectors[:, : -1 - count : -1]
    real = values > least * values[0]
    return np.where(real, values, 0.0), vectors * real


def _over_root(vectors: Doubles, values: Doubles) -> Doubles:
    """Vectors (..., n, r) over the roots of their values (..., r); zero where those are."""
    return vectors / np.sqrt(np.where(values > 0, values, 1.0))[..., None, :]


def _most_chosen(store: Store) -> int:
    numbers = store.header.gradient_count * store.header.dimension
    return min(MAX_CHOSEN_DIRECTIONS, max(1, MAX_DIRECTION_NUMBERS // numbers))


def _basis_size(count: int) -> int:
    """How many directions are looked for, so that the wanted ones are good."""
    return count + max(16, count // 8)


def _blocks(
    store: Store, rows: Rows, progress: Progress, turn: int = 0, turns: int = 1
) -> Iterator[tuple[slice, Floats]]:
    """Where blocks of the rows are, and their gradients (n, R, v)."""
    for here in row_blocks(store, rows):
        yield here, store.gradients(rows[here])
        progress("looking for what samples share", turn * len(rows) + here.stop, turns * len(rows))
