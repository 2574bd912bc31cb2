"""The writes of a store, recorded, and what must be true of every state that a crash may leave of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from disk import Disk, Mode, build, recording
from stores import make_rows, write

from dmin_trace.errors import TraceError
from dmin_trace.store import Header, create, open_store, resume, sweep


def record(folder: Path, header: Header) -> Disk:
    """Creates a store, writes its chunks, the first last, and finishes it."""
    folder.mkdir()
    with recording(folder) as disk:
        writer = create(folder / "trace.zarr", header)
        disk.returned["create"] = len(disk.operations)
        for chunk in [*range(1, header.chunks), 0]:
            write(writer, make_rows(header), chunk)
            disk.returned[str(chunk)] = len(disk.operations)
        writer.finish()
        disk.returned["finish"] = len(disk.operations)
    return disk


def crashes(disk: Disk, folder: Path, seeds: int) -> Iterator[tuple[int, Mode, Path]]:
    """Every state that a crash may leave, each in a folder of its own, which is removed afterwards."""
    for number, (point, mode, state) in enumerate(disk.states(seeds)):
        place = folder / f"crash{number}"
        place.mkdir()
        build(state, place)
        yield point, mode, place
        shutil.rmtree(place)


def wrong(place: Path, expected: dict[str, bytes], promised: list[str]) -> str:
    """What is wrong with what a crash left, or nothing.

    Args:
        place: the folder around the store.
        expected: the files of an undisturbed store.
        promised: what had returned before the crash.
    """
    path = place / "trace.zarr"
    if not path.exists():
        return "the store is gone, though its creation had returned" if "create" in promised else ""
    try:
        trace = open_store(path, unfinished=True)
    except TraceError as error:
        return f"cannot be opened: {error}"
    found = set(trace.chunks_done)
    if lost := {int(name) for name in promised if name.isdecimal()} - found:
        return f"chunks {lost} are lost, though their writes had returned"
    if "finish" in promised and not trace.complete:
        return "is not complete, though that had been said"
    for chunk in found:
        for name in (name for name in expected if f"/c/{chunk}/" in f"{name}/"):
            if not (path / name).is_file() or (path / name).read_bytes() != expected[name]:
                return f"chunk {chunk} is marked done, but its {name} is not what was written"
    return ""


def go_on(path: Path, header: Header) -> None:
    """Finishes whatever is there, as a capture does."""
    sweep(path)
    header = dataclasses.replace(header, id="f" * 32)
    writer = resume(path, header) if path.exists() else create(path, header)
    for chunk in writer.pending():
        write(writer, make_rows(header), chunk)
    writer.finish()
