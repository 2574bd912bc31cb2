"""The linear datamodeling score: closed forms, and scipy's rank correlation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmin_trace.audit.datamodeling import linear_datamodeling_score, spearman
from dmin_trace.errors import EvaluationError


def test_linear_datamodeling_score_of_true_influences_is_one_and_of_their_negatives_minus_one() -> None:
    """Losses that are a constant minus the sums of the influences of a model's samples."""
    generator = np.random.default_rng(0)
    influence = generator.standard_normal((6, 50))
    subsets = generator.random((20, 50)) < 0.5
    losses = 3 - subsets @ influence.T
    right = linear_datamodeling_score(influence, subsets, losses)
    assert np.allclose(right.each, 1) and right.models == 20
    assert (right.score.low, right.score.value, right.score.high) == pytest.approx((1, 1, 1))
    # Any growing function of a loss has its ranks.
    assert linear_datamodeling_score(5 * influence, subsets, np.exp(losses)).score.value == pytest.approx(1)
    assert linear_datamodeling_score(-influence, subsets, losses).score.value == pytest.approx(-1)


def test_linear_datamodeling_score_of_random_scores_is_at_chance() -> None:
    generator = np.random.default_rng(5)
    subsets = generator.random((40, 80)) < 0.5
    losses = -(subsets @ generator.standard_normal((80, 12)))
    found = linear_datamodeling_score(generator.standard_normal((12, 80)), subsets, losses)
    assert found.score.low < 0 < found.score.high
    assert found.score.high - found.score.low < 0.5


def test_linear_datamodeling_score_is_the_mean_of_scipys_correlations() -> None:
    generator = np.random.default_rng(2)
    scores = generator.standard_normal((9, 60)).astype(np.float32)
    subsets = generator.random((15, 60)) < 0.5
    subsets[7] = subsets[3]
    losses = generator.integers(0, 6, (15, 9))
    found = linear_datamodeling_score(scores, subsets, losses)
    for query in range(9):
        sums = [math.fsum(scores[query, subset].tolist()) for subset in subsets]
        assert found.each[query] == pytest.approx(stats.spearmanr(sums, -losses[:, query]).statistic)
    assert found.score.value == pytest.approx(found.each.mean())


def test_the_interval_of_linear_datamodeling_score_resamples_models_as_well_as_queries() -> None:
    """Many queries on few models: queries alone would make the interval far too narrow."""
    generator = np.random.default_rng(4)
    shared = generator.standard_normal(40)
    scores = shared + 0.01 * generator.standard_normal((300, 40))
    subsets = generator.random((10, 40)) < 0.5
    losses = -(subsets @ shared)[:, None] + 4 * generator.standard_normal((10, 1)) + np.zeros((1, 300))
    found = linear_datamodeling_score(scores, subsets, losses)
    of_queries_alone = 4 * found.each.std() / len(found.each) ** 0.5
    assert found.score.high - found.score.low > 5 * of_queries_alone
    assert found.score.low < found.score.value < found.score.high


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 12).flatmap(
        lambda n: st.lists(st.tuples(st.integers(-3, 3), st.floats(-2, 2)), min_size=n, max_size=n)
    )
)
def test_spearman_is_scipys(pairs: list[tuple[int, float]]) -> None:
    one, other = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
    found = spearman(np.stack([one, other, one], 1), np.stack([other, one, one], 1))
    if (one == one[0]).all() or (other == other[0]).all():
        assert math.isnan(found[0])
        return
    expected = stats.spearmanr(one, other).statistic
    assert np.allclose(found, [expected, expected, 1], atol=1e-9)


SCORES, SUBSETS, LOSSES = np.eye(2, 4), np.eye(3, 4, dtype=bool), np.arange(6.0).reshape(3, 2) ** 2
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "subsets of numbers": (
        lambda: linear_datamodeling_score(SCORES, SUBSETS.astype(int), LOSSES),  # type: ignore[arg-type]
        "The subsets are int64",
    ),
    "subsets of others": (
        lambda: linear_datamodeling_score(SCORES, SUBSETS[:, :3], LOSSES),
        r"bool of shape \(3, 3\); expected bool of shape \(models, 4\)",
    ),
    "losses turned": (
        lambda: linear_datamodeling_score(SCORES, SUBSETS, LOSSES.T),
        r"shape \(2, 3\); expected \(3, 2\)",
    ),
    "one model": (lambda: linear_datamodeling_score(SCORES, SUBSETS[:1], LOSSES[:1]), "There is 1 model"),
    "a loss of nan": (lambda: linear_datamodeling_score(SCORES, SUBSETS, LOSSES * np.nan), "losses hold numbers"),
    "losses all equal": (
        lambda: linear_datamodeling_score(SCORES, SUBSETS, LOSSES * [1, 0]),
        "the same loss for query 1",
    ),
    "sums all equal": (
        lambda: linear_datamodeling_score(SCORES * [[1], [0]], SUBSETS, LOSSES),
        "the same sum of scores for query 1",
    ),
    "scores that are words": (lambda: linear_datamodeling_score([["a"]], SUBSETS, LOSSES), "scores cannot be read"),
}


@pytest.mark.parametrize(("measure", "message"), WRONG.values(), ids=WRONG.keys())
def test_linear_datamodeling_score_refuses_what_does_not_fit(measure: Callable[[], object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure()
