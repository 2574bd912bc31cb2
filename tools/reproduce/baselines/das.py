"""DAS: the Diffusion Attribution Score, from gradients of the model's output.

Lin et al., arXiv 2410.18639, and its code, github.com/Jinxu-Lin/DAS (CIFAR2/03_grad.py, 04_eval.py, 07_score.py). A
sample counts by how far the *output* of the model for the query would move without it, by one Newton step, rather than
the loss:

    score(q, i) = ( phi(q)' (Phi' Phi + lambda I)^-1 phi(i) e(i) / (1 - h(i)) )^2
    h(i) = phi(i)' (Phi' Phi + lambda I)^-1 phi(i)

phi is the feature of `das_features`, e(i) the residual of the training sample of `das_errors`, h(i) its leverage.

    what                the paper                               its code, and what is here
    differentiated      the output                              the mean of all its numbers ("mean")
    gradients           by timestep                             each divided by its norm, then averaged over timesteps,
                                                                10 or 100 evenly spread (for LoRA, ArtBench2: averaged
                                                                undivided: `normalised=False`)
    residual            of the output, by timestep              the root of the loss at 1000 timesteps, divided by its
                                                                norm over these, then averaged over them
    leverage            divides                                 left out in the form that can be run ("DAS1squ"), as it
                                                                is here by default: it is near 0 for many samples
    square              yes                                     yes ("squ"), and without
    lambda              none                                    27 values from 0.01 to 5,000,000, the best on the truth
    projection          to 32,768                               to 4,096; none here

lambda is relative here. The code divides the inverse by its mean size, which leaves the order as it is. Its published
script multiplies the scores (queries, samples) by the residuals along the queries' axis, and where it has the leverage
("DAS0") it takes the diagonal of the matrix of queries and samples, and the inverse twice; the first cannot be run, the
second is not the paper's: here both are as the equation says.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError

from .products import Array, Scores, as_matrix
from .trak import trak

EPSILON = 1e-8


def das_features(gradients: Array, normalised: bool = True) -> NDArray[np.float64]:
    """Features (n, P): the gradients of the mean of the output, each divided by its norm, averaged over timesteps.

    Args:
        gradients: (n, T, P) of the mean of all numbers of model(x_t, t), with no target; the same timesteps and noise
            for training samples and queries.
        normalised: divide; the code for LoRA does not.

    Raises:
        QueryError: other shapes.
    """
    rows = as_matrix(gradients, "gradients", "n T P")
    total = np.zeros((rows.shape[0], rows.shape[2]))
    for t in range(rows.shape[1]):
        of_t = rows[:, t].astype(np.float64)
        total += of_t / (np.linalg.norm(of_t, axis=1, keepdims=True) + EPSILON) if normalised else of_t
    features: NDArray[np.float64] = total / rows.shape[1]
    return features


def das_errors(losses: Array) -> NDArray[np.float64]:
    """Residuals (N,): the root of each loss, divided by the norm over timesteps, averaged over timesteps.

    Their size is divided out: what is left is how evenly a sample's error is spread over timesteps, 1 / sqrt(T) at
    most.

    Args:
        losses: (N, T), of each training sample at timesteps spread evenly; means of squares.

    Raises:
        QueryError: another shape, or a loss below 0 or not finite.
    """
    values = as_matrix(losses, "losses", "N T").astype(np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise QueryError("Losses are below 0 or not finite.")
    roots = np.sqrt(values)
    errors: NDArray[np.float64] = (roots / (np.linalg.norm(roots, axis=1, keepdims=True) + EPSILON)).mean(axis=1)
    return errors


def das(
    train: Array,
    query: Array,
    errors: Array,
    ridge: float,
    *,
    leverage: bool = False,
    squared: bool = True,
) -> Scores:
    """The Diffusion Attribution Score.

    Args:
        train: (N, P), features of the training samples, of `das_features`.
        query: (Q, P), of the queries.
        errors: (N,), residuals of the training samples, of `das_errors`.
        ridge: lambda, relative to the mean squared norm of a training feature.
        leverage: divide by one less the leverage, as in the paper's equation.
        squared: as in the paper; without, the sign says which way the mean of the output would move.

    Returns:
        (Q, N).

    Raises:
        QueryError: other shapes, elements that are not finite, or training features that are all zero.
        SettingsError: a ridge that is not above 0.
    """
    scores = trak(train, query, ridge)
    residuals = as_matrix(errors, "errors", "N").astype(np.float64)
    if len(residuals) != scores.shape[1]:
        raise QueryError(f"There are {len(residuals)} errors for {scores.shape[1]} training samples.")
    scores = scores * residuals
    if leverage:
        scores = scores / (1 - trak(train, train, ridge).diagonal())
    return np.square(scores) if squared else scores
