"""Kernel scores against dense linear algebra in float64, whatever the store's dtype, codec and rows are."""

from __future__ import annotations

import numpy as np
import pytest
from test_index import clustered, like
from test_store import DTYPES, make_header, write_store

from dmin_trace import kernel, score
from dmin_trace.kernel import gram, principal_directions, ridge
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import Trace


def stored_rows(trace: Trace) -> np.ndarray:
    """(n, T v) what can be ranked, in float64."""
    slots = np.flatnonzero(trace.rankable)
    return trace.rows(slots).reshape(len(slots), -1).astype(np.float64)


def slow_deflated(trace: Trace, queries: np.ndarray, count: int) -> np.ndarray:
    """Deflation as its formula says, from the singular vectors of all rows."""
    _, singular, vectors = np.linalg.svd(stored_rows(trace), full_matrices=False)
    d, v = singular[:count] ** 2, vectors[:count]
    flat = queries.reshape(len(queries), -1).astype(np.float64)
    return (flat - (flat @ v.T * (d / (d + d[-1]))) @ v).reshape(queries.shape)


def slow_ridge_scores(trace: Trace, queries: np.ndarray, strength: float) -> np.ndarray:
    """(Q, n) lambda (K + lambda I)^-1 G q."""
    rows = stored_rows(trace)
    k = rows @ rows.T
    damping = strength * np.mean(np.diag(k))
    products = rows @ queries.reshape(len(queries), -1).T.astype(np.float64)
    return (damping * np.linalg.inv(k + damping * np.eye(len(k))) @ products).T


@pytest.fixture(scope="module", params=[*[(dtype, "none") for dtype in DTYPES], ("int8", "blosc")])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, np.ndarray]:
    """A store of 300 samples, five of which cannot be ranked, and 12 queries."""
    dtype: Dtype
    codec: Codec
    dtype, codec = request.param
    header = make_header(samples=300, timesteps=3, dimension=128, dtype=dtype, rows=64, codec=codec)
    rows = clustered(header, clusters=12)
    queries = like(rows, 12)
    for slot, norm in {2: 0.0, 9: np.nan, 16: np.inf, 130: 0.0, 299: -1.0}.items():
        rows.norm[slot, 1] = norm
    rows.grad[[9, 16]] = np.nan
    rows.grad[[2, 130]] = 0
    return write_store(tmp_path_factory.mktemp("kernel") / "trace.zarr", header, rows), queries


def test_deflated_queries_are_those_of_dense_algebra(stored: tuple[Trace, np.ndarray]) -> None:
    trace, queries = stored
    found = principal_directions(trace, 40)
    assert found.vectors.shape == (3, 40, 128)
    flat = found.vectors.transpose(1, 0, 2).reshape(40, -1)
    assert np.allclose(flat @ flat.T, np.eye(40), atol=1e-4)
    for count in (1, 12, 40):
        ours = found.largest(count).deflate(queries)
        assert ours.dtype == np.float32
        assert np.allclose(ours, slow_deflated(trace, queries, count), atol=2e-5)
        assert not np.allclose(ours, queries, atol=1e-2)


def test_passes_over_the_store_come_near_to_dense_algebra(
    stored: tuple[Trace, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, queries = stored
    monkeypatch.setattr(kernel, "DENSE", 0)
    monkeypatch.setattr(kernel, "BLOCK", 50 * 3 * 128)  # several blocks
    found = principal_directions(trace, 20)
    exact = np.linalg.svd(stored_rows(trace), compute_uv=False)[:20] ** 2
    assert np.allclose(found.eigenvalues[:10], exact[:10], rtol=1e-4)
    # Beyond the clusters all directions are alike, and which of them are found matters little.
    assert np.allclose(found.eigenvalues, exact, rtol=0.15) and (found.eigenvalues < exact * (1 + 1e-6)).all()
    flat = found.vectors.transpose(1, 0, 2).reshape(20, -1)
    assert np.allclose(flat @ flat.T, np.eye(20), atol=1e-5)
    rows = stored_rows(trace)
    ours = found.deflate(queries).reshape(12, -1) @ rows.T
    true = slow_deflated(trace, queries, 20).reshape(12, -1) @ rows.T
    assert np.corrcoef(ours.ravel(), true.ravel())[0, 1] > 0.99


def test_ridge_scores_are_those_of_dense_algebra(stored: tuple[Trace, np.ndarray]) -> None:
    trace, queries = stored
    usable = np.flatnonzero(trace.rankable)
    for strength in (0.01, 0.3, 10.0):
        ranking = score.exact(trace, ridge(trace, queries, strength), len(usable))
        truth = slow_ridge_scores(trace, queries, strength)
        ours = np.take_along_axis(ranking.scores, np.argsort(ranking.slots, axis=1), 1)
        assert np.array_equal(np.sort(ranking.slots, axis=1)[0], usable)
        assert np.allclose(ours, truth, atol=2e-5)
        assert np.array_equal(ridge(trace, queries, strength, kernel=gram(trace)), ridge(trace, queries, strength))
