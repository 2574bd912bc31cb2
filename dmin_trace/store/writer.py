"""Creates a store, goes on with one, and writes its chunks.

Each process owns whole chunks and writes each once, in this order: its files; fsync of them and of the folders that
name them; then its mark, fsynced likewise. A chunk is done when its mark is there, so whenever a capture is killed, the
next one writes every chunk without a mark again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError, brief
from dmin_trace.store import untrusted
from dmin_trace.store.files import check_free, make_folder, sync, sync_tree
from dmin_trace.store.header import MAX_SAMPLE_INDEX, ColumnKind, Header
from dmin_trace.store.layout import (
    CHECKSUM_BYTES,
    MISSING,
    STORED,
    ArrayLayout,
    array_layouts,
    chunk_file,
    chunk_names,
)
from dmin_trace.store.marks import DONE, done_chunks, is_done
from dmin_trace.store.metadata import BLOSC, Finished, check_with_zarr, create_arrays, read_header, set_finished
from dmin_trace.store.provenance import check_data
from dmin_trace.store.reader import open_store

PARALLEL_SYNCS = 16
"""Files and folders of a chunk that are synced at once."""
MAY_DIFFER = ("id", "writers", "script", "script_sha256", "data_sha256", "unreached")
"""Attributes in which two runs of one capture may differ. Script and data are compared where both are known."""

Array = NDArray[Any]
Data = bytes | NDArray[np.uint8]


def create(path: Path, header: Header) -> Writer:
    """Makes an empty store, whole or not at all.

    Raises TraceError if something exists at `path`, if the folder cannot be written, or if readers would refuse the
    header.
    """
    check_free(path)
    Header.from_attributes(header.to_attributes(), path)
    partial = path.with_name(f".{path.name}.{header.id}.partial")
    try:
        make_folder(path.parent)
        create_arrays(partial, header)
        check_with_zarr(partial, header)
        sync_tree(partial)
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TraceError(f"{path} cannot be written: {error.strerror or error}.") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Writer(path, header)


def resume(path: Path, header: Header) -> Writer:
    """Opens an unfinished store of the same capture, to write the chunks that are not done.

    Raises TraceError if the store is of another capture. Id and writers may differ, and the script, which
    `check_script` compares.
    """
    existing = read_header(path)[0]
    check_data(path, existing, header.samples, header.data_sha256)
    found, expected = (_flat(facts.to_attributes()) for facts in (existing, header))
    for name in sorted(found | expected):
        if name.split(".")[0] not in MAY_DIFFER and found.get(name, "missing") != expected.get(name, "missing"):
            raise TraceError(
                f"{path} belongs to another capture: its {name} is {brief(found.get(name, 'missing'))}, that of this "
                f"run is {brief(expected.get(name, 'missing'))}. Give another path (--out), or move it away."
            )
    return Writer(path, existing)


class Writer:
    """Writes a store's chunks, each once and whole."""

    def __init__(self, path: Path, header: Header) -> None:
        """For a store that exists; made by `create` and `resume`."""
        self.path = path
        self.header = header
        self._layouts = array_layouts(header)
        self._synced: set[str] = set()

    @property
    def chunks(self) -> int:
        """The number of chunks, done or not."""
        return self.header.chunks

    def rows(self, chunk: int) -> range:
        """The rows of a chunk. The last chunk may hold fewer than R."""
        return self.header.rows(chunk)

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
        columns: Mapping[str, Sequence[str | int | float | None]],
    ) -> None:
        """Writes one chunk and marks it done.

        Args:
            chunk: its number.
            values, scale: (n, T, v) of the header's dtype and (n, T) float32, from `quantise`; n is R, or less in the
                last chunk.
            norm, loss: (n, T) float32.
            sample: (n,) int64, data set indices of at most 2^53, up to which float64 holds every integer.
            columns: n values for each of the header's columns; None where a sample has none.

        Raises:
            TraceError: the values are not of the chunk's shape or dtype, an index is too large, the chunk is done, or
                the disk refuses.
        """
        header = self.header
        rows = header.rows(chunk)
        expected = (len(rows), len(header.timesteps), header.dimension)
        given = {"gradients": (values.shape, expected), "sample": (np.shape(sample), expected[:1])}
        for name, numbers in (("norms", norm), ("losses", loss), ("scales", scale)):
            given[name] = (numbers.shape, expected[:2])
        given |= {f"column {name}": ((len(columns.get(name, ())),), expected[:1]) for name in header.columns}
        for name, (shape, right) in given.items():
            if shape != right:
                raise TraceError(f"Chunk {chunk} was given {name} of shape {shape}; expected {right}.")
        if values.dtype != header.dtype:
            raise TraceError(f"Chunk {chunk} was given {values.dtype} numbers; expected {header.dtype}.")
        if (largest := int(np.abs(sample).max())) > MAX_SAMPLE_INDEX:
            raise TraceError(f"Chunk {chunk} was given the sample {largest}; expected at most {MAX_SAMPLE_INDEX}.")
        # Its own mark alone: reading the marks of all chunks for each one would take longer than writing it.
        if not 0 <= chunk < header.chunks or is_done(self.path, chunk):
            raise TraceError(f"Chunk {chunk} is no chunk of {self.path} that is still to be written.")
        try:
            for name, layout in self._layouts.items():
                # A store that is resumed can come from anybody: nothing is written where a link leads.
                untrusted.size_within(self.path, chunk_names(name, chunk, len(layout.shape)))
        except ValueError as error:
            raise TraceError(f"{self.path} is damaged: {error}. A store holds none.") from None
        table = np.concatenate([np.reshape(sample, (-1, 1)), norm, loss, scale], axis=1, dtype=np.float64)
        arrays: dict[str, Array] = {"grad": values, "numbers": table}
        try:
            files = {name: _encoded(array, self._layouts[name]) for name, array in arrays.items()}
            for name, kind in header.columns.items():
                files[f"meta/{name}"] = _encoded_column(columns[name], kind, self._layouts[f"meta/{name}"])
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
        try:
            # What killed writers left. Nobody else writes: every chunk is done.
            for left in self.path.rglob("*.partial"):
                left.unlink(missing_ok=True)
            set_finished(self.path, finished)
        except OSError as error:
            raise TraceError(f"{self.path} cannot be written: {error.strerror or error}.") from None

    def _write_files(self, chunk: int, files: Mapping[str, Data]) -> None:
        """Writes a chunk's file of each of these arrays, and waits until the disk keeps them."""
        paths: dict[Path, None] = {}
        for name, data in files.items():
            top, file = self.path / name, chunk_file(self.path, name, chunk, len(self._layouts[name].shape))
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


