"""Terminal tables: what a person sees, and hostile text stays text."""

from __future__ import annotations

import io
import re
import unicodedata
from dataclasses import replace

import pytest
from answers import ANY_TEXT, KNOWN, answer, hit
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from dmin_trace.query import Hit
from dmin_trace.views.table import BARS, MAX_BARS, facts_table, hits_table, measure_table

SGR = re.compile(r"\x1b\[[0-9;]*m")
TIMESTEPS = tuple(50.0 + 100 * k for k in range(10))
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def table_of(
    hits: list[Hit],
    timesteps: tuple[float, ...],
    *,
    name: str = "fox.png",
    prompt: str | None = "a red fox in the snow",
    score: str = "dmin",
    ascii_only: bool = False,
) -> RenderableType:
    top = answer([hits], timesteps, names=(name,), prompts=(prompt,), score=score)
    return hits_table(top, 0, ascii_only=ascii_only)


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


def rows(table: RenderableType) -> list[list[str]]:
    """The words of each row shown; a line of the caption may begin with a number too, but ends without one."""
    return [line.split() for line in render(table, 200).splitlines() if re.fullmatch(r" +\d+ .* \d+ *", line)]


def bars_of(scores: list[tuple[float, ...]]) -> list[str]:
    """The bars that the table really shows, one text a hit."""
    hits = [hit(rank, row) for rank, row in enumerate(scores, 1)]
    table = table_of(hits, tuple(map(float, range(len(scores[0])))))
    return [row[2] for row in rows(table)]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [80, 120])
def test_hits_table_keeps_rank_score_bars_and_sample_on_one_line(width: int, terminal: bool) -> None:
    hits = [hit(k, caption="a long caption " * 20, file_name=f"deep/folder/of/files/{k:08d}.png") for k in range(1, 11)]
    shown = SGR.sub("", render(table_of(hits, TIMESTEPS), width, terminal))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    for one in hits:
        row = re.compile(rf"^ +{one.rank}  +{one.score:.3f}  +[{BARS}·]{{10}}  +{one.sample}  +a long")
        assert sum(bool(row.search(line)) for line in lines) == 1


def test_hits_table_says_what_stands_out() -> None:
    hits = [replace(hit(1), z=12.34, stands_out=True), replace(hit(2), z=-3.21, stands_out=False)]
    shown = render(hits_table(answer([hits], TIMESTEPS, background=KNOWN), 0), 80)
    heading, *lines = [line.split() for line in shown.splitlines() if re.match(r" +[#\d]", line)]
    assert heading[:4] == ["#", "score", "z", "t=50"] and [line[2] for line in lines] == ["12.3*", "-3.2"]
    assert shown.splitlines()[-1].rstrip() == "* 7 of 1,797 samples stand out."
    unknown = render(table_of([hit()], TIMESTEPS))
    assert " z " not in unknown and "How many samples stand out is not known" in unknown


def test_hits_table_names_the_query_and_explains_the_score() -> None:
    shown = " ".join(render(table_of([hit(label=3)], TIMESTEPS), 120).split())
    assert "Most influential training samples for fox.png a red fox in the snow" in shown
    assert (
        "inner product of normalised compressed gradients, summed over 10 timesteps; 10 would be a perfect match"
        in shown
    )
    alone = render(table_of([hit(1, (0.5,))], (500.0,), name="sample 17", prompt=None), 120)
    assert "Most influential training samples for sample 17" in " ".join(alone.split())
    assert "summed over 1 timestep;" in " ".join(alone.split())
    assert "None" not in alone


def test_hits_table_of_deflated_scores() -> None:
    kind = "deflated"
    hits = [hit(1, (0.02, -0.01))]
    shown = " ".join(render(table_of(hits, (50.0, 950.0), score=kind), 120).split())
    assert f"{kind} score: inner product of compressed gradients, the query's without what all samples share" in shown
    assert "summed over 2 timesteps; above 0 helps, below 0 hinders; compare within a query only" in shown
    assert "perfect" not in shown and "0.01000" in shown


