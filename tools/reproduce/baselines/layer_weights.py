"""A weight for each layer, learned from scores alone.

Li et al., "Learning to Weight Parameters for Training Data Attribution", arXiv 2506.05647 (ICLR 2026). A score that is
a sum over layers, as inner products are, is given a weight for each:

    score(q, i) = sum over layers l of  w(l) c(q, i, l)

The weights are the ones that lift the best samples furthest above all others:

    L(w) = - mean over q of  ( mean of the k largest of score(q, .) ) / | score(q, .) |  +  penalty |w|^2

with the k largest found anew at every step, and w a softmax, so that they are not negative and add up to 1. No truth is
needed: the method's own ranking is the guide.

No code was published when this was written, and the equation is from a summary of the paper, not from the paper's own
text; k, the penalty, the optimiser and its steps are not given there (it calls k uncritical) and are ours. Where a
score is not a sum over layers (a ridge over all layers, DAS's square), the paper weights the query's side alone, before
the kernel: give c(q, i, l), the part that layer l of the query has in the score, and square after.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, SettingsError

from .products import Array, Scores, as_matrix, positive


def layer_weights(
    contributions: Array, k: int = 10, *, penalty: float = 0.0, steps: int = 300, rate: float = 0.05
) -> NDArray[np.float64]:
    """The weights (L,), which add up to 1.

    Args:
        contributions: (Q, N, L), the part of each layer in the score of each sample for each query. Their scales are
            not evened out first.
        k: how many best samples of a query are lifted.
        penalty: of the sum of the weights' squares; draws them together.
        steps, rate: of Adam, from equal weights.

    Raises:
        QueryError: another shape, or numbers that are not finite.
        SettingsError: a k that is not from 1 to N, or steps or a rate that are not above 0.
    """
    parts = torch.from_numpy(as_matrix(contributions, "contributions", "Q N L").astype(np.float64))
    if not parts.isfinite().all():
        raise QueryError("Contributions are not finite.")
    if not 1 <= k <= parts.shape[1]:
        raise SettingsError(f"k is {k}; from 1 to {parts.shape[1]}, the number of samples, is expected.")
    positive(steps, "steps")
    positive(rate, "rate")
    logits = torch.zeros(parts.shape[2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(parts, torch.softmax(logits, 0), k, penalty)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    weights: NDArray[np.float64] = torch.softmax(logits, 0).detach().numpy()
    return weights


def weighted(contributions: Array, weights: NDArray[np.float64]) -> Scores:
    """The scores (Q, N) of contributions (Q, N, L) with weights (L,).

    Raises:
        QueryError: other shapes.
    """
    parts = as_matrix(contributions, "contributions", "Q N L")
    if weights.shape != parts.shape[2:]:
        raise QueryError(f"There are {weights.shape} weights for {parts.shape[2]} layers.")
    scores: Scores = parts.astype(np.float64) @ weights
    return scores


def _loss(parts: torch.Tensor, weights: torch.Tensor, k: int, penalty: float) -> torch.Tensor:
    scores = parts @ weights
    lifted = scores.topk(k, dim=1).values.mean(1) / scores.norm(dim=1).clamp_min(1e-300)
    loss: torch.Tensor = -lifted.mean() + penalty * weights.square().sum()
    return loss
