"""LiSSA: the inverse Hessian times the query's gradient, by a series."""

from __future__ import annotations

import numpy as np

from dmin_trace.errors import QueryError, SettingsError

from .products import Array, Scores, as_matrix, positive, products


def lissa(
    train: Array,
    query: Array,
    damping: float = 0.1,
    *,
    depth: int,
    scale: float | None = None,
    batch: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Scores:
    """Influence by the LiSSA iteration, towards g(q)' (H + lambda I)^-1 g(i).

        r_0 = g(q),    r_j = g(q) + r_{j-1} - (H_j + lambda I) r_{j-1} / s,    score(q, i) = r_depth' g(i) / s

    Agarwal et al. 2016 (arXiv 1602.03943), as Koh and Liang 2017 (arXiv 1703.04730, section 3) use it. H is the
    empirical Fisher matrix, the mean of g(i) g(i)' over all training samples; H_j is H, or the mean over a batch drawn
    anew at every step. It converges where the eigenvalues of H_j + lambda I lie below 2 s.

    Two published forms differ. Koh and Liang's code leaves lambda out of the division by s, and so ends at
    (H + s lambda I)^-1. DataInf's code subtracts lambda r where it should add it (src/influence.py), and so tends to
    (H - lambda I)^-1 where it converges; it takes s = 1 and a depth of 10. Here both are as the equation says.

    r never leaves the span of g(q) and the training gradients, so the iteration runs on their coefficients: it is the
    same one, step for step, at N numbers a query in the place of P.

    Args:
        train: (N, P), per-sample gradients of the loss (over several timesteps: averaged).
        query: (Q, P), the queries'.
        damping: lambda, relative to the mean diagonal of H, the mean squared element of a gradient (DataInf's code:
            0.1). The closed form is N times `trak` at a ridge of damping N / P.
        depth: number of steps.
        scale: s. Default: the least that surely keeps every step from growing: the largest eigenvalue of H, or, with
            batches, the largest squared norm of a gradient; plus lambda.
        batch: samples drawn for a step, at most N. Default: H as it is.
        repeats: with batches, independent runs to average.
        seed: of the batches.

    Returns:
        (Q, N).

    Raises:
        QueryError: other shapes, elements that are not finite, training gradients that are all zero, or an iteration
            that diverged.
        SettingsError: a damping or a scale that is not above 0, a depth, a batch or repeats below 1, or a
            batch above N.
    """
    samples, queries = as_matrix(train, "train", "N P"), as_matrix(query, "query", "Q P")
    positive(damping, "damping")
    for value, name in ((depth, "depth"), (batch, "batch"), (repeats, "repeats")):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}; 1 or more is expected.")
    count, length = samples.shape
    if batch is not None and batch > count:
        raise SettingsError(f"A batch of {batch} is more than the {count} training samples.")
    kernel, cross = products(samples, samples), products(queries, samples)
    strength = damping * float(np.trace(kernel)) / (count * length)
    if strength == 0:
        raise QueryError("All training gradients are zero: there is nothing to attribute to.")
    if scale is None:
        largest = np.linalg.eigvalsh(kernel)[-1] / count if batch is None else kernel.diagonal().max()
        scale = float(largest) + strength
    positive(scale, "scale")

    generator = np.random.default_rng(seed)
    total = np.zeros_like(cross)
    for _ in range(1 if batch is None else repeats):
        # r = own g(q) + sum_i others(i) g(i)
        own, others = 1.0, np.zeros_like(cross)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(depth):
                drawn = slice(None) if batch is None else generator.choice(count, batch, replace=False)
                along = own * cross[:, drawn] + others @ kernel[:, drawn]
                others *= 1 - strength / scale
                others[:, drawn] -= along / (along.shape[1] * scale)
                own = 1 + own * (1 - strength / scale)
            total += (own * cross + others @ kernel) / scale
    if not np.isfinite(total).all():
        raise QueryError(f"The iteration diverged at a scale of {scale:g}; the default, or a larger one, is expected.")
    return total / (1 if batch is None else repeats)
