"""Scores in files for programs: the numbers of Trace.scores, the columns of the hits, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from stores import make_header, make_rows, write_store

import dmin_trace
from dmin_trace.cli.app import main
from dmin_trace.errors import QueryError
from dmin_trace.query import scores_file


def made(path: Path, done: int | None = None, samples: int = 60) -> dmin_trace.Trace:
    """A trace with two samples without a gradient, three alike, and hostile captions."""
    header = make_header(samples=samples, dimension=64, rows=8)
    rows = make_rows(header)
    rows = rows._replace(sample=rows.sample - 100)
    rows.norm[3, 1], rows.norm[17] = np.nan, 0
    rows.grad[[20, 30]] = rows.grad[10]
    return dmin_trace.Trace(write_store(path, header, rows, done))


def asked(trace: dmin_trace.Trace) -> dmin_trace.Queries:
    return trace.query_samples(trace.store.sample[[10, 6, 5]].tolist())


@pytest.mark.parametrize("per_timestep", [False, True])
@pytest.mark.parametrize("done", [None, 3])
@pytest.mark.parametrize("numbers", [1, 2**26])
def test_a_numpy_file_has_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_timestep: bool, done: int | None, numbers: int
) -> None:
    monkeypatch.setattr(scores_file, "MAX_NUMBERS", numbers)
    trace = made(tmp_path / "trace.zarr", done)
    queries, seen = asked(trace), []
    trace.write_scores(queries, tmp_path / "s.npy", per_timestep=per_timestep, progress=seen.append)
    found = np.load(tmp_path / "s.npy", allow_pickle=False)
    expected = trace.scores(queries, per_timestep=per_timestep)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isnan(found).any() and seen == ([1, 2, 3] if numbers == 1 else [3])


@pytest.mark.parametrize("per_timestep", [False, True])
@pytest.mark.parametrize("numbers", [1, 2**26])
def test_a_parquet_file_begins_with_the_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_timestep: bool, numbers: int
) -> None:
    monkeypatch.setattr(scores_file, "MAX_NUMBERS", numbers)
    trace = made(tmp_path / "trace.zarr")
    queries = asked(trace)
    trace.write_scores(queries, tmp_path / "s.parquet", "dmin", per_timestep=per_timestep)
    written = pyarrow.parquet.read_table(tmp_path / "s.parquet")
    top = trace.top_k(queries, 60, "dmin")
    timesteps = top.group_names
    assert written.column_names == [name for name in top.table if per_timestep or name not in timesteps]
    assert written.schema.metadata[b"dmin_trace.format"] == b"dmin_trace.scores"
    rows = written.to_pylist()
    assert [row["sample"] for row in rows] == list(range(60)) * 3
    hits = top.to_pandas().to_dict("records")
    for n, name in enumerate(queries.names):
        of_query = [row for row in rows if row["query"] == name]
        without = [row for row in of_query if row["score"] is None]
        assert len(without) == 2 and all(row["rank"] is row["z"] is row["stands_out"] is None for row in without)
        ranked = sorted((row for row in of_query if row["score"] is not None), key=lambda row: row["rank"])
        assert [row["rank"] for row in ranked] == list(range(1, 59))
        for row, hit in zip(ranked, hits[58 * n :], strict=False):
            assert (row["scored_by"], row["stands_out"]) == ("dmin", hit["stands_out"])
            np.testing.assert_allclose((row["score"], row["z"]), (hit["score"], hit["z"]), rtol=1e-4, atol=1e-4)
        captions = [trace.columns["caption"][row["sample"]] for row in of_query]
        assert [row["caption"] for row in of_query] == captions
    if per_timestep:
        parts = np.array([[row[name] for name in timesteps] for row in rows if row["score"] is not None])
        totals = [row["score"] for row in rows if row["score"] is not None]
        np.testing.assert_allclose(parts.sum(1), totals, atol=1e-5)


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made(tmp_path / "trace.zarr")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("scores.csv", "scores", ".npy", "scores.NPY"):
        with pytest.raises(QueryError, match=r"expected a name that ends in .parquet or .npy"):
            trace.write_scores(asked(trace), folder / name)
    for name in ("no/s.npy", "no/s.parquet"):
        with pytest.raises(QueryError, match="cannot be written"):
            trace.write_scores(asked(trace), folder / name)

    def stopped(*_: object, **__: object) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "scores", stopped)
    for name in ("s.npy", "s.parquet"):
        (folder / name).write_text("older")
        with pytest.raises(QueryError, match="No space left"):
            trace.write_scores(asked(trace), folder / name)
        assert (folder / name).read_text() == "older"
    assert sorted(path.name for path in folder.iterdir()) == ["s.npy", "s.parquet"]


def test_the_command_writes_what_the_method_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = made(tmp_path / "trace.zarr")
    samples = trace.store.sample[[10, 6]].tolist()
    options = [part for sample in samples for part in ("--sample", str(sample))]
    for name in ("s.npy", "s.parquet"):
        assert main(["scores", str(trace.path), *options, "--out", str(tmp_path / name), "--score", "dmin"]) == 0
        assert "dmin scores of 60 samples for 2 queries." in " ".join(capsys.readouterr().err.split())
    expected = trace.scores(trace.query_samples(samples), "dmin")
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), expected)
    read = pyarrow.parquet.read_table(tmp_path / "s.parquet")["score"].to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(read.astype(np.float32), expected.ravel())
    for wrong, words in (
        (["--out", str(tmp_path / "s.csv"), *options], "ends in .parquet or .npy"),
        (["--out", str(tmp_path / "no" / "s.npy"), *options], "There is no folder"),
        (["--out", str(tmp_path / "s.npy")], "Give images as queries"),
        (["--out", str(tmp_path / "s.npy"), "--prompt", "a", *options], "are for images"),
    ):
        assert main(["scores", str(trace.path), *wrong]) == 1
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_one_sample_and_equal_samples(tmp_path: Path) -> None:
    header = make_header(samples=1, dimension=64)
    rows = make_rows(header)
    one = dmin_trace.Trace(write_store(tmp_path / "one.zarr", header, rows._replace(sample=rows.sample - 100)))
    one.write_scores(one.query_samples([0]), tmp_path / "one.parquet", "dmin")
    row = pyarrow.parquet.read_table(tmp_path / "one.parquet").to_pylist()[0]
    assert (row["rank"], row["z"], row["stands_out"]) == (1, None, None)
    header = make_header(samples=50, dimension=64)
    rows = make_rows(header)
    rows.grad[:] = rows.grad[0]
    same = dmin_trace.Trace(write_store(tmp_path / "same.zarr", header, rows._replace(sample=rows.sample - 100)))
    same.write_scores(same.query_samples([0]), tmp_path / "same.parquet", "dmin")
    read = pyarrow.parquet.read_table(tmp_path / "same.parquet").to_pydict()
    assert sorted(read["rank"]) == list(range(1, 51)) and set(read["z"]) == {None}
    top = same.top_k(same.query_samples([0]), 3, "dmin")
    assert top.verdicts == ["How many samples stand out is not known: most scores are equal."]
