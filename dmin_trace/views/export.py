"""JSON and CSV for programs.

JSON is strict and keeps the original text, escaped to plain ASCII; a number that is NaN or infinite is null. A document
begins with its "format" and its "version", 1; a reader should refuse any other. Keys are always in the order of the
docstrings. CSV cells are made safe for spreadsheets. docs/exports.md describes all of it for readers.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from typing import TYPE_CHECKING

from dmin_trace.version import EXPORT_VERSION
from dmin_trace.views.describe import describe_score
from dmin_trace.views.text import spreadsheet_safe

if TYPE_CHECKING:
    from dmin_trace.query import Hit, Table, TopK, Totals
    from dmin_trace.search import Background
    from dmin_trace.store import Verified


def hits_json(top: "TopK", trace_facts: Mapping[str, object], totals: "Totals | None" = None) -> str:
    """The hits of all queries as JSON of the format "dmin_trace.hits":

        scored_by   the name of the score, such as "deflated"
        score       what such a score is, in words
        timesteps   [t, ...]
        groups      [[t, ...], ...]
        trace       the facts of the trace, as given
        totals      {by, samples, overlapping, merged, note}; null if no groups were wanted
        queries     [{name, prompt, without, background, hits, groups}, ...]
        background  {samples, scored, median, scale, limit, standing_out, at_least, unknown, largest, verdict}
        hits        [{rank, sample, score, per_timestep, z, stands_out, columns}, ...]
        groups      [{group, samples, share, low, high, expected, mean, z, p, standing_out}, ...]; null without totals

    `without` is the prompt without the concept that the query is for, null if it is for the whole image. `background`
    is as in `dmin_trace.search.Background`, and `verdict` the sentence that says it; `totals` and `groups` are as in
    `dmin_trace.Totals`.
    `per_timestep` has one number for each of `groups`: of one timestep, or of several that are pooled. `columns` are
    those of the store, in its order.
    """
    queries = [
        {
            "name": name,
            "prompt": prompt,
            "without": without,
            "background": _background(background),
            "hits": list(map(_hit, hits)),
            "groups": None if totals is None else [asdict(total) for total in totals.groups[n]],
        }
        for n, (name, prompt, without, background, hits) in enumerate(
            zip(top.names, top.prompts, top.without, top.backgrounds, top.hits, strict=True)
        )
    ]
    meaning = {"scored_by": top.score, "score": describe_score(top.score, top.groups)}
    times = {"timesteps": top.timesteps, "groups": top.groups}
    keys = ("by", "samples", "overlapping", "merged", "note")
    summed = {"totals": None if totals is None else {key: getattr(totals, key) for key in keys}}
    return to_json("hits", {**meaning, **times, "trace": trace_facts, **summed, "queries": queries})


def table_csv(table: "Table") -> str:
    """A table as CSV, one line for each row and one for the names of its columns.

    Control characters in text are escaped, and text that a spreadsheet would take for a formula gets a leading "'". A
    name that is then taken gets "meta_" in front. A missing value, NaN or infinity is an empty cell. Lines end in a
    newline alone.
    """
    # A dict keeps the order in which the names first appear.
    headings: dict[str, None] = {}
    for name in table:
        heading = spreadsheet_safe(name)
        while heading in headings:
            heading = f"meta_{heading}"
        headings[heading] = None
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headings)
    columns = [column.values for column in table.values()]
    writer.writerows([_cell(value) for value in row] for row in zip(*columns, strict=True))
    return out.getvalue()


def measures_json(measures: Sequence[Mapping[str, object]], trace_facts: Mapping[str, object]) -> str:
    """The facts of a trace and the results of its measures, as given, as JSON of the format "dmin_trace.measures"."""
    return to_json("measures", {"trace": trace_facts, "measures": list(measures)})


def verified_json(found: "Verified") -> str:
    """What `verify` found as JSON of the format "dmin_trace.verified":

        whole       whether nothing is damaged
        complete    whether the capture has finished
        chunks, done, files, bytes     how many chunks there are and are done, and how much was compared
        damages     [{file, array, chunk, rows, samples, what}, ...]
        notes       [text, ...]

    `array` and `chunk` are null for a file that is not of a chunk.
    """
    keys = ("file", "array", "chunk", "rows", "samples", "what")
    damages = [{key: getattr(of, key) for key in keys} | {"array": of.array or None} for of in found.damages]
    counts = {name: getattr(found, name) for name in ("complete", "chunks", "done", "files", "bytes")}
    return to_json("verified", {"whole": not damages, **counts, "damages": damages, "notes": found.notes})


def _hit(hit: "Hit") -> dict[str, object]:
    keys = ("rank", "sample", "score", "per_timestep", "z", "stands_out", "columns")
    return {key: getattr(hit, key) for key in keys}


def _background(background: "Background") -> dict[str, object]:
    return {**asdict(background), "verdict": background.verdict}


def to_json(kind: str, content: Mapping[str, object], *, lines: bool = True) -> str:
    """The content as JSON of the format "dmin_trace." and `kind`; on one line, if `lines` is False."""
    document = {"format": f"dmin_trace.{kind}", "version": EXPORT_VERSION, **content}
    # ASCII only, so that the text is safe to show and to pipe, whatever the captions hold.
    return json.dumps(_plain(document), allow_nan=False, ensure_ascii=True, indent=2 if lines else None)


def _plain(value: object) -> object:
    """The value with null for each NaN and infinity, and Python's numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return value


def _cell(value: str | int | float | None) -> str | int | float:
    if isinstance(value, str):
        return spreadsheet_safe(value)
    if isinstance(value, bool):
        return str(value).lower()
    # isfinite makes a float of an int, which may be too large for one.
    return "" if value is None or not (isinstance(value, int) or math.isfinite(value)) else value
