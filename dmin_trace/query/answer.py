"""Query gradients in, the most influential training samples out: by the index, or by a scan of all rows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dmin_trace import search
from dmin_trace.query.topk import AnsweredBy, TopK, hits_of
from dmin_trace.store import Store


def answer_queries(
    store: Store,
    gradients: NDArray[np.float32],
    *,
    k: int,
    score: str | search.FittedScore = "deflated",
    names: Sequence[str] = (),
    prompts: Sequence[str | None] = (),
    largest: bool = True,
    exact: bool = False,
    index: search.Index | search.Unavailable | None = None,
) -> TopK:
    """The k training samples with the largest influence scores for queries (Q, T, v), or with the smallest.

    The index answers if it is there, matches the store, and is calibrated for k and the score. Otherwise all rows are
    scanned; those that are done, in an unfinished store. A fitted score and an `index` from `open_index` save making
    them for each call. Arguments and errors are otherwise those of `Trace.top_k`.
    """
    search.check_queries(store, gradients)
    fitted = search.fit_score(store, score) if isinstance(score, str) else score
    queries = fitted.transform(gradients)
    if exact or not largest or not store.complete:
        index = search.Unavailable("")
    elif index is None:
        index = search.open_index(store)
    # Of a score of the user's own, no depth is calibrated.
    if isinstance(index, search.Unavailable) or (depth := index.facts.depth(k, fitted.name)) is None:
        ranking = search.exact_top_k(store, queries, k, largest=largest)
        reason = index.reason if isinstance(index, search.Unavailable) else index.facts.unserved(fitted.name)
        answered_by = AnsweredBy(None, _scanned(store, reason))
    else:
        ranking = search.search(index, queries, k, kind=fitted.name)
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
        score=fitted.name,
        deflation=fitted.description if isinstance(fitted, search.BuiltInScore) else "",
        answered_by=answered_by,
    )


def _scanned(store: Store, reason: str) -> str:
    """What a scan searched, and why the index did not answer."""
    count = store.header.samples
    if not store.complete:
        return f"searched {len(store.rows_done):,} of {count:,} samples; the capture is unfinished"
    return f"scanned all {count:,} samples" + (f": {reason}" if reason else "")
