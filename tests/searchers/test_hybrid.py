"""Hybrid: the contract of searchers with an oracle that differentiates a known function; what each part begins with."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import CandidateError, SpecError
from evomerge.searchers import SEARCHERS
from evomerge.searchers.base import Point
from evomerge.searchers.hybrid import CONDITION, HybridSearcher, shape_of, signs_or_axes
from evomerge.space import Space
from evomerge.testing.searchers import KnownOracle, MemoryStudy, SearcherContract, make_mixed_space, make_space, smooth

SHORT = {"steps": 20, "every": 5, "lr": 0.05, "batch": 4, "candidates": 20, "refine": 10, "product_batch": 4}
FIRST, LAST = 5, 25  # with SHORT: the first trial of CMA-ES, and that of the second descent


class Ready(HybridSearcher):
    """With an oracle, as a study would have given it."""

    known: KnownOracle


def ready(space: Space, *, seed: int = 0, oracle: dict[str, Any] | None = None, **options: Any) -> Ready:
    searcher = Ready(space, seed=seed, **SHORT | options)
    searcher.oracle = searcher.known = KnownOracle(space, **(oracle or {}))
    return searcher


def study(score=smooth, *, space: Space | None = None, workers: int = 1, order: int = 0, **options: Any) -> MemoryStudy:
    space = space or make_space()
    return MemoryStudy(lambda: ready(space, **options), score, workers=workers, order=order)


class TestHybrid(SearcherContract):
    searcher = HybridSearcher
    options: ClassVar = {
        **SHORT,
        "steps": 10,
        "every": 2,
        "candidates": 60,
        "refine": 6,
        "products": 3,
    }
    improves_within = 60
    budget = 72
    kill_budget = 22


# --- the shape of the loss


def quadratic(dims: int, seed: int) -> np.ndarray:
    """A positive definite matrix whose eigenvalues lie within CONDITION of each other."""
    draws = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(draws.normal(size=(dims, dims)))
    return (turned * np.exp(draws.uniform(0, math.log(CONDITION), dims))) @ turned.T


@given(dims=st.integers(1, 12), seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_of_all_products_the_shape_is_the_inverse_of_the_hessian(dims, seed, scale):
    hessian = quadratic(dims, seed)
    vectors = signs_or_axes(seed, dims, products=12)
    shape = shape_of(vectors, scale * vectors @ hessian)
    assert shape is not None
    np.testing.assert_allclose(shape @ hessian, np.eye(dims) * (shape @ hessian)[0, 0], atol=1e-8 * CONDITION)
    assert np.linalg.det(shape) == pytest.approx(1, rel=1e-6)


@given(dims=st.integers(20, 40), seed=st.integers(0, 999))
def test_of_a_diagonal_hessian_one_product_of_signs_tells_all(dims, seed):
    """With off-diagonal zeros the estimate of the diagonal has no error: v (H v) = diag(H) v v = diag(H)."""
    curvature = np.random.default_rng(seed).uniform(1, 50, dims)
    vectors = signs_or_axes(seed, dims, products=1)
    assert vectors.shape == (1, dims) and set(np.abs(vectors).ravel()) == {1}
    shape = shape_of(vectors, vectors * curvature)
    assert shape is not None
    expected = 1 / curvature
    np.testing.assert_allclose(shape, expected / np.exp(np.log(expected).mean()), rtol=1e-10)


def test_the_estimate_of_a_diagonal_comes_closer_with_more_products():
    hessian = quadratic(40, seed=1)
    errors = []
    for count in (1, 16, 39):
        vectors = signs_or_axes(3, 40, count)
        errors.append(np.abs((vectors * (vectors @ hessian)).mean(axis=0) - np.diag(hessian)).mean())
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_negative_curvature_counts_by_its_size_and_none_by_the_least():
    shape = shape_of(np.eye(3), np.diag([4.0, -1.0, 0.0]))
    variances = np.array([1 / 4, 1, CONDITION / 4])
    np.testing.assert_allclose(shape, np.diag(variances / np.cbrt(variances.prod())), atol=1e-12)


def test_without_any_curvature_there_is_no_shape():
    assert shape_of(np.eye(3), np.zeros((3, 3))) is None


def test_products_are_those_of_the_loss_in_shares_of_the_ranges():
    """Items draw the weights to places by |w - place|^2 / 2: H is 1 by the weights, the range's square by shares."""
    space = make_space(experts=2, groups=1, high=3.0, initial=0.0)
    searcher = ready(space)
    run = MemoryStudy(lambda: searcher, smooth)
    run.run(FIRST + 1)
    np.testing.assert_allclose(searcher.state()["products"], 9 * np.eye(2), atol=1e-9)


