"""int8 is made here: projected gradients become the numbers that are stored."""

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.settings import Dtype


def quantise(grad: NDArray[np.float32], dtype: Dtype) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Turns projected gradients (n, R, v) into the stored numbers (n, R, v) of a dtype, and their scales (n, R).

    A stored int8 is the number divided by a step and rounded; the step is the largest magnitude of its row and
    timestep, divided by 127. The scale is the step times the ratio of the norms before and after rounding, so that the
    stored gradient keeps its norm, and the score of a sample with itself is exact. The scales of other dtypes are 1.
    A gradient that is not finite is stored as zeros; its norm excludes it from ranking.
    """
    # Row by row: a row is read several times, and is in the cache after the first.
    values = np.empty(grad.shape, dtype)
    scale = np.ones(grad.shape[:2], np.float32)
    scaled = np.empty(grad.shape[1:], np.float32)
    for row, stored, own in zip(grad, values, scale, strict=True):
        largest = np.maximum(row.max(axis=1), -row.min(axis=1))
        if not (finite := np.isfinite(largest)).all():
            row, largest = np.where(finite[:, None], row, 0), np.where(finite, largest, 0)
        if dtype != "int8":
            stored[...] = row
            continue
        step = largest / 127
        np.divide(row, np.where(step > 0, step, 1)[:, None], out=scaled)
        before = np.vecdot(scaled, scaled)
        stored[...] = np.rint(scaled, out=scaled).clip(-127, 127, out=scaled)
        after = np.vecdot(scaled, scaled)
        own[...] = step * np.sqrt(before / np.where(after > 0, after, 1))
    return values, scale


def row_checksum(row: NDArray[Any]) -> int:
    """The crc32c of a row's stored numbers, by which `Store.stored_row` can check it."""
    return int(google_crc32c.value(np.ascontiguousarray(row).reshape(-1).view(np.uint8)))
