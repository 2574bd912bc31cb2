"""The small pictures of the samples, read as what they are: bytes from anybody.

A thumbnail is one plain WebP file. Its header is read here before any decoder is started, so that a file that claims
more pixels than the store allows, an animation, or another kind of image is never decoded. A sample without a picture,
or with one that is refused, has None, and the log says which.
"""

import io
import logging
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from dmin_trace.errors import TraceError, message_of
from dmin_trace.store.chunks import ChunkFiles
from dmin_trace.store.layout import max_thumbnail_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""The kinds of image that are read of samples and queries, by their bytes and not by their names. Pillow knows more;
its EPS would run a program."""
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of files that must be such images."""
LOSSY, LOSSLESS = b"VP8 ", b"VP8L"
"""The chunk that a plain WebP file begins with. An extended one, VP8X, may hold animations and profiles."""
LOSSY_BYTES, LOSSLESS_BYTES = 30, 25
"""Bytes up to the end of the width and height."""
KEPT_NUMBERS = 2**12
"""Pictures of so many numbers are kept without loss: of 8 x 8 pixels, each one counts."""
QUALITIES = (80, 60, 40, 20, 5, 0)
"""WebP's qualities, tried until the file is small enough."""


class Thumbnails:
    """The thumbnails of a store by row; the chunk that was read last is kept."""

    def __init__(self, files: ChunkFiles) -> None:
        self._files = files
        self._last: tuple[int, list[bytes]] = (-1, [])
        self._damaged: set[int] = set()

    def stored(self, rows: ArrayLike) -> list[bytes]:
        """What is stored of these rows, in order; b"" for a sample without a picture. Nothing is known of the bytes.

        Raises TraceError if the store has no thumbnails, or a chunk is not done or damaged.
        """
        found = []
        for row in np.ravel(rows).tolist():
            chunk, place = divmod(row, self._files.header.chunk_rows)
            if self._last[0] != chunk:
                self._last = (chunk, self._files.thumbnails(chunk))
            found.append(self._last[1][place])
        return found

    def image(self, row: int) -> "Image | None":
        """The picture of a row, in RGB. None if there is none, or if it cannot be shown, which is logged."""
        facts, chunk = self._files.header.thumbnails, row // self._files.header.chunk_rows
        if facts is None or chunk in self._damaged:
            return None
        try:
            data = self.stored([row])[0]
        except TraceError as error:
            self._damaged.add(chunk)
            logger.warning("Samples are shown without their pictures. %s", error)
            return None
        try:
            return decode_webp(data, facts.side) if data else None
        except ValueError as error:
            logger.warning("The picture of row %d in %s is not shown: %s.", row, self._files.path, error)
            return None

    def webp(self, row: int) -> bytes | None:
        """The WebP file of a row; None where `image` gives None."""
        return None if self.image(row) is None else self.stored([row])[0]


class StoredThumbnail:
    """The thumbnail of one row of a store, read when it is looked at. A copy is the same object."""

    def __init__(self, thumbnails: Thumbnails, row: int) -> None:
        self.thumbnails, self.row = thumbnails, row

    def __deepcopy__(self, memory: object) -> Self:
        # `dataclasses.asdict` of a hit copies all that it holds, and this holds the store.
        return self

    def image(self) -> "Image | None":
        """As `Thumbnails.image`."""
        return self.thumbnails.image(self.row)

    def webp(self) -> bytes | None:
        """As `Thumbnails.webp`."""
        return self.thumbnails.webp(self.row)


def encode_webp(image: "Image", side: int) -> bytes:
    """A plain WebP file of at most `max_thumbnail_bytes(side)`; without loss if the picture is small.

    Raises ValueError if it takes more, and what Pillow raises.
    """
    file = io.BytesIO()
    if image.width * image.height * len(image.getbands()) <= KEPT_NUMBERS:
        # Method 0 is ten times as fast as the default one, and as small.
        image.save(file, "WEBP", lossless=True, method=0)
        if file.tell() <= max_thumbnail_bytes(side):
            return file.getvalue()
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality)
        if file.tell() <= max_thumbnail_bytes(side):
            return file.getvalue()
    raise ValueError(f"a picture of {image.width} x {image.height} pixels takes {file.tell()} bytes")


def decode_webp(data: bytes, side: int) -> "Image":
    """A plain WebP file of at most `side` pixels either way, in RGB. Raises ValueError if it is anything else."""
    from PIL import Image

    if (size := webp_size(data)) is None:
        raise ValueError("it is no plain WebP file")
    if not 0 < min(size) <= max(size) <= side:
        raise ValueError(f"it has {size[0]} x {size[1]} pixels; expected at most {side} either way")
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as opened:
            if opened.size != size or getattr(opened, "n_frames", 1) != 1:
                raise ValueError("it is an animation, or of another size than its header")
            return opened.convert("RGB")
    except Exception as error:  # on bytes from anybody, a decoder may raise anything
        raise ValueError(f"it cannot be decoded ({message_of(error)})") from None


def webp_size(data: bytes) -> tuple[int, int] | None:
    """The width and height that a plain WebP file claims; None for any other file. Nothing is decoded.

    Source: RFC 9649, sections 2.5, 2.6 and 3.4; RFC 6386, section 9.1.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or int.from_bytes(data[4:8], "little") + 8 != len(data):
        return None
    # Another chunk behind the first would be of an extended file.
    if (length := int.from_bytes(data[16:20], "little")) + length % 2 + 20 != len(data):
        return None
    kind = data[12:16]
    if kind == LOSSY and len(data) >= LOSSY_BYTES and data[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return width, height
    if kind == LOSSLESS and len(data) >= LOSSLESS_BYTES and data[20] == 0x2F:
        packed = int.from_bytes(data[21:25], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    return None
