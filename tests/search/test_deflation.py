"""Deflation against dense linear algebra in float64, whatever dtype, codec and rows of the store are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from clusters import clustered, like
from stores import DTYPES, make_header, write_store

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.search import deflation
from dmin_trace.search.deflation import choose_directions, principal_directions
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import Store, open_store


def stored_rows(trace: Store) -> np.ndarray:
    """(T, n, v) what can be ranked, in float64."""
    return trace.gradients(np.flatnonzero(trace.valid)).transpose(1, 0, 2).astype(np.float64)


def slow_deflated(trace: Store, queries: np.ndarray, count: int) -> np.ndarray:
    """Deflation as its formula says, from the singular vectors of all rows of a timestep."""
    deflated = np.empty(queries.shape)
    for t, rows in enumerate(stored_rows(trace)):
        _, singular, vectors = np.linalg.svd(rows, full_matrices=False)
        d, v = singular[:count] ** 2, vectors[:count]
        of_t = queries[:, t].astype(np.float64)
        deflated[:, t] = of_t - (of_t @ v.T * (d / (d + d[-1]))) @ v
    return deflated


def slow_scores(trace: Store, queries: np.ndarray) -> np.ndarray:
    """(Q, n) inner products, summed over timesteps."""
    return np.asarray(sum(queries[:, t] @ rows.T for t, rows in enumerate(stored_rows(trace))))


@pytest.fixture(scope="module", params=[*[(dtype, "none") for dtype in DTYPES], ("int8", "blosc")])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    """A store of 300 samples, five of which cannot be ranked, and 12 queries."""
    dtype: Dtype
    codec: Codec
    dtype, codec = request.param
    header = make_header(samples=300, timesteps=3, dimension=128, dtype=dtype, rows=64, codec=codec)
    rows = clustered(header, clusters=12)
    queries = like(rows, 12)
    for row, norm in {2: 0.0, 9: np.nan, 16: np.inf, 130: 0.0, 299: -1.0}.items():
        rows.norm[row, 1] = norm
    rows.grad[[9, 16]] = np.nan
    rows.grad[[2, 130]] = 0
    return write_store(tmp_path_factory.mktemp("kernel") / "trace.zarr", header, rows), queries


def test_deflate_is_dense_algebra(stored: tuple[Store, np.ndarray]) -> None:
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


def test_principal_directions_by_passes_come_near_to_dense_algebra(
    stored: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, queries = stored
    monkeypatch.setattr(deflation, "MAX_DENSE_SAMPLES", 0)
    monkeypatch.setattr(deflation, "BLOCK_NUMBERS", 50 * 3 * 128)  # several blocks
    found = principal_directions(trace, 20)
    exact = np.linalg.svd(stored_rows(trace), compute_uv=False)[:, :20] ** 2
    assert np.allclose(found.eigenvalues[:, :10], exact[:, :10], rtol=1e-3)
    # Beyond the clusters all directions are alike, and which of them are found matters little.
    assert np.allclose(found.eigenvalues, exact, rtol=0.15) and (found.eigenvalues < exact * (1 + 1e-6)).all()
    assert np.allclose(found.vectors @ found.vectors.transpose(0, 2, 1), np.eye(20), atol=1e-5)
    ours, true = (slow_scores(trace, q) for q in (found.deflate(queries), slow_deflated(trace, queries, 20)))
    assert np.corrcoef(ours.ravel(), true.ravel())[0, 1] > 0.99


def test_choose_directions_takes_those_that_all_samples_share(tmp_path: Path) -> None:
    """Three directions shared by all, and of each sample its own: exactly those three are taken out."""
    header = make_header(samples=60, timesteps=2, dimension=256, dtype="float32", rows=16)
    rows = clustered(header)
    generator = np.random.default_rng(3)
    basis = np.linalg.qr(generator.standard_normal((256, 63)))[0].T
    mixed = generator.standard_normal((60, 3)) @ basis[:3] * 2 + 0.9 * basis[3:]
    rows.grad[:] = (mixed / np.linalg.norm(mixed, axis=1, keepdims=True))[:, None]
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    assert principal_directions(trace).vectors.shape == (2, 3, 256)
    assert choose_directions(np.array([[5.0, 3.1, 2.9], [0.5, 0.2, 0.0]])) == 2
    assert choose_directions(np.array([[5.0, 4.0, 3.1], [9.0, 0.2, 0.0]])) == 3
    assert choose_directions(np.array([[0.5, 0.2]])) == 1


def test_principal_directions_are_no_more_than_a_timestep_has(tmp_path: Path) -> None:
    header = make_header(samples=6, timesteps=2, dimension=16, dtype="float32", rows=6)
    rows = clustered(header, clusters=6)
    queries = like(rows, 3)
    rows.grad[:, 1] = rows.grad[0, 1]  # one direction alone
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    found = principal_directions(trace, 40)
    assert found.vectors.shape == (2, 6, 16)
    assert np.count_nonzero(found.eigenvalues[1]) == 1 and not found.vectors[1, 1:].any()
    # Along a timestep's only direction lambda is its eigenvalue: half is taken out.
    deflated = found.deflate(queries)
    assert np.allclose(deflated[:, 1] @ rows.grad[0, 1], queries[:, 1] @ rows.grad[0, 1] / 2, atol=1e-5)


def test_principal_directions_do_not_depend_on_threads(
    stored: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, queries = stored
    for dense in (0, 1024):
        monkeypatch.setattr(deflation, "MAX_DENSE_SAMPLES", dense)
        found = {}
        for cores in (1, 5):
            monkeypatch.setattr("dmin_trace.search.deflation.core_count", lambda cores=cores: cores)
            found[cores] = principal_directions(trace, 10).deflate(queries)
        assert np.array_equal(found[1], found[5])


def test_principal_directions_of_damaged_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=10, dtype="float32")
    rows = clustered(header, clusters=2)
    rows.grad[5, 1, 3] = np.nan
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    zarr.open_array(trace.path / "grad", mode="r+")[5, 1, 3] = np.nan
    for dense in (0, 1024):
        monkeypatch.setattr(deflation, "MAX_DENSE_SAMPLES", dense)
        with pytest.raises(TraceError, match="damaged"):
            principal_directions(open_store(trace.path))


def test_principal_directions_refuses_a_count_out_of_range(stored: tuple[Store, np.ndarray]) -> None:
    for count in (0, -1, 5000):
        with pytest.raises(SettingsError, match="expected 1 to 4096"):
            principal_directions(stored[0], count)
