"""Exact scores: the influence of every stored sample on a query, and the largest of them.

The influence of sample i is the sum over timesteps of the inner products of its compressed gradients with the query's
(paper, equations 7 to 9, without the constant of the learning rate). Chunk by chunk, a thread a core with BLAS on one
thread each, a running top-k: memory is bounded whatever N is. A thread reads a chunk in parts that stay in its cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.store import Trace

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

    slots: (Q, k) int64, rows of the store.
    scores: (Q, k) float32.
    shares: (Q, k, T) float32, each timestep's inner product; they add up to the score.
    """

    slots: NDArray[np.int64]
    scores: NDArray[np.float32]
    shares: NDArray[np.float32]


def check_k(trace: Trace, k: int) -> None:
    """Raises QueryError if k samples cannot be shown."""
    if k < 1:
        raise QueryError(f"k is {k}; expected 1 or more.")
    if k > trace.header.samples:
        raise QueryError(f"k is {k}, but the trace holds {trace.header.samples} samples. Ask for fewer.")
    usable = int(trace.rankable.sum())
    if k > usable:
        raise QueryError(f"k is {k}, but only {usable} samples of the trace have gradients to rank. Ask for fewer.")


def exact(
    trace: Trace,
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
    if threads is not None and threads < 1:
        raise QueryError(f"threads is {threads}; expected 1 or more.")
    check_k(trace, k)
    expected = (len(trace.header.timesteps), trace.header.dimension)
    if queries.ndim != 3 or queries.shape[1:] != expected or not len(queries):
        raise QueryError(f"The queries have shape {queries.shape}; expected (queries, {expected[0]}, {expected[1]}).")
    if not np.isfinite(queries).all():
        raise QueryError("The queries hold numbers that are not finite, so they cannot be compared with anything.")
    queries = np.ascontiguousarray(queries, np.float32)
    rankable = trace.rankable
    kept = k + SPARE
    memory = threading.local()

    def best_of_chunk(chunk: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = trace.header.rows(chunk)
        usable = rankable[rows.start : rows.stop]
        with np.errstate(invalid="ignore", over="ignore"):  # numbers of a damaged store; an error, not a warning
            scores = _chunk_scores(trace, chunk, queries, memory)[usable]
        if not np.isfinite(scores).all():
            raise TraceError(f"{trace.path} is damaged: chunk {chunk} holds numbers that are not finite.")
        slots = np.arange(rows.start, rows.stop)[usable]
        return _best(slots[:, None].repeat(len(queries), 1), scores, kept)

    slots = np.empty((0, len(queries)), np.int64)
    scores = np.empty((0, len(queries)), np.float32)
    chunks = trace.chunks_done
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for chunk, (chunk_slots, chunk_scores) in zip(chunks, pool.map(best_of_chunk, chunks), strict=True):
            slots, scores = _best(np.concatenate([slots, chunk_slots]), np.concatenate([scores, chunk_scores]), kept)
            if progress is not None:
                progress(len(trace.header.rows(chunk)))
    return _with_shares(trace, queries, slots.T, scores.T, k)


def _chunk_scores(
    trace: Trace, chunk: int, queries: NDArray[np.float32], memory: threading.local
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


def _with_shares(
    trace: Trace, queries: NDArray[np.float32], slots: NDArray[np.int64], scores: NDArray[np.float32], k: int
) -> Ranking:
    """Scores the candidates (Q, more than k) of each query anew, timestep by timestep in float64, and keeps k."""
    header = trace.header
    # Not `linalg.norm`, which would square all queries into memory of its own.
    near = ROUNDING * np.sqrt(np.einsum("qtv,qtv->qt", queries, queries)).sum(axis=1)
    of, place = np.nonzero(scores >= (scores[:, k - 1] - near)[:, None])
    wanted = slots[of, place]
    shares = np.zeros((*slots.shape, queries.shape[1]))
    totals = np.full(slots.shape, -np.inf)
    # By chunks, whichever query a candidate is of: one that is packed is unpacked once.
    order = np.argsort(wanted, kind="stable")
    chunks, firsts = np.unique(wanted[order] // header.chunk_rows, return_index=True)
    for chunk, pairs in zip(chunks.tolist(), np.split(order, firsts[1:]), strict=True):
        grad, scale = trace.grad_chunk(chunk), trace.scale_chunk(chunk)
        for q, candidate in zip(of[pairs].tolist(), place[pairs].tolist(), strict=True):
            row = slots[q, candidate] - header.rows(chunk).start
            sketches = grad[row].astype(np.float32) * scale[row, :, None]
            # Summed along a row, not by BLAS: equal rows then give equal sums wherever they lie.
            shares[q, candidate] = np.multiply(sketches, queries[q], dtype=np.float64).sum(axis=1)
            totals[q, candidate] = shares[q, candidate].sum()
    best = np.lexsort((slots, -totals), axis=1)[:, :k]
    return Ranking(
        np.take_along_axis(slots, best, 1),
        np.take_along_axis(totals, best, 1).astype(np.float32),
        np.take_along_axis(shares, best[:, :, None], 1).astype(np.float32),
    )
