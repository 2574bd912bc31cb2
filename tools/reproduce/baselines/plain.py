"""DMin without compression: inner products of gradients, timestep by timestep."""

from __future__ import annotations

import numpy as np

from dmin_trace.errors import QueryError

from .products import Array, Scores, as_matrix, products


def inner_products(train: Array, query: Array, normalised: bool) -> Scores:
    """The sum over timesteps of the inner products of a query's gradients with a training sample's.

        score(q, i) = sum_t <g(q, t), g(i, t)>,  or with g / |g| in the place of each g

    DMin (arXiv 2412.08637), equations 7 to 9, without the constant of the learning rate; normalised it is what the
    paper compresses. The published code takes the mean over timesteps where it
    keeps whole gradients, and the sum where it compresses: the same order.

    Args:
        train: (N, T, P), gradients of the training loss at the final parameters.
        query: (Q, T, P), the queries', at the same timesteps with the same noise.
        normalised: divide each by its L2 norm. A gradient that is zero stays so, and adds nothing.

    Returns:
        (Q, N).

    Raises:
        QueryError: other shapes, or elements that are not finite.
    """
    samples, queries = as_matrix(train, "train", "N T P"), as_matrix(query, "query", "Q T P")
    if samples.shape[1] != queries.shape[1]:
        raise QueryError(f"train has {samples.shape[1]} timesteps, query {queries.shape[1]}; they must be the same.")
    total = np.zeros((len(queries), len(samples)))
    for t in range(samples.shape[1]):
        scores = products(queries[:, t], samples[:, t])
        if normalised:
            scores /= _norms(queries[:, t])[:, None] * _norms(samples[:, t])
        total += scores
    return total


def _norms(rows: np.ndarray) -> np.ndarray:
    """L2 norms in float64; 1 for a row of zeros."""
    norms = np.array([np.linalg.norm(row.astype(np.float64)) for row in rows])
    return np.where(norms == 0, 1, norms)
