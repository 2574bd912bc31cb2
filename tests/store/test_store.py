"""The store: what is written is ordinary Zarr and comes back; what is not finished or not ours is refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import DTYPES, Rows, change, content, dequantised, make_header, make_rows, with_checksum, write, write_store

from dmin_trace.errors import TraceError
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import (
    Store,
    Writer,
    choose_chunk_rows,
    chunk_file,
    create,
    keep_digests,
    open_store,
    quantise,
    resume,
)
from dmin_trace.store.header import NoiseFacts, ProjectionFacts
from dmin_trace.views.describe import store_facts


def crc32c(data: bytes) -> bytes:
    """Castagnoli's checksum bit by bit, as RFC 3720 has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return (value ^ 0xFFFFFFFF).to_bytes(4, "little")


# Plain Zarr, which reads the texts here, says of some versions that their format is young.
@pytest.mark.filterwarnings("ignore:.*not part in the Zarr format 3 specification.*")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_comes_back_and_is_ordinary_zarr(tmp_path: Path, dtype: Dtype) -> None:
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
    for name, values in (("norm", rows.norm), ("loss", rows.loss), ("sample", rows.sample)):
        assert np.array_equal(group[name][:], values)
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
def test_a_packed_store_is_ordinary_zarr_too(tmp_path: Path, dtype: Dtype) -> None:
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
        data = chunk_file(packed.path, "grad", chunk, 3).read_bytes()
        assert data[-4:] == crc32c(data[:-4])
    # Rows of zeros, which are not random.
    assert len(chunk_file(packed.path, "grad", 1, 3).read_bytes()) < 200
    order = np.array([9, 0, 3, 4, 0])
    assert np.array_equal(packed.gradients(order), plain.gradients(order))
    shown = dict(store_facts(packed))
    size = sum(chunk_file(packed.path, "grad", chunk, 3).stat().st_size for chunk in range(3))
    assert shown["the store"] == f"{packed.bytes:,} bytes, codec blosc"
    assert shown["a sample"].startswith(f"{size / 10:,.0f} bytes; its gradients in float32 have 60,000, ")
    assert shown["chunks"] == f"3 of 4 samples, {4 * header.sample_bytes:,} bytes"


@pytest.mark.parametrize("codec", ["none", "blosc"])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_parts_of_a_chunk_are_the_chunk(tmp_path: Path, codec: Codec, rows: int) -> None:
    header = make_header(dtype="float16", codec=codec)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    memory = np.empty(rows * header.sample_bytes, np.uint8)
    # Read, then mapped, then from the map that was kept.
    for chunk in (0, 1, 2) * 3:
        parts = [np.array(part) for part in trace.grad_parts(chunk, rows, memory)]
        assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
        assert np.array_equal(np.concatenate(parts), trace.grad_chunk(chunk))


def test_few_maps_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmin_trace.store.gradients.MAX_MAPS", 2)
    header = make_header(samples=20)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    memory = np.empty(4 * header.sample_bytes, np.uint8)
    for turn in range(3):
        mapped = []
        for chunk in range(5):
            (part,) = trace.grad_parts(chunk, 4, memory)
            mapped.append(isinstance(part, np.memmap))
            assert np.array_equal(part, trace.grad_chunk(chunk))
        assert mapped == ([False] * 5 if turn == 0 else [True, True, False, False, False])


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """A map of it would end the process."""
    header = make_header()
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    parts = trace.grad_parts(1, 1, np.empty(header.sample_bytes, np.uint8))
    next(parts)
    os.truncate(chunk_file(trace.path, "grad", 1, 3), header.sample_bytes + 10)
    with pytest.raises(TraceError, match="chunk 1 of grad became shorter while read"):
        next(parts)


