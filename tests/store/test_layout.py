"""Where things lie: the size of chunks, and files that plain Zarr reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from stores import (
    DTYPES,
    content,
    crc32c,
    dequantised,
    make_header,
    make_rows,
    write_store,
)

from dmin_trace.settings import Dtype
from dmin_trace.store import (
    choose_chunk_rows,
    chunk_file,
)
from dmin_trace.views import describe_store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "samples, timesteps, dimension",
    [(9288, 10, 2**14), (100, 1, 2**24), (3, 2, 16), (10**9, 1000, 16), (10**6, 10, 2**14)],
)
@pytest.mark.parametrize("writers", [1, 4])
def test_choose_chunk_rows_gives_chunks_of_a_good_size(
    dtype: Dtype, samples: int, timesteps: int, dimension: int, writers: int
) -> None:
    rows = choose_chunk_rows(samples, timesteps, dimension, dtype, writers)
    size = max(timesteps * dimension * np.dtype(dtype).itemsize, 8 * (1 + 3 * timesteps))
    chunks = -(-samples // rows)
    assert rows >= 1 and rows & (rows - 1) == 0
    assert rows * size <= 2**27 or rows == 1
    assert chunks >= min(writers, samples)
    assert rows * size >= 2**23 or -(-samples // (2 * rows)) < 2 * writers
    # Larger chunks are for stores of many, and bound their number as far as a chunk may grow.
    assert rows * size <= 2**24 or chunks >= 2**10 or rows == 1
    assert chunks <= 2**11 or rows * size > 2**26


# Plain Zarr, which reads the texts here, says of some versions that their format is young.
@pytest.mark.filterwarnings("ignore:.*not part in the Zarr format 3 specification.*")
@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_reads_what_a_writer_wrote(tmp_path: Path, dtype: Dtype) -> None:
    header = make_header(dtype=dtype)
    rows = make_rows(header)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    assert (trace.header, trace.complete, trace.done.tolist()) == (header, True, [True] * 3)
    assert np.array_equal(trace.norm, rows.norm)
    assert np.array_equal(trace.loss, rows.loss)
    assert np.array_equal(trace.sample, rows.sample)
    assert {name: trace.column(name) for name in header.columns} == rows.columns

    group: Any = zarr.open_group(tmp_path / "trace.zarr", mode="r")
    assert group.attrs["complete"] is True
    places = group["numbers"].attrs["columns"]
    for name, values in (("norm", rows.norm), ("loss", rows.loss), ("sample", rows.sample[:, None])):
        assert np.array_equal(group["numbers"][:, slice(*places[name])], values)
    assert np.array_equal(group["numbers"][:, slice(*places["scale"])], trace.numbers(trace.rows_done).scale)
    assert group["grad"].metadata.dimension_names == ("row", "timestep", "dimension")
    assert [str(text) for text in group["meta/caption"][:]] == rows.columns["caption"]
    assert group["done"][:].tolist() == [1, 1, 1]
    assert (group["grad"].dtype, group["grad"].chunks) == (np.dtype(dtype), (4, 3, 32))

    expected = dequantised(tmp_path / "trace.zarr")
    order = np.array([9, 0, 3, 4, 0])
    assert np.allclose(trace.gradients(order), expected[order], rtol=1e-6, atol=0)
    if dtype == "float32":
        assert np.array_equal(trace.gradients(np.arange(10)), rows.grad)
    half = np.abs(rows.grad).max(axis=2, keepdims=True) / 254
    # Of int8 half a step, and what the norm is corrected by.
    bound = {"int8": half + 0.01 * np.abs(rows.grad), "float16": 2**-11 * np.abs(rows.grad) + 2**-25}
    assert (np.abs(expected - rows.grad) <= bound.get(dtype, np.zeros(1)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_reads_a_packed_store(tmp_path: Path, dtype: Dtype) -> None:
    header = make_header(samples=10, timesteps=3, dimension=512, dtype=dtype)
    rows = make_rows(header)
    rows.grad[4:8] = 0
    plain = write_store(tmp_path / "plain.zarr", header, rows)
    packed = write_store(tmp_path / "packed.zarr", dataclasses.replace(header, codec="blosc"), rows)
    assert packed.header.codec == "blosc"
    group: Any = zarr.open_group(packed.path, mode="r")
    whole: Any = zarr.open_group(plain.path, mode="r")
    assert np.array_equal(group["grad"][:], whole["grad"][:])
    assert [type(codec).__name__ for codec in group["grad"].compressors] == ["BloscCodec", "Crc32cCodec"]
    for chunk in range(3):
        assert np.array_equal(packed.grad_chunk(chunk), plain.grad_chunk(chunk))
        data = chunk_file(packed.path, "grad", chunk).read_bytes()
        assert data[-4:] == crc32c(data[:-4])
    # Rows of zeros, which are not random.
    assert len(chunk_file(packed.path, "grad", 1).read_bytes()) < 200
    order = np.array([9, 0, 3, 4, 0])
    assert np.array_equal(packed.gradients(order), plain.gradients(order))
    shown = dict(describe_store(packed))
    size = sum(chunk_file(packed.path, "grad", chunk).stat().st_size for chunk in range(3))
    assert shown["the store"] == f"{packed.bytes:,} bytes, codec blosc"
    assert shown["a sample"].startswith(f"{size / 10:,.0f} bytes; its gradients in float32: 60,000, ")
    assert shown["chunks"] == f"3 of 4 samples, {4 * header.sample_bytes:,} bytes"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_file_is_the_array_and_its_checksum(tmp_path: Path, dtype: Dtype) -> None:
    header = make_header(dtype=dtype)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    group: Any = zarr.open_group(tmp_path / "trace.zarr", mode="r")
    stored = group["grad"][:]
    for chunk in range(3):
        data = chunk_file(trace.path, "grad", chunk).read_bytes()
        mapped = trace.grad_chunk(chunk)
        assert isinstance(mapped, np.memmap)
        rows = stored[4 * chunk : 4 * chunk + 4]
        assert np.array_equal(mapped, rows)
        assert data[: rows.nbytes] == rows.tobytes() == mapped.tobytes()
        assert len(data) == 4 * 3 * 32 * stored.itemsize + 4
        assert data[-4:] == crc32c(data[:-4])
    assert trace.grad_chunk(2).shape == (2, 3, 32)
    assert trace.numbers_of(2).scale.shape == (2, 3)
    assert trace.bytes == sum(len(data) for data in content(trace.path).values())
