"""The files of chunks, read and checked: gradients, numbers, texts, checksums, and the marks of chunks that are done.

Nothing that a file or the metadata claims is allocated before the file's size agrees, no link is followed, and every
checksum is compared before what it covers is used.
"""

import os
import re
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError
from dmin_trace.store.files import sync
from dmin_trace.store.header import FRAME_HEADER_BYTES, MAX_SAMPLE_INDEX, Header
from dmin_trace.store.layout import (
    CHECKSUM_BYTES,
    THUMBNAILS,
    array_layouts,
    chunk_file,
    chunk_names,
    max_thumbnail_bytes,
)
from dmin_trace.store.untrusted import size_of, size_within

DONE = b"\x01" + google_crc32c.value(b"\x01").to_bytes(CHECKSUM_BYTES, "little")
"""The content of a mark. A file with any other content is no mark."""
INTACT = google_crc32c.value(DONE)
"""The crc32c of any bytes with their own crc32c behind them, and so of every file that is what was written."""
MAX_MAPS = 2**8
"""Chunks whose maps are kept. Each holds an open file, and the user's process may have many of its own."""
WHAT_TO_DO = (
    "dmin-trace verify names all that is damaged. Restore the file from a copy; or take away the marks of the damaged "
    "chunks (dmin-trace verify --drop-damaged) and run the capture again, which makes those chunks anew."
)

Array = NDArray[Any]


