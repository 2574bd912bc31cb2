"""The kernels of `backend_triton`. Imported only where Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def add_row(total, square, base, column, inside, row_sign, columns, SIGNS: tl.constexpr, WHOLE: tl.constexpr):
    """Adds the elements at `column` of one row to `total`, and their squares to `square`."""
    if WHOLE:
        value = tl.load(base + column).to(tl.float32)
    else:
        value = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
    if SIGNS:
        sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
        value = tl.where(tl.abs(value) < float("inf"), sign, float("nan"))
    # A sign of int8 has its own sign in the highest bit: it flips that of the number without a conversion.
    flip = tl.load(columns + column).to(tl.int32) & -2147483648
    flipped = (value.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    return total + flipped * row_sign, square + value * value


@triton.jit(do_not_specialize=["offset", "count", "first_row", "row_count", "rows_each"])
def add_rows(
    values, shifts, row_signs, columns, sums, squares, offset, count, first_row, row_count, rows_each, width,
    SIGNS: tl.constexpr, BLOCK: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Adds a tensor of `count` elements to the (splits, W) sums. It begins at element `offset` of row `first_row`.

    A program owns BLOCK of the W sums and one part of the rows. It reads the elements that belong to its sums, so no
    two programs write one number, and the order of additions is always the same.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    places = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    begin = split * rows_each
    end = tl.minimum(begin + rows_each, row_count)
    # The first and the last row may lie partly outside the tensor.
    whole_begin = tl.where((begin == 0) & (offset > 0), 1, begin)
    last_is_whole = (offset + count) % width == 0
    whole_end = tl.where((end == row_count) & (last_is_whole == 0), tl.maximum(end - 1, whole_begin), end)
    shifts += first_row
    row_signs += first_row
    start = values - offset
    wide_width = tl.full([], width, tl.int64)
    for part in tl.static_range(2):
        # First the rows before the whole ones, then those after them: one at most on each side.
        first = begin if part == 0 else whole_end
        stop = tl.minimum(whole_begin, end) if part == 0 else end
        for row in range(first, stop):
            column = (places - tl.load(shifts + row)) & (width - 1)
            element = row * wide_width + (column - offset)
            inside = (element >= 0) & (element < count)
            sign = tl.load(row_signs + row).to(tl.float32)
            base = start + row * wide_width
            total, square = add_row(total, square, base, column, inside, sign, columns, SIGNS, False)
    for row in tl.range(whole_begin, whole_end, loop_unroll_factor=UNROLLED):
        column = (places - tl.load(shifts + row)) & (width - 1)
        sign = tl.load(row_signs + row).to(tl.float32)
        base = start + row * wide_width
        total, square = add_row(total, square, base, column, column >= 0, sign, columns, SIGNS, True)
    at = sums + split * width + places
    tl.store(at, tl.load(at) + total)
    at = squares + split * tl.num_programs(0) + block
    tl.store(at, tl.load(at) + tl.sum(square, 0).to(tl.float64))


@triton.jit
def fold(
    sums, squares, places, signs, out, norm, out_squares, splits, width, dimension, folds,
    SQUARES: tl.constexpr, NORMALISED: tl.constexpr, FOLDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compresses the W sums to v numbers by OPORP and, if NORMALISED, divides them by the gradient's norm."""
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, folds, FOLDS):
        k = first + tl.arange(0, FOLDS)
        inside = (k < folds)[:, None] & (bins < dimension)[None, :]
        place = tl.load(places + k[:, None] * dimension + bins[None, :], mask=inside, other=0)
        value = tl.zeros([FOLDS, BLOCK], tl.float32)
        for split in range(splits):
            value += tl.load(sums + split * width + place, mask=inside, other=0.0)
        total += tl.sum(value * tl.load(signs + place, mask=inside, other=0).to(tl.float32), 0)
    square = tl.sum(tl.load(squares + tl.arange(0, SQUARES)), 0)
    if NORMALISED:
        root = tl.sqrt(square).to(tl.float32)
        total = total / root
        wide = tl.where(bins < dimension, total, 0.0).to(tl.float64)
        tl.store(out_squares + tl.program_id(0), tl.sum(wide * wide, 0))
        if tl.program_id(0) == 0:
            tl.store(norm, root)
    elif tl.program_id(0) == 0:
        tl.store(norm, square)
    tl.store(out + bins, total, mask=bins < dimension)


@triton.jit
def normalise(out, out_squares, dimension, SQUARES: tl.constexpr, BLOCK: tl.constexpr):
    """Divides the v numbers by their norm, and makes all of them 0 if a norm is 0, infinite or NaN."""
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    root = tl.sqrt(tl.sum(tl.load(out_squares + tl.arange(0, SQUARES)), 0)).to(tl.float32)
    value = tl.load(out + bins, mask=bins < dimension, other=0.0) / root
    tl.store(out + bins, tl.where(tl.abs(value) < float("inf"), value, 0.0), mask=bins < dimension)
