"""Exact scores: the influence score of every stored sample for a query, and the largest or smallest of them.

The influence score of sample i is the sum over timesteps of the inner products of its projected gradients with the
query's (paper, equations 7 to 9, without the constant of the learning rate). Chunks are scored by a thread for each
core, with BLAS on one thread each. Memory does not grow with the number of samples, but for what is returned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.search.products import ChunkProducts
from dmin_trace.search.ranking import Floats, Ranking, Rows, check_k, check_queries, has_direction, rerank
from dmin_trace.store import Store, core_count

R = TypeVar("R")
Progress = Callable[[int], None]

ROUNDING = 1e-5
"""The most by which float32 rounding changes the difference of two scores, for a query of norm one at one timestep."""


def exact_top_k(
    store: Store,
    queries: Floats,
    k: int,
    *,
    largest: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """Scores every row of the store and keeps the k best for each query; ties by the lowest row.

    A first pass in float32 keeps every row that rounding could hide among the k best; their scores are then computed
    in float64.

    Args:
        store: the store. Rows that are not done, or have no gradient to rank, are left out.
        queries: (Q, T, v), projected gradients.
        k: how many rows are kept for each query.
        largest: keep the largest scores, largest first; False keeps the smallest, smallest first.
        threads: the number of threads; one for each core if not given.
        progress: called with the number of rows of each chunk that is scored.

    Raises:
        QueryError: k is out of range, or the queries are not finite or not of the store's shape.
        TraceError: a chunk is damaged.
    """
    check_k(store, k)
    check_queries(store, queries)
    queries = np.ascontiguousarray(queries, np.float32)
    products, first_pass = ChunkProducts(store, queries), _FirstPass(queries, k)

    def near_of_chunk(chunk: int) -> _Found:
        valid, scores = _chunk_scores(store, products, chunk)
        rows, scores = np.flatnonzero(valid) + store.header.rows(chunk).start, scores[0, valid]
        return first_pass.near(rows, scores if largest else -scores)

    with closing(_each_chunk(store, near_of_chunk, threads, progress)) as chunks:
        for found in chunks:
            first_pass.add(found)
    return rerank(store, queries, first_pass.candidates(), k, largest=largest)


def scores_by_chunk(
    store: Store,
    queries: Floats,
    *,
    per_timestep: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[range, Floats], None, None]:
    """Yields the rows of each chunk that is done, and their scores: (Q, n) float32, or (Q, n, T) per timestep.

    NaN for a row that has no gradient to rank. Sums are in float32, so the scores of equal rows may differ in the last
    digit; `exact_top_k` ranks exactly. Few chunks are scored ahead, so that memory is bounded.

    Args: as of `exact_top_k`; `per_timestep` gives the inner product at each timestep, not their sum.

    Raises:
        QueryError: the queries are not finite or not of the store's shape.
        TraceError: a chunk is damaged.
    """
    check_queries(store, queries)
    products = ChunkProducts(store, np.ascontiguousarray(queries, np.float32), per_timestep=per_timestep)

    def of_chunk(chunk: int) -> Floats:
        valid, scores = _chunk_scores(store, products, chunk)
        scores[:, ~valid] = np.nan
        return scores.transpose(2, 1, 0) if per_timestep else scores[0].T

    with closing(_each_chunk(store, of_chunk, threads, progress)) as chunks:
        for chunk, scores in zip(store.chunks_done, chunks, strict=True):
            yield store.header.rows(chunk), scores


_Found = tuple[Rows, Rows, Floats]
"""Rows, the queries that they were found for, and their scores."""


class _FirstPass:
    """The rows that may be among the k best of each query, by scores in float32.

    A row is left out only if its score is further below the k-th best than rounding can explain.
    """

    def __init__(self, queries: Floats, k: int) -> None:
        self._count, self._k = len(queries), k
        self._rounding = ROUNDING * np.sqrt(np.vecdot(queries, queries)).sum(axis=1)
        self._border = np.full(len(queries), -np.inf)
        self._found: list[_Found] = []
        self._kept = self._new = 0

    def near(self, rows: Rows, scores: Floats) -> _Found:
        """Those of rows (n,) with scores (n, Q) that may be among the k best. Any thread may call it."""
        border = self._border
        if len(scores) >= self._k:
            kth = np.partition(scores, len(scores) - self._k, axis=0)[len(scores) - self._k]
            border = np.maximum(border, kth - self._rounding)
        places, queries = np.nonzero(scores >= border)
        return rows[places], queries, scores[places, queries]

    def add(self, found: _Found) -> None:
        """Adds rows that `near` found."""
        self._found.append(found)
        self._new += len(found[0])
        if self._new > self._kept + self._count * self._k:
            self._drop()

    def candidates(self) -> list[Rows]:
        """For each query the rows that are left."""
        rows, queries, _ = self._drop()
        return np.split(rows, np.searchsorted(queries, np.arange(1, self._count)))

    def _drop(self) -> _Found:
        """Leaves out rows below the border, which rises as more rows are known. What is left is sorted by query."""
        rows, queries, scores = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        order = np.lexsort((-scores, queries))
        rows, queries, scores = rows[order], queries[order], scores[order]
        firsts = np.searchsorted(queries, np.arange(self._count))
        enough = np.flatnonzero(np.bincount(queries, minlength=self._count) >= self._k)
        border = self._border.copy()
        border[enough] = scores[firsts[enough] + self._k - 1] - self._rounding[enough]
        left = scores >= border[queries]
        kept = rows[left], queries[left], scores[left]
        self._found, self._kept, self._new = [kept], len(kept[0]), 0
        self._border = border
        return kept


def _chunk_scores(store: Store, products: ChunkProducts, chunk: int) -> tuple[NDArray[np.bool_], Floats]:
    """Which rows (n,) of a chunk can be ranked, and the products (S, n, Q) of all."""
    numbers = store.numbers_of(chunk)
    valid = has_direction(numbers.norm)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged numbers give an error below, and no warning
        scores = products(chunk, numbers.scale)
    if not np.isfinite(scores[:, valid]).all():
        raise TraceError(f"{store.path} is damaged: chunk {chunk} holds numbers that are not finite.")
    return valid, scores


def _each_chunk(
    store: Store, of_chunk: Callable[[int], R], threads: int | None, progress: Progress | None
) -> Generator[R, None, None]:
    """Calls `of_chunk` for each chunk that is done, in threads, and yields the results in the order of the chunks."""
    if threads is not None and threads < 1:
        raise QueryError(f"threads is {threads}; expected 1 or more.")
    threads = threads or core_count()
    chunks = iter(store.chunks_done)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        # Few chunks are scored ahead of the caller, so that memory does not grow where the caller is slower.
        running = deque((chunk, pool.submit(of_chunk, chunk)) for chunk in islice(chunks, 2 * threads))
        while running:
            chunk, future = running.popleft()
            yield future.result()
            running.extend((later, pool.submit(of_chunk, later)) for later in islice(chunks, 1))
            if progress is not None:
                progress(len(store.header.rows(chunk)))