class ChunkFiles:
    """The files of a store's chunks; `done` says which can be read."""

    def __init__(self, path: Path, header: Header, done: NDArray[np.bool_]) -> None:
        self.path, self.header, self.done = path, header, done
        self.layouts = array_layouts(header)

    def find(self, name: str, chunk: int) -> tuple[Path, int]:
        """The path and the size of a done chunk's file. Raises TraceError if it is not done, missing, linked or cut."""
        if not 0 <= chunk < self.header.chunks:
            raise TraceError(f"{self.path} has the chunks 0 to {self.header.chunks - 1}, not {chunk}.")
        if not self.done[chunk]:
            raise TraceError(f"{self.path} is unfinished: chunk {chunk} is not done.")
        try:
            size = size_within(self.path, chunk_names(name, chunk))
        except ValueError as error:
            raise self.damaged(name, chunk, f"is not in it: {error}") from None
        if size is None:
            raise self.damaged(name, chunk, "is missing, or no file")
        if size != (expected := self.layouts[name].file_bytes or size):
            raise self.damaged(name, chunk, f"has {size} bytes, expected {expected}")
        return chunk_file(self.path, name, chunk), size

    def content(self, name: str, chunk: int) -> bytes:
        """What the file of a done chunk holds, compared with the checksum behind it."""
        whole = self.find(name, chunk)[0].read_bytes()
        self.compare(name, chunk, google_crc32c.value(whole))
        return whole[:-CHECKSUM_BYTES]

    def values(self, name: str, chunk: int) -> Array:
        """The values of a chunk of a small numeric array, without padding."""
        dtype, shape = np.dtype(self.layouts[name].dtype).newbyteorder("<"), self.layouts[name].chunks
        return np.frombuffer(self.content(name, chunk), dtype).reshape(shape)[: len(self.header.rows(chunk))]

    def numbers(self, chunk: int) -> NDArray[np.float64]:
        """(n, 1 + 2 R + T) the numbers of a chunk's rows; `layout.number_columns` says what is where."""
        table: NDArray[np.float64] = self.values("numbers", chunk)
        samples = table[:, 0]
        if not (np.isfinite(samples) & (np.abs(samples) <= MAX_SAMPLE_INDEX) & (samples == np.rint(samples))).all():
            raise self.damaged("numbers", chunk, "holds sample indices that are no integers")
        return table

    def texts(self, name: str, chunk: int) -> list[str]:
        """The texts of a chunk, without padding."""
        try:
            return [text.decode("utf-8") for text in self._of_any_length(name, chunk)]
        except ValueError:
            raise self.damaged(name, chunk, f"does not hold {self.header.chunk_rows} texts") from None

    def thumbnails(self, chunk: int) -> list[bytes]:
        """The thumbnails of a chunk, without padding, as they are stored: nothing is known of these bytes."""
        if (facts := self.header.thumbnails) is None:
            raise TraceError(f"{self.path} has no thumbnails.")
        size, rows, each = self.find(THUMBNAILS, chunk)[1], self.header.chunk_rows, max_thumbnail_bytes(facts.side)
        if size > (most := 4 + rows * (4 + each) + CHECKSUM_BYTES):
            raise self.damaged(THUMBNAILS, chunk, f"has {size} bytes, expected at most {most}")
        try:
            found = self._of_any_length(THUMBNAILS, chunk)
            if any(len(thumbnail) > each for thumbnail in found):
                raise ValueError
        except ValueError:
            what = f"does not hold {rows} thumbnails of {each} bytes at most"
            raise self.damaged(THUMBNAILS, chunk, what) from None
        return found

    def _of_any_length(self, name: str, chunk: int) -> list[bytes]:
        """The values of a chunk: their count, then of each its length and its bytes; counts have 4 bytes each.

        Raises ValueError if it does not hold so many.
        """
        data, count = self.content(name, chunk), self.header.chunk_rows
        values: list[bytes] = []
        at = 4
        if int.from_bytes(data[:4], "little") != count:
            raise ValueError
        # Each value needs 4 bytes at least, so the file's size bounds the list.
        while len(values) < count:
            start = at + 4
            at = start + int.from_bytes(data[at:start], "little")
            if max(start, at) > len(data):
                raise ValueError
            values.append(data[start:at])
        return values[: len(self.header.rows(chunk))]

    def checksum(self, name: str, chunk: int) -> bytes:
        """The checksum behind a chunk's numbers, as it is written; nothing is compared with it."""
        file, size = self.find(name, chunk)
        return self.read_at(file, name, chunk, size - CHECKSUM_BYTES, CHECKSUM_BYTES)

    def read_at(self, file: Path, name: str, chunk: int, start: int, size: int) -> bytes:
        """Bytes of a chunk's file. Raises TraceError if they cannot be read."""
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(start)
                data = opened.read(size)
        except OSError as error:
            raise self.damaged(name, chunk, f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise self.damaged(name, chunk, "became shorter while read")
        return data

    def compare(self, name: str, chunk: int, crc: int) -> None:
        """Raises TraceError unless a file, whose crc32c this is, ends with the checksum of what is before."""
        if crc != INTACT:
            raise self.damaged(name, chunk, "does not have the numbers of its checksum")

    def damaged(self, name: str, chunk: int, what: str) -> TraceError:
        """The error that says what is wrong with a chunk."""
        return TraceError(f"{self.path} is damaged: chunk {chunk} of {name} {what}. {WHAT_TO_DO}")


class GradientChunks:
    """The chunks of the array `grad`. The checksum of a chunk is compared when it is first read."""

    def __init__(self, files: ChunkFiles) -> None:
        self._files, self._header = files, files.header
        self._dtype = np.dtype(files.header.dtype).newbyteorder("<")
        self._row_shape = (files.header.gradient_count, files.header.dimension)
        self._compared: set[int] = set()
        self._found: dict[int, Path] = {}
        self._maps: dict[int, Array] = {}
        self._last_unpacked: tuple[int, Array] | None = None

    def chunk(self, chunk: int) -> Array:
        """The stored numbers of a done chunk, (n, R, v): mapped from its file, or unpacked.

        Raises TraceError if the file is missing, of another size, not what was written, or cannot be unpacked.
        """
        header, shape = self._header, (self._header.chunk_rows, *self._row_shape)
        if header.codec != "none":
            return self._unpacked(chunk).reshape(shape)[: len(header.rows(chunk))]
        file, _ = self._files.find("grad", chunk)
        if chunk not in self._compared:
            self._files.compare("grad", chunk, google_crc32c.value(np.memmap(file, np.uint8, "r")))
            self._compared.add(chunk)
        return np.memmap(file, self._dtype, "r", shape=shape)[: len(header.rows(chunk))]

    def parts(self, chunk: int, rows: int, memory: NDArray[np.uint8]) -> Iterator[Array]:
        """The stored numbers of a done chunk, in order, in parts (n, R, v) of at most `rows` rows.

        A part is valid until the next one. The first time, a chunk is read into `memory`, which holds so many rows:
        from a disk that is faster than a map. The next time it is mapped, and the map kept: that is three times as
        fast from the system's cache. Raises TraceError as `chunk` does. The checksum is compared after the last part:
        use nothing made of the parts before the iteration has ended.
        """
        header, count = self._header, len(self._header.rows(chunk))
        if header.codec != "none" or chunk in self._maps or (chunk in self._compared and len(self._maps) < MAX_MAPS):
            whole = self._maps[chunk] if chunk in self._maps else self.chunk(chunk)
            if header.codec == "none":
                self._maps[chunk] = whole
            yield from (whole[start : start + rows] for start in range(0, count, rows))
            return
        crc = 0
        with self._files.find("grad", chunk)[0].open("rb", buffering=0) as file:
            # The padding of the last chunk is read too: the checksum covers it.
            for start in range(0, header.chunk_rows, rows):
                part = memory[: min(rows, header.chunk_rows - start) * header.sample_bytes]
                filled = 0
                while filled < len(part):
                    if not (read := file.readinto(part[filled:].data)):
                        raise self._files.damaged("grad", chunk, "became shorter while read")
                    filled += read
                crc = google_crc32c.extend(crc, part)
                if start < count:
                    yield part[: (count - start) * header.sample_bytes].view(self._dtype).reshape(-1, *self._row_shape)
            self._files.compare("grad", chunk, google_crc32c.extend(crc, file.read(CHECKSUM_BYTES)))
        self._compared.add(chunk)

    def row(self, row: int, checksum: int | None = None) -> Array:
        """The stored numbers of one row, (R, v), read from its file: for scattered rows cheaper than many maps.

        Of a packed store the whole chunk is unpacked, and kept until a row of another chunk is read. `checksum` is the
        row's own (`row_checksum`); without it the whole chunk is read once and its checksum compared.
        """
        header, files = self._header, self._files
        chunk, place = divmod(row, header.chunk_rows)
        if header.codec != "none":
            if self._last_unpacked is None or self._last_unpacked[0] != chunk:
                self._last_unpacked = (chunk, self.chunk(chunk))
            return np.asarray(self._last_unpacked[1][place])
        if checksum is None and chunk not in self._compared:
            self.chunk(chunk)
        if chunk not in self._found:
            self._found[chunk], _ = files.find("grad", chunk)
        numbers = files.read_at(self._found[chunk], "grad", chunk, place * header.sample_bytes, header.sample_bytes)
        if checksum is not None and google_crc32c.value(numbers) != checksum:
            raise files.damaged("grad", chunk, f"does not have the numbers of its checksum, in its row {place}")
        return np.frombuffer(numbers, self._dtype).reshape(self._row_shape)

    def _unpacked(self, chunk: int) -> Array:
        """The numbers of a chunk's Blosc frame, flat. Its claims are checked before memory is allocated."""
        from numcodecs import blosc

        files, size = self._files, self._header.chunk_rows * self._header.sample_bytes
        length, most = files.find("grad", chunk)[1], size + FRAME_HEADER_BYTES + CHECKSUM_BYTES
        if not FRAME_HEADER_BYTES + CHECKSUM_BYTES <= length <= most:
            raise files.damaged("grad", chunk, f"has {length} bytes, expected at most {most}")
        frame = files.content("grad", chunk)
        # Bytes 4 to 16 of a frame: the size of what is packed, that of its blocks, and the frame's own.
        unpacked, block, packed = (int.from_bytes(frame[at : at + 4], "little") for at in (4, 8, 12))
        if (unpacked, packed) != (size, len(frame)) or not 0 < block <= size:
            raise files.damaged("grad", chunk, f"claims {unpacked} bytes in {packed}, expected {size} in {len(frame)}")
        numbers = np.empty(size, np.uint8)
        try:
            blosc.decompress(frame, numbers)
        except (RuntimeError, ValueError):
            raise files.damaged("grad", chunk, "cannot be unpacked") from None
        return numbers.view(self._dtype)


def done_chunks(path: Path, header: Header) -> NDArray[np.bool_]:
    """(chunks,) which chunks are done. Raises TraceError if marks are reached by a link."""
    done = np.zeros(header.chunks, np.bool_)
    for folder in (path / "done", path / "done" / "c"):
        if folder.is_symlink():
            raise TraceError(f"{path} is damaged: {folder} is a symbolic link. A store holds none.")
    if not folder.is_dir():
        return done
    with os.scandir(folder) as found:
        for mark in found:
            numbered = re.fullmatch("0|[1-9][0-9]{0,9}", mark.name) and int(mark.name) < header.chunks
            if numbered and mark.is_file(follow_symlinks=False):
                # A query opens all marks: `Path` would take twice as long.
                with FileIO(mark.path) as opened:
                    done[int(mark.name)] = opened.read(len(DONE) + 1) == DONE
    return done


def is_done(path: Path, chunk: int) -> bool:
    """Whether a chunk has its mark."""
    size = size_of(path, chunk_names("done", chunk))
    return size == len(DONE) and chunk_file(path, "done", chunk).read_bytes() == DONE


def remove_marks(path: Path, chunks: Sequence[int]) -> None:
    """Takes away the marks of chunks, so that a capture writes them again. Raises OSError if the disk refuses."""
    for chunk in chunks:
        chunk_file(path, "done", chunk).unlink(missing_ok=True)
    if (folder := path / "done" / "c").is_dir():
        sync(folder)
