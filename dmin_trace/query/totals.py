"""How much of a query's influence is a group's: `Totals`, over all scores of the query.

The influence of a sample is what its score has beyond the median of the query's scores. A group's share is its part of
the positive influence of all samples. So that a share can be judged, there is beside it

- what a random group of as many samples would have;
- an interval, from the samples themselves: how much the share depends on which of them were there. The logarithm of the
  odds of a share, A / B of two sums of independent samples, has about the variance sum(a^2) / A^2 + sum(b^2) / B^2;
- z and p: whether the group's mean is larger than that of random groups of its size. z has the exact mean and variance
  of samples that are drawn without replacement; p counts random groups, or, of large groups, is normal.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dmin_trace.query.answer import ScoreMethod
from dmin_trace.query.groups import Grouping
from dmin_trace.query.record import Record, record_of
from dmin_trace.query.tables import Column, Table, to_pandas, write_page, write_parquet
from dmin_trace.search import Background, Score, fit_background
from dmin_trace.store import Queries

if TYPE_CHECKING:
    import pandas

    from dmin_trace.query.trace import Trace

Weighting = Literal["as is", "squared", "standing out"]
WEIGHTING: Weighting = "as is"
"""How influence is summed. Others are tried by tools/reproduce/groups.py; no choice of a user's."""
RANDOM_GROUPS = 9_999
MAX_DRAWN = 1024
"""Samples of a random group, at most; of larger groups, and of their complements, the mean is as good as normal."""
DRAWN_AT_A_TIME = 512
MAX_NUMBERS = 2**26
"""Scores that are in memory at a time."""
NORMAL_95 = 1.959963984540054

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GroupTotal:
    """What one group of training samples has of a query's influence.

    group: its name; None for the samples that are of no group.
    samples: how many of its samples have a score; near-copies count once where they are merged.
    share, low, high: its part of the positive influence of all samples, from 0 to 1, and the 95 % interval; None if no
        sample has positive influence, or the interval is not known.
    expected: what a random group of as many samples has on average, which is their part of all samples.
    mean: the mean of its scores; None if it has none.
    z, p: how far the mean is above that of random groups of as many samples, in their standard deviations, and the part
        of them with a mean as large; None if all groups of that size are equal.
    standing_out: how many of its samples stand out; None if that is not known.
    """

    group: str | None
    samples: int
    share: float | None
    low: float | None
    high: float | None
    expected: float
    mean: float | None
    z: float | None
    p: float | None
    standing_out: int | None


@dataclass(frozen=True, eq=False, repr=False)
class Totals:
    """What groups of training samples have of the influence on each of Q queries.

    by: what the groups are by, such as the name of a column.
    groups: for each query its groups, the largest share first; the samples of no group are last.
    names, prompts, without: as of `TopK`.
    samples: how many samples have a score; near-copies count once where they are merged.
    overlapping: how many of them are in several groups. They count in each, so that shares add up to more than one.
    merged: how many samples were near-copies of another and count with it; None if near-copies were not merged.
    score: the name of the score.
    backgrounds: as of `TopK`.
    note: what else a reader should know, as a sentence; "" if nothing.
    pictures, record: as of `TopK`.
    """

    by: str
    groups: list[list[GroupTotal]]
    names: tuple[str, ...]
    prompts: tuple[str | None, ...]
    without: tuple[str | None, ...]
    samples: int
    overlapping: int
    merged: int | None
    score: str
    backgrounds: tuple[Background, ...]
    note: str
    pictures: tuple[bytes | None, ...]
    record: Record

    def __len__(self) -> int:
        """Q, the number of queries."""
        return len(self.groups)

    def __repr__(self) -> str:
        count = f"{len(self)} {'query' if len(self) == 1 else 'queries'}"
        largest = len(max(self.groups, key=len, default=[]))
        return f"Totals({count}, {largest:,} groups by {self.by!r}, {self.samples:,} samples, {self.score})"

    @property
    def table(self) -> Table:
        """One row for each query and group; its columns are those of `to_pandas`."""
        places = [(n, total) for n, totals in enumerate(self.groups) for total in totals]
        asked = {"query": self.names, "prompt": self.prompts, "without": self.without}
        table = {name: Column("string", [of[n] for n, _ in places]) for name, of in asked.items()}
        table["by"] = Column("string", [self.by] * len(places))
        table["group"] = Column("string", [total.group for _, total in places])
        table["samples"] = Column("integer", [total.samples for _, total in places])
        for name in ("share", "low", "high", "expected", "mean", "z", "p"):
            table[name] = Column("number", [getattr(total, name) for _, total in places])
        table["standing_out"] = Column("integer", [total.standing_out for _, total in places])
        table["scored_by"] = Column("string", [self.score] * len(places))
        return table

    def to_pandas(self) -> "pandas.DataFrame":
        """A data frame with one row for each query and group. Raises QueryError if pandas is not installed.

        Its columns: `query` (the name), `prompt`, `without`, `by`, the fields of `GroupTotal`, and `scored_by`.
        """
        return to_pandas(self.table)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes the table of `to_pandas` to a Parquet file. Raises QueryError if pyarrow is not installed or the file
        cannot be written."""
        write_parquet(path, "totals", [self.table])

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the totals as one HTML page for people; it needs no other file. `TopK.to_html` has them with the
        samples. Raises QueryError if the file cannot be written."""
        from dmin_trace.views.page import totals_page

        write_page(path, totals_page(self))

    def _repr_html_(self) -> str:
        """What a notebook shows: the first queries."""
        from dmin_trace.views.notebook import totals_html

        return totals_html(self)


