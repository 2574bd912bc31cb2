"""TRAK and its two kin for diffusion models: a ridge over all training samples between query and training features.

    score(q, i) = phi(q)' (Phi' Phi + lambda I)^-1 phi(i),    Phi (N, P): the training features

TRAK (Park et al., arXiv 2303.14186, section 3) has one more factor, Q: the derivative of the training sample's loss
with respect to the model's output function (section 3.4). Here Q is the identity: the output function *is* the loss, so
that the derivative is 1. D-TRAK (Zheng et al., arXiv 2311.00500) and Journey-TRAK's code do so too. There is no random
projection: features are whole gradients, or sketches, as they are given. Nor is there an ensemble of models: where
there are several, average the scores.

Compared with the published code (MadryLab/trak, trak/score_computers.py; sail-sg/D-TRAK, CIFAR2/grad_unconditional.py
and methods/04_if):

    kernel      the same: Phi' Phi + lambda I over all training samples, on features that are averages over timesteps of
                gradients that are *not* divided by their norms. TRAK's code divides the inverse by its mean size, which
                leaves the order of the scores as it is.
    lambda      TRAK: 0 by default. D-TRAK: absolute, 27 values from 0.01 to 5,000,000, the best one on the truth. Here
                relative, and given.
    timesteps   D-TRAK: 10 or 100, the first of each part of the schedule (0, 100, ...); our experiments take the middle
                (50, 150, ...).
    noise       D-TRAK: drawn for a batch by a seed of the timestep, so that samples at the same place of a batch share
                theirs. Our experiments have one noise for all samples and queries at a timestep.
    projection  both: random, to 2,048 (TRAK) or 4,096 to 32,768 (D-TRAK). Here none: what a projection is to keep.
"""

from __future__ import annotations

import numpy as np

from dmin_trace.errors import QueryError

from .products import Array, Scores, as_matrix, positive, products


def trak(train: Array, query: Array, ridge: float) -> Scores:
    """TRAK on one model, with features averaged over timesteps.

    Solved in the dual, phi(q)' Phi' (Phi Phi' + lambda I)^-1, where there are fewer samples than elements. D-TRAK's
    code averages over timesteps too, before it projects, and sweeps lambda over 27 absolute values
    (CIFAR10/methods/04_if); TRAK's and Journey-TRAK's code has no lambda by default, for P far below N.

    Args:
        train: (N, P), for each training sample the mean over timesteps of the gradient of its loss.
        query: (Q, P), the queries' at the same timesteps with the same noise.
        ridge: lambda, relative to the mean diagonal of the kernel Phi Phi', the mean squared norm of a feature.

    Returns:
        (Q, N).

    Raises:
        QueryError: other shapes, elements that are not finite, or training features that are all zero.
        SettingsError: a ridge that is not above 0.
    """
    samples, queries = as_matrix(train, "train", "N P"), as_matrix(query, "query", "Q P")
    positive(ridge, "ridge")
    count, length = samples.shape
    if count <= length:
        kernel, cross = products(samples, samples), products(queries, samples)
        _add_ridge(kernel, ridge, np.trace(kernel) / count)
        return np.linalg.solve(kernel, cross.T).T.astype(np.float64, copy=False)
    columns = samples.T.astype(np.float64)
    moments = products(columns, columns)
    _add_ridge(moments, ridge, np.trace(moments) / count)
    return products(np.linalg.solve(moments, queries.T.astype(np.float64)).T, samples)


def d_trak(train: Array, query: Array, ridge: float) -> Scores:
    """D-TRAK: `trak` with features of another function than the loss.

    The features are gradients of the mean square of the model's *output*, mean(model(x_t, t)^2), with no target
    ("mean-squared-l2-norm" in the code of arXiv 2311.00500, CIFAR10/grad_unconditional.py), at timesteps spread evenly
    over the schedule, averaged over them; for queries and training samples alike. The sign is taken to be that of the
    loss, as D-TRAK's evaluation does.

    Args:
        train: (N, P), features of the training samples.
        query: (Q, P), of the queries.
        ridge: as in `trak`.

    Returns:
        (Q, N).

    Raises:
        QueryError, SettingsError: as `trak`.
    """
    return trak(train, query, ridge)


def journey_trak(train: Array, query: Array, ridge: float) -> Scores:
    """Journey-TRAK (Georgiev et al., arXiv 2312.06205): a query is followed along its sampling, step by step.

    The feature of a step is the gradient of the loss at that step's timestep, of the noised image that the model
    *expected* there: x0_hat, from the x_t of the sampling, noised again to t with fresh noise. Training features are
    those of `trak`. The paper has a score for every step; D-TRAK's code (CIFAR10/methods/09_workshop: 50 steps of DDIM,
    x0_hat clipped to [-1, 1]) takes the mean over the journey, as is done here. How DMin's paper ran it is not
    published. Scores are linear in the query's feature, so the mean is the score of the mean feature; for a single step
    give (Q, 1, P).

    Args:
        train: (N, P), as for `trak`.
        query: (Q, S, P), a feature for each of S steps of the sampling.
        ridge: as in `trak`.

    Returns:
        (Q, N).

    Raises:
        QueryError, SettingsError: as `trak`.
    """
    journey = as_matrix(query, "query", "Q S P")
    return trak(train, journey.mean(axis=1, dtype=np.float64), ridge)


def _add_ridge(matrix: Scores, ridge: float, scale: float) -> None:
    """Adds ridge x scale to the diagonal, in place."""
    if scale == 0:
        raise QueryError("All training features are zero: there is nothing to attribute to.")
    matrix[np.diag_indices(len(matrix))] += ridge * scale
