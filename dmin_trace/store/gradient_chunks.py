"""The stored numbers of projected gradients: mapped, read in parts, or a row at a time.

A chunk's checksum is compared when it is first read. A packed chunk is unpacked whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import RawIOBase
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.store.chunks import ChunkFiles
from dmin_trace.store.header import FRAME_HEADER_BYTES
from dmin_trace.store.layout import CHECKSUM_BYTES, chunk_file

MAX_MAPS = 2**8
"""Chunks whose maps are kept. Each holds an open file, and the user's process may have many of its own."""

Array = NDArray[Any]


class GradientChunks:
    """The chunks of the array `grad`."""

    def __init__(self, files: ChunkFiles) -> None:
        """The gradients of the store with these files."""
        header = files.header
        self._files = files
        self._header = header
        self._dtype = np.dtype(header.dtype).newbyteorder("<")
        self._row_shape = (len(header.timesteps), header.dimension)
        self._compared: set[int] = set()
        self._sized: set[int] = set()
        self._read: set[int] = set()
        self._maps: dict[int, Array] = {}
        self._last_unpacked: tuple[int, Array] | None = None

    def chunk(self, chunk: int) -> Array:
        """The stored numbers of a done chunk, (n, T, v); see `Store.grad_chunk`."""
        header = self._header
        shape = (header.chunk_rows, *self._row_shape)
        if header.codec != "none":
            return self._unpacked(chunk).reshape(shape)[: len(header.rows(chunk))]
        file = self._files.checked_file("grad", chunk)
        if chunk not in self._compared:
            whole = np.memmap(file, np.uint8, "r")
            crc = google_crc32c.value(whole[:-CHECKSUM_BYTES])
            self._files.compare("grad", chunk, crc, whole[-CHECKSUM_BYTES:].tobytes())
            self._compared.add(chunk)
        return np.memmap(file, self._dtype, "r", shape=shape)[: len(header.rows(chunk))]

    def parts(self, chunk: int, rows: int, memory: NDArray[np.uint8]) -> Iterator[Array]:
        """The stored numbers of a done chunk in parts; see `Store.grad_parts`."""
        header = self._header
        count = len(header.rows(chunk))
        if header.codec != "none" or chunk in self._maps or (chunk in self._read and len(self._maps) < MAX_MAPS):
            whole = self._maps[chunk] if chunk in self._maps else self.chunk(chunk)
            if header.codec == "none":
                self._maps[chunk] = whole
            yield from (whole[start : start + rows] for start in range(0, count, rows))
            return
        crc = 0
        with self._files.checked_file("grad", chunk).open("rb", buffering=0) as file:
            # The padding of the last chunk is read too: the checksum covers it.
            for start in range(0, header.chunk_rows, rows):
                part = memory[: min(rows, header.chunk_rows - start) * header.sample_bytes]
                self._fill(part, file, chunk)
                crc = google_crc32c.extend(crc, part)
                if start < count:
                    yield part[: (count - start) * header.sample_bytes].view(self._dtype).reshape(-1, *self._row_shape)
            self._files.compare("grad", chunk, crc, file.read(CHECKSUM_BYTES))
        self._compared.add(chunk)
        self._read.add(chunk)

    def row(self, row: int, checksum: int | None = None) -> Array:
        """The stored numbers of one row, (T, v); see `Store.stored_row`."""
        header, files = self._header, self._files
        chunk, place = divmod(row, header.chunk_rows)
        if header.codec != "none":
            if self._last_unpacked is None or self._last_unpacked[0] != chunk:
                self._last_unpacked = (chunk, self.chunk(chunk))
            unpacked: Array = self._last_unpacked[1][place]
            return unpacked
        if checksum is None and chunk not in self._compared:
            self.chunk(chunk)
        if chunk not in self._sized:
            files.checked_file("grad", chunk)
            self._sized.add(chunk)
        size = math.prod(self._row_shape) * self._dtype.itemsize
        try:
            with chunk_file(files.path, "grad", chunk, 3).open("rb", buffering=0) as opened:
                opened.seek(place * size)
                numbers = opened.read(size)
        except OSError as error:
            raise files.damaged("grad", chunk, f"cannot be read ({error.strerror})") from None
        if len(numbers) != size:
            raise files.damaged("grad", chunk, "became shorter while read")
        if checksum is not None and google_crc32c.value(numbers) != checksum:
            raise files.damaged("grad", chunk, f"does not have the numbers of its checksum, in its row {place}")
        return np.frombuffer(numbers, self._dtype).reshape(self._row_shape)

    def _fill(self, part: NDArray[np.uint8], file: RawIOBase, chunk: int) -> None:
        """Reads as many bytes of a chunk's file as `part` holds."""
        filled = 0
        while filled < len(part):
            read = file.readinto(part[filled:].data)
            if not read:
                raise self._files.damaged("grad", chunk, "became shorter while read")
            filled += read

    def _unpacked(self, chunk: int) -> Array:
        """The numbers of a chunk's Blosc frame, flat. Its claims are checked before memory is allocated."""
        from numcodecs import blosc

        files, size = self._files, self._header.chunk_rows * self._header.sample_bytes
        file, found = files.find("grad", chunk)
        length, most = found or 0, size + FRAME_HEADER_BYTES + CHECKSUM_BYTES
        if not FRAME_HEADER_BYTES + CHECKSUM_BYTES <= length <= most:
            raise files.damaged("grad", chunk, f"has {length} bytes, expected at most {most}")
        data = file.read_bytes()
        frame = data[:-CHECKSUM_BYTES]
        files.compare("grad", chunk, google_crc32c.value(frame), data[-CHECKSUM_BYTES:])
        # Bytes 4 to 16 of a frame: the size of what is packed, that of its blocks, and the frame's own.
        unpacked, block, packed = (int.from_bytes(frame[at : at + 4], "little") for at in (4, 8, 12))
        if (unpacked, packed) != (size, len(frame)) or not 0 < block <= size:
            what = f"claims {unpacked} bytes in {packed}, expected {size} in {len(frame)}"
            raise files.damaged("grad", chunk, what)
        numbers = np.empty(size, np.uint8)
        try:
            blosc.decompress(frame, numbers)
        except (RuntimeError, ValueError):
            raise files.damaged("grad", chunk, "cannot be unpacked") from None
        return numbers.view(self._dtype)
