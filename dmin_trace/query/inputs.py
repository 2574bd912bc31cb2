"""Query images and prompts, given one by one, as a folder or as a list; anybody's image files are checked."""

import csv
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from dmin_trace.errors import QueryError
from dmin_trace.query.tables import import_extra
from dmin_trace.store import PICTURE_ENDINGS, PICTURE_FORMATS, PICTURE_SIDE, encode_webp, parse

T = TypeVar("T")

ImageInput = str | os.PathLike[str] | Image.Image  # a file, or a PIL image

IMAGE_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
}
"""The ending by which scripts find each kind of image. An MPO is opened as the JPEG that it begins with."""
STRAY_NAMES = ("thumbs.db", "desktop.ini")
"""Files that a desktop leaves in folders. Others of that kind begin with a dot: .DS_Store, ._a.png."""
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_KEYS, PROMPT_KEYS = ("file_name", "image"), ("text", "prompt", "caption")
CONDITIONING_KEYS = ("conditioning_image", "conditioning")
MAX_LIST_BYTES, MAX_LIST_ROWS = 2**26, 2**20
MAX_NAMED = 10  # files passed over that the log names
ORIENTATION = 0x0112  # the EXIF tag

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryInput:
    """The file of an image that is used as a query; the prompt that it was made from; the image that it was made from,
    such as a ControlNet's or the one that was edited; and the prompt without the concept that the query is for. None
    for what is not given."""

    image: Path
    prompt: str | None
    conditioning: Path | None = None
    without: str | None = None


def read_inputs(
    given: Sequence[Path], prompts: Sequence[str] = (), conditioning: Sequence[Path] = ()
) -> list[QueryInput]:
    """Reads the images and prompts of queries.

    Args:
        given: each an image; a folder of images, with prompts in its `metadata.jsonl`, `metadata.csv` or
            `metadata.parquet` if it has one; or such a list, with a row {"file_name" or "image": FILE, "text" or
            "prompt": PROMPT, "conditioning_image": FILE} for each query, its paths relative to the list.
        prompts, conditioning: one for each image in order, or one for all of them; none if the files have them.

    Raises QueryError if there are no images, a line cannot be read, or the numbers of images and prompts differ.
    """
    inputs = [one for path in given for one in _expand(path)]
    if conditioning:
        files = each_of(conditioning, len(inputs), "conditioning images")
        inputs = [replace(one, conditioning=file) for one, file in zip(inputs, files, strict=True)]
    if prompts:
        if known := next((one for one in inputs if one.prompt is not None), None):
            taken = f"A prompt was given, but the list that names {known.image} has one for it already"
            raise QueryError(f"{taken}. Leave --prompt out.")
        every = each_of(prompts, len(inputs), "prompts")
        inputs = [replace(one, prompt=prompt) for one, prompt in zip(inputs, every, strict=True)]
    return inputs


def image_file(image: ImageInput, path: Path, *, video: bool = False) -> Path:
    """The file of a query image, with the ending of its kind; a PIL image, or a file with another ending, is written
    beside `path`, under its name. A video is only checked to exist.

    Raises QueryError if there is no such file, it cannot be read as an image or be written, or it has hundreds of
    megapixels.
    """
    if isinstance(image, Image.Image):
        return _write_image(image, path)
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
            with Image.open(file, formats=PICTURE_FORMATS) as opened:
                opened.load()
                suffix = IMAGE_SUFFIXES[str(opened.format)]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise QueryError(f"{file} is too large for a query: {error} Give a smaller image.") from None
    except Exception as error:  # on bytes from anybody, a decoder may raise anything
        raise QueryError(f"{file} cannot be read as an image: {error}. Give a PNG or JPEG file.") from None
    if file.suffix.lower().replace("jpeg", "jpg").replace("tiff", "tif") == suffix:
        return file
    # A script that finds images by the endings of their names would pass it over.
    return Path(shutil.copyfile(file, path.with_suffix(suffix)))


