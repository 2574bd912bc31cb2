"""Finds what has rotted: compares every checksum of a store, of its index, and of the weights beside it.

    store, index, weights -> Verified -> report, or a capture that repairs

Readers compare what they use (`store`). This reads everything, as fast as the disk gives it, and names all that is not
what was written, down to the chunk and the samples in it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np

from dmin_trace.errors import TraceError
from dmin_trace.store import reader as store
from dmin_trace.store import untrusted
from dmin_trace.store.header import Header
from dmin_trace.store.reader import TRAILER, Store

logger = logging.getLogger(__name__)

BLOCK = 2**20
"""Bytes that are read at a time: they are in a core's cache when their checksum is taken."""
THREADS = 8
"""Files that are read at a time; a disk gives the more the more it is asked for."""

Progress = Callable[[int, int], None]
"""Called with the bytes that were compared, and those that there are."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not what was written.

    file: its path from the folder in which the store lies.
    array, chunk: what it is of, if it is a chunk's.
    rows: the rows of the store that are lost with it.
    samples: their dataset indices, if those can still be read.
    what: what is wrong with it.
    """

    file: str
    what: str
    array: str = ""
    chunk: int | None = None
    rows: range = range(0)
    samples: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Verified:
    """What was compared, and what was found.

    complete: whether the store says that it is finished, and all its marks are there.
    chunks, done: of the store.
    files, bytes: how many were compared.
    damages: in the order of the files.
    notes: what is no damage, but to be known.
    """

    complete: bool = False
    chunks: int = 0
    done: int = 0
    files: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bad_chunks(self) -> list[int]:
        """The numbers of the chunks of which a file or the mark is damaged."""
        return sorted({damage.chunk for damage in self.damages if damage.chunk is not None})

    @property
    def bad_arrays(self) -> list[str]:
        """The arrays and groups whose metadata is damaged."""
        return [damage.array for damage in self.damages if damage.chunk is None and damage.array]


def verify_chunks(path: Path, header: Header, complete: bool, *, progress: Progress | None = None) -> Verified:
    """The same of the store's arrays alone: their metadata, their marks, and every file of a chunk that is done."""
    done = store.marks(path, header)
    trace = Store(path, header, complete, done)
    found = Verified(complete=complete and bool(done.all()), chunks=header.chunks, done=int(done.sum()))
    for name, what in store.damaged_arrays(path, header):
        found.damages.append(Damage(file=f"{path.name}/{name}/zarr.json", array=name, what=what))
    found.damages += [
        _bad_mark(trace, int(chunk)) for chunk in np.flatnonzero(~done) if complete or _marked(path, int(chunk))
    ]
    files = {
        (name, chunk): size_of(path, store.chunk_names(name, chunk, axes))
        for chunk in trace.chunks_done
        for name, (axes, _) in store.chunk_bytes(header).items()
    }
    of = sum(size or 0 for size in files.values())
    memory = threading.local()

    def compare(place: tuple[str, int]) -> str:
        name, chunk = place
        if not hasattr(memory, "block"):
            memory.block = np.empty(BLOCK, np.uint8)
        axes, expected = store.chunk_bytes(header)[name]
        try:
            size = untrusted.size_within(path, store.chunk_names(name, chunk, axes))
            if size is None or (size != expected if expected is not None else size < TRAILER):
                return f"has {size or 0} bytes" + ("" if expected is None else f", expected {expected}")
            return _compare(store.chunk_file(path, name, chunk, axes), size, memory.block)
        except (OSError, ValueError) as error:
            return f"cannot be read ({error})"

    with ThreadPoolExecutor(max(THREADS, os.cpu_count() or 1)) as pool:
        for place, what in zip(files, pool.map(compare, files), strict=True):
            found.files += 1
            found.bytes += files[place] or 0
            if what:
                found.damages.append(_bad_chunk(trace, *place, what))
            if progress is not None:
                progress(found.bytes, of)
    if not complete:
        found.notes.append(f"The store is unfinished: {found.done} of {found.chunks} chunks are done.")
    return found


def mendable(path: Path) -> list[int]:
    """The damaged chunks of the store at `path`, which a capture can make anew, with the arrays' metadata mended; where
    none is damaged, those with samples that could not be loaded.

    Raises TraceError if there is damage that no capture mends.
    """
    header, complete = store.read_header(path)
    found = verify_chunks(path, header, complete)
    if found.bad_arrays:
        store.restore_arrays(path, header, found.bad_arrays)
        logger.warning("The metadata of %s in %s was damaged, and is made anew.", ", ".join(found.bad_arrays), path)
    chunks = found.bad_chunks
    if not chunks:
        slots = store.open_store(path, unfinished=True).rows_failed
        chunks = sorted({int(slot) // header.chunk_rows for slot in slots})
        again = "" if not chunks else f" {len(slots)} samples could not be loaded, and their chunks are made anew."
        logger.warning("No chunk of %s is damaged: %d files were compared.%s", path, found.files, again)
        return chunks
    logger.warning("%d of %d chunks of %s are damaged, and are made anew.", len(chunks), found.chunks, path)
    return chunks


def size_of(path: Path, names: list[str] | None = None) -> int | None:
    """The size of a file of the store, its metadata if no other is named; None if it is none, or reached by a link."""
    try:
        return untrusted.size_within(path, names or ["zarr.json"])
    except ValueError:
        return None


def _compare(file: Path, size: int, block: np.ndarray) -> str:
    """Reads a chunk's file; what is wrong with it, or ""."""
    crc, left = 0, size - TRAILER
    with file.open("rb", buffering=0) as opened:
        while left:
            read = opened.readinto(block[: min(left, BLOCK)].data)
            if not read:
                return "became shorter while read"
            crc = google_crc32c.extend(crc, block[:read])
            left -= read
        trailer = opened.read(TRAILER)
    return "" if crc == int.from_bytes(trailer, "little") else "does not have the numbers of its checksum"


def _marked(path: Path, chunk: int) -> bool:
    return store.chunk_file(path, "done", chunk, 1).exists()


def _bad_mark(trace: Store, chunk: int) -> Damage:
    what = "is not the mark of a chunk that is done" if _marked(trace.path, chunk) else "is gone"
    return _bad_chunk(trace, "done", chunk, what)


def _bad_chunk(trace: Store, name: str, chunk: int, what: str) -> Damage:
    axes = 1 if name == "done" else store.chunk_bytes(trace.header)[name][0]
    rows = trace.header.rows(chunk)
    samples: tuple[int, ...] = ()
    if name != "sample" and trace.done[chunk]:
        try:
            samples = tuple(int(sample) for sample in trace.samples_of(chunk))
        except (TraceError, OSError):
            samples = ()
    return Damage(
        file="/".join([trace.path.name, *store.chunk_names(name, chunk, axes)]),
        array=name,
        chunk=chunk,
        rows=rows,
        samples=samples,
        what=what,
    )
