"""Training samples as cards of a page or a notebook: what is written below each picture, and what is drawn."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmin_trace.views.pictures import MAX_POINTS, Curve, Picture, Scale, curve_of, picture_of, scale_of
from dmin_trace.views.table import FILE_COLUMNS, TEXT_COLUMNS, align_decimals, average_neighbours, choose_column
from dmin_trace.views.text import harmless

if TYPE_CHECKING:
    from dmin_trace.query import Hit
    from dmin_trace.store import StoredThumbnail

MAX_CAPTION, MAX_VALUE, MAX_COLUMNS, MAX_STEPS = 240, 2000, 16, 60
FILE_END = 40
"""Characters of the end of a file's name, which tells two files apart."""
Columns = Mapping[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a data set says of a sample. All texts are harmless, and "" where there is none.

    caption, file, path: the caption, cut; the file's name, and its path.
    columns: the readable columns of the sample, whole.
    """

    caption: str = ""
    file: str = ""
    path: str = ""
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A training sample. All texts are harmless, and "" where there is none.

    order, rank: its place in the list, from 0, and the rank that is shown; None for a list without ranks.
    figures: names and values; the first is the largest on the card, and its name may be "".
    why, of: why it is in the list; what its rank is for.
    steps, values: the score at each timestep as it is shown, and as it is sorted by.
    twin: the sample that it is alike.
    """

    sample: int
    order: int
    title: str
    figures: tuple[tuple[str, str], ...] = ()
    rank: int | None = None
    stands_out: bool = False
    picture: Picture | None = None
    curve: Curve | None = None
    texts: Texts = Texts()
    why: str = ""
    of: str = ""
    steps: tuple[tuple[str, str], ...] = ()
    values: str = ""
    twin: "Card | None" = None


def hit_cards(hits: "Sequence[Hit]", name: str, steps: Sequence[str] = (), scale: Scale | None = None) -> list[Card]:
    """The hits of the query with this name.

    Args:
        steps: a heading for each timestep, or group of pooled ones; none for a hit of which they are not known.
        scale: of the curves; if not given, that of these hits.
    """
    pictures = read_pictures(hit.stored for hit in hits)
    caption, file = choose_column(hits, TEXT_COLUMNS, FILE_COLUMNS), choose_column(hits, FILE_COLUMNS, None)
    scale = scale or hits_scale(hits)
    values = align_decimals([hit.score for hit in hits])
    cards = []
    for order, (hit, value) in enumerate(zip(hits, values, strict=True)):
        parts = hit.per_timestep if len(hit.per_timestep) > 1 else ()
        z = () if hit.z is None else (("z", f"{hit.z:.1f}"),)
        cards.append(
            Card(
                sample=hit.sample,
                order=order,
                title=f"Sample {hit.sample:,}",
                figures=(("", value), *z),
                rank=hit.rank,
                stands_out=bool(hit.stands_out),
                picture=None if hit.stored is None else pictures[hit.stored.row],
                curve=curve_of(average_neighbours(parts, MAX_POINTS), scale) if parts else None,
                of=harmless(f"Rank {hit.rank} for {name}", MAX_CAPTION),
                steps=tuple(zip(steps, align_decimals(parts), strict=True))[:MAX_STEPS] if steps and parts else (),
                values=" ".join(f"{part:.6g}" for part in parts[:MAX_STEPS]),
                texts=texts_of(hit.columns, caption, file),
            )
        )
    return cards


def hits_scale(hits: "Iterable[Hit]") -> Scale:
    """One scale for the curves of several hits."""
    return scale_of([average_neighbours(hit.per_timestep, MAX_POINTS) for hit in hits if len(hit.per_timestep) > 1])


def texts_of(columns: Columns, caption: str | None, file: str | None) -> Texts:
    """The texts of a sample, by the names of the columns that are its caption and its file."""
    path = _text(columns, file)
    words = _text(columns, caption)
    if words and caption is not None and not reads_as_words(caption):
        words = f"{caption} {words}"
    name = re.split(r"[/\\]", path)[-1] or path
    return Texts(
        caption=harmless(words, MAX_CAPTION),
        file=harmless(name if len(name) <= FILE_END else "…" + name[1 - FILE_END :], FILE_END),
        path=harmless(path, MAX_VALUE),
        columns=tuple(
            (harmless(name, 60), harmless(str(value), MAX_VALUE))
            for name, value in list(columns.items())[:MAX_COLUMNS]
            if value is not None and value != ""
        ),
    )


def reads_as_words(column: str) -> bool:
    """Whether the values of a column are words about a sample, which say what they are; a 7 needs its column's name."""
    name = column.lower()
    return name in ("text", "title", "name", "label_name", "class_name") or "caption" in name or "prompt" in name


def read_pictures(stored: "Iterable[StoredThumbnail | None]") -> dict[int, Picture | None]:
    """The pictures by row, each read once, in the order of the store, which keeps the chunk that it read last."""
    of_rows = {one.row: one for one in stored if one is not None}
    return {row: picture_of(of_rows[row].webp()) for row in sorted(of_rows)}


def _text(columns: Columns, name: str | None) -> str:
    value = None if name is None else columns.get(name)
    return "" if value is None else str(value)
