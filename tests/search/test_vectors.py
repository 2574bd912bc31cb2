"""Vectors of the index: their inner products estimate scores."""

from __future__ import annotations

import numpy as np
from clusters import clustered, like
from stores import make_header

from dmin_trace.search.vectors import Reduction


def test_products_of_vectors_are_scores_but_for_the_fold() -> None:
    header = make_header(samples=200, timesteps=3, dimension=256)
    rows = clustered(header)
    queries = like(rows, 20)
    shared = np.stack([np.linalg.svd(rows.grad[:, t], full_matrices=False)[2][:4] for t in range(3)])
    truth = np.einsum("qtv,ntv->qn", queries, rows.grad)
    whole = Reduction(shared, 256)
    assert whole.vectors(rows.grad).shape == (200, whole.length)
    assert np.allclose(whole.vectors(queries) @ whole.vectors(rows.grad).T, truth, atol=1e-5)
    errors = {}
    for name, split in {"split": Reduction(shared, 32), "plain": Reduction(np.zeros_like(shared), 32)}.items():
        errors[name] = np.std(split.vectors(queries) @ split.vectors(rows.grad).T - truth)
    assert 0 < errors["split"] < 0.7 * errors["plain"]