def test_a_chunk_is_written_without_looking_at_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of ten thousand chunks would otherwise read its marks a hundred million times."""
    header = make_header(samples=200, rows=1)
    writer = create(tmp_path / "trace.zarr", header)
    rows = make_rows(header)
    monkeypatch.setattr("dmin_trace.store.writer.done_chunks", lambda *_: pytest.fail("all marks were read"))
    for chunk in range(5):
        write(writer, rows, chunk)
    with pytest.raises(TraceError, match="Chunk 3 is no chunk"):
        write(writer, rows, 3)


def test_stored_numbers_of_another_kind_are_refused(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    writer = create(tmp_path / "trace.zarr", header)
    values, scale = quantise(rows.grad[:4], "int8")
    columns = {name: column[:4] for name, column in rows.columns.items()}
    rest = (rows.norm[:4], rows.loss[:4], rows.sample[:4], columns)
    with pytest.raises(TraceError, match="was given float32 numbers; expected int8"):
        writer.write_stored(0, rows.grad[:4], scale, *rest)
    with pytest.raises(TraceError, match="was given scales of shape"):
        writer.write_stored(0, values, scale[:, :2], *rest)
    writer.write_stored(0, values, scale, *rest)
    assert writer.pending() == [1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_file_is_the_array_and_its_checksum(tmp_path: Path, dtype: Dtype) -> None:
    header = make_header(dtype=dtype)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    group: Any = zarr.open_group(tmp_path / "trace.zarr", mode="r")
    stored = group["grad"][:]
    for chunk in range(3):
        data = chunk_file(trace.path, "grad", chunk, 3).read_bytes()
        mapped = trace.grad_chunk(chunk)
        assert isinstance(mapped, np.memmap)
        rows = stored[4 * chunk : 4 * chunk + 4]
        assert np.array_equal(mapped, rows)
        assert data[: rows.nbytes] == rows.tobytes() == mapped.tobytes()
        assert len(data) == 4 * 3 * 32 * stored.itemsize + 4
        assert data[-4:] == crc32c(data[:-4])
    assert trace.grad_chunk(2).shape == (2, 3, 32)
    assert trace.scale_chunk(2).shape == (2, 3)
    assert trace.bytes == sum(len(data) for data in content(trace.path).values())


def test_rows_of_zeros_or_without_a_number_are_stored_as_zeros(tmp_path: Path) -> None:
    for dtype in DTYPES:
        header = make_header(dtype=dtype)
        rows = make_rows(header)
        rows.grad[1, 2] = 0
        rows.grad[2, 0, 5], rows.norm[2, 0] = np.nan, np.nan
        rows.grad[3, 1, 0], rows.norm[3, 1] = -np.inf, np.inf
        trace = write_store(tmp_path / dtype, header, rows)
        back = trace.gradients(np.arange(10))
        for slot, timestep in ((1, 2), (2, 0), (3, 1)):
            assert not back[slot, timestep].any()
        assert back[2, 1].any()
        assert np.isnan(trace.norm[2, 0]) and np.isinf(trace.norm[3, 1])
        if dtype == "int8":
            assert trace.scale_chunk(0)[1, 2] == 0


def test_a_chunk_of_nothing_but_fill_values_is_written_too(tmp_path: Path) -> None:
    """Zarr by default writes no file for it, and an unconditional model's captions are all empty."""
    header = make_header()
    rows = make_rows(header)
    nothing = Rows(
        np.full_like(rows.grad, np.nan),
        np.full_like(rows.norm, np.nan),
        np.full_like(rows.loss, np.nan),
        np.full_like(rows.sample, -1),
        {"caption": [None] * 10, "label": [None] * 10, "weight": [None] * 10},
    )
    trace = write_store(tmp_path / "trace.zarr", header, nothing)
    assert trace.complete and not trace.valid.any() and not trace.gradients(np.arange(10)).any()
    assert trace.column("caption") == [""] * 10 and trace.column("label") == [-1] * 10
    assert np.isnan(trace.column("weight")).all()


