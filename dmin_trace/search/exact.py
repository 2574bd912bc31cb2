"""Exact scores: the influence of every stored sample on a query, and the largest of them.

The influence of sample i is the sum over timesteps of the inner products of its compressed gradients with the query's
(paper, equations 7 to 9, without the constant of the learning rate). Chunk by chunk, a thread a core with BLAS on one
thread each, a running top-k: memory is bounded whatever N is. A thread reads a chunk in parts that stay in its cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.store import Store

R = TypeVar("R")
Score = Literal["dmin", "deflated"]
"""What samples are ranked by: the paper's inner products, or those with a query freed of what they share (`kernel`)."""

PART = 2**21
"""Numbers that a thread reads at a time, if that is enough samples."""
TOGETHER = 2**7
"""Samples that are multiplied at a time with many queries: each time, all queries are fetched from memory."""
TILE = 2**18
"""Numbers that are converted to float32 and multiplied at a time: they stay in a core's cache."""
NARROW = 2**13
"""A tile is as wide as a sketch, or so wide: of narrower ones memory gives a few numbers at a time."""
HALF = np.int32(-0x70002000)
"""The bits of a float16, its sign repeated in front, that float32 keeps after a shift by 13."""
SPARE = 64
"""Samples kept beyond the k best of a first pass in float32, so that its rounding decides no tie."""
ROUNDING = 1e-5
"""How far from the truth a first score may be, for queries whose compressed gradients have norm one."""


@dataclass(frozen=True)
class Ranking:
    """The k stored samples with the largest influence on each of Q queries, best first.

    rows: (Q, k) int64, rows of the store.
    scores: (Q, k) float32.
    per_timestep: (Q, k, T) float32, each timestep's inner product; they add up to the score.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    per_timestep: NDArray[np.float32]


def check_k(trace: Store, k: int) -> None:
    """Raises QueryError if k samples cannot be shown."""
    if k < 1:
        raise QueryError(f"k is {k}; expected 1 or more.")
    if k > trace.header.samples:
        raise QueryError(f"k is {k}, but the trace holds {trace.header.samples} samples. Ask for fewer.")
    usable = trace.valid_count
    if k > usable and not trace.complete:
        raise QueryError(
            f"k is {k}, but the capture is unfinished: {usable} of {trace.header.samples} samples are done and have "
            "gradients to rank. Ask for fewer, or finish it."
        )
    if k > usable:
        raise QueryError(f"k is {k}, but only {usable} samples of the trace have gradients to rank. Ask for fewer.")


def check_queries(trace: Store, queries: NDArray[np.float32]) -> None:
    """Raises QueryError if the queries are not finite or not of the store's shape."""
    expected = (len(trace.header.timesteps), trace.header.dimension)
    if queries.ndim != 3 or queries.shape[1:] != expected or not len(queries):
        raise QueryError(f"The queries have shape {queries.shape}; expected (queries, {expected[0]}, {expected[1]}).")
    if not np.isfinite(queries).all():
        raise QueryError("The queries hold numbers that are not finite, so they cannot be compared with anything.")


