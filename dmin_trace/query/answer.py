"""Query gradients in, the most influential training samples out: by the index, or by a scan of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dmin_trace.query.hits import Hit, hits_of
from dmin_trace.search import (
    DeflatedScore,
    Index,
    Ranking,
    Score,
    Unavailable,
    check_k,
    check_queries,
    exact_top_k,
    open_index,
    score_method,
    search,
)
from dmin_trace.store import Store


class FittedScore(Protocol):
    """A score method that is fitted to a store: it changes queries before they are multiplied with the rows."""

    @property
    def name(self) -> str:
        """The name of the score."""

    def transform(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The changed queries, (Q, T, v)."""


@dataclass(frozen=True)
class AnsweredBy:
    """What found the training samples of an answer.

    recall: (depth, part): the part of the true `depth` best that the index found when it was calibrated; None where
        all rows were scanned.
    description: the same in words, on one line; it may hold text from the index file.
    """

    recall: tuple[int, float] | None
    description: str


@dataclass(frozen=True)
class Answer:
    """The best rows for each query, and how they were found.

    store: the store that the rows are of.
    ranking: rows, scores and scores per timestep.
    score: the name of the score.
    deflation: what was taken out of the queries, in words; "" if the score is not the deflated one.
    answered_by: the index, or a scan.
    """

    store: Store
    ranking: Ranking
    score: str
    deflation: str
    answered_by: AnsweredBy

    @property
    def hits(self) -> list[list[Hit]]:
        """The hits of each query, best first. They are read from the store, their rows only."""
        return hits_of(self.store, self.ranking)


def check_score(store: Store, name: str) -> Score:
    """The score with this name. Raises QueryError if there is none, or the store is too large for it."""
    score_method(store, name)
    return cast(Score, name)


def fitted_score(store: Store, name: str) -> FittedScore:
    """The built-in score with this name, fitted to a store.

    Raises:
        QueryError: there is no such score, or the store is too large for it.
        TraceError: the store is damaged.
    """
    method = score_method(store, name)
    method.fit(store)
    return method


def answer_queries(
    store: Store,
    gradients: NDArray[np.float32],
    *,
    k: int,
    score: str | FittedScore = "deflated",
    largest: bool = True,
    exact: bool = False,
    index: Index | Unavailable | None = None,
) -> Answer:
    """The training samples with the largest influence scores for queries, or with the smallest.

    The index answers if it is there, matches the store, and is calibrated for k and the score. Otherwise all rows are
    scanned; those that are done, in an unfinished store.

    Args:
        store: the store.
        gradients: (Q, T, v) float32, of queries.
        k: how many training samples for each query.
        score: the name of a built-in score; or a fitted one, which saves fitting it for each call.
        largest: False for the smallest scores, smallest first. The index does not answer for them.
        exact: scan all rows even if there is an index.
        index: the result of `open_index`, which saves opening the index for each call.

    Raises:
        QueryError: k is out of range, the gradients are not finite or not of the store's shape, there is no such score,
            or the store is too large for it.
        TraceError: the store is damaged.
    """
    check_k(store, k)
    check_queries(store, gradients)
    method = fitted_score(store, score) if isinstance(score, str) else score
    queries = method.transform(gradients)
    ranking, answered_by = _ranked(store, queries, k, method.name, largest, exact, index)
    deflation = method.description if isinstance(method, DeflatedScore) else ""
    return Answer(store, ranking, method.name, deflation, answered_by)


def _ranked(
    store: Store,
    queries: NDArray[np.float32],
    k: int,
    score: str,
    largest: bool,
    exact: bool,
    index: Index | Unavailable | None,
) -> tuple[Ranking, AnsweredBy]:
    """The ranking for transformed queries, and what found it."""
    if exact or not largest or not store.complete:
        return exact_top_k(store, queries, k, largest=largest), _scanned(store, "")
    index = open_index(store) if index is None else index
    if isinstance(index, Unavailable):
        return exact_top_k(store, queries, k), _scanned(store, index.reason)
    # Of a score of the user's own, no depth is calibrated.
    depth = index.facts.depth(k, score)
    if depth is None:
        return exact_top_k(store, queries, k), _scanned(store, index.facts.unserved(score))
    return search(index, queries, k, kind=score), AnsweredBy(
        (depth.k, depth.recall),
        f"answered by the index (recall@{depth.k} {depth.recall:.3f} when calibrated); --exact scans all",
    )


def _scanned(store: Store, reason: str) -> AnsweredBy:
    """A scan, and why the index did not answer."""
    searched = len(store.rows_done)
    if not store.complete:
        return AnsweredBy(None, f"searched {searched:,} of {store.header.samples:,} samples; the capture is unfinished")
    return AnsweredBy(None, f"scanned all {searched:,} samples" + (f": {reason}" if reason else ""))
