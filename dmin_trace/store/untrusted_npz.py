"""Arrays from an .npz file that anybody may have written: no pickle, and claimed sizes are checked first.

An array in an .npz file starts with a header that claims its shape. NumPy allocates what is claimed before it reads, so
a small file can claim all memory.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DEFLATE_RATIO = 1032
"""How many times longer than the file its content is at most, if it is compressed."""


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

    Args:
        path: the file.
        names: the arrays that are read; others in the file are left alone.
        check: called with the header of each array before any array is allocated. What it raises passes through.

    Raises:
        ValueError: the file cannot be read, lacks an array, or claims more than it can hold. The message says what is
            wrong in a few words.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")  # a pipe would block whoever opens it
        with zipfile.ZipFile(path) as archive:
            headers = {name: _header(archive, name) for name in names}
        check(headers)
        limit = MAX_DEFLATE_RATIO * path.stat().st_size
        if any(header.size_bytes > limit for header in headers.values()):
            raise ValueError("it claims more numbers than it can hold")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None


def _header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        return ArrayHeader(shape, dtype)