def test_values_that_no_file_can_hold_do_not_stop_a_capture(tmp_path: Path) -> None:
    header = make_header(samples=2)
    rows = make_rows(header)
    rows.columns.update(caption=["lone \ud800", "b"], label=[2**70, -(2**63)])
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    assert trace.column("caption") == ["lone ?", "b"]
    assert trace.column("label") == [-1, -1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_is_the_number_over_the_scale(dtype: Dtype) -> None:
    """The definition, all at once in float64."""
    grad = make_rows(make_header(samples=9)).grad
    grad[2, 1] = 0
    grad[4, 0, 3] = np.nan
    values, scale = quantise(grad, dtype)
    clean = np.where(np.isfinite(grad).all(axis=2, keepdims=True), grad, 0).astype(np.float64)
    step = np.abs(clean).max(axis=2) / 127 if dtype == "int8" else np.ones((9, 3))
    expected = clean / np.where(step > 0, step, 1)[:, :, None]
    assert np.array_equal(values, np.rint(expected) if dtype == "int8" else expected.astype(dtype))
    if dtype == "int8":
        assert np.allclose(scale, step, rtol=0.02)
        # Norms are kept.
        stored = np.linalg.norm(values.astype(np.float64) * scale[:, :, None], axis=2)
        assert np.allclose(stored, np.linalg.norm(clean, axis=2), rtol=1e-5)
    else:
        assert np.array_equal(scale, step)
    assert values.dtype == dtype and np.isnan(grad[4, 0, 3])


@given(grad=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=16, max_size=16))
def test_int8_is_off_by_half_a_step_at_most(grad: list[float]) -> None:
    given_row = np.array(grad, np.float32).reshape(1, 1, 16)
    values, scale = quantise(given_row, "int8")
    step = np.abs(given_row).max() / 127
    error = np.abs(values.astype(np.float64) * step - given_row).max()
    assert error <= step * 0.5001 + 127 * 2.0**-149
    # Half a step in each of 16 numbers moves the norm, 127 steps or more, by two steps at the most.
    assert abs(scale[0, 0] - step) <= step * (2 / 127) * 1.05 + 2.0**-149
    assert values.dtype == np.int8 and values.min() >= -127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "samples, timesteps, dimension", [(9288, 10, 2**14), (100, 1, 2**24), (3, 2, 16), (10**9, 1000, 16)]
)
@pytest.mark.parametrize("writers", [1, 4])
def test_chunks_are_of_a_good_size_and_enough(
    dtype: Dtype, samples: int, timesteps: int, dimension: int, writers: int
) -> None:
    rows = choose_chunk_rows(samples, timesteps, dimension, dtype, writers)
    size = timesteps * dimension * np.dtype(dtype).itemsize
    assert rows >= 1 and rows & (rows - 1) == 0
    assert rows * size <= 2**25 or rows == 1
    assert -(-samples // rows) >= min(writers, samples)
    assert rows * size >= 2**23 or -(-samples // (2 * rows)) < 2 * writers


def test_resume_writes_what_is_not_done_and_nothing_else(tmp_path: Path) -> None:
    header = make_header(samples=18)
    rows = make_rows(header)
    path = tmp_path / "trace.zarr"
    writer = create(path, header)
    for chunk in (0, 1, 2, 4):
        write(writer, rows, chunk)
    # Chunk 1 was written but not committed; chunk 4, the short last one, was torn as well.
    chunk_file(path, "done", 1, 1).unlink()
    chunk_file(path, "done", 4, 1).unlink()
    for name, axes in (("grad", 3), ("meta/caption", 1), ("norm", 2)):
        torn = chunk_file(path, name, 4, axes)
        torn.write_bytes(torn.read_bytes()[:-7])
    kept = {name: (path / name).stat().st_mtime_ns for name in content(path) if "/c/0" in name or "/c/2" in name}
    with pytest.raises(TraceError, match="2 of 5 chunks are done"):
        open_store(path)

    again = resume(path, dataclasses.replace(header, id="f" * 32, writers={"dmin_trace": "9"}))
    assert (again.pending(), again.chunks, again.header.id) == ([1, 3, 4], 5, header.id)
    other = make_rows(header, seed=1)
    with pytest.raises(TraceError, match="3 of 5 chunks are not done"):
        again.finish()
    for chunk in again.pending():
        write(again, other, chunk)
    again.finish()
    trace = open_store(path)
    assert np.array_equal(trace.norm[4:8], other.norm[4:8]) and np.array_equal(trace.norm[12:], other.norm[12:])
    assert np.array_equal(trace.norm[8:12], rows.norm[8:12])
    assert trace.column("caption") == rows.columns["caption"]
    assert np.allclose(dequantised(path)[16:], other.grad[16:], atol=0.01)
    assert len(kept) == 2 * 9  # two chunks of nine arrays
    assert {name: (path / name).stat().st_mtime_ns for name in kept} == kept


def test_a_chunk_that_is_done_is_not_written_again(tmp_path: Path) -> None:
    header = make_header()
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, make_rows(header), 1)
    before = content(tmp_path)
    with pytest.raises(TraceError, match="Chunk 1 is no chunk"):
        write(writer, make_rows(header, seed=1), 1)
    assert content(tmp_path) == before


CHANGES: dict[str, dict[str, Any]] = {
    "timesteps": {"timesteps": (0.5, 100.5, 300.0)},
    "dtype": {"dtype": "float16"},
    "codec": {"codec": "blosc"},
    "chunk_rows": {"chunk_rows": 2},
    "projection.seed": {
        "projection": ProjectionFacts(kind="rotation", seed=4, length=5000, width=8192, fingerprint="a" * 64)
    },
    "weights": {"weights": "d" * 64},
    "noise.draws": {"noise": NoiseFacts(seed=3, draws=((),) * 3)},
    "batch.mask": {"batch": {"pixel_values": (1, 3, 8, 8), "mask": (1, 8, 8)}},
    "columns.weight": {"columns": {"caption": "string", "label": "integer"}},
    "settings.timesteps": {"settings": {"timesteps": 4, "columns": None}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_refuses_another_capture_and_shows_both(tmp_path: Path, name: str) -> None:
    create(tmp_path / "trace.zarr", make_header())
    before = content(tmp_path)
    with pytest.raises(
        TraceError, match=f"belongs to another capture: its {name} is .*, that of this run is "
    ) as caught:
        resume(tmp_path / "trace.zarr", dataclasses.replace(make_header(), **CHANGES[name]))
    found, expected = str(caught.value).split("its " + name, 1)[1].split("that of this run")
    assert found != expected and "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_a_chunk_is_marked_done_after_everything_else_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header()
    path = tmp_path / "trace.zarr"
    writer = create(path, header)
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        inode = os.fstat(handle).st_ino
        names = [str(found.relative_to(path)) for found in [path, *path.rglob("*")] if found.stat().st_ino == inode]
        if names != ["done/c/1"] and "done" not in names[0]:
            assert not chunk_file(path, "done", 1, 1).exists(), f"{names} is synced after the commit"
        synced.extend(names)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(writer, make_rows(header), 1)
    files = ["grad/c/1/0/0", "scale/c/1/0", "norm/c/1/0", "loss/c/1/0", "sample/c/1"]
    files += ["meta/caption/c/1", "meta/label/c/1", "meta/weight/c/1", "done/c/1"]
    assert sorted(name for name in synced if (path / name).is_file()) == sorted(files)
    # A new file is kept only if the folders that name it are synced too.
    for folder in (
        "grad/c/1/0",
        "grad/c/1",
        "grad/c",
        "grad",
        "norm/c/1",
        "sample/c",
        "meta/label/c",
        "done/c",
        "done",
    ):
        assert folder in synced
    late = ["done", "done/c", "done/c/1"]
    assert sorted(synced[-3:]) == late and not set(late) & set(synced[:-3])


@pytest.mark.parametrize("broken", ["grad", "norm", "sample", "meta/weight"])
def test_a_disk_that_fails_leaves_the_chunk_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    header = make_header()
    writer = create(tmp_path / "trace.zarr", header)
    real = os.fsync

    def fsync(handle: int) -> None:
        folder = tmp_path / "trace.zarr" / broken / "c"
        if folder.exists() and folder.stat().st_ino == os.fstat(handle).st_ino:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(TraceError, match=r"Chunk 0 of .* cannot be written: No space left on device\. Make room"):
            write(writer, make_rows(header), 0)
    assert writer.pending() == [0, 1, 2]
    write(writer, make_rows(header), 0)
    assert writer.pending() == [1, 2]


def test_finish_sweeps_what_a_killed_writer_left(tmp_path: Path) -> None:
    header = make_header(samples=4)
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, make_rows(header), 0)
    left = tmp_path / "trace.zarr" / "norm" / "c" / "0" / "0.0123.partial"
    left.write_bytes(b"torn")
    writer.finish()
    assert not left.exists()
    assert open_store(tmp_path / "trace.zarr").complete


def test_create_refuses_what_exists_and_leaves_it_alone(tmp_path: Path) -> None:
    header = make_header()
    write_store(tmp_path / "trace.zarr", header, make_rows(header))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = content(tmp_path)
    for name in ("trace.zarr", "file", "empty"):
        with pytest.raises(TraceError, match=r"exists already and belongs to another run\. Give another path"):
            create(tmp_path / name, make_header(id="9" * 32))
    assert content(tmp_path) == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["empty", "file", "trace.zarr"]


def test_create_says_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TraceError, match="cannot be written"):
        create(tmp_path / "file" / "trace.zarr", make_header())
    with pytest.raises(TraceError, match="cannot be written"):
        create(tmp_path / ("x" * 300), make_header())
    with pytest.raises(TraceError, match="There is no store at .*: File name too long"):
        open_store(tmp_path / ("x" * 300))
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(TraceError, match="is no folder that this user may write to"):
            create(tmp_path / "trace.zarr", make_header())
        tmp_path.chmod(0o700)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error, seen", [(OSError(28, "No space left on device"), TraceError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_create_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, seen: type[BaseException]
) -> None:
    def fail(handle: int) -> None:
        assert any(tmp_path.rglob("zarr.json"))
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(seen):
        create(tmp_path / "trace.zarr", make_header())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", ""])
