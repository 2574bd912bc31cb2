"""The measures: closed forms, scipy's rank correlation, and intervals that hold what they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmin_trace.audit.measures import (
    Counterfactual,
    Estimate,
    counterfactual,
    detection_rate,
    duplicate_recall,
    linear_datamodeling_score,
    spearman,
    without_self,
)
from dmin_trace.errors import EvaluationError


def bounds(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.low, estimate.value, estimate.high


def test_detection_counts_the_labels_of_the_best() -> None:
    labels = ["cat", "cat", "dog", "dog", "dog", None, "cat", "cow"]
    slots = np.array([[0, 2, 1, 6], [3, 4, 2, 5], [7, 0, 1, 2]])
    one, three, four = detection_rate(labels, slots, ["cat", "dog", "emu"], [1, 3, 4])
    assert one.each.tolist() == [1, 1, 0]
    assert np.allclose(three.each, [2 / 3, 1, 0])
    assert np.allclose(four.each, [3 / 4, 3 / 4, 0])
    assert [rate.k for rate in (one, three, four)] == [1, 3, 4]
    assert three.rate.value == pytest.approx(5 / 9)
    # Three cats, three dogs and no emu among eight.
    assert four.chance == pytest.approx((3 / 8 + 3 / 8 + 0) / 3)
    assert four.best == pytest.approx((3 / 4 + 3 / 4 + 0) / 3)


def test_a_query_that_is_a_sample_is_no_part_of_chance() -> None:
    labels = np.array([1, 1, 1, 2, 2])
    (rate,) = detection_rate(labels, np.array([[1, 2, 3], [3, 0, 1]]), [1, 2], [3], asking=[0, 4])
    assert np.allclose(rate.each, [2 / 3, 1 / 3])
    assert rate.chance == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert rate.best == pytest.approx((2 / 3 + 1 / 3) / 2)
    with pytest.raises(EvaluationError, match="among its own best samples"):
        detection_rate(labels, np.array([[0, 2, 3], [3, 0, 1]]), [1, 2], [3], asking=[0, 4])


def test_random_rankings_are_at_chance_and_perfect_ones_at_the_best() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 7, 400)
    asking = np.arange(0, 400, 2)
    other = np.array([generator.permutation(np.delete(np.arange(400), slot)) for slot in asking])
    (rate,) = detection_rate(labels, other, labels[asking], [10], asking=asking)
    assert rate.rate.low < rate.chance < rate.rate.high
    pairs = zip(asking, other, strict=True)
    perfect = np.array([sorted(row, key=lambda slot: labels[slot] != labels[of]) for of, row in pairs])
    for rate in detection_rate(labels, perfect, labels[asking], [10, 100], asking=asking):
        assert rate.rate.value == pytest.approx(rate.best)


def test_nan_is_no_label_and_no_number_is_another() -> None:
    labels = [math.nan, 1.0, math.nan, 2.0]
    (rate,) = detection_rate(labels, np.array([[0, 1, 2, 3]] * 2), [1.0, 2.0], [4])
    assert (rate.each.tolist(), rate.chance) == ([0.25, 0.25], 0.25)


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(1)
    labels = np.arange(40) % 4
    slots = np.array([generator.permutation(40)[:10] for _ in range(60)])
    (rate,) = detection_rate(labels, slots, np.arange(60) % 4, [10], resamples=4000)
    bootstrap = stats.bootstrap((rate.each,), np.mean, method="percentile", n_resamples=4000, rng=0)
    assert rate.rate.low == pytest.approx(bootstrap.confidence_interval.low, abs=0.01)
    assert rate.rate.high == pytest.approx(bootstrap.confidence_interval.high, abs=0.01)
    assert bounds(rate.rate) == bounds(detection_rate(labels, slots, np.arange(60) % 4, [10], resamples=4000)[0].rate)
    assert bounds(rate.rate) != bounds(
        detection_rate(labels, slots, np.arange(60) % 4, [10], resamples=4000, seed=1)[0].rate
    )


def test_of_one_query_no_interval_is_known() -> None:
    (rate,) = detection_rate([1, 2, 2], np.array([[0, 1, 2]]), [2], [3])
    assert rate.rate.value == pytest.approx(2 / 3)
    assert math.isnan(rate.rate.low) and math.isnan(rate.rate.high)


def test_recall_counts_the_copies_found() -> None:
    slots = np.array([[5, 1, 7, 8], [2, 0, 9, 3], [4, 6, 1, 0]])
    copies = [{1, 8, 9}, [2], np.array([3, 5])]
    one, four = duplicate_recall(slots, copies, [1, 4], ranked=10)
    assert one.each.tolist() == [0, 1, 0]
    assert np.allclose(four.each, [2 / 3, 1, 0])
    assert (one.chance, four.chance) == (0.1, 0.4)
    assert one.best == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)
    assert four.best == 1


def test_the_query_is_left_out_of_its_ranking_or_else_the_last() -> None:
    slots = np.array([[4, 1, 2], [1, 5, 0], [7, 8, 9]])
    left = without_self(slots, [4, 0, 3])
    assert left.tolist() == [[1, 2], [1, 5], [7, 8]]


def test_the_true_influences_score_one_and_their_negatives_minus_one() -> None:
    """Losses that are a constant minus the sums of the influences of a model's samples."""
    generator = np.random.default_rng(0)
    influence = generator.standard_normal((6, 50))
    subsets = generator.random((20, 50)) < 0.5
    losses = 3 - subsets @ influence.T
    right = linear_datamodeling_score(influence, subsets, losses)
    assert np.allclose(right.each, 1) and right.models == 20
    assert bounds(right.score) == pytest.approx((1, 1, 1))
    # Any growing function of a loss has its ranks.
    assert linear_datamodeling_score(5 * influence, subsets, np.exp(losses)).score.value == pytest.approx(1)
    assert linear_datamodeling_score(-influence, subsets, losses).score.value == pytest.approx(-1)


