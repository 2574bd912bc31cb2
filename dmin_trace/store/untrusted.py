"""Files that anybody may have written: found without being led elsewhere, and JSON that means one thing.

A folder from somebody else may hold a link to a file of the user's, a pipe that blocks whoever opens it, or metadata
that takes all memory to parse. Here each is refused with a ValueError or OSError that says what is wrong, in a few
words; the caller knows what the file was for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

LARGEST_JSON = 2**24
"""Bytes: the metadata of 100,000 parameters. Parsed, the worst of it takes some 25 times as much memory."""
DEEPEST_JSON = 32
"""Lists and objects within each other: no recursion over what is parsed goes deeper."""


def size_within(folder: Path, names: Sequence[str]) -> int | None:
    """The size of the regular file at these names, one within the other, below a folder; None if there is none.

    The folder itself may be a link: it is the user's word. Raises ValueError where a link lies below it.
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


def read_json(folder: Path, names: Sequence[str], largest: int = LARGEST_JSON) -> Any:
    """What the JSON file at these names below a folder holds. Raises ValueError as `size_within` and `parse` do, and
    for one that is missing, no file, or too large; OSError where it cannot be read."""
    size = size_within(folder, names)
    if size is None:
        raise ValueError("it is missing, or no file")
    if size > largest:
        raise ValueError(f"it has {size} bytes, expected at most {largest}")
    with folder.joinpath(*names).open("rb") as file:
        return parse(file.read(size))


def parse(text: bytes | str) -> Any:
    """JSON as RFC 8259 has it, in UTF-8, but that a name may be given once, numbers are finite, and nothing is deep.

    Raises ValueError that says in a few words what is wrong.
    """
    try:
        found = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is too deep") from None
    _check_depth(found)
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON value however it is spelled: order and white space do not count. Raises ValueError for NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it says something twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("it holds a number that is too large")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST_JSON + 1):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError("it is too deep")
