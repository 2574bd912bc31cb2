"""`search` by an index against the exact scan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from clusters import clustered, indexed_store, like, opened_index, recall
from stores import DTYPES, Rows, make_header, write_store

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.search.build import build_index
from dmin_trace.search.exact import exact_top_k
from dmin_trace.search.index import Reduction, search
from dmin_trace.settings import Dtype
from dmin_trace.store import RowNumbers, Store


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Rows]:
    """A store of 1,200 samples in clusters, with its index."""
    dtype: Dtype = request.param
    header = make_header(samples=1200, timesteps=3, dimension=512, dtype=dtype, rows=256)
    rows = clustered(header)
    trace = write_store(tmp_path_factory.mktemp(dtype) / "trace.zarr", header, rows)
    build_index(trace)
    return trace, rows


@pytest.fixture
def indexed(tmp_path: Path) -> Store:
    """A small store with an index, to be changed."""
    return indexed_store(tmp_path)[0]


@pytest.mark.parametrize(("k", "least"), [(10, 0.99), (100, 0.95), (1, 0.99), (37, 0.95)])
def test_search_keeps_the_recall_of_calibration(stored: tuple[Store, Rows], k: int, least: float) -> None:
    trace, rows = stored
    found = opened_index(trace)
    assert [depth.k for depth in found.facts.depths if depth.score == "dmin"] == [10, 100]
    assert found.facts.depths[0].recall >= 0.99 and found.facts.depths[1].recall >= 0.95
    queries = like(rows, 60)
    truth = exact_top_k(trace, queries, k)
    ranking = search(found, queries, k)
    assert ranking.rows.shape == (60, k) and ranking.per_timestep.shape == (60, k, 3)
    assert recall(ranking.rows, truth.rows) >= least
    # What both found has the same scores to the last bit, and is in the same order.
    for ours, true in zip(range(60), range(60), strict=True):
        here = np.isin(ranking.rows[ours], truth.rows[true])
        there = np.isin(truth.rows[true], ranking.rows[ours])
        assert np.array_equal(ranking.rows[ours][here], truth.rows[true][there])
        assert np.array_equal(ranking.scores[ours][here], truth.scores[true][there])
        assert np.array_equal(ranking.per_timestep[ours][here], truth.per_timestep[true][there])


def test_candidates_are_few(stored: tuple[Store, Rows]) -> None:
    """An index that proposed every sample would have any recall."""
    for depth in opened_index(stored[0]).facts.depths:
        assert depth.k <= depth.candidates <= 1200 / 8


def test_search_ranks_copies_as_the_scan_does(tmp_path: Path) -> None:
    """One image many times over: more often than it has links, and more often than hits are wanted."""
    header = make_header(samples=300, timesteps=2, dimension=128, rows=64)
    rows = clustered(header)
    same, pair = list(range(7, 300, 5)), [3, 250]
    rows.grad[same] = rows.grad[7]
    rows.grad[pair] = rows.grad[3]
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, recall=0.95)
    assert facts.vectors == 300 - len(same) + 1 - 1
    queries = np.concatenate([rows.grad[[7, 3]], like(rows, 10)])
    for k in (1, 10):
        truth, ranking = exact_top_k(trace, queries, k), search(opened_index(trace), queries, k)
        assert ranking.rows[0].tolist() == same[:k]
        assert ranking.rows[1, : min(k, 2)].tolist() == pair[:k]
        assert np.array_equal(ranking.rows[:2], truth.rows[:2])


def test_search_ranks_no_row_without_a_direction(tmp_path: Path) -> None:
    header = make_header(samples=200, timesteps=2, dimension=64, rows=64)
    rows = clustered(header, clusters=8)
    bad = {2: 0.0, 9: np.nan, 16: np.inf, 199: -1.0}
    for row, norm in bad.items():
        rows.norm[row, 1] = norm
    rows.grad[9] = np.nan
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, recall=0.9)
    assert facts.vectors == 196
    ranking = search(opened_index(trace), like(rows._replace(grad=rows.grad[20:60]), 20), 10)
    assert not np.isin(ranking.rows, list(bad)).any()
    assert np.isfinite(ranking.scores).all()


def test_search_refuses_queries_that_do_not_fit(indexed: Store) -> None:
    found = opened_index(indexed)
    queries = indexed.gradients(np.array([1, 2]))
    for wrong, k, line in [
        (queries, 0, "k is 0"),
        (queries, 161, "k is 160, more than the index was calibrated for"),
        (queries[:, :1], 1, "have shape"),
    ]:
        with pytest.raises(QueryError, match=line):
            search(found, wrong, k)
    queries[0, 0, 0] = np.nan
    with pytest.raises(QueryError, match="not finite"):
        search(found, queries, 1)


def test_search_refuses_more_hits_than_were_calibrated(stored: tuple[Store, Rows]) -> None:
    with pytest.raises(QueryError, match="k is 101, more than the index was calibrated for"):
        search(opened_index(stored[0]), like(stored[1], 2), 101)


def test_search_refuses_a_forged_candidate_without_a_gradient(indexed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a forged graph may propose; the numbers of a row come from the store."""
    found = opened_index(indexed)
    queries = indexed.gradients(np.array([1]))
    bad = int(search(found, queries, 1).rows[0, 0])
    real = Store.numbers

    def numbers(self: Store, rows: np.ndarray) -> RowNumbers:
        read = real(self, rows)
        return dataclasses.replace(read, norm=np.where((rows == bad)[:, None], np.nan, read.norm))

    monkeypatch.setattr(Store, "numbers", numbers)
    with pytest.raises(TraceError, match="has no gradient that can be ranked, so the index is damaged"):
        search(found, queries, 1)


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


def test_search_knows_the_background_by_some_samples(stored: tuple[Store, Rows]) -> None:
    trace, rows = stored
    queries = like(rows, 8)
    scanned = exact_top_k(trace, queries, 10, background=True)
    found = search(opened_index(trace), queries, 10, background=True)
    assert search(opened_index(trace), queries, 10).backgrounds == ()
    for whole, part, scores in zip(scanned.backgrounds, found.backgrounds, scanned.scores, strict=True):
        assert whole.samples == part.samples == 1200
        assert (whole.at_least, part.at_least) == (False, True)
        assert whole.scored == 1200 and 500 < part.scored < 600
        assert abs(part.scale / whole.scale - 1) < 0.3 and abs(part.median - whole.median) < whole.scale / 4
        assert part.standing_out is not None and whole.standing_out is not None
        assert part.standing_out == sum(part.stands_out(float(score)) or False for score in scores)
    assert [one.standing_out for one in found.backgrounds] != [0] * 8


def test_a_damaged_sample_of_the_background_is_an_error(indexed: Store) -> None:
    found = opened_index(indexed)
    wrong = dataclasses.replace(found, checksums=found.checksums + np.uint32(1))
    with pytest.raises(TraceError, match="does not have the numbers of its checksum"):
        search(wrong, indexed.gradients([3]), 1, background=True)
