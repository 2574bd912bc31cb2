"""The scores of every training sample for each query, in a file for programs: Parquet or NumPy."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError
from dmin_trace.query.answer import ScoreMethod, group_names, hits_table
from dmin_trace.query.tables import Column, Kind, Table, whole_file, write_parquet
from dmin_trace.search import Score, fit_background
from dmin_trace.store import Queries

if TYPE_CHECKING:
    from dmin_trace.query.trace import Trace

SUFFIXES = (".parquet", ".npy")
MAX_NUMBERS = 2**26
"""Scores that are in memory at a time; a scan of the trace has the queries for which they suffice."""


def check_scores_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file of scores. Raises QueryError if its name does not say of which kind it is."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise QueryError(f"The scores go to {path.name}; expected a name that ends in .parquet or .npy.")
    return path


def write_scores(
    trace: "Trace",
    queries: Queries,
    path: str | os.PathLike[str],
    score: Score | ScoreMethod,
    per_timestep: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """`Trace.write_scores`."""
    path, advance = check_scores_path(path), progress or (lambda done: None)
    if path.suffix == ".parquet":
        write_parquet(path, "scores", _tables(trace, queries, score, per_timestep, advance))
        return
    shape = (len(queries), len(trace), len(trace.groups))[: 3 if per_timestep else 2]
    # Not by a memory map: a disk that is full would end the process.
    with whole_file(path) as part, part.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for some in _batches(trace, len(queries), per_timestep):
            scores = trace.scores(queries[some], score, per_timestep=per_timestep)
            file.write(scores.astype("<f4", copy=False).data)
            advance(some.stop)


def _batches(trace: "Trace", count: int, per_timestep: bool) -> list[slice]:
    numbers = len(trace) * (len(trace.groups) if per_timestep else 1)
    size = max(1, MAX_NUMBERS // numbers)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _tables(
    trace: "Trace", queries: Queries, score: Score | ScoreMethod, per_timestep: bool, advance: Callable[[int], None]
) -> Iterator[Table]:
    """A table for each query."""
    name, headings = score if isinstance(score, str) else score.name, group_names(trace.groups)
    kinds: dict[str, Kind] = dict(trace.store.header.columns)
    columns = {column: Column(kind, trace.columns[column]) for column, kind in kinds.items()}
    for some in _batches(trace, len(queries), per_timestep):
        scores = trace.scores(queries[some], score, per_timestep=per_timestep)
        for query, of_query in zip(range(some.start, some.stop), scores, strict=True):
            parts = of_query.T if per_timestep else ()
            total = of_query.sum(axis=1) if per_timestep else of_query
            asked = (queries.names[query], queries.prompts[query], queries.without[query])
            yield hits_table(
                [asked] * len(trace),
                _numbers(total),
                name,
                {heading: _or_none(part) for heading, part in zip(headings, parts, strict=False)},
                columns,
            )
            advance(query + 1)


def _numbers(scores: NDArray[np.float32]) -> Table:
    """Rank, sample, score and what stands out of scores (N,)."""
    known = np.flatnonzero(~np.isnan(scores))
    ranks = np.empty(len(scores), np.int64)
    ranks[known[np.argsort(-scores[known], kind="stable")]] = np.arange(1, len(known) + 1)
    background = fit_background(scores[known].astype(np.float64), len(known))
    values = [None if value != value else value for value in scores.tolist()]
    return {
        "rank": Column("integer", [None if v is None else int(r) for v, r in zip(values, ranks, strict=True)]),
        "sample": Column("integer", range(len(scores))),
        "score": Column("number", values),
        "z": Column("number", [None if value is None else background.z(value) for value in values]),
        "stands_out": Column("boolean", [None if value is None else background.stands_out(value) for value in values]),
    }


def _or_none(scores: NDArray[np.float32]) -> list[Any]:
    return [None if value != value else value for value in scores.tolist()]
