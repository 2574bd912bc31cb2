"""Measures of a ranking of samples, and what chance would give."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from row_kernels import Doubles


def ranks(scores: Doubles, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """(Q,) from 1, the rank of each query's wanted sample by scores (Q, N); samples of the same score are before it."""
    own = np.take_along_axis(scores, wanted[:, None], axis=1)
    found: NDArray[np.int64] = (scores >= own).sum(1)
    return found


def precision(scores: Doubles, relevant: NDArray[np.bool_]) -> Doubles:
    """(Q,) the share of relevant samples (N,) among as many as there are with the largest scores (Q, N)."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : relevant.sum()]
    found: Doubles = relevant[order].mean(1)
    return found


def average_precision(scores: Doubles, relevant: NDArray[np.bool_]) -> Doubles:
    """(Q,) the mean, over the relevant samples (N,), of the precision down to each in the order of scores (Q, N)."""
    hits = relevant[np.argsort(-scores, axis=1, kind="stable")]
    down_to = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    found: Doubles = (down_to * hits).sum(1) / relevant.sum()
    return found


def chance_average_precision(samples: int, relevant: int) -> float:
    """What a random order is expected to have: above the share of the relevant samples, where they are few."""
    harmonic = float((1 / np.arange(1, samples + 1)).sum())
    both = (relevant - 1) / (samples - 1) if samples > 1 else 0.0
    return (harmonic + both * (samples - harmonic)) / samples
