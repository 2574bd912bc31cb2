"""The face for programs: Trace, its queries and scores, TopK, and scores of one's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import points
import pyarrow.parquet
import pytest
import torch
import zarr
from stores import make_header, make_rows, write_store

import dmin_trace
from dmin_trace.cli.app import main
from dmin_trace.errors import DminTraceError, QueryError, TraceError
from dmin_trace.query import AnsweredBy
from dmin_trace.query.answer import answer_queries
from dmin_trace.search import build_index
from dmin_trace.settings import Dtype

SAMPLES = 12
NAMES = [f"point {k}" for k in range(SAMPLES)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return points.denoiser()


@pytest.fixture(scope="module")
def path(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of twelve points, recorded."""
    out = tmp_path_factory.mktemp("trace") / "trace.zarr"
    columns = {"name": NAMES, "score": list(range(SAMPLES))}
    return points.record(model, out, dtype="int8", columns=columns)


@pytest.fixture
def trace(path: Path) -> dmin_trace.Trace:
    return dmin_trace.open_trace(path)


def shuffled(path: Path, dtype: Dtype = "int8", done: int | None = None, **changes: Any) -> dmin_trace.Trace:
    """A made-up trace whose rows are not in the order of their samples, and with two samples without a gradient."""
    header = make_header(samples=30, dimension=64, dtype=dtype, rows=4, **changes)
    rows = make_rows(header)
    rows = rows._replace(sample=rows.sample - 100)
    rows.norm[3, 1], rows.norm[17] = np.nan, 0
    return dmin_trace.Trace(write_store(path, header, rows, done))


def product(path: Path, queries: dmin_trace.Queries) -> np.ndarray:
    """(Q, N, T) by data set index in float64, from rows that plain Zarr reads: without our reader."""
    group = zarr.open_group(path, mode="r")
    rows = np.asarray(group["grad"][:]).astype(np.float64)  # type: ignore[index]
    samples, norms, scales = numbers(group)
    products = np.einsum("qtv,ntv->qnt", queries.gradients.astype(np.float64), rows * scales[:, :, None])
    products[:, ~(np.isfinite(norms) & (norms > 0)).all(axis=1)] = np.nan
    ordered = np.empty_like(products)
    ordered[:, samples] = products
    return ordered


