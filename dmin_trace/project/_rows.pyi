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
        rows: the shift of each row, and 2^31 more where its sign is minus one.
        at: where in the gradient the first tensor begins; the others follow it.
        tensors: of each the address in this process's memory, where its elements lie one after another, and how many
            there are; or also a number of channels C and of places P, where (..., C, P) lie as (..., P, C), float32.
        size: 4 for float32, 2 for bfloat16.
        signs: whether the signs of the elements are added in their place; nan for what is not finite.

    Returns:
        The sum of the elements' squares; those of a block are added up in float32.

    Raises:
        ValueError: the arrays do not fit each other, the elements run over the last row, or are in no whole groups of
            C by P.
    """

def fold(sketch: npt.NDArray[np.float32], sums: npt.NDArray[np.float32], places: npt.NDArray[np.uint32], /) -> None:
    """Permutes the sums, multiplies them by their signs, and adds up bins.

    Args:
        sketch: (v,), written.
        sums: (W,); W is a power of two, and a multiple of v.
        places: which sum is k-th after permutation, and 2^31 more where its sign is minus one, (W,).

    Raises:
        ValueError: the arrays do not fit each other.
    """

def divide(numbers: npt.NDArray[np.float32], divisor: float, /) -> float:
    """Divides numbers, which are written, by one, and returns the sum of the squares of what is left."""
