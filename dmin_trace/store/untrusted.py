"""Files that anybody may have written: links are not followed, and JSON has one meaning.

A folder from somebody else may hold a link to a file of the user's, a pipe that blocks its reader, or metadata that
takes all memory to parse. Each is refused with a ValueError or OSError that says in a few words what is wrong; the
caller knows what the file is for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**24
"""The metadata of 100,000 parameters. Parsed, the worst of it takes some 25 times as much memory."""
MAX_JSON_DEPTH = 32
"""Lists and objects within each other, so that no recursion over parsed JSON goes deeper."""


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


def read_json(folder: Path, names: Sequence[str], largest: int = MAX_JSON_BYTES) -> Any:
    """The content of the JSON file that these names lead to, from a folder down.

    Raises ValueError as `size_within` and `parse` do, and if the file is missing, no regular file, or too large;
    OSError if it cannot be read.
    """
    size = size_within(folder, names)
    if size is None:
        raise ValueError("it is missing, or no file")
    if size > largest:
        raise ValueError(f"it has {size} bytes, expected at most {largest}")
    with folder.joinpath(*names).open("rb") as file:
        return parse(file.read(size))


def parse(text: bytes | str) -> Any:
    """Parses JSON of RFC 8259 in UTF-8 with unique names, finite numbers and limited depth.

    Raises ValueError that says in a few words what is wrong.
    """
    try:
        found = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_constant=_finite,
            parse_float=_finite,
        )
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