def total_groups(
    trace: "Trace",
    queries: Queries,
    grouping: Grouping,
    score: Score | ScoreMethod = "deflated",
    *,
    copies: Sequence[NDArray[np.int64]] | None = None,
    weighting: Weighting = WEIGHTING,
) -> Totals:
    """The totals of groups for each query. Raises what `Trace.scores` raises.

    Args:
        copies: clusters of near-copies, data set indices, to be merged; None to merge none.
        weighting: "as is" sums influence, "squared" its square, with the sign of it; "standing out" the influence of
            the samples that stand out.
    """
    usable = np.zeros(len(trace), np.bool_)
    usable[trace.store.sample[trace.store.valid]] = True
    units, count = _units(usable, copies or ())
    members: dict[str | None, NDArray[np.int64]] = {
        name: np.unique(units[samples[usable[samples]]]) for name, samples in grouping.members.items()
    }
    in_groups = np.bincount(np.concatenate(list(members.values())), minlength=count)
    if not in_groups.all():
        members[None] = np.flatnonzero(in_groups == 0)
    found: list[list[GroupTotal]] = []
    backgrounds: list[Background] = []
    size = max(1, MAX_NUMBERS // len(trace))
    for first in range(0, len(queries), size):
        scores = trace.scores(queries[first : first + size], score)[:, usable].astype(np.float64)
        of_units = _means(scores, units[usable], count)
        known = [fit_background(own, count) for own in of_units]
        found += totals_of(of_units, known, members, weighting)
        backgrounds += known
    return Totals(
        by=grouping.by,
        groups=found,
        names=queries.names,
        prompts=queries.prompts,
        without=queries.without,
        samples=count,
        overlapping=int((in_groups > 1).sum()),
        merged=None if copies is None else int(usable.sum()) - count,
        score=score if isinstance(score, str) else score.name,
        backgrounds=tuple(backgrounds),
        note=grouping.note,
        pictures=queries.pictures,
        record=record_of(trace.store, queries.gradients),
    )


def _units(usable: NDArray[np.bool_], copies: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], int]:
    """(N,) the unit of each usable sample, where near-copies are one, and how many there are; -1 for the others."""
    leader = np.arange(len(usable))
    for cluster in copies:
        leader[cluster] = cluster[0]
    units = np.full(len(usable), -1, np.int64)
    leaders, units[usable] = np.unique(leader[usable], return_inverse=True)
    return units, len(leaders)


def _means(scores: Doubles, units: NDArray[np.int64], count: int) -> Doubles:
    """(Q, n) the mean score of each unit, of the scores (Q, N) of its samples."""
    if count == len(units):
        return scores[:, np.argsort(units)]
    sizes = np.bincount(units, minlength=count)
    return np.stack([np.bincount(units, own, minlength=count) / sizes for own in scores])


def _weights(scores: Doubles, background: Background, weighting: Weighting) -> Doubles:
    """(n,) the influence of units with these scores."""
    influence: Doubles = scores - np.median(scores)
    if weighting == "squared":
        return influence * np.abs(influence)
    if weighting == "standing out":
        return np.where(scores >= background.limit, influence, 0.0)  # nothing is at least NaN
    return influence


