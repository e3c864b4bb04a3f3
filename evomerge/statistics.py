"""Intervals and paired tests for scores that are means over items, or any function of them. 95% throughout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
FLIPS = 4999  # random sign flips; all 2^n of them for up to 12 items that differ
MOST_FLIPPED = 100  # with more items that differ, the paired t-test says the same, at once
RESAMPLES = 2000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval (None where there is nothing to compute one from) and its number of items."""

    value: float
    low: float | None
    high: float | None
    num_items: int


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95% interval and two-sided p-value."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    num_items: int
    test: str  # sign-flip, paired t, bootstrap, none


@dataclass(frozen=True)
class Stratum:
    """One task's items as two subjects saw them, and the factor by which the task's score is in the objective.

    ``first``, ``second``, ``weights``: (items,).
    """

    share: float
    first: Array
    second: Array
    weights: Array


def mean_interval(values: Array, weights: Array) -> Estimate:
    """The weighted mean of ``values``: (items,).

    Wilson's interval for unweighted 0/1 values (Wilson, JASA 22, 1927); otherwise Student's t, with the linearised
    variance of a ratio for weights (Cochran, Sampling Techniques, section 6.3).
    """
    n, shares = len(values), weights / weights.sum()
    mean = float(shares @ values)
    if np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all():
        interval = stats.binomtest(int(values.sum()), n).proportion_ci(LEVEL, method="wilson")
        return Estimate(mean, float(interval.low), float(interval.high), n)
    if n < 2:
        return Estimate(mean, None, None, n)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * math.sqrt(_variance_of_mean(values, shares))
    return Estimate(mean, mean - half, mean + half, n)


def combine(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The sum of share * estimate over independent parts, with shares >= 0.

    The interval puts the parts' own together ("square and add"; Zou and Donner, Stat. Med. 27, 2008, eq. 4), so that
    for one part of share 1 it is that part's own.
    """
    value = sum(share * e.value for share, e in parts)
    n = sum(e.num_items for _, e in parts)
    if any(e.low is None or e.high is None for share, e in parts if share):
        return Estimate(value, None, None, n)
    below = math.sqrt(sum((share * (e.value - (e.low or 0.0))) ** 2 for share, e in parts if share))
    above = math.sqrt(sum((share * ((e.high or 0.0) - e.value)) ** 2 for share, e in parts if share))
    return Estimate(value, value - below, value + above, n)


def paired_difference(strata: Sequence[Stratum], *, seed: int = 0) -> Difference:
    """First minus second of a weighted mean over tasks of means over items, on the same items.

    The interval is Student's t on the items' differences, stratified by task (degrees of freedom by Welch and
    Satterthwaite). The p-value comes from flipping the signs of the items' contributions (Fisher's randomisation test:
    under the null either subject could have had either outcome), exactly for few items that differ, and from the paired
    t where more than ``MOST_FLIPPED`` differ.
    """
    contributions, variances, freedoms = [], [], []
    for s in strata:
        shares = s.weights / s.weights.sum()
        difference = s.first - s.second
        contributions.append(s.share * shares * difference)
        if s.share:
            n = len(difference)
            variances.append(s.share**2 * _variance_of_mean(difference, shares) if n > 1 else math.nan)
            freedoms.append(n - 1)
    terms = np.concatenate(contributions)
    value, n = float(terms.sum()), len(terms)
    variance = sum(variances)
    if math.isnan(variance):
        low = high = t_p = None
    elif variance == 0.0:
        low = high = value
        t_p = 1.0 if value == 0.0 else 0.0
    else:
        freedom = variance**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
        error = math.sqrt(variance)
        half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
        low, high, t_p = value - half, value + half, float(2 * stats.t.sf(abs(value) / error, freedom))
    moved = terms[terms != 0.0]
    if len(moved) > MOST_FLIPPED and t_p is not None:
        return Difference(value, low, high, t_p, n, "paired t")
    return Difference(value, low, high, sign_flip_p(moved, seed=seed), n, "sign-flip")


def sign_flip_p(terms: Array, *, seed: int = 0) -> float:
    """Two-sided p of the sum of ``terms`` under independent random signs. ``terms``: (items,)."""
    terms = terms[terms != 0.0]
    if len(terms) < 2:
        return 1.0  # both signs of one item are as far from zero; SciPy asks for two
    result = stats.permutation_test(
        (terms,), lambda x, axis: np.sum(x, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=FLIPS, batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def resampled_items(
    sizes: Mapping[str, int], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, NDArray[np.intp]]:
    """Task -> item positions of ``resamples`` bootstrap samples, (resamples, items): the same for every subject."""
    return {
        task: np.random.default_rng([seed, zlib.crc32(task.encode())]).integers(0, n, (resamples, n))
        for task, n in sizes.items()
    }


def resampled_mean(values: Array, weights: Array, picked: NDArray[np.intp]) -> Array:
    """The weighted mean of each bootstrap sample: (resamples,)."""
    w = weights[picked]
    return (w * values[picked]).sum(1) / w.sum(1)


def bootstrap_estimate(value: float, samples: Array, num_items: int) -> Estimate:
    """``value`` with the percentile interval of its bootstrap ``samples`` (Efron and Tibshirani 1993, chapter 13)."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), num_items)


def bootstrap_difference(value: float, samples: Array, num_items: int) -> Difference:
    """A paired difference with percentile interval; p is twice the smaller share of samples on either side of zero."""
    e = bootstrap_estimate(value, samples, num_items)
    n = len(samples)
    tail = min((np.sum(samples <= 0) + 1) / (n + 1), (np.sum(samples >= 0) + 1) / (n + 1))
    return Difference(value, e.low, e.high, float(min(1.0, 2 * tail)), num_items, "bootstrap")


def objective_of(kind: str, shares: Mapping[str, float], scores: Mapping[str, Array]) -> Array:
    """The objective of each column of task scores, (n,): their weighted mean, or their minimum."""
    if kind == "min":
        return np.min(np.stack([scores[t] for t in shares]), axis=0)
    return np.sum(np.stack([shares[t] * scores[t] for t in shares]), axis=0)


def _variance_of_mean(values: Array, shares: Array) -> float:
    n, mean = len(values), shares @ values
    return float(np.sum((shares * (values - mean)) ** 2) * n / (n - 1))
