"""A store opened for reading.

Readers go by the marks of chunks, never by fill values, and read the files themselves: Zarr's own pipeline believes the
metadata. What is read is compared with its checksum (`chunks`).
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dmin_trace.errors import TraceError, brief
from dmin_trace.store.chunks import Array, ChunkFiles, GradientChunks, done_chunks
from dmin_trace.store.header import ColumnKind, Header
from dmin_trace.store.layout import FAILED, MISSING, number_columns
from dmin_trace.store.metadata import Finished, read_header
from dmin_trace.store.thumbnails import Thumbnails

BELIEVED_NUMBERS, MAX_BELIEVED_NUMBERS = 2**20, 2**28
"""Numbers that are allocated because the header says so, for rows of which no files, or few, say anything."""


@dataclass(frozen=True)
class RowNumbers:
    """What is stored of n rows besides their gradients.

    sample: (n,) int64, data set indices.
    norm: (n, R) float32, the L2 norm of each transformed gradient; FAILED for samples that could not be loaded.
    loss: (n, T) float32, the script's loss; NaN for samples that could not be loaded.
    scale: (n, R) float32, by which stored numbers are multiplied; ones unless the dtype is int8.
    """

    sample: NDArray[np.int64]
    norm: NDArray[np.float32]
    loss: NDArray[np.float32]
    scale: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class UnrankedSamples:
    """Samples that are stored and never ranked, each counted once.

    failed: the data set indices of those that could not be loaded.
    infinite, zero: how many have a gradient that is not finite, or zero, at some timestep. A zero gradient among
        those that are pooled counts as not finite: it has no direction, and a mean without it is of other timesteps.
    """

    failed: tuple[int, ...]
    infinite: int
    zero: int


class Store:
    """A store opened for reading, by `open_store`.

    path, header: where it is, and what it holds.
    done, complete: (chunks,) which chunks are done; whether all are, and the store says so.
    final: whether the training ended with the weights that were captured, as far as is known.
    grad_chunk, grad_parts, stored_row: projected gradients as they are stored; see `GradientChunks`.
    thumbnails: the small pictures of the samples, by row; see `Thumbnails`.
    """

    def __init__(self, path: Path, header: Header, done: NDArray[np.bool_], finished: Finished | None) -> None:
        self.path, self.header, self.done = path, header, done
        self.complete = finished is not None and bool(done.all())
        self._finished = finished if self.complete else None
        self.final = finished is None or finished.final
        self._files = ChunkFiles(path, header, done)
        gradients = GradientChunks(self._files)
        self.grad_chunk, self.grad_parts, self.stored_row = gradients.chunk, gradients.parts, gradients.row
        self.thumbnails = Thumbnails(self._files)

    @cached_property
    def state(self) -> str:
        """SHA-256 of the header and of the checksums of all done chunks. A complete store keeps it."""
        return self._finished.state if self._finished is not None else self.compute_state()

    def compute_state(self) -> str:
        """`state`, from the files."""
        digest = hashlib.sha256(json.dumps(self.header.to_attributes(), sort_keys=True).encode())
        for chunk in self.chunks_done:
            digest.update(chunk.to_bytes(8, "little"))
            for name in self._files.layouts:
                digest.update(self._files.checksum(name, chunk) if name != "done" else b"")
        return digest.hexdigest()

    @cached_property
    def valid_count(self) -> int:
        """The number of rows that can be ranked. A complete store keeps it."""
        return self._finished.valid_count if self._finished is not None else int(self.valid.sum())

    @property
    def chunks_done(self) -> list[int]:
        """The numbers of the done chunks."""
        return [int(chunk) for chunk in np.flatnonzero(self.done)]

    @property
    def rows_done(self) -> NDArray[np.int64]:
        """The rows of done chunks, in order."""
        return np.flatnonzero(self._row_done).astype(np.int64)

    @cached_property
    def sample(self) -> NDArray[np.int64]:
        """(N,) as in `RowNumbers`; -1 in chunks that are not done."""
        return self._whole("sample", -1, np.int64)[:, 0]

    @cached_property
    def norm(self) -> NDArray[np.float32]:
        """(N, R) as in `RowNumbers`; NaN in chunks that are not done."""
        return self._whole("norm")

    @cached_property
    def loss(self) -> NDArray[np.float32]:
        """(N, T) as in `RowNumbers`; NaN in chunks that are not done."""
        return self._whole("loss")

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(N,) whether a row can be ranked: done, and the norms of all its gradients finite and positive."""
        return np.asarray((np.isfinite(self.norm) & (self.norm > 0)).all(axis=1))

    @cached_property
    def unranked(self) -> UnrankedSamples:
        """The samples in done chunks that cannot be ranked."""
        norm = self.norm[self._row_done]
        failed = (norm == FAILED).any(axis=1)
        infinite = ~np.isfinite(norm).all(axis=1)
        return UnrankedSamples(
            failed=tuple(self.sample[self._row_done][failed].tolist()),
            infinite=int((infinite & ~failed).sum()),
            zero=int(((norm == 0).any(axis=1) & ~infinite & ~failed).sum()),
        )

    def numbers(self, rows: ArrayLike) -> RowNumbers:
        """What is stored of these rows. Only their chunks are read.

        Raises TraceError for a row that the store does not have or that is not done, and for a damaged chunk.
        """
        rows = self._rows(rows)
        table = np.empty((len(rows), self._places["scale"].stop))
        for chunk, here, places in self._by_chunk(rows):
            table[here] = self._files.numbers(chunk)[places]
        return self._row_numbers(table)

    def numbers_of(self, chunk: int) -> RowNumbers:
        """What is stored of a chunk's rows. Raises TraceError if it is not done, or damaged."""
        return self._row_numbers(self._files.numbers(chunk))

    def column(self, name: str) -> list[Any]:
        """The N values of a readable column; MISSING in chunks that are not done. Errors are as of `column_at`."""
        values = [MISSING[self._column_kind(name)]] * len(self._row_done)
        for chunk in self.chunks_done:
            rows = self.header.rows(chunk)
            values[rows.start : rows.stop] = self._column_chunk(name, chunk)
        return values

    def column_at(self, name: str, rows: ArrayLike) -> list[Any]:
        """The values of a column for these rows. Raises TraceError as `numbers`, and if there is no such column."""
        self._column_kind(name)
        rows = self._rows(rows)
        values = np.empty(len(rows), object)
        for chunk, here, places in self._by_chunk(rows):
            values[here] = np.array(self._column_chunk(name, chunk), object)[places]
        return list(values)

    def _column_kind(self, name: str) -> ColumnKind:
        if (kind := self.header.columns.get(name)) is None:
            raise TraceError(f"{self.path} has no column {name}; it has {', '.join(self.header.columns) or 'none'}.")
        return kind

    def _column_chunk(self, name: str, chunk: int) -> list[Any]:
        if self.header.columns[name] == "string":
            return self._files.texts(f"meta/{name}", chunk)
        return list(self._files.values(f"meta/{name}", chunk).tolist())

    def rows_of(self, samples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the rows of data set indices. Raises TraceError for an index that the store does not hold."""
        wanted = np.asarray(samples, np.int64)
        # A capture stores samples in the order of the data set: then no other chunk is read.
        possible = ((wanted >= 0) & (wanted < self.header.samples)).all()
        possible = possible and self.done[wanted // self.header.chunk_rows].all()
        if possible and np.array_equal(self.numbers(wanted).sample, wanted):
            return wanted
        order = np.argsort(self.sample, kind="stable")
        rows = order[np.minimum(np.searchsorted(self.sample, wanted, sorter=order), len(order) - 1)]
        if (lost := wanted[(self.sample[rows] != wanted) | (wanted < 0)]).size:
            held = self.sample[self._row_done]
            known = f"its samples are {held.min()} to {held.max()}" if held.size else "none is done"
            raise TraceError(f"{self.path} holds no sample {lost[0]}; {known}.")
        return rows

    def gradients(self, rows: ArrayLike) -> NDArray[np.float32]:
        """(n, R, v) the projected gradients of these rows. Errors are as of `numbers`."""
        rows, scale = self._rows(rows), self.numbers(rows).scale
        found = np.empty((*scale.shape, self.header.dimension), np.float32)
        for chunk, here, places in self._by_chunk(rows):
            found[here] = self.grad_chunk(chunk)[places].astype(np.float32) * scale[here][:, :, None]
        return found

    @cached_property
    def bytes(self) -> int:
        """The size of all files of the store."""
        found = (file.lstat() for file in self.path.rglob("*"))
        return sum(file.st_size for file in found if stat.S_ISREG(file.st_mode))

    @cached_property
    def _row_done(self) -> NDArray[np.bool_]:
        """(N,) whether a row is done. Every array of N numbers is made after this one, which checks N against files."""
        header = self.header
        for chunk in self.chunks_done:
            self._files.find("numbers", chunk)
        held = sum(len(header.rows(chunk)) for chunk in self.chunks_done)
        numbers, times = header.samples * len(header.timesteps), header.samples / max(held, 1)
        if numbers > BELIEVED_NUMBERS and times > 1000 or numbers > MAX_BELIEVED_NUMBERS and times > 8:
            claim = f"{self.path} claims {header.samples} samples, and {held} are done"
            raise TraceError(f"{claim}: too few to read. Finish the capture.")
        return np.repeat(self.done, header.chunk_rows)[: header.samples]

    def _whole(self, name: str, fill: float = np.nan, dtype: type[Any] = np.float32) -> Array:
        """(N, columns) one kind of numbers of all rows; `fill` in chunks that are not done."""
        count = len(self._row_done)
        place = self._places[name]
        values = np.full((count, place.stop - place.start), fill, dtype)
        with np.errstate(over="ignore"):
            for chunk in self.chunks_done:
                rows = self.header.rows(chunk)
                values[rows.start : rows.stop] = self._files.numbers(chunk)[:, place]
        return values

    @property
    def _places(self) -> dict[str, slice]:
        return number_columns(len(self.header.timesteps), self.header.group_count)

    def _row_numbers(self, table: NDArray[np.float64]) -> RowNumbers:
        place = self._places
        with np.errstate(over="ignore"):
            norm, loss, scale = (table[:, place[name]].astype(np.float32) for name in ("norm", "loss", "scale"))
        return RowNumbers(table[:, 0].astype(np.int64), norm, loss, scale)

    def _rows(self, rows: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(rows)
        if given.size and not (given.min() >= 0 and given.max() < self.header.samples):
            raise TraceError(f"{self.path} has the rows 0 to {self.header.samples - 1}, not {brief(given.tolist())}.")
        return given.astype(np.int64)

    def _by_chunk(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """For each chunk of these rows: its number, where its rows stand in `rows`, and their places in the chunk."""
        chunks = rows // self.header.chunk_rows
        for chunk in np.unique(chunks):
            here = np.flatnonzero(chunks == chunk)
            yield int(chunk), here, rows[here] - chunk * self.header.chunk_rows


def open_store(path: str | os.PathLike[str], *, unfinished: bool = False) -> Store:
    """Opens a store for reading; with `unfinished` even if the capture has not finished: done chunks can be read.

    Raises TraceError if there is no store of dmin_trace at `path`, or it is of another version, unfinished or damaged.
    """
    path = Path(path)
    header, finished = read_header(path)
    done = done_chunks(path, header)
    if not unfinished and not (finished is not None and done.all()):
        lost = "; it was complete once, and marks were damaged or lost since" if finished is not None else ""
        raise TraceError(
            f"{path} is unfinished: {int(done.sum())} of {header.chunks} chunks are done{lost}. Finish it with the "
            "command that made it: dmin-trace capture --weights DIR -- SCRIPT ARGS; or, where a loop of its own was "
            "recorded, by running that again. What is done can be queried meanwhile: dmin-trace query, or "
            "open_trace(path, unfinished=True)."
        )
    return Store(path, header, done, finished)