def test_scores_of_nothing_are_at_chance() -> None:
    generator = np.random.default_rng(5)
    subsets = generator.random((40, 80)) < 0.5
    losses = -(subsets @ generator.standard_normal((80, 12)))
    found = linear_datamodeling_score(generator.standard_normal((12, 80)), subsets, losses)
    assert found.score.low < 0 < found.score.high
    assert found.score.high - found.score.low < 0.5


def test_the_score_is_the_mean_of_scipys_correlations() -> None:
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


def test_an_interval_resamples_models_as_well_as_queries() -> None:
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
def test_rank_correlations_are_scipys(pairs: list[tuple[int, float]]) -> None:
    one, other = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
    found = spearman(np.stack([one, other, one], 1), np.stack([other, one, one], 1))
    if (one == one[0]).all() or (other == other[0]).all():
        assert math.isnan(found[0])
        return
    expected = stats.spearmanr(one, other).statistic
    assert np.allclose(found, [expected, expected, 1], atol=1e-9)


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


def test_a_counterfactual_interval_holds_the_truth_about_as_often_as_it_says() -> None:
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


def test_nothing_over_nothing_is_no_ratio() -> None:
    found = counterfactual(np.ones((2, 3)), 2 * np.ones((2, 3)), np.ones((2, 3)))
    assert math.isnan(found.ratio.value) and math.isnan(found.ratio.low)
    assert bounds(found.difference) == (1, 1, 1)


SLOTS = np.array([[0, 1], [1, 2]])
SCORES, SUBSETS, LOSSES = np.eye(2, 4), np.eye(3, 4, dtype=bool), np.arange(6.0).reshape(3, 2) ** 2

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "one label": (lambda: detection_rate(["a"] * 3, SLOTS, ["a", "a"], [1]), "bear 1 labels"),
    "no label": (lambda: detection_rate([None] * 3, SLOTS, ["a", "a"], [1]), "bear 0 labels"),
    "a query without a label": (lambda: detection_rate([1, 2, 3], SLOTS, [1, None], [1]), "Query 1 has no label"),
    "labels of other queries": (lambda: detection_rate([1, 2, 3], SLOTS, [1], [1]), "1 labels of queries and 2"),
    "fewer labels than samples": (lambda: detection_rate([1, 2], SLOTS, [1, 2], [1]), "beyond the 2 that have labels"),
    "k too large": (
        lambda: detection_rate([1, 2, 3], SLOTS, [1, 2], [1, 3]),
        r"k is \[1, 3\]; expected .* from 1 to 2",
    ),
    "k of nothing": (lambda: duplicate_recall(SLOTS, [{1}, {2}], [0], ranked=3), r"k is \[0\]"),
    "no k": (lambda: duplicate_recall(SLOTS, [{1}, {2}], [], ranked=3), r"k is \[\]"),
    "slots that are none": (lambda: detection_rate([1, 2], SLOTS / 2, [1, 2], [1]), "float64 of shape"),
    "asks from beyond": (lambda: detection_rate([1, 2, 3], SLOTS, [1, 2], [1], asking=[2, 3]), "What asks has shape"),
    "no copies": (lambda: duplicate_recall(SLOTS, [{1}, set()], [1], ranked=3), "Query 1 has no copies"),
    "copies of others": (lambda: duplicate_recall(SLOTS, [{1}], [1], ranked=3), "1 queries and 2 queries"),
    "few are ranked": (lambda: duplicate_recall(SLOTS, [{1}, {2}], [1], ranked=1), "1 samples are ranked"),
    "subsets of numbers": (
        lambda: linear_datamodeling_score(SCORES, SUBSETS.astype(int), LOSSES),  # type: ignore[arg-type]
        "The subsets are int64",
    ),
    "subsets of others": (
        lambda: linear_datamodeling_score(SCORES, SUBSETS[:, :3], LOSSES),
        "of 3 samples; expected 4",
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
    "other queries": (lambda: counterfactual(LOSSES, LOSSES, LOSSES[:, :1]), "random ones 1; expected the same"),
    "an axis short": (lambda: counterfactual(LOSSES, LOSSES[0], LOSSES), "two axes"),
}


@pytest.mark.parametrize(("measure", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(measure: Callable[[], object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure()