def test_create_refuses_a_header_that_no_reader_would_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match="its attribute columns is"):
        create(tmp_path / "trace.zarr", make_header(columns={name: "string"}))
    assert list(tmp_path.iterdir()) == []


def test_more_chunks_than_any_disk_holds_are_refused(tmp_path: Path) -> None:
    """A flag is allocated for each chunk."""
    with pytest.raises(TraceError, match="its attribute chunk_rows is 1; expected at most 4194304 chunks"):
        create(tmp_path / "trace.zarr", make_header(samples=2**40, rows=1))


def test_write_refuses_values_of_another_shape(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    writer = create(tmp_path / "trace.zarr", header)
    for wrong in (
        rows._replace(grad=rows.grad[:, :, :16]),
        rows._replace(norm=rows.norm[:, :2]),
        rows._replace(loss=rows.loss[:2]),
        rows._replace(sample=rows.sample[:2]),
        rows._replace(columns=rows.columns | {"label": [1]}),
        rows._replace(columns={"caption": rows.columns["caption"]}),
    ):
        with pytest.raises(TraceError, match=r"Chunk 0 was given .* expected"):
            write(writer, wrong, 0)
    assert writer.pending() == [0, 1, 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that tests read, or copy to do harm to."""
    path = tmp_path_factory.mktemp("finished") / "trace.zarr"
    header = make_header()
    write_store(path, header, make_rows(header))
    return path


def test_each_thing_that_is_no_store_has_its_own_line(finished: Path, tmp_path: Path) -> None:
    def line(path: Path) -> str:
        with pytest.raises(TraceError) as caught:
            open_store(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "There is no store at" in line(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "is not a trace: it has no zarr.json" in line(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "is not a trace: it has no zarr.json" in line(tmp_path / "empty")
    zarr.create_group(tmp_path / "other", zarr_format=3, attributes={"format": "else"})
    assert "not a trace of dmin_trace" in line(tmp_path / "other")
    for text in (
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": 1, "a": 1}',
        '{"attributes": 1' + "0" * 5000 + "}",
    ):
        (tmp_path / "empty" / "zarr.json").write_text(text)
        assert "damaged" in line(tmp_path / "empty")
    (tmp_path / "empty" / "zarr.json").write_bytes(b"\xff\xfe")
    assert "cannot be read as JSON" in line(tmp_path / "empty")
    for version in (2, "1", True, 1.0, None):
        copied = tmp_path / f"version{version!r}"
        shutil.copytree(finished, copied)
        metadata = json.loads((copied / "zarr.json").read_text())
        metadata["attributes"]["version"] = version
        (copied / "zarr.json").write_text(json.dumps(metadata))
        assert f"is of version {version!r}; expected 1. Read it with the dmin_trace that wrote it" in line(copied)


def test_an_unfinished_store_is_opened_only_when_asked(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    path = tmp_path / "trace.zarr"
    writer = create(path, header)
    write(writer, rows, 1)
    write(writer, rows, 2)
    # Written but not committed, and so not to be seen.
    chunk_file(path, "done", 2, 1).unlink()
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
    change(path, lambda metadata: metadata["attributes"].update(complete=True))
    with pytest.raises(TraceError, match="is unfinished"):
        open_store(path)
    assert not open_store(path, unfinished=True).complete


def test_a_capture_that_has_only_begun_can_be_looked_at(tmp_path: Path) -> None:
    header = make_header(samples=10**8, rows=2**10)
    create(tmp_path / "trace.zarr", header)
    trace = open_store(tmp_path / "trace.zarr", unfinished=True)
    assert dict(store_facts(trace))["samples"] == "0 of 100,000,000; unfinished: 0 of 97657 chunks are done"
    few = make_rows(make_header(samples=2**10))
    Writer(trace.path, header).write(5, few.grad, few.norm, few.loss, few.sample, few.columns)
    for held in (trace, open_store(trace.path, unfinished=True)):
        with pytest.raises(TraceError, match="too few to read"):
            held.norm  # noqa: B018
    again = open_store(trace.path, unfinished=True)
    assert again.chunks_done == [5]
    assert np.allclose(again.gradients(np.array([5 * 2**10 + 3])), few.grad[3:4], atol=0.01)


def test_slots_and_chunks_that_are_not_there_are_named(finished: Path) -> None:
    trace = open_store(finished)
    assert [trace.row_of(int(sample)) for sample in trace.sample] == list(range(10))
    with pytest.raises(TraceError, match="holds no sample 7; its samples are 100 to 109"):
        trace.row_of(7)
    for wrong in ([-1], [10], [0, 2**40]):
        with pytest.raises(TraceError, match="has the slots 0 to 9"):
            trace.gradients(np.array(wrong))
    for chunk in (-1, 3):
        with pytest.raises(TraceError, match="has the chunks 0 to 2"):
            trace.grad_chunk(chunk)
    with pytest.raises(TraceError, match="has no column colour; it has caption, label, weight"):
        trace.column("colour")
    assert trace.gradients(np.array([], np.int64)).shape == (0, 3, 32)


READS: dict[str, tuple[int, Callable[[Store], object]]] = {
    "grad": (3, lambda trace: trace.gradients(np.arange(10))),
    "scale": (2, lambda trace: trace.gradients(np.arange(10))),
    "norm": (2, lambda trace: trace.norm),
    "loss": (2, lambda trace: trace.loss),
    "sample": (1, lambda trace: trace.sample),
    "meta/caption": (1, lambda trace: trace.column("caption")),
    "meta/label": (1, lambda trace: trace.column("label")),
}


@pytest.mark.parametrize("name", READS)
def test_a_chunk_that_is_cut_short_or_gone_is_named(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    axes, read = READS[name]
    file = chunk_file(tmp_path / "trace.zarr", name, 1, axes)
    whole = file.read_bytes()
    read(open_store(tmp_path / "trace.zarr"))
    for data in (whole[:-5], b"", None):
        file.unlink() if data is None else file.write_bytes(data)
        with pytest.raises(TraceError, match=f"is damaged: chunk 1 of {name} "):
            read(open_store(tmp_path / "trace.zarr"))


def test_texts_that_lie_about_their_length_are_refused_without_allocating(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    file = chunk_file(tmp_path / "trace.zarr", "meta/caption", 0, 1)
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


def test_strange_names_among_the_marks_are_passed_over(finished: Path, tmp_path: Path) -> None:
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


ARRAYS: dict[str, Callable[[dict[str, Any]], None]] = {
    "shape": lambda metadata: metadata["shape"].__setitem__(0, 10**15),
    "data_type": lambda metadata: metadata.update(data_type="float64"),
    "chunk_grid": lambda metadata: metadata["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 5),
    "chunk_key_encoding": lambda metadata: metadata["chunk_key_encoding"]["configuration"].update(separator="."),
    "codecs": lambda metadata: metadata["codecs"].append({"name": "zstd", "configuration": {}}),
}


@pytest.mark.parametrize("fact", ARRAYS)
@pytest.mark.parametrize("name", ["grad", "norm", "sample", "done", "meta/caption"])
def test_arrays_that_are_not_what_the_header_says_are_refused(
    finished: Path, tmp_path: Path, name: str, fact: str
) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    change(tmp_path / "trace.zarr" / name, ARRAYS[fact])
    with pytest.raises(TraceError, match=f"is damaged: the {fact} of {name} is .*; expected "):
        open_store(tmp_path / "trace.zarr")
    (tmp_path / "trace.zarr" / name / "zarr.json").unlink()
    with pytest.raises(TraceError, match=f"it has no array {name}"):
        open_store(tmp_path / "trace.zarr")


WRONG: dict[str, tuple[str, ...]] = {
    "id": ("../../etc/passwd", "A" * 32, "0" * 31, "0" * 32 + "\n"),
    "samples": ("0", "-1", "1000000000000001", "10.0", "true", '"10"', "null"),
    "timesteps": ("[]", "[true, 1, 2]", "5", "[1" + "0" * 400 + ", 1, 2]"),
    "dimension": ("0", "1" + "0" * 15, "-32"),
    "dtype": ('"object"', '"|O"', '["int8"]', "{}"),
    "chunk_rows": ("0", "-4", "4.0"),
    "codec": ('"zstd"', '["blosc"]', "1"),
    "projection.kind": ('"other"', "1"),
    "parameters.shapes": ("[[70, 70]]", "[[70, -70], [100]]", "[[70.0], [1]]", "[1, 2]"),
    "noise.draws": ("[]", '[["randn"], [], []]', '[[["randn", "x"]], [], []]'),
    "batch": ("[]", '{"x": [-1]}', '{"x": 1}'),
    "columns": ('{"../x": "string"}', '{"x": "object"}', "[]", '{"x": 1}'),
    "settings": ("[]", "null"),
    "writers": ('{"a": 1}',),
    "weights": ('""', '"zz"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_attribute_that_is_wrong_is_named(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    file = tmp_path / "trace.zarr" / "zarr.json"
    whole = json.loads(file.read_text())
    *outer, last = name.split(".")
    for text in (*WRONG[name], None):
        metadata = copy.deepcopy(whole)
        place = metadata["attributes"]
        for part in outer:
            place = place[part]
        place[last] = "@"
        if text is None:
            del place[last]
        quoted = json.dumps(text) if name == "id" else text
        file.write_text(json.dumps(metadata).replace('"@"', str(quoted)))
        with pytest.raises(TraceError, match=rf"its attribute .*{last} is ") as caught:
            open_store(tmp_path / "trace.zarr")
        assert "; expected " in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_header_and_arrays_that_agree_on_a_lie_allocate_nothing(finished: Path, tmp_path: Path) -> None:
    """Metadata alone may claim anything, so it is the files that are believed."""
    for samples, rows in ((10**12, 2**18), (2**36, 2**18), (2**31, 2**9)):
        header = make_header(samples=samples, rows=rows)
        path = tmp_path / f"{samples}"
        create(path, header)
        (path / "done" / "c").mkdir()
        for chunk in range(min(header.chunks, 4)):
            shutil.copy(finished / "done" / "c" / "0", path / "done" / "c" / str(chunk))
        change(path, lambda metadata: metadata["attributes"].update(complete=True))
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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store whose chunks are packed, and large enough for Blosc to take the trouble."""
    path = tmp_path_factory.mktemp("packed") / "trace.zarr"
    header = make_header(dimension=1024, dtype="float32", codec="blosc")
    write_store(path, header, make_rows(header))
    return path


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


FRAMES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "unpacks to more": (lambda f: f[:4] + number(2**31 - 17) + f[8:], "claims 2147483631 bytes in"),
    "unpacks to less": (lambda f: f[:4] + number(49148) + f[8:], "claims 49148 bytes in .*expected 49152"),
    "is said to be longer": (lambda f: f[:12] + number(2**30) + f[16:], "claims 49152 bytes in 1073741824"),
    "has no blocks": (lambda f: f[:8] + number(0) + f[12:], "claims 49152"),
    "has a block larger than itself": (lambda f: f[:8] + number(2**31 - 1) + f[12:], "claims 49152"),
    "is cut short": (lambda f: f[:-100], "claims 49152 bytes in"),
    "is cut short and says so": (lambda f: f[:12] + number(len(f) - 100) + f[16:-100], "cannot be unpacked"),
    "is a header alone": (lambda f: f[:12] + number(16) + f[16:16], "cannot be unpacked"),
    "is of another format": (lambda f: b"\xff" + f[1:], "cannot be unpacked"),
    "is empty": (lambda f: b"", "has 4 bytes, expected at most 49172"),
    "is longer than any": (lambda f: f + bytes(49152), "bytes, expected at most 49172"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_lies_is_refused_before_anything_is_allocated(packed: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(packed, tmp_path / "trace.zarr")
    trace = open_store(tmp_path / "trace.zarr")
    file = chunk_file(trace.path, "grad", 1, 3)
    forge, message = FRAMES[name]
    file.write_bytes(with_checksum(forge(file.read_bytes()[:-4])))
    trace.gradients(np.array([0]))
    tracemalloc.start()
    for read in (lambda: trace.grad_chunk(1), lambda: trace.gradients(np.array([5])), lambda: list(parts_of(trace, 1))):
        with pytest.raises(TraceError, match=f"is damaged: chunk 1 of grad .*{message}"):
            read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def parts_of(trace: Store, chunk: int) -> Iterator[np.ndarray]:
    return trace.grad_parts(chunk, 2, np.empty(0, np.uint8))


def test_a_flipped_bit_is_found_by_the_checksum(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "trace.zarr")
    trace = open_store(tmp_path / "trace.zarr")
    file = chunk_file(trace.path, "grad", 1, 3)
    whole = file.read_bytes()
    for place in (0, 5, 13, 16, 20, len(whole) // 2, len(whole) - 5, len(whole) - 4, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(TraceError, match="does not have the numbers of its checksum"):
            trace.grad_chunk(1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_frame_from_anybody_gives_an_error_or_numbers(packed: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whoever can write a file can write its checksum."""
    if not (tmp_path / "trace.zarr").exists():
        shutil.copytree(packed, tmp_path / "trace.zarr")
    trace = open_store(tmp_path / "trace.zarr")
    frame = bytearray(chunk_file(packed, "grad", 1, 3).read_bytes()[:-4])
    near = st.integers(0, 200) if data.draw(st.booleans()) else st.integers(0, len(frame) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        frame[data.draw(near)] = data.draw(st.integers(0, 255))
    chunk_file(trace.path, "grad", 1, 3).write_bytes(with_checksum(bytes(frame)))
    try:
        assert trace.grad_chunk(1).shape == (4, 3, 1024)
    except TraceError as error:
        assert "chunk 1 of grad" in str(error)


def test_the_codec_of_the_header_is_that_of_the_array(finished: Path, packed: Path, tmp_path: Path) -> None:
    for path, codec in ((finished, "blosc"), (packed, "none")):
        shutil.copytree(path, tmp_path / codec)
        change(tmp_path / codec, lambda metadata, codec=codec: metadata["attributes"].update(codec=codec))
        with pytest.raises(TraceError, match="the codecs of grad is .*; expected"):
            open_store(tmp_path / codec)


def test_packed_chunks_are_not_larger_than_memory_is_made_for(tmp_path: Path) -> None:
    for header in (
        make_header(samples=2**20, dimension=2**20, rows=2**8, codec="blosc"),
        make_header(samples=2**20, dimension=2**20, rows=2**8),
        make_header(samples=2, timesteps=200, dimension=2**24, rows=1, codec="blosc"),
    ):
        line = (
            "chunk_rows is 256; expected 1, or chunks" if header.chunk_rows > 1 else "codec is 'blosc'; expected none"
        )
        with pytest.raises(TraceError, match=f"its attribute {line} of|its attribute {line} for chunks of more than"):
            create(tmp_path / "trace.zarr", header)
    create(tmp_path / "trace.zarr", make_header(samples=2, timesteps=20, dimension=2**22, rows=1, codec="blosc"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document lies."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_attributes_from_anybody_give_an_error_or_a_store(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "trace.zarr"
    if not path.exists():
        shutil.copytree(finished, path)
    metadata = json.loads((finished / "zarr.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(metadata["attributes"])))
        holder = metadata["attributes"]
        for key in place[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[place[-1]] = data.draw(JSON)
        else:
            del holder[place[-1]]
    (path / "zarr.json").write_text(json.dumps(metadata))
    # What holds an infinity has no digest.
    with contextlib.suppress(ValueError):
        keep_digests(path)
    tracemalloc.start()
    try:
        trace = open_store(path, unfinished=True)
        assert trace.norm.shape == (10, 3)
        assert trace.gradients(np.arange(10)).shape == (10, 3, 32)
        assert all(len(trace.column(name)) == 10 for name in trace.header.columns)
        assert store_facts(trace)
    except TraceError as error:
        assert len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**22


def test_reading_needs_no_zarr(finished: Path, packed: Path) -> None:
    """Its pipeline would believe the metadata, and importing it takes longer than reading."""
    import subprocess
    import sys

    code = (
        "import sys; from dmin_trace.store import open_store; from dmin_trace.views.describe import store_facts; "
        "trace = open_store(sys.argv[1]); "
        "trace.norm; trace.column('caption'); trace.grad_chunk(0); store_facts(trace); sys.exit('zarr' in sys.modules)"
    )
    for path in (finished, packed):
        assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
