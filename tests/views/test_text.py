"""`harmless`: nothing in it acts on a terminal or hides."""

from __future__ import annotations

import time
import unicodedata

import pytest
from answers import ANY_TEXT
from hypothesis import given
from hypothesis import strategies as st

from dmin_trace.views.text import harmless

UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


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
