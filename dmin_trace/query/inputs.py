"""Query images and prompts, given one by one, as a folder or as a list; anybody's image files are checked."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dmin_trace.errors import QueryError
from dmin_trace.store import parse

T = TypeVar("T")

ImageInput = str | os.PathLike[str] | Image.Image  # a file, or a PIL image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # tried whatever the file's name is; Pillow's EPS would run a program
IMAGE_KEYS, PROMPT_KEYS = ("file_name", "image"), ("text", "prompt", "caption")
CONDITIONING_KEYS = ("conditioning_image", "conditioning")
MAX_LIST_BYTES = 2**26


@dataclass(frozen=True)
class QueryInput:
    """The file of an image that is used as a query; the prompt that it was made from; and the image that it was made
    from, such as a ControlNet's or the one that was edited. None for what is not given."""

    image: Path
    prompt: str | None
    conditioning: Path | None = None


def read_inputs(
    given: Sequence[Path], prompts: Sequence[str] = (), conditioning: Sequence[Path] = ()
) -> list[QueryInput]:
    """Reads the images and prompts of queries.

    Args:
        given: each an image; a folder of images, with prompts in its `metadata.jsonl` if it has one; or a JSON-lines
            file of {"file_name" or "image": FILE, "text" or "prompt": PROMPT, "conditioning_image": FILE}, its paths
            relative to the file.
        prompts, conditioning: one for each image in order, or one for all of them; none if the files have them.

    Raises QueryError if there are no images, a line cannot be read, or the numbers of images and prompts differ.
    """
    inputs = [one for path in given for one in _expand(path)]
    if conditioning:
        files = _each(conditioning, len(inputs), "conditioning images")
        inputs = [replace(one, conditioning=file) for one, file in zip(inputs, files, strict=True)]
    if prompts:
        if known := next((one for one in inputs if one.prompt is not None), None):
            taken = f"A prompt was given, but the list that names {known.image} has one for it already"
            raise QueryError(f"{taken}. Leave --prompt out.")
        every = _each(prompts, len(inputs), "prompts")
        inputs = [replace(one, prompt=prompt) for one, prompt in zip(inputs, every, strict=True)]
    return inputs


def image_file(image: ImageInput, path: Path, *, video: bool = False) -> Path:
    """The file of a query image; a PIL image is written to `path`. A video is only checked to exist. Raises QueryError
    if there is no such file, it cannot be read as an image, or it has hundreds of megapixels."""
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
    except Exception as error:  # on bytes from anybody, a decoder may raise anything
        raise QueryError(f"{file} cannot be read as an image: {error}. Give a PNG or JPEG file.") from None
    return file


def _each(given: Sequence[T], count: int, what: str) -> Sequence[T]:
    """One for each image; a single one is for all."""
    if len(given) not in (1, count):
        differ = f"{count} images were given and {len(given)} {what}"
        raise QueryError(f"{differ}. Give one for each image, in their order, or one for all.")
    return list(given) * count if len(given) == 1 else given


def _expand(path: Path) -> Iterator[QueryInput]:
    """The queries that one argument stands for."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise QueryError(f"There is no image at {str(path)[:200]!r}: {error}.") from None
    if is_folder and (path / "metadata.jsonl").is_file():
        yield from _read_list(path / "metadata.jsonl")
    elif is_folder:
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise QueryError(f"The folder {path} holds no images. Give images, or a folder with PNG or JPEG files.")
        yield from (QueryInput(image, None) for image in images)
    elif path.suffix.lower() in (".jsonl", ".json") and is_file:
        yield from _read_list(path)
    else:
        yield QueryInput(path, None)


def _read_list(path: Path) -> Iterator[QueryInput]:
    """The queries in a JSON-lines file."""
    expected = 'expected one such as {"file_name": "a.png", "text": "a prompt"}'
    try:
        if (size := path.stat().st_size) > MAX_LIST_BYTES:
            raise QueryError(f"{path} has {size} bytes; expected a list of at most {MAX_LIST_BYTES}.")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{path} cannot be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise QueryError(f"{path} has no lines; {expected}.")
    for number, line in numbered:
        try:
            row: Any = parse(line)
        except ValueError:
            row = None
        image, prompt, source = (_text(row, keys) for keys in (IMAGE_KEYS, PROMPT_KEYS, CONDITIONING_KEYS))
        if image is None:
            raise QueryError(f"Line {number} of {path} is {line.strip()[:60]!r}; {expected}.")
        yield QueryInput(path.parent / image, prompt, None if source is None else path.parent / source)


def _text(row: Any, keys: Sequence[str]) -> str | None:
    """The first text that a JSON object has under one of these keys."""
    found = row if isinstance(row, dict) else {}
    return next((found[key] for key in keys if isinstance(found.get(key), str)), None)
