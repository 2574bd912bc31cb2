"""The files of chunks, read and checked: the numbers, texts and checksums of one chunk.

Nothing that a file or the metadata claims is allocated before the file's size agrees, no link is followed, and every
checksum is compared before what it covers is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError
from dmin_trace.store import untrusted
from dmin_trace.store.header import MAX_SAMPLE_INDEX, Header
from dmin_trace.store.layout import CHECKSUM_BYTES, array_layouts, chunk_file, chunk_names

WHAT_TO_DO = (
    "dmin-trace verify names all that is damaged. Restore the file from a copy; or take away the marks of the damaged "
    "chunks (dmin-trace verify --drop-damaged) and run the capture again, which makes those chunks anew."
)


class ChunkFiles:
    """The files of a store's chunks."""

    def __init__(self, path: Path, header: Header, done: NDArray[np.bool_]) -> None:
        """The chunks of the store at `path`; `done` says which can be read."""
        self.path = path
        self.header = header
        self.done = done
        self.layouts = array_layouts(header)

    def find(self, name: str, chunk: int) -> tuple[Path, int | None]:
        """The path of a done chunk's file, and its size; None if there is no regular file.

        Raises TraceError if the chunk is not done, or if its file is reached by a link.
        """
        if not 0 <= chunk < self.header.chunks:
            raise TraceError(f"{self.path} has the chunks 0 to {self.header.chunks - 1}, not {chunk}.")
        if not self.done[chunk]:
            raise TraceError(f"{self.path} is unfinished: chunk {chunk} is not done.")
        axes = len(self.layouts[name].shape)
        try:
            size = untrusted.size_within(self.path, chunk_names(name, chunk, axes))
        except ValueError as error:
            raise self.damaged(name, chunk, f"is not in it: {error}") from None
        return chunk_file(self.path, name, chunk, axes), size

    def checked_file(self, name: str, chunk: int) -> Path:
        """The path of a done chunk's file. Raises TraceError as `find` does, and if the size is wrong."""
        file, size = self.find(name, chunk)
        expected = self.layouts[name].file_bytes
        if size != expected:
            raise self.damaged(name, chunk, f"has {size or 0} bytes, expected {expected}")
        return file

    def values(self, name: str, chunk: int) -> NDArray[Any]:
        """The values of a chunk of a small numeric array, without padding, compared with their checksum."""
        layout = self.layouts[name]
        whole = np.fromfile(self.checked_file(name, chunk), np.uint8, layout.file_bytes or 0)
        self.compare(name, chunk, google_crc32c.value(whole[:-CHECKSUM_BYTES]), whole[-CHECKSUM_BYTES:].tobytes())
        dtype = np.dtype(layout.dtype)
        values = whole[:-CHECKSUM_BYTES].view(dtype.newbyteorder("<")).reshape(layout.chunks)
        return values[: len(self.header.rows(chunk))].astype(dtype, copy=False)

    def numbers(self, chunk: int) -> NDArray[np.float64]:
        """(n, 1 + 3 T) the numbers of a chunk's rows; `layout.number_columns` says what is where."""
        table: NDArray[np.float64] = self.values("numbers", chunk)
        samples = table[:, 0]
        if not (np.isfinite(samples) & (np.abs(samples) <= MAX_SAMPLE_INDEX) & (samples == np.rint(samples))).all():
            raise self.damaged("numbers", chunk, "holds sample indices that are no integers")
        return table

    def texts(self, name: str, chunk: int) -> list[str]:
        """The texts of a chunk: their count, then of each its length and its UTF-8; counts have 4 bytes each."""
        file, size = self.find(name, chunk)
        whole = file.read_bytes() if size is not None else b""
        data = whole[:-CHECKSUM_BYTES]
        if size is not None and size > CHECKSUM_BYTES:
            self.compare(name, chunk, google_crc32c.value(data), whole[-CHECKSUM_BYTES:])
        texts: list[str] = []
        at = 4
        try:
            if int.from_bytes(data[:4], "little") != self.header.chunk_rows:
                raise ValueError
            # Each text needs 4 bytes at least, so the file's size bounds the list.
            while len(texts) < self.header.chunk_rows:
                start = at + 4
                at = start + int.from_bytes(data[at:start], "little")
                if max(start, at) > len(data):
                    raise ValueError
                texts.append(data[start:at].decode("utf-8"))
        except ValueError:
            raise self.damaged(name, chunk, f"does not hold {self.header.chunk_rows} texts") from None
        return texts[: len(self.header.rows(chunk))]

    def checksum(self, name: str, chunk: int) -> bytes:
        """The checksum behind a chunk's numbers, as it is written; nothing is compared with it.

        Raises TraceError as `find` does, and if the file cannot be read.
        """
        file, size = self.find(name, chunk)
        if size is None or size < CHECKSUM_BYTES:
            raise self.damaged(name, chunk, f"has {size or 0} bytes")
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(-CHECKSUM_BYTES, os.SEEK_END)
                return opened.read(CHECKSUM_BYTES)
        except OSError as error:
            raise self.damaged(name, chunk, f"cannot be read ({error.strerror})") from None

    def compare(self, name: str, chunk: int, crc: int, checksum: Sequence[int]) -> None:
        """Raises TraceError if the checksum behind a chunk's numbers is not their crc32c."""
        if len(checksum) != CHECKSUM_BYTES or crc != int.from_bytes(checksum, "little"):
            raise self.damaged(name, chunk, "does not have the numbers of its checksum")

    def damaged(self, name: str, chunk: int, what: str) -> TraceError:
        """The error that says what is wrong with a chunk."""
        return TraceError(f"{self.path} is damaged: chunk {chunk} of {name} {what}. {WHAT_TO_DO}")
