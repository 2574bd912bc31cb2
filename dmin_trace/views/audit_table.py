"""Terminal tables and lists of an audit: what of a trace's samples a person should look at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from dmin_trace.views.export import to_json
from dmin_trace.views.table import (
    FILE_COLUMNS,
    MAX_FILE_LENGTH,
    MAX_TEXT_LENGTH,
    TEXT_COLUMNS,
    choose_column,
    text_table,
)
from dmin_trace.views.text import harmless

if TYPE_CHECKING:
    from dmin_trace.audit import Audit, Finding

TITLES = {
    "near-copy": (
        "Near-copies",
        "alike",
        "alike: how much of what a sample has of its own the other one has too, 1 for copies",
    ),
    "outlier": (
        "Outliers",
        "own",
        "own: the part of its gradient that other samples do not share; such a sample is of another kind, or learned "
        "by heart; z: how far that is from the median, in a robust scale",
    ),
    "label": (
        "Labels or captions that do not fit",
        "fit",
        "fit: the share of the samples nearest by gradient that have its label, or the words of its caption",
    ),
    "no influence": (
        "Samples without influence of their own",
        "own",
        "own: the part of its gradient that other samples do not share; empty where there is no usable gradient",
    ),
}


def audit_tables(audit: "Audit", k: int, *, ascii_only: bool = False) -> list[Group]:
    """A table for each list of an audit that is not empty, of its first k samples."""
    tables = []
    for kind, (title, measure, meaning) in TITLES.items():
        found = [finding for finding in audit.findings if finding.kind == kind]
        if found:
            tables.append(_table(title, measure, meaning, found, k, ascii_only))
    return tables


def audit_json(audit: "Audit", trace_facts: Mapping[str, object]) -> str:
    """An audit as JSON of the format "dmin_trace.audit":

        trace       the facts of the trace, as given
        samples     how many samples were audited
        column      the column of labels or captions, or null
        notes       [text, ...]
        clusters    [[sample, ...], ...] near-copies; the others are alike the first
        findings    [{kind, sample, value, z, of, why, columns}, ...]

    The fields are as in `dmin_trace.Audit` and `dmin_trace.audit.Finding`.
    """
    content: dict[str, object] = {"trace": trace_facts}
    content |= {name: getattr(audit, name) for name in ("samples", "column", "notes")}
    content["clusters"] = [cluster.tolist() for cluster in audit.clusters]
    content["findings"] = [asdict(finding) for finding in audit.findings]
    return to_json("audit", content)


def audit_lines(audit: "Audit", trace_id: str) -> str:
    """One line of JSON for each finding: what might be removed or looked at, and why. docs/exports.md has its keys.

    Of near-copies all but the one that the others are alike are in the list.
    """
    facts = {"trace": trace_id}
    lines = [to_json("audit_list", facts | asdict(finding), lines=False) for finding in audit.findings]
    return "".join(f"{line}\n" for line in lines)


def _table(title: str, measure: str, meaning: str, found: "Sequence[Finding]", k: int, ascii_only: bool) -> Group:
    shown = found[:k]
    text, file = choose_column(shown, TEXT_COLUMNS, FILE_COLUMNS), choose_column(shown, FILE_COLUMNS, None)
    headings = ["sample", measure]
    with_z, with_of = any(one.z is not None for one in shown), any(one.of is not None for one in shown)
    headings += ["z"] * with_z + ["of"] * with_of
    numbers = len(headings)
    headings += [name for name in (text, file) if name is not None] + ["why"] * (not with_of and not with_z)
    rows = []
    for one in shown:
        row = [str(one.sample), "" if one.value is None else f"{one.value:.2f}"]
        row += ["" if one.z is None else f"{one.z:.1f}"] * with_z + ["" if one.of is None else str(one.of)] * with_of
        if text is not None:
            row.append(harmless(_cell(one, text), MAX_TEXT_LENGTH))
        if file is not None:
            row.append(harmless(_cell(one, file)[-MAX_FILE_LENGTH:], MAX_FILE_LENGTH))
        row += [one.why] * (not with_of and not with_z)
        rows.append(row)
    table = text_table("", [harmless(name, MAX_FILE_LENGTH) for name in headings], rows, meaning, ascii_only=ascii_only)
    # Few columns make a narrow table, below which the meaning would have one word a line.
    table.min_width = 60
    for column in table.columns[:numbers]:
        column.justify, column.no_wrap = "right", True
    more = f", the first {k:,} of them" if len(found) > k else ""
    return Group(Text(f"{title}: {len(found):,}{more}", style="bold"), table)


def _cell(finding: "Finding", column: str) -> str:
    value = finding.columns.get(column)
    return "" if value is None else str(value)
