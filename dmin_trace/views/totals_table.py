"""A terminal table of what groups of training samples have of a query's influence."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from dmin_trace.views.table import text_table
from dmin_trace.views.text import harmless

if TYPE_CHECKING:
    from dmin_trace.query import GroupTotal, Totals

MAX_SHOWN_GROUPS = 12
MAX_NAME_LENGTH = 48
HEADINGS = ("", "samples", "share", "95 %", "by chance", "z", "p", "stand out")
MEANING = (
    "share: of the influence above the median of all samples; by chance: what as many random samples have; z and p: "
    "the mean against random groups of as many samples"
)


@dataclass(frozen=True, kw_only=True)
class ShownGroup:
    """A row of the table: a group, or the sum of those that are not shown.

    cells: the texts below HEADINGS, the name first; "" for what is not known.
    share, low, high, expected: as of `GroupTotal`.
    named: whether it is one group with a name.
    """

    cells: tuple[str, ...]
    share: float | None
    low: float | None
    high: float | None
    expected: float
    named: bool


def totals_table(totals: "Totals", query: int, *, ascii_only: bool = False) -> Group:
    """The groups with the largest shares of query number `query`, the others as one row, and the samples of none."""
    rows = [shown.cells for shown in shown_groups(totals, query)]
    title = Text("Influence by ").append(harmless(totals.by, ascii_only=ascii_only), style="bold")
    title.append(" on ").append(harmless(totals.names[query], ascii_only=ascii_only), style="bold")
    table = text_table("", HEADINGS, rows, caption=describe_totals(totals), ascii_only=ascii_only)
    # In a terminal of 80 columns, this leaves room for a name.
    table.padding = (0, 1, 0, 0)
    for column, heading in zip(table.columns[1:], HEADINGS[1:], strict=True):
        column.justify, column.no_wrap = "right", True
        column.header = Text("\n".join(heading.rsplit(" ", 1)) if len(heading) > 5 else heading)
    return Group(title, table)


def shown_groups(totals: "Totals", query: int) -> list[ShownGroup]:
    """The groups with the largest shares of a query, the others as one row, and the samples of none."""
    groups = totals.groups[query]
    named = [total for total in groups if total.group is not None]
    shown, others = named[:MAX_SHOWN_GROUPS], named[MAX_SHOWN_GROUPS:]
    rows = [_row(harmless(total.group or "", MAX_NAME_LENGTH), total) for total in shown]
    if others:
        rows.append(_others(f"{len(others):,} other groups", others, totals.samples))
    return rows + [_row("(of no group)", total) for total in groups if total.group is None]


def describe_totals(totals: "Totals") -> str:
    """What the columns mean, and what else a reader should know."""
    parts = [MEANING]
    if totals.overlapping:
        parts.append(f"{totals.overlapping:,} samples are in several groups and count in each")
    if totals.merged is not None:
        parts.append(f"{totals.merged:,} samples were near-copies of another, and count with it")
    return "; ".join(parts) + "." + (f" {totals.note}" if totals.note else "")


def _row(name: str, total: "GroupTotal") -> ShownGroup:
    interval = "" if total.low is None or total.high is None else f"{total.low:.0%} to {total.high:.0%}"
    share, expected = "" if total.share is None else f"{total.share:.1%}", f"{total.expected:.1%}"
    z = "" if total.z is None else f"{total.z:.1f}"
    p = "" if total.p is None else f"{total.p:.4f}" if total.p >= 1e-4 else "<0.0001"
    stands = "" if total.standing_out is None else f"{total.standing_out:,}"
    return ShownGroup(
        cells=(name, f"{total.samples:,}", share, interval, expected, z, p, stands),
        share=total.share,
        low=total.low,
        high=total.high,
        expected=total.expected,
        named=total.group is not None,
    )


def _others(name: str, others: "list[GroupTotal]", samples: int) -> ShownGroup:
    """Groups that are not shown, as one row of sums."""
    shares = [total.share for total in others if total.share is not None]
    stands = [total.standing_out for total in others if total.standing_out is not None]
    count = sum(total.samples for total in others)
    share, expected = math.fsum(shares) if shares else None, count / samples
    shown = "" if share is None else f"{share:.1%}"
    return ShownGroup(
        cells=(name, f"{count:,}", shown, "", f"{expected:.1%}", "", "", f"{sum(stands):,}" if stands else ""),
        share=share,
        low=None,
        high=None,
        expected=expected,
        named=False,
    )