def test_hits_table_heading_has_the_first_and_last_timestep_over_their_bars() -> None:
    lines = render(table_of([hit()], TIMESTEPS)).splitlines()
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
        ({"label": 7, "blip_caption": "BLI"}, ["blip_caption", "BLI"], ["label"]),
        ({"Caption": "CAP"}, ["Caption", "CAP"], []),
        ({"caption": None, "label": 7}, ["label"], ["caption"]),
        ({"file_name": "a.png", "breed": "BRE"}, ["breed", "BRE", "file_name", "a.png"], []),
        ({"path": "p.png"}, ["path", "p.png"], []),
        ({"file": "f.png", "file_name": "a.png"}, ["file_name", "a.png"], ["f.png"]),
        ({}, ["sample"], ["caption", "file", "None"]),
    ],
)
def test_hits_table_chooses_a_text_and_a_file_column(
    columns: dict[str, str | int | float | None], shown: list[str], hidden: list[str]
) -> None:
    text = render(table_of([hit(1, None, **columns)], TIMESTEPS), 120)
    assert [word for word in shown if word not in text] == []
    assert [word for word in hidden if word in text] == []


def test_hits_table_keeps_the_end_of_a_long_path() -> None:
    text = render(table_of([hit(file_name="/data/" + "x" * 1000 + "/image_0042.png")], TIMESTEPS))
    assert "/image_0042.png" in text
    assert "/data" not in text


def test_hits_table_without_hits() -> None:
    assert "Most influential training samples for fox.png" in " ".join(render(table_of([], TIMESTEPS)).split())


