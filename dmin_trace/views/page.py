"""An answer or an audit as one HTML page, which needs nothing else: no file beside it, and no request to anywhere.

Texts in it may come from anybody. Each text is made `harmless` and escaped when a template puts it out, whatever the
template says; what is no text (data URIs, the style and the script) is marked there by `safe`. The page's own policy
lets a browser run the one script and the one style of the page, by their hashes, and show pictures in data URIs.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from dmin_trace.errors import QueryError
from dmin_trace.version import VERSION
from dmin_trace.views.audit_table import TITLES
from dmin_trace.views.cards import Card, hit_cards, hits_scale, texts_of
from dmin_trace.views.describe import describe_concept, describe_score
from dmin_trace.views.pictures import Picture, picture_of
from dmin_trace.views.table import FILE_COLUMNS, TEXT_COLUMNS, choose_column
from dmin_trace.views.text import harmless
from dmin_trace.views.totals_table import HEADINGS, describe_totals, shown_groups

if TYPE_CHECKING:
    from jinja2 import Environment

    from dmin_trace.audit import Audit
    from dmin_trace.query import Record, TopK, Totals
    from dmin_trace.search import Background

MAX_TEXT = 4000
MIDDLE_HALF = 0.674
"""Of a normal distribution, half lies within so many deviations of the median."""
MAX_SORTED_STEPS = 20
BARS = "A bar is the share, the line its 95 % interval, and the mark what as many random samples have."
EVIDENCE = "A score is evidence of influence, and no proof: only training again without a sample proves that."


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Where the hits of a query lie on the axis of z, in thousandths of its width."""

    low: str
    high: str
    middle: tuple[str, str]
    limit: str | None
    beyond: str
    standing: tuple[str, ...]
    others: tuple[str, ...]
    against: tuple[str, ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A row of a table of groups; the bar and its marks are in hundredths of its width, None where not known."""

    name: str
    cells: tuple[str, ...]
    bar: str | None
    low: str | None
    high: str | None
    chance: str
    quiet: bool


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """What groups have of the influence on a query."""

    by: str
    headings: tuple[str, ...]
    rows: tuple[GroupRow, ...]
    meaning: str


@dataclass(frozen=True, kw_only=True)
class CardList:
    """Cards below a heading."""

    title: str
    meaning: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A query, or a list of an audit."""

    id: str
    name: str
    picture: Picture | None = None
    prompt: str | None = None
    concept: str = ""
    verdict: str = ""
    strip: Strip | None = None
    lists: tuple[CardList, ...] = ()
    totals: GroupTable | None = None

    @property
    def short_name(self) -> str:
        return harmless(self.name, 24)


def answer_page(top: "TopK", lowest: "TopK | None" = None, totals: "Totals | None" = None) -> str:
    """The page of an answer: each query with its hits; with those of `lowest`, which speak against it; and with the
    totals of groups.

    Raises QueryError if `lowest` or `totals` is of other queries, of another trace or by another score, or `lowest` has
    the largest scores.
    """
    for what, other in (("lowest", lowest), ("totals", totals)):
        if other is not None and _asked(other) != _asked(top):
            raise QueryError(f"{what} is not of the queries and the score of the answer. Make both with the same ones.")
    if lowest is not None and _is_largest(lowest):
        raise QueryError("lowest has the largest scores. Make it with top_k(..., largest=False).")
    sections = answer_sections(top, lowest, totals)
    count = "1 query" if len(top) == 1 else f"{len(top):,} queries"
    k = top.samples.shape[1]
    steps = top.group_names if 1 < len(top.groups) <= MAX_SORTED_STEPS else []
    facts = [("found by", top.answered_by.description), ("k", f"{k:,}")]
    if top.deflation:
        facts.append(("taken out", top.deflation))
    return _page(
        title="Most influential training samples" if _is_largest(top) else "Most negative training samples",
        about=top.names[0] if len(top) == 1 else count,
        summary=f"{count}, {k:,} samples each of {top.record.samples:,}, by the {top.score} score.",
        sections=sections,
        navigation="Queries",
        orders=[("influence", "order"), *((f"influence at {name}", f"value{n}") for n, name in enumerate(steps))],
        notes=[_sentence(describe_score(top.score, top.groups)), _meaning_of_z(top.backgrounds), EVIDENCE],
        record=[("score", top.score), *facts, *record_facts(top.record)],
    )


def totals_page(totals: "Totals") -> str:
    """The page of the totals of groups."""
    count = "1 query" if len(totals) == 1 else f"{len(totals):,} queries"
    sections = [
        Section(
            id=f"query-{n + 1}",
            name=totals.names[n],
            picture=picture_of(totals.pictures[n]),
            prompt=totals.prompts[n],
            concept=_concept(totals.without[n]),
            verdict=totals.backgrounds[n].verdict,
            totals=group_table(totals, n),
        )
        for n in range(len(totals))
    ]
    return _page(
        title=f"Influence by {totals.by}",
        about=totals.names[0] if len(totals) == 1 else count,
        summary=f"{count}, {totals.samples:,} samples, by the {totals.score} score.",
        sections=sections,
        navigation="Queries",
        orders=[],
        notes=[EVIDENCE],
        record=[("score", totals.score), *record_facts(totals.record)],
    )


def audit_page(audit: "Audit", k: int) -> str:
    """The page of an audit, with the first k samples of each list."""
    return _page(
        title="Training samples that a person should look at",
        about="",
        summary=f"{audit.samples:,} samples were audited; {len(audit.findings):,} findings. Nothing was changed.",
        sections=audit_sections(audit, k),
        navigation="Lists",
        orders=[("strength", "order")],
        notes=list(audit.notes),
        record=[("labels", audit.column or "none"), *record_facts(audit.record)],
    )


def answer_sections(
    top: "TopK", lowest: "TopK | None" = None, totals: "Totals | None" = None, queries: int | None = None
) -> list[Section]:
    """A section for each of the first queries."""
    steps = top.group_names if len(top.groups) > 1 else []
    sections = []
    for n, name in enumerate(top.names[:queries]):
        hits, against = top.hits[n], [] if lowest is None else lowest.hits[n]
        scale = hits_scale([*hits, *against])
        lists = [CardList(title="", meaning="", cards=tuple(hit_cards(hits, name, steps, scale)))]
        if against:
            lists = [
                CardList(title="Most influential", meaning="", cards=lists[0].cards),
                CardList(title="Most against it", meaning="", cards=tuple(hit_cards(against, name, steps, scale))),
            ]
        sections.append(
            Section(
                id=f"query-{n + 1}",
                name=name,
                picture=picture_of(top.pictures[n]),
                prompt=top.prompts[n],
                concept=_concept(top.without[n]),
                verdict=top.backgrounds[n].verdict,
                strip=strip_of(top, lowest, n),
                lists=tuple(lists),
                totals=None if totals is None else group_table(totals, n),
            )
        )
    return sections


def audit_sections(audit: "Audit", k: int) -> list[Section]:
    """A section for each list of an audit that is not empty, of its first k samples."""
    sections = []
    for number, (kind, (title, measure, meaning)) in enumerate(TITLES.items()):
        found = [finding for finding in audit.findings if finding.kind == kind]
        if not found:
            continue
        shown = found[:k]
        caption, file = choose_column(shown, TEXT_COLUMNS, FILE_COLUMNS), choose_column(shown, FILE_COLUMNS, None)
        # What is true of all of them is said once, above.
        differ = len({one.why for one in shown}) > 1
        cards = []
        for order, one in enumerate(shown):
            z = () if one.z is None else (("z", f"{one.z:.1f}"),)
            twin = None
            if one.of is not None:
                twin = Card(
                    sample=one.of,
                    order=0,
                    title=f"Sample {one.of:,}",
                    picture=picture_of(audit.pictures.webp(one.of)),
                )
            cards.append(
                Card(
                    sample=one.sample,
                    order=order,
                    title=f"Sample {one.sample:,}",
                    figures=((measure, "not known" if one.value is None else f"{one.value:.2f}"), *z),
                    picture=picture_of(audit.pictures.webp(one.sample)),
                    why=harmless(one.why, MAX_TEXT) if differ or twin is not None else "",
                    of=title,
                    twin=twin,
                    texts=texts_of(one.columns, caption, file),
                )
            )
        count = f"{len(found):,} {'sample' if len(found) == 1 else 'samples'}"
        more = f", the first {k:,} of them" if len(found) > k else ""
        sections.append(
            Section(
                id=f"list-{number + 1}",
                name=title,
                verdict=f"{count}{more}.",
                lists=(CardList(title="", meaning=_sentence(meaning), cards=tuple(cards)),),
            )
        )
    return sections


def group_table(totals: "Totals", query: int) -> GroupTable:
    """The groups of a query with the largest shares, the others as one row, and the samples of none."""
    shown = shown_groups(totals, query)
    ends = [end for one in shown for end in (one.share, one.expected, one.high) if end is not None]
    widest = max(ends, default=0.0) or 1.0

    def place(part: float | None) -> str | None:
        return None if part is None else f"{100 * part / widest:.1f}"

    rows = [
        GroupRow(
            name=one.cells[0],
            cells=one.cells[1:],
            bar=place(one.share),
            low=place(one.low),
            high=place(one.high),
            chance=place(one.expected) or "0",
            quiet=not one.named,
        )
        for one in shown
    ]
    return GroupTable(
        by=totals.by, headings=HEADINGS[1:], rows=tuple(rows), meaning=f"{BARS} {_sentence(describe_totals(totals))}"
    )


def strip_of(top: "TopK", lowest: "TopK | None", query: int) -> Strip | None:
    """Where the hits of a query lie on the axis of z; None if that is not known."""
    background = top.backgrounds[query]
    hits = [(hit.z, bool(hit.stands_out)) for hit in top.hits[query] if hit.z is not None]
    against = [hit.z for hit in ([] if lowest is None else lowest.hits[query]) if hit.z is not None]
    if not hits:
        return None
    limit = background.z(background.limit)
    known = [z for z, _ in hits] + against + ([] if limit is None or math.isnan(limit) else [limit])
    low, high = min(*known, -2.0) - 0.5, max(*known, 2.0) + 0.5

    def place(z: float) -> str:
        return f"{1000 * (z - low) / (high - low):.1f}"

    edge = None if limit is None or math.isnan(limit) else place(limit)
    # Samples stand out on the right of the limit, or, of the lowest scores, on the left of it, which is not shaded.
    beyond = "0" if edge is None or limit is None or not background.largest else f"{1000 - float(edge):.1f}"
    standing = [z for z, stands in hits if stands]
    of_z = f"z from {min(z for z, _ in hits):.1f} to {max(z for z, _ in hits):.1f}"
    return Strip(
        low=f"{low:.0f}",
        high=f"{high:.0f}",
        middle=(place(-MIDDLE_HALF), f"{2000 * MIDDLE_HALF / (high - low):.1f}"),
        limit=edge,
        beyond=beyond,
        standing=tuple(map(place, standing)),
        others=tuple(place(z) for z, stands in hits if not stands),
        against=tuple(map(place, against)),
        label=f"The samples shown have {of_z}; {len(standing)} of them stand out.",
    )


def record_facts(record: "Record") -> list[tuple[str, str]]:
    """What an answer was made from, as names and values."""
    settings = ", ".join(f"{name} {value}" for name, value in record.settings.items() if value is not None)
    done = "" if record.searched == record.samples else f"; {record.searched:,} of them were captured by then"
    facts = [
        ("made", f"{record.made:%Y-%m-%d %H:%M:%S} UTC by dmin_trace {record.version}"),
        ("trace", record.trace),
        ("samples", f"{record.samples:,}{done}"),
        ("queries", record.queries),
        ("weights", record.weights),
        ("weights are", record.weights_of),
        ("data set", record.data),
        ("script", f"{record.script} {record.script_sha256}".strip()),
        ("settings", settings),
        ("captured by", ", ".join(f"{name} {version}" for name, version in record.writers.items())),
    ]
    return [(name, value) for name, value in facts if value]


@cache
def environment() -> "Environment":
    """The templates, in which every text is made harmless and escaped, and a name that is not there is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("dmin_trace.views"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def asset(name: str) -> str:
    """A style or a script of the pages."""
    return files("dmin_trace.views").joinpath("templates", name).read_text(encoding="utf-8")


def _page(
    *,
    title: str,
    about: str,
    summary: str,
    sections: Sequence[Section],
    navigation: str,
    orders: Sequence[tuple[str, str]],
    notes: Sequence[str],
    record: Sequence[tuple[str, str]],
) -> str:
    """A page with these sections.

    Args:
        about: what is in the title of the window behind `title`; "" for nothing.
        navigation: what the sections are, in words.
        orders: names and keys by which the script can sort cards, besides those that all cards have.
        notes, record: sentences, and names and values, at the foot of the page.
    """
    listed = [card for section in sections for of in section.lists for card in of.cards]
    more = [("sample number", "sample")]
    more += [("caption", "caption")] if any(card.texts.caption for card in listed) else []
    more += [("file", "file")] if any(card.texts.file for card in listed) else []
    style, script = asset("cards.css") + asset("page.css"), asset("page.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash_source(style)}",
            f"script-src {_hash_source(script)}" if listed else "script-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            about=about,
            summary=summary,
            sections=sections,
            navigation=navigation,
            orders=[*orders, *more],
            notes=[note for note in notes if note],
            record=record,
            has_cards=bool(listed),
            any_stands=any(card.stands_out for card in listed) and not all(card.stands_out for card in listed),
            policy=policy,
            style=style,
            script=script,
            version=VERSION,
        )
    )


def _hash_source(text: str) -> str:
    """The source of a Content-Security-Policy that allows this text inline."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _finalize(value: object) -> object:
    """What a template puts out: a text that is not marked as safe is made harmless, before it is escaped."""
    return harmless(value, MAX_TEXT) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _asked(answer: "TopK | Totals") -> tuple[object, ...]:
    """What an answer is to: two that have the same can stand beside each other."""
    return answer.names, answer.record.trace, answer.record.queries, answer.score


def _is_largest(top: "TopK") -> bool:
    return all(background.largest for background in top.backgrounds)


def _concept(without: str | None) -> str:
    return "" if without is None else describe_concept(without)


def _meaning_of_z(backgrounds: "Sequence[Background]") -> str:
    if all(math.isnan(background.scale) for background in backgrounds):
        return ""
    return (
        "z: the distance of a score from the median of the scores of all samples, in a robust scale. A sample stands "
        "out if its score is beyond what chance explains."
    )


def _sentence(text: str) -> str:
    """A text with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
