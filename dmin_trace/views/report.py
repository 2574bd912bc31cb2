"""The last stage: the causes of a query, for a person (a table) or a program (JSON, CSV).

    hits -> report

Nothing is printed here: each function returns a rich renderable or a text, and the command line prints it. Captions,
labels and file names come from data sets, often other people's, so no text reaches a terminal or a spreadsheet as it
is: `harmless` makes its control characters visible, cells are `rich.text.Text` and so never read as markup, and CSV
cells can't start a formula. JSON keeps the original text, escaped to plain ASCII.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from dmin_trace.query import Hit
from dmin_trace.search import Score

if TYPE_CHECKING:
    from dmin_trace.store import Verified

JSON_FORMAT = "dmin_trace.hits"
JSON_VERSION = 1
MEASURES_FORMAT = "dmin_trace.measures"
MEASURES_VERSION = 1
VERIFIED_FORMAT = "dmin_trace.verified"
VERIFIED_VERSION = 1

# The first of these that the hits have a value for is the text (the file) shown; case does not count.
TEXT_COLUMNS = ("caption", "text", "prompt", "label", "class", "label_name", "class_name", "labels", "title", "name")
FILE_COLUMNS = ("file_name", "path", "file", "filename", "file_path", "image_path")

# At 80 columns these leave a caption three lines at the most beside a file name and ten timesteps.
LONGEST_TEXT = 72
LONGEST_FILE = 24
MOST_BARS = 20

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "12345678"

# Letters and marks by category, yet drawn as nothing: fillers, joiners and variation selectors.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

# The full-width forms start a formula too where a spreadsheet runs in a Japanese or Chinese locale.
FORMULA_STARTS = tuple("=+-@＝＋－＠")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked: an image by its file name, or a training sample as "sample 17"; and its prompt, if it has one."""

    name: str
    prompt: str | None


def hits_table(
    question: Question,
    hits: Sequence[Hit],
    timesteps: tuple[float, ...],
    *,
    score: Score = "dmin",
    ascii_only: bool = False,
) -> Table:
    """The causes of one query as a table of one row a hit, and under it what their score is.

    The shares are drawn as one bar a timestep, all bars of the table on one scale, a negative share as a dot; above
    20 timesteps, neighbours are averaged into 20 bars. With `ascii_only` (give it `console.options.ascii_only`) bars
    are the digits 1 to 8, a negative share is "-", and other characters are escaped.
    """
    text_column = _chosen(hits, TEXT_COLUMNS, FILE_COLUMNS)
    file_column = _chosen(hits, FILE_COLUMNS, None)

    title = Text("Causes of ").append(_shown(question.name, 200, ascii_only), style="bold")
    if question.prompt is not None:
        title.append("\n").append(_shown(question.prompt, 200, ascii_only), style="italic")
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        caption=Text(_meaning(score, len(timesteps))),
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
    )
    table.add_column(Text("#"), justify="right", no_wrap=True)
    table.add_column(Text("score"), justify="right", no_wrap=True)
    table.add_column(Text(_span(timesteps)), no_wrap=True)
    table.add_column(Text("sample"), justify="right", no_wrap=True)
    if text_column is not None:
        table.add_column(Text(_shown(text_column, LONGEST_FILE, ascii_only)), overflow="fold")
    if file_column is not None:
        table.add_column(Text(_shown(file_column, LONGEST_FILE, ascii_only)), overflow="fold", style="dim")

    pooled = [_pooled(hit.per_timestep) for hit in hits]
    peak = max((share for row in pooled for share in row if math.isfinite(share)), default=0.0)
    scores = _aligned([hit.score for hit in hits])
    for hit, value, shares in zip(hits, scores, pooled, strict=True):
        row = [Text(str(hit.rank)), Text(value), _bars(shares, peak, ascii_only), Text(str(hit.sample))]
        if text_column is not None:
            row.append(Text(_shown(_written(hit.columns.get(text_column)), LONGEST_TEXT, ascii_only)))
        if file_column is not None:
            row.append(Text(_file(_written(hit.columns.get(file_column)), ascii_only)))
        table.add_row(*row)
    return table


