"""Inner products of a chunk's rows with queries, in float32."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.store import Store

PART_NUMBERS = 2**21
"""Stored numbers that a thread reads at a time."""
MAX_PART_ROWS = 2**7
"""Rows that are multiplied with many queries at a time; all queries are fetched from memory each time."""
TILE_NUMBERS = 2**18
"""Numbers that are converted to float32 and multiplied at a time, so that they stay in a core's cache."""
MIN_TILE_WIDTH = 2**13
"""Numbers of a row in a tile, where a row has so many: memory is slow to give narrower pieces."""
HALF_BITS = np.int32(-0x70002000)
"""The bits of a float16, its sign repeated in front, that float32 keeps after a shift by 13."""


class ChunkProducts:
    """The inner products of chunks with the same queries. Threads may share one: each has memory of its own."""

    def __init__(self, store: Store, queries: NDArray[np.float32], *, per_timestep: bool = False) -> None:
        """Args:
        store: the store.
        queries: (Q, T, v), contiguous.
        per_timestep: give the product at each timestep, not their sum.
        """
        header = store.header
        self._store = store
        self._per_timestep = per_timestep
        # Without scales the timesteps are one long vector; memory is fastest at products of whole rows.
        steps = len(header.timesteps) if header.dtype == "int8" or per_timestep else 1
        self._queries = queries.reshape(len(queries), steps, -1)
        length = self._queries.shape[2]
        few = min(PART_NUMBERS // (steps * length), TILE_NUMBERS // min(length, MIN_TILE_WIDTH))
        self._rows = min(max(1, few, min(MAX_PART_ROWS, 2 * len(queries))), header.chunk_rows)
        self._columns = length if header.dtype == "float32" else min(max(1, TILE_NUMBERS // self._rows), length)
        self._memory = threading.local()

    def __call__(self, chunk: int, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """(S, n, Q) the products of a chunk's n rows; S is T for products per timestep, or 1.

        Args:
            chunk: its number.
            scale: (n, T), the scales of its rows.
        """
        header, queries, memory = self._store.header, self._queries, self._memory
        _, steps, length = queries.shape
        products = np.zeros((steps if self._per_timestep else 1, len(scale), len(queries)), np.float32)
        if not hasattr(memory, "read"):
            memory.read = np.empty(self._rows * header.sample_bytes if header.codec == "none" else 0, np.uint8)
            memory.tile = np.empty(0 if header.dtype == "float32" else self._rows * self._columns, np.float32)
            memory.product = np.empty((self._rows, len(queries)), np.float32)
        start = 0
        for part in self._store.grad_parts(chunk, self._rows, memory.read):
            here, product = slice(start, start + len(part)), memory.product[: len(part)]
            rows = part.reshape(len(part), steps, length)
            for t in range(steps):
                for first in range(0, length, self._columns):
                    tile = as_float32(rows[:, t, first : first + self._columns], memory.tile)
                    np.matmul(tile, queries[:, t, first : first + self._columns].T, out=product)
                    if header.dtype == "int8":
                        # The scale is applied to Q products, not to v stored numbers.
                        product *= scale[here, t, None]
                    products[t if self._per_timestep else 0, here] += product
            start += len(part)
        return products


def as_float32(numbers: NDArray[Any], memory: NDArray[np.float32]) -> NDArray[np.float32]:
    """Stored numbers as float32: themselves if they are, or converted in `memory`, which has room for them."""
    if numbers.dtype == np.float32:
        return numbers
    converted = memory[: numbers.size].reshape(numbers.shape)
    if numbers.dtype != np.float16:
        np.copyto(converted, numbers)
        return converted
    # NumPy converts float16 one number at a time. Moving its bits to where float32 has them is four times as fast; the
    # multiplication sets the exponent right, for subnormal numbers too.
    bits = converted.view(np.int32)
    np.copyto(bits, numbers.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, HALF_BITS, out=bits)
    np.multiply(converted, np.float32(2.0**112), out=converted)
    # Infinity and NaN have become finite numbers of 2^16 or more.
    if max(converted.max(), -converted.min()) >= 2.0**16:
        converted[~np.isfinite(numbers)] = np.nan
    return converted
