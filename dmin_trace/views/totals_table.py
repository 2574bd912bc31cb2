"""A terminal table of what groups of training samples have of a query's influence."""

import math
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


def totals_table(totals: "Totals", query: int, *, ascii_only: bool = False) -> Group:
    """The groups with the largest shares of query number `query`, the others as one row, and the samples of none."""
    groups = totals.groups[query]
    named = [total for total in groups if total.group is not None]
    shown, others = named[:MAX_SHOWN_GROUPS], named[MAX_SHOWN_GROUPS:]
    rows = [_row(harmless(total.group or "", MAX_NAME_LENGTH), total) for total in shown]
    if others:
        rows.append(_others(f"{len(others):,} other groups", others, totals.samples))
    rows += [_row("(of no group)", total) for total in groups if total.group is None]
    title = Text("Influence by ").append(harmless(totals.by, ascii_only=ascii_only), style="bold")
    title.append(" on ").append(harmless(totals.names[query], ascii_only=ascii_only), style="bold")
    table = text_table("", HEADINGS, rows, caption=_meaning(totals), ascii_only=ascii_only)
    # In a terminal of 80 columns, this leaves room for a name.
    table.padding = (0, 1, 0, 0)
    for column, heading in zip(table.columns[1:], HEADINGS[1:], strict=True):
        column.justify, column.no_wrap = "right", True
        column.header = Text("\n".join(heading.rsplit(" ", 1)) if len(heading) > 5 else heading)
    return Group(title, table)


def _row(name: str, total: "GroupTotal") -> tuple[str, ...]:
    interval = "" if total.low is None or total.high is None else f"{total.low:.0%} to {total.high:.0%}"
    share, expected = "" if total.share is None else f"{total.share:.1%}", f"{total.expected:.1%}"
    z = "" if total.z is None else f"{total.z:.1f}"
    p = "" if total.p is None else f"{total.p:.4f}" if total.p >= 1e-4 else "<0.0001"
    stands = "" if total.standing_out is None else f"{total.standing_out:,}"
    return name, f"{total.samples:,}", share, interval, expected, z, p, stands


def _others(name: str, others: "list[GroupTotal]", samples: int) -> tuple[str, ...]:
    """Groups that are not shown, as one row of sums."""
    shares = [total.share for total in others if total.share is not None]
    stands = [total.standing_out for total in others if total.standing_out is not None]
    count = sum(total.samples for total in others)
    share = f"{math.fsum(shares):.1%}" if shares else ""
    return name, f"{count:,}", share, "", f"{count / samples:.1%}", "", "", f"{sum(stands):,}" if stands else ""


def _meaning(totals: "Totals") -> str:
    parts = [MEANING]
    if totals.overlapping:
        parts.append(f"{totals.overlapping:,} samples are in several groups and count in each")
    if totals.merged is not None:
        parts.append(f"{totals.merged:,} samples were near-copies of another, and count with it")
    return "; ".join(parts) + "." + (f" {totals.note}" if totals.note else "")
