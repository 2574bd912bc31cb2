"""Creates a store, or resumes one, and writes its chunks.

Each process owns whole chunks and writes each once, in this order: its files; fsync of them and of the folders that
name them; then its mark, fsynced likewise. A chunk is done when its mark is there, so whenever a capture is killed, the
next one writes every chunk without a mark again.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError
from dmin_trace.store.chunks import DONE, Array, done_chunks, is_done
from dmin_trace.store.files import check_free, make_folder, sync, sync_tree, writing
from dmin_trace.store.header import MAX_SAMPLE_INDEX, ColumnKind, Header
from dmin_trace.store.identity import check_capture
from dmin_trace.store.layout import (
    CHECKSUM_BYTES,
    MISSING,
    STORED,
    THUMBNAILS,
    ArrayLayout,
    array_layouts,
    chunk_file,
    chunk_names,
)
from dmin_trace.store.metadata import BLOSC, Finished, check_with_zarr, create_arrays, read_header, set_finished
from dmin_trace.store.reader import open_store
from dmin_trace.store.untrusted import size_within

PARALLEL_SYNCS = 16
"""Files and folders of a chunk that are synced at once."""

Data = bytes | NDArray[np.uint8]
Columns = Mapping[str, Sequence[str | int | float | None]]


class Writer:
    """Writes the chunks of a store that exists, each once and whole; made by `create` and `resume`."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._layouts = array_layouts(header)
        self._synced: set[str] = set()

    def pending(self) -> list[int]:
        """The chunks that are not done."""
        return [chunk for chunk, done in enumerate(done_chunks(self.path, self.header)) if not done]

    def write(
        self,
        chunk: int,
        values: Array,
        scale: Array,
        norm: Array,
        loss: Array,
        sample: Array,
        columns: Columns,
        thumbnails: Sequence[bytes] = (),
    ) -> None:
        """Writes one chunk, of n rows, and marks it done.

        Args:
            values, scale: (n, R, v) of the header's dtype and (n, R) float32, from `quantise`.
            norm, loss: (n, R) and (n, T) float32.
            sample: (n,) int64, data set indices of at most MAX_SAMPLE_INDEX.
            columns: n values for each of the header's columns; None where a sample has none.
            thumbnails: n WebP files, empty for a sample without one; none if the header has no thumbnails.

        Raises TraceError if a shape, dtype or index is wrong, the chunk is done, or the disk refuses.
        """
        header, layouts = self.header, self._layouts
        right = (len(header.rows(chunk)), header.gradient_count, header.dimension)
        given = [("gradients", values.shape, right), ("sample", np.shape(sample), right[:1])]
        given += [(name, found.shape, right[:2]) for name, found in (("norms", norm), ("scales", scale))]
        given += [("losses", loss.shape, (right[0], len(header.timesteps)))]
        given += [(f"column {name}", (len(columns.get(name, ())),), right[:1]) for name in header.columns]
        pictures = 0 if header.thumbnails is None else right[0]
        given += [("thumbnails", (len(thumbnails),), (pictures,))]
        for name, shape, expected in given:
            if shape != expected:
                raise TraceError(f"Chunk {chunk} was given {name} of shape {shape}; expected {expected}.")
        if values.dtype != header.dtype:
            raise TraceError(f"Chunk {chunk} was given {values.dtype} numbers; expected {header.dtype}.")
        if (largest := int(np.abs(sample).max())) > MAX_SAMPLE_INDEX:
            raise TraceError(f"Chunk {chunk} was given the sample {largest}; expected at most {MAX_SAMPLE_INDEX}.")
        # Its own mark alone: reading the marks of all chunks for each one would take longer than writing it.
        if not 0 <= chunk < header.chunks or is_done(self.path, chunk):
            raise TraceError(f"Chunk {chunk} is no chunk of {self.path} that is still to be written.")
        try:
            for name in layouts:
                # A store that is resumed can come from anybody: nothing is written where a link leads.
                size_within(self.path, chunk_names(name, chunk))
        except ValueError as error:
            raise TraceError(f"{self.path} is damaged: {error}. A store holds none.") from None
        table = np.concatenate([np.reshape(sample, (-1, 1)), norm, loss, scale], axis=1, dtype=np.float64)
        try:
            files = {"grad": _encoded(values, layouts["grad"]), "numbers": _encoded(table, layouts["numbers"])}
            for name, kind in header.columns.items():
                files[f"meta/{name}"] = _encoded_column(columns[name], kind, layouts[f"meta/{name}"])
            if pictures:
                files[THUMBNAILS] = _of_any_length(thumbnails, layouts[THUMBNAILS])
            self._write_files(chunk, files)
            self._write_files(chunk, {"done": DONE[:-CHECKSUM_BYTES]})
        except OSError as error:
            raise TraceError(
                f"Chunk {chunk} of {self.path} cannot be written: {error.strerror or error}. Make room and run the "
                "capture again on demand (dmin-trace capture); what is done is kept."
            ) from None

    def finish(self) -> None:
        """Marks the store complete. Raises TraceError if a chunk is not done, or if the store is damaged."""
        if pending := self.pending():
            raise TraceError(f"{self.path} is unfinished: {len(pending)} of {self.header.chunks} chunks are not done.")
        store = open_store(self.path, unfinished=True)
        finished = Finished(state=store.compute_state(), valid_count=int(store.valid.sum()))
        with writing(self.path):
            # What killed writers left. Nobody else writes: every chunk is done.
            for left in self.path.rglob("*.partial"):
                left.unlink(missing_ok=True)
            set_finished(self.path, finished)

    def _write_files(self, chunk: int, files: Mapping[str, Data]) -> None:
        """Writes a chunk's file of each of these arrays, and waits until the disk keeps them."""
        paths: dict[Path, None] = {}
        for name, data in files.items():
            top = self.path / name
            file = chunk_file(self.path, name, chunk)
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renamed, since a reader may still have mapped an older file of this chunk.
            partial = file.with_name(f"{file.name}.partial")
            try:
                with partial.open("wb") as opened:
                    opened.write(data if isinstance(data, bytes) else data.data)
                    opened.write(google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little"))
                partial.replace(file)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            # A new file is kept only if the folders that name it are.
            folders = [folder for folder in file.parents if folder.is_relative_to(top) and folder != top]
            paths |= dict.fromkeys([file, *folders, *([] if name in self._synced else [top])])
        # All together, which a disk takes as one or two commits: one after another, each would wait for its own.
        with ThreadPoolExecutor(PARALLEL_SYNCS) as pool:
            list(pool.map(sync, paths))
        self._synced.update(files)


def create(path: Path, header: Header) -> Writer:
    """Makes an empty store, whole or not at all. Raises TraceError if `path` is taken or read-only, or `header` bad."""
    check_free(path)
    Header.from_attributes(header.to_attributes(), path)
    partial = path.with_name(f".{path.name}.{header.id}.partial")
    with writing(path):
        try:
            make_folder(path.parent)
            create_arrays(partial, header)
            check_with_zarr(partial, header)
            sync_tree(partial)
            partial.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Writer(path, header)


def resume(path: Path, header: Header) -> Writer:
    """Opens an unfinished store, to resume it. Raises TraceError if it is of another capture."""
    existing = read_header(path)[0]
    check_capture(path, existing, header)
    return Writer(path, existing)


def _encoded(values: Array, layout: ArrayLayout) -> Data:
    """A chunk's numbers as Zarr stores them: padded to C rows, little-endian, in C order, and packed if need be."""
    if len(values) < layout.chunks[0]:
        padded = np.full(layout.chunks, layout.fill, layout.dtype)
        padded[: len(values)] = values
        values = padded
    values = np.ascontiguousarray(values, np.dtype(layout.dtype).newbyteorder("<"))
    if not layout.packed:
        return values.reshape(-1).view(np.uint8)
    from numcodecs.blosc import Blosc

    packed: bytes = Blosc(**{**BLOSC, "shuffle": Blosc.BITSHUFFLE}).encode(values)
    return packed


def _encoded_column(values: Sequence[str | int | float | None], kind: ColumnKind, layout: ArrayLayout) -> Data:
    """A chunk of a readable column as Zarr stores it."""
    known = [MISSING[kind] if value is None else value for value in values]
    if kind == "string":
        # UTF-8 has no lone surrogates.
        return _of_any_length([str(value).encode("utf-8", "replace") for value in known], layout)
    if kind == "integer":
        known = [value if abs(value) < 2**63 else -1 for value in map(int, known)]
    return _encoded(np.array(known, dtype=STORED[kind]), layout)


def _of_any_length(values: Sequence[bytes], layout: ArrayLayout) -> bytes:
    """A chunk of texts or bytes as Zarr stores it, padded to C of them: `ChunkFiles` says how."""
    padded = [*values, *[b""] * (layout.chunks[0] - len(values))]
    return b"".join([len(padded).to_bytes(4, "little"), *(len(one).to_bytes(4, "little") + one for one in padded)])
