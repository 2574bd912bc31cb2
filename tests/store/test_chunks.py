"""ChunkFiles: files that are damaged are named."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stores import (
    with_checksum,
)

from dmin_trace.errors import TraceError
from dmin_trace.store import (
    Store,
    chunk_file,
    open_store,
)

READS: dict[str, Callable[[Store], object]] = {
    "grad": lambda trace: trace.gradients(np.arange(10)),
    "numbers": lambda trace: trace.norm,
    "meta/caption": lambda trace: trace.column("caption"),
    "meta/label": lambda trace: trace.column("label"),
}


@pytest.mark.parametrize("name", READS)
def test_chunk_files_name_a_chunk_that_is_cut_short_or_missing(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    read = READS[name]
    file = chunk_file(tmp_path / "trace.zarr", name, 1)
    whole = file.read_bytes()
    read(open_store(tmp_path / "trace.zarr"))
    for data in (whole[:-5], b"", None):
        file.unlink() if data is None else file.write_bytes(data)
        with pytest.raises(TraceError, match=f"is damaged: chunk 1 of {name} "):
            read(open_store(tmp_path / "trace.zarr"))


def test_texts_allocates_nothing_for_lengths_that_lie(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    file = chunk_file(tmp_path / "trace.zarr", "meta/caption", 0)
    whole, huge = file.read_bytes(), b"\xff\xff\xff\x7f"
    for data in (
        huge + whole[4:],
        whole[:4] + huge + whole[8:],
        whole.replace(b"a cat", b"\xff cat"),
        b"\x04\0\0\0" * 2,
    ):
        file.write_bytes(with_checksum(data[:-4]))
        tracemalloc.start()
        with pytest.raises(TraceError, match="chunk 0 of meta/caption does not hold 4 texts"):
            open_store(tmp_path / "trace.zarr").column("caption")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22


@pytest.mark.parametrize("sample", [1.5, np.nan, np.inf, 2.0**53 + 2])
def test_numbers_refuses_sample_indices_that_are_no_integers(finished: Path, tmp_path: Path, sample: float) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    file = chunk_file(tmp_path / "trace.zarr", "numbers", 1)
    file.write_bytes(with_checksum(np.float64(sample).tobytes() + file.read_bytes()[8:-4]))
    for read in (lambda store: store.sample, lambda store: store.numbers([5]), lambda store: store.rows_of([5])):
        with pytest.raises(TraceError, match="chunk 1 of numbers holds sample indices that are no integers"):
            read(open_store(tmp_path / "trace.zarr"))


def test_done_chunks_passes_over_strange_names(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    folder = tmp_path / "trace.zarr" / "done" / "c"
    mark = (folder / "1").read_bytes()
    (folder / "1").unlink()
    for name in ("²", "01", "1.abc.partial", "9" * 200, "-1", "7"):
        (folder / name).write_bytes(mark)
    for damage in (None, b"", b"\x00" + mark[1:], mark + b"x"):
        if damage is not None:
            (folder / "1").write_bytes(damage)
        assert open_store(tmp_path / "trace.zarr", unfinished=True).chunks_done == [0, 2]
