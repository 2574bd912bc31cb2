"""verify_chunks, drop_damaged and drop_failed: what is damaged is named, and made anew by resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stores import change, content, make_header, make_rows, with_checksum, write, write_store

from dmin_trace.errors import TraceError
from dmin_trace.store import (
    StoreLock,
    Verified,
    chunk_file,
    create,
    drop_damaged,
    drop_failed,
    integrity,
    mark_not_final,
    open_store,
    read_header,
    resume,
    set_aside,
    verify_chunks,
    weights_beside,
)


def verified(path: Path) -> Verified:
    return verify_chunks(path, *read_header(path))


def flip(file: Path, at: int = 9) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_drop_damaged_and_a_resumed_capture_make_damaged_chunks_anew(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.zarr"
    shutil.copytree(finished, path)
    assert drop_damaged(path) == [] and content(path) == content(finished)
    flip(chunk_file(path, "grad", 0))
    chunk_file(path, "meta/label", 2).unlink()
    assert [(damage.array, damage.chunk) for damage in verified(path).damages] == [("grad", 0), ("meta/label", 2)]
    assert drop_damaged(path) == [0, 2]
    assert [left.name for left in tmp_path.iterdir()] == ["trace.zarr"], "the lock is left"
    with pytest.raises(TraceError, match="is unfinished: 1 of 3 chunks are done"):
        open_store(path)
    header = make_header()
    writer = resume(path, header)
    assert writer.pending() == [0, 2]
    for chunk in writer.pending():
        write(writer, make_rows(header), chunk)
    writer.finish()
    assert content(path) == content(finished) and not verified(path).damages


def test_drop_failed_takes_the_chunks_of_samples_that_could_not_be_loaded(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    rows.norm[5] = -1
    path = write_store(tmp_path / "trace.zarr", header, rows).path
    assert open_store(path).unranked.failed == (rows.sample[5],)
    assert drop_failed(path) == [1]
    assert resume(path, header).pending() == [1]
    assert drop_failed(path) == []


def test_a_store_that_is_not_final_stays_so(finished: Path, tmp_path: Path) -> None:
    path, header = tmp_path / "trace.zarr", make_header()
    shutil.copytree(finished, path)
    assert open_store(path).final
    mark_not_final(path)
    flip(chunk_file(path, "grad", 1))
    assert drop_damaged(path) == [1] and not open_store(path, unfinished=True).complete
    writer = resume(path, header)
    write(writer, make_rows(header), 1)
    writer.finish()
    assert open_store(path).complete and not open_store(path).final
    assert verified(path).bad_chunks == []


def test_set_aside_numbers_a_store_with_its_weights_and_its_index(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.zarr"
    assert set_aside(path) is None
    for number in (1, 2):
        shutil.copytree(finished, path)
        weights_beside(path).write_text(f"weights {number}")
        (tmp_path / "trace.index").mkdir()
        assert set_aside(path) == tmp_path / f"trace-{number}.zarr"
        assert weights_beside(tmp_path / f"trace-{number}.zarr").read_text() == f"weights {number}"
    kept = [f"trace-{n}{ending}" for n in (1, 2) for ending in (".index", ".weights.safetensors", ".zarr")]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    # What an interrupted call left is gone on with.
    shutil.copytree(finished, path)
    (tmp_path / "trace-3.weights.safetensors").write_text("moved already")
    assert set_aside(path) == tmp_path / "trace-3.zarr"
    assert weights_beside(tmp_path / "trace-3.zarr").read_text() == "moved already"


def test_drop_damaged_writes_damaged_metadata_anew(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.zarr"
    shutil.copytree(finished, path)
    flip(path / "numbers" / "zarr.json", 40)
    (path / "meta" / "zarr.json").unlink()
    assert verified(path).bad_arrays == ["meta", "numbers"]
    assert drop_damaged(path) == [] and content(path) == content(finished)
    # The header says all of it, and nothing says the header.
    change(path, lambda metadata: metadata["attributes"].update(weights="x"))
    with pytest.raises(TraceError, match="its attribute weights is"):
        drop_damaged(path)


def test_drop_damaged_waits_for_no_capture(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.zarr"
    shutil.copytree(finished, path)
    flip(chunk_file(path, "grad", 1))
    monkeypatch.setattr("dmin_trace.store.lock.WAIT_SECONDS", 0.1)
    lock = StoreLock(path)
    lock.take()
    with pytest.raises(TraceError, match="Another capture is writing"):
        drop_damaged(path)
    lock.release()
    assert drop_damaged(path) == [1]


def test_drop_damaged_killed_at_any_step_leaves_no_store_that_reads_as_complete(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, steps = make_header(), 0
    for name, module in (("sync", "chunks"), ("set_finished", "integrity"), ("replace_text", "metadata")):
        place = f"dmin_trace.store.{module}.{name}"
        real: Callable[..., None] = getattr(__import__(f"dmin_trace.store.{module}", fromlist=[name]), name)

        def counted(*given: object, real: Callable[..., None] = real) -> None:
            nonlocal steps
            if steps == 0:
                raise KeyboardInterrupt
            steps -= 1
            real(*given)

        monkeypatch.setattr(place, counted)
    for killed_at in range(3):
        path = tmp_path / f"{killed_at}.zarr"
        shutil.copytree(finished, path)
        for chunk in (0, 2):
            flip(chunk_file(path, "grad", chunk))
        steps = killed_at
        with pytest.raises(KeyboardInterrupt):
            drop_damaged(path)
        steps = 99
        with pytest.raises(TraceError, match="is unfinished: 1 of 3"):
            open_store(path)
        writer = resume(path, header)
        assert writer.pending() == [0, 2]
        for chunk in writer.pending():
            write(writer, make_rows(header), chunk)
        writer.finish()
        assert content(path) == content(finished)


def test_verify_chunks_notices_a_chunk_of_another_capture(finished: Path, tmp_path: Path) -> None:
    """Its own checksum is right."""
    path = tmp_path / "trace.zarr"
    shutil.copytree(finished, path)
    file = chunk_file(path, "numbers", 1)
    numbers = np.frombuffer(file.read_bytes()[:-4]).copy()
    numbers[2] += 1
    file.write_bytes(with_checksum(numbers.tobytes()))
    [damage] = verified(path).damages
    assert damage.file == "trace.zarr/zarr.json" and "some are not those with which the store was" in damage.what


def test_verify_chunks_reads_files_in_blocks(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 7)
    seen: list[tuple[int, int]] = []
    found = verify_chunks(finished, *read_header(finished), progress=lambda done, of: seen.append((done, of)))
    assert (found.damages, found.files, found.done, found.complete) == ([], 3 * 5, 3, True)
    assert seen[-1] == (found.bytes, found.bytes) and len(seen) == 15
    shutil.copytree(finished, tmp_path / "trace.zarr")
    flip(chunk_file(tmp_path / "trace.zarr", "grad", 1), -5)
    assert verified(tmp_path / "trace.zarr").bad_chunks == [1]


def test_verify_chunks_of_an_unfinished_store_reads_what_is_done(tmp_path: Path) -> None:
    header = make_header()
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, make_rows(header), 1)
    found = verified(writer.path)
    assert (found.damages, found.complete, found.done, found.files) == ([], False, 1, 5)
    assert found.notes == ["The store is unfinished: 1 of 3 chunks are done."]
