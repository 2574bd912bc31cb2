"""Examines the attributions of a trace with the measures of `evaluate`: by a column of labels, by a column that tells
copies, and by models that were trained again on subsets of the samples.

For the first two, stored samples ask, so no model is needed; each is left out of its own hits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace import query
from dmin_trace import search as score
from dmin_trace.audit import measures as evaluate
from dmin_trace.audit.measures import Estimate, TopRate
from dmin_trace.errors import EvaluationError
from dmin_trace.search import Score
from dmin_trace.store import ArrayHeader, Store, read_arrays

KS = (5, 10, 50, 100)
"""How many of the best are looked at if that is not said: those of these that the trace has other samples for."""
QUERIES = 100
"""How many samples ask if that is not said."""
TOGETHER = 2**26
"""Numbers of queries that are asked at a time."""
MOST_MODELS = 10_000

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one measure found, for a person and for a program.

    title: what was measured, on one line; it may hold words of the store or the user.
    headings, rows: the figures, as a table.
    meaning: what they say, and what they do not.
    facts: all of it for JSON; a number may be NaN.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    meaning: str
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Retrained:
    """Models that were trained again, each on a subset of the samples of a trace.

    subsets: (M, N) bool, whether a model was trained on a sample; column j is sample j of the dataset.
    losses: (M, Q), of each model on each query.
    """

    subsets: NDArray[np.bool_]
    losses: NDArray[np.float64]


def detection(
    trace: Store,
    column: str,
    *,
    ks: Sequence[int] | None = None,
    queries: int = QUERIES,
    kind: Score = "deflated",
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Finding:
    """The part of a sample's best hits that bear its label.

    Args:
        trace: the store.
        column: of labels; an empty text, the whole number -1 and NaN are none, as they are to the store.
        ks: how many of the best; `KS` if not given.
        queries: how many samples with a label ask, spread evenly over the dataset.
        kind: the score that is measured.
        exact: scan all samples even if there is an index.
        seed: of the interval's bootstrap.
        progress: counts the queries that were answered.

    Raises:
        EvaluationError: the samples bear one label, or each its own, or there are fewer other samples than some k.
        TraceError: there is no such column, or the store is damaged.
    """
    ranked = _ranked(trace)
    ks = _checked(ks, len(ranked) - 1)
    values = trace.column(column)
    labels = [_value(values[slot]) for slot in ranked]
    if len(set(labels) - {None}) < 2:
        raise EvaluationError(
            f"The samples have {len(set(labels) - {None})} different values in the column {column}; expected two or "
            "more, since every ranking would be right of one. Give a column of labels."
        )
    if len(set(labels) - {None}) == sum(label is not None for label in labels):
        raise EvaluationError(
            f"No two samples have the same value in the column {column}, so every ranking would be wrong. Give a "
            "column of labels."
        )
    asking = _spread([place for place, label in enumerate(labels) if label is not None], queries)
    found, answered = _ask(trace, ranked, asking, max(ks), kind, exact, progress)
    rates = evaluate.detection_rate(labels, found, [labels[place] for place in asking], ks, asking=asking, seed=seed)
    return _finding(
        f"Detection rate by {column}",
        "Part of the k best samples that bear the label of the one that asks. It says whether what is found is alike, "
        "not whether it is a cause: a score can have more of one and less of the other.",
        rates,
        {"measure": "detection_rate", "column": column, "seed": seed},
        trace.sample[ranked[asking]],
        answered,
    )


def copies(
    trace: Store,
    column: str,
    *,
    ks: Sequence[int] | None = None,
    queries: int = QUERIES,
    kind: Score = "deflated",
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Finding:
    """What part of a sample's copies is among its best hits.

    Arguments and errors are those of `detection`, but that samples with the same value in the column are copies of one
    another: two of them at least, and not all.
    """
    ranked = _ranked(trace)
    ks = _checked(ks, len(ranked) - 1)
    values = trace.column(column)
    groups = [_value(values[slot]) for slot in ranked]
    sizes = Counter(group for group in groups if group is not None)
    having = [place for place, group in enumerate(groups) if sizes[group] > 1]
    if not having:
        raise EvaluationError(
            f"No two samples have the same value in the column {column}, so none is a copy of another. Give a column "
            "whose value copies share."
        )
    if max(sizes.values()) == len(groups):
        raise EvaluationError(
            f"All samples have the same value in the column {column}, so all would be copies of one another. Give a "
            "column whose value only copies share."
        )
    asking = _spread(having, queries)
    members: dict[Any, list[int]] = {}
    for place in having:
        members.setdefault(groups[place], []).append(place)
    others = [[other for other in members[groups[place]] if other != place] for place in asking]
    found, answered = _ask(trace, ranked, asking, max(ks), kind, exact, progress)
    rates = evaluate.duplicate_recall(found, others, ks, ranked=len(ranked) - 1, seed=seed)
    return _finding(
        f"Recall of copies by {column}",
        "Part of a sample's copies that are among its k best. A score that misses copies is broken; finding them says "
        "little of how it ranks the rest.",
        rates,
        {"measure": "duplicate_recall", "column": column, "seed": seed},
        trace.sample[ranked[asking]],
        answered,
    )


def read_retrained(path: Path, trace: Store, queries: int) -> Retrained:
    """Reads a file that `numpy.savez` wrote: `subsets` (M, N) bool, `losses` (M, Q). Nothing in it is executed.

    Args:
        path: the .npz file.
        trace: the store, for N.
        queries: Q.

    Raises:
        EvaluationError: it cannot be read, or its arrays are not of the trace's samples and these queries.
    """
    samples = trace.header.samples
    expected = f"expected a file of numpy.savez with subsets, bool (models, {samples}), and losses (models, {queries})"

    def check(headers: Mapping[str, ArrayHeader]) -> None:
        subsets, losses = headers["subsets"], headers["losses"]
        fits = len(subsets.shape) == 2 and subsets.shape[1] == samples and subsets.dtype == np.bool_
        if not (fits and losses.shape == (subsets.shape[0], queries) and losses.dtype.kind in "fiu"):
            raise EvaluationError(
                f"{path} holds subsets, {subsets.dtype} {subsets.shape}, and losses, {losses.dtype} {losses.shape}; "
                f"{expected}."
            )
        if subsets.shape[0] > MOST_MODELS:
            raise EvaluationError(f"{path} is of {subsets.shape[0]} models; expected {MOST_MODELS} or fewer.")

    try:
        arrays = read_arrays(path, ("subsets", "losses"), check)
    except ValueError as error:
        raise EvaluationError(f"{path} cannot be read: {error}; {expected}.") from None
    return Retrained(arrays["subsets"], arrays["losses"].astype(np.float64))


def datamodeling(
    trace: Store,
    gradients: NDArray[np.float32],
    retrained: Retrained,
    names: Sequence[str | int],
    *,
    kind: Score = "deflated",
    seed: int = 0,
    progress: Progress | None = None,
) -> Finding:
    """The linear datamodeling score of a trace's scores, on models that were trained again.

    All samples are scored. One that has no gradient to rank counts as of no influence.

    Args:
        trace: the store; its samples are numbered from 0 to N - 1.
        gradients: (Q, T, v), of the queries.
        retrained: the models.
        names: of the queries.
        kind: the score that is measured.
        seed: of the interval's bootstrap.
        progress: counts the samples that were scored.

    Raises:
        EvaluationError: the measure has no value, or the samples are numbered in another way.
        QueryError: the gradients are not finite or not of the store's shape.
        TraceError: the store is damaged.
    """
    numbers = trace.sample
    if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise EvaluationError(
            f"{trace.path} does not hold each of the samples 0 to {len(numbers) - 1} once, so the columns of subsets "
            "cannot be told."
        )
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, len(numbers))

    score.check_queries(trace, gradients)
    by_slot = score.all_scores(trace, query.fitted_score(trace, kind).transform(gradients), progress=count)
    scores = np.empty(by_slot.shape)
    scores[:, numbers] = np.nan_to_num(by_slot, nan=0.0)
    found = evaluate.linear_datamodeling_score(scores, retrained.subsets, retrained.losses, seed=seed)
    without = int((~trace.valid).sum())
    row = (str(len(gradients)), str(found.models), _part(found.score.value), _interval(found.score), "0.000")
    return Finding(
        title=f"Linear datamodeling score of {kind} scores",
        headings=("queries", "models", "LDS", "95 % interval", "chance"),
        rows=(row,),
        meaning="Rank correlation, over the models, of the summed scores of the samples that a model was trained on "
        "with minus its loss, in the mean of the queries; 1 would be perfect. It says whether the scores foretell what "
        "training on other samples does, for many at once; not whether the single best are causes. The interval "
        "resamples queries and models."
        + (f" {without:,} samples have no gradient to rank, and count as of no influence." if without else ""),
        facts={
            "measure": "linear_datamodeling_score",
            "scored_by": kind,
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


def stored_gradients(trace: Store, samples: Sequence[int]) -> NDArray[np.float32]:
    """The gradients of samples as queries, (Q, T, v). Each counts among its own causes, as any other sample does.

    Raises EvaluationError for one whose gradients have no direction, TraceError for one that the store does not hold.
    """
    for sample in samples:
        if not trace.valid[trace.row_of(sample)]:
            raise EvaluationError(f"The gradient of sample {sample} is zero or not finite, so it cannot ask.")
    return query.sample_queries(trace, samples).gradients


def _ranked(trace: Store) -> NDArray[np.int64]:
    """The slots that are ranked, in the order of the dataset. Places in this array are what the measures see."""
    slots = np.flatnonzero(trace.valid)
    slots = slots[np.argsort(trace.sample[slots], kind="stable")]
    if len(np.unique(trace.sample[slots])) < len(slots):
        raise EvaluationError(f"{trace.path} holds samples more than once, so hits cannot be told from one another.")
    return slots


def _checked(ks: Sequence[int] | None, others: int) -> Sequence[int]:
    if ks is None:
        ks = [k for k in KS if k <= others]
        if not ks:
            raise EvaluationError(
                f"A sample has {max(others, 0)} others to be ranked with; expected {min(KS)} or more. Say how many of "
                "the best to look at with --k."
            )
    if min(ks, default=0) < 1 or max(ks) > others:
        raise EvaluationError(
            f"k is {', '.join(map(str, ks))}; expected numbers from 1 to {max(others, 0)}, since a sample has so many "
            "others to be ranked with."
        )
    return ks


def _value(value: Any) -> Any:
    """A value of a column, or None for what stands for none."""
    return None if value == "" or (isinstance(value, int) and value == -1) or value != value else value


def _spread(places: Sequence[int], count: int) -> NDArray[np.int64]:
    """So many of these places, or all if they are fewer, spread evenly."""
    if count < 1:
        raise EvaluationError(f"{count} queries were asked for; expected 1 or more.")
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(np.int64)
    return np.asarray(places, np.int64)[chosen]


def _ask(
    trace: Store,
    ranked: NDArray[np.int64],
    asking: NDArray[np.int64],
    k: int,
    kind: Score,
    exact: bool,
    progress: Progress | None,
) -> tuple[NDArray[np.int64], query.Answer]:
    """The places of the k best other samples of each that asks, (Q, k), and the last answer, for what it said."""
    samples = trace.sample[ranked]
    together = max(1, TOGETHER // (len(trace.header.timesteps) * trace.header.dimension))
    found = np.empty((len(asking), k), np.int64)
    made = query.fitted_score(trace, kind)
    for first in range(0, len(asking), together):
        here = asking[first : first + together]
        # One more than is looked at, for the one that asks. Another may be before it, if it is a copy.
        answer = query.answer_queries(trace, trace.gradients(ranked[here]), k=k + 1, score=made, exact=exact)
        places = np.searchsorted(samples, trace.sample[answer.ranking.rows])
        found[first : first + together] = evaluate.without_self(places, here)
        if progress is not None:
            progress(first + len(here), len(asking))
    return found, answer


def _finding(
    title: str,
    meaning: str,
    rates: Sequence[TopRate],
    facts: dict[str, Any],
    samples: NDArray[np.int64],
    answered: query.Answer,
) -> Finding:
    answered_by = answered.answered_by.description
    return Finding(
        title=f"{title}, {answered.score} scores, {len(samples):,} samples asking",
        headings=("k", "rate", "95 % interval", "chance", "at best"),
        rows=tuple(
            (str(of.k), _part(of.rate.value), _interval(of.rate), _part(of.chance), _part(of.best)) for of in rates
        ),
        meaning=f"{meaning} Chance is a random ranking, at best a perfect one. {answered_by[:1].upper()}"
        f"{answered_by[1:]}.",
        facts=facts
        | {
            "scored_by": answered.score,
            "answered_by": "scan" if answered.answered_by.recall is None else "index",
            "index_recall": answered.answered_by.recall,
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


def _part(value: float) -> str:
    return f"{value:.3f}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}" if estimate.low == estimate.low else "needs more queries"
