"""The random projection of a gradient of L elements to v numbers that keeps inner products (OPORP; paper, section 3.2).

There are two kinds. Each gives every gradient element one bin of v and one sign, and adds up:

    uniform   OPORP as published: the gradient is padded to a multiple of v, permuted and multiplied by random signs,
              and v groups of consecutive elements are summed. It keeps 5 bytes for each element in memory.
    rotation  The same guarantee from few numbers and one sequential pass. The gradient is read as rows of W elements.
              Element c of row r is multiplied by a sign of its row and a sign of its column, and added to number
              (c + shift of r) modulo W of W sums. OPORP then compresses these W sums to v. No two of W consecutive rows
              have the same shift, so the column signs never cancel for a whole row at a time. The inner product of two
              projected gradients is unbiased, and its variance exceeds that of OPORP by a part of order 1 / W at most,
              for any two gradients, however regular: two elements of one row, or of one column, share a bin with the
              probability that OPORP gives to two of W elements, which is below 1 / v, and all others with 1 / v.

A projection folds: adding bins j and j + v/2 gives a projection to v/2. For rotation with the same W it is the one that
`make_plan` makes for that dimension. This module imports no torch.
"""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dmin_trace.errors import SettingsError
from dmin_trace.settings import Projection

# Permuting W sums costs much when the gradient is not many times longer than W: rows are widened from MIN to FULL as
# long as there are MIN_ROW_COUNT of them. Full rows hide the cost of a call for each, and their sums fit in a core's
# cache. A gradient of more than MAX_ROW_COUNT rows gets wider ones: on a GPU the number of calls is the cost.
MIN_ROW_WIDTH, FULL_ROW_WIDTH = 2**14, 2**17
MIN_ROW_COUNT, MAX_ROW_COUNT = 2**6, 2**11


@dataclass(frozen=True)
class Plan:
    """A random projection, made by `make_plan`. Its numbers are drawn when they are needed, from its own generators.

    length: L, the number of gradient elements.
    dimension: v, the length of a projected gradient; a power of two.
    seed: the seed of the numbers.
    kind: "rotation" or "uniform".
    width: for rotation W, the length of a row, a power of two and at least v; for uniform L rounded up to a multiple
        of v.
    prepared: what the backends derived from the numbers, kept as long as the plan.

    Raises SettingsError for values that are out of range or do not fit each other.
    """

    length: int
    dimension: int
    seed: int
    kind: Projection
    width: int
    prepared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SettingsError(f"The gradient has {self.length} elements; expected at least one trained parameter.")
        if self.dimension < 1 or self.dimension & (self.dimension - 1):
            raise SettingsError(f"dimension is {self.dimension}; expected a power of two.")
        if self.kind not in ("rotation", "uniform"):
            raise SettingsError(f"projection is {self.kind!r}; expected rotation or uniform.")
        # The width may come from a store of unknown origin, and arrays of this length are allocated.
        if self.kind == "uniform":
            fits = 0 <= self.width - self.length < self.dimension and self.width % self.dimension == 0
        else:
            largest = max(self.dimension, FULL_ROW_WIDTH, 2 * -(-self.length // MAX_ROW_COUNT))
            fits = self.dimension <= self.width <= largest and not self.width & (self.width - 1)
        if not fits:
            raise SettingsError(
                f"width is {self.width}, which does not fit {self.length} elements and {self.dimension} bins; expected "
                "the width that make_plan chose, which the store keeps."
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the plan and its numbers: plans with equal fingerprints project alike."""
        digest = hashlib.sha256(repr((self.kind, self.length, self.dimension, self.seed, self.width)).encode())
        rotation = self.shifts, self.row_signs, self.column_signs, self.order, self.signs
        for draw in rotation if self.kind == "rotation" else (self.bins, self.signs):
            digest.update(draw().tobytes())
        return digest.hexdigest()

    def shifts(self) -> npt.NDArray[np.int64]:
        """Rotation: the shift of each row, (rows,). Rows k W to (k + 1) W - 1 have different shifts."""
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
        """Rotation: the permutation of the sums, (W,). Its k-th entry is the sum that belongs to bin k modulo v."""
        return _shuffled(self.width, self._generator("order"))

    def bins(self) -> npt.NDArray[np.int32]:
        """Uniform: the bin of each element, (L,)."""
        order = self._generator("order").permutation(self.width)
        bins = np.empty(self.width, np.int32)
        bins[order] = np.repeat(np.arange(self.dimension, dtype=np.int32), self.width // self.dimension)
        return bins[: self.length]

    def signs(self) -> npt.NDArray[np.int8]:
        """The signs of OPORP: of the sums, (W,), for rotation; of the elements, (L,), for uniform."""
        return self._draw_signs("signs", self.width if self.kind == "rotation" else self.length)

    def _generator(self, purpose: str) -> np.random.RandomState:
        # NumPy guarantees that RandomState's streams never change, and a store is queried years later. Neither L nor v
        # is part of the seed: plans of one width share their numbers, so folding gives the plan of a smaller dimension.
        digest = hashlib.sha256(f"dmin_trace {self.kind} {self.seed} {purpose}".encode()).digest()
        return np.random.RandomState(np.frombuffer(digest, "<u4"))

    def _draw_signs(self, purpose: str, count: int) -> npt.NDArray[np.int8]:
        drawn = np.frombuffer(self._generator(purpose).bytes(-(-count // 8)), np.uint8)
        return np.unpackbits(drawn, count=count).astype(np.int8) * np.int8(2) - np.int8(1)


def make_plan(length: int, dimension: int, seed: int, kind: Projection, width: int | None = None) -> Plan:
    """Makes the projection of gradients of L elements to v numbers, from `seed`.

    `width` is that of an earlier plan, as a store keeps it; None for a new plan. Raises SettingsError if length is
    below one, dimension is not a power of two, the kind is unknown, or the width does not fit them.
    """
    if width is None:
        if kind == "uniform":
            width = -(-length // max(dimension, 1)) * dimension
        else:
            wanted = min(-(-length // MIN_ROW_COUNT), FULL_ROW_WIDTH)
            wanted = max(wanted, min(length, MIN_ROW_WIDTH), -(-length // MAX_ROW_COUNT))
            width = max(dimension, 1 << (wanted - 1).bit_length())
    return Plan(length, dimension, seed, kind, width)


def _shuffled(count: int, generator: np.random.RandomState) -> npt.NDArray[np.int32]:
    """Equals `generator.permutation(count)`, and takes a quarter of its memory."""
    order = np.arange(count, dtype=np.int32)
    generator.shuffle(order)
    return order
