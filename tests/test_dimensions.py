"""Dimensions: shares of the way through a range, and values."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.dimensions import Dimension

WEIGHT = Dimension("weight", -0.5, 1.5, 1.0)
DENSITY = Dimension("density", 0.01, 1.0, 0.1, log=True)
RANK = Dimension("rank", 2.0, 5.0, 4, integer=True)
SIZE = Dimension("size", 1.0, 1000.0, 10, log=True, integer=True)
MODE = Dimension("mode", 0.0, 2.0, "sum", choices=("mean", "sum", True), when="ties")
ALL = pytest.mark.parametrize("dimension", [WEIGHT, DENSITY, RANK, SIZE, MODE], ids=lambda d: d.name)


@ALL
@given(share=st.floats(0, 1))
def test_every_share_is_a_legal_value_and_comes_back(dimension: Dimension, share: float):
    value = dimension.at(share)
    assert dimension.holds(value)
    again = dimension.share(value)
    assert 0 <= again <= 1
    if dimension.choices or dimension.integer:
        assert dimension.at(again) == value
    else:
        assert again == pytest.approx(share, abs=1e-12)


@ALL
def test_the_ends_are_reached(dimension: Dimension):
    first, last = (
        (dimension.choices[0], dimension.choices[-1]) if dimension.choices else (dimension.low, dimension.high)
    )
    assert (dimension.at(0.0), dimension.at(1.0)) == (first, last)


def test_the_middle_of_a_range_by_factors_is_the_geometric_mean():
    assert DENSITY.at(0.5) == pytest.approx(math.sqrt(0.01 * 1.0))
    assert WEIGHT.at(0.5) == 0.5


@pytest.mark.parametrize("low", [5e-324, 2.3e-309, 1e-300])
def test_a_range_by_factors_may_span_more_than_a_float_holds(low: float):
    """high / low is infinite for the first two, and e^(log high - log low) for the first."""
    wide = Dimension("wide", low, 1e300, 1.0, log=True)
    assert (wide.at(0.0), wide.at(1.0)) == (low, 1e300)
    assert wide.at(0.5) == pytest.approx(math.exp((math.log(low) + math.log(1e300)) / 2))
    assert all(wide.share(wide.at(share)) == pytest.approx(share, abs=1e-12) for share in (0.0, 0.1, 0.5, 0.9, 1.0))


@pytest.mark.parametrize("dimension", [RANK, MODE], ids=lambda d: d.name)
def test_whole_numbers_and_choices_have_equal_parts(dimension: Dimension):
    counts = Counter(dimension.at((i + 0.5) / 1200) for i in range(1200))
    assert set(counts.values()) == {1200 // len(counts)} and len(counts) == (3 if dimension.choices else 4)


def test_what_a_dimension_does_not_hold():
    assert not any(WEIGHT.holds(v) for v in (math.nan, 1.6, -0.6, "1", None, True))
    assert RANK.holds(3) and not any(RANK.holds(v) for v in (2.5, 6, 1))
    assert MODE.holds("sum") and MODE.holds(True) and not any(MODE.holds(v) for v in (1, "SUM", 0.0, None))


def test_clip_moves_to_the_nearest_legal_value():
    assert (WEIGHT.clip(7.0), WEIGHT.clip(-7.0), WEIGHT.clip(0.25)) == (1.5, -0.5, 0.25)
    assert (RANK.clip(3.4), RANK.clip(9)) == (3, 5)
    assert MODE.clip("mean") == "mean"


@ALL
def test_plain_data_and_back(dimension: Dimension):
    assert Dimension.from_dict(json.loads(json.dumps(dimension.to_dict()))) == dimension


@ALL
def test_optuna_has_the_same_values(dimension: Dimension):
    distribution = dimension.distribution()
    for share in (0.0, 0.3, 0.7, 1.0):
        value = dimension.at(share)
        internal = distribution.to_internal_repr(value)
        assert distribution._contains(internal) and distribution.to_external_repr(internal) == value


def test_ranges_as_people_read_them():
    assert WEIGHT.text() == "-0.5 to 1.5" and MODE.text() == "mean | sum | true"
    assert SIZE.text() == "1 to 1000 (whole, log)" and MODE.initial_text() == "sum"
