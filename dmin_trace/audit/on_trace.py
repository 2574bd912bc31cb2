"""Measures the scores of a trace: by a column of labels, by a column that tells duplicates, and by retrained models.

For the first two, training samples are the queries, so no model is needed. A query is left out of its own hits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dmin_trace.audit.datamodeling import linear_datamodeling_score
from dmin_trace.audit.detection import check_ks, detection_rate, duplicate_recall, without_query
from dmin_trace.audit.intervals import Estimate
from dmin_trace.errors import EvaluationError
from dmin_trace.query import TopK, Trace
from dmin_trace.search import Score
from dmin_trace.store import ArrayHeader, Queries, read_arrays

DEFAULT_KS = (5, 10, 50, 100)
"""The numbers of best samples to look at, as far as the trace has other samples for them."""
BATCH_NUMBERS = 2**26
"""Numbers in the gradients of queries that are scored at a time."""
MAX_MODELS = 10_000
LABELS_MEANING = (
    "Fraction of the k best samples that have the label of the query. It says whether the samples found are alike, not "
    "whether they have influence: a score can have more of one and less of the other."
)
DUPLICATES_MEANING = (
    "Fraction of a sample's duplicates that are among its k best. A score that misses duplicates is broken; one that "
    "finds them may still rank the rest badly."
)

Retrained = tuple[NDArray[np.bool_], NDArray[np.float64]]
"""Whether each of M models was trained on each sample of the dataset, (M, N), and its losses on the queries, (M, Q)."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of one measure of a trace: a title and figures as a table, what they mean, and all of it for JSON."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    meaning: str
    values: dict[str, Any]


def measure_column(
    trace: Trace,
    column: str,
    kind: Literal["labels", "duplicates"],
    *,
    ks: Sequence[int] | None = None,
    queries: int = 100,
    score: Score = "deflated",
    exact: bool = False,
    seed: int = 0,
) -> Measurement:
    """Measures the best hits of samples by a column of the trace.

    Args:
        column: its name; an empty text, the integer -1 and NaN mean no value, as in the store.
        kind: "labels" gives `detection_rate` by the column's values; "duplicates" gives `duplicate_recall`, where
            samples with the same value are duplicates.
        ks, seed: the numbers of best samples, `DEFAULT_KS` if not given; the seed of the bootstrap of the interval.
        queries: the number of samples used as queries, spread evenly over those that have a value or a duplicate.
        score, exact: the score that is measured, and whether all samples are scanned even if there is an index.

    Raises EvaluationError if there is no such column, its values are all equal or all different, or there are fewer
    other samples than some k; QueryError and TraceError as `Trace.top_k`.
    """
    if column not in trace.columns:
        raise EvaluationError(f"{trace.path} has no column {column}; it has {', '.join(trace.columns) or 'none'}.")
    by_sample = trace.columns[column]
    # A position in these is what the measures call a sample.
    samples = np.sort(trace.store.sample[trace.store.valid])
    values = [_value(by_sample[sample]) for sample in samples]
    others = max(len(samples) - 1, 0)
    if ks is None:
        ks = [k for k in DEFAULT_KS if k <= others] or DEFAULT_KS[:1]
    check_ks(ks, others)
    groups: dict[Any, list[int]] = {}
    for position, value in enumerate(values):
        if value is not None:
            groups.setdefault(value, []).append(position)
    largest = max(map(len, groups.values()), default=0)
    if largest < 2:
        raise EvaluationError(f"No two samples have the same value in {column}: every ranking is wrong. Give another.")
    if largest == len(values) or (kind == "labels" and len(groups) < 2):
        raise EvaluationError(f"All samples have the same value in {column}: every ranking is right. Give another.")
    usable = np.sort(np.concatenate([group for group in groups.values() if kind == "labels" or len(group) > 1]))
    if queries < 1:
        raise EvaluationError(f"{queries} queries were given; expected 1 or more.")
    chosen = usable[np.linspace(0, len(usable) - 1, min(queries, len(usable))).round().astype(np.int64)]
    ranking, top = _rank_others(trace, samples, chosen, max(ks), score, exact)
    if kind == "labels":
        title, meaning = f"Detection rate by {column}", LABELS_MEANING
        labels = [values[position] for position in chosen]
        rates = detection_rate(values, ranking, labels, ks, query_positions=chosen, seed=seed)
    else:
        title, meaning = f"Recall of duplicates by {column}", DUPLICATES_MEANING
        duplicates = [[other for other in groups[values[position]] if other != position] for position in chosen]
        rates = duplicate_recall(ranking, duplicates, ks, ranked=others, seed=seed)
    by = top.answered_by.description
    return Measurement(
        title=f"{title}, {score} scores, {len(chosen):,} samples as queries",
        headings=("k", "rate", "95 % interval", "chance", "at best"),
        rows=tuple((str(of.k), *_cells(of.rate), f"{of.chance:.3f}", f"{of.best:.3f}") for of in rates),
        meaning=f"{meaning} Chance is a random ranking, at best a perfect one. {by[:1].upper()}{by[1:]}.",
        values={
            "measure": "detection_rate" if kind == "labels" else "duplicate_recall",
            "column": column,
            "seed": seed,
            "scored_by": score,
            "answered_by": "scan" if top.answered_by.recall is None else "index",
            "index_recall": top.answered_by.recall,
            "queries": samples[chosen].tolist(),
            "rates": [
                {"k": of.k, **asdict(of.rate), "chance": of.chance, "best": of.best, "each": of.each.tolist()}
                for of in rates
            ],
        },
    )