@pytest.mark.parametrize("groups", [2, 8])  # 6 dimensions: all products; 24: the diagonal
def test_the_first_samples_are_drawn_in_the_shape_of_the_loss(groups):
    """A loss that is 25 times as curved in one dimension: CMA-ES's steps there are 5 times as short."""

    def steep(weights, item):
        curvature = np.array([25.0] + [1.0] * (len(weights) - 1))
        away = np.array(weights) - 0.9
        return float(curvature @ away**2) / 2, (curvature * away).tolist()

    space = make_space(groups=groups, high=2.0, initial=0.9)
    searcher = ready(space, candidates=400, population=400, oracle={"function": steep}, steps=5)
    run = MemoryStudy(lambda: searcher, smooth, workers=400).run(300)
    steps = np.array([list(point.values()) for point in run.points[2:300]]) - 0.9
    spread = steps.std(axis=0)
    assert spread[1:].mean() / spread[0] == pytest.approx(5, rel=0.25)


# --- what each part begins with


def test_it_descends_then_searches_then_descends():
    run = study().run(1000)
    searcher = run.searcher
    assert len(run.points) == searcher.size == LAST + 2 and searcher.progress == (42, 42)  # 20 + 2 * 6 + 10
    descent = SEARCHERS["adamerging"](make_space(), steps=20, every=5, lr=0.05, batch=4)
    descent.oracle = KnownOracle(make_space())
    assert run.points[:FIRST] == [descent.ask(n) for n in range(FIRST)]
    assert searcher.ended(LAST + 2) is None
    with pytest.raises(ValueError, match="27 proposals"):
        searcher.ask(LAST + 2)


def test_cma_begins_at_the_best_candidate_by_score_and_hears_of_the_others_without_evaluating_them_again():
    favourite: list[Point] = []

    def score(point: Point) -> float:
        """The third candidate is the best of the first five; after that whatever is near it."""
        favourite.append(point)
        return 1.0 if len(favourite) == 3 else -float(len(favourite))

    run = study(score, sigma=0.001, candidates=6).run(FIRST + 6)
    third = np.array(list(run.points[2].values()))
    for n in range(FIRST, FIRST + 4):  # of a first generation of nine, told of four
        assert np.abs(np.array(list(run.points[n].values())) - third).max() < 0.02
    assert run.searcher._given == 4 and run.searcher._cma.population == 9
    assert len({tuple(point.values()) for point in run.points}) == len(run.points)


def test_needs_of_the_first_generation_are_the_descents():
    run = study().run(1000)
    needed = [ready(make_space()).needs(n) for n in range(LAST + 2)]
    assert needed[:FIRST] == [0] * FIRST and needed[FIRST] == FIRST and needed[LAST:] == [LAST, LAST]
    told = 9 - 4  # of a population of nine, four were told of
    assert [run.searcher.needs(n) for n in (FIRST, FIRST + told - 1, FIRST + told)] == [FIRST, FIRST, FIRST + told]


def test_the_second_descent_begins_at_the_best_of_all():
    run = study(lambda point: -abs(sum(point.values()) - 5.0), lr=0.001).run(1000)
    best = max(run.results.values(), key=lambda told: (told.score, -told.n) if told.n < LAST else (-math.inf, 0))
    away = np.array(list(run.points[LAST].values())) - np.array(list(best.point.values()))
    assert 0 < np.abs(away).max() <= 5 * 0.001 * 1.01  # Adam moves by no more than lr a step


