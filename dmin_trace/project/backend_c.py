"""Rotation on a CPU: one pass over the gradient, by the compiled module `_rows` (`_rows.c`)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from dmin_trace.project.plan import Plan

KERNEL: ModuleType | None
"""The compiled module, or None if it was not built: there was no compiler when the package was installed."""
try:
    from dmin_trace.project import _rows as KERNEL
except ImportError:
    KERNEL = None

SMALL_TENSOR_SIZE = 2**16
"""Tensors with fewer elements are copied if their elements do not lie in order. Larger ones are converted by parts."""

MIN_CHANNELS_LAST_SIZE = 2**12
"""Convolutions with fewer elements are not tested for the channels-last layout: copying them costs less."""

MAX_WAITING_SIZE = PART_SIZE = 2**18
"""Elements that wait for one call of the kernel, at most; and those that are converted to float32 at a time. Models
have hundreds of small tensors, and a call for each would be the cost."""

ELEMENT_SIZES = {torch.float32: 4, torch.bfloat16: 2}
"""Bytes of an element for the dtypes that the kernel reads. Tensors of other dtypes are converted."""


@dataclass(frozen=True)
class PackedNumbers:
    """A rotation's numbers as the kernel reads them (`_rows.pyi`): in few bytes, with signs in the highest bits.

    buffers: free arrays of W float32 for sums. Allocating one for each gradient would cost much of the time.
    """

    rows: npt.NDArray[np.uint32]
    columns: npt.NDArray[np.int8]
    places: npt.NDArray[np.uint32]
    buffers: list[npt.NDArray[np.float32]] = field(default_factory=list)


def packed_numbers(plan: Plan) -> PackedNumbers:
    """Returns the plan's numbers for the kernel. They are made once for each plan."""
    if "c" not in plan.prepared:
        order = plan.order()
        plan.prepared["c"] = PackedNumbers(
            rows=_with_signs(plan.shifts().astype(np.uint32), plan.row_signs()),
            columns=plan.column_signs(),
            places=_with_signs(order.view(np.uint32), plan.signs()[order]),
        )
    packed: PackedNumbers = plan.prepared["c"]
    return packed


class CSums:
    """The sums of one gradient in a plan's bins. `finish` and `finish_normalised` end them."""

    def __init__(self, plan: Plan, kernel: ModuleType, signs: bool) -> None:
        self._plan, self._kernel, self._signs = plan, kernel, signs
        self._packed = packed_numbers(plan)
        buffers = self._packed.buffers
        self._sums = buffers.pop() if buffers else np.empty(plan.width, np.float32)
        # Filled here rather than when the last gradient was done: this brings the memory to the cache.
        self._sums.fill(0)
        self._square = 0.0
        # What waits for the kernel: the address and the length of each tensor; and the tensors, to keep them alive.
        self._waiting: list[tuple[int, ...]] = []
        self._held: list[torch.Tensor] = []

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Adds tensors up to the plan's length, and returns their number of elements, or one above that length."""
        # For a small model, the Python code for each tensor is a large part of the time: it is kept short.
        wait, hold, length = self._waiting.append, self._held.append, self._plan.length
        begin, end, dtype, size = 0, 0, None, 0
        for tensor in tensors:
            if tensor.dtype is not dtype:
                self._add_waiting(begin, size)
                begin, dtype = end, tensor.dtype
                size = ELEMENT_SIZES.get(dtype, 0)
            count = tensor.numel()
            end += count
            if end > length:
                break
            readable = size and tensor.is_cpu
            large = count >= MIN_CHANNELS_LAST_SIZE
            if readable and size == 4 and large and tensor.ndim == 4 and _has_channels_last(tensor):
                # The kernel reads this layout: a copy would take as long as all the rest.
                wait((tensor.data_ptr(), count, tensor.shape[1], tensor.shape[2] * tensor.shape[3]))
                hold(tensor)
            elif readable and (count < SMALL_TENSOR_SIZE or tensor.is_contiguous()):
                # Many are not contiguous: autograd gives the gradient of a matrix transposed.
                tensor = tensor.contiguous()
                wait((tensor.data_ptr(), count))
                hold(tensor)
            else:
                self._add_waiting(begin, size)
                self._add_converted(tensor.detach().reshape(-1), end - count)
                begin = end
            del tensor
            if end - begin >= MAX_WAITING_SIZE:
                self._add_waiting(begin, size)
                begin = end
        self._add_waiting(begin, size)
        return end

    def _add_waiting(self, begin: int, size: int) -> None:
        """Adds the waiting tensors. Their elements have `size` bytes; the first is element `begin` of the gradient."""
        if self._waiting:
            self._call(begin, self._waiting, size)
            self._waiting.clear()
            self._held.clear()

    def _add_converted(self, flat: torch.Tensor, begin: int) -> None:
        """Adds, part by part, an expanded tensor (a zero seen at every place), or one of another dtype or device."""
        for done in range(0, flat.numel(), PART_SIZE):
            part = flat[done : done + PART_SIZE].to("cpu", torch.float32).contiguous()
            self._call(begin + done, [(part.data_ptr(), part.numel())], 4)

    def _call(self, begin: int, tensors: list[tuple[int, ...]], size: int) -> None:
        packed = self._packed
        self._square += self._kernel.add(self._sums, packed.columns, packed.rows, begin, tensors, size, self._signs)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `project` returns."""
        projected = np.empty(self._plan.dimension, np.float32)
        self._fold_into(projected)
        return torch.from_numpy(projected), torch.tensor(self._square, dtype=torch.float64)

    def finish_normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `compress_gradient` returns."""
        # The norm is kept behind the numbers: for a small model, making a tensor from a float takes noticeable time.
        numbers, norm = np.empty(self._plan.dimension + 1, np.float32), math.sqrt(self._square)
        projected = numbers[:-1]
        self._fold_into(projected)
        # Divided by the gradient's norm first: the squares of very small or large numbers would leave float32.
        own = math.sqrt(self._kernel.divide(projected, norm))
        self._kernel.divide(projected, own)
        if not 0 < own < math.inf:
            projected.fill(0)
        numbers[-1] = norm
        return torch.from_numpy(projected), torch.from_numpy(numbers[-1:].reshape(()))

    def _fold_into(self, projected: npt.NDArray[np.float32]) -> None:
        self._kernel.fold(projected, self._sums, self._packed.places)
        self._packed.buffers.append(self._sums)


def _has_channels_last(tensor: torch.Tensor) -> bool:
    """Whether (N, C, H, W) is stored as (N, H, W, C), as autograd stores the gradients of many convolutions."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _with_signs(numbers: npt.NDArray[np.uint32], signs: npt.NDArray[np.int8]) -> npt.NDArray[np.uint32]:
    """Sets the highest bit of each number whose sign is minus one, in place."""
    numbers[signs < 0] |= np.uint32(2**31)
    return numbers
