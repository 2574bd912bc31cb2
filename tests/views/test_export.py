"""JSON and CSV: the documented shape, and hostile text stays text."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from answers import ANY_TEXT, KNOWN, answer, hit
from hypothesis import given, settings

from dmin_trace.query import Hit, TopK
from dmin_trace.views.export import hits_json, measures_json, table_csv

TIMESTEPS = tuple(50.0 + 100 * k for k in range(10))


def hits_csv(top: TopK) -> str:
    return table_csv(top.table)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def strict(text: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(text, parse_constant=refuse_constant)
    return read


def read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_hits_json_has_the_documented_shape_and_the_original_text() -> None:
    text = 'a "fox"\n\x1b[31m\x7f\x9b\u202e狐\ud800'
    hits = [[replace(hit(1, (0.5, 0.25), caption=text, label=3), z=2.5, stands_out=True)], []]
    names, prompts = ("fox.png", "sample 17"), ("a red fox in the snow", None)
    top = answer(hits, (50.0, 950.0), names=names, prompts=prompts, without=(text, None), background=KNOWN)
    written = hits_json(top, {"id": "abc", "dimension": 16384, "parts": (1, None, True)})
    assert all(" " <= character <= "~" or character == "\n" for character in written)
    read = strict(written)
    assert list(read) == [
        "format",
        "version",
        "scored_by",
        "score",
        "timesteps",
        "groups",
        "trace",
        "totals",
        "queries",
    ]
    assert read["format"] == "dmin_trace.hits"
    assert read["version"] == 1
    assert read["scored_by"] == "dmin"
    assert read["timesteps"] == [50.0, 950.0] and read["groups"] == [[50.0], [950.0]]
    assert read["trace"] == {"id": "abc", "dimension": 16384, "parts": [1, None, True]}
    found = {
        "rank": 1,
        "sample": 50_001,
        "score": 0.75,
        "per_timestep": [0.5, 0.25],
        "z": 2.5,
        "stands_out": True,
        "columns": {"caption": text, "label": 3},
    }
    background = {
        "samples": 1797,
        "scored": 1797,
        "median": 0.0,
        "scale": 0.5,
        "limit": 4.0,
        "standing_out": 7,
        "at_least": False,
        "unknown": "",
        "largest": True,
        "verdict": "7 of 1,797 samples stand out.",
    }
    assert read["queries"] == [
        {
            "name": "fox.png",
            "prompt": "a red fox in the snow",
            "without": text,
            "background": background,
            "hits": [found],
            "groups": None,
        },
        {"name": "sample 17", "prompt": None, "without": None, "background": background, "hits": [], "groups": None},
    ]
    assert list(read["queries"][0]) == ["name", "prompt", "without", "background", "hits", "groups"]
    assert list(read["queries"][0]["hits"][0]) == list(found)
    unknown = strict(hits_json(answer([[hit(1)]], TIMESTEPS), {}))["queries"][0]
    assert unknown["background"]["standing_out"] is unknown["background"]["scale"] is unknown["hits"][0]["z"] is None
    assert unknown["background"]["unknown"] == "it takes 30 samples or more to tell influence from noise"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_hits_json_has_null_for_a_number_that_json_lacks(bad: float) -> None:
    one = Hit(rank=1, sample=2, score=bad, per_timestep=(bad, 1.0), columns={"depth": bad})
    read = strict(hits_json(answer([[one]], (1.0, bad)), {"loss": bad, "deep": {"er": [bad]}}))
    assert read["queries"][0]["hits"][0] == {
        "rank": 1,
        "sample": 2,
        "score": None,
        "per_timestep": [None, 1.0],
        "z": None,
        "stands_out": None,
        "columns": {"depth": None},
    }
    assert read["trace"] == {"loss": None, "deep": {"er": [None]}}
    assert read["timesteps"] == [1.0, None]


def test_hits_json_takes_numpy_numbers() -> None:
    # What a careless caller gives, whatever the annotations say.
    number: Any = np.float32(0.5)
    whole: Any = np.int64(3)
    one = Hit(rank=1, sample=whole, score=number, per_timestep=(number,), columns={"n": whole})
    read = strict(hits_json(answer([[one]], (1.0,)), {"samples": np.int64(9)}))
    assert read["trace"] == {"samples": 9}
    assert read["queries"][0]["hits"][0]["score"] == 0.5
    assert read["queries"][0]["hits"][0]["columns"] == {"n": 3}


def test_hits_csv_has_one_row_for_each_hit() -> None:
    hits = [
        [
            replace(hit(1, (0.5, -0.25), caption='red, "fox"; quick'), z=1.25, stands_out=False),
            hit(2, (0.25, float("nan")), label=7),
        ],
        [hit(1, (1e-9, 1.0), caption=None)],
    ]
    names, prompts = ("fox.png", "sample 17"), ("a red fox in the snow", None)
    written = hits_csv(answer(hits, (50.0, 950.5), names=names, prompts=prompts, without=("a fox", None)))
    assert "\r" not in written
    assert read_csv(written) == [
        [
            "query",
            "prompt",
            "without",
            "rank",
            "sample",
            "score",
            "z",
            "stands_out",
            "scored_by",
            "t50",
            "t950.5",
            "caption",
            "label",
        ],
        [
            *("fox.png", "a red fox in the snow", "a fox", "1", "50001", "0.25", "1.25", "false", "dmin"),
            *("0.5", "-0.25", 'red, "fox"; quick', ""),
        ],
        ["fox.png", "a red fox in the snow", "a fox", "2", "50002", "", "", "", "dmin", "0.25", "", "", "7"],
        ["sample 17", "", "", "1", "50001", "1.000000001", "", "", "dmin", "1e-09", "1.0", "", ""],
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1"])
def test_hits_csv_has_no_formula(text: str) -> None:
    one = hit(1, (-0.5,), caption=text, **{text: "x"}, number=-3)
    heading, row = read_csv(hits_csv(answer([[one]], (1.0,), names=(text,), prompts=(text,), without=(text,))))
    guarded = "'" + text.replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n")
    assert row[:3] == [guarded] * 3
    assert row[10] == guarded
    assert heading[11] == guarded
    # Numbers are no text: a minus sign stays.
    assert row[5] == row[9] == "-0.5"
    assert row[12] == "-3"


def test_hits_csv_columns_have_different_names() -> None:
    one = hit(1, (0.5,), prompt="mine", meta_prompt="too", t1="odd")
    heading, row = read_csv(hits_csv(answer([[one]], (1.0,))))
    assert len(set(heading)) == len(heading)
    assert dict(zip(heading, row, strict=True)) == {
        "query": "fox.png",
        "prompt": "a red fox in the snow",
        "without": "",
        "rank": "1",
        "sample": "50001",
        "score": "0.5",
        "z": "",
        "stands_out": "",
        "scored_by": "dmin",
        "meta_prompt": "mine",
        "meta_meta_prompt": "too",
        "meta_t1": "odd",
        "t1": "0.5",
    }


@given(ANY_TEXT)
@settings(max_examples=50)
def test_hits_csv_of_any_text_is_read_back(text: str) -> None:
    one = hit(1, None, **{"caption": text, text: "x"})
    written = hits_csv(answer([[one]], TIMESTEPS, names=(text,), prompts=(text,)))
    written.encode()
    heading, row = read_csv(written)
    assert len(heading) == len(row)
    assert {c for c in written if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}} == {"\n"}
    assert written.count("\n") == 2
    assert row[0] == row[1]
    if text.isprintable() and not text.lstrip().startswith(tuple("=+-@＝＋－＠")):
        assert row[0] == text


def test_measures_json_is_strict() -> None:
    text = measures_json([{"measure": "x", "low": float("nan"), "each": [np.float64(0.5), float("inf")]}], {"id": "é"})
    assert text.isascii()
    assert json.loads(text) == {
        "format": "dmin_trace.measures",
        "version": 1,
        "trace": {"id": "é"},
        "measures": [{"measure": "x", "low": None, "each": [0.5, None]}],
    }


def test_exports_name_the_score() -> None:
    top = answer([[hit(1, (0.02, -0.01))]], (50.0, 950.0), score="deflated")
    read = strict(hits_json(top, {}))
    assert read["scored_by"] == "deflated" and read["score"].startswith("deflated score")
    heading, row = read_csv(hits_csv(top))
    assert dict(zip(heading, row, strict=True))["scored_by"] == "deflated"


def test_pooled_timesteps_have_one_score_a_group() -> None:
    groups = ((50.0, 150.0, 250.0), (350.0, 450.0), (550.0,))
    top = answer([[hit(1, (0.5, 0.25, 0.125))]], (), groups=groups)
    read = strict(hits_json(top, {}))
    assert read["groups"] == [[50.0, 150.0, 250.0], [350.0, 450.0], [550.0]]
    assert read["timesteps"] == [50.0, 150.0, 250.0, 350.0, 450.0, 550.0]
    assert read["score"].endswith("summed over 3 groups of 6 pooled timesteps; 3 would be a perfect match")
    heading, row = read_csv(hits_csv(top))
    assert heading[-3:] == ["t50-250", "t350-450", "t550"] and row[-3:] == ["0.5", "0.25", "0.125"]
