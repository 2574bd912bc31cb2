"""Rankings: what a search gives, what it takes, and the exact scores of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.store import Store

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """The k rows with the largest influence score for each of Q queries, largest first; or the k smallest.

    rows: (Q, k) int64, rows of the store.
    scores: (Q, k) float32.
    per_timestep: (Q, k, T) float32, the inner product at each timestep; they add up to the score.
    """

    rows: Rows
    scores: Floats
    per_timestep: Floats


def check_k(store: Store, k: int) -> None:
    """Raises QueryError if the store does not hold k rows that can be ranked."""
    if k < 1:
        raise QueryError(f"k is {k}; expected 1 or more.")
    if k > store.valid_count:
        held = f"only {store.valid_count} of the trace's {store.header.samples} samples have gradients to rank"
        unfinished = "" if store.complete else " (the capture is unfinished)"
        raise QueryError(f"k is {k}, but {held}{unfinished}. Give a smaller k.")


def check_queries(store: Store, queries: Floats) -> None:
    """Raises QueryError if the queries are not finite or not of shape (Q, T, v)."""
    expected = (len(store.header.timesteps), store.header.dimension)
    if queries.ndim != 3 or queries.shape[1:] != expected or not len(queries):
        raise QueryError(f"The queries have shape {queries.shape}; expected (queries, {expected[0]}, {expected[1]}).")
    if not np.isfinite(queries).all():
        raise QueryError("The queries hold numbers that are not finite, so they have no scores.")


def has_direction(norm: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) whether rows with these gradient norms (n, T) can be ranked: all norms are finite and above zero."""
    usable: NDArray[np.bool_] = np.all(np.isfinite(norm) & (norm > 0), axis=1)
    return usable


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

    Args:
        store: the store.
        queries: (Q, T, v), projected gradients.
        candidates: for each query k rows or more, none twice, in any order.
        k: how many rows are kept for each query.
        largest: keep the largest scores; False keeps the smallest.
        checksums: (N,) crc32c of the stored numbers of each row, from an index. Without them the whole chunk of a
            candidate is read once, to compare its checksum.

    Raises:
        TraceError: a candidate's row is missing, damaged, not finite, or has no gradient that can be ranked.
    """
    of = np.repeat(np.arange(len(queries)), [len(rows) for rows in candidates])
    rows = np.concatenate(candidates)
    if min(len(each) for each in candidates) < k:
        raise TraceError(f"{store.path} is damaged: fewer rows can be ranked than its metadata says.")
    numbers = store.numbers(rows)
    if not has_direction(numbers.norm).all():
        raise TraceError(
            f"A candidate for {store.path} has no gradient that can be ranked, so the index is damaged. Make it anew "
            "(dmin-trace index), or scan all samples (--exact)."
        )
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
    firsts = np.searchsorted(of, np.arange(len(queries)))
    kept = best[(firsts[:, None] + np.arange(k))]
    return Ranking(rows[kept], totals[kept].astype(np.float32), parts[kept].astype(np.float32))
