"""The counterfactual measure: closed forms, and intervals that hold what they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from dmin_trace.audit.intervals import Estimate
from dmin_trace.errors import EvaluationError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

from counterfactual_measure import Counterfactual, counterfactual


def bounds(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.low, estimate.value, estimate.high


def test_counterfactual_changes_are_differences_of_means() -> None:
    full = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    top = np.array([[5.0, 4.0, 6.0]])
    random = np.array([[2.5, 2.5, 2.5], [2.0, 3.0, 2.5], [3.0, 2.0, 2.5]])
    found = counterfactual(full, top, random)
    assert found.each_top.tolist() == [3, 2, 4]
    assert found.each_random.tolist() == [0.5, 0.5, 0.5]
    values = [found.top.value, found.random.value, found.difference.value, found.ratio.value]
    assert values == [3, 0.5, 2.5, 6]
    assert found.top.low < 3 < found.top.high
    again = counterfactual(full, top, random)
    assert [bounds(getattr(found, name)) for name in ("top", "random", "difference", "ratio")] == [
        bounds(getattr(again, name)) for name in ("top", "random", "difference", "ratio")
    ]


def test_counterfactual_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)

    def experiment() -> Counterfactual:
        queries = generator.standard_normal((3, 40))
        noise = [0.5 * generator.standard_normal((seeds, 40)) for seeds in (4, 4, 8)]
        kinds = (queries[0], queries[0] + 2 + queries[1], queries[0] + 0.5 + 0.3 * queries[2])
        return counterfactual(*(kind + of for kind, of in zip(kinds, noise, strict=True)), resamples=200)

    runs = [experiment() for _ in range(100)]
    for name, truth in (("top", 2.0), ("random", 0.5), ("difference", 1.5)):
        inside = sum(getattr(run, name).low <= truth <= getattr(run, name).high for run in runs)
        assert inside >= 85


def test_counterfactual_has_no_ratio_where_random_samples_change_nothing() -> None:
    found = counterfactual(np.ones((2, 3)), 2 * np.ones((2, 3)), np.ones((2, 3)))
    assert math.isnan(found.ratio.value) and math.isnan(found.ratio.low)
    assert bounds(found.difference) == (1, 1, 1)


def test_counterfactual_refuses_what_does_not_fit() -> None:
    losses = np.arange(6.0).reshape(3, 2)
    with pytest.raises(EvaluationError, match="random samples 1; expected the same"):
        counterfactual(losses, losses, losses[:, :1])
    with pytest.raises(EvaluationError, match="two axes"):
        counterfactual(losses, losses[0], losses)
