"""Measures the scores of a trace: by a column of labels, by a column that tells duplicates, and by retrained models.

For the first two, training samples are the queries, so no model is needed. A query is left out of its own hits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.audit.datamodeling import linear_datamodeling_score
from dmin_trace.audit.detection import TopRate, detection_rate, duplicate_recall, without_query
from dmin_trace.audit.intervals import Estimate
from dmin_trace.errors import EvaluationError
from dmin_trace.query import TopK, Trace
from dmin_trace.search import Score
from dmin_trace.store import ArrayHeader, Queries, read_arrays

DEFAULT_KS = (5, 10, 50, 100)
"""The numbers of best samples to look at, as far as the trace has other samples for them."""
DEFAULT_QUERIES = 100
BATCH_NUMBERS = 2**26
"""Numbers in the gradients of queries that are scored at a time."""
MAX_MODELS = 10_000

Progress = Callable[[int, int], None]
"""Called with how many queries are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of one measure of a trace, for a person and for a program.

    title: what was measured, on one line; it may hold text of the trace or the user.
    headings, rows: the figures, as a table.
    meaning: what the figures say, and what they do not say.
    values: all of it for JSON; a number may be NaN.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    meaning: str
    values: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Retrained:
    """Models that were trained again, each on a subset of the samples of a trace.

    subsets: (M, N) bool, whether a model was trained on a sample; column j is sample j of the dataset.
    losses: (M, Q), of each model on each query.
    """

    subsets: NDArray[np.bool_]
    losses: NDArray[np.float64]