def exact_top_k(
    trace: Store,
    queries: NDArray[np.float32],
    k: int,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ranking:
    """Scores every sample of the store, and keeps the k best for each query; of equal scores the first slot.

    Args:
        trace: the store. What is not done, or has no direction, is not ranked.
        queries: (Q, T, v), compressed gradients.
        k: how many to keep.
        threads: one a core if not given.
        progress: called with the number of samples of each chunk that is scored.

    Raises:
        QueryError: k is out of range, or the queries are not finite or not of the store's shape.
        TraceError: a chunk is damaged.
    """
    check_k(trace, k)
    check_queries(trace, queries)
    queries = np.ascontiguousarray(queries, np.float32)
    kept = k + SPARE

    def best_of_chunk(
        slots: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return _best(slots[:, None].repeat(len(queries), 1), scores, kept)

    slots = np.empty((0, len(queries)), np.int64)
    scores = np.empty((0, len(queries)), np.float32)
    with closing(_scan(trace, queries, best_of_chunk, threads, progress)) as chunks:
        for chunk_slots, chunk_scores in chunks:
            slots, scores = _best(np.concatenate([slots, chunk_slots]), np.concatenate([scores, chunk_scores]), kept)
    candidates = []
    for query, near, values in zip(queries, slots.T, scores.T, strict=True):
        off = ROUNDING * float(np.linalg.norm(query, axis=1).sum())
        candidates.append(near[values >= values[k - 1] - off])
    return rerank(trace, queries, candidates, k)


def all_scores(
    trace: Store,
    queries: NDArray[np.float32],
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """The score of every sample for each query, (Q, N) by slot: Q x N numbers of memory, where `exact` keeps k of them.

    Summed in float32, so equal rows may differ in the last digit: to rank, ask `exact`. NaN for a slot that is not done
    or has no direction. Arguments and errors are those of `exact`.
    """
    check_queries(trace, queries)
    queries = np.ascontiguousarray(queries, np.float32)
    whole = np.full((len(queries), len(trace.valid)), np.nan, np.float32)

    def of_chunk(slots: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        whole[:, slots] = scores.T

    with closing(_scan(trace, queries, of_chunk, threads, progress)) as chunks:
        for _ in chunks:
            pass
    return whole


def rerank(
    trace: Store,
    queries: NDArray[np.float32],
    candidates: Sequence[NDArray[np.int64]],
    k: int,
    *,
    checksums: NDArray[np.uint32] | None = None,
) -> Ranking:
    """Scores candidates anew, timestep by timestep in float64, and keeps the k best; of equal scores the first slot.

    Args:
        trace: the store.
        queries: (Q, T, v), compressed gradients.
        candidates: for each query k valid slots or more, none twice, wherever they lie.
        k: how many to keep.
        checksums: (N,) of each slot's stored numbers, from an index. Without them the chunk of a candidate is read
            whole, for its checksum, if nothing did so before.

    Raises:
        TraceError: a candidate's row is missing, damaged or not finite.
    """
    of = np.repeat(np.arange(len(queries)), [len(slots) for slots in candidates])
    slots = np.concatenate(candidates)
    # A row of a file costs the same whenever it is read; a packed chunk is unpacked once, whoever asks for its rows.
    order = np.arange(len(slots)) if trace.header.codec == "none" else np.argsort(slots, kind="stable")
    parts = np.empty((len(slots), queries.shape[1]))
    row, query, asked = np.empty(queries.shape[1:]), np.empty(queries.shape[1:]), -1
    # One thread of ours too: rows are so small that two would wait for the interpreter's lock more than they gain.
    with threadpool_limits(1, "blas"), np.errstate(invalid="ignore", over="ignore"):
        for n in order:
            if of[n] != asked:
                asked = of[n]
                np.copyto(query, queries[asked])
            # One after another in the same place: equal rows then give equal sums wherever they lie, and the place
            # stays in the cache.
            slot = int(slots[n])
            np.copyto(row, trace.stored_row(slot, None if checksums is None else int(checksums[slot])))
            parts[n] = np.vecdot(row, query) * trace.scale[slots[n]]
    totals = parts.sum(axis=1)
    if not np.isfinite(totals).all():
        raise TraceError(f"{trace.path} is damaged: it holds numbers that are not finite.")
    # By query, then the largest score, then the first slot.
    best = np.lexsort((slots, -totals, of))
    firsts = np.searchsorted(of, np.arange(len(queries)))
    kept = best[(firsts[:, None] + np.arange(k))]
    return Ranking(slots[kept], totals[kept].astype(np.float32), parts[kept].astype(np.float32))


def _scan(
    trace: Store,
    queries: NDArray[np.float32],
    of_chunk: Callable[[NDArray[np.int64], NDArray[np.float32]], R],
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> Generator[R, None, None]:
    """What `of_chunk` makes of the valid slots of each chunk, (n,), and their scores, (n, Q): in the chunk's thread,
    and in the order of the chunks."""
    if threads is not None and threads < 1:
        raise QueryError(f"threads is {threads}; expected 1 or more.")
    valid = trace.valid
    memory = threading.local()

    def scored(chunk: int) -> R:
        rows = trace.header.rows(chunk)
        usable = valid[rows.start : rows.stop]
        with np.errstate(invalid="ignore", over="ignore"):  # numbers of a damaged store; an error, not a warning
            scores = _chunk_scores(trace, chunk, queries, memory)[usable]
        if not np.isfinite(scores).all():
            raise TraceError(f"{trace.path} is damaged: chunk {chunk} holds numbers that are not finite.")
        return of_chunk(np.arange(rows.start, rows.stop)[usable], scores)

    chunks = trace.chunks_done
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for chunk, found in zip(chunks, pool.map(scored, chunks), strict=True):
            yield found
            if progress is not None:
                progress(len(trace.header.rows(chunk)))


def _chunk_scores(
    trace: Store, chunk: int, queries: NDArray[np.float32], memory: threading.local
) -> NDArray[np.float32]:
    """(n, Q) scores of a chunk's samples."""
    header, scale = trace.header, trace.scale_chunk(chunk)
    scores = np.zeros((len(scale), len(queries)), np.float32)
    # Without scales the timesteps are one long sketch, and a product of whole rows is what memory is fastest at.
    steps = queries.shape[1] if header.dtype == "int8" else 1
    queries = queries.reshape(len(queries), steps, -1)
    length = queries.shape[2]
    few = min(PART // (steps * length), TILE // min(length, NARROW))
    rows = min(max(1, few, min(TOGETHER, 2 * len(queries))), header.chunk_rows)
    columns = length if header.dtype == "float32" else min(max(1, TILE // rows), length)
    if not hasattr(memory, "read"):
        memory.read = np.empty(rows * header.sample_bytes if header.codec == "none" else 0, np.uint8)
        memory.converted = np.empty(0 if header.dtype == "float32" else rows * columns, np.float32)
        memory.product = np.empty((rows, len(queries)), np.float32)
    start = 0
    for part in trace.grad_parts(chunk, rows, memory.read):
        here, product = slice(start, start + len(part)), memory.product[: len(part)]
        sketches = part.reshape(len(part), steps, length)
        for t in range(steps):
            for first in range(0, length, columns):
                numbers = _converted(sketches[:, t, first : first + columns], memory.converted)
                np.matmul(numbers, queries[:, t, first : first + columns].T, out=product)
                if header.dtype == "int8":
                    # Products with int8 first and the scale after: the same, and the scale touches Q numbers, not v.
                    product *= scale[here, t, None]
                scores[here] += product
        start += len(part)
    return scores


def _converted(numbers: NDArray[Any], memory: NDArray[np.float32]) -> NDArray[np.float32]:
    """Stored numbers (n, columns) as float32: themselves, or in `memory`."""
    if numbers.dtype == np.float32:
        return numbers
    converted = memory[: numbers.size].reshape(numbers.shape)
    if numbers.dtype != np.float16:
        np.copyto(converted, numbers)
        return converted
    # NumPy converts half precision one number at a time. Here its bits are moved to where float32 has them, four times
    # as fast, and the product sets the exponent right, of numbers below the smallest normal one too.
    bits = converted.view(np.int32)
    np.copyto(bits, numbers.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, HALF, out=bits)
    np.multiply(converted, np.float32(2.0**112), out=converted)
    # Infinity and nan would be numbers now.
    if max(converted.max(), -converted.min()) >= 2.0**16:
        converted[~np.isfinite(numbers)] = np.nan
    return converted


def _best(slots: NDArray[Any], scores: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best rows of each column, best first; (k, Q) both."""
    if len(scores) > 4 * k:
        # A candidate must reach the k-th best; ties at the border are all kept for the sort to decide.
        border = np.partition(scores, len(scores) - k, axis=0)[len(scores) - k]
        keep = (scores >= border).any(axis=1)
        slots, scores = slots[keep], scores[keep]
    order = np.lexsort((slots, -scores), axis=0)[:k]
    return np.take_along_axis(slots, order, 0), np.take_along_axis(scores, order, 0)