def facts_table(facts: Sequence[tuple[str, str]], title: str, *, ascii_only: bool = False) -> Table:
    """Names and values, one pair a row, under a title; long values fold, none is lost below 2,000 characters."""
    table = Table(
        title=Text(_shown(title, 200, ascii_only), style="bold"),
        title_justify="left",
        title_style="",
        box=box.SIMPLE,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(_shown(name, 200, ascii_only)), Text(_shown(value, 2000, ascii_only)))
    return table


def measure_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    meaning: str,
    *,
    ascii_only: bool = False,
) -> Table:
    """Figures of a measure, a row each, under a title, and below them what they mean."""
    table = Table(
        title=Text(_shown(title, 200, ascii_only), style="bold"),
        title_justify="left",
        title_style="",
        caption=Text(_shown(meaning, 2000, ascii_only)),
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        # A table of few figures is narrow, and what they mean would stand below it one word a line.
        min_width=60,
    )
    for heading in headings:
        table.add_column(Text(_shown(heading, 200, ascii_only)), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_shown(cell, 200, ascii_only)) for cell in row))
    return table


def damage_table(found: Verified, title: str, *, ascii_only: bool = False) -> Table:
    """What `verify` found damaged, a row for each file; nothing of it is cut below 2,000 characters."""
    table = Table(
        title=Text(f"Damaged in {_shown(title, 200, ascii_only)}", style="bold"),
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
    )
    for heading in ("file", "samples", "what is wrong"):
        table.add_column(Text(heading), overflow="fold")
    for damage in found.damages:
        lost = _ranges(damage.samples) or (f"slots {_ranges(damage.rows)}" if damage.rows else "")
        table.add_row(*(Text(_shown(cell, 2000, ascii_only)) for cell in (damage.file, lost, damage.what)))
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in a few words, neighbours together: 3-7, 12."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def verified_json(found: Verified) -> str:
    """What `verify` found as strict JSON in plain ASCII, keys always in this order:

        format      "dmin_trace.verified"
        version     1; a reader should refuse any other
        whole       whether nothing is damaged
        complete    whether the capture has finished
        chunks, done, files, bytes     how many there are, are done, and were compared
        damages     [{file, array, chunk, slots, samples, what}, ...]
        notes       [text, ...]

    `slots` and `samples` are lists; `array` and `chunk` are null for a file that is no chunk's.
    """
    damages = [
        {
            "file": damage.file,
            "array": damage.array or None,
            "chunk": damage.chunk,
            "slots": list(damage.rows),
            "samples": list(damage.samples),
            "what": damage.what,
        }
        for damage in found.damages
    ]
    counts = {name: getattr(found, name) for name in ("complete", "chunks", "done", "files", "bytes")}
    return _json(
        {
            "format": VERIFIED_FORMAT,
            "version": VERIFIED_VERSION,
            "whole": not damages,
            **counts,
            "damages": damages,
            "notes": found.notes,
        }
    )


def measures_json(measures: Sequence[Mapping[str, object]], trace_facts: Mapping[str, object]) -> str:
    """What measures found as strict JSON in plain ASCII, keys always in this order:

        format      "dmin_trace.measures"
        version     1; a reader should refuse any other
        trace       the facts of the trace, as given
        measures    [{measure, ...}, ...], as given

    A number that is NaN or infinite is null.
    """
    return _json(
        {"format": MEASURES_FORMAT, "version": MEASURES_VERSION, "trace": trace_facts, "measures": list(measures)}
    )


