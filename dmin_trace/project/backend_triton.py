"""Rotation on a CUDA device: one pass over the gradient, in kernels of Triton, which comes with torch for CUDA."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from dmin_trace.project.backend_torch import join_small, signs_of
from dmin_trace.project.plan import Plan

BLOCK_SIZE, UNROLLED_ROWS, WARPS = 1024, 4, 4
"""Sums that one program owns, rows whose elements it reads at a time, and its warps."""

SUMS_SIZE = 2**21
"""Partial sums, at most, if W is smaller: rows are split among so many programs that the device is busy."""

SMALL_TENSOR_SIZE, MAX_JOINED_SIZE = 2**21, 2**23
"""Smaller tensors are joined up to a size, in elements: copying them costs less than launching a kernel for each."""

FOLD_SIZE, FOLDS = 1024, 32
"""Numbers that one program of the second pass reads at a time, and how many of them belong to one bin."""


@cache
def load_kernels() -> ModuleType | None:
    """The kernels, or None where Triton is not installed. Triton takes long to import: only a CUDA tensor does it."""
    try:
        return import_module("dmin_trace.project._rows_triton")
    except ImportError:
        return None


@dataclass(frozen=True)
class DeviceRotation:
    """A rotation's numbers on a device: (rows,), (rows,), (W,), (W,) and (W,), int32 or int8."""

    shifts: torch.Tensor
    row_signs: torch.Tensor
    columns: torch.Tensor
    places: torch.Tensor
    signs: torch.Tensor


def device_rotation(plan: Plan, device: torch.device) -> DeviceRotation:
    """Returns the plan's numbers on a device. They are drawn and copied once: a copy to a GPU waits for it."""
    key = "triton", device
    if key not in plan.prepared:
        drawn = plan.shifts().astype("int32"), plan.row_signs(), plan.column_signs(), plan.order(), plan.signs()
        plan.prepared[key] = DeviceRotation(*(torch.from_numpy(numbers).to(device) for numbers in drawn))
    numbers: DeviceRotation = plan.prepared[key]
    return numbers


class TritonSums:
    """The sums of one gradient in a plan's bins. `finish` and `finish_normalised` end them."""

    def __init__(self, plan: Plan, device: torch.device, kernels: ModuleType, signs: bool) -> None:
        self._plan, self._device, self._kernels, self._signs = plan, device, kernels, signs
        self._numbers = device_rotation(plan, device)
        self._block = min(BLOCK_SIZE, plan.width)
        self._splits = max(1, SUMS_SIZE // plan.width)
        self._sums = torch.zeros(self._splits * plan.width, dtype=torch.float32, device=device)
        blocks = self._splits * (plan.width // self._block)
        self._squares = torch.zeros(blocks, dtype=torch.float64, device=device)

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Adds tensors up to the plan's length, and returns their number of elements, or one above that length."""
        end = 0
        with torch.cuda.device(self._device):
            for tensor in join_small(tensors, SMALL_TENSOR_SIZE, MAX_JOINED_SIZE):
                flat = tensor.detach().reshape(-1)
                del tensor
                if flat.dtype == torch.float64:
                    # The kernel reads float32 at most, and signs are those of the numbers themselves.
                    flat = (signs_of(flat) if self._signs else flat).float()
                at, end = end, end + flat.numel()
                if end > self._plan.length:
                    break
                if end > at:
                    self._add(flat, at)
                del flat
        return end

    def _add(self, flat: torch.Tensor, at: int) -> None:
        numbers, width = self._numbers, self._plan.width
        first_row, offset = divmod(at, width)
        row_count = -(-(offset + flat.numel()) // width)
        splits = min(self._splits, row_count)
        self._kernels.add_rows[width // self._block, splits](
            *(flat, numbers.shifts, numbers.row_signs, numbers.columns, self._sums, self._squares),
            *(offset, flat.numel(), first_row, row_count, -(-row_count // splits), width),
            *(self._signs, self._block, UNROLLED_ROWS),
            num_warps=WARPS,
        )

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `project` returns."""
        return self._fold(normalised=False)

    def finish_normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `compress_gradient` returns."""
        return self._fold(normalised=True)

    def _fold(self, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the v numbers, and the gradient's norm or, if they are not normalised, its square."""
        plan, numbers = self._plan, self._numbers
        folds, dimension = plan.width // plan.dimension, plan.dimension
        tile = min(folds, FOLDS)
        block = FOLD_SIZE // tile
        blocks = -(-dimension // block)
        out = self._sums.new_empty(dimension)
        norm = self._sums.new_empty((), dtype=torch.float32 if normalised else torch.float64)
        squares = self._squares.new_empty(blocks)
        with torch.cuda.device(self._device):
            self._kernels.fold[(blocks,)](
                *(self._sums, self._squares, numbers.places, numbers.signs, out, norm, squares),
                *(self._splits, plan.width, dimension, folds, len(self._squares), normalised, tile, block),
            )
            if normalised:
                self._kernels.normalise[(-(-dimension // FOLD_SIZE),)](out, squares, dimension, blocks, FOLD_SIZE)
        return out, norm
