"""The Zarr store: create, write, resume, open, map.

One Zarr v3 group. Rows are slots; slot -> dataset index is the array `sample`. Each process owns whole chunks of R
slots, writes each once, and marks it done last: grad, scale, norm, loss, sample, meta; fsync; done. Readers go by
`done`, never by fill values, and a resumed capture writes every chunk that is not done anew.

Random projections do not compress, so chunks are stored raw with a crc32c behind them: the file of a chunk is the
C-order array and 4 bytes, ordinary Zarr for every other reader, and read by memory map here. A store for an archive
may pack the chunks of `grad` with Blosc, Zarr's own codec, all the same: then they are unpacked one at a time.

    trace.zarr/   attributes: the Header, and complete
      grad    (N, T, v) int8 | float16 | float32     chunks (R, T, v)
      scale   (N, T) float32, for int8               norm, loss  (N, T) float32
      sample  (N,) int64                             done  (ceil(N / R),) uint8, one a chunk
      meta/   a column each, (N,): string, int64 or float64

A store can come from anybody: nothing in it is executed, no path is taken from it, a link in it is not followed, and
its shapes are checked against the files before anything is allocated. Zarr writes here and reads nothing: its pipeline
would believe the metadata.

And a store can rot. Every checksum is compared before what it is of is used: those of the small arrays whenever they
are read, that of a chunk of gradients when a process first reads it, or a row's own, which an index keeps. The metadata
has SHA-256 digests in the group's attributes. They find damage, not a forger, who writes them too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError, brief
from dmin_trace.settings import Dtype
from dmin_trace.store import untrusted
from dmin_trace.store.header import FRAME_HEADER, ColumnKind, Header

FORMAT = "dmin_trace"
VERSION = 1
CHUNK_BYTES = 2**24
SYNCS = 16
"""Files and folders of a chunk that the disk is asked to keep at once."""
TRAILER = 4
"""Bytes of crc32c behind each chunk."""
PACKING: dict[str, str | int] = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
"""Blosc's settings. A higher level gains a few per cent, at a hundredth of the speed."""
MOST_MAPS = 2**8
"""Chunks whose maps are kept: each holds an open file, and the user's process may have many of its own."""
FAILED = -1.0
"""The norm of a sample that could not be loaded: no gradient has it, and what has it is never ranked."""
UNSEEN = 2**20
"""Numbers that are allocated on the word of a header alone, for rows of which no file says anything."""
MOST_UNSEEN = 2**28
"""Numbers that are allocated at the most for rows of which few files say anything."""
DONE = b"\x01" + google_crc32c.value(b"\x01").to_bytes(TRAILER, "little")
"""The mark of a chunk that is done; anything else in its place is none."""
CHECKSUMS = "checksums"
"""The attribute that holds the digests of the metadata."""

MENDING = (
    "dmin-trace verify names all that is damaged. Restore the file from a copy, or make the chunk anew: dmin-trace "
    "capture --repair, or for a loop of your own recording(..., repair=True)."
)

Array = NDArray[Any]

_STORED: dict[ColumnKind, str] = {"string": "string", "integer": "int64", "number": "float64"}
_MISSING: dict[ColumnKind, str | int | float] = {"string": "", "integer": -1, "number": math.nan}


