"""Numbers and columns of all training samples by data set index; the store has them by row, in the order of arrival."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.query.answer import FittedScore
from dmin_trace.query.topk import import_extra
from dmin_trace.search import scores_by_chunk
from dmin_trace.store import Store

if TYPE_CHECKING:
    import pandas

MAX_BLOCK_NUMBERS = 2**24
"""Numbers of gradients that are held in memory at a time."""


class Columns(Mapping[str, list[Any]]):
    """The readable columns of a trace: a mapping from each name to the N values, by data set index.

    A column is read when it is looked up. A sample without a value has "", -1 or NaN, by the kind of the column.
    """

    def __init__(self, store: Store, rows: NDArray[np.int64]) -> None:
        self._store, self._rows = store, rows

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._store.header.columns:
            raise KeyError(name)
        values = self._store.column(name)
        return [values[row] for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.header.columns)

    def __len__(self) -> int:
        return len(self._store.header.columns)

    def __repr__(self) -> str:
        return f"Columns({', '.join(self)})"

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame with one row for each data set index. Raises QueryError if pandas is not installed."""
        pd = import_extra("pandas", "pandas")
        return pd.DataFrame(dict(self), index=pd.RangeIndex(len(self._rows), name="sample"))


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
    per_timestep: bool,
    out: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """The scores of all samples for transformed queries (Q, T, v): the result and the errors of `Trace.scores`.

    `rows` comes from `rows_by_sample`. One chunk is in memory at a time, for each thread that scores.
    """
    shape = (len(queries), len(rows), len(store.header.timesteps))[: 3 if per_timestep else 2]
    if out is not None and (out.shape != shape or out.dtype != np.float32):
        raise QueryError(f"out is {out.dtype} of shape {out.shape}; expected float32 of shape {shape}.")
    scores = np.empty(shape, np.float32) if out is None else out
    samples = np.empty(len(rows), np.int64)
    samples[rows] = np.arange(len(rows))
    if not store.complete:
        scores[...] = np.nan
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
