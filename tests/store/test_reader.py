"""Store and open_store: what is done comes back, and only that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from stores import (
    change,
    make_header,
    make_rows,
    write,
    write_store,
)

from dmin_trace.errors import TraceError
from dmin_trace.store import (
    Writer,
    chunk_file,
    create,
    open_store,
    quantise,
)
from dmin_trace.views import describe_store


def test_open_store_refuses_an_unfinished_store_unless_told(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    path = tmp_path / "trace.zarr"
    writer = create(path, header)
    write(writer, rows, 1)
    write(writer, rows, 2)
    # Written but not committed, and so not to be seen.
    chunk_file(path, "done", 2).unlink()
    with pytest.raises(TraceError, match="is unfinished: 1 of 3 chunks are done. Finish it .* dmin-trace capture"):
        open_store(path)
    trace = open_store(path, unfinished=True)
    assert (trace.complete, trace.done.tolist(), trace.chunks_done) == (False, [False, True, False], [1])
    assert trace.rows_done.tolist() == [4, 5, 6, 7]
    assert np.array_equal(trace.norm[4:8], rows.norm[4:8]) and np.array_equal(trace.sample[4:8], rows.sample[4:8])
    outside = [0, 1, 2, 3, 8, 9]
    assert np.isnan(trace.norm[outside]).all() and np.isnan(trace.loss[outside]).all()
    assert (trace.sample[outside] == -1).all() and not trace.valid[outside].any()
    assert trace.column("caption") == [""] * 4 + rows.columns["caption"][4:8] + [""] * 2
    assert trace.column("label") == [-1] * 4 + rows.columns["label"][4:8] + [-1] * 2
    for chunk in (0, 2):
        with pytest.raises(TraceError, match=f"chunk {chunk} is not done"):
            trace.grad_chunk(chunk)
    with pytest.raises(TraceError, match="chunk 2 is not done"):
        trace.gradients(np.array([4, 9]))
    # Complete means that every chunk is done, whatever the attribute says.
    change(path, lambda metadata: metadata["attributes"].update(complete=True, state="0" * 64, valid_count=10))
    with pytest.raises(TraceError, match="is unfinished"):
        open_store(path)
    assert not open_store(path, unfinished=True).complete


def test_open_store_opens_a_capture_that_has_only_begun(tmp_path: Path) -> None:
    header = make_header(samples=10**8, rows=2**10)
    create(tmp_path / "trace.zarr", header)
    trace = open_store(tmp_path / "trace.zarr", unfinished=True)
    assert dict(describe_store(trace))["samples"] == "0 of 100,000,000; unfinished: 0 of 97657 chunks are done"
    few = make_rows(make_header(samples=2**10))
    Writer(trace.path, header).write(5, *quantise(few.grad, "int8"), few.norm, few.loss, few.sample, few.columns)
    for held in (trace, open_store(trace.path, unfinished=True)):
        with pytest.raises(TraceError, match="too few to read"):
            held.norm  # noqa: B018
    again = open_store(trace.path, unfinished=True)
    assert again.chunks_done == [5]
    assert np.allclose(again.gradients(np.array([5 * 2**10 + 3])), few.grad[3:4], atol=0.01)


def test_store_names_rows_and_chunks_that_it_does_not_have(finished: Path) -> None:
    trace = open_store(finished)
    assert trace.rows_of(trace.sample).tolist() == list(range(10))
    with pytest.raises(TraceError, match="holds no sample 7; its samples are 100 to 109"):
        trace.rows_of([7])
    for wrong in ([-1], [10], [0, 2**40]):
        with pytest.raises(TraceError, match="has the rows 0 to 9"):
            trace.gradients(np.array(wrong))
    for chunk in (-1, 3):
        with pytest.raises(TraceError, match="has the chunks 0 to 2"):
            trace.grad_chunk(chunk)
    with pytest.raises(TraceError, match="has no column colour; it has caption, label, weight"):
        trace.column("colour")
    assert trace.gradients(np.array([], np.int64)).shape == (0, 3, 32)


def test_store_allocates_nothing_for_rows_that_no_file_holds(finished: Path, tmp_path: Path) -> None:
    """Metadata alone may claim anything, so it is the files that are believed."""
    for samples, rows in ((10**12, 2**18), (2**36, 2**18), (2**31, 2**9)):
        header = make_header(samples=samples, rows=rows)
        path = tmp_path / f"{samples}"
        create(path, header)
        (path / "done" / "c").mkdir()
        for chunk in range(min(header.chunks, 4)):
            shutil.copy(finished / "done" / "c" / "0", path / "done" / "c" / str(chunk))
        trace = open_store(path, unfinished=True)
        for name in ("sample", "norm", "loss", "valid", "rows_done"):
            tracemalloc.start()
            with pytest.raises(TraceError):
                getattr(trace, name)
            for column in header.columns:
                with pytest.raises(TraceError):
                    trace.column(column)
            with pytest.raises(TraceError):
                trace.grad_chunk(0)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**21


def test_store_is_read_without_zarr(finished: Path, packed: Path) -> None:
    """Its pipeline would believe the metadata, and importing it takes longer than reading."""

    code = (
        "import sys; from dmin_trace.store import open_store; from dmin_trace.views import describe_store; "
        "trace = open_store(sys.argv[1]); trace.norm; "
        "trace.column('caption'); trace.grad_chunk(0); describe_store(trace); sys.exit('zarr' in sys.modules)"
    )
    for path in (finished, packed):
        assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


def test_numbers_and_columns_of_some_rows_are_those_of_the_whole_arrays(finished: Path) -> None:
    whole = open_store(finished)
    rows = np.array([9, 0, 4, 3, 0])
    store = open_store(finished)
    found = store.numbers(rows)
    assert np.array_equal(found.scale, whole.numbers(whole.rows_done).scale[rows])
    for name in ("sample", "norm", "loss"):
        expected = getattr(whole, name)[rows]
        assert np.array_equal(getattr(found, name), expected) and getattr(found, name).dtype == expected.dtype
    for name in store.header.columns:
        assert store.column_at(name, rows) == [whole.column(name)[row] for row in rows]
    assert not {"sample", "norm", "loss", "_row_done"} & set(vars(store)), "a whole array was read"
    with pytest.raises(TraceError, match="has the rows 0 to 9"):
        store.numbers([10])
    with pytest.raises(TraceError, match="has no column colour"):
        store.column_at("colour", rows)
    assert store.numbers([]).norm.shape == (0, 3) and store.column_at("label", []) == []


def test_numbers_of_an_unfinished_chunk_are_refused(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, rows, 1)
    store = open_store(writer.path, unfinished=True)
    assert np.array_equal(store.numbers([4, 7]).norm, rows.norm[[4, 7]])
    for read in (lambda: store.numbers([4, 0]), lambda: store.column_at("label", [0])):
        with pytest.raises(TraceError, match="chunk 0 is not done"):
            read()
    # The samples are 100 and more, so no row is where a capture would have put it.
    assert store.rows_of(rows.sample[[6, 4]]).tolist() == [6, 4]
    with pytest.raises(TraceError, match="holds no sample"):
        store.rows_of([int(rows.sample[0])])


def test_rows_of_reads_few_chunks_where_rows_are_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)._replace(sample=np.arange(10))
    path = write_store(tmp_path / "trace.zarr", header, rows).path
    store = open_store(path)
    assert store.rows_of([7, 0]).tolist() == [7, 0] and store.rows_of([3]).tolist() == [3]
    assert "sample" not in vars(store)
    with pytest.raises(TraceError, match="holds no sample 10; its samples are 0 to 9"):
        store.rows_of([3, 10])
    assert store.rows_of([]).tolist() == []


def test_sample_indices_come_back_exactly(tmp_path: Path) -> None:
    header = make_header()
    samples = 2**53 - np.arange(10)
    store = write_store(tmp_path / "trace.zarr", header, make_rows(header)._replace(sample=samples))
    assert store.sample.tolist() == samples.tolist() == store.numbers(np.arange(10)).sample.tolist()
    assert store.rows_of([2**53 - 9, 2**53]).tolist() == [9, 0]


def test_a_complete_store_keeps_its_state_and_valid_count(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    rows.norm[3, 1] = np.nan
    path = write_store(tmp_path / "trace.zarr", header, rows).path
    again = write_store(tmp_path / "again.zarr", header, rows)
    other = write_store(tmp_path / "other.zarr", header, rows._replace(loss=rows.loss + 1))
    store = open_store(path)
    assert store.state == store.compute_state() == again.state != other.state
    assert store.valid_count == store.valid.sum() == 9
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    assert (attributes["state"], attributes["valid_count"]) == (store.state, 9)
    # Neither reads a chunk.
    shutil.rmtree(path / "numbers" / "c")
    store = open_store(path)
    assert (store.state, store.valid_count) == (again.state, 9)
    # Without a mark the store is not complete, and both are of the chunks that are left.
    chunk_file(again.path, "done", 0).unlink()
    unfinished = open_store(again.path, unfinished=True)
    assert unfinished.state != again.state and unfinished.valid_count == 6
    for name, wrong in (("state", "z" * 64), ("valid_count", -1), ("state", None)):
        shutil.copytree(other.path, tmp_path / f"{name}{wrong}")
        change(tmp_path / f"{name}{wrong}", lambda metadata, n=name, w=wrong: metadata["attributes"].update({n: w}))
        with pytest.raises(TraceError, match=f"its attribute {name} is .*; expected"):
            open_store(tmp_path / f"{name}{wrong}")
