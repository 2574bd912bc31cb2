"""Answers to queries, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from hypothesis import strategies as st

from dmin_trace.query import AnsweredBy, Hit, Record, TopK
from dmin_trace.search import Background

KNOWN = Background(samples=1797, scored=1797, median=0.0, scale=0.5, limit=4.0, standing_out=7)
UNKNOWN = Background(samples=12, scored=12, unknown="it takes 30 samples or more to tell influence from noise")

RECORD = Record(
    made=datetime(2026, 11, 28, 12, 30, tzinfo=UTC),
    version="0.1.0",
    trace="0123456789abcdef" * 2,
    samples=1797,
    searched=1797,
    queries="d" * 64,
    weights="c" * 64,
    weights_of="the trained weights",
    data="e" * 64,
    script="train.py",
    script_sha256="f" * 64,
    settings={"timesteps": 10, "dimension": 16384, "rows": None},
    writers={"dmin_trace": "0.1.0", "torch": "2.13.0"},
)

# All of Unicode with surrogates, and the characters that matter much more often than chance would have it.
ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from("\x1b\x9b\x07\r\n\t\x7f\u202e\u2066\u200f\u200b\u2028\ufeff\ud800[]/\\=+-@',\"; a1狐"),
    ),
    max_size=120,
)


def hit(rank: int = 1, scores: tuple[float, ...] | None = None, /, **columns: str | int | float | None) -> Hit:
    """A hit with a score at each of ten timesteps."""
    scores = tuple((1.2 - rank / 10) / (1 + k / 4) for k in range(10)) if scores is None else scores
    return Hit(rank=rank, sample=50_000 + rank, score=sum(scores), per_timestep=scores, columns=columns)


def answer(
    hits: Sequence[list[Hit]],
    timesteps: tuple[float, ...],
    *,
    names: tuple[str, ...] = ("fox.png",),
    prompts: tuple[str | None, ...] = ("a red fox in the snow",),
    without: tuple[str | None, ...] = (),
    score: str = "dmin",
    groups: tuple[tuple[float, ...], ...] | None = None,
    background: Background = UNKNOWN,
) -> TopK:
    """An answer with these hits for each query."""
    return TopK(
        samples=np.empty((len(hits), 0), np.int64),
        scores=np.empty((len(hits), 0), np.float32),
        per_timestep=np.empty((len(hits), 0, len(groups or timesteps)), np.float32),
        hits=list(hits),
        names=names,
        prompts=prompts,
        without=without or (None,) * len(prompts),
        groups=tuple((t,) for t in timesteps) if groups is None else groups,
        score=score,
        deflation="",
        answered_by=AnsweredBy(None, "scanned all samples"),
        backgrounds=(background,) * len(hits),
        pictures=(None,) * len(hits),
        record=RECORD,
    )
