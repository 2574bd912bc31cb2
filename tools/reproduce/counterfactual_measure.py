"""The counterfactual measure on plain arrays: what models do that were trained without the top samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dmin_trace.audit.intervals import RESAMPLES, Estimate, Floats, bootstrap, finite_matrix
from dmin_trace.errors import EvaluationError


@dataclass(frozen=True)
class Counterfactual:
    """The change of a model's answer to a query without the top samples, beside that without random samples.

    All but the ratio are in the units of what was given (a loss, or a distance of images), means over the queries;
    positive where it grew. All intervals resample queries, and the models of each kind.

    top, random: the change when the top samples, or as many random samples, are left out.
    difference: top minus random; above 0 where the top samples matter more than random samples.
    ratio: top over random; wide, or NaN, where random samples change almost nothing: read the difference then.
    each_top, each_random: (Q,) the changes of each query.
    """

    top: Estimate
    random: Estimate
    difference: Estimate
    ratio: Estimate
    each_top: Floats
    each_random: Floats


def counterfactual(
    full: ArrayLike,
    without_top: ArrayLike,
    without_random: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Counterfactual:
    """What the top samples did: compares models trained without them with models trained without random samples.

    This is the closest measure of influence. A query's loss grows without the samples that taught the model to make
    it. For images give distances (L2, say) to the image of one full model from the same noise; `full` then holds the
    distances of full models of other seeds, or zeros.

    Args:
        full: (F, Q) a measure of models trained on all samples, of one or more seeds, for each query.
        without_top: (S, Q) the same for models without the k best samples of that query, of S seeds.
        without_random: (R, Q) the same for models without k random samples, of R draws.
        seed: of the bootstrap, which resamples queries and the models of each kind.
        resamples: the number of resamples.

    Raises:
        EvaluationError: shapes that do not fit, or numbers that are not finite.
    """
    kinds = [
        finite_matrix("The values of full models", full),
        finite_matrix("The values of models without the top samples", without_top),
        finite_matrix("The values of models without random samples", without_random),
    ]
    counts = [kind.shape[1] for kind in kinds]
    queries = counts[0]
    if len(set(counts)) > 1:
        raise EvaluationError(
            f"Full models have {counts[0]} queries, those without the top samples {counts[1]}, and those without "
            f"random samples {counts[2]}; expected the same number."
        )

    def changes(of: Sequence[Floats]) -> tuple[Floats, Floats]:
        before, top, random = (values.mean(axis=0) for values in of)
        return top - before, random - before

    def figures(top: Floats, random: Floats) -> Floats:
        change, by_chance = float(top.mean()), float(random.mean())
        return np.array([change, by_chance, change - by_chance, change / by_chance if by_chance else np.nan])

    def resampled(generator: np.random.Generator) -> Floats:
        drawn = generator.integers(queries, size=queries)
        top, random = changes([kind[generator.integers(len(kind), size=len(kind))] for kind in kinds])
        return figures(top[drawn], random[drawn])

    each_top, each_random = changes(kinds)
    top, random, difference, ratio = bootstrap(figures(each_top, each_random), resampled, queries, seed, resamples)
    return Counterfactual(top, random, difference, ratio, each_top, each_random)