def choose_chunk_rows(samples: int, timesteps: int, dimension: int, dtype: Dtype, writers: int = 1) -> int:
    """R: a power of two, for chunks of about 16 MiB, and such that every writer has one."""
    fitting = max(1, CHUNK_BYTES // (timesteps * dimension * np.dtype(dtype).itemsize))
    return 1 << max(1, min(fitting, samples // writers)).bit_length() - 1


def bytes_of(header: Header) -> int:
    """The size of a store's numbers on disk, before there is one; its texts and metadata are little beside them."""
    kinds = {name: array for name, array in _arrays(header).items() if array.dtype != "string"}
    sizes = {name: math.prod(array.chunks) * np.dtype(array.dtype).itemsize + TRAILER for name, array in kinds.items()}
    # The last chunk is as long as the others, however few rows are in it.
    return sum(size * header.chunks for size in sizes.values())


def check_free(path: Path) -> None:
    """Raises TraceError if something is at `path` already, or if nothing could be written there."""
    parent = path.absolute().parent
    try:
        taken = path.exists() or path.is_symlink()
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        open_to_us = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}.") from None
    if taken:
        raise TraceError(
            f"{path} exists already and belongs to another run. Give another path (out, --out), or move it away."
        )
    if not open_to_us:
        raise TraceError(f"{path} cannot be written: {parent} is no folder that this user may write to.")


def create(path: Path, header: Header) -> Writer:
    """Makes an empty store, whole or not at all.

    Raises TraceError if something is there already, if the folder cannot be written, or if the header is one that no
    reader would take.
    """
    check_free(path)
    Header.from_attributes(header.to_attributes(), path)
    partial = path.with_name(f".{path.name}.{header.id}.partial")
    try:
        make_folder(path.parent)
        with _quiet_zarr():
            _create_arrays(partial, header)
        keep_digests(partial)
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


def make_folder(path: Path) -> None:
    """Makes a folder and those around it, and has the disk keep their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sweep(path: Path) -> None:
    """Removes what killed captures left beside the store at `path`: half-made stores, and weights.

    Only for who has the store's lock: nobody else is making one.
    """
    half_made = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.partial")
    for left in path.parent.iterdir():
        if half_made.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    weights = weights_beside(path)
    weights.with_name(f".{weights.name}.partial").unlink(missing_ok=True)


def check_script(path: Path, header: Header, name: str, sha256: str, what: str) -> None:
    """Raises TraceError if a script is another than that of the store at `path`, where both are known.

    Args:
        path: the store.
        header: its own.
        name, sha256: of the script that is to run.
        what: what to do about it.
    """
    if header.script_sha256 and sha256 and header.script_sha256 != sha256:
        raise TraceError(
            f"The script is not the one that made {path}: the SHA-256 of {name} is {sha256[:16]}, that of the trace's "
            f"{brief(header.script)} is {header.script_sha256[:16]}. {what}"
        )


def check_data(path: Path, header: Header, samples: int, sha256: str) -> None:
    """Raises TraceError if a data set is another than that of the store at `path`, as far as both are known."""
    theirs, ours = (f"it has {count:,} samples" for count in (header.samples, samples))
    if header.samples == samples and header.data_sha256 and sha256:
        theirs, ours = (f"the fingerprint of its content is {known[:16]}" for known in (header.data_sha256, sha256))
    if theirs != ours:
        raise TraceError(
            f"The data set is not the one that {path} is of. That of the trace: {theirs}; that of this run: {ours}. "
            "Give the same one, in the same order and with the same transforms; or another path (out, --out)."
        )


_MAY_DIFFER = ("id", "writers", "script", "script_sha256", "data_sha256", "unreached")
"""What does not make two captures different ones; script and data are checked where both sides know theirs."""


def resume(path: Path, header: Header) -> Writer:
    """Opens an unfinished store of the same capture, to write what is not done.

    Raises TraceError if the store is not of the same capture. Id and writers may differ, and the script, which is
    checked by `check_script`.
    """
    existing = read_header(path)[0]
    check_arrays(path, existing)
    check_data(path, existing, header.samples, header.data_sha256)
    found, expected = (_flat(facts.to_attributes()) for facts in (existing, header))
    for name in sorted(found | expected):
        if name.split(".")[0] not in _MAY_DIFFER and found.get(name, "missing") != expected.get(name, "missing"):
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
        self._arrays: dict[str, Any] = {}
        self._kept: set[Path] = set()

    @property
    def chunks(self) -> int:
        """How many chunks there are, done or not."""
        return self.header.chunks

    def rows(self, chunk: int) -> range:
        """The slots of a chunk; the last one may be short."""
        return self.header.rows(chunk)

    def pending(self) -> list[int]:
        """The chunks that are not done."""
        return [chunk for chunk, done in enumerate(marks(self.path, self.header)) if not done]

    def write(
        self,
        chunk: int,
        grad: Array,
        norm: Array,
        loss: Array,
        sample: Array,
        columns: Mapping[str, Sequence[str | int | float | None]],
    ) -> None:
        """Writes one chunk and marks it done.

        Args:
            chunk: its number.
            grad: (n, T, v) float32, the compressed gradients; n is R, or less in the last chunk.
            norm, loss: (n, T) float32.
            sample: (n,) int64, the dataset indices.
            columns: n values for each of the header's columns; None where a sample has none.

        Raises:
            TraceError: the values are not of the chunk's shape, the chunk is done, or the disk does not take it.
        """
        values, scale = quantise(np.ascontiguousarray(grad, np.float32), self.header.dtype)
        self.write_stored(chunk, values, scale, norm, loss, sample, columns)

    def write_stored(
        self,
        chunk: int,
        values: Array,
        scale: Array,
        norm: Array,
        loss: Array,
        sample: Array,
        columns: Mapping[str, Sequence[str | int | float | None]],
    ) -> None:
        """Writes one chunk of numbers that are quantised already (`quantise`), and marks it done.

        Args:
            chunk: its number.
            values: (n, T, v) of the header's dtype.
            scale: (n, T) float32; written for int8 alone.
            norm, loss, sample, columns: as for `write`.

        Raises:
            TraceError: as `write`.
        """
        header = self.header
        slots = header.rows(chunk)
        expected = (len(slots), len(header.timesteps), header.dimension)
        given = {"gradients": (values.shape, expected), "sample": (np.shape(sample), expected[:1])}
        given |= {"norms": (norm.shape, expected[:2]), "losses": (loss.shape, expected[:2])}
        given |= {"scales": (scale.shape, expected[:2])}
        given |= {f"column {name}": ((len(columns.get(name, ())),), expected[:1]) for name in header.columns}
        for name, (shape, right) in given.items():
            if shape != right:
                raise TraceError(f"Chunk {chunk} was given {name} of shape {shape}; expected {right}.")
        if values.dtype != header.dtype:
            raise TraceError(f"Chunk {chunk} was given {values.dtype} numbers; expected {header.dtype}.")
        # Its own mark alone: to look at all of them for each chunk would take longer than to write it.
        if not 0 <= chunk < header.chunks or _is_done(self.path, chunk):
            raise TraceError(f"Chunk {chunk} is no chunk of {self.path} that is still to be written.")
        # The order of the commit.
        arrays: dict[str, Array] = {"grad": values} | ({"scale": scale} if header.dtype == "int8" else {})
        arrays |= {"norm": norm, "loss": loss, "sample": sample}
        arrays |= {f"meta/{name}": _as_array(columns[name], kind) for name, kind in header.columns.items()}
        try:
            for name, values_of in {**arrays, "done": np.ones(1)}.items():
                # A store that is gone on with can come from anybody; nothing is written where it points to.
                untrusted.size_within(self.path, chunk_names(name, chunk, values_of.ndim))
        except ValueError as error:
            raise TraceError(f"{self.path} is damaged: {error}. A store has none in it.") from None
        try:
            self._write_chunks(chunk, arrays, slots)
            self._write_chunks(chunk, {"done": np.ones(1, np.uint8)}, range(chunk, chunk + 1))
        except OSError as error:
            raise TraceError(
                f"Chunk {chunk} of {self.path} cannot be written: {error.strerror or error}. Make room and run the "
                "capture again on demand (dmin-trace capture); what is done is kept."
            ) from None

    def prepare(self) -> None:
        """Opens the arrays, which the first `write` does otherwise: for one that is to write on another thread, since
        this changes the whole process's filters of warnings for a moment."""
        import zarr

        # Zarr by default writes no file for a chunk of fill values, such as one of samples that all lack a caption. It
        # looks here when an array is opened.
        with _quiet_zarr(), zarr.config.set({"array.write_empty_chunks": True}):
            for name in _arrays(self.header):
                self._arrays[name] = zarr.open_array(self.path / name, mode="r+", zarr_format=3)

    def _write_chunks(self, chunk: int, arrays: Mapping[str, Array], slots: range) -> None:
        """Writes one chunk of each of these arrays, and has the disk keep them."""
        if not self._arrays:
            self.prepare()
        for name, values in arrays.items():
            self._arrays[name][slots.start : slots.stop] = values
        # New files are kept only if the folders that name them are. All together, which a disk takes as one or two
        # commits: one after the other, each would wait for its own.
        paths: dict[Path, None] = {}
        for name, values in arrays.items():
            file, top = chunk_file(self.path, name, chunk, values.ndim), self.path / name
            new = [file, *(folder for folder in file.parents if folder.is_relative_to(top) and folder != top)]
            paths.update(dict.fromkeys(new if top in self._kept else [*new, top]))
        with ThreadPoolExecutor(SYNCS) as pool:
            list(pool.map(sync, paths))
        self._kept.update(self.path / name for name in arrays)

    def undo(self, chunks: Sequence[int]) -> None:
        """Takes away the marks of damaged chunks, so that they are written anew and the store is unfinished until then.

        The marks go first: whenever this is killed, a chunk without its mark is in no store that reads as whole.
        """
        try:
            for chunk in chunks:
                chunk_file(self.path, "done", chunk, 1).unlink(missing_ok=True)
            if (folder := self.path / "done" / "c").is_dir():
                sync(folder)
            _set_complete(self.path, False)
        except OSError as error:
            raise TraceError(f"{self.path} cannot be written: {error.strerror or error}.") from None

    def finish(self) -> None:
        """Marks the store complete. Raises TraceError if a chunk is not done."""
        if pending := self.pending():
            raise TraceError(f"{self.path} is unfinished: {len(pending)} of {self.header.chunks} chunks are not done.")
        try:
            # What a killed writer left, before the store says that it is complete: after that nobody looks. Nobody
            # else is writing: every chunk is done.
            for left in self.path.rglob("*.partial"):
                left.unlink(missing_ok=True)
            _set_complete(self.path, True)
        except OSError as error:
            raise TraceError(f"{self.path} cannot be written: {error.strerror or error}.") from None


@dataclass(frozen=True, kw_only=True)
class UnrankedSamples:
    """Samples that are stored and are never ranked, each counted once.

    failed: the dataset indices of those that could not be loaded.
    infinite: how many have a gradient that is not finite at some timestep: a NaN, or more than the precision holds.
    zero: how many have one that is zero.
    """

    failed: tuple[int, ...]
    infinite: int
    zero: int


class RowNumbers(NamedTuple):
    """Numbers of n rows: sample (n,), norm, loss and scale (n, T)."""

    sample: NDArray[np.int64]
    norm: NDArray[np.float32]
    loss: NDArray[np.float32]
    scale: NDArray[np.float32]


class Store:
    """A store opened for reading."""

    def __init__(self, path: Path, header: Header, complete: bool, done: NDArray[np.bool_]) -> None:
        """Made by `open_store`."""
        self.path = path
        self.header = header
        self.complete = complete
        self.done = done
        self._checked: set[int] = set()
        self._found: set[tuple[str, int]] = set()
        self._read: set[int] = set()
        self._last_unpacked: tuple[int, Array] | None = None
        self._maps: dict[int, Array] = {}

    @property
    def chunks_done(self) -> list[int]:
        """The numbers of the chunks that are done."""
        return [int(chunk) for chunk in np.flatnonzero(self.done)]

    @property
    def rows_done(self) -> NDArray[np.int64]:
        """The slots that lie in chunks that are done, in order."""
        return np.flatnonzero(self._row_done).astype(np.int64)

    @cached_property
    def sample(self) -> NDArray[np.int64]:
        """(N,) the dataset index of each slot; -1 in chunks that are not done."""
        return self._small("sample", np.dtype(np.int64), -1)

    @cached_property
    def norm(self) -> NDArray[np.float32]:
        """(N, T) the L2 norm of each transformed gradient, before it was divided out; NaN in chunks that are not done,
        and -1 for samples that could not be loaded."""
        return self._small("norm", np.dtype(np.float32), math.nan)

    @cached_property
    def loss(self) -> NDArray[np.float32]:
        """(N, T) the script's loss; NaN in chunks that are not done."""
        return self._small("loss", np.dtype(np.float32), math.nan)

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """(N, T) what the stored numbers are multiplied by; ones for stores that are not of int8."""
        if self.header.dtype == "int8":
            return self._small("scale", np.dtype(np.float32), math.nan)
        return np.ones((len(self._row_done), len(self.header.timesteps)), np.float32)

    @property
    def rows_failed(self) -> NDArray[np.int64]:
        """The slots that are done of samples that could not be loaded, in order."""
        return np.flatnonzero(self._row_failed).astype(np.int64)

    @cached_property
    def _row_failed(self) -> NDArray[np.bool_]:
        failed: NDArray[np.bool_] = (self.norm == FAILED).any(axis=1)
        return failed

    @cached_property
    def unranked(self) -> UnrankedSamples:
        """What is unusual about the gradients of the slots that are done."""
        norm = self.norm[self._row_done]
        failed = self._row_failed[self._row_done]
        infinite = ~np.isfinite(norm).all(axis=1)
        return UnrankedSamples(
            failed=tuple(self.sample[self._row_done][failed].tolist()),
            infinite=int((infinite & ~failed).sum()),
            zero=int(((norm == 0).any(axis=1) & ~infinite & ~failed).sum()),
        )

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(N,) whether a slot is done and all its gradients have a direction: finite, and not zero."""
        usable: NDArray[np.bool_] = np.all(np.isfinite(self.norm) & (self.norm > 0), axis=1)
        return usable

    def column(self, name: str) -> list[Any]:
        """The N values of a readable column: "", -1 or NaN where a sample has none, and in chunks that are not done.

        Raises TraceError if there is no column of this name, or if its files are damaged.
        """
        kind = self.header.columns.get(name)
        if kind is None:
            raise TraceError(f"{self.path} has no column {name}; it has {', '.join(self.header.columns) or 'none'}.")
        if kind != "string":
            numbers: list[Any] = self._small(f"meta/{name}", np.dtype(_STORED[kind]), _MISSING[kind]).tolist()
            return numbers
        texts = [""] * len(self._row_done)
        for chunk in self.chunks_done:
            rows = self.header.rows(chunk)
            texts[rows.start : rows.stop] = self._texts(f"meta/{name}", chunk)[: len(rows)]
        return texts

    def samples_of(self, chunk: int) -> NDArray[np.int64]:
        """(n,) the dataset indices of a chunk's slots. Raises TraceError if it is not done, or damaged."""
        shape = (self.header.chunk_rows,)
        return self._numbers("sample", chunk, np.dtype(np.int64), shape)[: len(self.header.rows(chunk))]

    def trailer(self, name: str, chunk: int, axes: int) -> Sequence[int]:
        """The checksum behind a chunk's numbers, as it is written; nothing is compared with it.

        Raises TraceError if the chunk is not done, or its file is none, or cannot be read.
        """
        file, size = self._place(name, chunk, axes)
        if size is None or size < TRAILER:
            raise self._damaged(name, chunk, f"has {size or 0} bytes")
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(-TRAILER, os.SEEK_END)
                return opened.read(TRAILER)
        except OSError as error:
            raise self._damaged(name, chunk, f"cannot be read ({error.strerror})") from None

    @cached_property
    def valid_count(self) -> int:
        """How many rows can be ranked."""
        return int(self.valid.sum())

    @cached_property
    def state(self) -> str:
        """SHA-256 over what the store is and the checksums of its chunks."""
        facts = self.header.to_attributes()
        # A folder that moved with the data set moves no gradient.
        facts.pop("settings")
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for chunk in self.chunks_done:
            for name, axes in [("grad", 3), ("norm", 2), *([("scale", 2)] if self.header.dtype == "int8" else [])]:
                digest.update(bytes(self.trailer(name, chunk, axes)))
        return digest.hexdigest()

    def numbers(self, rows: NDArray[np.int64]) -> RowNumbers:
        """What is known of these rows."""
        return RowNumbers(self.sample[rows], self.norm[rows], self.loss[rows], self.scale[rows])

    def column_at(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """The values of a readable column for these rows."""
        column = self.column(name)
        return [column[row] for row in rows]

    def row_of(self, sample: int) -> int:
        """The slot of a dataset index. Raises TraceError if the store does not hold it."""
        found = np.flatnonzero(self.sample == sample)
        if sample < 0 or not found.size:
            held = self.sample[self._row_done]
            raise TraceError(
                f"{self.path} holds no sample {sample}; "
                + (f"its samples are {held.min()} to {held.max()}." if held.size else "none is done.")
            )
        return int(found[0])

    def rows_of(self, samples: Sequence[int]) -> NDArray[np.int64]:
        """The rows of these data set indices. Raises TraceError if the store does not hold one."""
        return np.array([self.row_of(int(sample)) for sample in samples], np.int64)

    def grad_chunk(self, chunk: int) -> Array:
        """The stored numbers of a chunk that is done, (n, T, v): mapped from its file, or unpacked.

        Its checksum is compared if nothing of this trace did so before: that reads all of it.

        Raises TraceError if the file is missing, not as long as it must be, or not what was written, or if it cannot be
        unpacked.
        """
        header = self.header
        shape = (header.chunk_rows, len(header.timesteps), header.dimension)
        if header.codec != "none":
            return self._unpacked(chunk).reshape(shape)[: len(header.rows(chunk))]
        file = self._file("grad", chunk, header.chunk_rows * header.sample_bytes, 3)
        if chunk not in self._checked:
            whole = np.memmap(file, np.uint8, "r")
            self._check("grad", chunk, google_crc32c.value(whole[:-TRAILER]), whole[-TRAILER:].tobytes())
            self._checked.add(chunk)
        numbers = np.memmap(file, np.dtype(header.dtype).newbyteorder("<"), "r", shape=shape)
        return numbers[: len(header.rows(chunk))]

    def grad_parts(self, chunk: int, rows: int, memory: NDArray[np.uint8]) -> Iterator[Array]:
        """The stored numbers of a chunk that is done, in order, in parts of at most `rows` samples, (n, T, v).

        A part lasts until the next one. The first time a chunk is read into `memory`, which has room for that many
        samples: from a disk that is faster than a map, and as fast from the system's cache. What has been read is in
        the cache if there is room, so the next time it is mapped, and the map kept, which is three times as fast.

        Raises TraceError as `grad_chunk` does. The checksum is known after the last part: what was made of the parts is
        not to be used before they have come to their end.
        """
        header = self.header
        count = len(header.rows(chunk))
        if header.codec != "none" or chunk in self._maps or (chunk in self._read and len(self._maps) < MOST_MAPS):
            whole = self._maps[chunk] if chunk in self._maps else self.grad_chunk(chunk)
            if header.codec == "none":
                self._maps[chunk] = whole
            yield from (whole[start : start + rows] for start in range(0, count, rows))
            return
        path = self._file("grad", chunk, header.chunk_rows * header.sample_bytes, 3)
        crc = 0
        with path.open("rb", buffering=0) as file:
            # Beyond the samples of the last chunk lie the zeros that it is padded with; its checksum is of them too.
            for start in range(0, header.chunk_rows, rows):
                part = memory[: min(rows, header.chunk_rows - start) * header.sample_bytes]
                self._fill(part, file, chunk)
                crc = google_crc32c.extend(crc, part)
                if start < count:
                    numbers = part[: (count - start) * header.sample_bytes].view(
                        np.dtype(header.dtype).newbyteorder("<")
                    )
                    yield numbers.reshape(-1, len(header.timesteps), header.dimension)
            self._check("grad", chunk, crc, file.read(TRAILER))
        self._checked.add(chunk)
        self._read.add(chunk)

    def scale_chunk(self, chunk: int) -> NDArray[np.float32]:
        """The scales of a chunk of an int8 store, (n, T); ones for other stores."""
        header = self.header
        rows = len(header.rows(chunk))
        if header.dtype != "int8":
            return np.ones((rows, len(header.timesteps)), np.float32)
        shape = (header.chunk_rows, len(header.timesteps))
        return self._numbers("scale", chunk, np.dtype(np.float32), shape)[:rows]

    def stored_row(self, slot: int, checksum: int | None = None) -> Array:
        """The stored numbers of one slot, (T, v), read from its file: for scattered rows cheaper than many maps.

        Of a packed store its whole chunk is unpacked, and kept until a row of another is asked for.

        Args:
            slot: the row.
            checksum: its own (`row_checksum`), if it is known. Without it the whole chunk is read and its checksum
                compared, unless that was done before.

        Raises TraceError if the slot's chunk is not done, or if its file is missing, not as long as it must be, or not
        what was written.
        """
        header = self.header
        dtype, shape = np.dtype(header.dtype), (len(header.timesteps), header.dimension)
        chunk, place = divmod(slot, header.chunk_rows)
        if header.codec != "none":
            if self._last_unpacked is None or self._last_unpacked[0] != chunk:
                self._last_unpacked = (chunk, self.grad_chunk(chunk))
            packed: Array = self._last_unpacked[1][place]
            return packed
        row = math.prod(shape) * dtype.itemsize
        if checksum is None and chunk not in self._checked:
            self.grad_chunk(chunk)
        if ("grad", chunk) not in self._found:
            self._file("grad", chunk, header.chunk_rows * row, 3)
            self._found.add(("grad", chunk))
        try:
            with chunk_file(self.path, "grad", chunk, 3).open("rb", buffering=0) as opened:
                opened.seek(place * row)
                numbers = opened.read(row)
        except OSError as error:
            raise self._damaged("grad", chunk, f"cannot be read ({error.strerror})") from None
        if len(numbers) != row:
            raise self._damaged("grad", chunk, "became shorter while read")
        if checksum is not None and google_crc32c.value(numbers) != checksum:
            raise self._damaged("grad", chunk, f"does not have the numbers of its checksum, in its row {place}")
        return np.frombuffer(numbers, dtype.newbyteorder("<")).reshape(shape)

    def gradients(self, slots: Array) -> NDArray[np.float32]:
        """The compressed gradients of these slots, (n, T, v) float32.

        Raises TraceError for a slot that the store does not have, or in a chunk that is not done.
        """
        header = self.header
        slots = np.asarray(slots)
        if slots.size and not (slots.min() >= 0 and slots.max() < header.samples):
            raise TraceError(f"{self.path} has the slots 0 to {header.samples - 1}, not {brief(slots.tolist())}.")
        found = np.empty((len(slots), len(header.timesteps), header.dimension), np.float32)
        chunks = slots // header.chunk_rows
        for chunk in np.unique(chunks):
            here = np.flatnonzero(chunks == chunk)
            places = slots[here] - chunk * header.chunk_rows
            grad, scale = self.grad_chunk(int(chunk)), self.scale_chunk(int(chunk))
            found[here] = grad[places].astype(np.float32) * scale[places][:, :, None]
        return found

    @cached_property
    def bytes(self) -> int:
        """The size of all files of the store."""
        found = (file.lstat() for file in self.path.rglob("*"))
        return sum(file.st_size for file in found if stat.S_ISREG(file.st_mode))

    @cached_property
    def _row_done(self) -> NDArray[np.bool_]:
        """(N,) whether a slot is done; everything of N numbers asks this first, so that N is believed only here."""
        header = self.header
        for chunk in self.chunks_done:
            self._file("sample", chunk, header.chunk_rows * 8)
        held = sum(len(header.rows(chunk)) for chunk in self.chunks_done)
        numbers, times = header.samples * len(header.timesteps), header.samples / max(held, 1)
        if numbers > UNSEEN and times > 1000 or numbers > MOST_UNSEEN and times > 8:
            raise TraceError(
                f"{self.path} claims {header.samples} samples, and {held} are done: too few to read. Finish the "
                "capture."
            )
        rows = np.zeros(header.samples, np.bool_)
        for chunk in self.chunks_done:
            rows[header.rows(chunk).start : header.rows(chunk).stop] = True
        return rows

    def _small(self, name: str, dtype: np.dtype[Any], fill: Any) -> Array:
        """(N, T) numbers, or (N,), of an array whose chunks are small; `fill` in chunks that are not done."""
        axes = () if name == "sample" or name.startswith("meta/") else (len(self.header.timesteps),)
        shape = (self.header.chunk_rows, *axes)
        for chunk in self.chunks_done:
            self._file(name, chunk, math.prod(shape) * dtype.itemsize, len(shape))
        values = np.full((len(self._row_done), *axes), fill, dtype)
        for chunk in self.chunks_done:
            rows = self.header.rows(chunk)
            values[rows.start : rows.stop] = self._numbers(name, chunk, dtype, shape)[: len(rows)]
        return values

    def _texts(self, name: str, chunk: int) -> list[str]:
        """The R texts of a chunk: their count, then of each its length and its UTF-8; numbers are 4 bytes each."""
        file, size = self._place(name, chunk, 1)
        whole = file.read_bytes() if size is not None else b""
        data = whole[:-TRAILER]
        if size is not None and size > TRAILER:
            self._check(name, chunk, google_crc32c.value(data), whole[-TRAILER:])
        texts: list[str] = []
        at = 4
        try:
            if int.from_bytes(data[:4], "little") != self.header.chunk_rows:
                raise ValueError
            # Each text needs 4 bytes at least, so the file's size bounds what is made of it.
            while len(texts) < self.header.chunk_rows:
                start = at + 4
                at = start + int.from_bytes(data[at:start], "little")
                if max(start, at) > len(data):
                    raise ValueError
                texts.append(data[start:at].decode("utf-8"))
        except ValueError:
            raise self._damaged(name, chunk, f"does not hold {self.header.chunk_rows} texts") from None
        return texts

    def _numbers(self, name: str, chunk: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The numbers of a chunk of a small array, compared with its checksum."""
        size = math.prod(shape) * dtype.itemsize
        whole = np.fromfile(self._file(name, chunk, size, len(shape)), np.uint8, size + TRAILER)
        self._check(name, chunk, google_crc32c.value(whole[:-TRAILER]), whole[-TRAILER:].tobytes())
        return whole[:-TRAILER].view(dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)

    def _fill(self, part: NDArray[np.uint8], file: RawIOBase, chunk: int) -> None:
        """Reads as many bytes of a chunk's file as there is room for."""
        filled = 0
        while filled < len(part):
            read = file.readinto(part[filled:].data)
            if not read:
                raise self._damaged("grad", chunk, "became shorter while read")
            filled += read

    def _unpacked(self, chunk: int) -> Array:
        """The numbers of a chunk's Blosc frame, flat. What the frame claims is checked before memory is made for it."""
        from numcodecs import blosc

        header = self.header
        size = header.chunk_rows * header.sample_bytes
        file, found = self._place("grad", chunk, 3)
        length = found or 0
        if not FRAME_HEADER + TRAILER <= length <= size + FRAME_HEADER + TRAILER:
            raise self._damaged("grad", chunk, f"has {length} bytes, expected at most {size + FRAME_HEADER + TRAILER}")
        data = file.read_bytes()
        frame, trailer = data[:-TRAILER], data[-TRAILER:]
        self._check("grad", chunk, google_crc32c.value(frame), trailer)
        # Bytes 4 to 16 of a frame: the size it unpacks to, that of its blocks, and its own.
        unpacked, block, packed = (int.from_bytes(frame[at : at + 4], "little") for at in (4, 8, 12))
        if (unpacked, packed) != (size, len(frame)) or not 0 < block <= size:
            raise self._damaged("grad", chunk, f"claims {unpacked} bytes in {packed}, expected {size} in {len(frame)}")
        numbers = np.empty(size, np.uint8)
        try:
            blosc.decompress(frame, numbers)
        except (RuntimeError, ValueError):
            raise self._damaged("grad", chunk, "cannot be unpacked") from None
        return numbers.view(np.dtype(header.dtype).newbyteorder("<"))

    def _check(self, name: str, chunk: int, crc: int, trailer: Sequence[int]) -> None:
        """Raises TraceError where a chunk's bytes do not have the checksum that lies behind them."""
        if len(trailer) != TRAILER or crc != int.from_bytes(trailer, "little"):
            raise self._damaged(name, chunk, "does not have the numbers of its checksum")

    def _damaged(self, name: str, chunk: int, what: str) -> TraceError:
        return TraceError(f"{self.path} is damaged: chunk {chunk} of {name} {what}. {MENDING}")

    def _file(self, name: str, chunk: int, size: int, axes: int = 1) -> Path:
        """The file of a chunk that is done and has `size` bytes of numbers; every chunk has, the last one is padded."""
        file, found = self._place(name, chunk, axes)
        if found != size + TRAILER:
            raise self._damaged(name, chunk, f"has {found or 0} bytes, expected {size + TRAILER}")
        return file

    def _place(self, name: str, chunk: int, axes: int) -> tuple[Path, int | None]:
        """Where the file of a chunk that is done lies, and its size, or None if it is no file."""
        if not 0 <= chunk < self.header.chunks:
            raise TraceError(f"{self.path} has the chunks 0 to {self.header.chunks - 1}, not {chunk}.")
        if not self.done[chunk]:
            raise TraceError(f"{self.path} is unfinished: chunk {chunk} is not done.")
        file = chunk_file(self.path, name, chunk, axes)
        try:
            return file, untrusted.size_within(self.path, chunk_names(name, chunk, axes))
        except ValueError as error:
            raise self._damaged(name, chunk, f"is not in it: {error}") from None


def open_store(path: str | os.PathLike[str], *, unfinished: bool = False) -> Store:
    """Opens a store for reading.

    Args:
        path: the store.
        unfinished: open it even if the capture has not finished; what is done can be read.

    Raises:
        TraceError: no such store, none of dmin_trace's, one of another version, an unfinished or a damaged one.
    """
    path = Path(path)
    header, complete = read_header(path)
    check_arrays(path, header)
    done = marks(path, header)
    if not unfinished and not (complete and done.all()):
        lost = "; it was whole once, and marks were damaged or lost since" if complete else ""
        raise TraceError(
            f"{path} is unfinished: {int(done.sum())} of {header.chunks} chunks are done{lost}. Finish it with the "
            "command that made it: dmin-trace capture --weights DIR -- SCRIPT ARGS; or, where a loop of its own was "
            "recorded, by running that again. What is done can be asked meanwhile: dmin-trace query, or "
            "open_trace(path, unfinished=True)."
        )
    return Store(path, header, complete and bool(done.all()), done)


def quantise(grad: NDArray[np.float32], dtype: Dtype) -> tuple[Array, NDArray[np.float32]]:
    """Turns sketches (n, T, v) into what is stored, and their scales (n, T).

    int8 is the number over a step, the largest magnitude of its (sample, timestep) over 127, rounded. The scale is the
    step, corrected by what rounding did to the norm (a thousandth or so), so that a sketch of norm one is one of norm
    one in the store, and a sample's score with itself is exact. A row that is not finite is stored as zeros; its norm
    says that it is not to be ranked.
    """
    # Sample by sample: each is read several times, and lies in the cache after the first.
    values = np.empty(grad.shape, dtype)
    scale = np.ones(grad.shape[:2], np.float32)
    room = np.empty(grad.shape[1:], np.float32)
    for row, stored, own in zip(grad, values, scale, strict=True):
        largest = np.maximum(row.max(axis=1), -row.min(axis=1))
        if not (finite := np.isfinite(largest)).all():
            row, largest = np.where(finite[:, None], row, 0), np.where(finite, largest, 0)
        if dtype != "int8":
            stored[...] = row
            continue
        step = largest / 127
        np.divide(row, np.where(step > 0, step, 1)[:, None], out=room)
        before = np.vecdot(room, room)
        stored[...] = np.rint(room, out=room).clip(-127, 127, out=room)
        after = np.vecdot(room, room)
        own[...] = step * np.sqrt(before / np.where(after > 0, after, 1))
    return values, scale


def chunk_file(path: Path, name: str, chunk: int, axes: int) -> Path:
    """The file of a chunk of rows, by Zarr v3's default key encoding."""
    return path.joinpath(*chunk_names(name, chunk, axes))


def chunk_names(name: str, chunk: int, axes: int) -> list[str]:
    """The names of folders that lead from a store to a chunk's file, and its own."""
    return [*name.split("/"), "c", str(chunk), *["0"] * (axes - 1)]


def row_checksum(row: Array) -> int:
    """The crc32c of a row's stored numbers, as `stored_row` compares it."""
    return int(google_crc32c.value(np.ascontiguousarray(row).reshape(-1).view(np.uint8)))


def weights_beside(path: Path) -> Path:
    """The file beside a store that holds the weights it was captured from."""
    return path.with_name(path.name.removesuffix(".zarr") + ".weights.safetensors")


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    fill: str | int | float
    packed: bool = False


def _arrays(header: Header) -> dict[str, _Array]:
    """The arrays of a store."""
    count, slots, rows = header.samples, len(header.timesteps), header.chunk_rows
    empty = 0 if header.dtype == "int8" else math.nan
    arrays = {
        "grad": _Array(
            (count, slots, header.dimension),
            header.dtype,
            (rows, slots, header.dimension),
            empty,
            packed=header.codec != "none",
        ),
        "norm": _Array((count, slots), "float32", (rows, slots), math.nan),
        "loss": _Array((count, slots), "float32", (rows, slots), math.nan),
        "sample": _Array((count,), "int64", (rows,), -1),
        "done": _Array((header.chunks,), "uint8", (1,), 0),
    }
    if header.dtype == "int8":
        arrays["scale"] = _Array((count, slots), "float32", (rows, slots), math.nan)
    for name, kind in header.columns.items():
        arrays[f"meta/{name}"] = _Array((count,), _STORED[kind], (rows,), _MISSING[kind])
    return arrays


def _read_json(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The object in a metadata file of the store. Raises TraceError if it is none, or not to be trusted."""
    try:
        found = untrusted.read_json(path, names)
    except (ValueError, OSError) as error:
        file = path.joinpath(*names)
        raise TraceError(f"{file} cannot be read as JSON: {_reason(error)}; the store is damaged.") from None
    if not isinstance(found, dict):
        raise TraceError(f"{path.joinpath(*names)} holds no JSON object; the store is damaged.")
    return found


def read_header(path: Path) -> tuple[Header, bool]:
    """The header of a store, and whether it says to be complete. Raises TraceError if it is no store of ours."""
    metadata = _read_group(path)
    attributes = metadata["attributes"]
    header = Header.from_attributes(attributes, path)
    if _digests(attributes, path)["header"] != header_digest(metadata):
        raise TraceError(
            f"{path} is damaged: its zarr.json is not what was written, by its own digest. Restore the file from a "
            "copy, or capture again."
        )
    return header, attributes.get("complete") is True


def check_arrays(path: Path, header: Header) -> None:
    """Raises TraceError if an array's metadata is not what the header says, or what was written."""
    kept = _digests(_read_group(path)["attributes"], path)["arrays"]
    for name, expected in _arrays(header).items():
        check_array(path, name, expected, kept.get(name, ""))


def damaged_arrays(path: Path, header: Header) -> list[tuple[str, str]]:
    """The arrays whose metadata is damaged, and how; the groups that hold arrays among them."""
    kept = _digests(_read_group(path)["attributes"], path)["arrays"]
    arrays = _arrays(header)
    found: list[tuple[str, str]] = []
    for name in dict.fromkeys((*arrays, *kept)):
        written = kept.get(name, "")
        try:
            if name in arrays:
                check_array(path, name, arrays[name], written)
            elif untrusted.digest(_read_json(path, [*name.split("/"), "zarr.json"])) != written:
                raise TraceError(f"{path} is damaged: the metadata of {name} is not what was written.")
        except TraceError as error:
            found.append((name, str(error)))
    return found


def restore_arrays(path: Path, header: Header, names: Sequence[str]) -> None:
    """Writes the damaged metadata of arrays anew: the header says all that is in it.

    Raises TraceError where what would be written is not what was there, by its digest.
    """
    kept = _digests(_read_group(path)["attributes"], path)["arrays"]
    # By the name of what is swept, if this is killed.
    made = path.with_name(f".{path.name}.{header.id}.partial")
    try:
        shutil.rmtree(made, ignore_errors=True)
        with _quiet_zarr():
            _create_arrays(made, header)
        for name in names:
            place = [*name.split("/"), "zarr.json"]
            if untrusted.digest(_read_json(made, place)) != kept.get(name):
                raise TraceError(
                    f"{path} is damaged: the metadata of {name} cannot be made anew by this version of Zarr. Restore "
                    f"{path.joinpath(*place)} from a copy, or capture again."
                )
            partial = path.joinpath(*place).with_name("zarr.json.partial")
            shutil.copyfile(made.joinpath(*place), partial)
            sync(partial)
            partial.replace(path.joinpath(*place))
            sync(path.joinpath(*place).parent)
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def chunk_bytes(header: Header) -> dict[str, tuple[int, int | None]]:
    """For each array of samples how many axes it has, and the bytes of a chunk's file; None where they differ."""
    return {
        name: (
            len(array.shape),
            None
            if array.packed or array.dtype == "string"
            else math.prod(array.chunks) * np.dtype(array.dtype).itemsize + TRAILER,
        )
        for name, array in _arrays(header).items()
        if name != "done"
    }


def _read_group(path: Path) -> dict[str, Any]:
    """The group's metadata. Raises TraceError if there is no store of ours, or one of another version."""
    try:
        exists, has_metadata = path.exists(), untrusted.size_within(path, ["zarr.json"]) is not None
    except (OSError, ValueError) as error:
        raise TraceError(f"There is no store at {path}: {_reason(error)}.") from None
    if not exists:
        raise TraceError(f"There is no store at {path}.")
    if not has_metadata:
        raise TraceError(f"{path} is not a trace: it has no zarr.json. Give the folder that a capture wrote.")
    metadata = _read_json(path, ["zarr.json"])
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise TraceError(f"{path} is a Zarr store, but not a trace of dmin_trace.")
    version = attributes.get("version")
    if type(version) is not int or version != VERSION:
        raise TraceError(
            f"{path} is of version {brief(version)}; expected {VERSION}. Read it with the dmin_trace that wrote it, "
            "or capture again."
        )
    return metadata


def _digests(attributes: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The digests of the metadata. Raises TraceError if there are none, or if they are of another form."""
    kept = attributes.get(CHECKSUMS, "missing")
    if not isinstance(kept, dict) or set(kept) != {"header", "arrays"} or not isinstance(kept["arrays"], dict):
        raise TraceError(
            f"{path} is damaged: its attribute {CHECKSUMS} is {brief(kept)}; expected digests. Restore "
            f"{path / 'zarr.json'} from a copy, or capture again."
        )
    return kept


def header_digest(metadata: Mapping[str, Any]) -> str:
    """Of all metadata of the group but `complete`, which changes, and the digest itself."""
    attributes = {name: value for name, value in metadata["attributes"].items() if name != "complete"}
    return untrusted.digest({**metadata, "attributes": {**attributes, CHECKSUMS: attributes[CHECKSUMS]["arrays"]}})


def keep_digests(path: Path) -> None:
    """Writes the digests of the metadata of the store at `path` into its attributes."""
    files = [file for file in sorted(path.rglob("zarr.json")) if file.parent != path]
    arrays = {
        file.parent.relative_to(path).as_posix(): untrusted.digest(json.loads(file.read_text(encoding="utf-8")))
        for file in files
    }
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    metadata["attributes"][CHECKSUMS] = {"arrays": arrays}
    metadata["attributes"][CHECKSUMS]["header"] = header_digest(metadata)
    (path / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")


def _set_complete(path: Path, complete: bool) -> None:
    """Has the store say that it is complete, or is not; in one step, kept by the disk."""
    metadata = path / "zarr.json"
    partial = metadata.with_name("zarr.json.partial")
    facts = json.loads(metadata.read_text(encoding="utf-8"))
    facts["attributes"]["complete"] = complete
    partial.write_text(json.dumps(facts), encoding="utf-8")
    sync(partial)
    partial.replace(metadata)
    sync(path)


def check_array(path: Path, name: str, expected: _Array, written: str) -> None:
    """Raises TraceError if an array's metadata is not what the header says and what the memory maps count on, or, by
    its digest, not what was written."""
    names = [*name.split("/"), "zarr.json"]
    if not path.joinpath(*names).is_file():
        raise TraceError(f"{path} is damaged: it has no array {name}. Restore it, or capture again.")
    metadata = _read_json(path, names)
    grid = {"name": "regular", "configuration": {"chunk_shape": list(expected.chunks)}}
    codec = "vlen-utf8" if expected.dtype == "string" else "bytes"
    little = codec, {"endian": "little"}
    # Versions of Zarr write what is a default, or leave it out.
    packed = [("blosc", {"typesize": np.dtype(expected.dtype).itemsize, **PACKING})] if expected.packed else []
    choices: dict[str, list[object]] = {
        "shape": [list(expected.shape)],
        "data_type": [expected.dtype],
        "chunk_grid": [grid],
        "chunk_key_encoding": [("default", {"separator": "/"}), ("default", {})],
        "codecs": [[(codec, {}), *packed, ("crc32c", {})], [little, *packed, ("crc32c", {})]],
    }
    for name_of_fact, right in choices.items():
        value = metadata.get(name_of_fact)
        found = value if name_of_fact == "chunk_grid" else _extensions(value)
        if found not in right:
            raise TraceError(
                f"{path} is damaged: the {name_of_fact} of {name} is {brief(value)}; expected {brief(right[0])}. "
                "Restore it, or capture again."
            )
    if untrusted.digest(metadata) != written:
        raise TraceError(
            f"{path} is damaged: the metadata of {name} is not what was written, by its digest. Restore it, or make it "
            "anew (dmin-trace capture --repair)."
        )


def _extensions(value: Any) -> Any:
    """Zarr's named things, codecs and the like, as (name, configuration), however they are written."""
    if isinstance(value, list):
        return [_extensions(item) for item in value]
    return (value.get("name"), value.get("configuration", {})) if isinstance(value, dict) else value


def _flat(attributes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Attributes of attributes by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in attributes.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _create_arrays(path: Path, header: Header) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    attributes = {"format": FORMAT, "version": VERSION, **header.to_attributes(), "complete": False}
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    for name, array in _arrays(header).items():
        # None for the compressors would be Zarr's default, zstd.
        group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunks,
            compressors=[*([BloscCodec(**cast(Any, PACKING))] if array.packed else []), Crc32cCodec()],
            fill_value=array.fill,
        )


def _as_array(values: Sequence[str | int | float | None], kind: ColumnKind) -> Array:
    known = [_MISSING[kind] if value is None else value for value in values]
    if kind == "string":
        # Lone surrogates cannot be written as UTF-8.
        texts = [str(value).encode("utf-8", "replace").decode("utf-8") for value in known]
        return np.array(texts, dtype=np.dtypes.StringDType())
    if kind == "integer":
        known = [value if abs(value) < 2**63 else -1 for value in map(int, known)]
    return np.array(known, dtype=_STORED[kind])


def marks(path: Path, header: Header) -> NDArray[np.bool_]:
    """(chunks,) which are done: those with a file in done/ that says 1, and has the checksum of that.

    Raises TraceError if marks are reached by a link.
    """
    done = np.zeros(header.chunks, np.bool_)
    for folder in (path / "done", path / "done" / "c"):
        if folder.is_symlink():
            raise TraceError(f"{path} is damaged: {folder} is a symbolic link. A store has none in it.")
    if not folder.is_dir():
        return done
    with os.scandir(folder) as found:
        for mark in found:
            if re.fullmatch("0|[1-9][0-9]{0,9}", mark.name) and int(mark.name) < header.chunks:
                done[int(mark.name)] = _is_done(path, int(mark.name))
    return done


def _is_done(path: Path, chunk: int) -> bool:
    names = chunk_names("done", chunk, 1)
    try:
        return untrusted.size_within(path, names) == len(DONE) and path.joinpath(*names).read_bytes() == DONE
    except ValueError:
        return False


@contextmanager
def _quiet_zarr() -> Iterator[None]:
    """Zarr warns that strings have no final specification; every reader in question reads them."""
    import warnings

    with warnings.catch_warnings():
        for words in ("does not have a Zarr V3 specification", "not part in the Zarr format 3 specification"):
            warnings.filterwarnings("ignore", message=f".*{words}.*")
        yield


def sync(path: Path) -> None:
    """Has the disk keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Has the disk keep a folder and all in it."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def _reason(error: Exception) -> str:
    """What went wrong with a file, in a few words and on one line."""
    return brief(getattr(error, "strerror", None) or str(error))[1:-1]
