"""The ceiling that two trainings set, on losses whose repeatable part is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import ceiling

M, Q = 64, 96


def trained_twice(noise: float, seed: int, models: int = M, queries: int = Q) -> tuple[np.ndarray, np.ndarray]:
    """The repeatable part (M, Q), and the losses (2, M, Q) of two trainings."""
    generator = np.random.default_rng(seed)
    # Queries go together, as their losses of one model do.
    repeats = generator.standard_normal((models, 8)) @ generator.standard_normal((8, queries)) / 8**0.5
    return repeats, repeats + noise * generator.standard_normal((2, models, queries))


@pytest.mark.parametrize("noise", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_interval_holds_the_correlation_of_what_repeats(noise: float, seed: int) -> None:
    repeats, losses = trained_twice(noise, seed)
    for correlation in (ceiling.spearman, ceiling.pearson):
        found = ceiling.ceiling(losses, correlation, resamples=300)
        with_mean = float(correlation(repeats, losses.mean(axis=0)).mean())
        with_one = float(np.mean([correlation(repeats, one).mean() for one in losses]))
        assert found.mean.low - 0.02 < with_mean < found.mean.high + 0.02
        assert abs(found.mean.value - with_mean) < 0.06
        assert abs(found.one.value - with_one) < 0.06
        assert found.one.value < found.mean.value < 1


def test_the_formulas() -> None:
    _, losses = trained_twice(1.0, 0, models=20, queries=5)
    for correlation, by_scipy in ((ceiling.spearman, spearmanr), (ceiling.pearson, pearsonr)):
        r = np.mean([by_scipy(losses[0][:, q], losses[1][:, q])[0] for q in range(5)])
        found = ceiling.ceiling(losses, correlation, resamples=2)
        np.testing.assert_allclose(
            [found.reliability.value, found.one.value, found.mean.value], [r, r**0.5, (2 * r / (1 + r)) ** 0.5]
        )


def test_queries_that_do_not_repeat_count() -> None:
    repeats, losses = trained_twice(3.0, 1, models=16)
    each = ceiling.pearson(*losses)
    assert (each < 0).any()
    # True reliability of each query: its variance over that and the noise's.
    assert abs(ceiling.ceiling(losses, ceiling.pearson, resamples=2).reliability.value - each.mean()) < 1e-12
    # Leaving out those below zero would make it far too large.
    expected = np.mean(repeats.var(axis=0) / (repeats.var(axis=0) + 9))
    assert abs(each.mean() - expected) < abs(each[each > 0].mean() - expected)


def test_nothing_repeats() -> None:
    losses = np.random.default_rng(0).standard_normal((2, 64, 96))
    found = ceiling.ceiling(losses, resamples=200)
    assert found.reliability.low < 0 < found.reliability.high
    assert found.one.low == found.mean.low == 0 and found.mean.value < 0.25
    against = ceiling.ceiling(np.stack([losses[0], -losses[0]]), resamples=2)
    assert against.reliability.value == pytest.approx(-1) and against.one.value == against.mean.value == 0


def test_losses_that_do_not_fit() -> None:
    for wrong in (np.zeros((1, 8, 4)), np.zeros((2, 2, 4)), np.zeros((8, 4)), np.full((2, 8, 4), np.nan)):
        with pytest.raises(ValueError):
            ceiling.ceiling(wrong)
