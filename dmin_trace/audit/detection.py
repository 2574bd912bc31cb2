"""Measures of likeness on plain arrays: the detection rate by labels, and the recall of duplicates.

They need no training. They say whether the samples found look like the query, and nothing about influence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.audit.intervals import RESAMPLES, Estimate, Floats, mean_estimate
from dmin_trace.errors import EvaluationError

Ranking = NDArray[np.integer[Any]]
Positions = Sequence[int] | Ranking


@dataclass(frozen=True)
class TopRate:
    """A measure of the k best samples of each of Q queries; all numbers are fractions.

    each, rate: (Q,) the rate of each query, and their mean; its interval resamples queries.
    chance, best: the mean rate of a random and of a perfect ranking. The best is below 1 if a query has fewer than k
        matching samples, or more duplicates than k.
    """

    k: int
    rate: Estimate
    chance: float
    best: float
    each: Floats


def detection_rate(
    labels: Sequence[Any] | NDArray[Any],
    ranking: Ranking,
    query_labels: Sequence[Any] | NDArray[Any],
    ks: Sequence[int],
    *,
    query_positions: Positions | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[TopRate, ...]:
    """The fraction of the k best samples that have the label of the query (DMin, arXiv 2412.08637, table 5).

    This measures likeness, not influence: a ranking by pixels alone can be near 1.

    Args:
        labels, query_labels: (N,) of every sample that can be ranked, None or NaN for none; (Q,) of the queries.
        ranking: (Q, K) positions in `labels` of each query's best other samples, best first (see `without_query`).
        ks: numbers from 1 to K.
        query_positions: (Q,) the position in `labels` of each query that is a sample; it is not counted in the chance.
        seed, resamples: of the bootstrap of the queries.

    Returns one result for each of `ks`. Raises EvaluationError for shapes that do not fit, a query without a label, or
    fewer than two different labels.
    """
    ranking = _check_ranking(ranking, ks)
    if ranking.min() < 0 or ranking.max() >= len(labels):
        raise EvaluationError(f"The ranking names samples beyond the {len(labels)} that have labels.")
    if len(query_labels) != len(ranking):
        raise EvaluationError(f"There are {len(query_labels)} labels of queries and {len(ranking)} queries.")
    numbers: dict[Any, int] = {}
    of_samples = np.array([_label_number(label, numbers) for label in labels], np.int64)
    if len(numbers) < 2:
        raise EvaluationError(
            f"The samples have {len(numbers)} different labels; expected two or more, since with one every ranking is "
            "right. Give another column."
        )
    of_queries = np.array([_label_number(label, numbers) for label in query_labels], np.int64)
    if (of_queries < 0).any():
        raise EvaluationError(f"Query {int(np.argmax(of_queries < 0))} has no label. Leave such queries out.")
    matching = np.bincount(of_samples[of_samples >= 0], minlength=len(numbers))[of_queries]
    others = np.full(len(ranking), len(labels))
    if query_positions is not None:
        positions = np.asarray(query_positions, np.int64)
        if positions.shape != (len(ranking),) or positions.min() < 0 or positions.max() >= len(labels):
            raise EvaluationError(
                f"query_positions has shape {positions.shape}; expected ({len(ranking)},) positions in the labels."
            )
        if (ranking == positions[:, None]).any():
            raise EvaluationError("A query is among its own best samples. Leave it out with without_query.")
        matching -= of_samples[positions] == of_queries
        others -= 1
    right = of_samples[ranking] == of_queries[:, None]
    chance = float((matching / others).mean())
    return tuple(_top_rate(k, right, matching, k, chance, seed, resamples) for k in ks)


def duplicate_recall(
    ranking: Ranking, duplicates: Sequence[Collection[int]], ks: Sequence[int], *, ranked: int, seed: int = 0
) -> tuple[TopRate, ...]:
    """The fraction of the duplicates of each query that are among its k best samples.

    A duplicate has the gradient of the query, so every sound score passes. It says nothing about the other samples.

    Args:
        ranking, ks, seed: as of `detection_rate`.
        duplicates: for each query the samples that are its duplicates, without the query itself; at least one.
        ranked: the number of samples that are ranked for a query, without the query itself.

    Returns one result for each of `ks`. Raises EvaluationError for shapes that do not fit, or for no duplicates.
    """
    ranking = _check_ranking(ranking, ks)
    if len(duplicates) != len(ranking):
        raise EvaluationError(f"There are duplicates of {len(duplicates)} queries, and {len(ranking)} queries.")
    sets = [np.unique(np.fromiter(of, np.int64, len(of))) for of in duplicates]
    counts = np.array([len(of) for of in sets])
    if not counts.all():
        raise EvaluationError(f"Query {int(np.argmin(counts))} has no duplicates. Leave such queries out.")
    if ranked < max(counts.max(), ranking.shape[1]):
        raise EvaluationError(f"{ranked} samples are ranked, fewer than were found or are duplicates of a query.")
    found = np.stack([np.isin(row, of) for row, of in zip(ranking, sets, strict=True)])
    return tuple(_top_rate(k, found, counts, counts, k / ranked, seed, RESAMPLES) for k in ks)


def without_query(ranking: Ranking, query_positions: Positions) -> NDArray[np.int64]:
    """Leaves each query out of its own ranking, or else the last sample: (Q, K) becomes (Q, K - 1)."""
    ranking = np.asarray(ranking, np.int64)
    own = ranking == np.asarray(query_positions, np.int64)[:, None]
    own[~own.any(axis=1), -1] = True
    others: NDArray[np.int64] = ranking[~own].reshape(len(ranking), -1)
    return others


def check_ks(ks: Sequence[int], others: int) -> None:
    """Raises EvaluationError if some k is not a number of best samples, where each query has so many others."""
    if not ks or min(ks) < 1 or max(ks) > others:
        raise EvaluationError(
            f"k is {', '.join(map(str, ks))}; expected numbers from 1 to {others}, since a query is ranked with so "
            "many samples. Give another k."
        )


def _check_ranking(ranking: NDArray[Any], ks: Sequence[int]) -> NDArray[np.int64]:
    ranking = np.asarray(ranking)
    if ranking.ndim != 2 or not ranking.size or not np.issubdtype(ranking.dtype, np.integer):
        raise EvaluationError(
            f"The ranking is {ranking.dtype} of shape {ranking.shape}; expected integers of shape (queries, k)."
        )
    check_ks(ks, ranking.shape[1])
    return ranking.astype(np.int64)


def _top_rate(
    k: int, right: NDArray[np.bool_], matching: NDArray[Any], of: Any, chance: float, seed: int, resamples: int
) -> TopRate:
    """`of`: the largest number of matching samples that count, for all queries or each."""
    each = right[:, :k].sum(axis=1) / of
    best = float((np.minimum(matching, k) / of).mean())
    return TopRate(k, mean_estimate(each, seed, resamples), chance, best, each)


def _label_number(label: Any, numbers: dict[Any, int]) -> int:
    """The number of a label, in the order of their first appearance; -1 for no label."""
    return -1 if label is None or label != label else numbers.setdefault(label, len(numbers))
