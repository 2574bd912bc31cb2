"""Products of chunks: conversion of stored numbers."""

from __future__ import annotations

import numpy as np

from dmin_trace.search import products


def test_half_precision_is_converted_as_numpy_does() -> None:
    """Every float16 there is."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    memory = np.empty(2**16, np.float32)
    for numbers in (finite, finite[::3], finite[: 2 * 31000].reshape(2, -1)[:, ::2]):
        converted, expected = products.as_float32(numbers, memory), numbers.astype(np.float32)
        assert np.array_equal(converted.view(np.int32), expected.view(np.int32))
    for value in every[~np.isfinite(every)]:
        assert not np.isfinite(products.as_float32(np.array([[1, value, 2]], np.float16), memory)[0, 1])
