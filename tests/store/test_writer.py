"""Writer, create and resume: each chunk once and whole, and a mark last."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import (
    Rows,
    content,
    dequantised,
    make_header,
    make_rows,
    noise_facts,
    write,
    write_store,
)

from dmin_trace.errors import TraceError
from dmin_trace.store import (
    chunk_file,
    create,
    open_store,
    quantise,
    resume,
)
from dmin_trace.store.header import ProjectionFacts


def test_write_does_not_read_the_marks_of_other_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of ten thousand chunks would otherwise read its marks a hundred million times."""
    header = make_header(samples=200, rows=1)
    writer = create(tmp_path / "trace.zarr", header)
    rows = make_rows(header)
    monkeypatch.setattr("dmin_trace.store.writer.done_chunks", lambda *_: pytest.fail("all marks were read"))
    for chunk in range(5):
        write(writer, rows, chunk)
    with pytest.raises(TraceError, match="Chunk 3 is no chunk"):
        write(writer, rows, 3)


def test_write_refuses_numbers_of_another_dtype(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    writer = create(tmp_path / "trace.zarr", header)
    values, scale = quantise(rows.grad[:4], "int8")
    columns = {name: column[:4] for name, column in rows.columns.items()}
    rest = (rows.norm[:4], rows.loss[:4], rows.sample[:4], columns)
    with pytest.raises(TraceError, match="was given float32 numbers; expected int8"):
        writer.write(0, rows.grad[:4], scale, *rest)
    with pytest.raises(TraceError, match="was given scales of shape"):
        writer.write(0, values, scale[:, :2], *rest)
    for index in (2**53 + 1, -(2**53) - 1):
        too_large = np.array([0, 1, index, 3])
        with pytest.raises(TraceError, match="was given the sample 9007199254740993; expected at most"):
            writer.write(0, values, scale, rows.norm[:4], rows.loss[:4], too_large, columns)
    writer.write(0, values, scale, *rest)
    assert writer.pending() == [1, 2]


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


def test_write_writes_chunks_of_fill_values(tmp_path: Path) -> None:
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


def test_write_replaces_values_that_no_file_can_hold(tmp_path: Path) -> None:
    header = make_header(samples=2)
    rows = make_rows(header)
    rows.columns.update(caption=["lone \ud800", "b"], label=[2**70, -(2**63)])
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    assert trace.column("caption") == ["lone ?", "b"]
    assert trace.column("label") == [-1, -1]


def test_write_refuses_a_done_chunk(tmp_path: Path) -> None:
    header = make_header()
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, make_rows(header), 1)
    before = content(tmp_path)
    with pytest.raises(TraceError, match="Chunk 1 is no chunk"):
        write(writer, make_rows(header, seed=1), 1)
    assert content(tmp_path) == before


def test_write_marks_a_chunk_after_everything_else_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header()
    path = tmp_path / "trace.zarr"
    writer = create(path, header)
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        inode = os.fstat(handle).st_ino
        names = [str(found.relative_to(path)) for found in [path, *path.rglob("*")] if found.stat().st_ino == inode]
        if names != ["done/c/1"] and "done" not in names[0]:
            assert not chunk_file(path, "done", 1).exists(), f"{names} is synced after the commit"
        synced.extend(names)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(writer, make_rows(header), 1)
    files = ["grad/c/1/0/0", "numbers/c/1/0", "done/c/1"]
    files += ["meta/caption/c/1", "meta/label/c/1", "meta/weight/c/1"]
    assert sorted(name for name in synced if (path / name).is_file()) == sorted(files)
    # A new file is kept only if the folders that name it are synced too.
    for folder in (
        "grad/c/1/0",
        "grad/c/1",
        "grad/c",
        "grad",
        "numbers/c/1",
        "numbers/c",
        "meta/label/c",
        "done/c",
        "done",
    ):
        assert folder in synced
    late = ["done", "done/c", "done/c/1"]
    assert sorted(synced[-3:]) == late and not set(late) & set(synced[:-3])


@pytest.mark.parametrize("broken", ["grad", "numbers", "meta/weight"])
def test_write_to_a_disk_that_fails_leaves_the_chunk_not_done(
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
    left = tmp_path / "trace.zarr" / "numbers" / "c" / "0" / "0.partial"
    left.write_bytes(b"torn")
    writer.finish()
    assert not left.exists()
    assert open_store(tmp_path / "trace.zarr").complete


def test_resume_writes_the_chunks_that_are_not_done_and_no_others(tmp_path: Path) -> None:
    header = make_header(samples=18)
    rows = make_rows(header)
    path = tmp_path / "trace.zarr"
    writer = create(path, header)
    for chunk in (0, 1, 2, 4):
        write(writer, rows, chunk)
    # Chunk 1 was written but not committed; chunk 4, the short last one, was torn as well.
    chunk_file(path, "done", 1).unlink()
    chunk_file(path, "done", 4).unlink()
    for name in ("grad", "meta/caption", "numbers"):
        torn = chunk_file(path, name, 4)
        torn.write_bytes(torn.read_bytes()[:-7])
    kept = {name: (path / name).stat().st_mtime_ns for name in content(path) if "/c/0" in name or "/c/2" in name}
    with pytest.raises(TraceError, match="2 of 5 chunks are done"):
        open_store(path)

    again = resume(path, dataclasses.replace(header, id="f" * 32, writers={"dmin_trace": "9"}))
    assert (again.pending(), again.header.chunks, again.header.id) == ([1, 3, 4], 5, header.id)
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
    assert len(kept) == 2 * 6  # two chunks of six arrays
    assert {name: (path / name).stat().st_mtime_ns for name in kept} == kept


CHANGES: dict[str, dict[str, Any]] = {
    "timesteps": {"timesteps": (0.5, 100.5, 300.0)},
    "dtype": {"dtype": "float16"},
    "codec": {"codec": "blosc"},
    "chunk_rows": {"chunk_rows": 2},
    "projection.seed": {
        "projection": ProjectionFacts(kind="rotation", seed=4, length=5000, width=8192, fingerprint="a" * 64)
    },
    "weights": {"weights": "d" * 64},
    "noise.draws": {"noise": noise_facts(3)},
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
