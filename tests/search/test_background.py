"""What stands out: z and the count by a slow oracle, few false alarms, and scores that say nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_header, make_rows, write_store

from dmin_trace.search import background, exact_top_k
from dmin_trace.search.background import MIN_SAMPLES, Background, fit_background

Noise = Callable[[np.random.Generator, int], np.ndarray]
NOISES: dict[str, Noise] = {
    "normal": lambda random, n: random.standard_normal(n),
    "laplace": lambda random, n: random.laplace(size=n),
    "products": lambda random, n: (random.standard_normal((n, 3)) * random.standard_normal((n, 3))).sum(1),
    "skewed": lambda random, n: random.exponential(size=n),
}


def counted_slowly(scores: np.ndarray) -> int:
    """The largest c such that chance gives a twentieth of c scores, or fewer, that are as large as the c-th largest."""
    n = len(scores)
    quartile, tenth = np.quantile(scores, 0.75), np.quantile(scores, 0.9)
    slope = (tenth - quartile) / math.log(2.5) * (1 + 1 / math.sqrt(0.15 * n))
    most = 0
    for c, score in enumerate(sorted(scores, reverse=True), 1):
        if score > tenth and n * 0.1 * math.exp(-(score - tenth) / slope) <= 0.05 * c:
            most = c
    return most


@pytest.mark.parametrize("planted", [0, 1, 7, 40])
@pytest.mark.parametrize("noise", NOISES)
def test_counts_are_those_of_a_slow_oracle(noise: str, planted: int) -> None:
    random = np.random.default_rng(planted)
    scores = NOISES[noise](random, 1000) * 0.01 + 3
    scores[:planted] += np.linspace(0.05, 1.0, planted)
    found = fit_background(scores, 1000)
    assert found.standing_out == counted_slowly(scores) == sum(found.stands_out(score) or False for score in scores)
    assert found.standing_out >= planted // 2
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75])
    z = found.z(float(scores[0]))
    assert z is not None and math.isclose(z, (scores[0] - middle) / ((high - low) / 1.3489795), rel_tol=1e-6)
    assert (found.samples, found.scored, found.at_least, found.unknown) == (1000, 1000, False, "")


@pytest.mark.parametrize("samples", [MIN_SAMPLES, 100, 1000, 20_000])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_alone_seldom_stands_out(noise: str, samples: int) -> None:
    random, times = np.random.default_rng(3), 400 if samples < 10_000 else 60
    alarms = [fit_background(NOISES[noise](random, samples), samples).standing_out != 0 for _ in range(times)]
    # One in twenty is meant. A few samples show the tail badly.
    assert np.mean(alarms) < (0.12 if samples < 1000 else 0.07)


@pytest.mark.parametrize("noise", NOISES)
def test_the_scale_does_not_depend_on_what_stands_out(noise: str) -> None:
    scores = NOISES[noise](np.random.default_rng(1), 2000)
    plain = fit_background(scores, 2000)
    scores[:20] = 1e4
    other = fit_background(scores, 2000)
    assert abs(other.median - plain.median) < 0.05 and abs(other.scale / plain.scale - 1) < 0.05
    assert other.standing_out is not None and other.standing_out >= 20


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200),
    st.floats(2**-10, 2**10, width=32),
    st.booleans(),
)
@settings(max_examples=100)
def test_any_scores_give_an_answer_that_does_not_depend_on_their_unit(
    values: list[float], unit: float, largest: bool
) -> None:
    scores = np.array(values)
    one = fit_background(scores, len(scores), largest=largest)
    other = fit_background(scores * unit, len(scores), largest=largest)
    mirrored = fit_background(-scores, len(scores), largest=not largest)
    assert mirrored.standing_out == one.standing_out and mirrored.unknown == one.unknown
    assert (one.standing_out is None) == (one.unknown != "")
    assert one.verdict.endswith(".")
    if one.unknown == other.unknown == "" and one.standing_out == other.standing_out:
        assert math.isclose(one.limit * unit, other.limit, rel_tol=1e-6, abs_tol=1e-3 * unit)


@pytest.mark.parametrize(
    ("scores", "unknown"),
    [
        (np.arange(MIN_SAMPLES - 1), "it takes 30 samples or more to tell influence from noise"),
        (np.array([0.5]), "it takes 30 samples or more to tell influence from noise"),
        (np.ones(500), "most scores are equal"),
        (np.zeros(500), "most scores are equal"),
        (1 + np.random.default_rng(0).standard_normal(500) * 1e-7, "most scores are equal"),
        (np.repeat([0.0, 1.0], [300, 20]), "most scores are equal"),
        (np.repeat([0.0, 0.5, 1.0], [100, 100, 100]), "most scores are equal"),
    ],
)
def test_what_is_not_known_is_said(scores: np.ndarray, unknown: str) -> None:
    found = fit_background(scores, len(scores))
    assert found.unknown == unknown and found.standing_out is None
    assert found.z(1.0) is None and found.stands_out(1e9) is None
    assert found.verdict == f"How many samples stand out is not known: {unknown}."


def test_verdicts() -> None:
    known = Background(samples=1797, scored=1797, median=0, scale=1, limit=8, standing_out=7)
    assert known.verdict == "7 of 1,797 samples stand out."
    assert replace(known, standing_out=1).verdict == "1 of 1,797 samples stands out."
    assert replace(known, standing_out=0).verdict == (
        "No sample of 1,797 stands out: the query is not owed to single samples."
    )
    assert replace(known, largest=False).verdict == "7 of 1,797 samples stand out against the query."
    assert replace(known, standing_out=0, largest=False).verdict == ("No sample of 1,797 stands out against the query.")
    assert replace(known, samples=10**6, standing_out=1200).verdict == "About 1,200 of 1,000,000 samples stand out."
    index = replace(known, samples=10**6, at_least=True)
    assert index.verdict == "At least 7 of 1,000,000 samples stand out."
    assert replace(index, standing_out=0).verdict == "None of the samples that were found stands out, of 1,000,000."


def test_a_part_of_the_scores_gives_about_the_same() -> None:
    random = np.random.default_rng(2)
    scores = random.laplace(size=200_000)
    scores[:2000] += 40
    whole, best = fit_background(scores, len(scores)), np.sort(scores)[::-1][:10]
    part = fit_background(random.choice(scores, 20_000, replace=False), len(scores), best)
    assert whole.standing_out is not None and part.standing_out is not None
    assert 1900 < whole.standing_out < 2200 and abs(part.standing_out / whole.standing_out - 1) < 0.1
    assert abs(part.scale / whole.scale - 1) < 0.03 and part.stands_out(float(best[-1]))
    # Three that stand out are not in the part, but among the best.
    few = random.laplace(size=200_000)
    few[:3] = 60
    best = np.sort(few)[::-1][:10]
    part = fit_background(few[1000:21_000], len(few), best)
    assert part.standing_out == 3 and [part.stands_out(float(one)) for one in best[:4]] == [True] * 3 + [False]
    index = fit_background(few[1000:2024], len(few), best, index=True)
    assert index.standing_out == 3 and index.at_least and index.verdict.startswith("At least 3 of 200,000")
    none = fit_background(few[1000:2024], len(few), best[3:], index=True)
    assert none.standing_out == 0


@pytest.mark.parametrize("largest", [True, False])
def test_a_scan_gives_the_background_of_all_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: bool
) -> None:
    header = make_header(samples=400, dimension=64, rows=16)
    rows = make_rows(header)
    rows.norm[5, 1], rows.norm[77] = np.nan, 0
    rows.grad[::100] = rows.grad[0]
    store = write_store(tmp_path / "trace.zarr", header, rows)
    queries = store.gradients([0, 9]) * (1 if largest else -1)
    assert exact_top_k(store, queries, 3).backgrounds == ()
    ranking = exact_top_k(store, queries, 3, largest=largest, background=True)
    products = np.einsum("qtv,ntv->qn", queries.astype(np.float64), store.gradients(np.arange(400)))[:, store.valid]
    for found, scores in zip(ranking.backgrounds, products, strict=True):
        expected = fit_background(scores, 398, largest=largest)
        assert (found.standing_out, found.samples, found.scored) == (expected.standing_out, 398, 398)
        np.testing.assert_allclose(
            (found.median, found.scale, found.limit), (expected.median, expected.scale, expected.limit), atol=1e-4
        )
    assert ranking.backgrounds[0].standing_out == 4
    # Of many scores, some are kept.
    monkeypatch.setattr(background, "MAX_SCORES", 0)
    monkeypatch.setattr(background, "MIN_SCORES", 200)
    ranking = exact_top_k(store, queries, 3, largest=largest, background=True)
    assert 150 < ranking.backgrounds[0].scored < 250 and ranking.backgrounds[0].samples == 398
    assert abs(ranking.backgrounds[1].scale / expected.scale - 1) < 0.3