def test_without_a_second_descent_or_products():
    run = study(refine=0, products=0).run(1000)
    assert len(run.points) == LAST and run.searcher.progress == (20, 20) and run.searcher.state()["products"] == []


# --- deaths and failures


@pytest.mark.parametrize("calls", range(0, 42, 3))
def test_a_state_that_went_through_json_goes_on_with_the_same_bits(calls):
    """Killed in any of its parts: 20 steps, 12 gradients of products, 10 steps."""
    whole = study().run(1000)

    class Killed(BaseException):
        pass

    broken = study()
    oracle, told = broken.searcher.known, broken.searcher.known.gradients

    def dying(*args, **more):
        if len(oracle.calls) == calls:
            raise Killed
        return told(*args, **more)

    oracle.gradients = dying
    with pytest.raises(Killed):
        broken.run(1000)
    state, curve = json.loads(json.dumps([broken.searcher.state(), broken.searcher.curve]))
    again = ready(make_space())
    again.restored = len(broken.points)  # as the study says
    again.restore(state, curve)
    broken.make = lambda: again
    broken.kill()
    assert not again.known.calls
    assert broken.run(1000).points == whole.points
    kept = 20 + (calls - 20) // 2 * 2 if 20 <= calls < 32 else calls  # half a product is none
    assert len(again.known.calls) == 42 - kept
    assert [again.state(), again.curve] == [whole.searcher.state(), whole.searcher.curve]


def failing(searcher: Ready, call: int) -> Ready:
    """The oracle's call number ``call`` finds no number."""
    oracle, told = searcher.known, searcher.known.gradients

    def gradients(step, *args, **more):
        found = told(step, *args, **more)
        if len(oracle.calls) == call + 1:
            raise CandidateError("nan", f"step {step}, task two: the loss is nan")
        return found

    oracle.gradients = gradients
    return searcher


def test_when_the_first_descent_fails_cma_goes_on_from_what_there_is():
    run = MemoryStudy(lambda: failing(ready(make_space()), 12), smooth).run(1000)
    searcher = run.searcher
    assert searcher.failure(3) == "step 12, task two: the loss is nan" and searcher.failure(4) is None
    assert run.points[3] != run.points[2]  # what it had come to; the study records it as failed
    assert searcher.state()["products"] and searcher.ended(3 + 1 + 20 + 1) is None
    assert "4 of 5" in str(searcher.ended(4 + 20 + 2))


def test_when_a_product_is_no_number_cma_begins_round():
    run = MemoryStudy(lambda: failing(ready(make_space()), 23), smooth).run(1000)
    round_ = study(products=0).run(1000)
    assert run.points[FIRST:LAST] == round_.points[FIRST:LAST]
    assert "nan" in run.searcher.state()["no_shape"]


def test_when_the_second_descent_fails_it_ends():
    run = MemoryStudy(lambda: failing(ready(make_space()), 20 + 12 + 3), smooth).run(LAST + 1)
    assert run.searcher.failure(LAST) == "step 23, task two: the loss is nan"
    assert run.searcher.ended(LAST) is None and "second descent failed" in str(run.searcher.ended(LAST + 1))


def test_when_no_candidate_could_be_evaluated_cma_begins_at_the_start():
    run = study(lambda point: None, sigma=0.001).run(FIRST + 3)
    for point in run.points[FIRST:]:
        assert np.abs(np.array(list(point.values())) - 1.0).max() < 0.02


# --- what it refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 50, "steps": 10}, "every <= steps"),
        ({"constraint": "softmax"}, "constraint"),
        ({"candidates": 0}, "candidates"),
        ({"population": 2}, "population"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(SpecError, match=words):
        HybridSearcher(make_space(), **options)


def test_spaces_with_dimensions_that_are_no_weights_are_refused_by_name():
    with pytest.raises(SpecError, match="searcher hybrid moves weights only, but ") as raised:
        HybridSearcher(make_mixed_space(False))
    assert "tpe" in str(raised.value)


def test_several_objectives_are_refused():
    with pytest.raises(SpecError, match="one objective"):
        HybridSearcher(make_space(), num_objectives=2)
