"""Intervals and tests against formulas worked by hand, full enumeration, and what they promise: coverage and level."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy import stats

from evomerge import statistics as st
from evomerge.statistics import Estimate, Stratum

Z = 1.959963984540054  # the 97.5% point of the normal distribution


def wilson_by_hand(k: int, n: int) -> tuple[float, float]:
    """Wilson (1927), solved for p: |p_hat - p| = z sqrt(p (1 - p) / n)."""
    p = k / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half


def sign_flips_by_hand(terms) -> float:
    """The share of all 2^n sign patterns whose sum is at least as far from zero."""
    observed = abs(sum(terms))
    patterns = itertools.product((1, -1), repeat=len(terms))
    sums = [abs(sum(s * t for s, t in zip(signs, terms, strict=True))) for signs in patterns]
    return sum(s >= observed - 1e-12 for s in sums) / len(sums)


def ones(n: int) -> np.ndarray:
    return np.ones(n)


@given(some.integers(1, 300).flatmap(lambda n: some.tuples(some.integers(0, n), some.just(n))))
def test_zeros_and_ones_get_wilsons_interval(kn):
    k, n = kn
    e = st.mean_interval(np.array([1.0] * k + [0.0] * (n - k)), ones(n))
    low, high = wilson_by_hand(k, n)
    assert e.value == pytest.approx(k / n) and e.num_items == n
    assert (e.low, e.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_other_values_get_students_interval():
    # Mean 3, squared deviations 4+1+0+1+4 = 10, s^2 = 2.5, t(0.975, 4) = 2.7764451: 3 +- 2.7764451 sqrt(0.5).
    e = st.mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), ones(5))
    assert (e.value, e.low, e.high) == pytest.approx((3.0, 3 - 1.9632432, 3 + 1.9632432), abs=1e-6)


def test_a_single_item_that_is_no_zero_or_one_has_no_interval():
    assert st.mean_interval(np.array([0.3]), ones(1)) == Estimate(0.3, None, None, 1)


def test_doubling_every_weight_changes_nothing():
    values, weights = np.array([0.1, 0.4, 0.2, 0.9]), np.array([1.0, 2.0, 3.0, 4.0])
    one, two = st.mean_interval(values, weights), st.mean_interval(values, 2 * weights)
    assert (one.value, one.low, one.high) == pytest.approx((two.value, two.low, two.high))
    assert one.value == pytest.approx((0.1 + 0.8 + 0.6 + 3.6) / 10)


def test_one_part_keeps_its_interval_and_equal_parts_shrink_it():
    part = Estimate(0.5, 0.4, 0.65, 100)
    assert st.combine([(1.0, part)]) == part
    half = st.combine([(0.5, part), (0.5, part)])
    assert (half.value, half.low, half.high) == pytest.approx(
        (0.5, 0.5 - 0.1 / math.sqrt(2), 0.5 + 0.15 / math.sqrt(2))
    )
    assert st.combine([(0.5, part), (0.5, Estimate(1.0, None, None, 1))]).low is None
    assert st.combine([(1.0, part), (0.0, Estimate(1.0, None, None, 1))]).low == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 1, 0, 1]),
        ([1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]),
        ([0.1, 0.9, 0.4, 0.3, 0.8, 0.2, 0.7, 0.6], [0.2, 0.5, 0.1, 0.35, 0.3, 0.25, 0.3, 0.1]),
        ([1, 0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1, 0]),
        ([1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_p_is_the_share_of_all_256_sign_patterns(first, second):
    first, second = np.array(first, float), np.array(second, float)
    d = st.paired_difference([Stratum(1.0, first, second, ones(8))])
    assert d.p == pytest.approx(sign_flips_by_hand(list((first - second) / 8)))
    assert d.value == pytest.approx(first.mean() - second.mean()) and d.test == "sign-flip"


def test_p_weighs_the_tasks_as_the_objective_does():
    a, b = np.array([1.0, 1, 1, 0]), np.array([0.0, 1, 1, 1, 0])
    zero_a, zero_b = np.zeros(4), np.array([1.0, 0, 1, 0, 1])
    strata = [Stratum(0.75, a, zero_a, ones(4)), Stratum(0.25, b, zero_b, ones(5))]
    d = st.paired_difference(strata)
    terms = [*(0.75 * (a - zero_a) / 4), *(0.25 * (b - zero_b) / 5)]
    assert d.value == pytest.approx(sum(terms)) == pytest.approx(0.75 * 0.75 + 0.25 * (0.6 - 0.6))
    assert d.p == pytest.approx(sign_flips_by_hand(terms))


def test_without_strata_and_weights_it_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.1, 1, 400), rng.normal(0, 1, 400)
    d = st.paired_difference([Stratum(1.0, first, second, ones(400))])
    reference = stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.95)
    assert d.test == "paired t" and d.p == pytest.approx(reference.pvalue)
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high))


def test_around_the_change_from_flips_to_t_both_say_the_same():
    rng = np.random.default_rng(2)
    first, second = rng.normal(0.25, 1, 101), rng.normal(0, 1, 101)
    many = st.paired_difference([Stratum(1.0, first, second, ones(101))])
    few = st.sign_flip_p((first - second) / 101)
    assert many.test == "paired t" and many.p == pytest.approx(few, abs=0.02)


def test_swapping_the_two_turns_the_sign_and_keeps_p():
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    d, back = (st.paired_difference([Stratum(1.0, *pair, ones(60))]) for pair in ((first, second), (second, first)))
    assert (d.value, d.low, d.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert d.p == pytest.approx(back.p, abs=0.03)


def test_one_item_has_a_difference_but_no_interval():
    d = st.paired_difference([Stratum(1.0, np.array([1.0]), np.array([0.0]), ones(1))])
    assert (d.value, d.low, d.high, d.p) == (1.0, None, None, 1.0)


def test_where_nothing_differs_the_test_rejects_at_most_as_often_as_it_says():
    rng, rejected = np.random.default_rng(4), 0
    for _ in range(50):
        first, second = (rng.normal(0, 1, (2, 6)) for _ in "ab")
        p = st.paired_difference([Stratum(0.5, first[t], second[t], ones(6)) for t in (0, 1)]).p
        rejected += p < 0.05
    assert rejected <= stats.binom.ppf(0.9999, 50, 0.05)


def test_the_stratified_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(5), 0
    for _ in range(200):
        parts = [(0.7, (rng.random(50) < 0.9).astype(float)), (0.3, (rng.random(30) < 0.4).astype(float))]
        e = st.combine([(share, st.mean_interval(v, ones(len(v)))) for share, v in parts])
        covered += e.low <= 0.7 * 0.9 + 0.3 * 0.4 <= e.high
    assert covered >= stats.binom.ppf(0.0001, 200, 0.94)


def test_the_bootstrap_of_a_mean_is_near_students_interval_and_is_paired():
    rng = np.random.default_rng(6)
    values, weights = rng.normal(2, 1, 200), ones(200)
    picked = st.resampled_items({"t": 200})["t"]
    e = st.bootstrap_estimate(values.mean(), st.resampled_mean(values, weights, picked), 200)
    t = st.mean_interval(values, weights)
    assert (e.low, e.high) == pytest.approx((t.low, t.high), abs=0.03)
    # Paired: a constant shift has no spread at all.
    shift = st.resampled_mean(values + 0.5, weights, picked) - st.resampled_mean(values, weights, picked)
    d = st.bootstrap_difference(0.5, shift, 200)
    assert (d.low, d.high) == pytest.approx((0.5, 0.5)) and d.p < 0.002


def test_the_minimum_of_tasks_is_taken_sample_by_sample():
    scores = {"a": np.array([0.1, 0.9]), "b": np.array([0.5, 0.2])}
    assert list(st.objective_of("min", {"a": 0.5, "b": 0.5}, scores)) == [0.1, 0.2]
    assert list(st.objective_of("mean", {"a": 0.25, "b": 0.75}, scores)) == pytest.approx([0.4, 0.375])
