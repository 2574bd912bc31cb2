"""Numbers of all training samples, by data set index; the store has them by row, in the order of arrival."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.query.answer import FittedScore
from dmin_trace.search import scores_by_chunk
from dmin_trace.store import Store

MAX_BLOCK_NUMBERS = 2**24
"""Numbers of gradients that are held in memory at a time."""


def rows_by_sample(store: Store) -> NDArray[np.int64]:
    """(N,) the row of each data set index. Samples that are not done get the rows that are not done.

    Raises TraceError if the samples that are done are not distinct indices from 0 to N - 1.
    """
    count, done = store.header.samples, store.rows_done
    samples = store.sample[done]
    if not np.array_equal(np.unique(samples[(samples >= 0) & (samples < count)]), np.sort(samples)):
        raise TraceError(
            f"{store.path} has samples twice, or samples that are not in 0 to {count - 1}. Use its rows: Trace.store."
        )
    rows = np.full(count, -1, np.int64)
    rows[samples] = done
    rows[rows < 0] = np.setdiff1d(np.arange(count), done)
    return rows


def scores_by_sample(
    store: Store,
    rows: NDArray[np.int64],
    queries: NDArray[np.float32],
    *,
    per_timestep: bool = False,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The scores of all samples for transformed queries, as `Trace.scores` returns them.

    One chunk is in memory at a time, for each thread that scores.

    Args:
        store: the store.
        rows: the row of each data set index, from `rows_by_sample`.
        queries: (Q, T, v), transformed for the score.
        per_timestep, out: as for `Trace.scores`.

    Raises:
        QueryError: the queries are not of the store's shape, or `out` is of another shape or dtype.
        TraceError: the store is damaged.
    """
    shape = (len(queries), len(rows), len(store.header.timesteps))[: 3 if per_timestep else 2]
    if out is not None and (out.shape != shape or out.dtype != np.float32):
        raise QueryError(f"out is {out.dtype} of shape {out.shape}; expected float32 of shape {shape}.")
    scores = np.empty(shape, np.float32) if out is None else out
    samples = np.empty(len(rows), np.int64)
    samples[rows] = np.arange(len(rows))
    for chunk in np.flatnonzero(~store.done).tolist():
        here = store.header.rows(chunk)
        scores[:, samples[here.start : here.stop]] = np.nan
    for here, of_chunk in scores_by_chunk(store, queries, per_timestep=per_timestep):
        scores[:, samples[here.start : here.stop]] = of_chunk
    return scores


def self_influence(store: Store, score: FittedScore) -> NDArray[np.float32]:
    """(N,) by row: the score of each row with itself as the query; NaN for a row without a usable gradient."""
    influence = np.full(store.header.samples, np.nan, np.float32)
    usable = np.flatnonzero(store.valid)
    block = max(1, MAX_BLOCK_NUMBERS // (len(store.header.timesteps) * store.header.dimension))
    for start in range(0, len(usable), block):
        rows = usable[start : start + block]
        gradients = store.gradients(rows)
        influence[rows] = np.vecdot(score.transform(gradients), gradients).sum(axis=1)
    return influence