def to_json(
    questions: Sequence[Question],
    hits: Sequence[Sequence[Hit]],
    timesteps: tuple[float, ...],
    trace_facts: dict[str, object],
    *,
    score: Score = "dmin",
) -> str:
    """The hits of all queries as strict JSON in plain ASCII, keys always in this order:

        format      "dmin_trace.hits"
        version     1; a reader should refuse any other
        scored_by   "dmin" or "deflated"
        score       what such a score is, in words
        timesteps   [t, ...]
        trace       the facts of the trace, as given
        queries     [{name, prompt, hits: [{rank, sample, score, shares, columns}, ...]}, ...]

    `shares` has one number for each of `timesteps`; `columns` are the store's own, in its order; text is the original.
    A number that is NaN or infinite is null.
    """
    report = {
        "format": JSON_FORMAT,
        "version": JSON_VERSION,
        "scored_by": score,
        "score": _meaning(score, len(timesteps)),
        "timesteps": timesteps,
        "trace": trace_facts,
        "queries": [
            {
                "name": question.name,
                "prompt": question.prompt,
                "hits": [
                    {
                        "rank": hit.rank,
                        "sample": hit.sample,
                        "score": hit.score,
                        "shares": hit.per_timestep,
                        "columns": hit.columns,
                    }
                    for hit in causes
                ],
            }
            for question, causes in zip(questions, hits, strict=True)
        ],
    }
    return _json(report)


def to_csv(
    questions: Sequence[Question],
    hits: Sequence[Sequence[Hit]],
    timesteps: tuple[float, ...],
    *,
    score: Score = "dmin",
) -> str:
    """The hits of all queries as CSV, one row for each (query, hit).

    Columns: query, prompt, rank, sample, score, scored_by ("dmin" or "deflated"), the store's own columns,
    then share_t<timestep> for each timestep.
    A column of the store with a name already taken gets "meta_" before it. Control characters in text are escaped,
    and text that a spreadsheet would take for a formula gets a leading "'". A missing value, NaN or infinity is an
    empty cell. Lines end in a newline alone.
    """
    fixed = ["query", "prompt", "rank", "sample", "score", "scored_by"]
    shares = [f"share_t{_timestep(t)}" for t in timesteps]
    # A dict for its order: each name once, where it was first met.
    names = dict.fromkeys(name for causes in hits for hit in causes for name in hit.columns)
    taken = {*fixed, *shares}
    headings = []
    for name in names:
        heading = _spreadsheet(name)
        while heading in taken:
            heading = f"meta_{heading}"
        taken.add(heading)
        headings.append(heading)

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fixed, *headings, *shares])
    for question, causes in zip(questions, hits, strict=True):
        for hit in causes:
            if len(hit.per_timestep) != len(timesteps):
                raise ValueError(
                    f"sample {hit.sample} has {len(hit.per_timestep)} shares for {len(timesteps)} timesteps"
                )
            values = [question.name, question.prompt, hit.rank, hit.sample, hit.score, score]
            values += [hit.columns.get(name) for name in names]
            writer.writerow([_cell(value) for value in [*values, *hit.per_timestep]])
    return out.getvalue()


def harmless(text: str, limit: int = 200) -> str:
    """The text as one line that does nothing to a terminal, `limit` characters at the most (ending in "…" if cut).

    Control characters (ESC, C1 and newlines among them), bidirectional overrides, isolates and marks, zero-width and
    other characters that can't be seen, and lone surrogates become visible escapes such as \\x1b and \\u202e. Every
    kind of space becomes a plain one. This is for reading only: a backslash stays as it is, so an escape can't be
    told from the same characters in the text.
    """
    # Cut before anything else: a caption of a megabyte must cost nothing.
    start = text[:limit]
    safe = start if start.isprintable() and start.isascii() else "".join(_visible(character) for character in start)
    if len(text) <= limit and len(safe) <= limit:
        return safe
    return safe[: limit - 1] + "…"


