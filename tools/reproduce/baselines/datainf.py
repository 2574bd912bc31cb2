"""DataInf: the mean of inverses in the place of the inverse of a mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmin_trace.errors import SettingsError

from .products import Array, Scores, as_matrix, positive, products


def datainf(train: Array, query: Array, damping: float = 0.1, blocks: Sequence[int] | None = None) -> Scores:
    """DataInf with its inverse Hessian (Kwon et al., arXiv 2310.00902, equation 5), layer by layer.

        score(q, i) = sum over blocks of  g(q)' [ (1/n) sum_j (g(j) g(j)' + lambda I)^-1 ] g(i)
                    = sum over blocks of  (1/lambda) [ <q, i> - (1/n) sum_j <q, j> <j, i> / (lambda + <j, j>) ]

    with the inner products of the block. Each block has its own lambda. The sign is turned: the paper's influence is
    negative where the sample lowers the query's loss.

    The published notebook for diffusion lays the gradients of a weight at its six timesteps end to end, so that a block
    is a layer at all timesteps: then give columns in that order. Averages over timesteps are the other choice.

    Args:
        train: (N, P), per-sample gradients of the loss.
        query: (Q, P), the queries'.
        damping: lambda, relative to the mean squared element of a training gradient in the block (the paper: 0.1).
        blocks: numbers of elements of the layers, in the order of the columns; they add up to P. Default: one block.

    Returns:
        (Q, N).

    Raises:
        QueryError: other shapes, or elements that are not finite.
        SettingsError: a damping that is not above 0, or blocks that do not fit.
    """
    samples, queries = as_matrix(train, "train", "N P"), as_matrix(query, "query", "Q P")
    positive(damping, "damping")
    count, length = samples.shape
    sizes = [length] if blocks is None else list(blocks)
    if min(sizes, default=0) < 1 or sum(sizes) != length:
        raise SettingsError(
            f"The blocks have {sum(sizes)} elements, and the least {min(sizes, default=0)}; 1 or more "
            f"each, and {length} together, are expected."
        )
    total = np.zeros((len(queries), count))
    start = 0
    for size in sizes:
        block = samples[:, start : start + size]
        kernel, cross = products(block, block), products(queries[:, start : start + size], block)
        start += size
        strength = damping * float(np.trace(kernel)) / (count * size)
        # Where no sample has a gradient, none has influence.
        if strength > 0:
            shrunk = cross / (strength + kernel.diagonal())
            total += (cross - shrunk @ kernel / count) / strength
    return total


def datainf_identity(train: Array, query: Array) -> Scores:
    """DataInf with the identity for a Hessian, a row of its own in DMin's tables: inner products of gradients.

    Args:
        train: (N, P), per-sample gradients of the loss.
        query: (Q, P), the queries'.

    Returns:
        (Q, N).

    Raises:
        QueryError: other shapes, or elements that are not finite.
    """
    return products(as_matrix(query, "query", "Q P"), as_matrix(train, "train", "N P"))