def small_picture(image: ImageInput) -> bytes | None:
    """A query image for people to look at, as a WebP file of at most PICTURE_SIDE pixels; None for what is no image,
    such as a video."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(image, Image.Image):
                shown = ImageOps.exif_transpose(image).convert("RGB")
            else:
                with Image.open(image, formats=PICTURE_FORMATS) as opened:
                    shown = ImageOps.exif_transpose(opened).convert("RGB")
        shown.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        return encode_webp(shown, PICTURE_SIDE)
    except Exception:  # on bytes from anybody, a decoder may raise anything
        return None


def _write_image(image: Image.Image, path: Path) -> Path:
    """Writes a PIL image as it is, without loss: what a script turns or converts is left to the script."""
    # Scripts that turn a picture by its EXIF orientation must find it in the file.
    exif = Image.Exif()
    if (orientation := image.getexif().get(ORIENTATION)) is not None:
        exif[ORIENTATION] = orientation
    # PNG has no CMYK.
    for suffix in (".png", ".tif"):
        try:
            image.save(file := path.with_suffix(suffix), exif=exif)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return file
    raise QueryError(
        f"An image of mode {image.mode} cannot be written as PNG or TIFF. Give its file, or image.convert('RGB')."
    )


def each_of(given: Sequence[T], count: int, what: str) -> Sequence[T]:
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
    if is_folder:
        listed = [path / name for name in METADATA if (path / name).is_file()]
        yield from _read_list(listed[0]) if listed else (QueryInput(image, None) for image in _images_in(path))
    elif path.suffix.lower() in LIST_SUFFIXES and is_file:
        yield from _read_list(path)
    else:
        yield QueryInput(path, None)


def _images_in(folder: Path) -> list[Path]:
    """The images in a folder, whatever their names, in the order of their names. Files that are none are logged."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stray = [file for file in files if file.name.startswith(".") or file.name.lower() in STRAY_NAMES]
    others = [file for file in files if file not in stray]
    images = [file for file in others if file.suffix.lower() in PICTURE_ENDINGS or _is_image(file)]
    if not images:
        raise QueryError(f"The folder {folder} holds no images. Give images, or a folder with PNG or JPEG files.")
    if passed := [repr(file.name) for file in files if file not in images]:
        more = ", ..." if len(passed) > MAX_NAMED else ""
        logger.warning("Passed over in %s: %s%s.", folder, ", ".join(passed[:MAX_NAMED]), more)
    return images


def _is_image(file: Path) -> bool:
    """Whether a file is an image of a kind that is read, by its first bytes."""
    try:
        with Image.open(file, formats=PICTURE_FORMATS):
            return True
    except Exception:  # on bytes from anybody, a decoder may raise anything
        return False


def _read_list(path: Path) -> Iterator[QueryInput]:
    """The queries in a list: JSON lines, CSV or Parquet."""
    kind = path.suffix.lower()
    expected = 'expected one such as {"file_name": "a.png", "text": "a prompt"}'
    if kind in (".csv", ".parquet"):
        expected = "expected a file_name in each row, and the prompt as its text"
    try:
        if (size := path.stat().st_size) > MAX_LIST_BYTES:
            raise QueryError(f"{path} has {size} bytes; expected a list of at most {MAX_LIST_BYTES}.")
        read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(kind, _json_rows)
        rows = list(read(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise QueryError(f"{path} cannot be read: {error}.") from None
    if not rows:
        raise QueryError(f"{path} has no lines; {expected}.")
    for number, shown, row in rows:
        image, prompt, source = (_text(row, keys) for keys in (IMAGE_KEYS, PROMPT_KEYS, CONDITIONING_KEYS))
        if image is None:
            raise QueryError(f"Line {number} of {path} is {shown[:60]!r}; {expected}.")
        yield QueryInput(path.parent / image, prompt, None if source is None else path.parent / source)


def _json_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """The number, the text and the value of each line that is not empty; None for what is no JSON."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row: Any = parse(line)
            except ValueError:
                row = None
            yield number, line.strip(), row


def _csv_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """As `_json_rows`, for a table whose first line has the names of the columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, ",".join(map(str, row.values())), row


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """As `_json_rows`, for a Parquet file, of which the known columns are read."""
    parquet = import_extra("pyarrow.parquet", "parquet")
    try:
        file = parquet.ParquetFile(path)
        groups = (file.metadata.row_group(n) for n in range(file.metadata.num_row_groups))
        if file.metadata.num_rows > MAX_LIST_ROWS or sum(group.total_byte_size for group in groups) > MAX_LIST_BYTES:
            raise ValueError(f"it is larger than {MAX_LIST_ROWS} rows or {MAX_LIST_BYTES} bytes")
        known = [name for name in file.schema_arrow.names if name in (*IMAGE_KEYS, *PROMPT_KEYS, *CONDITIONING_KEYS)]
        rows = file.read(columns=known).to_pylist() if known else [{}] * min(file.metadata.num_rows, 1)
    except Exception as error:  # on bytes from anybody, a decoder may raise anything
        raise QueryError(f"{path} cannot be read as Parquet: {error}.") from None
    yield from ((number, str(row), row) for number, row in enumerate(rows, start=1))


def _text(row: Any, keys: Sequence[str]) -> str | None:
    """The first text that a JSON object has under one of these keys."""
    found = row if isinstance(row, dict) else {}
    return next((found[key] for key in keys if isinstance(found.get(key), str)), None)
