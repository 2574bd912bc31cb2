"""How good an attribution is: measures of plain arrays, each with its 95 % bootstrap interval.

Two questions, and they pull apart. Do the samples found look like the query? `detection_rate` and `duplicate_recall`
say; they need no training, and say nothing of causes. Did the samples found make the model what it is?
`linear_datamodeling_score` and `counterfactual` say; they need models that were trained again on other data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dmin_trace.errors import EvaluationError

RESAMPLES = 1000
"""How often the queries (and models) are drawn anew for an interval."""
INTERVAL = (2.5, 97.5)
"""The percentiles of the resampled values that an interval lies between."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, by percentiles of a bootstrap.

    value: of all that was given.
    low, high: NaN where one query alone was given: nothing is known of the others then.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TopRate:
    """How the k best samples of each of Q queries did; all numbers are parts of one.

    k: how many of the best were looked at.
    rate: the mean over queries; its interval resamples queries.
    chance: what a random ranking would get, in the mean.
    best: what a perfect ranking would get, in the mean; below 1 where a query has fewer than k such samples, or more
        copies than k.
    each: (Q,) of each query.
    """

    k: int
    rate: Estimate
    chance: float
    best: float
    each: Floats


@dataclass(frozen=True)
class Datamodeling:
    """A linear datamodeling score.

    score: the mean over queries of the rank correlation, from -1 to 1; 0 is chance. Its interval resamples both
        queries and models.
    each: (Q,) the rank correlation of each query.
    models: M, how many models it is of.
    """

    score: Estimate
    each: Floats
    models: int


@dataclass(frozen=True)
class Counterfactual:
    """What leaving out the top samples does to the model's answer to a query, beside leaving out random ones.

    All but the ratio are in the units of what was given (a loss, or a distance of pictures), means over queries;
    positive where it grew. All intervals resample queries, and the models of each kind.

    top, random: the change when the top samples, or as many random ones, are left out.
    difference: top less random; above 0 where the top samples matter more than random ones.
    ratio: top over random; wide, or NaN, where random ones change nothing to speak of: read the difference then.
    each_top, each_random: (Q,) the changes of each query.
    """

    top: Estimate
    random: Estimate
    difference: Estimate
    ratio: Estimate
    each_top: Floats
    each_random: Floats