def read_retrained(path: Path, samples: int, queries: int) -> Retrained:
    """Reads a file that `numpy.savez` wrote: `subsets` (M, N) bool, `losses` (M, Q). Nothing in it is executed.

    Raises EvaluationError if it cannot be read, or its arrays are not of N `samples` and Q `queries`.
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
    return arrays["subsets"], arrays["losses"].astype(np.float64)


def measure_datamodeling(
    trace: Trace, queries: Queries, retrained: Retrained, *, score: Score = "deflated", seed: int = 0
) -> Measurement:
    """The linear datamodeling score of a trace's scores: `linear_datamodeling_score` says what is what.

    A sample without a usable gradient has score 0. Raises EvaluationError if the measure has no value, and QueryError
    and TraceError as `Trace.scores`.
    """
    scores = trace.scores(queries, score)
    without = int(np.isnan(scores).any(axis=0).sum())
    found = linear_datamodeling_score(np.nan_to_num(scores, nan=0.0), *retrained, seed=seed)
    return Measurement(
        title=f"Linear datamodeling score of {score} scores",
        headings=("queries", "models", "LDS", "95 % interval", "chance"),
        rows=((str(len(queries)), str(found.models), *_cells(found.score), "0.000"),),
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
            **asdict(found.score),
            "chance": 0.0,
            "queries": list(queries.names),
            "each": found.each.tolist(),
        },
    )


def _value(value: Any) -> Any:
    """A value of a column, or None for a value that means none."""
    return None if value == "" or (isinstance(value, int) and value == -1) or value != value else value


def _rank_others(
    trace: Trace, samples: NDArray[np.int64], chosen: NDArray[np.int64], k: int, score: Score, exact: bool
) -> tuple[NDArray[np.int64], TopK]:
    """The positions of the k best other samples of each query, (Q, k), and the last answer."""
    header = trace.store.header
    batch = max(1, BATCH_NUMBERS // (header.gradient_count * header.dimension))
    ranking = np.empty((len(chosen), k), np.int64)
    for first in range(0, len(chosen), batch):
        positions = chosen[first : first + batch]
        # One hit more, for the query itself. A duplicate may be ranked before it.
        top = trace.top_k(trace.query_samples(samples[positions].tolist()), k + 1, score, exact=exact)
        ranking[first : first + batch] = without_query(np.searchsorted(samples, top.samples), positions)
    return ranking, top


def _cells(estimate: Estimate) -> tuple[str, str]:
    """The value and the interval as text."""
    known = estimate.low == estimate.low
    return f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}" if known else "needs more queries"
