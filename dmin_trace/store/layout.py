"""What lies where in a store, and how large it is.

    trace.zarr/   a Zarr v3 group; its attributes are the Header, and what `metadata` adds to it
      grad     (N, R, v) int8 | float16 | float32   projected gradients; chunks (C, R, v)
      numbers  (N, 1 + 2 R + T) float64             sample, R norms, T losses, R scales; chunks (C, 1 + 2 R + T)
      meta/    one array (N,) for each readable column: string, int64 or float64; chunks (C,)
      thumbnails (N,) bytes                         a WebP file for each sample, empty if it has none; chunks (C,)
      done     (ceil(N / C),) uint8                 a mark for each chunk of rows; chunks (1,)

A sample has T timesteps and R projected gradients. R is T, or less where the gradients of timesteps are pooled.

Thumbnails may be missing. Rows are numbered in order of arrival. Random projections do not compress, so the file of a
chunk is the array in C order with a crc32c behind it: ordinary Zarr, and readable by memory map.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmin_trace.settings import Dtype
from dmin_trace.store.header import MAX_CHUNK_BYTES, ColumnKind, Header, number_bytes

CHUNK_BYTES = 2**24
"""Bytes of a chunk of gradients in a small store."""
CHUNKS_OF_LARGE_STORE = 2**10
"""Beyond so many chunks of CHUNK_BYTES, chunks grow, up to MAX_CHUNK_BYTES: files cost time at each start."""
CHECKSUM_BYTES = 4
"""Bytes of crc32c behind each chunk."""
FAILED = -1.0
"""The norm of a sample that could not be loaded. No gradient has this norm, and a row with it is never ranked."""
BYTES = "variable_length_bytes"
"""Zarr's name for values that are bytes of any length."""
THUMBNAILS = "thumbnails"
"""The array with the small pictures of the samples."""
FILE_COLUMN = "file_name"
"""The readable column with the file of a sample."""
UNSPLIT_AXES = {"grad": 2, "numbers": 1}
"""The axes behind that of the rows, which chunks do not split."""
STORED: dict[ColumnKind, str] = {"string": "string", "integer": "int64", "number": "float64"}
"""How the values of a readable column are stored."""
MISSING: dict[ColumnKind, str | int | float] = {"string": "", "integer": -1, "number": math.nan}
"""The value of a sample that has none."""


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a store, as Zarr has it; `packed` says whether Blosc compresses its chunks."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    fill: str | int | float
    axes: tuple[str, ...]
    packed: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def file_bytes(self) -> int | None:
        """The size of a chunk's file; None where it differs from chunk to chunk. The last chunk is padded."""
        if self.packed or self.dtype in ("string", BYTES):
            return None
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize + CHECKSUM_BYTES


def array_layouts(header: Header) -> dict[str, ArrayLayout]:
    """The arrays of a store by name, in the order in which a chunk of them is written."""
    count, rows, groups, v = header.samples, header.chunk_rows, header.gradient_count, header.dimension
    places, fill = number_columns(len(header.timesteps), header.group_count), 0 if header.dtype == "int8" else math.nan
    width, packed, pooled = places["scale"].stop, header.codec != "none", header.group_count is not None
    axes = ("row", "timesteps" if pooled else "timestep", "dimension")
    values = {"values": f"stored number times the scale of its row and {header.gradient_of} in the array numbers"}
    columns = {"columns": {name: [place.start, place.stop] for name, place in places.items()}}
    layouts = {
        "grad": ArrayLayout((count, groups, v), header.dtype, (rows, groups, v), fill, axes, packed, values),
        "numbers": ArrayLayout((count, width), "float64", (rows, width), math.nan, ("row", "column"), False, columns),
    }
    for name, kind in header.columns.items():
        layouts[f"meta/{name}"] = ArrayLayout((count,), STORED[kind], (rows,), MISSING[kind], ("row",))
    if header.thumbnails is not None:
        pictures = {"values": "WebP files"}
        layouts[THUMBNAILS] = ArrayLayout((count,), BYTES, (rows,), "", ("row",), attributes=pictures)
    layouts["done"] = ArrayLayout((header.chunks,), "uint8", (1,), 0, ("chunk",))
    return layouts


def number_columns(timesteps: int, group_count: int | None = None) -> dict[str, slice]:
    """Which columns of the array `numbers` hold what, for T timesteps, pooled into groups or not."""
    groups = group_count or timesteps
    losses, scales, end = 1 + groups, 1 + groups + timesteps, 1 + 2 * groups + timesteps
    return {"sample": slice(0, 1), "norm": slice(1, losses), "loss": slice(losses, scales), "scale": slice(scales, end)}


def choose_chunk_rows(
    samples: int, timesteps: int, dimension: int, dtype: Dtype, writers: int = 1, group_count: int | None = None
) -> int:
    """C, the rows of a chunk: a power of two, for about CHUNK_BYTES, more in large stores, and one chunk a writer."""
    gradients = (group_count or timesteps) * dimension * np.dtype(dtype).itemsize
    row = max(gradients, number_bytes(timesteps, group_count))
    size = min(max(CHUNK_BYTES, samples * row // CHUNKS_OF_LARGE_STORE), MAX_CHUNK_BYTES)
    return 1 << max(1, min(size // row, samples // writers)).bit_length() - 1


def bytes_of(header: Header) -> int:
    """The bytes of a store's numbers on disk. Texts and metadata are not counted, and little beside them."""
    layouts = (replace(layout, packed=False) for layout in array_layouts(header).values())
    return header.chunks * sum(layout.file_bytes or 0 for layout in layouts)


def max_thumbnail_bytes(side: int) -> int:
    """The bytes of a thumbnail with this longer side, at most: 6,000 with 128 pixels."""
    return max(1024, 6000 * side**2 // 128**2)


def max_thumbnails_bytes(header: Header) -> int:
    """The bytes that all thumbnails of a store take on disk, at most."""
    facts = header.thumbnails
    return 0 if facts is None else header.samples * (4 + max_thumbnail_bytes(facts.side))


def chunk_names(name: str, chunk: int) -> list[str]:
    """The folders between a store and the file of a chunk of rows, and the file's name: Zarr v3's default keys."""
    return [*name.split("/"), "c", str(chunk), *["0"] * UNSPLIT_AXES.get(name, 0)]


def chunk_file(path: Path, name: str, chunk: int) -> Path:
    """The file of a chunk of rows of the array `name`."""
    return path.joinpath(*chunk_names(name, chunk))


def index_beside(path: Path) -> Path:
    """The folder beside a store that holds its index."""
    return path.with_name(path.name.removesuffix(".zarr") + ".index")


def weights_beside(path: Path) -> Path:
    """The file beside a store that holds the weights of its capture."""
    return path.with_name(path.name.removesuffix(".zarr") + ".weights.safetensors")
