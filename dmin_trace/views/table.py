"""Terminal tables: the hits of a query, the properties of a store, the results of a measure, the damage in a store.

Each function returns a renderable of `rich`; the command line prints it. Texts may come from anybody, so each cell is a
`rich.text.Text`, which is never read as markup, made of `harmless` text. With `ascii_only` (give it
`console.options.ascii_only`) a table has ASCII characters only.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dmin_trace.settings import MAX_THUMBNAIL
from dmin_trace.views.describe import describe_concept, describe_score
from dmin_trace.views.terminal_pictures import Draw
from dmin_trace.views.text import harmless

if TYPE_CHECKING:
    from dmin_trace.audit import Finding
    from dmin_trace.query import Hit, TopK
    from dmin_trace.store import Verified

# The column shown is the first of these names, whatever their case, that has a value in some hit.
TEXT_COLUMNS = ("caption", "text", "prompt", "label", "class", "label_name", "class_name", "labels", "title", "name")
FILE_COLUMNS = ("file_name", "path", "file", "filename", "file_path", "image_path")
# In a terminal of 80 columns, a caption of this length takes three lines beside a file name and ten timesteps.
MAX_TEXT_LENGTH, MAX_FILE_LENGTH, MAX_BARS = 72, 24, 20
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "12345678"


def hits_table(top: "TopK", query: int, *, ascii_only: bool = False, draw: Draw | None = None) -> Group:
    """The most influential training samples for query number `query` of an answer, and what their score means.

    The scores at the timesteps, or of groups of pooled ones, are drawn as one bar each, all of a table on one scale; a
    negative score is a dot. Above 20, neighbours are averaged into 20 bars. A single one would be the score itself, and
    is not drawn. In ASCII bars are the digits 1 to 8, and a negative score "-". Below the table a sentence says how
    many of all samples stand out; those of them that are shown have a star behind their z. With `draw`, the table has
    the picture of each sample, and the query's own stands above it.
    """
    from dmin_trace.store import decode_webp

    hits, prompt, without = top.hits[query], top.prompts[query], top.without[query]
    title = Text("Most influential training samples for ")
    title.append(harmless(top.names[query], ascii_only=ascii_only), style="bold")
    if prompt is not None:
        title.append("\n").append(harmless(prompt, ascii_only=ascii_only), style="italic")
    if without is not None:
        title.append("\n").append(harmless(describe_concept(without), ascii_only=ascii_only))
    background, with_z = top.backgrounds[query], any(hit.z is not None for hit in hits)
    verdict = f"{'* ' if with_z else ''}{background.verdict}"
    table = text_table("", caption=describe_score(top.score, top.groups), ascii_only=ascii_only)
    shown = [None if draw is None else hit.thumbnail for hit in hits]
    with_pictures = any(image is not None for image in shown)
    if with_pictures:
        table.padding = (0, 1, 1, 0)  # an empty line between two pictures
        table.add_column("", no_wrap=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    if with_z:
        table.add_column("z", justify="right", no_wrap=True)
    with_bars = len(top.groups) > 1
    if with_bars:
        table.add_column(_timestep_heading(top.timesteps, len(top.groups)), no_wrap=True)
    table.add_column("sample", justify="right", no_wrap=True)
    text_column = choose_column(hits, TEXT_COLUMNS, FILE_COLUMNS)
    file_column = choose_column(hits, FILE_COLUMNS, None)
    for column, style in ((text_column, ""), (file_column, "dim")):
        if column is not None:
            heading = Text(harmless(column, MAX_FILE_LENGTH, ascii_only=ascii_only))
            table.add_column(heading, overflow="fold", style=style)

    averaged = [average_neighbours(hit.per_timestep) for hit in hits]
    peak = max((score for row in averaged for score in row if math.isfinite(score)), default=0.0)
    values = align_decimals([hit.score for hit in hits])
    for hit, image, value, scores in zip(hits, shown, values, averaged, strict=True):
        bars = [_draw_bars(scores, peak, ascii_only)] if with_bars else []
        z = [_draw_z(hit)] if with_z else []
        row: list[RenderableType] = [Text(str(hit.rank)), Text(value), *z, *bars, Text(str(hit.sample))]
        if with_pictures:
            row.insert(0, Text() if draw is None or image is None else draw(image))
        if text_column is not None:
            row.append(Text(harmless(_cell(hit, text_column), MAX_TEXT_LENGTH, ascii_only=ascii_only)))
        if file_column is not None:
            path = _cell(hit, file_column)
            if len(path) > MAX_FILE_LENGTH:
                path = "…" + path[1 - MAX_FILE_LENGTH :]  # the end of a path tells two files apart
            row.append(Text(harmless(path, MAX_FILE_LENGTH, ascii_only=ascii_only)))
        table.add_row(*row)
    # A title or a caption of the table itself would fold at its width.
    picture = top.pictures[query]
    own = [] if draw is None or picture is None else [draw(decode_webp(picture, MAX_THUMBNAIL))]
    return Group(title, *own, table, Text(harmless(verdict, 400, ascii_only=ascii_only), style="bold"))


def facts_table(facts: Sequence[tuple[str, str]], title: str, *, ascii_only: bool = False) -> Table:
    """Names and values, one pair a row, under a title. Long values fold; only those above 2,000 characters are cut."""
    table = text_table(title, ("", ""), facts, ascii_only=ascii_only)
    table.show_header, table.box, table.columns[0].style = False, box.SIMPLE, "dim"
    return table


def measure_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], meaning: str, *, ascii_only: bool = False
) -> Table:
    """The figures of a measure under a title, and below them what they mean."""
    table = text_table(title, headings, rows, caption=meaning, ascii_only=ascii_only)
    # Few figures make a narrow table, below which the meaning would have one word a line.
    table.min_width = 60
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    return table


def damage_table(found: "Verified", title: str, *, ascii_only: bool = False) -> Table:
    """What `verify` found damaged, one row for each file; only cells above 2,000 characters are cut."""
    lost = [_ranges(of.samples) or (f"rows {_ranges(of.rows)}" if of.rows else "") for of in found.damages]
    rows = [(of.file, samples, of.what) for of, samples in zip(found.damages, lost, strict=True)]
    return text_table(f"Damaged in {title}", ("file", "samples", "what is wrong"), rows, ascii_only=ascii_only)


def text_table(
    title: str, headings: Sequence[str] = (), rows: Sequence[Sequence[str]] = (), caption: str = "", *, ascii_only: bool
) -> Table:
    def text(value: str, style: str = "") -> Text:
        return Text(harmless(value, 2000, ascii_only=ascii_only), style=style)

    table = Table(
        title=text(title, "bold") if title else None,
        title_justify="left",
        title_style="",
        caption=text(caption) if caption else None,
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
    )
    for heading in headings:
        table.add_column(text(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(text, row))
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in a few words, neighbours together: 3-7, 12."""
    # Neighbours differ from their place among the numbers by the same.
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _draw_z(hit: "Hit") -> Text:
    """z with one decimal, and a star if the sample stands out."""
    z = "" if hit.z is None else f"{hit.z:.1f}"
    return Text(z + ("*" if hit.stands_out else " "), style="bold" if hit.stands_out else "")


