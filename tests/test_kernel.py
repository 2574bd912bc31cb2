"""Kernel scores against dense linear algebra in float64, whatever the store's dtype, codec and rows are."""

from __future__ import annotations

import numpy as np
import pytest
from test_index import clustered, like
from test_store import DTYPES, make_header, write_store

from dmin_trace import kernel, score
from dmin_trace.kernel import choose_directions, grams, principal_directions, ridge
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import Trace


def stored_rows(trace: Trace) -> np.ndarray:
    """(T, n, v) what can be ranked, in float64."""
    return trace.rows(np.flatnonzero(trace.rankable)).transpose(1, 0, 2).astype(np.float64)


def slow_deflated(trace: Trace, queries: np.ndarray, count: int) -> np.ndarray:
    """Deflation as its formula says, from the singular vectors of all rows of a timestep."""
    freed = np.empty(queries.shape)
    for t, rows in enumerate(stored_rows(trace)):
        _, singular, vectors = np.linalg.svd(rows, full_matrices=False)
        d, v = singular[:count] ** 2, vectors[:count]
        of_t = queries[:, t].astype(np.float64)
        freed[:, t] = of_t - (of_t @ v.T * (d / (d + d[-1]))) @ v
    return freed


def slow_ridge_scores(trace: Trace, queries: np.ndarray, strength: float) -> np.ndarray:
    """(Q, n) the sum over timesteps of lambda (K + lambda I)^-1 G q."""
    total = 0.0
    for t, rows in enumerate(stored_rows(trace)):
        damped = rows @ rows.T + strength * np.eye(len(rows))
        total = total + (strength * np.linalg.inv(damped) @ (rows @ queries[:, t].T.astype(np.float64))).T
    return np.asarray(total)


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
    assert found.eigenvalues.shape == (3, 40)
    assert np.allclose(found.vectors @ found.vectors.transpose(0, 2, 1), np.eye(40), atol=1e-4)
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
    exact = np.linalg.svd(stored_rows(trace), compute_uv=False)[:, :20] ** 2
    assert np.allclose(found.eigenvalues[:, :10], exact[:, :10], rtol=1e-3)
    # Beyond the clusters all directions are alike, and which of them are found matters little.
    assert np.allclose(found.eigenvalues, exact, rtol=0.15) and (found.eigenvalues < exact * (1 + 1e-6)).all()
    assert np.allclose(found.vectors @ found.vectors.transpose(0, 2, 1), np.eye(20), atol=1e-5)
    rows = stored_rows(trace).transpose(0, 2, 1)
    ours = (found.deflate(queries).transpose(1, 0, 2) @ rows).sum(axis=0)
    true = (slow_deflated(trace, queries, 20).transpose(1, 0, 2) @ rows).sum(axis=0)
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
        assert np.array_equal(ridge(trace, queries, strength, kernels=grams(trace)), ridge(trace, queries, strength))


def test_no_more_directions_are_taken_than_a_timestep_has(tmp_path_factory: pytest.TempPathFactory) -> None:
    header = make_header(samples=6, timesteps=2, dimension=16, dtype="float32", rows=6)
    rows = clustered(header, clusters=6)
    rows.grad[:, 1] = rows.grad[0, 1]  # one direction alone
    trace = write_store(tmp_path_factory.mktemp("few") / "trace.zarr", header, rows)
    found = principal_directions(trace, 40)
    assert found.vectors.shape == (2, 6, 16)
    assert np.count_nonzero(found.eigenvalues[1]) == 1 and not found.vectors[1, 1:].any()
    queries = like(rows, 3)
    freed = found.deflate(queries)
    # Along a timestep's only direction lambda is its eigenvalue: half is taken out.
    assert np.allclose(freed[:, 1] @ rows.grad[0, 1], queries[:, 1] @ rows.grad[0, 1] / 2, atol=1e-5)


def test_shared_directions_are_those_that_have_more_than_a_sample_alone() -> None:
    assert choose_directions(np.array([[5.0, 0.71, 0.69], [0.5, 0.2, 0.0]])) == 2
    assert choose_directions(np.array([[5.0, 0.9, 0.8], [9.0, 0.2, 0.0]])) == 3
    assert choose_directions(np.array([[0.5, 0.2]])) == 1
