"""Query images as files that the script can read. They may come from anybody, and are checked before a script runs."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image

from dmin_trace.errors import QueryError

ImageInput = str | os.PathLike[str] | Image.Image
"""A query image as a program gives it: a file, or a PIL image."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The decoders that are tried, whatever the file's name is. Of the formats that Pillow knows, EPS runs a program."""


def name_of(image: ImageInput, number: int) -> str:
    """A name to show for a query image."""
    return f"image {number}" if isinstance(image, Image.Image) else Path(image).name


def image_file(image: ImageInput, path: Path, *, video: bool = False) -> Path:
    """The file of a query image; a PIL image is written to `path`.

    A video is only checked to exist: the script reads it with a library of its own.

    Raises QueryError if there is no such file, it cannot be read as an image, or it has hundreds of megapixels.
    """
    if isinstance(image, Image.Image):
        image.save(path)
        return path
    file = Path(image)
    try:
        found = file.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        found = False
    if not found:
        raise QueryError(f"There is no {'video' if video else 'image'} at {file}.")
    if video:
        return file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as opened:
                opened.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise QueryError(f"{file} is too large for a query: {error} Give a smaller image.") from None
    except Exception as error:
        # On bytes from anybody, a decoder may raise anything.
        raise QueryError(f"{file} cannot be read as an image: {error}. Give a PNG or JPEG file.") from None
    return file
