"""The report room: what a person or a program gets to see of the hits, and that hostile text stays text."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import time
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.table import Table

from dmin_trace.query import Hit
from dmin_trace.search import Score
from dmin_trace.views.describe import QueryLabel
from dmin_trace.views.export import hits_csv, hits_json, measures_json
from dmin_trace.views.table import BARS, MAX_BARS, facts_table, hits_table, measure_table
from dmin_trace.views.text import harmless

SGR = re.compile(r"\x1b\[[0-9;]*m")
TIMESTEPS = tuple(50.0 + 100 * k for k in range(10))
QUERY = QueryLabel(name="fox.png", prompt="a red fox in the snow")
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

# All of Unicode with surrogates, and the characters that matter much more often than chance would have it.
ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from("\x1b\x9b\x07\r\n\t\x7f\u202e\u2066\u200f\u200b\u2028\ufeff\ud800[]/\\=+-@',\"; a1狐"),
    ),
    max_size=120,
)


def hit(rank: int = 1, shares: tuple[float, ...] | None = None, /, **columns: str | int | float | None) -> Hit:
    shares = tuple((1.2 - rank / 10) / (1 + k / 4) for k in range(10)) if shares is None else shares
    return Hit(rank=rank, sample=50_000 + rank, score=sum(shares), per_timestep=shares, columns=columns)


def render(table: RenderableType, width: int = 80, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
        legacy_windows=False,
        _environ={},
    )
    console.print(table)
    return out.getvalue()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def strict(text: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(text, parse_constant=refuse_constant)
    return read


def rows(table: Table) -> list[list[str]]:
    """The words of each row shown; a line of the caption may begin with a number too, but ends without one."""
    return [line.split() for line in render(table, 200).splitlines() if re.fullmatch(r" +\d+ .* \d+ *", line)]


def bars_of(shares: list[tuple[float, ...]]) -> list[str]:
    """The bars that the table really shows, one text a hit."""
    hits = [hit(rank, row) for rank, row in enumerate(shares, 1)]
    table = hits_table(QUERY, hits, tuple(map(float, range(len(shares[0])))))
    return [row[2] for row in rows(table)]


# --- the table of hits


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [80, 120])
def test_a_row_keeps_rank_score_bars_and_sample_on_one_line(width: int, terminal: bool) -> None:
    hits = [hit(k, caption="a long caption " * 20, file_name=f"deep/folder/of/files/{k:08d}.png") for k in range(1, 11)]
    shown = SGR.sub("", render(hits_table(QUERY, hits, TIMESTEPS), width, terminal))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    for one in hits:
        row = re.compile(rf"^ +{one.rank}  +{one.score:.3f}  +[{BARS}·]{{10}}  +{one.sample}  +a long")
        assert sum(bool(row.search(line)) for line in lines) == 1


def test_the_table_says_what_was_asked_and_what_a_score_is() -> None:
    shown = " ".join(render(hits_table(QUERY, [hit(label=3)], TIMESTEPS), 120).split())
    assert "Most influential training samples for fox.png a red fox in the snow" in shown
    assert (
        "inner product of normalised compressed gradients, summed over 10 timesteps; 10 would be a perfect match"
        in shown
    )
    alone = render(hits_table(QueryLabel(name="sample 17", prompt=None), [hit(1, (0.5,))], (500.0,)), 120)
    assert "Most influential training samples for sample 17" in alone
    assert "summed over 1 timestep;" in " ".join(alone.split())
    assert "None" not in alone


def test_a_score_without_a_largest_value_claims_none() -> None:
    kind: Score = "deflated"
    hits = [hit(1, (0.02, -0.01))]
    shown = " ".join(render(hits_table(QUERY, hits, (50.0, 950.0), score=kind), 120).split())
    assert f"{kind} score: inner product of compressed gradients, the query's without what all samples share" in shown
    assert "summed over 2 timesteps; above 0 helps, below 0 hinders; compare within a query only" in shown
    assert "perfect" not in shown and "0.01000" in shown
    read = strict(hits_json([QUERY], [hits], (50.0, 950.0), {}, score=kind))
    assert read["scored_by"] == kind and read["score"].startswith(f"{kind} score")
    heading, row = read_csv(hits_csv([QUERY], [hits], (50.0, 950.0), score=kind))
    assert dict(zip(heading, row, strict=True))["scored_by"] == kind


def test_the_heading_puts_the_first_and_last_timestep_over_their_bars() -> None:
    lines = render(hits_table(QUERY, [hit()], TIMESTEPS)).splitlines()
    heading = next(line for line in lines if "score" in line)
    row = next(line for line in lines if "50001" in line)
    bars = re.search(f"[{BARS}]+", row)
    assert bars is not None
    assert heading[bars.start() : bars.end()] == "t=50   950"


@pytest.mark.parametrize(
    ("columns", "shown", "hidden"),
    [
        ({"label": 7, "caption": "CAP"}, ["caption", "CAP"], ["label"]),
        ({"prompt": "PRO", "text": "TEX"}, ["text", "TEX"], ["PRO"]),
        ({"class": "CLA", "label": 7}, ["label", "7"], ["CLA"]),
        ({"Caption": "CAP"}, ["Caption", "CAP"], []),
        ({"caption": None, "label": 7}, ["label"], ["caption"]),
        ({"file_name": "a.png", "breed": "BRE"}, ["breed", "BRE", "file_name", "a.png"], []),
        ({"path": "p.png"}, ["path", "p.png"], []),
        ({"file": "f.png", "file_name": "a.png"}, ["file_name", "a.png"], ["f.png"]),
        ({}, ["sample"], ["caption", "file", "None"]),
    ],
)
def test_which_text_and_file_column_is_shown(
    columns: dict[str, str | int | float | None], shown: list[str], hidden: list[str]
) -> None:
    text = render(hits_table(QUERY, [hit(1, None, **columns)], TIMESTEPS), 120)
    assert [word for word in shown if word not in text] == []
    assert [word for word in hidden if word in text] == []


def test_a_long_path_keeps_its_end() -> None:
    text = render(hits_table(QUERY, [hit(file_name="/data/" + "x" * 1000 + "/image_0042.png")], TIMESTEPS))
    assert "/image_0042.png" in text
    assert "/data" not in text


def test_no_hits_is_a_table_still() -> None:
    assert "Most influential training samples for fox.png" in render(hits_table(QUERY, [], TIMESTEPS))


# --- the bars


@given(st.lists(st.lists(st.floats(-2, 2), min_size=5, max_size=5).map(tuple), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_bars_rise_with_their_shares_over_the_whole_table(shares: list[tuple[float, ...]]) -> None:
    drawn = bars_of(shares)
    pairs = sorted(
        (share, bar) for row, bars in zip(shares, drawn, strict=True) for share, bar in zip(row, bars, strict=True)
    )
    assert all((bar == "·") == (share < 0) for share, bar in pairs)
    levels = [("·" + BARS).index(bar) for _, bar in pairs]
    assert levels == sorted(levels)
    if pairs[-1][0] > 0:
        assert pairs[-1][1] == "█"


def test_bars_use_all_heights_on_one_scale() -> None:
    assert bars_of([tuple((k + 0.5) / 8 for k in range(8)) + (1.0,), (0.0,) * 8 + (0.5,)]) == [
        BARS + "█",
        "▁" * 8 + "▅",
    ]


def test_odd_shares_are_drawn_and_break_nothing() -> None:
    inf, nan = float("inf"), float("nan")
    assert bars_of([(nan, inf, -inf, 1.0, 1e-320)]) == ["?█·█▁"]
    assert bars_of([(5e-324, 0.0)]) == ["█▁"]
    assert bars_of([(-1.0, 0.0)]) == ["·▁"]
    assert bars_of([(1e308, 1e308)]) == ["██"]


def test_many_timesteps_are_averaged_into_few_bars() -> None:
    shares = tuple(float(k >= 500) for k in range(1000))
    assert bars_of([shares]) == ["▁" * (MAX_BARS // 2) + "█" * (MAX_BARS // 2)]
    exact = tuple(float(k == 0) for k in range(MAX_BARS))
    assert bars_of([exact]) == ["█" + "▁" * (MAX_BARS - 1)]


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ((9.876543, 0.5), ["9.877", "0.500"]),
        ((0.012345, -0.0004), ["0.01235", "-0.00040"]),
        ((812.34567,), ["812.35"]),
        ((1e300, 1.0), ["1.000e+300", "1.000e+00"]),
        ((1e-9,), ["1.000e-09"]),
        ((float("nan"), 1.0), ["nan", "1.000"]),
        ((0.0,), ["0.00"]),
    ],
)
def test_scores_per_timestep_heir_decimals(scores: tuple[float, ...], shown: list[str]) -> None:
    hits = [Hit(rank=k, sample=k, score=score, per_timestep=(0.1,), columns={}) for k, score in enumerate(scores, 1)]
    assert [row[1] for row in rows(hits_table(QUERY, hits, (1.0,)))] == shown


# --- hostile text


@given(ANY_TEXT, st.integers(1, 150))
def test_harmless_leaves_nothing_that_acts_or_hides(text: str, limit: int) -> None:
    safe = harmless(text, limit)
    assert len(safe) <= limit
    assert {unicodedata.category(character) for character in safe} & UNSAFE == set()
    assert safe.isprintable()
    safe.encode()
    assert harmless(safe, limit) == safe


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain text, [brackets] and \\ too", "plain text, [brackets] and \\ too"),
        ("café 狐 🦊 e\u0301", "café 狐 🦊 e\u0301"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x1b]8;;http://x\x07", "\\x1b]8;;http://x\\x07"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\u202egnp\u2066\u200f", "\\u202egnp\\u2066\\u200f"),
        ("\u200b\ufeff\u2060\u00ad", "\\u200b\\ufeff\\u2060\\xad"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("\u3164\ufe0f", "\\u3164\\ufe0f"),
        ("a\xa0b\u3000c", "a b c"),
    ],
)
def test_harmless_by_example(text: str, safe: str) -> None:
    assert harmless(text) == safe


def test_harmless_cuts_before_it_works() -> None:
    assert harmless("x" * 200) == "x" * 200
    assert harmless("x" * 201) == "x" * 199 + "…"
    assert harmless("\x00" * 60) == ("\\x00" * 60)[:199] + "…"
    begin = time.perf_counter()
    for _ in range(5):
        harmless("\x1b狐" * 500_000)
    per_call = (time.perf_counter() - begin) / 5
    # To look at every one of the million characters takes a tenth of a second or more.
    assert per_call < 0.02


def tables(text: str) -> list[Table]:
    hits = [
        hit(1, None, caption=text, file_name=text),
        hit(2, None, **{"caption": "two", "file_name": "b.png", text: text}),
    ]
    other = Hit(rank=1, sample=1, score=1.0, per_timestep=(0.1,) * 10, columns={text: text})
    return [
        hits_table(QueryLabel(name=text, prompt=text), hits, TIMESTEPS),
        hits_table(QUERY, [other], TIMESTEPS),
        facts_table([(text, text)], text),
    ]


def test_a_terminal_gets_colour_and_a_pipe_none() -> None:
    table = hits_table(QUERY, [hit()], TIMESTEPS)
    assert SGR.search(render(table, terminal=True))
    assert "\x1b" not in render(table, terminal=False)


@given(ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_no_text_reaches_a_terminal_as_a_command(text: str) -> None:
    for table in tables(text):
        piped = render(table, terminal=False)
        assert {unicodedata.category(c) for c in piped} & UNSAFE == {"Cc"}
        assert {c for c in piped if unicodedata.category(c) == "Cc"} == {"\n"}
        assert SGR.sub("", render(table, terminal=True)) == piped


@pytest.mark.parametrize("text", ["[bold red]x[/]", "[link=http://x]y[/link]", "[/]", ":smile:", "[@click=f]z"])
def test_markup_is_shown_as_it_is_written(text: str) -> None:
    for table in tables(text):
        assert text in render(table, 200)
        shown = render(table, 200, terminal=True)
        assert "\x1b]8" not in shown
        assert text in SGR.sub("", shown)


def test_a_terminal_without_unicode_gets_ascii_alone() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80, force_terminal=True, _environ={})
    ascii_only = console.options.ascii_only
    assert ascii_only
    hits = [hit(1, (1.0, 0.0, -1.0), caption="café " * 40, file_name="x" * 50 + "狐.png")]
    console.print(hits_table(QueryLabel(name="狐.png", prompt="é"), hits, (1.0, 2.0, 3.0), ascii_only=ascii_only))
    console.print(facts_table([("wo", "狐")], "où", ascii_only=ascii_only))
    console.file.flush()
    shown = SGR.sub("", raw.getvalue().decode("ascii"))
    assert " 81- " in shown
    assert "caf\\xe9" in shown
    assert "..." in shown


# --- the table of facts


def test_facts_are_shown_whole() -> None:
    shown = render(facts_table([("samples", "60,000"), ("fingerprint", "0123456789" * 20)], "/data/trace.zarr"))
    assert shown.splitlines()[0].strip() == "/data/trace.zarr"
    assert "60,000" in shown
    assert "0123456789" * 20 in re.sub(r"\s", "", shown)
    assert "…" not in shown


# --- JSON


def test_json_has_the_documented_shape_and_the_original_text() -> None:
    text = 'a "fox"\n\x1b[31m\x7f\x9b\u202e狐\ud800'
    hits = [[hit(1, (0.5, 0.25), caption=text, label=3)], []]
    questions = [QUERY, QueryLabel(name="sample 17", prompt=None)]
    written = hits_json(questions, hits, (50.0, 950.0), {"id": "abc", "dimension": 16384, "parts": (1, None, True)})
    assert all(" " <= character <= "~" or character == "\n" for character in written)
    read = strict(written)
    assert list(read) == ["format", "version", "scored_by", "score", "timesteps", "trace", "queries"]
    assert read["format"] == "dmin_trace.hits"
    assert read["version"] == 1
    assert read["scored_by"] == "dmin"
    assert read["timesteps"] == [50.0, 950.0]
    assert read["trace"] == {"id": "abc", "dimension": 16384, "parts": [1, None, True]}
    cause = {
        "rank": 1,
        "sample": 50_001,
        "score": 0.75,
        "per_timestep": [0.5, 0.25],
        "columns": {"caption": text, "label": 3},
    }
    assert read["queries"] == [
        {"name": "fox.png", "prompt": "a red fox in the snow", "hits": [cause]},
        {"name": "sample 17", "prompt": None, "hits": []},
    ]
    assert list(read["queries"][0]["hits"][0]) == ["rank", "sample", "score", "per_timestep", "columns"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_number_that_json_has_not_is_null(bad: float) -> None:
    one = Hit(rank=1, sample=2, score=bad, per_timestep=(bad, 1.0), columns={"depth": bad})
    read = strict(hits_json([QUERY], [[one]], (1.0, bad), {"loss": bad, "deep": {"er": [bad]}}))
    assert read["queries"][0]["hits"][0] == {
        "rank": 1,
        "sample": 2,
        "score": None,
        "per_timestep": [None, 1.0],
        "columns": {"depth": None},
    }
    assert read["trace"] == {"loss": None, "deep": {"er": [None]}}
    assert read["timesteps"] == [1.0, None]


def test_json_takes_numpy_numbers() -> None:
    # What a careless caller gives, whatever the annotations say.
    number: Any = np.float32(0.5)
    whole: Any = np.int64(3)
    one = Hit(rank=1, sample=whole, score=number, per_timestep=(number,), columns={"n": whole})
    read = strict(hits_json([QUERY], [[one]], (1.0,), {"samples": np.int64(9)}))
    assert read["trace"] == {"samples": 9}
    assert read["queries"][0]["hits"][0]["score"] == 0.5
    assert read["queries"][0]["hits"][0]["columns"] == {"n": 3}


# --- CSV


def read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_csv_has_one_row_a_hit_and_one_column_a_value() -> None:
    hits = [
        [hit(1, (0.5, -0.25), caption='red, "fox"; quick'), hit(2, (0.25, float("nan")), label=7)],
        [hit(1, (1e-9, 1.0), caption=None)],
    ]
    questions = [QUERY, QueryLabel(name="sample 17", prompt=None)]
    written = hits_csv(questions, hits, (50.0, 950.5))
    assert "\r" not in written
    assert read_csv(written) == [
        [
            "query",
            "prompt",
            "rank",
            "sample",
            "score",
            "scored_by",
            "caption",
            "label",
            "per_timestep_50",
            "per_timestep_950.5",
        ],
        ["fox.png", "a red fox in the snow", "1", "50001", "0.25", "dmin", 'red, "fox"; quick', "", "0.5", "-0.25"],
        ["fox.png", "a red fox in the snow", "2", "50002", "", "dmin", "", "7", "0.25", ""],
        ["sample 17", "", "1", "50001", "1.000000001", "dmin", "", "", "1e-09", "1.0"],
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1"])
def test_csv_text_is_never_a_formula(text: str) -> None:
    one = hit(1, (-0.5,), caption=text, **{text: "x"}, number=-3)
    heading, row = read_csv(hits_csv([QueryLabel(name=text, prompt=text)], [[one]], (1.0,)))
    guarded = "'" + text.replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n")
    assert row[:2] == [guarded, guarded]
    assert row[6] == guarded
    assert heading[7] == guarded
    # Numbers are no text: a minus sign stays.
    assert row[4] == row[-1] == "-0.5"
    assert row[8] == "-3"


def test_csv_columns_never_share_a_name() -> None:
    one = hit(1, (0.5,), prompt="mine", meta_prompt="too", per_timestep_1="odd")
    heading, row = read_csv(hits_csv([QUERY], [[one]], (1.0,)))
    assert len(set(heading)) == len(heading)
    assert dict(zip(heading, row, strict=True)) == {
        "query": "fox.png",
        "prompt": "a red fox in the snow",
        "rank": "1",
        "sample": "50001",
        "score": "0.5",
        "scored_by": "dmin",
        "meta_prompt": "mine",
        "meta_meta_prompt": "too",
        "meta_per_timestep_1": "odd",
        "per_timestep_1": "0.5",
    }


@given(ANY_TEXT)
@settings(max_examples=50)
def test_csv_of_any_text_is_read_back(text: str) -> None:
    one = hit(1, None, **{"caption": text, text: "x"})
    written = hits_csv([QueryLabel(name=text, prompt=text)], [[one]], TIMESTEPS)
    written.encode()
    heading, row = read_csv(written)
    assert len(heading) == len(row)
    assert {c for c in written if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}} == {"\n"}
    assert written.count("\n") == 2
    assert row[0] == row[1]
    if text.isprintable() and not text.lstrip().startswith(tuple("=+-@＝＋－＠")):
        assert row[0] == text


def test_lists_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        hits_json([QUERY], [], TIMESTEPS, {})
    with pytest.raises(ValueError, match="3 shares for 10 timesteps"):
        hits_csv([QUERY], [[hit(1, (1.0, 2.0, 3.0))]], TIMESTEPS)


def test_a_hit_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        hit().rank = 2  # type: ignore[misc]


def test_a_measure_is_shown_with_what_it_means_and_harms_nothing() -> None:
    words = "Detection rate by \x1b[31mlabel", ("k", "rate"), [("5", "0.926"), ("10", "0.856")]
    text = render(measure_table(*words, "What it says [/] and\u202e what it does not. " * 4))
    assert "\x1b" not in text and "\\x1b[31mlabel" in text and "\u202e" not in text
    lines = [line.strip() for line in text.splitlines()]
    assert [line.split() for line in lines if line.startswith(("5", "10"))] == [["5", "0.926"], ["10", "0.856"]]
    # Wide enough to read, however few the figures.
    assert sum("What it says [/]" in line for line in lines) >= 2
    assert render(measure_table(*words, "…", ascii_only=True)).replace("─", "").isascii()


def test_measures_are_strict_json() -> None:
    text = measures_json([{"measure": "x", "low": float("nan"), "each": [np.float64(0.5), float("inf")]}], {"id": "é"})
    assert text.isascii()
    assert json.loads(text) == {
        "format": "dmin_trace.measures",
        "version": 1,
        "trace": {"id": "é"},
        "measures": [{"measure": "x", "low": None, "each": [0.5, None]}],
    }
