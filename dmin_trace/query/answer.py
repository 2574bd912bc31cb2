"""Query gradients in, the most influential training samples out: by the index, or by a scan of all rows."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dmin_trace.query.topk import AnsweredBy, TopK, hits_of
from dmin_trace.search import (
    DeflatedScore,
    Index,
    Unavailable,
    check_queries,
    exact_top_k,
    open_index,
    score_method,
    search,
)
from dmin_trace.store import Store


class FittedScore(Protocol):
    """A score that is fitted to a store."""

    @property
    def name(self) -> str:
        """A word for the score."""

    def transform(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The changed gradients of queries, (Q, T, v) float32; those given, of the same shape, stay as they are."""


def fitted_score(store: Store, name: str) -> FittedScore:
    """The built-in score with this name, fitted to a store. Errors are those of `score_method` and its `fit`."""
    method = score_method(store, name)
    method.fit(store)
    return method


def answer_queries(
    store: Store,
    gradients: NDArray[np.float32],
    *,
    k: int,
    score: str | FittedScore = "deflated",
    names: Sequence[str] = (),
    prompts: Sequence[str | None] = (),
    largest: bool = True,
    exact: bool = False,
    index: Index | Unavailable | None = None,
) -> TopK:
    """The k training samples with the largest influence scores for queries (Q, T, v), or with the smallest.

    The index answers if it is there, matches the store, and is calibrated for k and the score. Otherwise all rows are
    scanned; those that are done, in an unfinished store. A fitted score and an `index` from `open_index` save making
    them for each call. Arguments and errors are otherwise those of `Trace.top_k`.
    """
    check_queries(store, gradients)
    method = fitted_score(store, score) if isinstance(score, str) else score
    queries = method.transform(gradients)
    if exact or not largest or not store.complete:
        index = Unavailable("")
    elif index is None:
        index = open_index(store)
    # Of a score of the user's own, no depth is calibrated.
    if isinstance(index, Unavailable) or (depth := index.facts.depth(k, method.name)) is None:
        ranking = exact_top_k(store, queries, k, largest=largest)
        reason = index.reason if isinstance(index, Unavailable) else index.facts.unserved(method.name)
        answered_by = AnsweredBy(None, _scanned(store, reason))
    else:
        ranking = search(index, queries, k, kind=method.name)
        words = f"answered by the index (recall@{depth.k} {depth.recall:.3f} when calibrated); --exact scans all"
        answered_by = AnsweredBy((depth.k, depth.recall), words)
    hits = hits_of(store, ranking)
    return TopK(
        samples=np.array([[hit.sample for hit in of_query] for of_query in hits], np.int64),
        scores=ranking.scores,
        per_timestep=ranking.per_timestep,
        hits=hits,
        names=tuple(names) or tuple(f"query {n}" for n in range(len(hits))),
        prompts=tuple(prompts) or (None,) * len(hits),
        timesteps=store.header.timesteps,
        score=method.name,
        deflation=method.description if isinstance(method, DeflatedScore) else "",
        answered_by=answered_by,
    )


def _scanned(store: Store, reason: str) -> str:
    """What a scan searched, and why the index did not answer."""
    count = store.header.samples
    if not store.complete:
        return f"searched {len(store.rows_done):,} of {count:,} samples; the capture is unfinished"
    return f"scanned all {count:,} samples" + (f": {reason}" if reason else "")
