"""Exact scores: of every stored sample for a query, the largest or smallest of them, and those of candidates.

The influence score of sample i is the sum over timesteps of the inner products of its projected gradients with the
query's (paper, equations 7 to 9, without the constant of the learning rate). Chunks are scored by a thread for each
core, with BLAS on one thread each. Memory does not grow with the number of samples, but for what is returned.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.search.background import Background, KeptScores
from dmin_trace.store import Store, core_count

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Bools = NDArray[np.bool_]
Products = Callable[[int, Floats], Floats]
R = TypeVar("R")

ROUNDING = 1e-5
"""The most by which float32 rounding changes the difference of two scores, for a query of norm one at one timestep."""
PART_NUMBERS = 2**21  # stored numbers that a thread reads at a time
MAX_PART_ROWS = 2**7  # rows that are multiplied with many queries; all queries are fetched from memory each time
TILE_NUMBERS, MIN_TILE_WIDTH = 2**18, 2**13
"""Numbers that are converted to float32 and multiplied at a time, so that they stay in a core's cache; and those of a
row among them, where a row has so many: memory is slow to give narrower pieces."""
HALF_BITS = np.int32(-0x70002000)  # of a float16, its sign repeated in front: what float32 keeps after a shift by 13


@dataclass(frozen=True)
class Ranking:
    """The k rows (Q, k) with the largest influence scores (Q, k) for each of Q queries, largest first, or the smallest;
    and their inner products at each timestep (Q, k, R), which add up to the score. `backgrounds` are of the Q queries'
    scores over all samples, empty where they were not wanted."""

    rows: Rows
    scores: Floats
    per_timestep: Floats
    backgrounds: tuple[Background, ...] = ()


def usable_k(store: Store, k: int) -> int:
    """k, or the number of rows that can be ranked if that is smaller. Raises QueryError if k or that is below 1."""
    if k < 1:
        raise QueryError(f"k is {k}; expected 1 or more.")
    if store.valid_count < 1:
        unfinished = "" if store.complete else " (the capture is unfinished)"
        raise QueryError(f"None of the trace's {store.header.samples} samples has a gradient to rank{unfinished}.")
    return min(k, store.valid_count)


def check_queries(store: Store, queries: Floats) -> None:
    """Raises QueryError if the queries are not finite or not of shape (Q, R, v)."""
    expected = (store.header.gradient_count, store.header.dimension)
    if queries.ndim != 3 or queries.shape[1:] != expected or not len(queries):
        raise QueryError(f"The queries have shape {queries.shape}; expected (queries, {expected[0]}, {expected[1]}).")
    if not np.isfinite(queries).all():
        raise QueryError("The queries hold numbers that are not finite, so they have no scores.")


def has_direction(norm: NDArray[Any]) -> Bools:
    """(n,) whether rows with these gradient norms (n, R) can be ranked: all norms are finite and above zero."""
    return np.asarray((np.isfinite(norm) & (norm > 0)).all(axis=1))


def exact_top_k(
    store: Store,
    queries: Floats,
    k: int,
    *,
    largest: bool = True,
    background: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ranking:
    """Scores every row of the store and keeps the k best for each of the queries (Q, R, v); ties by the lowest row.

    The best are the largest, or with `largest` False the smallest, smallest first. Rows that are not done, or have no
    gradient to rank, are left out. A first pass in float32 keeps every row that rounding could hide among the k best;
    their scores are then computed in float64. With `background`, the ranking has the background of each query too.
    `progress` is called with the row at which each scored chunk ends.

    Raises QueryError if k is below 1, or the queries are not finite or not of the store's shape; TraceError if a
    chunk is damaged.
    """
    k = usable_k(store, k)
    check_queries(store, queries)
    queries = np.ascontiguousarray(queries, np.float32)
    first_pass = _FirstPass(queries, k, largest)
    kept = KeptScores(len(queries), store.valid_count) if background else None

    def of_chunk(rows: range, valid: Bools, scores: Floats) -> tuple[_Found, Floats | None]:
        chosen = None if kept is None else kept.choose(rows.start, scores[0, valid])
        return first_pass.near(rows, valid, scores), chosen

    with closing(_each_chunk(store, chunk_products(store, queries), of_chunk, threads)) as chunks:
        for rows, (found, chosen) in chunks:
            first_pass.add(found)
            if kept is not None and chosen is not None:
                kept.add(chosen)
            if progress is not None:
                progress(rows.stop)
    ranking = rerank(store, queries, first_pass.candidates(), k, largest=largest)
    return ranking if kept is None else replace(ranking, backgrounds=kept.backgrounds(ranking.scores, largest=largest))


def scores_by_chunk(
    store: Store, queries: Floats, *, per_timestep: bool = False, threads: int | None = None
) -> Generator[tuple[range, Floats], None, None]:
    """Yields the rows of each chunk that is done, and their scores: (Q, n) float32, or (Q, n, R) per timestep; NaN for
    a row that has no gradient to rank. Sums are in float32, so the scores of equal rows may differ in the last digit.
    Raises what `exact_top_k` does."""
    check_queries(store, queries)
    products = chunk_products(store, np.ascontiguousarray(queries, np.float32), per_timestep)

    def by_query(rows: range, valid: Bools, scores: Floats) -> Floats:
        scores[:, ~valid] = np.nan
        return scores.transpose(2, 1, 0) if per_timestep else scores[0].T

    yield from _each_chunk(store, products, by_query, threads)


def rerank(
    store: Store,
    queries: Floats,
    candidates: Sequence[Rows],
    k: int,
    *,
    largest: bool = True,
    checksums: NDArray[np.uint32] | None = None,
) -> Ranking:
    """Computes the scores of candidates, each timestep in float64, and keeps the k best; ties by the lowest row.

    Candidates are k rows or more for each of the queries (Q, R, v), none twice. `checksums` (N,) are the crc32c of the
    stored numbers of each row, from an index. Without them the whole chunk of a candidate is read, to compare its own.

    Raises TraceError if a candidate's row is missing, damaged, not finite, or has no gradient that can be ranked.
    """
    of = np.repeat(np.arange(len(queries)), [len(rows) for rows in candidates])
    rows = np.concatenate(candidates)
    if min(len(each) for each in candidates) < k:
        raise TraceError(f"{store.path} is damaged: fewer rows can be ranked than its metadata says.")
    numbers = store.numbers(rows)
    if not has_direction(numbers.norm).all():
        found = f"A candidate for {store.path} has no gradient that can be ranked, so the index is damaged"
        raise TraceError(f"{found}. Make it anew (dmin-trace index), or scan all samples (--exact).")
    # A row of a file costs the same whenever it is read; a packed chunk is unpacked once for all of its rows.
    order = np.arange(len(rows)) if store.header.codec == "none" else np.argsort(rows, kind="stable")
    parts = np.empty((len(rows), queries.shape[1]))
    row, query, current = np.empty(queries.shape[1:]), np.empty(queries.shape[1:]), -1
    # No threads: rows are so small that two threads would wait for the interpreter's lock more than they gain.
    with threadpool_limits(1, "blas"), np.errstate(invalid="ignore", over="ignore"):
        for n in order:
            if of[n] != current:
                current = of[n]
                np.copyto(query, queries[current])
            # Rows are multiplied one after another in the same memory: equal rows then give equal sums wherever they
            # lie, and the memory stays in the cache.
            at = int(rows[n])
            np.copyto(row, store.stored_row(at, None if checksums is None else int(checksums[at])))
            parts[n] = np.vecdot(row, query) * numbers.scale[n]
    totals = parts.sum(axis=1)
    if not np.isfinite(totals).all():
        raise TraceError(f"{store.path} is damaged: it holds numbers that are not finite.")
    # By query, then by score, then the lowest row.
    best = np.lexsort((rows, -totals if largest else totals, of))
    kept = best[np.searchsorted(of, np.arange(len(queries)))[:, None] + np.arange(k)]
    return Ranking(rows[kept], totals[kept].astype(np.float32), parts[kept].astype(np.float32))


_Found = tuple[Rows, Rows, Floats]  # rows, the queries that they were found for, and their scores


class _FirstPass:
    """The rows whose scores in float32 are not further below the k-th best of a query than rounding can explain."""

    def __init__(self, queries: Floats, k: int, largest: bool) -> None:
        self._count, self._k, self._largest = len(queries), k, largest
        self._rounding = ROUNDING * np.sqrt(np.vecdot(queries, queries)).sum(axis=1)
        self._border = np.full(len(queries), -np.inf)
        self._found: list[_Found] = []
        self._kept = self._new = 0

    def near(self, rows: range, valid: Bools, scores: Floats) -> _Found:
        """Those valid rows of a chunk, with scores (1, n, Q), that may be among the k best. Any thread may call it."""
        border = self._border
        scores = scores[0, valid] if self._largest else -scores[0, valid]
        if len(scores) >= self._k:
            kth = np.partition(scores, len(scores) - self._k, axis=0)[len(scores) - self._k]
            border = np.maximum(border, kth - self._rounding)
        places, queries = np.nonzero(scores >= border)
        return np.flatnonzero(valid)[places] + rows.start, queries, scores[places, queries]

    def add(self, found: _Found) -> None:
        self._found.append(found)
        self._new += len(found[0])
        if self._new > self._kept + self._count * self._k:
            self._drop()

    def candidates(self) -> list[Rows]:
        rows, queries, _ = self._drop()
        return np.split(rows, np.searchsorted(queries, np.arange(1, self._count)))

    def _drop(self) -> _Found:
        """Leaves out rows below the border, which rises as more rows are known. What is left is sorted by query."""
        rows, queries, scores = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        order = np.lexsort((-scores, queries))
        rows, queries, scores = rows[order], queries[order], scores[order]
        firsts = np.searchsorted(queries, np.arange(self._count))
        enough = np.flatnonzero(np.bincount(queries, minlength=self._count) >= self._k)
        border = self._border.copy()  # other threads read the old one
        border[enough] = scores[firsts[enough] + self._k - 1] - self._rounding[enough]
        left = scores >= border[queries]
        kept = rows[left], queries[left], scores[left]
        self._found, self._border, self._kept, self._new = [kept], border, len(kept[0]), 0
        return kept


def chunk_products(store: Store, queries: Floats, per_timestep: bool = False) -> Products:
    """A function of a chunk and the scales (n, R) of its rows, which gives their products (S, n, Q) with contiguous
    queries (Q, R, v); S is R per timestep, or 1. Threads may share it: each has memory of its own."""
    header, count = store.header, len(queries)
    # Without scales the timesteps are one long vector; memory is fastest at products of whole rows.
    steps = header.gradient_count if header.dtype == "int8" or per_timestep else 1
    queries = queries.reshape(count, steps, -1)
    length = queries.shape[2]
    few = min(PART_NUMBERS // (steps * length), TILE_NUMBERS // min(length, MIN_TILE_WIDTH))
    height = min(max(1, few, min(MAX_PART_ROWS, 2 * count)), header.chunk_rows)
    width = length if header.dtype == "float32" else min(max(1, TILE_NUMBERS // height), length)
    memory = threading.local()

    def multiply(chunk: int, scale: Floats) -> Floats:
        products = np.zeros((steps if per_timestep else 1, len(scale), count), np.float32)
        if not hasattr(memory, "read"):
            memory.read = np.empty(height * header.sample_bytes if header.codec == "none" else 0, np.uint8)
            memory.tile = np.empty(0 if header.dtype == "float32" else height * width, np.float32)
            memory.product = np.empty((height, count), np.float32)
        start = 0
        for part in store.grad_parts(chunk, height, memory.read):
            here, product = slice(start, start + len(part)), memory.product[: len(part)]
            rows = part.reshape(len(part), steps, length)
            for t in range(steps):
                for first in range(0, length, width):
                    columns = slice(first, first + width)
                    np.matmul(as_float32(rows[:, t, columns], memory.tile), queries[:, t, columns].T, out=product)
                    if header.dtype == "int8":
                        # The scale is applied to Q products, not to v stored numbers.
                        product *= scale[here, t, None]
                    products[t if per_timestep else 0, here] += product
            start += len(part)
        return products

    return multiply


def as_float32(numbers: NDArray[Any], memory: Floats) -> Floats:
    """Stored numbers as float32: themselves if they are, or converted in `memory`, which has room for them."""
    if numbers.dtype == np.float32:
        return numbers
    converted = memory[: numbers.size].reshape(numbers.shape)
    if numbers.dtype != np.float16:
        np.copyto(converted, numbers)
        return converted
    # NumPy converts float16 one number at a time. Moving its bits to where float32 has them is four times as fast; the
    # multiplication sets the exponent right, for subnormal numbers too.
    bits = converted.view(np.int32)
    np.copyto(bits, numbers.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, HALF_BITS, out=bits)
    np.multiply(converted, np.float32(2.0**112), out=converted)
    # Infinity and NaN have become finite numbers of 2^16 or more.
    if max(converted.max(), -converted.min()) >= 2.0**16:
        converted[~np.isfinite(numbers)] = np.nan
    return converted


def _each_chunk(
    store: Store, products: Products, reduced: Callable[[range, Bools, Floats], R], threads: int | None
) -> Generator[tuple[range, R], None, None]:
    """Yields the rows of each chunk that is done, in order, and what `reduced` makes in threads of them, of which can
    be ranked (n,), and of the products (S, n, Q)."""
    if threads is not None and threads < 1:
        raise QueryError(f"threads is {threads}; expected 1 or more.")
    threads = threads or core_count()

    def scored(chunk: int) -> tuple[range, R]:
        rows, numbers = store.header.rows(chunk), store.numbers_of(chunk)
        valid = has_direction(numbers.norm)
        with np.errstate(invalid="ignore", over="ignore"):  # damaged numbers give an error below, and no warning
            scores = products(chunk, numbers.scale)
        if not np.isfinite(scores[:, valid]).all():
            raise TraceError(f"{store.path} is damaged: chunk {chunk} holds numbers that are not finite.")
        return rows, reduced(rows, valid, scores)

    chunks = iter(store.chunks_done)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        # Few chunks are scored ahead of the caller, so that memory does not grow where the caller is slower.
        running = deque(pool.submit(scored, chunk) for chunk in islice(chunks, 2 * threads))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(scored, chunk) for chunk in islice(chunks, 1))