def totals_of(
    scores: Doubles,
    backgrounds: Sequence[Background],
    members: Mapping[str | None, NDArray[np.int64]],
    weighting: Weighting,
) -> list[list[GroupTotal]]:
    """For each query with scores (Q, n) its groups, in order."""
    count, sizes = scores.shape[1], np.array([len(places) for places in members.values()])
    places = np.concatenate(list(members.values()))
    of_group = np.repeat(np.arange(len(sizes)), sizes)

    def summed(values: Doubles) -> Doubles:
        """(groups,) the sums of values (n,)."""
        return np.bincount(of_group, values[places], minlength=len(sizes)).astype(np.float64)

    weights = np.stack([_weights(own, known, weighting) for own, known in zip(scores, backgrounds, strict=True)])
    sums = np.stack([summed(weight) for weight in weights])
    parts = _parts_as_large(weights, sizes, sums)
    found = []
    for query, (own, weight, known) in enumerate(zip(scores, weights, backgrounds, strict=True)):
        positive = np.maximum(weight, 0)
        whole, whole_squares = float(positive.sum()), float(positive @ positive)
        inside, squares, totals = summed(positive), summed(positive**2), summed(own)
        stands = summed((own >= known.limit).astype(np.float64))
        spread = float(weight.std())
        varies = spread > 1e-12 * float(np.abs(weight).max())
        of_query = []
        for n, (name, size) in enumerate(zip(members, sizes.tolist(), strict=True)):
            low, high = _interval(inside[n], whole - inside[n], squares[n], whole_squares - squares[n])
            z = p = None
            if varies and 0 < size < count:
                of_mean = spread / math.sqrt(size) * math.sqrt((count - size) / (count - 1))
                z = float((sums[query, n] / size - weight.mean()) / of_mean)
                p = float(parts[query, n])
                p = 0.5 * math.erfc(z / math.sqrt(2)) if math.isnan(p) else p
            of_query.append(
                GroupTotal(
                    group=name,
                    samples=size,
                    share=float(inside[n]) / whole if whole > 0 else None,
                    low=low,
                    high=high,
                    expected=size / count,
                    mean=float(totals[n]) / size if size else None,
                    z=z,
                    p=p,
                    standing_out=None if known.standing_out is None else int(stands[n]),
                )
            )
        # Of equal shares, the larger z is first.
        of_query.sort(key=lambda of: (of.group is None, -(of.share or 0), -(of.z or 0), of.group or ""))
        found.append(of_query)
    return found


def _interval(a: float, b: float, a_squares: float, b_squares: float) -> tuple[float | None, float | None]:
    """The 95 % interval of a / (a + b), of two sums of numbers with these sums of squares."""
    if a <= 0 or b <= 1e-12 * a:
        return None, None
    spread = NORMAL_95 * math.sqrt(a_squares / a**2 + max(b_squares, 0.0) / b**2)
    return 1 / (1 + b / a * math.exp(spread)), 1 / (1 + b / a * math.exp(-spread))


def _parts_as_large(weights: Doubles, sizes: NDArray[np.int64], sums: Doubles) -> Doubles:
    """(Q, groups) the part of random groups of each size with a sum as large as these (Q, groups); NaN where the size
    is too large to draw, and so is that of the complement."""
    total, count = weights.sum(axis=1), weights.shape[1]
    smaller = np.minimum(sizes, count - sizes)
    drawn = np.unique(smaller[(smaller > 0) & (smaller <= MAX_DRAWN)])
    parts = np.full(sums.shape, np.nan)
    if not len(drawn):
        return parts
    generator = np.random.default_rng(0)
    groups = np.empty((RANDOM_GROUPS, drawn[-1]), np.int32)
    for group in groups:
        group[:] = generator.choice(count, len(group), replace=False)
    for query, own in enumerate(weights):
        found = np.empty((RANDOM_GROUPS, len(drawn)))
        for first in range(0, RANDOM_GROUPS, DRAWN_AT_A_TIME):
            here = slice(first, first + DRAWN_AT_A_TIME)
            found[here] = own[groups[here]].cumsum(axis=1)[:, drawn - 1]
        found.sort(axis=0)
        # Sums in another order differ by rounding.
        rounding = 1e-9 * float(np.abs(own).sum())
        for n, size in enumerate(drawn):
            small, large = sizes == size, (sizes != size) & (smaller == size)
            less = np.searchsorted(found[:, n], sums[query, small] - rounding)
            parts[query, small] = (1 + RANDOM_GROUPS - less) / (1 + RANDOM_GROUPS)
            more = np.searchsorted(found[:, n], total[query] - sums[query, large] + rounding, side="right")
            parts[query, large] = (1 + more) / (1 + RANDOM_GROUPS)
    return parts
