"""Exact scores: against plain numpy in float64, whatever the blocks, the threads and the ties."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import pytest
from stores import DTYPES, dequantised, make_header, make_rows, with_checksum, write, write_store
from threadpoolctl import threadpool_info, threadpool_limits

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.search import exact
from dmin_trace.search.exact import exact_top_k, scores_by_chunk
from dmin_trace.settings import Dtype
from dmin_trace.store import Store, chunk_file, create, open_store, quantise


def make_queries(trace: Store, count: int, seed: int = 5) -> np.ndarray:
    """Q queries whose compressed gradients have norm one or so, near to stored rows so that scores spread."""
    generator = np.random.default_rng(seed)
    shape = (count, len(trace.header.timesteps), trace.header.dimension)
    queries: np.ndarray = generator.standard_normal(shape).astype(np.float32) / trace.header.dimension**0.5
    return queries


def all_scores(trace: Store, queries: np.ndarray) -> np.ndarray:
    """(Q, N) by `scores_by_chunk`; NaN for rows that are not done."""
    scores = np.full((len(queries), trace.header.samples), np.nan, np.float32)
    for rows, of_chunk in scores_by_chunk(trace, queries):
        scores[:, rows.start : rows.stop] = of_chunk
    return scores


def by_hand(path: Path, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all rows, ties by row, and every timestep's inner products (Q, N, T)."""
    products = np.einsum("ntv,qtv->qnt", dequantised(path), queries.astype(np.float64))
    totals = products.sum(axis=2)
    best = np.array([sorted(range(len(of)), key=lambda row: (-of[row], row))[:k] for of in totals])
    return best, products


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished store of 203 samples in 7 chunks, the last one short."""
    dtype: Dtype = request.param
    header = make_header(samples=203, timesteps=4, dimension=128, dtype=dtype, rows=32)
    return write_store(tmp_path_factory.mktemp(dtype) / "trace.zarr", header, make_rows(header))


@pytest.mark.parametrize("count, k", [(1, 1), (1, 203), (5, 10), (70, 3)])
@pytest.mark.parametrize("part, tile", [(exact.PART_NUMBERS, exact.TILE_NUMBERS), (5 * 4 * 128, 250)])
def test_scores_are_those_of_plain_numpy(
    stored: Store, count: int, k: int, part: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "PART_NUMBERS", part)
    monkeypatch.setattr(exact, "TILE_NUMBERS", tile)
    queries = make_queries(stored, count)
    ranking = exact_top_k(stored, queries, k)
    best, every = by_hand(stored.path, queries, k)
    dtypes = [str(values.dtype) for values in (ranking.rows, ranking.scores, ranking.per_timestep)]
    assert dtypes == ["int64", "float32", "float32"]
    assert np.array_equal(ranking.rows, best)
    by_timestep = np.take_along_axis(every, best[:, :, None], 1)
    assert np.allclose(ranking.per_timestep, by_timestep, rtol=1e-5, atol=1e-6)
    assert np.allclose(ranking.scores, by_timestep.sum(axis=2), rtol=1e-5, atol=1e-6)
    assert np.allclose(ranking.per_timestep.sum(axis=2), ranking.scores, rtol=1e-5, atol=1e-6)
    assert (np.diff(ranking.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_store_gives_the_same_answer(tmp_path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=50, timesteps=3, dimension=256, dtype=dtype, rows=16)
    plain = write_store(tmp_path / "plain", header, make_rows(header))
    packed = write_store(tmp_path / "packed", dataclasses.replace(header, codec="blosc"), make_rows(header))
    queries = make_queries(plain, 9)
    unpacked: list[int] = []
    real = numcodecs.blosc.decompress
    monkeypatch.setattr(
        numcodecs.blosc, "decompress", lambda frame, out: (unpacked.append(len(frame)), real(frame, out))[1]
    )
    one, other = exact_top_k(plain, queries, 7), exact_top_k(packed, queries, 7, threads=1)
    for name in ("rows", "scores", "per_timestep"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    # Each of 4 chunks once for the scan and once for the candidates, however many there are in it.
    assert len(unpacked) == 8


def test_the_threads_of_the_users_process_are_as_before(stored: Store) -> None:
    def limits() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    with threadpool_limits(2, "blas"):
        before = limits()
        during: list[list[int]] = []
        exact_top_k(stored, make_queries(stored, 2), 3, progress=lambda _: during.append(limits()))
        assert limits() == before and before
        assert all(set(found) == {1} for found in during)
        damaged = make_queries(stored, 1)
        with pytest.raises(ZeroDivisionError):
            exact_top_k(stored, damaged, 3, progress=lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
        assert limits() == before


def test_queries_are_not_copied(tmp_path: Path) -> None:
    """64 queries of v = 2^16 are 168 MB: a second copy of them would be most of the memory."""
    header = make_header(samples=64, timesteps=2, dimension=2**14, rows=16)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    queries = make_queries(trace, 128)
    assert trace.valid.all()
    tracemalloc.start()
    exact_top_k(trace, queries, 5, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert queries.nbytes == 2**24
    assert peak < 2**23


def test_the_number_of_threads_changes_nothing(stored: Store) -> None:
    queries = make_queries(stored, 6)
    one, four = exact_top_k(stored, queries, 20, threads=1), exact_top_k(stored, queries, 20, threads=4)
    for name in ("rows", "scores", "per_timestep"):
        assert np.array_equal(getattr(one, name), getattr(four, name))


def test_a_row_finds_itself_first(stored: Store) -> None:
    some = np.array([0, 17, 202])
    ranking = exact_top_k(stored, stored.gradients(some), 2)
    assert ranking.rows[:, 0].tolist() == some.tolist()
    assert np.allclose(ranking.scores[:, 0], (stored.gradients(some) ** 2).sum(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_scores_the_lowest_row_comes_first(tmp_path: Path, dtype: Dtype) -> None:
    """The same image many times in a dataset, across chunks, and more often than hits are wanted."""
    header = make_header(samples=90, timesteps=3, dimension=256, dtype=dtype, rows=16)
    rows = make_rows(header)
    same = [3, 4, 15, 16, 31, 33, 64, 80, 88, 89]
    rows.grad[same] = rows.grad[3]
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    queries = np.concatenate([rows.grad[3:4], make_queries(trace, 2), -rows.grad[3:4]])
    for k in (1, 5, 10, 90):
        ranking = exact_top_k(trace, queries, k)
        assert ranking.rows[0, : len(same)].tolist() == same[:k]
        assert np.array_equal(ranking.rows, by_hand(trace.path, queries, k)[0])
    assert ranking.rows[3, -len(same) :].tolist() == same


def test_the_rounding_of_float32_decides_nothing(tmp_path: Path) -> None:
    """Rows that are all but the same: their scores differ by less than a sum of 1024 products in float32 is off."""
    header = make_header(samples=48, timesteps=2, dimension=1024, dtype="float32", rows=16)
    rows = make_rows(header)
    generator = np.random.default_rng(8)
    rows.grad[:] = rows.grad[0] * (1 + 1e-7 * generator.standard_normal(rows.grad.shape)).astype(np.float32)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    queries = np.concatenate([rows.grad[:1], make_queries(trace, 3)])
    for k in (1, 6):
        assert np.array_equal(exact_top_k(trace, queries, k).rows, by_hand(trace.path, queries, k)[0])


def test_when_all_scores_are_equal_rows_are_in_order(tmp_path: Path) -> None:
    header = make_header(samples=300, rows=64)
    rows = make_rows(header)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    ranking = exact_top_k(trace, np.zeros((2, 3, 32), np.float32), 7)
    assert ranking.rows.tolist() == [list(range(7))] * 2
    assert not ranking.scores.any() and not ranking.per_timestep.any()


def test_rows_without_a_direction_are_never_ranked(tmp_path: Path) -> None:
    header = make_header(samples=40, rows=8)
    rows = make_rows(header)
    bad = {2: 0.0, 9: np.nan, 16: np.inf, 39: -1.0}
    for row, norm in bad.items():
        rows.norm[row, row % 3] = norm
    # A whole chunk of them too.
    rows.norm[24:32] = 0
    for row in bad:
        rows.grad[row] *= 100
    rows.grad[9, 0, 0] = np.nan
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    left = sorted(set(range(40)) - set(bad) - set(range(24, 32)))
    queries = np.concatenate([make_queries(trace, 3), trace.gradients(np.array([2, 16]))])
    ranking = exact_top_k(trace, queries, len(left))
    assert [sorted(row) for row in ranking.rows.tolist()] == [left] * 5
    # In their place a bad row's huge scores would come first, and every score below would be lost.
    assert np.isfinite(ranking.scores).all()
    assert exact_top_k(trace, queries, 29).rows.shape == (5, 28)


def test_of_an_unfinished_trace_what_is_done_is_ranked(tmp_path: Path) -> None:
    header = make_header(samples=40, rows=8)
    rows = make_rows(header)
    writer = create(tmp_path / "trace.zarr", header)
    for chunk in (0, 2, 3, 4):
        write(writer, rows, chunk)
    # Written, not committed.
    chunk_file(writer.path, "done", 3).unlink()
    trace = open_store(writer.path, unfinished=True)
    here = [*range(8), *range(16, 24), *range(32, 40)]
    ranking = exact_top_k(trace, rows.grad[[20, 10]], 24)
    assert [sorted(row) for row in ranking.rows.tolist()] == [here, here]
    assert ranking.rows[0, 0] == 20
    assert exact_top_k(trace, rows.grad[:1], 25).rows.shape == (1, 24)


@pytest.mark.parametrize("k", [0, -3])
def test_a_k_below_one_is_refused(stored: Store, k: int) -> None:
    with pytest.raises(QueryError, match=f"k is {k}; expected 1 or more"):
        exact_top_k(stored, make_queries(stored, 1), k)


def test_a_k_above_the_number_of_samples_gives_all_of_them(stored: Store) -> None:
    queries = make_queries(stored, 2)
    every, more = (exact_top_k(stored, queries, k) for k in (203, 250))
    assert np.array_equal(every.rows, more.rows) and every.rows.shape == (2, 203)


def test_queries_that_cannot_be_compared_are_refused(stored: Store) -> None:
    queries = make_queries(stored, 2)
    for wrong in (queries[0], queries[:, :3], queries[:, :, :64], queries[:0], queries.transpose(0, 2, 1)):
        with pytest.raises(QueryError, match=r"The queries have shape .*; expected \(queries, 4, 128\)"):
            exact_top_k(stored, wrong, 1)
    for value in (np.nan, np.inf):
        queries[1, 0, 0] = value
        with pytest.raises(QueryError, match="not finite"):
            exact_top_k(stored, queries, 1)
    with pytest.raises(QueryError, match="threads is 0"):
        exact_top_k(stored, make_queries(stored, 1), 1, threads=0)


def test_damage_is_an_error_and_no_ranking(tmp_path: Path) -> None:
    header = make_header(samples=40, rows=8)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    queries = make_queries(trace, 2)
    numbers = chunk_file(trace.path, "numbers", 3)
    whole = numbers.read_bytes()
    scale = 8 * (1 + 2 * 3)
    for value in (np.nan, np.inf):
        numbers.write_bytes(with_checksum(whole[:scale] + np.float64(value).tobytes() + whole[scale + 8 : -4]))
        with pytest.raises(TraceError, match="chunk 3 holds numbers that are not finite"):
            exact_top_k(open_store(trace.path), queries, 1)
    numbers.write_bytes(whole)
    for dtype in ("float16", "float32"):
        header = make_header(samples=40, rows=8, dtype=dtype)  # type: ignore[arg-type]
        floats = write_store(tmp_path / dtype, header, make_rows(header))
        grad = chunk_file(floats.path, "grad", 3)
        for value in (np.nan, np.inf, -np.inf):
            changed = np.array(value, dtype).tobytes() + grad.read_bytes()[np.dtype(dtype).itemsize : -4]
            grad.write_bytes(with_checksum(changed))
            with pytest.raises(TraceError, match="chunk 3 holds numbers that are not finite"):
                exact_top_k(floats, queries, 1)
    grad = chunk_file(trace.path, "grad", 3)
    grad.write_bytes(grad.read_bytes()[:-1])
    with pytest.raises(TraceError, match="chunk 3 of grad has"):
        exact_top_k(open_store(trace.path), queries, 1)


def test_progress_counts_every_sample_in_the_callers_thread(stored: Store) -> None:
    counted: list[int] = []
    exact_top_k(stored, make_queries(stored, 2), 3, threads=3, progress=counted.append)
    assert counted == [32, 64, 96, 128, 160, 192, 203]


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Traced memory leaves the maps out; what is converted of them would be in it."""
    peaks = []
    for samples in (512, 2048):
        header = make_header(samples=samples, timesteps=2, dimension=4096, dtype="int8", rows=512)
        generator = np.random.default_rng(0)
        writer = create(tmp_path / f"{samples}", header)
        few = make_rows(make_header(samples=512, timesteps=2, dimension=4096, rows=512))
        for chunk in writer.pending():
            grad = np.roll(few.grad, int(generator.integers(4096)), axis=2)
            writer.write(chunk, *quantise(grad, "int8"), few.norm, few.loss, few.sample, few.columns)
        writer.finish()
        trace = open_store(tmp_path / f"{samples}")
        queries = make_queries(trace, 8)
        assert trace.valid.all()
        # One thread: whether two are at their largest at once is chance.
        tracemalloc.start()
        exact_top_k(trace, queries, 10, threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The larger store is 16 MiB as int8 and 64 MiB as float32.
    assert peaks[1] < 8 * 2**20
    assert peaks[1] < peaks[0] + 2**20


def test_exact_top_k_gives_the_smallest_scores_too(stored: Store) -> None:
    queries = make_queries(stored, 4)
    ranking = exact_top_k(stored, queries, 12, largest=False)
    opposite = exact_top_k(stored, -queries, 12)
    assert np.array_equal(ranking.rows, opposite.rows)
    assert np.array_equal(ranking.scores, -opposite.scores)
    assert np.array_equal(ranking.per_timestep, -opposite.per_timestep)
    assert (np.diff(ranking.scores, axis=1) >= 0).all() and (ranking.scores[:, 0] < 0).all()


@pytest.mark.parametrize("count", [1, 200])
def test_exact_top_k_keeps_any_number_of_near_equal_rows(tmp_path: Path, count: int) -> None:
    """More rows at the border than fit into any margin, which float32 cannot put in order; the best are in no order."""
    header = make_header(samples=2000, timesteps=2, dimension=1024, dtype="float32", rows=256)
    rows = make_rows(make_header(samples=2000, timesteps=2, dimension=2))
    generator = np.random.default_rng(8)
    one = generator.standard_normal((1, 2, 1024)) / 32
    grad = (one * (1 + 1e-7 * generator.standard_normal((2000, 2, 1024)))).astype(np.float32)
    trace = write_store(tmp_path / "trace.zarr", header, rows._replace(grad=grad))
    queries = one.astype(np.float32)
    assert np.array_equal(exact_top_k(trace, queries, count).rows, by_hand(trace.path, queries, count)[0])
    first = np.argsort(-all_scores(trace, queries)[0], kind="stable")[: count + 64]
    assert not np.isin(by_hand(trace.path, queries, count)[0][0], first).all()


@pytest.mark.parametrize("part, tile", [(exact.PART_NUMBERS, exact.TILE_NUMBERS), (5 * 4 * 128, 250)])
def test_scores_by_chunk_are_those_of_plain_numpy(
    stored: Store, part: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "PART_NUMBERS", part)
    monkeypatch.setattr(exact, "TILE_NUMBERS", tile)
    queries = make_queries(stored, 5)
    every = np.einsum("ntv,qtv->qnt", dequantised(stored.path), queries.astype(np.float64))
    assert np.allclose(all_scores(stored, queries), every.sum(axis=2), rtol=1e-4, atol=1e-5)
    by_timestep = np.concatenate([scores for _, scores in scores_by_chunk(stored, queries, per_timestep=True)], axis=1)
    assert np.allclose(by_timestep, every, rtol=1e-4, atol=1e-5)


def test_rows_without_gradients_have_no_score(tmp_path: Path) -> None:
    header = make_header(samples=40, rows=8)
    rows = make_rows(header)
    rows.norm[13, 2] = np.nan
    writer = create(tmp_path / "trace.zarr", header)
    for chunk in (0, 1, 4):
        write(writer, rows, chunk)
    trace = open_store(writer.path, unfinished=True)
    missing = np.isin(np.arange(40), [13, *range(16, 32)])
    assert (np.isnan(all_scores(trace, rows.grad[:3])) == missing).all()
    for place, scores in scores_by_chunk(trace, rows.grad[:3], per_timestep=True):
        assert (np.isnan(scores) == missing[place][:, None]).all()


def test_scores_by_chunk_runs_few_chunks_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=160, rows=8)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    started: list[int] = []
    real = exact.chunk_products

    def counted(*given: Any) -> Callable[..., np.ndarray]:
        products = real(*given)
        return lambda chunk, scale: (started.append(chunk), products(chunk, scale))[1]

    monkeypatch.setattr(exact, "chunk_products", counted)
    chunks = scores_by_chunk(trace, trace.gradients(np.array([3])), threads=2)
    next(chunks)
    chunks.close()
    assert len(started) <= 4


def test_half_precision_is_converted_as_numpy_does() -> None:
    """Every float16 there is."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    memory = np.empty(2**16, np.float32)
    for numbers in (finite, finite[::3], finite[: 2 * 31000].reshape(2, -1)[:, ::2]):
        converted, expected = exact.as_float32(numbers, memory), numbers.astype(np.float32)
        assert np.array_equal(converted.view(np.int32), expected.view(np.int32))
    for value in every[~np.isfinite(every)]:
        assert not np.isfinite(exact.as_float32(np.array([[1, value, 2]], np.float16), memory)[0, 1])
