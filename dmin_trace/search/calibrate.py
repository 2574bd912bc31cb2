"""Calibration: how deep a graph is searched so that it finds the wanted part of the true best rows.

Recall is measured with held-out samples, which are not in the graph yet, and with mixtures of two of them: a generated
image lies between many training samples, none of which stands out. Such a query takes more candidates than a sample
does, and mixtures come closest to it (docs/performance.md).
"""

from __future__ import annotations

import math

import numpy as np

from dmin_trace.search.deflation import Progress, Score
from dmin_trace.search.exact import exact_top_k
from dmin_trace.search.graph import Graph
from dmin_trace.search.index_files import Depth
from dmin_trace.search.ranking import Floats, Rows
from dmin_trace.store import Store

MARGIN = 2
"""Times the candidates that were enough in calibration, for queries that are harder."""
MAX_EF = 2**12
"""The largest ef, unless eight times the candidates is more. Among a million vectors that lie close a graph is left
early; 20 candidates then need an ef of thousands, which takes milliseconds."""


def calibration_queries(store: Store, held: Rows) -> Floats:
    """(2 n, T, v) the gradients of n held-out rows, and n mixtures of two of them."""
    gradients = store.gradients(held)
    mixed = gradients + np.roll(gradients, len(gradients) // 2, axis=0)
    norm = np.linalg.norm(mixed, axis=2, keepdims=True)
    return np.concatenate([gradients, mixed / np.where(norm > 0, norm, 1)])


def true_best(store: Store, queries: Floats, held: Rows, copies: Rows, k: int, progress: Progress) -> Rows:
    """(queries, k) the best of all rows but the held-out ones, by the exact scan; a copy counts as its original."""
    original = np.arange(store.header.samples)
    original[copies[:, 0]] = copies[:, 1]
    left_out = np.isin(original, held)
    done = 0

    def scanned(rows: int) -> None:
        nonlocal done
        done += rows
        progress("scanning for the true best", done, store.header.samples)

    most = min(k + int(left_out.sum()), store.valid_count)
    ranking = exact_top_k(store, queries, most, progress=scanned)
    return np.stack([original[rows[~left_out[rows]][:k]] for rows in ranking.rows])


def calibrate(
    graph: Graph, vectors: Floats, truth: Rows, wanted: dict[int, float], most: int, score: Score
) -> tuple[tuple[Depth, ...], str]:
    """How deep the graph is searched for each number of hits; and, where its recall cannot be reached, why.

    Args:
        graph: the graph, without the held-out samples.
        vectors, truth: (2 n, length) of the calibration queries for a score, and their true best, (2 n, k). Recall is
            that of the worse half, samples or mixtures.
        wanted: for each number of hits the recall that is wanted.
        most: the largest number of candidates.
    """
    depths: list[Depth] = []
    short: list[str] = []
    labels = _nearest(graph, vectors, most, most)
    for k, least in wanted.items():
        # The place of each of the true best among the candidates; `most` if it is not there.
        match = labels[:, None, :] == truth[:, :k, None]
        places = np.where(match.any(axis=2), match.argmax(axis=2), most).reshape(2, -1)
        enough = int(np.sort(places, axis=1)[:, math.ceil(least * places.shape[1]) - 1].max()) + 1
        candidates = min(most, max(k, MARGIN * enough))
        reach = float(np.mean(places < candidates, axis=1).min())
        ef, recall = candidates, -1.0
        while recall < min((1 + least) / 2, reach) and ef < max(MAX_EF, 8 * candidates):
            ef *= 2
            found = (_nearest(graph, vectors, candidates, ef)[:, None, :] == truth[:, :k, None]).any(axis=2)
            recall = float(found.reshape(2, -1).mean(axis=1).min())
        depth = Depth(score=score, k=k, candidates=candidates, ef=ef, recall=recall)
        if recall < least:
            short.append(f"{depth.name} is {recall:.3f} with {candidates} candidates, {least:g} is wanted")
        else:
            depths.append(depth)
    return tuple(depths), "; ".join(short)


def _nearest(graph: Graph, vectors: Floats, k: int, ef: int) -> Rows:
    graph.set_ef(ef)
    labels: Rows = graph.knn_query(vectors, k=k)[0].astype(np.int64)
    return labels