def _visible(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    if character.isprintable() and not UNSEEN.match(character):
        return character
    return _escape(character)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _shown(text: str, limit: int, ascii_only: bool) -> str:
    safe = harmless(text, limit)
    return safe.replace("…", "...").encode("ascii", "backslashreplace").decode("ascii") if ascii_only else safe


def _file(path: str, ascii_only: bool) -> str:
    """The end of a path, which is what tells two files apart."""
    if len(path) <= LONGEST_FILE:
        return _shown(path, LONGEST_FILE, ascii_only)
    return _shown("…" + path[1 - LONGEST_FILE :], LONGEST_FILE, ascii_only)


def _written(value: str | int | float | None) -> str:
    return "" if value is None else str(value)


def _chosen(hits: Sequence[Hit], wanted: Sequence[str], others: Sequence[str] | None) -> str | None:
    """The first wanted column that some hit has a value in; else the first one left that is not among the others."""
    present = dict.fromkeys(name for hit in hits for name, value in hit.columns.items() if value is not None)
    for want in wanted:
        for name in present:
            if name.lower() == want:
                return name
    if others is None:
        return None
    return next((name for name in present if name.lower() not in others), None)


def _meaning(score: Score, count: int) -> str:
    timesteps = "1 timestep" if count == 1 else f"{count} timesteps"
    if score == "dmin":
        return (
            f"score: inner product of normalised compressed gradients, summed over {timesteps}; "
            f"{count} would be a perfect match"
        )
    return (
        f"{score} score: inner product of compressed gradients, the query's without what all samples share, summed "
        f"over {timesteps}; above 0 helps, below 0 hinders; compare within a query only"
    )


def _timestep(t: float) -> str:
    # Not :g, which would give two close timesteps one name.
    return str(int(t)) if math.isfinite(t) and t == int(t) else str(float(t))


def _span(timesteps: tuple[float, ...]) -> str:
    """A heading that puts the first timestep over the first bar and the last over the last."""
    if len(timesteps) < 2:
        return "".join(f"t={t:g}" for t in timesteps)
    first, last = f"t={timesteps[0]:g}", f"{timesteps[-1]:g}"
    gap = max(1, min(len(timesteps), MOST_BARS) - len(first) - len(last))
    return first + " " * gap + last


def _pooled(shares: Sequence[float]) -> list[float]:
    """The shares themselves, or above MOST_BARS of them the means of as many groups of neighbours."""
    count = len(shares)
    if count <= MOST_BARS:
        return list(shares)
    edges = [count * k // MOST_BARS for k in range(MOST_BARS + 1)]
    return [sum(shares[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _bars(shares: Sequence[float], peak: float, ascii_only: bool) -> Text:
    blocks, negative = (ASCII_BARS, "-") if ascii_only else (BARS, "·")
    drawn = ""
    for share in shares:
        if math.isnan(share):
            drawn += "?"
        elif share < 0:
            drawn += negative
        else:
            # Divided before it is multiplied, so that no share overflows; an infinite one is as high as the peak.
            part = min(share / peak, 1.0) if peak > 0 else float(share > 0)
            drawn += blocks[min(int(part * len(blocks)), len(blocks) - 1)]
    bars = Text(drawn, style="cyan")
    bars.highlight_regex(f"[?{negative}]", "red")
    return bars


def _aligned(scores: Sequence[float]) -> list[str]:
    """The scores with one number of decimals, which gives the largest four digits."""
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
    if largest != 0 and not 1e-4 <= largest < 1e6:
        return [f"{score:.3e}" for score in scores]
    decimals = max(2, 3 - math.floor(math.log10(largest))) if largest else 2
    return [f"{score:.{decimals}f}" for score in scores]


def _json(report: Mapping[str, object]) -> str:
    # ASCII only, so that the text is safe to show and to pipe whatever the captions hold.
    return json.dumps(_plain(report), allow_nan=False, ensure_ascii=True, indent=2)


def _plain(value: object) -> object:
    """The value with null for each NaN and infinity, and NumPy's numbers made Python's; json refuses all of these."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else None
    return value


def _cell(value: str | int | float | None) -> str | int | float:
    if value is None:
        return ""
    if isinstance(value, str):
        return _spreadsheet(value)
    # An int may be too large for isfinite, which makes a float of it.
    return value if isinstance(value, int) or math.isfinite(value) else ""


def _spreadsheet(text: str) -> str:
    # Format characters stay, since Persian and emoji need joiners; line and paragraph separators split a row, and a
    # lone surrogate can't be written as UTF-8.
    safe = "".join(
        _escape(character) if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") else character
        for character in text
    )
    # Some spreadsheets drop leading space, so it does not count; a leading tab or return is itself a trigger.
    formula = text.lstrip().startswith(FORMULA_STARTS) or text.startswith(("\t", "\r"))
    return f"'{safe}" if formula else safe
