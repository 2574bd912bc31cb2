"""How well a perfect score could do: what two trainings on the same samples have in common.

A model's loss on a query depends on the samples it was trained on and on chance: first weights, order, noise. Scores
know of the samples alone. So even the best score correlates with the losses only as far as the losses repeat when every
subset is trained on again. With r the correlation of the two trainings' losses over the subsets (their reliability):

    the correlation with the losses of one training is at most        sqrt(r)
    the mean of the two trainings has the reliability                 R = 2 r / (1 + r)
    the correlation with that mean is at most                         sqrt(R)

Spearman 1904, "The Proof and Measurement of Association between Two Things" (the correction for attenuation, for a
score that is without error); Spearman 1910 and Brown 1910, the formula for R. Both hold for Pearson's correlation where
a loss is a part that repeats plus an independent error of the same variance in both trainings. For Spearman's they are
an approximation, good where losses are near normal.

r is averaged over queries first, and the root is taken of the mean. The mean of the queries' own roots would be wrong:
a query's r comes from few models, so that it is below zero for some queries, where it has no root, and leaving those
out or calling them zero makes the mean too large; and the root is concave, so that the error of an r makes the mean of
roots too small. A mean of r, negative ones among them, has neither fault. If the queries' true r differ, the root of
their mean lies above the mean of their roots, so that what is given here is rather too high than too low.

Scores may do better than sqrt(r) against one training if they were made from a model of the same first weights and
noise: then what is chance here is known to them in part. Against the mean of two this counts for less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmin_trace.audit import RESAMPLES
from dmin_trace.audit.datamodeling import spearman
from dmin_trace.audit.intervals import Estimate, bootstrap

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ceiling:
    """Each with a 95 % interval that resamples models and queries.

    reliability: r, the mean over queries.
    one: sqrt(r), for the correlation with one training; 0 where r is not above 0.
    mean: sqrt(2 r / (1 + r)), for the correlation with the mean of two.
    """

    reliability: Estimate
    one: Estimate
    mean: Estimate


def pearson(one: Floats, other: Floats) -> Floats:
    """Pearson's correlation of each column, (M, Q) and (M, Q) to (Q,); NaN where a column is all equal."""
    first, second = (values - values.mean(axis=0) for values in (one, other))
    with np.errstate(invalid="ignore"):
        correlations: Floats = (first * second).sum(axis=0) / np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return correlations


def ceiling(
    losses: Floats,
    correlation: Callable[[Floats, Floats], Floats] = spearman,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ceiling:
    """The ceiling for scores that are measured by the mean over queries of their correlation with losses.

    Args:
        losses: (2, M, Q) of the two models trained on each of M subsets, on each query.
        correlation: `spearman` for LDS, or `pearson`.
        seed, resamples: of the bootstrap.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    if losses.ndim != 3 or len(losses) != 2 or losses.shape[1] < 3 or losses.shape[2] < 1:
        raise ValueError(f"The losses have shape {losses.shape}; (2, models, queries) is expected, 3 models or more.")
    if not np.isfinite(losses).all():
        raise ValueError("The losses hold numbers that are not finite.")
    _, models, queries = losses.shape

    def resampled(generator: np.random.Generator) -> Floats:
        drawn = losses[:, generator.integers(models, size=models)]
        return _ceilings(correlation(drawn[0], drawn[1])[generator.integers(queries, size=queries)])

    found = bootstrap(_ceilings(correlation(losses[0], losses[1])), resampled, queries, seed, resamples)
    return Ceiling(*found)


def _ceilings(each: Floats) -> Floats:
    """r, sqrt(r) and sqrt(2 r / (1 + r)) from the correlations of the queries."""
    defined = each[~np.isnan(each)]
    r = float(defined.mean()) if defined.size else np.nan
    positive = max(r, 0.0) if not np.isnan(r) else r
    return np.array([r, np.sqrt(positive), np.sqrt(2 * positive / (1 + positive))])
