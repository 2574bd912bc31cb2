"""Both kinds of projection in torch, on any device, which is never synchronised."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dmin_trace.project.plan import Plan

SMALL_TENSOR_SIZE, MAX_JOINED_SIZE = 2**16, 2**18
"""Smaller tensors are joined up to a size, in elements: models have hundreds, and a call for each would be the cost."""

PART_SIZE = 2**18
"""Elements that are converted to float32, squared and added at a time: few calls, and one read into the cache."""


@dataclass(frozen=True)
class DeviceNumbers:
    """A plan's numbers on a device.

    rows, columns: rotation: the shift and the sign of each row; the sign of each column, (W,) float32.
    places: the order of the W sums (rotation), or the bin of each element (uniform), int32.
    signs: the sign of each of the W sums (rotation), or of each element (uniform), int8.
    """

    rows: list[tuple[int, int]]
    columns: torch.Tensor
    places: torch.Tensor
    signs: torch.Tensor


def device_numbers(plan: Plan, device: torch.device) -> DeviceNumbers:
    """Returns the plan's numbers on a device. They are drawn and copied once: a copy to a GPU waits for it."""
    if device not in plan.prepared:
        rotation = plan.kind == "rotation"
        plan.prepared[device] = DeviceNumbers(
            rows=list(zip(plan.shifts().tolist(), plan.row_signs().tolist(), strict=True)) if rotation else [],
            columns=torch.from_numpy(plan.column_signs() if rotation else np.empty(0)).to(device, torch.float32),
            places=torch.from_numpy(plan.order() if rotation else plan.bins()).to(device),
            signs=torch.from_numpy(plan.signs()).to(device),
        )
    numbers: DeviceNumbers = plan.prepared[device]
    return numbers


def signs_of(gradient: torch.Tensor) -> torch.Tensor:
    """Returns the sign of each element, and NaN for an element that is not finite, so that the norm is NaN too."""
    # torch.sign gives 0 for NaN, and 1 for infinity.
    return torch.sign(gradient).masked_fill_(~torch.isfinite(gradient), torch.nan)


class TorchSums:
    """The sums of one gradient in a plan's bins. `finish` and `finish_normalised` end them."""

    def __init__(self, plan: Plan, device: torch.device, signs: bool) -> None:
        self._plan, self._numbers, self._signs = plan, device_numbers(plan, device), signs
        # A row that runs past the last of the W sums continues in a second half: one call rather than two.
        count = 2 * plan.width if plan.kind == "rotation" else plan.dimension
        self._sums = torch.zeros(count, dtype=torch.float32, device=device)
        self._converted = self._sums.new_empty(0)
        # On other devices calls cost more than the cache gains.
        self._part = PART_SIZE if device.type == "cpu" else max(PART_SIZE, plan.width)
        self._squares: list[torch.Tensor] = []

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Adds tensors up to the plan's length, and returns their number of elements, or one above that length."""
        add = self._add_rows if self._plan.kind == "rotation" else self._add_to_bins
        end = 0
        for tensor in join_small(tensors):
            flat = tensor.detach().reshape(-1)
            del tensor
            if self._signs:
                flat = signs_of(flat)
            at, end = end, end + flat.numel()
            if end > self._plan.length:
                break
            if flat.dtype != self._sums.dtype and not self._converted.numel():
                self._converted = self._sums.new_empty(min(self._part, self._plan.width))
            add(flat, at)
            del flat
        return end

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `project` returns."""
        square = torch.stack(self._squares).to(_widest_float(self._sums.device)).sum()
        if self._plan.kind == "uniform":
            return self._sums, square
        first, second = self._sums[: self._plan.width], self._sums[self._plan.width :]
        first += second
        # The second half is free now. It takes the signs as float32, then the permuted sums; nothing is allocated.
        first *= second.copy_(self._numbers.signs)
        torch.index_select(first, 0, self._numbers.places, out=second)
        return second.view(-1, self._plan.dimension).sum(0), square

    def finish_normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `compress_gradient` returns."""
        projected, square = self.finish()
        norm = square.sqrt().float()
        # Divided by the gradient's norm first: the squares of very small or large numbers would leave float32. If that
        # norm is 0, infinite or NaN, the second division gives NaN everywhere. No branch reads the norm: that would
        # synchronise the GPU.
        projected.div_(norm)
        projected.div_(torch.linalg.vector_norm(projected, dtype=_widest_float(projected.device)))
        return projected.nan_to_num_(0.0, 0.0, 0.0), norm

    def _add_rows(self, flat: torch.Tensor, at: int) -> None:
        numbers, sums = self._numbers, self._sums
        # Without autograd's bookkeeping, whose share of many short calls is noticeable.
        with torch.inference_mode():
            for done, row, column, count in _row_parts(at, flat.numel(), self._plan.width, self._part):
                part = self._as_float32(flat.narrow(0, done, count))
                # Squared here, while the part is in the cache: a separate norm would read the gradient twice.
                self._squares.append(torch.dot(part, part))
                shift, sign = numbers.rows[row]
                signs = numbers.columns.narrow(0, column, count)
                sums.narrow(0, shift + column, count).addcmul_(part, signs, value=sign)

    def _add_to_bins(self, flat: torch.Tensor, at: int) -> None:
        for done in range(0, flat.numel(), PART_SIZE):
            part = self._as_float32(flat[done : done + PART_SIZE])
            here = slice(at + done, at + done + part.numel())
            self._squares.append(torch.dot(part, part))
            self._sums.index_add_(0, self._numbers.places[here], part * self._numbers.signs[here])

    def _as_float32(self, part: torch.Tensor) -> torch.Tensor:
        """The part itself, or a copy in memory that all parts share."""
        return part if part.dtype == torch.float32 else self._converted.narrow(0, 0, part.numel()).copy_(part)


def _row_parts(at: int, count: int, width: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts `count` elements that begin at element `at` into parts of one row and at most `size` elements.

    Yields each part's first element in the tensor, its row, its column, and its length. Whole rows are taken `size`
    columns at a time, so that the signs and the sums of wide rows stay in the cache.
    """
    first = min(-at % width, count)
    whole = (count - first) // width
    last = first + whole * width
    for done in range(0, first, size):
        yield done, at // width, at % width + done, min(size, first - done)
    row = (at + first) // width
    for column in range(0, width, size):
        length = min(size, width - column)
        for k in range(whole):
            yield first + k * width + column, row + k, column, length
    for done in range(last, count, size):
        yield done, row + whole, done - last, min(size, count - done)


def join_small(
    tensors: Iterable[torch.Tensor], size_below: int = SMALL_TENSOR_SIZE, joined_size: int = MAX_JOINED_SIZE
) -> Iterator[torch.Tensor]:
    """Yields the tensors, with neighbours below a size joined to one; sizes are in elements."""
    small: list[torch.Tensor] = []
    count = 0
    for tensor in tensors:
        size = tensor.numel()
        # Autocast does not support torch.cat in float64.
        is_small = size < size_below and tensor.dtype != torch.float64
        alike = small and tensor.dtype == small[0].dtype and tensor.device == small[0].device
        if small and not (is_small and alike and count + size <= joined_size):
            yield _laid_end_to_end(small)
            small, count = [], 0
        if is_small:
            small.append(tensor)
            count += size
        else:
            yield tensor
        del tensor
    if small:
        yield _laid_end_to_end(small)


def _laid_end_to_end(tensors: list[torch.Tensor]) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    with torch.no_grad():
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _widest_float(device: torch.device) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if device.type == "mps" else torch.float64
