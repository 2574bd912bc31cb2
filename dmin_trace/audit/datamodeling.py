"""The linear datamodeling score on plain arrays: whether influence scores predict what retrained models do."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dmin_trace.audit.intervals import RESAMPLES, Estimate, Floats, bootstrap, finite_matrix
from dmin_trace.errors import EvaluationError


@dataclass(frozen=True)
class Datamodeling:
    """A linear datamodeling score, of M models.

    each: (Q,) the rank correlation of each query, from -1 to 1; 0 is chance.
    score: their mean. Its interval resamples both queries and models.
    """

    score: Estimate
    each: Floats
    models: int


def linear_datamodeling_score(
    scores: ArrayLike, subsets: NDArray[np.bool_], losses: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> Datamodeling:
    """How well scores predict which of several models has the lower loss on a query (TRAK, arXiv 2303.14186;
    D-TRAK, arXiv 2311.00500, for diffusion models).

    Models are trained on random subsets of the samples, often halves. For each query this is Spearman's correlation,
    over the models, between the sum of the scores of the samples in the subset and *minus* the loss. A sample with
    influence lowers the loss, so a good score is above 0. Equal values have the mean of their ranks.

    Args:
        scores: (Q, N) of every sample for each query.
        subsets: (M, N) whether each model was trained on each sample.
        losses: (M, Q) of each model on each query, best as means over many timesteps and noises, and several seeds.
        seed, resamples: of the bootstrap.

    Raises EvaluationError for shapes that do not fit, numbers that are not finite, fewer than two models, or a query
    for which all models have the same loss or the same sum of scores.
    """
    of_samples, of_models = finite_matrix("The scores", scores), finite_matrix("The losses", losses)
    subsets, (queries, samples) = np.asarray(subsets), of_samples.shape
    if subsets.dtype != np.bool_ or subsets.ndim != 2 or subsets.shape[1] != samples:
        raise EvaluationError(
            f"The subsets are {subsets.dtype} of shape {subsets.shape}; expected bool of shape (models, {samples})."
        )
    models = len(subsets)
    if of_models.shape != (models, queries):
        raise EvaluationError(
            f"The losses have shape {of_models.shape}; expected ({models}, {queries}): of each model for each query."
        )
    if models < 2:
        raise EvaluationError(f"There is {models} model; expected two or more, to rank them.")
    # One model at a time: all subsets as numbers would take eight times their memory.
    sums = np.stack([of_samples @ subset for subset in subsets])
    for values, name in ((of_models, "loss"), (sums, "sum of scores")):
        if (same := np.flatnonzero((values == values[0]).all(axis=0))).size:
            raise EvaluationError(f"All models have the same {name} for query {same[0]}, so they have no ranks.")
    each = spearman(sums, -of_models)

    def resampled(generator: np.random.Generator) -> Floats:
        drawn = generator.integers(models, size=models)
        correlations = spearman(sums[drawn], -of_models[drawn])[generator.integers(queries, size=queries)]
        # A resample of few models may hold one model only, which has no rank correlation.
        defined = correlations[~np.isnan(correlations)]
        return np.array([defined.mean() if defined.size else np.nan])

    (score,) = bootstrap(np.array([each.mean()]), resampled, queries, seed, resamples)
    return Datamodeling(score=score, each=each, models=models)


def spearman(one: Floats, other: Floats) -> Floats:
    """Spearman's rank correlation of each column, (M, Q) and (M, Q) to (Q,); NaN where a column is all equal."""
    first, second = (ranks - ranks.mean(axis=0) for ranks in (_ranks(one), _ranks(other)))
    with np.errstate(invalid="ignore"):
        correlations: Floats = (first * second).sum(axis=0) / np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return correlations


def _ranks(values: Floats) -> Floats:
    """The rank of each value in its column, from 0; equal values have the mean of their ranks."""
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