def numbers(group: zarr.Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The samples (N,), norms (N, T) and scales (N, T) of a store, by plain Zarr."""
    read = np.asarray(group["numbers"][:])  # type: ignore[index]
    norms, _, scales = np.split(read[:, 1:], 3, axis=1)
    return read[:, 0].astype(np.int64), norms, scales


def test_a_trace_shows_itself(trace: dmin_trace.Trace, tmp_path: Path) -> None:
    assert repr(trace) == "Trace(12 samples, T=3, v=64, int8, complete)"
    assert len(trace) == SAMPLES and trace.complete and len(trace.timesteps) == 3
    assert repr(shuffled(tmp_path / "trace.zarr", done=2)) == "Trace(30 samples, T=3, v=64, int8, unfinished: 8 done)"


def test_a_closed_trace_cannot_be_used(path: Path) -> None:
    with dmin_trace.open_trace(path) as trace:
        assert len(trace) == SAMPLES
    assert repr(trace) == "Trace(closed)"
    with pytest.raises(TraceError, match="The trace is closed. Open it again"):
        trace.gradients([3])


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("per_timestep", [False, True])
def test_scores_are_a_plain_product(tmp_path: Path, dtype: Dtype, per_timestep: bool) -> None:
    trace = shuffled(tmp_path / "trace.zarr", dtype)
    queries = trace.query_samples([6, 0])
    expected = product(trace.path, queries)
    if not per_timestep:
        expected = expected.sum(axis=2)
    scores = trace.scores(queries, "dmin", per_timestep=per_timestep)
    assert scores.dtype == np.float32 and scores.shape == expected.shape
    assert np.isnan(expected).any()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_scores_can_be_written_to_a_memory_map(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    queries = trace.query_samples([6, 0, 9])
    for per_timestep in (False, True):
        shape = (3, 30, 3) if per_timestep else (3, 30)
        out = np.memmap(tmp_path / "scores", np.float32, "w+", shape=shape)
        assert trace.scores(queries, per_timestep=per_timestep, out=out) is out
        assert np.array_equal(out, trace.scores(queries, per_timestep=per_timestep), equal_nan=True)
    with pytest.raises(QueryError, match=r"out is float64 of shape \(3, 30\); expected float32"):
        trace.scores(queries, out=np.empty((3, 30)))  # type: ignore[arg-type]


def test_an_unfinished_trace_has_nan_for_what_is_not_done(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr", done=3)
    whole = shuffled(tmp_path / "whole.zarr")
    done = trace.store.sample[trace.store.rows_done]
    queries = trace.query_samples([int(done[0])])
    scores = trace.scores(queries, "dmin")
    missing = np.setdiff1d(np.arange(30), done)
    assert np.isnan(scores[:, missing]).all()
    np.testing.assert_array_equal(scores[:, done], whole.scores(queries, "dmin")[:, done])
    assert np.isnan(trace.norms[missing]).all() and np.array_equal(trace.norms[done], whole.norms[done], equal_nan=True)
    assert [trace.columns["caption"][k] for k in done] == [whole.columns["caption"][k] for k in done]
    assert {trace.columns["caption"][k] for k in missing} == {""}


def test_gradients_norms_and_losses_are_by_data_set_index(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    group = zarr.open_group(trace.path, mode="r")
    samples, norms, scales = numbers(group)
    grad = np.asarray(group["grad"][:])  # type: ignore[index]
    usable = (np.isfinite(norms) & (norms > 0)).all(axis=1)
    for row in (0, 3, 17, 29):
        sample = int(samples[row])
        found = trace.gradients([sample])
        if usable[row]:
            np.testing.assert_allclose(found[0], grad[row] * scales[row][:, None], rtol=1e-6)
        else:
            assert np.isnan(found).all()
        np.testing.assert_allclose(trace.norms[sample], norms[row], rtol=1e-6)
        assert trace.losses.shape == (30, 3)
    assert trace.gradients(np.array([4, 4, 1])).shape == (3, 3, 64)
    with pytest.raises(TraceError, match="holds no sample 30"):
        trace.gradients([30])


def test_self_influence_is_the_score_of_a_sample_with_itself(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    usable = np.flatnonzero(np.isfinite(trace.norms).all(axis=1) & (trace.norms > 0).all(axis=1)).tolist()
    assert len(usable) == 28
    for score in ("dmin", "deflated"):
        found = trace.self_influence(score)  # type: ignore[arg-type]
        expected = trace.scores(trace.query_samples(usable), score)[np.arange(28), usable]  # type: ignore[arg-type]
        np.testing.assert_allclose(found[usable], expected, atol=1e-5)
        assert np.isnan(np.delete(found, usable)).all()
    assert np.array_equal(trace.self_influence(), trace.self_influence("deflated"), equal_nan=True)


def test_top_k_has_the_largest_scores_or_the_smallest(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    queries = trace.query_samples([6, 0])
    for score in ("dmin", "deflated"):
        scores = trace.scores(queries, score)  # type: ignore[arg-type]
        for largest in (True, False):
            top = trace.top_k(queries, 4, score, largest=largest)  # type: ignore[arg-type]
            expected = np.argsort(-scores if largest else scores, axis=1)[:, :4]  # NaN is last
            assert np.array_equal(top.samples, expected) and top.samples.dtype == np.int64
            np.testing.assert_allclose(top.scores, np.take_along_axis(scores, expected, 1), atol=1e-5)
            np.testing.assert_allclose(top.per_timestep.sum(axis=2), top.scores, atol=1e-6)
            assert (top.scores.max() < 0) == (not largest)
            assert top.score == score
    assert trace.top_k(queries, 29).samples.shape == (2, 28)


def test_top_k_as_hits_and_as_a_table(trace: dmin_trace.Trace, tmp_path: Path) -> None:
    top = trace.top_k(trace.query_samples([3, 7]), 2, "dmin")
    assert [[hit.sample for hit in hits] for hits in top.hits] == top.samples.tolist()
    hit = top.hits[1][0]
    assert isinstance(hit, dmin_trace.Hit) and (hit.rank, hit.sample) == (1, 7)
    assert hit.columns == {"name": "point 7", "score": 7}
    assert f"Hit(rank=1, sample=7, score={hit.score:.4f}, name='point 7', score=7)" == repr(hit)
    lines = repr(top).splitlines()
    assert lines[0] == "TopK(2 queries, k=2, dmin, scanned all 12 samples)"
    assert lines[1] == f"  'sample 3': {top.verdicts[0]}" and lines[5].strip() == repr(hit)
    table = top.to_pandas()
    assert table.columns[:5].tolist() == ["query", "prompt", "without", "rank", "sample"]
    assert table.columns[5:9].tolist() == ["score", "z", "stands_out", "scored_by"]
    assert table.columns[-2:].tolist() == ["name", "meta_score"]
    assert top.verdicts[0].endswith("not known: it takes 30 samples or more to tell influence from noise.")
    assert np.isnan(top.z).all() and top.z.shape == (2, 2) and hit.stands_out is None
    assert table["query"].tolist() == ["sample 3", "sample 3", "sample 7", "sample 7"]
    assert table["sample"].tolist() == top.samples.ravel().tolist()
    assert table["meta_score"].tolist() == table["sample"].tolist()
    shares = table[[name for name in table.columns if re.match(r"t\d", name)]].to_numpy()
    assert np.array_equal(shares, top.per_timestep.reshape(4, 3))
    top.to_parquet(tmp_path / "top.parquet")
    written = pyarrow.parquet.read_table(tmp_path / "top.parquet")
    assert written.column_names == table.columns.tolist()
    assert written.to_pydict() == {name: list(column.values) for name, column in top.table.items()}
    assert written.schema.metadata == {b"dmin_trace.format": b"dmin_trace.hits", b"dmin_trace.version": b"1"}
    kinds = {name: str(written.schema.field(name).type) for name in ("prompt", "sample", "z", "stands_out", "name")}
    assert kinds == {"prompt": "string", "sample": "int64", "z": "double", "stands_out": "bool", "name": "string"}
    with pytest.raises(QueryError, match="cannot be written"):
        top.to_parquet(tmp_path / "no" / "top.parquet")
    odd = replace(top, names=("\udc80", "b"), answered_by=AnsweredBy(None, "\x1b[2J"))
    with pytest.raises(QueryError, match="cannot be written"):
        odd.to_parquet(tmp_path / "odd.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["top.parquet"]
    assert repr(odd).replace("\n", "").isprintable()


def test_hits_say_whether_they_stand_out(tmp_path: Path) -> None:
    header = make_header(samples=300, dimension=64, rows=32)
    rows = make_rows(header)
    rows = rows._replace(sample=rows.sample - 100)
    rows.grad[[40, 50, 60]] = rows.grad[30]
    trace = dmin_trace.Trace(write_store(tmp_path / "trace.zarr", header, rows))
    asked = [int(trace.store.sample[30]), int(trace.store.sample[7])]
    top = trace.top_k(trace.query_samples(asked), 6, "dmin")
    scores = trace.scores(trace.query_samples(asked), "dmin")
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75], axis=1)
    np.testing.assert_allclose(top.z, (top.scores - middle[:, None]) / ((high - low) / 1.3489795)[:, None], rtol=1e-3)
    assert [[hit.stands_out for hit in hits] for hits in top.hits] == [[True] * 4 + [False] * 2, [True] + [False] * 5]
    assert top.verdicts == ["4 of 300 samples stand out.", "1 of 300 samples stands out."]
    assert f", z={top.hits[0][0].z:.1f}, " in repr(top.hits[0][0])
    assert top.to_pandas()["stands_out"].tolist() == [hit.stands_out for hits in top.hits for hit in hits]
    lowest = trace.top_k(trace.query_samples(asked), 3, "dmin", largest=False)
    assert lowest.verdicts[0] == "No sample of 300 stands out against the query." and (lowest.z < 0).all()


def test_columns_are_by_data_set_index(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    samples, *_ = numbers(zarr.open_group(trace.path, mode="r"))
    labels = trace.columns["label"]
    assert [labels[sample] for sample in samples] == [row * 7 - 1 for row in range(30)]
    assert list(trace.columns) == ["caption", "label", "weight"]
    frame = trace.columns.to_pandas()
    assert frame.index.name == "sample" and frame["label"].tolist() == labels
    with pytest.raises(KeyError):
        trace.columns["no"]


def test_a_missing_extra_is_named(trace: dmin_trace.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    top = trace.top_k(trace.query_samples([3]), 2)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(QueryError, match=r"pip install dmin_trace\[parquet\]"):
        top.to_parquet("top.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    for table in (top.to_pandas, trace.columns.to_pandas):
        with pytest.raises(QueryError, match=r"pip install dmin_trace\[pandas\]"):
            table()


def test_saved_queries_give_the_same_answer(trace: dmin_trace.Trace, tmp_path: Path) -> None:
    queries = trace.query_samples([3, 7])
    queries.save(tmp_path / "queries.npz")
    loaded = dmin_trace.Queries.load(tmp_path / "queries.npz")
    assert np.array_equal(trace.scores(loaded), trace.scores(queries))
    assert trace.top_k(loaded, 5).hits == trace.top_k(queries, 5).hits


def test_queries_of_another_trace_are_refused(trace: dmin_trace.Trace, tmp_path: Path) -> None:
    other = shuffled(tmp_path / "trace.zarr").query_samples([3])
    for use in (trace.scores, trace.top_k):
        with pytest.raises(QueryError, match="Their gradients cannot be compared"):
            use(other)


def test_query_samples_refuses_a_sample_without_a_gradient(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    for row in (3, 17):  # not finite, zero
        sample = int(trace.store.sample[row])
        with pytest.raises(QueryError, match=f"Sample {sample} has no gradient"):
            trace.query_samples([6, sample])


def test_query_samples_refuses_a_sample_that_is_not_stored(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr", done=2)
    stored = trace.store.sample[trace.store.rows_done].tolist()
    missing = min(set(range(30)) - set(stored))
    for sample in (30, -1, missing):
        with pytest.raises(TraceError, match=f"holds no sample {sample}"):
            trace.query_samples([stored[0], sample])


def test_query_samples_is_the_commands_option(trace: dmin_trace.Trace, tmp_path: Path) -> None:
    """`dmin-trace query TRACE --sample` gives the same."""
    options = ["--sample", "3", "--sample", "7", "-k", "4", "--json", str(tmp_path / "hits.json")]
    assert main(["query", str(trace.path), *options]) == 0
    answer = json.loads((tmp_path / "hits.json").read_text())["queries"]
    top = trace.top_k(trace.query_samples([3, 7]), 4)
    assert [query["name"] for query in answer] == list(top.names)
    assert [[hit["sample"] for hit in query["hits"]] for query in answer] == top.samples.tolist()
    scores = [[hit["score"] for hit in query["hits"]] for query in answer]
    np.testing.assert_allclose(scores, top.scores, rtol=1e-6)


def test_query_loss_is_the_loop_of_the_recording(trace: dmin_trace.Trace, model: torch.nn.Module) -> None:
    items = [points.POINTS[[3]], points.POINTS[[7]]]
    queries = trace.query_loss(model, items, points.loss_of)
    with dmin_trace.recording(model, samples=2, like=trace.path) as record:
        for i in record.samples:
            for k in record.timesteps:
                with record.step(i, k):
                    points.loss_of(model, items[i]).backward()
    assert np.array_equal(queries.gradients, record.queries.gradients)
    assert queries.trace_id == record.queries.trace_id
    assert trace.top_k(queries, 1, "dmin").samples.tolist() == [[3], [7]]
    with pytest.raises(QueryError, match="No item was given"):
        trace.query_loss(model, [], points.loss_of)


class Centred:
    """A score of one's own: queries without the mean of the samples."""

    name = "centred"

    def __init__(self) -> None:
        self.fits = 0

    def fit(self, trace: dmin_trace.Trace) -> None:
        self.fits += 1
        self.mean = np.nanmean(trace.gradients(range(len(trace))), axis=0)

    def transform(self, queries: np.ndarray) -> np.ndarray:
        return queries - self.mean


def test_a_score_of_ones_own(tmp_path: Path) -> None:
    trace = shuffled(tmp_path / "trace.zarr")
    build_index(trace.store)
    trace = dmin_trace.open_trace(trace.path)
    queries, score = trace.query_samples([6, 0]), Centred()
    centred = dmin_trace.Queries(score_of(score, trace, queries), queries.names, queries.prompts, queries.trace_id)
    expected = product(trace.path, centred).sum(axis=2)
    np.testing.assert_allclose(trace.scores(queries, score), expected, atol=1e-5)
    top = trace.top_k(queries, 3, score)
    assert np.array_equal(top.samples, np.argsort(-expected, axis=1)[:, :3])
    assert top.score == "centred" and top.answered_by.recall is None
    assert score.fits == 2  # once here, once by the trace
    score.name = "dmin"
    with pytest.raises(QueryError, match="which is built in"):
        dmin_trace.open_trace(trace.path).scores(queries, score)
    with pytest.raises(QueryError, match="score is 'none'"):
        trace.scores(queries, "none")  # type: ignore[arg-type]


def score_of(score: Centred, trace: dmin_trace.Trace, queries: dmin_trace.Queries) -> np.ndarray:
    score.fit(trace)
    return score.transform(queries.gradients)


def test_a_trace_with_other_samples_has_no_scores_by_index(tmp_path: Path) -> None:
    header = make_header(samples=30, dimension=64)
    rows = make_rows(header)  # samples from 100
    trace = dmin_trace.Trace(write_store(tmp_path / "other.zarr", header, rows))
    with pytest.raises(TraceError, match="samples that are not in 0 to 29"):
        trace.scores(trace.query_samples([105]))
    rows.sample[:] = 7
    trace = dmin_trace.Trace(write_store(tmp_path / "twice.zarr", header, rows))
    with pytest.raises(TraceError, match="samples twice"):
        trace.self_influence()
    assert answer_queries(trace.store, trace.store.gradients(np.array([0])), k=2).samples.tolist() == [[7, 7]]


def test_attribute_checks_before_it_captures(path: Path) -> None:
    for wrong in ({"k": 0}, {"score": "none"}):
        with pytest.raises(DminTraceError, match="k is 0|score is 'none'"):
            dmin_trace.attribute(path, ["missing.png"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="query_loss"):
        dmin_trace.attribute(path, ["missing.png"])