def detection_rate(
    labels: Sequence[Any] | NDArray[Any],
    slots: NDArray[np.integer[Any]],
    query_labels: Sequence[Any] | NDArray[Any],
    ks: Sequence[int],
    *,
    asking: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[TopRate, ...]:
    """The part of the k best samples that bear the query's label (DMin, arXiv 2412.08637, table 5).

    A measure of likeness, not of cause: a ranking by pictures alone can be near 1.

    Args:
        labels: (N,) of every sample that can be ranked, None (or NaN) for one without a label.
        slots: (Q, K) the places in `labels` of the best samples of each query, best first, the query itself left out
            (see `without_self`).
        query_labels: (Q,) of the queries.
        ks: each at most K.
        asking: (Q,) the place in `labels` of each query that is a sample itself; it is left out of chance too.
        seed: of the bootstrap.
        resamples: how often the queries are drawn anew.

    Returns:
        One for each of `ks`, in their order.

    Raises:
        EvaluationError: shapes that do not fit, a query without a label, or one label alone, of which all rankings
            would be right.
    """
    slots = _ranking(slots, len(labels), ks)
    if len(query_labels) != len(slots):
        raise EvaluationError(f"There are {len(query_labels)} labels of queries and {len(slots)} queries.")
    numbers: dict[Any, int] = {}
    of_samples = np.array([_number(label, numbers) for label in labels], np.int64)
    if len(numbers) < 2:
        raise EvaluationError(
            f"The samples bear {len(numbers)} labels between them; expected two or more, since every ranking would be "
            "right of one. Give another column."
        )
    of_queries = np.array([_number(label, numbers) for label in query_labels], np.int64)
    if (of_queries < 0).any():
        raise EvaluationError(f"Query {int(np.argmax(of_queries < 0))} has no label. Leave such queries out.")
    bearing = np.bincount(of_samples[of_samples >= 0], minlength=len(numbers))[of_queries]
    others = np.full(len(slots), len(labels))
    if asking is not None:
        places = _places(asking, len(slots), len(labels))
        if (slots == places[:, None]).any():
            raise EvaluationError("A query is among its own best samples. Leave it out with without_self.")
        bearing -= of_samples[places] == of_queries
        others -= 1
    right = of_samples[slots] == of_queries[:, None]
    return tuple(
        _top_rate(
            k,
            each=right[:, :k].mean(axis=1),
            chance=float((bearing / others).mean()),
            best=float((np.minimum(bearing, k) / k).mean()),
            seed=seed,
            resamples=resamples,
        )
        for k in ks
    )


def duplicate_recall(
    slots: NDArray[np.integer[Any]],
    copies: Sequence[Collection[int]],
    ks: Sequence[int],
    *,
    ranked: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[TopRate, ...]:
    """What part of the copies of each query is among its k best samples.

    A check that must pass: a sample that is the query's copy has its gradient. It says nothing of how others rank.

    Args:
        slots: (Q, K) the best samples of each query, best first, the query itself left out (see `without_self`).
        copies: of each query the samples that are its copies, itself left out; one at least.
        ks: each at most K.
        ranked: how many samples are ranked for a query, itself left out; chance is k of them.
        seed: of the bootstrap.
        resamples: how often the queries are drawn anew.

    Returns:
        One for each of `ks`, in their order.

    Raises:
        EvaluationError: shapes that do not fit, or a query without copies.
    """
    slots = _ranking(slots, None, ks)
    if len(copies) != len(slots):
        raise EvaluationError(f"There are sets of copies for {len(copies)} queries and {len(slots)} queries.")
    sets = [np.unique(np.fromiter(of, np.int64, len(of))) for of in copies]
    counts = np.array([len(of) for of in sets])
    if not counts.all():
        raise EvaluationError(f"Query {int(np.argmin(counts))} has no copies. Leave such queries out.")
    if ranked < max(counts.max(), slots.shape[1]):
        raise EvaluationError(f"{ranked} samples are ranked, fewer than were found or are copies of a query.")
    found = np.stack([np.isin(row, of) for row, of in zip(slots, sets, strict=True)])
    return tuple(
        _top_rate(
            k,
            each=found[:, :k].sum(axis=1) / counts,
            chance=k / ranked,
            best=float((np.minimum(counts, k) / counts).mean()),
            seed=seed,
            resamples=resamples,
        )
        for k in ks
    )


def without_self(
    slots: NDArray[np.integer[Any]], asking: Sequence[int] | NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """Rankings of queries that are samples themselves, (Q, K), less the query or else the last: (Q, K - 1)."""
    slots = np.asarray(slots, np.int64)
    own = slots == np.asarray(asking, np.int64)[:, None]
    own[~own.any(axis=1), -1] = True
    left: NDArray[np.int64] = slots[~own].reshape(len(slots), -1)
    return left


def linear_datamodeling_score(
    scores: ArrayLike, subsets: NDArray[np.bool_], losses: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> Datamodeling:
    """Whether scores foretell which of several models does well on a query (TRAK, arXiv 2303.14186;
    D-TRAK, arXiv 2311.00500, for diffusion models).

    Models are trained on random subsets of the samples, often halves. For each query it is Spearman's correlation over
    the models between the sum of the scores of the samples in the subset and *minus* the loss: a sample with influence
    lowers the loss, so a score that finds causes is above 0. Of equal values each has the mean of their ranks.

    Args:
        scores: (Q, N) of every sample for each query.
        subsets: (M, N) whether each model was trained on each sample.
        losses: (M, Q) of each model on each query, better as means over many timesteps and noises, and several seeds.
        seed: of the bootstrap, which draws both queries and models anew.
        resamples: how often.

    Raises:
        EvaluationError: shapes that do not fit, numbers that are not finite, fewer than two models, or a query for
            which all models have one loss or one sum of scores, and so no ranks.
    """
    of_samples, of_models = _matrix("The scores", scores), _matrix("The losses", losses)
    subsets = np.asarray(subsets)
    if subsets.dtype != np.bool_ or subsets.ndim != 2:
        raise EvaluationError(
            f"The subsets are {subsets.dtype} of shape {subsets.shape}; expected bool of shape (models, samples)."
        )
    queries, samples = of_samples.shape
    models = len(subsets)
    if subsets.shape[1] != samples:
        raise EvaluationError(
            f"The subsets are of {subsets.shape[1]} samples; expected {samples}, as there are scores."
        )
    if of_models.shape != (models, queries):
        raise EvaluationError(
            f"The losses have shape {of_models.shape}; expected ({models}, {queries}): of each model for each query."
        )
    if models < 2:
        raise EvaluationError(f"There is {models} model; expected two or more, to rank them.")
    # One model at a time: all subsets as numbers would be eight times their size.
    sums = np.stack([of_samples @ subset for subset in subsets])
    for values, what in ((of_models, "loss"), (sums, "sum of scores")):
        if (same := (values == values[0]).all(axis=0)).any():
            raise EvaluationError(
                f"All models have the same {what} for query {int(np.argmax(same))}, so they have no ranks."
            )
    each = spearman(sums, -of_models)

    def resampled(generator: np.random.Generator) -> Floats:
        drawn = generator.integers(models, size=models)
        correlations = spearman(sums[drawn], -of_models[drawn])[generator.integers(queries, size=queries)]
        # Of few models one may be drawn alone: no ranks, and nothing to learn from the draw.
        defined = correlations[~np.isnan(correlations)]
        return np.array([defined.mean() if defined.size else np.nan])

    (score,) = _estimates(np.array([each.mean()]), resampled, queries, seed, resamples)
    return Datamodeling(score=score, each=each, models=models)


def counterfactual(
    full: ArrayLike,
    without_top: ArrayLike,
    without_random: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Counterfactual:
    """What the top samples did, by taking them away: models trained without them, and without as many random ones.

    The nearest to a cause that can be measured. A query's loss grows without the samples that taught the model to make
    it. Of pictures give distances (L2, say) to the picture of one full model from the same noise; `full` then holds
    those of full models of other seeds, or zeros.

    Args:
        full: (F, Q) a measure of models trained on all samples, one or more seeds, for each query.
        without_top: (S, Q) the same where the k best samples of that query were left out: S seeds.
        without_random: (R, Q) the same where k random samples were left out: R draws.
        seed: of the bootstrap, which draws queries, and the models of each kind, anew.
        resamples: how often.

    Raises:
        EvaluationError: shapes that do not fit, or numbers that are not finite.
    """
    kinds = [
        _matrix(what, values)
        for what, values in (
            ("What full models gave", full),
            ("What models without the top samples gave", without_top),
            ("What models without random samples gave", without_random),
        )
    ]
    queries = kinds[0].shape[1]
    if any(kind.shape[1] != queries for kind in kinds):
        raise EvaluationError(
            f"Full models have {queries} queries, those without the top samples {kinds[1].shape[1]}, and those without "
            f"random ones {kinds[2].shape[1]}; expected the same of all."
        )

    def changes(of: Sequence[Floats]) -> tuple[Floats, Floats]:
        before, top, random = (values.mean(axis=0) for values in of)
        return top - before, random - before

    each_top, each_random = changes(kinds)

    def figures(top: Floats, random: Floats) -> Floats:
        change, by_chance = float(top.mean()), float(random.mean())
        return np.array([change, by_chance, change - by_chance, change / by_chance if by_chance else np.nan])

    def resampled(generator: np.random.Generator) -> Floats:
        drawn = generator.integers(queries, size=queries)
        top, random = changes([kind[generator.integers(len(kind), size=len(kind))] for kind in kinds])
        return figures(top[drawn], random[drawn])

    top, random, difference, ratio = _estimates(figures(each_top, each_random), resampled, queries, seed, resamples)
    return Counterfactual(top, random, difference, ratio, each_top, each_random)


def spearman(one: Floats, other: Floats) -> Floats:
    """Spearman's rank correlation of each column, (M, Q) and (M, Q) to (Q,); NaN where a column is all equal.

    Of equal values each has the mean of their ranks, so it is Pearson's correlation of those ranks.
    """
    first, second = (ranks - ranks.mean(axis=0) for ranks in (_ranks(one), _ranks(other)))
    with np.errstate(invalid="ignore"):
        correlations: Floats = (first * second).sum(axis=0) / np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return correlations


def _ranks(values: Floats) -> Floats:
    """The rank of each value in its column, from 0; of equal values the mean of their ranks."""
    order = np.argsort(values, axis=0)
    in_order = np.take_along_axis(values, order, 0)
    places = np.arange(len(values))[:, None]
    differs = in_order[1:] != in_order[:-1]
    border = np.ones((1, values.shape[1]), np.bool_)
    first = np.maximum.accumulate(np.where(np.concatenate([border, differs]), places, 0))
    last = np.where(np.concatenate([differs, border]), places, len(values))
    last = np.minimum.accumulate(last[::-1])[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, 0)
    return ranks


def _estimates(
    values: Floats, resampled: Callable[[np.random.Generator], Floats], queries: int, seed: int, resamples: int
) -> list[Estimate]:
    """Values, (n,), each with the interval of what `resampled` gives, (n,) a draw; NaN draws are left out."""
    if queries < 2:
        return [Estimate(float(value), np.nan, np.nan) for value in values]
    generator = np.random.default_rng(seed)
    draws = np.array([resampled(generator) for _ in range(resamples)])
    estimates = []
    for value, drawn in zip(values, draws.T, strict=True):
        defined = drawn[~np.isnan(drawn)]
        low, high = np.percentile(defined, INTERVAL) if defined.size else (np.nan, np.nan)
        estimates.append(Estimate(float(value), float(low), float(high)))
    return estimates


def _top_rate(k: int, *, each: Floats, chance: float, best: float, seed: int, resamples: int) -> TopRate:
    def resampled(generator: np.random.Generator) -> Floats:
        return np.array([each[generator.integers(len(each), size=len(each))].mean()])

    (rate,) = _estimates(np.array([each.mean()]), resampled, len(each), seed, resamples)
    return TopRate(k, rate, chance, best, each)


def _ranking(slots: NDArray[Any], samples: int | None, ks: Sequence[int]) -> NDArray[np.int64]:
    """Checked rankings, (Q, K) int64."""
    slots = np.asarray(slots)
    if slots.ndim != 2 or not slots.size or not np.issubdtype(slots.dtype, np.integer):
        raise EvaluationError(
            f"The ranking is {slots.dtype} of shape {slots.shape}; expected integers of shape (queries, k)."
        )
    if samples is not None and not (slots.min() >= 0 and slots.max() < samples):
        raise EvaluationError(f"The ranking names samples beyond the {samples} that have labels.")
    if not ks or min(ks) < 1 or max(ks) > slots.shape[1]:
        raise EvaluationError(f"k is {list(ks)}; expected numbers from 1 to {slots.shape[1]}, as many as were ranked.")
    return slots.astype(np.int64)


def _places(asking: Sequence[int] | NDArray[Any], queries: int, samples: int) -> NDArray[np.int64]:
    places = np.asarray(asking, np.int64)
    if places.shape != (queries,) or places.min() < 0 or places.max() >= samples:
        raise EvaluationError(f"What asks has shape {places.shape}; expected ({queries},) places among the samples.")
    return places


def _number(label: Any, numbers: dict[Any, int]) -> int:
    """The number of a label among those met so far; -1 for none."""
    if label is None or label != label:
        return -1
    return numbers.setdefault(label, len(numbers))


def _matrix(what: str, values: ArrayLike) -> Floats:
    try:
        matrix = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise EvaluationError(f"{what} cannot be read as numbers.") from None
    if matrix.ndim != 2 or not matrix.size:
        raise EvaluationError(f"{what} have shape {matrix.shape}; expected two axes, none of them empty.")
    if not np.isfinite(matrix).all():
        raise EvaluationError(f"{what} hold numbers that are not finite.")
    return matrix
