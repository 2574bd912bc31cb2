"""Terminal tables: the hits of a query, the properties of a store, the results of a measure, the damage in a store.

Each function returns a renderable of `rich`; the command line prints it. Texts may come from anybody, so each cell is a
`rich.text.Text`, which is never read as markup, made of `harmless` text. With `ascii_only` (give it
`console.options.ascii_only`) a table has ASCII characters only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dmin_trace.views.describe import describe_score
from dmin_trace.views.text import harmless

if TYPE_CHECKING:
    from dmin_trace.query import Hit, TopK
    from dmin_trace.store import Verified

# The column shown is the first of these names, whatever their case, that has a value in some hit.
TEXT_COLUMNS = ("caption", "text", "prompt", "label", "class", "label_name", "class_name", "labels", "title", "name")
FILE_COLUMNS = ("file_name", "path", "file", "filename", "file_path", "image_path")

# In a terminal of 80 columns, a caption of this length takes three lines beside a file name and ten timesteps.
MAX_TEXT_LENGTH = 72
MAX_FILE_LENGTH = 24
MAX_BARS = 20

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "12345678"


def hits_table(top: TopK, query: int, *, ascii_only: bool = False) -> Group:
    """The most influential training samples for query number `query` of an answer, and what their score means.

    The scores at the timesteps are drawn as one bar each. All bars of a table have one scale; a negative score is a
    dot. Above 20 timesteps, neighbours are averaged into 20 bars. With `ascii_only` the bars are the digits 1 to 8,
    and a negative score is "-".
    """
    hits, prompt = top.hits[query], top.prompts[query]
    title = Text("Most influential training samples for ")
    title.append(harmless(top.names[query], ascii_only=ascii_only), style="bold")
    if prompt is not None:
        title.append("\n").append(harmless(prompt, ascii_only=ascii_only), style="italic")
    table = _table(None, caption=describe_score(top.score, len(top.timesteps)), ascii_only=ascii_only)
    table.add_column(Text("#"), justify="right", no_wrap=True)
    table.add_column(Text("score"), justify="right", no_wrap=True)
    table.add_column(Text(_timestep_heading(top.timesteps)), no_wrap=True)
    table.add_column(Text("sample"), justify="right", no_wrap=True)
    text_column = _choose_column(hits, TEXT_COLUMNS, FILE_COLUMNS)
    file_column = _choose_column(hits, FILE_COLUMNS, None)
    for column, style in ((text_column, ""), (file_column, "dim")):
        if column is not None:
            heading = Text(harmless(column, MAX_FILE_LENGTH, ascii_only=ascii_only))
            table.add_column(heading, overflow="fold", style=style)

    averaged = [_average_neighbours(hit.per_timestep) for hit in hits]
    peak = max((score for row in averaged for score in row if math.isfinite(score)), default=0.0)
    for hit, value, scores in zip(hits, _align_decimals([hit.score for hit in hits]), averaged, strict=True):
        row = [Text(str(hit.rank)), Text(value), _draw_bars(scores, peak, ascii_only), Text(str(hit.sample))]
        if text_column is not None:
            text = harmless(_cell(hit, text_column), MAX_TEXT_LENGTH, ascii_only=ascii_only)
            row.append(Text(text))
        if file_column is not None:
            path = _cell(hit, file_column)
            # The end of a path tells two files apart.
            path = path if len(path) <= MAX_FILE_LENGTH else "…" + path[1 - MAX_FILE_LENGTH :]
            row.append(Text(harmless(path, MAX_FILE_LENGTH, ascii_only=ascii_only)))
        table.add_row(*row)
    # A title of the table itself would fold at its width.
    return Group(title, table)


def facts_table(facts: Sequence[tuple[str, str]], title: str, *, ascii_only: bool = False) -> Table:
    """Names and values, one pair a row, under a title. Long values fold; only those above 2,000 characters are cut."""
    table = _table(title, box_style=box.SIMPLE, ascii_only=ascii_only)
    table.show_header = False
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts:
        _add_row(table, (name, value), ascii_only)
    return table


def measure_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    meaning: str,
    *,
    ascii_only: bool = False,
) -> Table:
    """The figures of a measure under a title, and below them what they mean."""
    table = _table(title, caption=meaning, ascii_only=ascii_only)
    # Few figures make a narrow table, below which the meaning would have one word a line.
    table.min_width = 60
    for heading in headings:
        table.add_column(Text(harmless(heading, ascii_only=ascii_only)), justify="right", no_wrap=True)
    for row in rows:
        _add_row(table, row, ascii_only)
    return table


def damage_table(found: Verified, title: str, *, ascii_only: bool = False) -> Table:
    """What `verify` found damaged, one row for each file; only cells above 2,000 characters are cut."""
    table = _table(f"Damaged in {title}", ascii_only=ascii_only)
    for heading in ("file", "samples", "what is wrong"):
        table.add_column(Text(heading), overflow="fold")
    for damage in found.damages:
        lost = _ranges(damage.samples) or (f"rows {_ranges(damage.rows)}" if damage.rows else "")
        _add_row(table, (damage.file, lost, damage.what), ascii_only)
    return table


def _table(
    title: str | None, *, caption: str | None = None, box_style: box.Box = box.SIMPLE_HEAD, ascii_only: bool
) -> Table:
    return Table(
        title=None if title is None else Text(harmless(title, ascii_only=ascii_only), style="bold"),
        title_justify="left",
        title_style="",
        caption=None if caption is None else Text(harmless(caption, 2000, ascii_only=ascii_only)),
        caption_justify="left",
        caption_style="dim",
        box=box_style,
        header_style="bold",
        pad_edge=False,
    )


def _add_row(table: Table, cells: Sequence[str], ascii_only: bool) -> None:
    table.add_row(*(Text(harmless(cell, 2000, ascii_only=ascii_only)) for cell in cells))


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in a few words, neighbours together: 3-7, 12."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _cell(hit: Hit, column: str) -> str:
    value = hit.columns.get(column)
    return "" if value is None else str(value)


def _choose_column(hits: Sequence[Hit], wanted: Sequence[str], others: Sequence[str] | None) -> str | None:
    """The first wanted column that has a value in some hit; else the first column that is not among the others."""
    present = dict.fromkeys(name for hit in hits for name, value in hit.columns.items() if value is not None)
    for want in wanted:
        for name in present:
            if name.lower() == want:
                return name
    if others is None:
        return None
    return next((name for name in present if name.lower() not in others), None)


def _timestep_heading(timesteps: tuple[float, ...]) -> str:
    """A heading with the first timestep above the first bar and the last above the last."""
    if len(timesteps) < 2:
        return "".join(f"t={t:g}" for t in timesteps)
    first, last = f"t={timesteps[0]:g}", f"{timesteps[-1]:g}"
    gap = max(1, min(len(timesteps), MAX_BARS) - len(first) - len(last))
    return first + " " * gap + last


def _average_neighbours(scores: Sequence[float]) -> list[float]:
    """The scores, or the means of MAX_BARS groups of neighbours where there are more."""
    count = len(scores)
    if count <= MAX_BARS:
        return list(scores)
    edges = [count * k // MAX_BARS for k in range(MAX_BARS + 1)]
    return [sum(scores[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _draw_bars(scores: Sequence[float], peak: float, ascii_only: bool) -> Text:
    blocks, negative = (ASCII_BARS, "-") if ascii_only else (BARS, "·")
    drawn = ""
    for score in scores:
        if math.isnan(score):
            drawn += "?"
        elif score < 0:
            drawn += negative
        else:
            # Divided first, so that no score overflows; an infinite score is as high as the peak.
            part = min(score / peak, 1.0) if peak > 0 else float(score > 0)
            drawn += blocks[min(int(part * len(blocks)), len(blocks) - 1)]
    bars = Text(drawn, style="cyan")
    bars.highlight_regex(f"[?{negative}]", "red")
    return bars


def _align_decimals(scores: Sequence[float]) -> list[str]:
    """The scores with the same number of decimals, which gives the largest four digits."""
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
    if largest != 0 and not 1e-4 <= largest < 1e6:
        return [f"{score:.3e}" for score in scores]
    decimals = max(2, 3 - math.floor(math.log10(largest))) if largest else 2
    return [f"{score:.{decimals}f}" for score in scores]
