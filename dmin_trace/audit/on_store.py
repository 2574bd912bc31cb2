"""Measures the scores of a store: by a column of labels, by a column that tells duplicates, and by retrained models.

For the first two, stored samples are the queries, so no model is needed. A query is left out of its own hits.
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
from dmin_trace.query import Answer, answer_queries, query_transform
from dmin_trace.search import Score, all_scores, check_queries, score_method
from dmin_trace.store import ArrayHeader, Store, read_arrays

DEFAULT_KS = (5, 10, 50, 100)
"""The numbers of best samples to look at, as far as the store has other samples for them."""
DEFAULT_QUERIES = 100
BATCH_NUMBERS = 2**26
"""Numbers in the gradients of queries that are scored at a time."""
MAX_MODELS = 10_000

Progress = Callable[[int, int], None]
"""Called with how many queries or samples are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of one measure of a store, for a person and for a program.

    title: what was measured, on one line; it may hold text of the store or the user.
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
    store: Store,
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
        store: the store.
        column: a column of labels; an empty text, the integer -1 and NaN mean no label, as in the store.
        ks: the numbers of best samples; `DEFAULT_KS` if not given.
        queries: the number of samples used as queries, spread evenly over the dataset.
        score: the score that is measured.
        exact: scan all samples even if there is an index.
        seed: of the bootstrap of the interval.
        progress: called with the number of queries that are done.

    Raises:
        EvaluationError: all labels are equal, or all are different, or there are fewer other samples than some k.
        TraceError: there is no such column, or the store is damaged.
    """
    rows, values, ks = _rows_and_values(store, column, ks)
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
    ranking, answer = _rank_others(store, rows, chosen, max(ks), score, exact, progress)
    labels = [values[position] for position in chosen]
    rates = detection_rate(values, ranking, labels, ks, query_positions=chosen, seed=seed)
    return _measurement(
        f"Detection rate by {column}",
        "Fraction of the k best samples that have the label of the query. It says whether the samples found are alike, "
        "not whether they have influence: a score can have more of one and less of the other.",
        rates,
        {"measure": "detection_rate", "column": column, "seed": seed},
        store.sample[rows[chosen]],
        answer,
    )


def measure_duplicates(
    store: Store,
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
    rows, values, ks = _rows_and_values(store, column, ks)
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
    ranking, answer = _rank_others(store, rows, chosen, max(ks), score, exact, progress)
    rates = duplicate_recall(ranking, duplicates, ks, ranked=len(rows) - 1, seed=seed)
    return _measurement(
        f"Recall of duplicates by {column}",
        "Fraction of a sample's duplicates that are among its k best. A score that misses duplicates is broken; one "
        "that finds them may still rank the rest badly.",
        rates,
        {"measure": "duplicate_recall", "column": column, "seed": seed},
        store.sample[rows[chosen]],
        answer,
    )


def read_retrained(path: Path, store: Store, queries: int) -> Retrained:
    """Reads a file that `numpy.savez` wrote: `subsets` (M, N) bool, `losses` (M, Q). Nothing in it is executed.

    Args:
        path: the .npz file.
        store: the store, for N.
        queries: Q.

    Raises:
        EvaluationError: it cannot be read, or its arrays are not of the trace's samples and these queries.
    """
    samples = store.header.samples
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
    store: Store,
    gradients: NDArray[np.float32],
    retrained: Retrained,
    names: Sequence[str | int],
    *,
    score: Score = "deflated",
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """The linear datamodeling score of a store's scores (`linear_datamodeling_score`).

    All samples are scored. A sample without a usable gradient has score 0.

    Args:
        store: the store; its samples are numbered from 0 to N - 1.
        gradients: (Q, T, v), of the queries.
        retrained: the models.
        names: of the queries.
        score: the score that is measured.
        seed: of the bootstrap of the interval.
        progress: called with the number of samples that are scored.

    Raises:
        EvaluationError: the measure has no value, or the samples are not numbered from 0 to N - 1.
        QueryError: the gradients are not finite or not of the store's shape.
        TraceError: the store is damaged.
    """
    samples = store.sample
    if not np.array_equal(np.sort(samples), np.arange(len(samples))):
        raise EvaluationError(
            f"{store.path} does not hold each of the samples 0 to {len(samples) - 1} once, so the columns of subsets "
            "cannot be matched with them."
        )
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, len(samples))

    check_queries(store, gradients)
    method = score_method(store, score)
    method.fit(store)
    scores = np.empty((len(gradients), len(samples)))
    scores[:, samples] = np.nan_to_num(all_scores(store, method.transform(gradients), progress=count), nan=0.0)
    found = linear_datamodeling_score(scores, retrained.subsets, retrained.losses, seed=seed)
    without = len(samples) - int(store.valid.sum())
    row = (str(len(gradients)), str(found.models), _decimals(found.score.value), _interval(found.score), "0.000")
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
            "queries": list(names),
            "each": found.each.tolist(),
        },
    )


def _rows_and_values(
    store: Store, column: str, ks: Sequence[int] | None
) -> tuple[NDArray[np.int64], list[Any], Sequence[int]]:
    """The rows that are ranked, in the order of the dataset, their values in a column (None for none), and the ks.

    Positions in these arrays are what the measures call samples.
    """
    rows = np.flatnonzero(store.valid)
    rows = rows[np.argsort(store.sample[rows], kind="stable")]
    if len(np.unique(store.sample[rows])) < len(rows):
        raise EvaluationError(f"{store.path} holds samples more than once, so hits cannot be matched with samples.")
    others = max(len(rows) - 1, 0)
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
    values = store.column(column)
    return rows, [_value(values[row]) for row in rows], ks


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
    store: Store,
    rows: NDArray[np.int64],
    chosen: NDArray[np.int64],
    k: int,
    score: Score,
    exact: bool,
    progress: Progress | None,
) -> tuple[NDArray[np.int64], Answer]:
    """The positions of the k best other samples of each query, (Q, k), and the last answer."""
    samples = store.sample[rows]
    batch = max(1, BATCH_NUMBERS // (len(store.header.timesteps) * store.header.dimension))
    ranking = np.empty((len(chosen), k), np.int64)
    transform = query_transform(store, score)
    for first in range(0, len(chosen), batch):
        queries = chosen[first : first + batch]
        # One hit more, for the query itself. A duplicate may be ranked before it.
        answer = answer_queries(store, store.gradients(rows[queries]), k=k + 1, score=transform, exact=exact)
        hits = np.array([[hit.sample for hit in hits] for hits in answer.hits])
        ranking[first : first + batch] = without_query(np.searchsorted(samples, hits), queries)
        if progress is not None:
            progress(first + len(queries), len(chosen))
    return ranking, answer


def _measurement(
    title: str,
    meaning: str,
    rates: Sequence[TopRate],
    values: dict[str, Any],
    samples: NDArray[np.int64],
    answer: Answer,
) -> Measurement:
    return Measurement(
        title=f"{title}, {answer.score} scores, {len(samples):,} samples as queries",
        headings=("k", "rate", "95 % interval", "chance", "at best"),
        rows=tuple(
            (str(of.k), _decimals(of.rate.value), _interval(of.rate), _decimals(of.chance), _decimals(of.best))
            for of in rates
        ),
        meaning=f"{meaning} Chance is a random ranking, at best a perfect one. {answer.said[:1].upper()}"
        f"{answer.said[1:]}.",
        values=values
        | {
            "scored_by": answer.score,
            "answered_by": "scan" if answer.recall is None else "index",
            "index_recall": answer.recall,
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
