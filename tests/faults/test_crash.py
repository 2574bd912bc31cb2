"""A crash between any two operations of a commit: nothing torn is ever trusted, nothing done is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from captures import content
from crashes import crashes, go_on, record, wrong
from disk import build
from stores import make_header

from dmin_trace.store import files, writer

HEADER = make_header(samples=6, dtype="float32", timesteps=2, columns={"caption": "string"})


def test_a_crash_between_any_two_operations_leaves_a_store_that_is_right(tmp_path: Path) -> None:
    disk = record(tmp_path / "whole", HEADER)
    expected = content(tmp_path / "whole" / "trace.zarr")
    assert {operation.kind for operation in disk.operations} == {"make", "write", "move", "sync"}
    checked = finished = 0
    for point, mode, place in crashes(disk, tmp_path, seeds=1):
        assert not wrong(place, expected, disk.promised(point)), (point, mode, disk.operations[point - 1])
        checked += 1
        if checked % 25 == 0:
            finished += 1
            go_on(place / "trace.zarr", HEADER)
            assert content(place / "trace.zarr") == expected, (point, mode)
            assert [left.name for left in place.iterdir()] == ["trace.zarr"]
    assert checked > 2 * len(disk.operations) > 200 and finished > 5


@pytest.mark.parametrize("left_out", ["of files", "of folders", "of the new store", "of what names the store"])
def test_without_a_sync_before_a_commit_the_same_crashes_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """Takes the protection out: the syncs before the mark of a chunk, and those before and after a store's naming."""
    real = files.sync

    def sync(path: Path) -> None:
        of_chunk = "c" in path.parts and "done" not in path.parts
        leaving = {
            "of files": of_chunk and path.is_file(),
            "of folders": of_chunk and path.is_dir(),
            "of the new store": ".partial" in str(path),
            "of what names the store": path == tmp_path / "whole",
        }
        if not leaving[left_out]:
            real(path)

    for module in (files, writer):
        monkeypatch.setattr(module, "sync", sync)
    disk = record(tmp_path / "whole", HEADER)
    expected = content(tmp_path / "whole" / "trace.zarr")
    found = (wrong(place, expected, disk.promised(point)) for point, _, place in crashes(disk, tmp_path, seeds=1))
    words = {
        "of files": "is marked done, but its",
        "of folders": "is marked done, but its",
        "of the new store": "cannot be opened",
        "of what names the store": "the store is gone",
    }
    assert words[left_out] in next(said for said in found if said)


def test_the_recorded_writes_are_all_of_them(tmp_path: Path) -> None:
    """Played back, in full or as far as they were synced, they give the store itself."""
    disk = record(tmp_path / "whole", HEADER)
    for mode in ("all", "synced"):
        (tmp_path / mode).mkdir()
        build(disk.state(len(disk.operations), mode), tmp_path / mode)
        assert content(tmp_path / mode / "trace.zarr") == content(tmp_path / "whole" / "trace.zarr")