@given(st.lists(st.lists(st.floats(-2, 2), min_size=5, max_size=5).map(tuple), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_bars_rise_with_their_scores_over_the_whole_table(scores: list[tuple[float, ...]]) -> None:
    drawn = bars_of(scores)
    pairs = sorted(
        (score, bar) for row, bars in zip(scores, drawn, strict=True) for score, bar in zip(row, bars, strict=True)
    )
    assert all((bar == "·") == (score < 0) for score, bar in pairs)
    levels = [("·" + BARS).index(bar) for _, bar in pairs]
    assert levels == sorted(levels)
    if pairs[-1][0] > 0:
        assert pairs[-1][1] == "█"


def test_bars_use_all_heights_on_one_scale() -> None:
    assert bars_of([tuple((k + 0.5) / 8 for k in range(8)) + (1.0,), (0.0,) * 8 + (0.5,)]) == [
        BARS + "█",
        "▁" * 8 + "▅",
    ]


def test_bars_of_nan_infinity_and_tiny_scores() -> None:
    inf, nan = float("inf"), float("nan")
    assert bars_of([(nan, inf, -inf, 1.0, 1e-320)]) == ["?█·█▁"]
    assert bars_of([(5e-324, 0.0)]) == ["█▁"]
    assert bars_of([(-1.0, 0.0)]) == ["·▁"]
    assert bars_of([(1e308, 1e308)]) == ["██"]


def test_many_timesteps_are_averaged_into_few_bars() -> None:
    scores = tuple(float(k >= 500) for k in range(1000))
    assert bars_of([scores]) == ["▁" * (MAX_BARS // 2) + "█" * (MAX_BARS // 2)]
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
def test_hits_table_aligns_the_decimals_of_scores(scores: tuple[float, ...], shown: list[str]) -> None:
    hits = [Hit(rank=k, sample=k, score=score, per_timestep=(0.1,), columns={}) for k, score in enumerate(scores, 1)]
    assert [row[1] for row in rows(table_of(hits, (1.0,)))] == shown


def tables(text: str) -> list[RenderableType]:
    hits = [
        hit(1, None, caption=text, file_name=text),
        hit(2, None, **{"caption": "two", "file_name": "b.png", text: text}),
    ]
    other = Hit(rank=1, sample=1, score=1.0, per_timestep=(0.1,) * 10, columns={text: text})
    return [
        table_of(hits, TIMESTEPS, name=text, prompt=text),
        table_of([other], TIMESTEPS),
        facts_table([(text, text)], text),
    ]


def test_tables_have_colour_in_a_terminal_only() -> None:
    table = table_of([hit()], TIMESTEPS)
    assert SGR.search(render(table, terminal=True))
    assert "\x1b" not in render(table, terminal=False)


@given(ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_tables_of_any_text_do_not_control_a_terminal(text: str) -> None:
    for table in tables(text):
        piped = render(table, terminal=False)
        assert {unicodedata.category(c) for c in piped} & UNSAFE == {"Cc"}
        assert {c for c in piped if unicodedata.category(c) == "Cc"} == {"\n"}
        assert SGR.sub("", render(table, terminal=True)) == piped


@pytest.mark.parametrize("text", ["[bold red]x[/]", "[link=http://x]y[/link]", "[/]", ":smile:", "[@click=f]z"])
def test_tables_show_markup_as_it_is_written(text: str) -> None:
    for table in tables(text):
        assert text in render(table, 200)
        shown = render(table, 200, terminal=True)
        assert "\x1b]8" not in shown
        assert text in SGR.sub("", shown)


def test_tables_with_ascii_only() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80, force_terminal=True, _environ={})
    ascii_only = console.options.ascii_only
    assert ascii_only
    hits = [hit(1, (1.0, 0.0, -1.0), caption="café " * 40, file_name="x" * 50 + "狐.png")]
    console.print(table_of(hits, (1.0, 2.0, 3.0), name="狐.png", prompt="é", ascii_only=ascii_only))
    console.print(facts_table([("wo", "狐")], "où", ascii_only=ascii_only))
    console.file.flush()
    shown = SGR.sub("", raw.getvalue().decode("ascii"))
    assert " 81- " in shown
    assert "caf\\xe9" in shown
    assert "..." in shown


def test_facts_table_shows_long_values_whole() -> None:
    shown = render(facts_table([("samples", "60,000"), ("fingerprint", "0123456789" * 20)], "/data/trace.zarr"))
    assert shown.splitlines()[0].strip() == "/data/trace.zarr"
    assert "60,000" in shown
    assert "0123456789" * 20 in re.sub(r"\s", "", shown)
    assert "…" not in shown


def test_measure_table_shows_what_a_measure_means() -> None:
    words = "Detection rate by \x1b[31mlabel", ("k", "rate"), [("5", "0.926"), ("10", "0.856")]
    text = render(measure_table(*words, "What it says [/] and\u202e what it does not. " * 4))
    assert "\x1b" not in text and "\\x1b[31mlabel" in text and "\u202e" not in text
    lines = [line.strip() for line in text.splitlines()]
    assert [line.split() for line in lines if line.startswith(("5", "10"))] == [["5", "0.926"], ["10", "0.856"]]
    # Wide enough to read, however few the figures.
    assert sum("What it says [/]" in line for line in lines) >= 2
    assert render(measure_table(*words, "…", ascii_only=True)).replace("─", "").isascii()


def test_hits_table_has_no_bars_where_there_is_one_row() -> None:
    hits = [hit(1, (0.5,), caption="one"), hit(2, (0.25,), caption="two")]
    table = hits_table(answer([hits], (), groups=(TIMESTEPS,)), 0)
    shown = render(table, 200)
    words = [line.split() for line in shown.splitlines()]
    assert ["1", "0.5000", "50001", "one"] in words and ["2", "0.2500", "50002", "two"] in words
    assert (
        "t=" not in shown
        and "of 10 pooled timesteps" in " ".join(shown.split())
        and not any(bar in shown for bar in BARS)
    )
    assert "t=" not in render(table_of(hits, (500.0,)), 200)


def test_hits_table_has_a_bar_for_each_group_of_pooled_timesteps() -> None:
    groups = (TIMESTEPS[:5], TIMESTEPS[5:])
    shown = render(hits_table(answer([[hit(1, (0.5, 0.25))]], (), groups=groups), 0), 200)
    shown = " ".join(shown.split())
    assert "t=50 950" in shown and " █▅ " in shown and "summed over 2 groups of 10 pooled timesteps" in shown


def test_a_table_says_that_it_is_for_a_concept() -> None:
    def shown(without: str) -> str:
        top = answer([[hit(1)]], TIMESTEPS, without=(without,))
        return render(hits_table(top, 0, ascii_only=True), 200)

    assert "a red fox in the snow\nfor what the prompt has beyond 'a fox'\n" in shown("a fox")
    assert "for what the prompt has beyond an empty prompt\n" in shown("")
    hostile = shown("\x1b[31m[bold]\nfox")
    assert "for what the prompt has beyond '\\x1b[31m[bold]\\nfox'" in hostile
