"""Values with their 95 % bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dmin_trace.errors import EvaluationError

RESAMPLES = 1000
"""Number of bootstrap resamples for an interval."""
PERCENTILES = (2.5, 97.5)
"""The percentiles of the resampled values that are the ends of an interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, from the percentiles of a bootstrap; NaN if only one query was given."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Floats, resampled: Callable[[np.random.Generator], Floats], queries: int, seed: int, resamples: int
) -> list[Estimate]:
    """Values, (n,), each with an interval from what `resampled` returns, (n,) for each call; NaN is left out."""
    if queries < 2:
        return [Estimate(float(value), np.nan, np.nan) for value in values]
    generator = np.random.default_rng(seed)
    draws = np.array([resampled(generator) for _ in range(resamples)])
    estimates = []
    for value, drawn in zip(values, draws.T, strict=True):
        defined = drawn[~np.isnan(drawn)]
        low, high = np.percentile(defined, PERCENTILES) if defined.size else (np.nan, np.nan)
        estimates.append(Estimate(float(value), float(low), float(high)))
    return estimates


def mean_estimate(each: Floats, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The mean of a value of each query, (Q,), with its interval."""
    count, mean = len(each), each.mean(keepdims=True)
    return bootstrap(mean, lambda random: random.choice(each, count).mean(keepdims=True), count, seed, resamples)[0]


def finite_matrix(name: str, values: ArrayLike) -> Floats:
    """The values as a float64 matrix. Raises EvaluationError if they are no matrix of finite numbers."""
    try:
        matrix = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise EvaluationError(f"{name} cannot be read as numbers.") from None
    if matrix.ndim != 2 or not matrix.size:
        raise EvaluationError(f"{name} have shape {matrix.shape}; expected two axes, none of them empty.")
    if not np.isfinite(matrix).all():
        raise EvaluationError(f"{name} hold numbers that are not finite.")
    return matrix
