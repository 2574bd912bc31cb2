"""Finds damage: compares every checksum of a store, and takes away the marks of what a capture is to make anew."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np

from dmin_trace.errors import TraceError
from dmin_trace.store.chunks import INTACT, done_chunks, remove_marks
from dmin_trace.store.files import writing
from dmin_trace.store.header import Header
from dmin_trace.store.layout import CHECKSUM_BYTES, FAILED, array_layouts, chunk_file, chunk_names
from dmin_trace.store.lock import StoreLock
from dmin_trace.store.metadata import Finished, damaged_metadata, read_header, restore_metadata, set_finished
from dmin_trace.store.processor_cores import core_count
from dmin_trace.store.reader import Store, open_store
from dmin_trace.store.untrusted import size_of, size_within

BLOCK_BYTES = 2**20
"""Bytes that are read at a time: they are in a core's cache when their checksum is taken."""
MAX_LISTED_MARKS = 10_000
"""Missing marks that are named: a header can claim millions."""
PARALLEL_READS = 8
"""Files that are read in parallel; the throughput of a disk grows with the depth of its queue."""

Progress = Callable[[int, int], None]
"""Called with the number of bytes that were compared, and of all bytes."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not what was written.

    file, what: its path from the folder in which the store lies, and what is wrong with it.
    array, chunk: those that it holds; the array alone if it is metadata.
    rows, samples: the rows that are lost with it, and their data set indices, if those can be read.
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

    complete, chunks, done: see `Store.complete`; how many chunks the store has, and how many are done.
    files, bytes: how many were compared.
    damages, notes: what is damaged, in the order of the files; and what is no damage, but should be known.
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


def verify_chunks(path: Path, header: Header, finished: Finished | None, progress: Progress | None = None) -> Verified:
    """Compares a store's metadata, marks, and files of done chunks. Raises TraceError if a link leads to the marks."""
    done = done_chunks(path, header)
    store = Store(path, header, done, finished)
    found = Verified(complete=store.complete, chunks=header.chunks, done=int(done.sum()))
    for name, what in damaged_metadata(path, header).items():
        found.damages.append(Damage(file=f"{path.name}/{name}/zarr.json", array=name, what=what))
    undone = np.flatnonzero(~done)
    if finished is not None and len(undone) > MAX_LISTED_MARKS:
        found.notes.append(f"{len(undone):,} chunks have no mark; the first {MAX_LISTED_MARKS:,} are listed.")
    for chunk in map(int, undone[:MAX_LISTED_MARKS]):
        marked = chunk_file(path, "done", chunk).exists()
        if finished is not None or marked:
            what = "is not the mark of a chunk that is done" if marked else "is missing"
            found.damages.append(_chunk_damage(store, "done", chunk, what))
    layouts = {name: layout for name, layout in array_layouts(header).items() if name != "done"}
    places = [(name, chunk) for chunk in store.chunks_done for name in layouts]
    sizes = [size_of(path, chunk_names(*place)) or 0 for place in places]
    found.files, of = len(places), sum(sizes)
    with ThreadPoolExecutor(max(PARALLEL_READS, core_count())) as pool:
        compared = pool.map(lambda place: _file_damage(path, chunk_names(*place), layouts[place[0]].file_bytes), places)
        for place, size, what in zip(places, sizes, compared, strict=True):
            found.bytes += size
            if what:
                found.damages.append(_chunk_damage(store, *place, what))
            if progress is not None:
                progress(found.bytes, of)
    if finished is None:
        found.notes.append(f"The store is unfinished: {found.done} of {found.chunks} chunks are done.")
    elif not found.damages and store.compute_state() != store.state:
        what = "does not hold the state of these chunks: some are not those with which the store was finished"
        found.damages.append(Damage(file=f"{path.name}/zarr.json", what=what))
    return found


def drop_damaged(path: Path) -> list[int]:
    """Takes away the marks of damaged chunks, so that a capture makes them anew, and returns their numbers.

    Damaged metadata of arrays is written anew here. Raises TraceError if there is no store, its header is damaged, a
    capture is writing it, or the disk refuses.
    """
    header, finished = read_header(path)
    found = verify_chunks(path, header, finished)
    _drop(path, header, found.bad_chunks, found.bad_arrays)
    return found.bad_chunks


def drop_failed(path: Path) -> list[int]:
    """As `drop_damaged`, for chunks with samples that could not be loaded. Raises TraceError if numbers are damaged."""
    store = open_store(path, unfinished=True)
    failed = np.flatnonzero((store.norm == FAILED).any(axis=1))
    chunks: list[int] = np.unique(failed // store.header.chunk_rows).tolist()
    _drop(path, store.header, chunks, [])
    return chunks


def _drop(path: Path, header: Header, chunks: Sequence[int], arrays: Sequence[str]) -> None:
    if not chunks and not arrays:
        return
    lock = StoreLock(path.absolute())
    lock.take()
    try:
        with writing(path):
            restore_metadata(path, header, arrays)
            if chunks:
                # The marks go first: killed at any moment, a store that lacks one is not complete.
                remove_marks(path, chunks)
                set_finished(path, None)
    finally:
        lock.release()


def _file_damage(path: Path, names: Sequence[str], expected: int | None) -> str:
    """What is wrong with the file of a done chunk; "" if nothing is."""
    try:
        size = size_within(path, names)
        if size is None or (size != expected if expected is not None else size < CHECKSUM_BYTES):
            return f"has {size or 0} bytes" + ("" if expected is None else f", expected {expected}")
        crc, block = 0, np.empty(BLOCK_BYTES, np.uint8)
        with path.joinpath(*names).open("rb", buffering=0) as opened:
            while read := opened.readinto(block.data):
                crc = google_crc32c.extend(crc, block[:read])
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    return "" if crc == INTACT else "does not have the numbers of its checksum"


def _chunk_damage(store: Store, name: str, chunk: int, what: str) -> Damage:
    samples: tuple[int, ...] = ()
    if name != "numbers" and store.done[chunk]:
        with suppress(TraceError, OSError):
            samples = tuple(store.numbers_of(chunk).sample.tolist())
    file, rows = "/".join([store.path.name, *chunk_names(name, chunk)]), store.header.rows(chunk)
    return Damage(file=file, what=what, array=name, chunk=chunk, rows=rows, samples=samples)
