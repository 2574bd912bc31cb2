"""Rows are gathered into chunks. A chunk is written on another thread while the next one is recorded.

A row is quantised when it arrives, so that a waiting chunk takes no more memory than it will take on disk.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmin_trace.settings import Dtype
from dmin_trace.store import FAILED, Writer, quantise


@dataclass(frozen=True)
class Row:
    """What is recorded of one sample: projected gradients (R, v), norms of gradients (R,), losses (T,); float32."""

    gradients: np.ndarray
    norms: np.ndarray
    losses: np.ndarray


class _Chunk:
    """A chunk while its rows arrive."""

    def __init__(self, number: int, rows: range, shape: tuple[int, int], timesteps: int, dtype: Dtype) -> None:
        of_groups = len(rows), shape[0]
        self.number, self.rows = number, rows
        self.values = np.zeros((len(rows), *shape), dtype)
        self.scale = np.ones(of_groups, np.float32)
        self.norm = np.full(of_groups, FAILED, np.float32)
        self.loss = np.full((len(rows), timesteps), np.nan, np.float32)
        self.columns: list[Mapping[str, Any]] = []
        self.thumbnails: list[bytes] = []


class ChunkQueue:
    """The chunks that this process has to fill, in order."""

    def __init__(
        self,
        chunks: Sequence[tuple[int, range]],
        timesteps: int,
        dimension: int,
        dtype: Dtype,
        group_count: int | None = None,
    ) -> None:
        """Fills chunks, each given by its number and its rows, with gradients (R, v) stored in a dtype."""
        self.writer: Writer | None = None
        self._chunks, self._shape = list(chunks), (group_count or timesteps, dimension)
        self._timesteps, self._dtype = timesteps, dtype
        self._chunk: _Chunk | None = None
        self._pool = ThreadPoolExecutor(1, "dmin_trace writes")
        self._writing: Future[None] | None = None

    @property
    def missing_rows(self) -> int | None:
        """How many rows the current chunk still lacks; None if there is no current chunk."""
        return None if self._chunk is None else len(self._chunk.rows) - len(self._chunk.columns)

    def add(self, row: Row | None, columns: Mapping[str, str | int | float | None], thumbnail: bytes = b"") -> None:
        """Adds a row, None for a sample that failed to load. Raises TraceError if an earlier chunk was not written."""
        chunk = self._chunk = self._chunk or _Chunk(*self._chunks.pop(0), self._shape, self._timesteps, self._dtype)
        at = slice(len(chunk.columns), len(chunk.columns) + 1)
        if row is not None:
            chunk.values[at], chunk.scale[at] = quantise(row.gradients[None], self._dtype)
            chunk.norm[at], chunk.loss[at] = row.norms, row.losses
        chunk.columns.append(columns)
        chunk.thumbnails.append(thumbnail)
        if len(chunk.columns) == len(chunk.rows) and self.writer is not None:
            self.wait()
            # Row i of a capture is sample i. The array of samples serves stores that are made in another order.
            sample = np.arange(chunk.rows.start, chunk.rows.stop, dtype=np.int64)
            header = self.writer.header
            by_name = {name: [row[name] for row in chunk.columns] for name in header.columns}
            thumbnails = chunk.thumbnails if header.thumbnails is not None else []
            stored = chunk.values, chunk.scale, chunk.norm, chunk.loss, sample, by_name, thumbnails
            self._writing = self._pool.submit(self.writer.write, chunk.number, *stored)
            self._chunk = None

    def check(self, *, wait: bool) -> None:
        """Raises what kept the last chunk from being written; without `wait`, only if that is known by now."""
        if wait or self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the chunk in writing is on disk. Raises what kept it from being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the writing thread, after the chunk that it writes."""
        self._pool.shutdown()
