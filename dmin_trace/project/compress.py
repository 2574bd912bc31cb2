"""Compresses a gradient of L numbers to v, so that inner products are kept (OPORP; paper, section 3.2).

Two kinds of random projection; both give each gradient element one bin of v and one sign, and add up:

    uniform   OPORP to the letter: the gradient is padded to a multiple of v, permuted, multiplied by random signs, and
              v groups of consecutive elements are summed. 5 bytes for each element, kept in memory.
    rotation  the same guarantee from few numbers and one sequential pass. The gradient is seen as rows of W elements.
              Element c of row r is multiplied by a sign of its row and a sign of its column, and added to place
              (c + shift of r) modulo W of W sums. Those W sums, few beside the gradient, are then compressed to v as
              OPORP does. No two rows have the same shift (`make_plan` makes fewer rows than shifts), so that the column
              signs never cancel for a whole row at a time. So the inner product of two sketches is unbiased, and its
              variance at most that of OPORP, to within a part of order 1 / W, for any two gradients, however regular:
              two elements of one row, or of one column, meet in a bin with the probability that OPORP gives to two of
              W, which is below 1 / v, and all others with 1 / v.

A projection is linear: tensors are added one after another at their place in the gradient, nothing concatenates them,
and the norm is divided out last. It folds: adding bins j and j + v/2 gives a projection to v/2; for rotation, and W
alike, the very one that a plan of that dimension makes.

On a CPU, rotation runs in a small compiled kernel, `_rows.c`; on other devices, or where there was no compiler when the
package was installed, in torch. Both add up the same numbers, and differ in rounding alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dmin_trace.errors import CaptureError, SettingsError
from dmin_trace.settings import Projection

KERNEL: ModuleType | None
"""The compiled kernel, or None where it was not built."""
try:
    from dmin_trace.project import _rows as KERNEL
except ImportError:
    KERNEL = None

WIDTH = 2**17
"""Rows this wide keep the cost of a row's calls well below that of its elements, and the sums in a core's cache."""

NARROW = 2**14
"""Rows of a small gradient: to permute W sums is a good part of the whole for one that is not many times as long."""

FEW = 2**6
"""Rows of a gradient that is larger, until they are WIDTH wide."""

ROWS = 2**11
"""A longer gradient gets wider rows rather than more: on a GPU the number of calls is the cost."""

SMALL = 2**16
"""Tensors with fewer elements are laid end to end first, or given to the kernel together: a model has hundreds, whose
calls would be the cost."""

TINY = 2**12
"""Convolutions with fewer elements are copied, if they have to be, without a look at where their channels are."""

JOINED = 2**18
"""As many elements are laid end to end, or wait for the kernel, at the most."""

PART = 2**18
"""Elements that are converted to float32, squared and added at a time: few calls, and read once into the cache."""


@dataclass(frozen=True)
class Plan:
    """A random projection; `make_plan` makes one. Its numbers are drawn at need, by generators of its own.

    length: L, the number of gradient elements.
    dimension: v, the length of a sketch; a power of two.
    seed: of the numbers.
    kind: "rotation" or "uniform".
    width: how many numbers the uniform permutation spreads over the bins: for rotation W, the length of a row, a
        power of two and no less than v; for uniform L rounded up to a multiple of v.

    Raises SettingsError for a plan that cannot be meant.
    """

    length: int
    dimension: int
    seed: int
    kind: Projection
    width: int
    _on: dict[torch.device, _Numbers] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SettingsError(f"The gradient has {self.length} elements; expected at least one trained parameter.")
        if self.dimension < 1 or self.dimension & (self.dimension - 1):
            raise SettingsError(f"dimension is {self.dimension}; expected a power of two.")
        if self.kind not in ("rotation", "uniform"):
            raise SettingsError(f"projection is {self.kind!r}; expected rotation or uniform.")
        # A width can be a store's word, and as many numbers are allocated.
        if self.kind == "uniform":
            fits = 0 <= self.width - self.length < self.dimension and self.width % self.dimension == 0
        else:
            most = max(self.dimension, WIDTH, 2 * -(-self.length // ROWS))
            fits = self.dimension <= self.width <= most and not self.width & (self.width - 1)
        if not fits:
            raise SettingsError(
                f"width is {self.width}, which does not fit {self.length} elements and {self.dimension} bins; expected "
                "what make_plan chooses, which a store keeps."
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the plan and of the numbers drawn: two plans with the same one project alike."""
        digest = hashlib.sha256(repr((self.kind, self.length, self.dimension, self.seed, self.width)).encode())
        drawn: tuple[npt.NDArray[np.int64] | npt.NDArray[np.int32] | npt.NDArray[np.int8], ...]
        if self.kind == "rotation":
            drawn = (self.shifts(), self.row_signs(), self.column_signs(), self.order(), self.signs())
        else:
            drawn = (self.bins(), self.signs())
        for numbers in drawn:
            digest.update(numbers.tobytes())
        return digest.hexdigest()

    def shifts(self) -> npt.NDArray[np.int64]:
        """Rotation: how far each row is rotated, (rows,); no number twice in any W rows that start at a multiple."""
        generator, rows = self._generator("shifts"), -(-self.length // self.width)
        turns = [_shuffled(self.width, generator)[: rows - first].copy() for first in range(0, rows, self.width)]
        return np.concatenate(turns).astype(np.int64)

    def row_signs(self) -> npt.NDArray[np.int8]:
        """Rotation: the sign of each row, (rows,)."""
        return self._draw_signs("row signs", -(-self.length // self.width))

    def column_signs(self) -> npt.NDArray[np.int8]:
        """Rotation: the sign of each column, (W,)."""
        return self._draw_signs("column signs", self.width)

    def order(self) -> npt.NDArray[np.int32]:
        """Rotation: the sum that is k-th after permutation, and so belongs to bin k modulo v, (W,)."""
        return _shuffled(self.width, self._generator("order"))

    def bins(self) -> npt.NDArray[np.int32]:
        """Uniform: the bin of each element, (L,)."""
        order = self._generator("order").permutation(self.width)
        bins = np.empty(self.width, np.int32)
        bins[order] = np.repeat(np.arange(self.dimension, dtype=np.int32), self.width // self.dimension)
        return bins[: self.length]

    def signs(self) -> npt.NDArray[np.int8]:
        """The signs that OPORP asks for: of each of the W sums (rotation), or of each of the L elements (uniform)."""
        return self._draw_signs("signs", self.width if self.kind == "rotation" else self.length)

    def numbers(self, device: torch.device) -> _Numbers:
        """The numbers as the sums need them; drawn and copied to a device once, since a copy to a GPU waits for it."""
        if device not in self._on:
            rotation = self.kind == "rotation"
            self._on[device] = _Numbers(
                rows=list(zip(self.shifts().tolist(), self.row_signs().tolist(), strict=True)) if rotation else [],
                columns=torch.from_numpy(self.column_signs() if rotation else np.empty(0)).to(device, torch.float32),
                places=torch.from_numpy(self.order() if rotation else self.bins()).to(device),
                signs=torch.from_numpy(self.signs()).to(device),
            )
        return self._on[device]

    @cached_property
    def packed(self) -> _Packed:
        """The numbers as the kernel needs them."""
        order = self.order()
        return _Packed(
            rows=_with_sign(self.shifts().astype(np.uint32), self.row_signs()),
            columns=self.column_signs(),
            places=_with_sign(order.view(np.uint32), self.signs()[order]),
        )

    def _generator(self, purpose: str) -> np.random.RandomState:
        # NumPy's policy freezes RandomState's streams: a store is to be queried years later. Neither L nor v is part
        # of the seed, so that plans of one width share their numbers, and a folded sketch is that of a smaller plan.
        digest = hashlib.sha256(f"dmin_trace {self.kind} {self.seed} {purpose}".encode()).digest()
        return np.random.RandomState(np.frombuffer(digest, "<u4"))

    def _draw_signs(self, purpose: str, count: int) -> npt.NDArray[np.int8]:
        drawn = np.frombuffer(self._generator(purpose).bytes(-(-count // 8)), np.uint8)
        return np.unpackbits(drawn, count=count).astype(np.int8) * np.int8(2) - np.int8(1)


def _shuffled(count: int, generator: np.random.RandomState) -> npt.NDArray[np.int32]:
    """What `generator.permutation(count)` is, in a quarter of the memory."""
    order = np.arange(count, dtype=np.int32)
    generator.shuffle(order)
    return order


def _with_sign(numbers: npt.NDArray[np.uint32], signs: npt.NDArray[np.int8]) -> npt.NDArray[np.uint32]:
    """The numbers, in place, with the highest bit set where the sign is minus one."""
    numbers[signs < 0] |= np.uint32(2**31)
    return numbers


@dataclass(frozen=True)
class _Packed:
    """A rotation's numbers as the kernel needs them: in few bytes, signs in the highest bits.

    rows: the shift and the sign of each row, uint32.
    columns: the sign of each column, (W,) int8.
    places: the order of the W sums, and the sign of each, uint32.
    spare: arrays of W numbers, float32, for sums; whoever takes one puts it back.
    """

    rows: npt.NDArray[np.uint32]
    columns: npt.NDArray[np.int8]
    places: npt.NDArray[np.uint32]
    spare: list[npt.NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class _Numbers:
    """A plan's numbers on a device.

    rows: rotation: the shift and the sign of each row.
    columns: rotation: the sign of each column, (W,) float32.
    places: the order of the W sums (rotation), or the bin of each element (uniform), int32.
    signs: of the W sums, or of each element, int8.
    """

    rows: list[tuple[int, int]]
    columns: torch.Tensor
    places: torch.Tensor
    signs: torch.Tensor


def make_plan(length: int, dimension: int, seed: int, kind: Projection, width: int | None = None) -> Plan:
    """The projection of gradients of `length` elements to `dimension` numbers.

    Args:
        length: L.
        dimension: v.
        seed: of its numbers.
        kind: "rotation" or "uniform".
        width: that of an earlier plan, as a store keeps it. None for a new plan.

    Raises:
        SettingsError: a length below one, a dimension that is no power of two, a kind that is none, or a width that
            does not fit them.
    """
    if width is None:
        if kind == "uniform":
            width = -(-length // max(dimension, 1)) * dimension
        else:
            least = min(length, NARROW)
            wanted = max(least, min(-(-length // FEW), WIDTH), -(-length // ROWS))
            width = max(dimension, 1 << (wanted - 1).bit_length())
    return Plan(length, dimension, seed, kind, width)


def project(tensors: Iterable[torch.Tensor], plan: Plan, *, signs: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds up the tensors, flattened and laid end to end, in the plan's bins.

    Sums are float32 whatever the gradient's dtype. Squares are float32 within a part of a row and float64 beyond it:
    numbers greater than 1e19 make the norm infinite, and those below 1e-23 count for nothing in it.

    Args:
        tensors: the gradient in parts, L elements altogether; each is let go before the next is asked for.
        plan: the projection.
        signs: take the sign of each element in its place; see `signs_of`.

    Returns:
        The sketch, (v,) float32, of the gradient as it is, and its squared L2 norm, a float64 scalar; both on the
        first tensor's device, which is never waited for.

    Raises:
        CaptureError: the tensors do not hold L elements.
    """
    return _added(tensors, plan, signs).finish()


def _added(tensors: Iterable[torch.Tensor], plan: Plan, signs: bool) -> _Sums:
    """The sums of a whole gradient. Raises CaptureError if the tensors do not hold L elements."""
    rest = iter(tensors)
    first = next(rest, None)
    if first is None:
        raise _wrong_length("0 elements", plan)
    sums: _Sums
    rest = chain(_handed_out([first]), rest)
    if KERNEL is not None and plan.kind == "rotation" and first.is_cpu:
        sums = _KernelSums(plan, KERNEL, signs)
    else:
        sums = _TorchSums(plan, first.device, signs)
    # Without this, here and below, a tensor would live on while the next is made.
    del first
    count = sums.add(rest)
    if count != plan.length:
        raise _wrong_length(f"{count} elements or more" if count > plan.length else f"{count} elements", plan)
    return sums


def signs_of(gradient: torch.Tensor) -> torch.Tensor:
    """The sign of each element; nan for what is not finite, for the norm to tell of."""
    # torch.sign makes 0 of nan, and 1 of infinity.
    return torch.sign(gradient).masked_fill_(~torch.isfinite(gradient), torch.nan)


def compress_gradient(
    tensors: Iterable[torch.Tensor], plan: Plan, *, signs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projects the gradient and divides by the sketch's norm, so that inner products estimate cosines.

    The paper divides by the gradient's norm before it projects (section 3.2), which leaves sketches of norms about one.
    Dividing by the sketch's own is OPORP's normalised estimator: its variance has (1 - cos^2)^2 where the other has
    1 + cos^2, so that what is alike is told apart best, and a gradient's product with itself is one. Measured on
    a trained model's gradients, scores err 1.3 to 1.7 times less (docs/performance.md).

    Args:
        tensors: the gradient in parts, as `project` takes it.
        plan: the projection.
        signs: of the signs of its elements, as `project` has it; the norm is theirs then.

    Returns:
        The sketch, (v,) float32, of norm one, or all zeros where the gradient's norm is 0, infinite or nan; and the
        gradient's norm, a float32 scalar.

    Raises:
        CaptureError: the tensors do not hold L elements.
    """
    return _added(tensors, plan, signs).finish_normalised()


def _handed_out(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors, none of which is held any more."""
    while tensors:
        yield tensors.pop(0)


def _joined(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors, small neighbours in one."""
    small: list[torch.Tensor] = []
    count = 0
    for tensor in tensors:
        size = tensor.numel()
        # Autocast has no idea of a cat in float64.
        is_small = size < SMALL and tensor.dtype != torch.float64
        if small and not (
            is_small and count + size <= JOINED and tensor.dtype == small[0].dtype and tensor.device == small[0].device
        ):
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


class _Sums(Protocol):
    """The gradient's sums."""

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Adds tensors up to the plan's length; says how many elements they have, or more than that length."""

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sketch and the squared L2 norm, as `project` returns them; the sums are of no more use."""

    def finish_normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised sketch and the norm, as `compress` returns them; the sums are of no more use."""


class _KernelSums:
    """Rotation on a CPU: one pass, by the compiled kernel."""

    def __init__(self, plan: Plan, kernel: ModuleType, signs: bool) -> None:
        self._plan, self._kernel, self._packed, self._signs = plan, kernel, plan.packed, signs
        # New memory for each gradient would cost as much as a good part of the work; and zeros are written now, rather
        # than when the last one was done, since that brings the memory to the cache.
        spare = self._packed.spare
        self._sums = spare.pop() if spare else np.empty(plan.width, np.float32)
        self._sums.fill(0)
        self._square = 0.0
        # What waits to be added: where in memory each tensor lies and its length; and the tensors, lest they go.
        self._waiting: list[tuple[int, ...]] = []
        self._held: list[torch.Tensor] = []

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        # What Python does for each of many small tensors is a good part of the whole for a small model: little, then.
        wait, hold, length = self._waiting.append, self._held.append, self._plan.length
        begin, end, dtype, size = 0, 0, None, 0
        for tensor in tensors:
            if tensor.dtype is not dtype:
                self._add_waiting(begin, size)
                begin, dtype = end, tensor.dtype
                size = _KERNEL_SIZES.get(dtype, 0)
            count = tensor.numel()
            end += count
            if end > length:
                break
            is_near = size and tensor.is_cpu
            if is_near and size == 4 and count >= TINY and tensor.ndim == 4 and _has_channels_last(tensor):
                # A copy would take as long as the rest.
                wait((tensor.data_ptr(), count, tensor.shape[1], tensor.shape[2] * tensor.shape[3]))
                hold(tensor)
            elif is_near and (count < SMALL or tensor.is_contiguous()):
                # Many are not: autograd gives the gradient of a matrix transposed.
                tensor = tensor.contiguous()
                wait((tensor.data_ptr(), count))
                hold(tensor)
            else:
                self._add_waiting(begin, size)
                self._add_converted(tensor.detach().reshape(-1), end - count)
                begin = end
            del tensor
            if end - begin >= JOINED:
                self._add_waiting(begin, size)
                begin = end
        self._add_waiting(begin, size)
        return end

    def _add_waiting(self, begin: int, size: int) -> None:
        """Adds what waits, elements of `size` bytes, the first of which is element `begin` of the gradient."""
        if self._waiting:
            self._square += self._kernel.add(
                self._sums,
                self._packed.columns,
                self._packed.rows,
                begin,
                self._waiting,
                size,
                self._signs,
            )
            self._waiting.clear()
            self._held.clear()

    def _add_converted(self, flat: torch.Tensor, begin: int) -> None:
        """Adds what is a view, such as one zero seen at every place, or of another dtype or device, part by part."""
        for done in range(0, flat.numel(), PART):
            part = flat[done : done + PART].to("cpu", torch.float32).contiguous()
            self._square += self._kernel.add(
                self._sums,
                self._packed.columns,
                self._packed.rows,
                begin + done,
                [(part.data_ptr(), part.numel())],
                4,
                self._signs,
            )

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        sketch = np.empty(self._plan.dimension, np.float32)
        self._fold_into(sketch)
        return torch.from_numpy(sketch), torch.tensor(self._square, dtype=torch.float64)

    def finish_normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        # The norm lies behind the sketch: for a small model, to make a tensor of a number can be felt.
        numbers, norm = np.empty(self._plan.dimension + 1, np.float32), math.sqrt(self._square)
        sketch = numbers[:-1]
        self._fold_into(sketch)
        # By the gradient's norm first, since the square of a very small or large sketch would leave float32.
        own = math.sqrt(self._kernel.divide(sketch, norm))
        self._kernel.divide(sketch, own)
        if not 0 < own < math.inf:
            sketch.fill(0)
        numbers[-1] = norm
        return torch.from_numpy(sketch), torch.from_numpy(numbers[-1:].reshape(()))

    def _fold_into(self, sketch: npt.NDArray[np.float32]) -> None:
        self._kernel.fold(sketch, self._sums, self._packed.places)
        self._packed.spare.append(self._sums)


def _has_channels_last(tensor: torch.Tensor) -> bool:
    """Whether (N, C, H, W) lie in memory as (N, H, W, C): so does autograd give the gradients of many convolutions."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


_KERNEL_SIZES = {torch.float32: 4, torch.bfloat16: 2}
"""Bytes of an element of the dtypes that the kernel reads; others are converted."""


class _TorchSums:
    """Both kinds on any device, which is never waited for."""

    def __init__(self, plan: Plan, device: torch.device, signs: bool) -> None:
        self._plan, self._numbers, self._signs = plan, plan.numbers(device), signs
        # A row that runs over the end goes on in a second half, in one call rather than two.
        count = 2 * plan.width if plan.kind == "rotation" else plan.dimension
        self._sums = torch.zeros(count, dtype=torch.float32, device=device)
        self._converted = self._sums.new_empty(0)
        self._squares: list[torch.Tensor] = []

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        add = _add_rows if self._plan.kind == "rotation" else _add_pieces
        end = 0
        for tensor in _joined(tensors):
            flat = tensor.detach().reshape(-1)
            del tensor
            if self._signs:
                flat = signs_of(flat)
            at, end = end, end + flat.numel()
            if end > self._plan.length:
                break
            if flat.dtype != self._sums.dtype and not self._converted.numel():
                self._converted = self._sums.new_empty(min(PART, self._plan.width))
            self._squares += add(self._sums, flat, at, self._numbers, self._converted)
            del flat
        return end

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        square = torch.stack(self._squares).to(_widest(self._sums.device)).sum()
        if self._plan.kind == "uniform":
            return self._sums, square
        return _bin_sums(self._sums, self._plan, self._numbers), square

    def finish_normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        unit, square = self.finish()
        norm = square.sqrt().float()
        # Divided by the gradient's norm first, since the squares of a very small or large sketch would leave float32.
        # Where that norm is 0, infinite or nan, all is nan after the second division. Nothing asks for it, which would
        # wait for the GPU.
        unit.div_(norm)
        unit.div_(torch.linalg.vector_norm(unit, dtype=_widest(unit.device)))
        return unit.nan_to_num_(0.0, 0.0, 0.0), norm


def _add_rows(
    sums: torch.Tensor, flat: torch.Tensor, at: int, numbers: _Numbers, converted: torch.Tensor
) -> list[torch.Tensor]:
    squares = []
    # Autograd has nothing to note here, and its part in each of many short calls can be felt.
    with torch.inference_mode():
        for done, row, column, count in _parts(at, flat.numel(), numbers.columns.numel()):
            part = _as_sums(flat.narrow(0, done, count), converted)
            # Taken here, the square is a pass over what the next call wants in the cache. A norm of its own would read
            # the gradient twice.
            squares.append(torch.dot(part, part))
            shift, sign = numbers.rows[row]
            sums.narrow(0, shift + column, count).addcmul_(part, numbers.columns.narrow(0, column, count), value=sign)
    return squares


def _parts(at: int, count: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts `count` elements that begin at `at` into parts of one row and at most PART elements.

    Whole rows are taken PART columns at a time, so that the signs and the sums of wide rows stay in the cache.

    Yields:
        Where the part begins in the tensor, its row, its column, and its length.
    """
    first = min(-at % width, count)
    whole = (count - first) // width
    last = first + whole * width
    for done in range(0, first, PART):
        yield done, at // width, at % width + done, min(PART, first - done)
    row = (at + first) // width
    for column in range(0, width, PART):
        length = min(PART, width - column)
        for k in range(whole):
            yield first + k * width + column, row + k, column, length
    for done in range(last, count, PART):
        yield done, row + whole, done - last, min(PART, count - done)


def _as_sums(part: torch.Tensor, converted: torch.Tensor) -> torch.Tensor:
    """The part in the dtype of the sums: itself, or in `converted`, since new memory for each would cost more."""
    return part if part.dtype == converted.dtype else converted.narrow(0, 0, part.numel()).copy_(part)


def _bin_sums(sums: torch.Tensor, plan: Plan, numbers: _Numbers) -> torch.Tensor:
    first, second = sums[: plan.width], sums[plan.width :]
    first += second
    # The second half is free now: it holds the signs as float32, then the permuted sums, and nothing else is made.
    first *= second.copy_(numbers.signs)
    torch.index_select(first, 0, numbers.places, out=second)
    return second.view(-1, plan.dimension).sum(0)


def _add_pieces(
    sums: torch.Tensor, flat: torch.Tensor, at: int, numbers: _Numbers, converted: torch.Tensor
) -> list[torch.Tensor]:
    squares = []
    for done in range(0, flat.numel(), PART):
        part = _as_sums(flat[done : done + PART], converted)
        here = slice(at + done, at + done + part.numel())
        squares.append(torch.dot(part, part))
        sums.index_add_(0, numbers.places[here], part * numbers.signs[here])
    return squares


def _widest(device: torch.device) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _wrong_length(found: str, plan: Plan) -> CaptureError:
    return CaptureError(
        f"The gradient has {found}; expected {plan.length}, as its projection was made for. Give the gradients of all "
        "trained parameters, each once, in the order of the parameters."
    )
