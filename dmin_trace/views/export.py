"""JSON and CSV for programs.

JSON is strict and keeps the original text, escaped to plain ASCII; a number that is NaN or infinite is null. A document
begins with its "format" and its "version", 1; a reader should refuse any other. Keys are always in the order of the
docstrings. CSV cells are made safe for spreadsheets.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

from dmin_trace.views.describe import describe_score
from dmin_trace.views.text import spreadsheet_safe

if TYPE_CHECKING:
    from dmin_trace.query import Hit, TopK
    from dmin_trace.store import Verified

VERSION = 1  # of each JSON format


def hits_json(top: "TopK", trace_facts: Mapping[str, object]) -> str:
    """The hits of all queries as JSON of the format "dmin_trace.hits":

        scored_by   the name of the score, such as "deflated"
        score       what such a score is, in words
        timesteps   [t, ...]
        groups      [[t, ...], ...]
        trace       the facts of the trace, as given
        queries     [{name, prompt, without, hits: [{rank, sample, score, per_timestep, columns}, ...]}, ...]

    `without` is the prompt without the concept that the query is for, null if it is for the whole image.
    `per_timestep` has one number for each of `groups`: of one timestep, or of several that are pooled. `columns` are
    those of the store, in its order.
    """
    queries = [
        {"name": name, "prompt": prompt, "without": without, "hits": list(map(_hit, hits))}
        for name, prompt, without, hits in zip(top.names, top.prompts, top.without, top.hits, strict=True)
    ]
    meaning = {"scored_by": top.score, "score": describe_score(top.score, top.groups)}
    times = {"timesteps": top.timesteps, "groups": top.groups}
    return _json("hits", {**meaning, **times, "trace": trace_facts, "queries": queries})


def hits_csv(top: "TopK") -> str:
    """The hits of all queries as CSV, one row for each (query, hit).

    Columns: query, prompt, without (as in JSON), rank, sample, score, scored_by (the name of the score), the columns of
    the store, then t<timestep> for each timestep, or t<first>-<last> for each group of pooled ones. A store column
    whose name is taken gets "meta_" before its name. Control characters in text are escaped, and text that a
    spreadsheet would take for a formula gets a leading "'". A missing value, NaN or infinity is an empty cell. Lines
    end in a newline alone.
    """
    fixed = ["query", "prompt", "without", "rank", "sample", "score", "scored_by"]
    per_timestep = top.group_names
    # A dict keeps the order in which the names first appear.
    names = dict.fromkeys(name for hits in top.hits for hit in hits for name in hit.columns)
    taken = {*fixed, *per_timestep}
    headings = []
    for name in names:
        heading = spreadsheet_safe(name)
        while heading in taken:
            heading = f"meta_{heading}"
        taken.add(heading)
        headings.append(heading)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fixed, *headings, *per_timestep])
    for query, prompt, without, hits in zip(top.names, top.prompts, top.without, top.hits, strict=True):
        for hit in hits:
            values = [query, prompt, without, hit.rank, hit.sample, hit.score, top.score]
            values += map(hit.columns.get, names)
            writer.writerow([_cell(value) for value in [*values, *hit.per_timestep]])
    return out.getvalue()


def measures_json(measures: Sequence[Mapping[str, object]], trace_facts: Mapping[str, object]) -> str:
    """The facts of a trace and the results of its measures, as given, as JSON of the format "dmin_trace.measures"."""
    return _json("measures", {"trace": trace_facts, "measures": list(measures)})


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
    return _json("verified", {"whole": not damages, **counts, "damages": damages, "notes": found.notes})


def _hit(hit: "Hit") -> dict[str, object]:
    return {key: getattr(hit, key) for key in ("rank", "sample", "score", "per_timestep", "columns")}


def _json(kind: str, content: Mapping[str, object]) -> str:
    document = {"format": f"dmin_trace.{kind}", "version": VERSION, **content}
    # ASCII only, so that the text is safe to show and to pipe, whatever the captions hold.
    return json.dumps(_plain(document), allow_nan=False, ensure_ascii=True, indent=2)


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
    # isfinite makes a float of an int, which may be too large for one.
    return "" if value is None or not (isinstance(value, int) or math.isfinite(value)) else value