def _cell(hit: "Hit", column: str) -> str:
    value = hit.columns.get(column)
    return "" if value is None else str(value)


def choose_column(
    hits: "Sequence[Hit] | Sequence[Finding]", wanted: Sequence[str], others: Sequence[str] | None
) -> str | None:
    """The first wanted column that has a value in some hit; else the first column that is not among the others."""
    present = dict.fromkeys(name for hit in hits for name, value in hit.columns.items() if value is not None)
    chosen = [name for want in wanted for name in present if name.lower() == want or _is_kind(name.lower(), want)]
    if others is not None:
        chosen += [name for name in present if name.lower() not in others]
    return chosen[0] if chosen else None


def _is_kind(name: str, word: str) -> bool:
    """Whether a column's name says that it holds captions or prompts: blip_caption, instance_prompt."""
    return word in ("caption", "prompt") and word in name


def _timestep_heading(timesteps: tuple[float, ...], bars: int) -> str:
    """The first timestep above the first bar and the last above the last."""
    first, last = f"t={timesteps[0]:g}", f"{timesteps[-1]:g}"
    return first + " " * max(1, min(bars, MAX_BARS) - len(first) - len(last)) + last


def average_neighbours(scores: Sequence[float], most: int = MAX_BARS) -> list[float]:
    """The scores, or the means of `most` groups of neighbours where there are more."""
    bars = min(len(scores), most)
    edges = [len(scores) * k // bars for k in range(bars + 1)]
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


def align_decimals(scores: Sequence[float]) -> list[str]:
    """The scores with the same number of decimals, which gives the largest four digits."""
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
    if largest != 0 and not 1e-4 <= largest < 1e6:
        return [f"{score:.3e}" for score in scores]
    decimals = max(2, 3 - math.floor(math.log10(largest))) if largest else 2
    return [f"{score:.{decimals}f}" for score in scores]
