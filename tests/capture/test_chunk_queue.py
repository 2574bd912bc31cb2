"""ChunkQueue: rows become chunks of the store, quantised, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import DTYPES, make_header, make_rows, write_store

from dmin_trace.capture.chunk_queue import ChunkQueue, Row
from dmin_trace.errors import TraceError
from dmin_trace.settings import Dtype
from dmin_trace.store import Header, create, open_store


def queue_of(header: Header, chunks: list[int]) -> ChunkQueue:
    named = [(chunk, header.rows(chunk)) for chunk in chunks]
    return ChunkQueue(named, len(header.timesteps), header.dimension, header.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_queue_writes_what_a_writer_of_whole_chunks_writes(tmp_path: Path, dtype: Dtype) -> None:
    header = make_header(dtype=dtype)
    rows = make_rows(header)
    whole = write_store(tmp_path / "whole.zarr", header, rows._replace(sample=np.arange(10)))
    queue = queue_of(header, [0, 1, 2])
    assert queue.missing_rows is None
    queue.writer = create(tmp_path / "trace.zarr", header)
    for k in range(10):
        columns = {name: values[k] for name, values in rows.columns.items()}
        queue.add(Row(rows.grad[k], rows.norm[k], rows.loss[k]), columns)
        assert queue.missing_rows == {0: 3, 1: 2, 2: 1, 3: None}[k % 4] if k < 8 else True
        queue.check(wait=k == 9)
    queue.close()
    queue.writer.finish()
    found = open_store(tmp_path / "trace.zarr")
    for name in ("sample", "norm", "loss", "scale"):
        ours, expected = (getattr(store.numbers(store.rows_done), name) for store in (found, whole))
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(found.gradients(np.arange(10)), whole.gradients(np.arange(10)))
    assert found.column("caption") == whole.column("caption")


def test_chunk_queue_marks_a_sample_that_could_not_be_loaded(tmp_path: Path) -> None:
    header = make_header(samples=4, dtype="float32")
    rows = make_rows(header)
    queue = queue_of(header, [0])
    queue.writer = create(tmp_path / "trace.zarr", header)
    for k in range(4):
        columns = {name: values[k] for name, values in rows.columns.items()}
        row = None if k == 2 else Row(rows.grad[k], rows.norm[k], rows.loss[k])
        queue.add(row, dict.fromkeys(columns) if row is None else columns)
    queue.wait()
    queue.close()
    queue.writer.finish()
    found = open_store(tmp_path / "trace.zarr")
    assert found.unranked.failed == (2,) and found.valid.tolist() == [True, True, False, True]


def test_chunk_queue_raises_what_kept_a_chunk_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header(samples=8)
    queue = queue_of(header, [0, 1])
    queue.writer = create(tmp_path / "trace.zarr", header)

    def fail(*given: Any) -> None:
        raise TraceError("no room")

    monkeypatch.setattr("dmin_trace.store.Writer.write", fail)
    for _ in range(4):
        queue.add(None, dict.fromkeys(header.columns))
    with pytest.raises(TraceError, match="no room"):
        queue.check(wait=True)
    queue.close()