def measure_labels(
    trace: Trace,
    column: str,
    *,
    ks: Sequence[int] | None = None,
    queries: int = DEFAULT_QUERIES,
    score: Score = "deflated",
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """The fraction of a sample's best hits that have its label (`detection_rate`).

    Args:
        trace: the trace.
        column: a column of labels; an empty text, the integer -1 and NaN mean no label, as in the store.
        ks: the numbers of best samples; `DEFAULT_KS` if not given.
        queries: the number of samples used as queries, spread evenly over the dataset.
        score: the score that is measured.
        exact: scan all samples even if there is an index.
        seed: of the bootstrap of the interval.
        progress: called with the number of queries that are done.

    Raises:
        EvaluationError: there is no such column, all labels are equal or all are different, or there are fewer other
            samples than some k.
        QueryError: the trace is too large for deflated scores without an index.
        TraceError: the trace is damaged.
    """
    samples, values, ks = _samples_and_values(trace, column, ks)
    present = [value for value in values if value is not None]
    if len(set(present)) < 2:
        raise EvaluationError(
            f"The samples have {len(set(present))} different values in the column {column}; expected two or more, "
            "since with one every ranking is right. Give a column of labels."
        )
    if len(set(present)) == len(present):
        raise EvaluationError(
            f"No two samples have the same value in the column {column}, so every ranking is wrong. Give a column of "
            "labels."
        )
    chosen = _spread([position for position, value in enumerate(values) if value is not None], queries)
    ranking, top = _rank_others(trace, samples, chosen, max(ks), score, exact, progress)
    labels = [values[position] for position in chosen]
    rates = detection_rate(values, ranking, labels, ks, query_positions=chosen, seed=seed)
    return _measurement(
        f"Detection rate by {column}",
        "Fraction of the k best samples that have the label of the query. It says whether the samples found are alike, "
        "not whether they have influence: a score can have more of one and less of the other.",
        rates,
        {"measure": "detection_rate", "column": column, "seed": seed},
        samples[chosen],
        top,
    )


def measure_duplicates(
    trace: Trace,
    column: str,
    *,
    ks: Sequence[int] | None = None,
    queries: int = DEFAULT_QUERIES,
    score: Score = "deflated",
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """The fraction of a sample's duplicates that are among its best hits (`duplicate_recall`).

    Samples with the same value in the column are duplicates. Other arguments and errors are those of `measure_labels`;
    at least two samples must be duplicates, and not all.
    """
    samples, values, ks = _samples_and_values(trace, column, ks)
    sizes = Counter(value for value in values if value is not None)
    members: dict[Any, list[int]] = {}
    for position, value in enumerate(values):
        if sizes[value] > 1:
            members.setdefault(value, []).append(position)
    if not members:
        raise EvaluationError(
            f"No two samples have the same value in the column {column}, so none is a duplicate. Give a column whose "
            "value duplicates share."
        )
    if max(sizes.values()) == len(values):
        raise EvaluationError(
            f"All samples have the same value in the column {column}, so all are duplicates. Give a column whose value "
            "only duplicates share."
        )
    chosen = _spread(sorted(position for group in members.values() for position in group), queries)
    duplicates = [[other for other in members[values[position]] if other != position] for position in chosen]
    ranking, top = _rank_others(trace, samples, chosen, max(ks), score, exact, progress)
    rates = duplicate_recall(ranking, duplicates, ks, ranked=len(samples) - 1, seed=seed)
    return _measurement(
        f"Recall of duplicates by {column}",
        "Fraction of a sample's duplicates that are among its k best. A score that misses duplicates is broken; one "
        "that finds them may still rank the rest badly.",
        rates,
        {"measure": "duplicate_recall", "column": column, "seed": seed},
        samples[chosen],
        top,
    )


def read_retrained(path: Path, samples: int, queries: int) -> Retrained:
    """Reads a file that `numpy.savez` wrote: `subsets` (M, N) bool, `losses` (M, Q). Nothing in it is executed.

    Args:
        path: the .npz file.
        samples: N, the number of samples of the trace.
        queries: Q.

    Raises:
        EvaluationError: it cannot be read, or its arrays are not of so many samples and queries.
    """
    expected = f"expected a file of numpy.savez with subsets, bool (models, {samples}), and losses (models, {queries})"

    def check(headers: Mapping[str, ArrayHeader]) -> None:
        subsets, losses = headers["subsets"], headers["losses"]
        fits = len(subsets.shape) == 2 and subsets.shape[1] == samples and subsets.dtype == np.bool_
        if not (fits and losses.shape == (subsets.shape[0], queries) and losses.dtype.kind in "fiu"):
            raise EvaluationError(
                f"{path} holds subsets, {subsets.dtype} {subsets.shape}, and losses, {losses.dtype} {losses.shape}; "
                f"{expected}."
            )
        if subsets.shape[0] > MAX_MODELS:
            raise EvaluationError(f"{path} is of {subsets.shape[0]} models; expected {MAX_MODELS} or fewer.")

    try:
        arrays = read_arrays(path, ("subsets", "losses"), check)
    except ValueError as error:
        raise EvaluationError(f"{path} cannot be read: {error}; {expected}.") from None
    return Retrained(arrays["subsets"], arrays["losses"].astype(np.float64))


def measure_datamodeling(
    trace: Trace, queries: Queries, retrained: Retrained, *, score: Score = "deflated", seed: int = 0
) -> Measurement:
    """The linear datamodeling score of a trace's scores (`linear_datamodeling_score`).

    All samples are scored. A sample without a usable gradient has score 0.

    Args:
        trace: the trace.
        queries: Q queries of the trace.
        retrained: the models.
        score: the score that is measured.
        seed: of the bootstrap of the interval.

    Raises:
        EvaluationError: the measure has no value.
        QueryError: the queries are of another trace, or the trace is too large for deflated scores without an index.
        TraceError: the trace is damaged.
    """
    scores = trace.scores(queries, score)
    without = int(np.isnan(scores).any(axis=0).sum())
    found = linear_datamodeling_score(np.nan_to_num(scores, nan=0.0), retrained.subsets, retrained.losses, seed=seed)
    row = (str(len(queries)), str(found.models), _decimals(found.score.value), _interval(found.score), "0.000")
    return Measurement(
        title=f"Linear datamodeling score of {score} scores",
        headings=("queries", "models", "LDS", "95 % interval", "chance"),
        rows=(row,),
        meaning="Rank correlation, over the models, of the summed scores of the samples that a model was trained on "
        "with minus its loss; the mean of the queries; 1 would be perfect. It says whether the scores predict what "
        "training on other samples does, for many samples together; not whether single samples have influence. The "
        "interval resamples queries and models."
        + (f" {without:,} samples have no usable gradient, and score 0." if without else ""),
        values={
            "measure": "linear_datamodeling_score",
            "scored_by": score,
            "seed": seed,
            "models": found.models,
            "samples_without_score": without,
            "value": found.score.value,
            "low": found.score.low,
            "high": found.score.high,
            "chance": 0.0,
            "queries": list(queries.names),
            "each": found.each.tolist(),
        },
    )


def _samples_and_values(
    trace: Trace, column: str, ks: Sequence[int] | None
) -> tuple[NDArray[np.int64], list[Any], Sequence[int]]:
    """The samples that are ranked, in order, their values in a column (None for none), and the ks.

    Positions in these arrays are what the measures call samples.
    """
    if column not in trace.columns:
        raise EvaluationError(f"{trace.path} has no column {column}; it has {', '.join(trace.columns) or 'none'}.")
    values = trace.columns[column]
    samples = np.sort(trace.store.sample[trace.store.valid])
    others = max(len(samples) - 1, 0)
    if ks is None:
        ks = [k for k in DEFAULT_KS if k <= others]
        if not ks:
            raise EvaluationError(
                f"A sample is ranked with {others} others; expected {min(DEFAULT_KS)} or more. Give the number of best "
                "samples to look at with -k."
            )
    if min(ks, default=0) < 1 or max(ks) > others:
        raise EvaluationError(
            f"k is {', '.join(map(str, ks))}; expected numbers from 1 to {others}, since a sample is ranked with so "
            "many others."
        )
    return samples, [_value(values[sample]) for sample in samples], ks


def _value(value: Any) -> Any:
    """A value of a column, or None for a value that means none."""
    return None if value == "" or (isinstance(value, int) and value == -1) or value != value else value


def _spread(positions: Sequence[int], count: int) -> NDArray[np.int64]:
    """`count` of these positions, spread evenly, or all if there are fewer."""
    if count < 1:
        raise EvaluationError(f"{count} queries were given; expected 1 or more.")
    chosen = np.linspace(0, len(positions) - 1, min(count, len(positions))).round().astype(np.int64)
    return np.asarray(positions, np.int64)[chosen]


def _rank_others(
    trace: Trace,
    samples: NDArray[np.int64],
    chosen: NDArray[np.int64],
    k: int,
    score: Score,
    exact: bool,
    progress: Progress | None,
) -> tuple[NDArray[np.int64], TopK]:
    """The positions of the k best other samples of each query, (Q, k), and the last answer."""
    header = trace.store.header
    batch = max(1, BATCH_NUMBERS // (len(header.timesteps) * header.dimension))
    ranking = np.empty((len(chosen), k), np.int64)
    for first in range(0, len(chosen), batch):
        positions = chosen[first : first + batch]
        # One hit more, for the query itself. A duplicate may be ranked before it.
        top = trace.top_k(trace.query_samples(samples[positions].tolist()), k + 1, score, exact=exact)
        ranking[first : first + batch] = without_query(np.searchsorted(samples, top.samples), positions)
        if progress is not None:
            progress(first + len(positions), len(chosen))
    return ranking, top


def _measurement(
    title: str,
    meaning: str,
    rates: Sequence[TopRate],
    values: dict[str, Any],
    samples: NDArray[np.int64],
    top: TopK,
) -> Measurement:
    answered_by = top.answered_by.description
    return Measurement(
        title=f"{title}, {top.score} scores, {len(samples):,} samples as queries",
        headings=("k", "rate", "95 % interval", "chance", "at best"),
        rows=tuple(
            (str(of.k), _decimals(of.rate.value), _interval(of.rate), _decimals(of.chance), _decimals(of.best))
            for of in rates
        ),
        meaning=f"{meaning} Chance is a random ranking, at best a perfect one. {answered_by[:1].upper()}"
        f"{answered_by[1:]}.",
        values=values
        | {
            "scored_by": top.score,
            "answered_by": "scan" if top.answered_by.recall is None else "index",
            "index_recall": top.answered_by.recall,
            "queries": samples.tolist(),
            "rates": [
                {
                    "k": of.k,
                    "value": of.rate.value,
                    "low": of.rate.low,
                    "high": of.rate.high,
                    "chance": of.chance,
                    "best": of.best,
                    "each": of.each.tolist(),
                }
                for of in rates
            ],
        },
    )


def _decimals(value: float) -> str:
    return f"{value:.3f}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}" if estimate.low == estimate.low else "needs more queries"
