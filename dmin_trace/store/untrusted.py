"""Files that anybody may have written: links are not followed, JSON has one meaning, .npz files hold no pickle.

A folder from somebody else may hold a link to a file of the user's, a pipe that blocks its reader, or a file that takes
all memory to parse. Each is refused with a ValueError or OSError that says in a few words what is wrong; the caller
knows what the file is for.
"""

import hashlib
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_JSON_BYTES = 2**24
"""The metadata of 100,000 parameters. Parsed, the worst of it takes some 25 times as much memory."""
MAX_JSON_DEPTH = 32
"""Lists and objects within each other, so that no recursion over parsed JSON goes deeper."""
MAX_DEFLATE_RATIO = 1032
"""How many times longer than an .npz file its content is at most, if it is compressed."""


def size_within(folder: Path, names: Sequence[str]) -> int | None:
    """The size of the regular file that these names lead to, from a folder down; None if there is none.

    The folder itself may be a link: the user gave its path. Raises ValueError for a link below it.
    """
    at, found = os.fspath(folder), None
    for name in names:
        at = f"{at}/{name}"
        try:
            found = os.lstat(at)
        except (OSError, ValueError):
            return None
        if stat.S_ISLNK(found.st_mode):
            raise ValueError(f"{at} is a symbolic link")
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None


def size_of(folder: Path, names: Sequence[str]) -> int | None:
    """As `size_within`, and None if there is a link."""
    try:
        return size_within(folder, names)
    except ValueError:
        return None


def read_json(folder: Path, names: Sequence[str]) -> Any:
    """The content of the JSON file that these names lead to, from a folder down.

    Raises ValueError as `size_within` and `parse` do, and if it is missing or too large; OSError if it is unreadable.
    """
    if (size := size_within(folder, names)) is None:
        raise ValueError("it is missing, or no file")
    if size > MAX_JSON_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {MAX_JSON_BYTES}")
    with folder.joinpath(*names).open("rb") as file:
        return parse(file.read(size))


def parse(text: bytes | str) -> Any:
    """Parses JSON of RFC 8259 in UTF-8 with unique names, finite numbers and limited depth. Raises ValueError."""
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is too deep") from None
    _check_depth([found], MAX_JSON_DEPTH)
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever its order and white space. Raises ValueError for NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise ValueError("it is too deep")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            _check_depth(inner, left - 1)


@dataclass(frozen=True)
class ArrayHeader:
    """What an .npz file claims of one of its arrays."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        """The bytes that the array takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_arrays(
    path: Path, names: Sequence[str], check: Callable[[Mapping[str, ArrayHeader]], None]
) -> dict[str, NDArray[Any]]:
    """Reads the arrays with these names from an .npz file.

    `check` is called with their headers before any array is allocated: a small file can claim all memory. What it
    raises passes through. Raises ValueError if the file cannot be read, lacks an array or claims more than it can hold.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")  # opening a pipe would block
        headers = {}
        with zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as member:
                    first = np.lib.format.read_magic(member) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(member)
                    headers[name] = ArrayHeader(shape, dtype)
        check(headers)
        limit = MAX_DEFLATE_RATIO * path.stat().st_size
        if any(header.size_bytes > limit for header in headers.values()):
            raise ValueError("it claims more numbers than it can hold")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None
