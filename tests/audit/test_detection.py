"""Detection rate and duplicate recall: closed forms, and intervals of a plain bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from dmin_trace.audit.detection import detection_rate, duplicate_recall, without_query
from dmin_trace.audit.intervals import Estimate
from dmin_trace.errors import EvaluationError


def bounds(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.low, estimate.value, estimate.high


def test_detection_rate_counts_the_labels_of_the_best() -> None:
    labels = ["cat", "cat", "dog", "dog", "dog", None, "cat", "cow"]
    ranking = np.array([[0, 2, 1, 6], [3, 4, 2, 5], [7, 0, 1, 2]])
    one, three, four = detection_rate(labels, ranking, ["cat", "dog", "emu"], [1, 3, 4])
    assert one.each.tolist() == [1, 1, 0]
    assert np.allclose(three.each, [2 / 3, 1, 0])
    assert np.allclose(four.each, [3 / 4, 3 / 4, 0])
    assert [rate.k for rate in (one, three, four)] == [1, 3, 4]
    assert three.rate.value == pytest.approx(5 / 9)
    # Three cats, three dogs and no emu among eight.
    assert four.chance == pytest.approx((3 / 8 + 3 / 8 + 0) / 3)
    assert four.best == pytest.approx((3 / 4 + 3 / 4 + 0) / 3)


def test_detection_rate_leaves_a_query_that_is_a_sample_out_of_chance() -> None:
    labels = np.array([1, 1, 1, 2, 2])
    (rate,) = detection_rate(labels, np.array([[1, 2, 3], [3, 0, 1]]), [1, 2], [3], query_positions=[0, 4])
    assert np.allclose(rate.each, [2 / 3, 1 / 3])
    assert rate.chance == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert rate.best == pytest.approx((2 / 3 + 1 / 3) / 2)
    with pytest.raises(EvaluationError, match="among its own best samples"):
        detection_rate(labels, np.array([[0, 2, 3], [3, 0, 1]]), [1, 2], [3], query_positions=[0, 4])


def test_detection_rate_of_random_and_of_perfect_rankings() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 7, 400)
    positions = np.arange(0, 400, 2)
    other = np.array([generator.permutation(np.delete(np.arange(400), position)) for position in positions])
    (rate,) = detection_rate(labels, other, labels[positions], [10], query_positions=positions)
    assert rate.rate.low < rate.chance < rate.rate.high
    pairs = zip(positions, other, strict=True)
    perfect = np.array([sorted(row, key=lambda other: labels[other] != labels[of]) for of, row in pairs])
    for rate in detection_rate(labels, perfect, labels[positions], [10, 100], query_positions=positions):
        assert rate.rate.value == pytest.approx(rate.best)


def test_detection_rate_takes_nan_as_no_label() -> None:
    labels = [math.nan, 1.0, math.nan, 2.0]
    (rate,) = detection_rate(labels, np.array([[0, 1, 2, 3]] * 2), [1.0, 2.0], [4])
    assert (rate.each.tolist(), rate.chance) == ([0.25, 0.25], 0.25)


def test_the_interval_of_detection_rate_is_that_of_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(1)
    labels = np.arange(40) % 4
    ranking = np.array([generator.permutation(40)[:10] for _ in range(60)])
    (rate,) = detection_rate(labels, ranking, np.arange(60) % 4, [10], resamples=4000)
    bootstrap = stats.bootstrap((rate.each,), np.mean, method="percentile", n_resamples=4000, rng=0)
    assert rate.rate.low == pytest.approx(bootstrap.confidence_interval.low, abs=0.01)
    assert rate.rate.high == pytest.approx(bootstrap.confidence_interval.high, abs=0.01)
    assert bounds(rate.rate) == bounds(detection_rate(labels, ranking, np.arange(60) % 4, [10], resamples=4000)[0].rate)
    assert bounds(rate.rate) != bounds(
        detection_rate(labels, ranking, np.arange(60) % 4, [10], resamples=4000, seed=1)[0].rate
    )


def test_detection_rate_of_one_query_has_no_interval() -> None:
    (rate,) = detection_rate([1, 2, 2], np.array([[0, 1, 2]]), [2], [3])
    assert rate.rate.value == pytest.approx(2 / 3)
    assert math.isnan(rate.rate.low) and math.isnan(rate.rate.high)


def test_duplicate_recall_counts_the_duplicates_found() -> None:
    ranking = np.array([[5, 1, 7, 8], [2, 0, 9, 3], [4, 6, 1, 0]])
    duplicates = [{1, 8, 9}, [2], np.array([3, 5])]
    one, four = duplicate_recall(ranking, duplicates, [1, 4], ranked=10)
    assert one.each.tolist() == [0, 1, 0]
    assert np.allclose(four.each, [2 / 3, 1, 0])
    assert (one.chance, four.chance) == (0.1, 0.4)
    assert one.best == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)
    assert four.best == 1


def test_without_query_leaves_the_query_out_or_else_the_last() -> None:
    ranking = np.array([[4, 1, 2], [1, 5, 0], [7, 8, 9]])
    left = without_query(ranking, [4, 0, 3])
    assert left.tolist() == [[1, 2], [1, 5], [7, 8]]


RANKING = np.array([[0, 1], [1, 2]])
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "one label": (lambda: detection_rate(["a"] * 3, RANKING, ["a", "a"], [1]), "have 1 different labels"),
    "no label": (lambda: detection_rate([None] * 3, RANKING, ["a", "a"], [1]), "have 0 different labels"),
    "a query without a label": (lambda: detection_rate([1, 2, 3], RANKING, [1, None], [1]), "Query 1 has no label"),
    "labels of other queries": (lambda: detection_rate([1, 2, 3], RANKING, [1], [1]), "1 labels of queries and 2"),
    "fewer labels than samples": (
        lambda: detection_rate([1, 2], RANKING, [1, 2], [1]),
        "beyond the 2 that have labels",
    ),
    "k too large": (
        lambda: detection_rate([1, 2, 3], RANKING, [1, 2], [1, 3]),
        "k is 1, 3; expected .* from 1 to 2",
    ),
    "k of zero": (lambda: duplicate_recall(RANKING, [{1}, {2}], [0], ranked=3), "k is 0; expected"),
    "no k": (lambda: duplicate_recall(RANKING, [{1}, {2}], [], ranked=3), "k is ; expected"),
    "a ranking of floats": (lambda: detection_rate([1, 2], RANKING / 2, [1, 2], [1]), "float64 of shape"),
    "positions beyond the samples": (
        lambda: detection_rate([1, 2, 3], RANKING, [1, 2], [1], query_positions=[2, 3]),
        "query_positions has shape",
    ),
    "no duplicates": (lambda: duplicate_recall(RANKING, [{1}, set()], [1], ranked=3), "Query 1 has no duplicates"),
    "duplicates of others": (lambda: duplicate_recall(RANKING, [{1}], [1], ranked=3), "1 queries, and 2 queries"),
    "few are ranked": (lambda: duplicate_recall(RANKING, [{1}, {2}], [1], ranked=1), "1 samples are ranked"),
}


@pytest.mark.parametrize(("measure", "message"), WRONG.values(), ids=WRONG.keys())
def test_detection_refuses_what_does_not_fit(measure: Callable[[], object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure()
