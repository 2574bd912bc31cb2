"""The table of totals: what a person sees, and hostile names stay text."""

from __future__ import annotations

import io
import unicodedata

import pytest
from answers import ANY_TEXT, KNOWN, RECORD
from hypothesis import given, settings
from rich.console import Console

from dmin_trace.query import GroupTotal, Totals
from dmin_trace.views import totals_table


def total(group: str | None, share: float | None = 0.25, samples: int = 10) -> GroupTotal:
    return GroupTotal(
        group=group,
        samples=samples,
        share=share,
        low=None if share is None else share / 2,
        high=None if share is None else min(2 * share, 1),
        expected=samples / 200,
        mean=0.5,
        z=1.25,
        p=0.00001,
        standing_out=3,
    )


def shown(groups: list[GroupTotal], by: str = "artist", name: str = "fox.png", note: str = "") -> str:
    totals = Totals(by, [groups], (name,), (None,), (None,), 200, 4, None, "deflated", (KNOWN,), note, (None,), RECORD)
    console = Console(file=io.StringIO(), width=80, force_terminal=False, _environ={})
    console.print(totals_table(totals, 0))
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


def test_a_table_has_the_first_groups_and_the_rest() -> None:
    groups = [total(f"artist {n}", 0.5 / (n + 1)) for n in range(20)] + [total(None, 0.125, 7)]
    text = shown(groups, note="2 of 9 files with a group are no files of the trace.")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Influence by artist on fox.png" in lines
    assert "artist 0 10 50.0% 25% to 100% 5.0% 1.2 <0.0001 3" in lines
    assert "artist 11 10 4.2% 2% to 8% 5.0% 1.2 <0.0001 3" in lines and "artist 12" not in text
    others = sum(0.5 / (n + 1) for n in range(12, 20))
    assert f"8 other groups 80 {others:.1%} 40.0% 24" in lines
    assert "(of no group) 7 12.5% 6% to 25% 3.5% 1.2 <0.0001 3" in lines
    whole = " ".join(lines)
    assert "4 samples are in several groups and count in each" in whole and whole.rstrip().endswith("of the trace.")
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_not_known_is_empty() -> None:
    lines = [" ".join(line.split()) for line in shown([total("Ann", None)]).splitlines()]
    assert "Ann 10 5.0% 1.2 <0.0001 3" in lines


@given(ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_any_names_do_not_control_a_terminal(text: str) -> None:
    written = shown([total(text or "x")], by=text, name=text, note=text)
    assert {c for c in written if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\n"}


@pytest.mark.parametrize("text", ["[bold red]x[/]", "[/]", ":smile:"])
def test_markup_is_shown_as_it_is_written(text: str) -> None:
    assert shown([total(text)], by=text, name=text).count(text) == 3
