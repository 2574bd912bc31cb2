"""Inner products of long vectors in float64, and the checks that every method makes of what it is given.

The methods need gradients only by their inner products with each other. Those are taken in float64, a block of columns
at a time: gradients of different samples are nearly parallel (cosines of 0.99 and more at noisy timesteps), and what
tells them apart would drown in float32's rounding over millions of elements.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, SettingsError

Array = NDArray[np.float32] | NDArray[np.float64] | torch.Tensor
Scores = NDArray[np.float64]

# Of a block, in float64: 128 MiB.
ELEMENTS = 1 << 24


def as_matrix(vectors: Array, name: str, axes: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """An array of the axes that a method needs, without a copy.

    Args:
        vectors: float32 or float64; a numpy array, or a tensor on the CPU.
        name: what it is called in an error.
        axes: its axes, as "N P".

    Raises:
        QueryError: another number of axes, none of something, or another type.
    """
    matrix = vectors.detach().cpu().numpy() if isinstance(vectors, torch.Tensor) else vectors
    if matrix.dtype not in (np.float32, np.float64):
        raise QueryError(f"{name} is {matrix.dtype}; float32 or float64 is expected.")
    if matrix.ndim != len(axes.split()) or 0 in matrix.shape:
        raise QueryError(f"{name} has the shape {matrix.shape}; ({', '.join(axes.split())}) is expected, none of it 0.")
    return matrix


def products(left: NDArray[np.floating], right: NDArray[np.floating]) -> Scores:
    """Inner products of the rows of one matrix with those of another.

    Args:
        left: (A, P).
        right: (B, P).

    Returns:
        (A, B) float64.

    Raises:
        QueryError: vectors of different lengths, or with elements that are not finite.
    """
    if left.shape[1] != right.shape[1]:
        raise QueryError(
            f"Vectors of {left.shape[1]} and of {right.shape[1]} elements; queries and training samples must be "
            "gradients of the same parameters."
        )
    total = np.zeros((len(left), len(right)))
    columns = max(1, ELEMENTS // max(len(left), len(right)))
    for start in range(0, left.shape[1], columns):
        block = slice(start, start + columns)
        a = left[:, block].astype(np.float64)
        total += a @ (a if right is left else right[:, block].astype(np.float64)).T
    if not np.isfinite(total).all():
        raise QueryError("Inner products are not finite: look for nan or infinity in the gradients.")
    return total


def positive(value: float, name: str) -> float:
    """A strength that must be above zero.

    Raises:
        SettingsError: it is not.
    """
    if not (np.isfinite(value) and value > 0):
        raise SettingsError(f"{name} is {value}; a finite number above 0 is expected.")
    return value
