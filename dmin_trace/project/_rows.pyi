"""The compiled kernel of `backend_c`: rotation on a CPU."""

import numpy as np
import numpy.typing as npt

def add(
    sums: npt.NDArray[np.float32],
    columns: npt.NDArray[np.int8],
    rows: npt.NDArray[np.uint32],
    at: int,
    tensors: list[tuple[int, ...]],
    size: int,
    signs: bool,
    /,
) -> float:
    """Adds elements of the gradient to the sums, each times the signs of its row and its column.

    Args:
        sums: (W,), written.
        columns: the sign of each column, (W,).
        rows: the shift of each row, plus 2^31 if its sign is minus one.
        at: the first tensor's first element in the gradient; the other tensors follow it.
        tensors: for each, the address of its elements in this process's memory, one after another, and their number; or
            also a number of channels C and of places P, if (..., C, P) is stored as (..., P, C) in float32.
        size: 4 for float32, 2 for bfloat16.
        signs: add the sign of each element in its place, and NaN for an element that is not finite.

    Returns:
        The sum of the elements' squares, in float32 within a block.

    Raises:
        ValueError: the arrays do not fit each other, the elements run past the last row, or are not whole groups of C
            by P.
    """

def fold(projected: npt.NDArray[np.float32], sums: npt.NDArray[np.float32], places: npt.NDArray[np.uint32], /) -> None:
    """Permutes the sums, multiplies them by their signs, and adds up bins.

    Args:
        projected: (v,), written.
        sums: (W,); W is a power of two, and a multiple of v.
        places: the sum that is k-th after permutation, plus 2^31 if its sign is minus one, (W,).

    Raises:
        ValueError: the arrays do not fit each other.
    """

def divide(numbers: npt.NDArray[np.float32], divisor: float, /) -> float:
    """Divides numbers in place, and returns the sum of the squares of the results."""
