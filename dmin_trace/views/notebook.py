"""What a notebook shows of a trace, an answer, a hit, totals and an audit: the parts of the pages, without scripts.

Colours follow the notebook's own, and what has removed the style, such as a viewer of notebooks, still shows pictures,
lists and tables.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dmin_trace.views.cards import Card, hit_cards
from dmin_trace.views.describe import describe_store
from dmin_trace.views.page import answer_sections, asset, audit_sections, environment, group_table
from dmin_trace.views.pictures import picture_of

if TYPE_CHECKING:
    from dmin_trace.audit import Audit
    from dmin_trace.query import Hit, TopK, Totals, Trace

MAX_QUERIES, MAX_HITS, MAX_FINDINGS, MAX_PICTURES = 3, 12, 6, 8
FACTS = ("samples", "timesteps", "compressed", "the store", "columns", "weights are", "script", "id")
"""Of what `dmin-trace info` shows."""


def answer_html(top: "TopK") -> str:
    """The first queries of an answer, with their first hits."""
    sections = answer_sections(top, queries=MAX_QUERIES)
    left = [section.lists[0].cards[:MAX_HITS] for section in sections]
    more = len(top) - len(sections)
    words = f"{more:,} more {'query' if more == 1 else 'queries'}. All of them: top.to_html(path)." if more else ""
    return _show("answer.html", {"sections": list(zip(sections, left, strict=True)), "more": words})


def hit_html(hit: "Hit") -> str:
    """One hit as a card."""
    return _show("hit.html", {"card": hit_cards([hit], "")[0]})


def totals_html(totals: "Totals") -> str:
    """The tables of the first queries."""
    tables = [
        (totals.names[n], totals.backgrounds[n].verdict, group_table(totals, n))
        for n in range(min(len(totals), MAX_QUERIES))
    ]
    return _show("totals.html", {"tables": tables})


def audit_html(audit: "Audit") -> str:
    """The first findings of each list."""
    summary = f"{audit.samples:,} samples were audited; {len(audit.findings):,} findings."
    sections = [(section, section.lists[0].cards) for section in audit_sections(audit, MAX_FINDINGS)]
    return _show("audit.html", {"sections": sections, "notes": [summary, *audit.notes]})


def trace_html(trace: "Trace") -> str:
    """What a trace holds, and the pictures of its first samples."""
    if repr(trace) == "Trace(closed)":
        return _show("trace.html", {"name": repr(trace), "facts": [], "cards": []})
    facts = dict(describe_store(trace.store))
    cards = []
    for sample in range(min(len(trace), MAX_PICTURES)):
        picture = picture_of(trace.thumbnails.webp(sample))
        if picture is not None:
            cards.append(Card(sample=sample, order=sample, title=f"Sample {sample}", picture=picture))
    listed = [(name, facts[name]) for name in FACTS if name in facts]
    return _show("trace.html", {"name": repr(trace), "facts": listed, "cards": cards})


def _show(template: str, content: Mapping[str, object]) -> str:
    style = asset("cards.css") + asset("notebook.css")
    return environment().get_template(template).render({**content, "style": style})