def _encoded(values: Array, layout: ArrayLayout) -> Data:
    """A chunk's numbers as Zarr stores them: padded to R rows, little-endian, in C order, and packed if its layout
    says so."""
    if len(values) < layout.chunks[0]:
        padded = np.full(layout.chunks, layout.fill, layout.dtype)
        padded[: len(values)] = values
        values = padded
    values = np.ascontiguousarray(values, np.dtype(layout.dtype).newbyteorder("<"))
    if not layout.packed:
        return values.reshape(-1).view(np.uint8)
    from numcodecs.blosc import Blosc

    codec = Blosc(**{**BLOSC, "shuffle": Blosc.BITSHUFFLE})
    packed: bytes = codec.encode(values)
    return packed


def _encoded_column(values: Sequence[str | int | float | None], kind: ColumnKind, layout: ArrayLayout) -> Data:
    """A chunk of a readable column as Zarr stores it; texts as `ChunkFiles.texts` says."""
    known = [MISSING[kind] if value is None else value for value in values]
    if kind == "string":
        # UTF-8 has no lone surrogates.
        texts = [str(value).encode("utf-8", "replace") for value in known] + [b""] * (layout.chunks[0] - len(known))
        sized = [len(text).to_bytes(4, "little") + text for text in texts]
        return len(texts).to_bytes(4, "little") + b"".join(sized)
    if kind == "integer":
        known = [value if abs(value) < 2**63 else -1 for value in map(int, known)]
    return _encoded(np.array(known, dtype=STORED[kind]), layout)


def _flat(attributes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Attributes of attributes by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in attributes.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
