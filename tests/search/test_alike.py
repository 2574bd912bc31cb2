"""How alike samples are, against whole matrices: self-influence, nearest samples, near-copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import make_header, make_rows, write_store

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.search import alike, near_copies
from dmin_trace.search.alike import clusters, find_alike, own_parts
from dmin_trace.search.deflation import choose_directions, principal_directions
from dmin_trace.store import Store


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """120 samples with a common part, three of them alike, two without a gradient; rows in another order."""
    header = make_header(samples=120, timesteps=3, dimension=512, rows=16)
    rows = make_rows(header)
    rows.grad[:] += rows.grad[0] * np.linspace(0.5, 1.5, 120)[:, None, None]
    noise = np.random.default_rng(1).standard_normal((2, 3, 512)) * 0.2 / 512**0.5
    rows.grad[[40, 77]] = rows.grad[12] + noise
    np.divide(rows.grad, np.linalg.norm(rows.grad, axis=2, keepdims=True), out=rows.grad)
    rows.norm[5, 1], rows.norm[99] = np.nan, 0
    path = tmp_path_factory.mktemp("alike") / "trace.zarr"
    return write_store(path, header, rows._replace(sample=rows.sample - 100))


def by_hand(store: Store, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) deflated scores of samples for each other, and (n, n) their similarities, in float64."""
    gradients = store.gradients(np.flatnonzero(store.valid)).astype(np.float64)
    found = principal_directions(store, count)
    found = found.largest(choose_directions(found.eigenvalues))
    scores = np.zeros((len(gradients),) * 2)
    for t, (vectors, eigenvalues) in enumerate(zip(found.vectors.astype(np.float64), found.eigenvalues, strict=True)):
        taken = eigenvalues / (eigenvalues + eigenvalues[-1])
        scores += gradients[:, t] @ (np.eye(512) - vectors.T * taken @ vectors) @ gradients[:, t].T
    norms = np.sqrt(np.diag(scores))
    return scores, scores / np.outer(norms, norms)


def test_self_influence_and_similarity_are_deflated_scores(stored: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, similar = by_hand(stored, alike.DIRECTIONS)
    parts = own_parts(stored)
    assert parts.vectors.shape == (118, 3 * 512)
    np.testing.assert_allclose(parts.self_influence, np.diag(scores) / 3, atol=1e-5)
    np.testing.assert_allclose(parts.vectors @ parts.vectors.T, similar, atol=1e-4)
    # Folded, it errs by about one over the root of the length.
    monkeypatch.setattr(alike, "LENGTH", 96 * 3)
    folded = own_parts(stored)
    assert folded.vectors.shape == (118, 3 * 128)
    np.testing.assert_allclose(folded.self_influence, parts.self_influence, atol=1e-5)
    error = (folded.vectors @ folded.vectors.T - similar)[np.triu_indices(118, 1)]
    assert 0.03 < error.std() < 0.08


def test_blocks_do_not_matter(stored: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = own_parts(stored)
    whole = find_alike(parts.vectors, 5)
    monkeypatch.setattr(alike, "BLOCK_NUMBERS", 7 * 118)
    seen: list[tuple[str, int, int]] = []
    part = find_alike(parts.vectors, 5, progress=lambda *of: seen.append(of))
    assert np.array_equal(part.nearest, whole.nearest) and np.array_equal(part.original, whole.original)
    assert seen[-1] == ("comparing samples with each other", 118, 118) and len(seen) == 17


def test_nearest_and_near_copies(stored: Store) -> None:
    parts = own_parts(stored)
    _, similar = by_hand(stored, alike.DIRECTIONS)
    found = find_alike(parts.vectors, 4)
    others = similar - 2 * np.eye(118)
    assert np.array_equal(found.nearest[:, 0], others.argmax(1))
    np.testing.assert_allclose(found.similarity, -np.sort(-others, axis=1)[:, :4], atol=1e-3)
    samples = stored.sample[[12, 40, 77]].tolist()
    assert [cluster.tolist() for cluster in near_copies(stored)] == [samples]


def test_near_copies_are_no_chains() -> None:
    """Each is alike its neighbour, and not the one after it."""
    angles = np.radians([0, 30, 60, 90, 100, 200])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = find_alike(vectors, 1, near_copy=0.8)
    assert found.original.tolist() == [0, 0, 2, 2, 4, 5]
    assert [of.tolist() for of in clusters(found.original, np.array([9, 8, 7, 6, 5, 4]))] == [[9, 8], [7, 6]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_samples(tmp_path: Path, count: int) -> None:
    header = make_header(samples=count, dimension=32)
    rows = make_rows(header)
    rows.grad[:] = rows.grad[0] / np.linalg.norm(rows.grad[0], axis=1, keepdims=True)
    store = write_store(tmp_path / "t.zarr", header, rows._replace(sample=rows.sample - 100))
    parts = own_parts(store)
    found = find_alike(parts.vectors, 10)
    assert found.nearest.shape == (count, count - 1)
    np.testing.assert_allclose(parts.self_influence, 0.5, atol=0.01)
    assert [len(cluster) for cluster in near_copies(store)] == ([count] if count > 1 else [])


def test_what_cannot_be_compared_is_refused(stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=3, dimension=32)
    rows = make_rows(header)
    rows.norm[:] = 0
    with pytest.raises(TraceError, match="holds no sample that has gradients to rank"):
        own_parts(write_store(tmp_path / "t.zarr", header, rows))
    monkeypatch.setattr(alike, "MAX_NUMBERS", 256 * 100)
    with pytest.raises(SettingsError, match="The trace has 118 samples; up to 100 can be compared with each other"):
        own_parts(stored)
