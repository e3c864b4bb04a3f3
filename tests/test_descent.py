"""The arithmetic of a descent on merging coefficients: Adam, constraints, batches, the chain rule."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import descent
from evomerge.descent import Box, Chain, Descent, Simplex, State, box, simplex
from evomerge.errors import SpecError
from evomerge.space import Moving, Space
from evomerge.testing.searchers import make_space


def wide(dims: int) -> Box:
    return Box(np.full(dims, -np.inf), np.full(dims, np.inf))


def made(**weights) -> Space:
    """Three experts e0, e1, e2 in a model with 8 layers."""
    data = {"method": "task_arithmetic", "weights": {"granularity": "task", "range": [0.0, 2.0], **weights}}
    return Space.from_dict(data, template=make_space().template, num_layers=8)


# --- Adam


@pytest.mark.parametrize("lr", [1e-3, 0.5])
def test_adam_is_torchs(lr):
    draw = np.random.default_rng(0)
    start = draw.normal(size=7)
    gradients = draw.normal(size=(200, 7)) * 10.0 ** draw.integers(-6, 6, size=(200, 7))
    parameter = torch.nn.Parameter(torch.tensor(start))
    adam = torch.optim.Adam([parameter], lr=lr)
    ours = Descent(start, wide(7), lr=lr)
    state = ours.begin()
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        adam.step()
        state = ours.step(state, gradient)
        np.testing.assert_allclose(ours.values(state), parameter.detach().numpy(), rtol=1e-12, atol=1e-12)
    assert state.step == 200


def test_the_first_step_moves_each_weight_by_the_rate_against_its_slope():
    """Kingma and Ba, section 2.1: at t = 1 the step is lr * g / (|g| + epsilon)."""
    ours = Descent(np.zeros(3), wide(3), lr=0.25)
    state = ours.step(ours.begin(), np.array([1e3, -1e-3, 0.0]))
    np.testing.assert_allclose(ours.values(state), [-0.25, 0.25, 0.0], rtol=1e-4)


def test_values_stay_in_their_ranges():
    ours = Descent(np.array([0.1, 0.9]), Box(np.zeros(2), np.ones(2)), lr=0.3)
    state = ours.begin()
    for _ in range(20):
        state = ours.step(state, np.array([1.0, -1.0]))
        assert ((ours.values(state) >= 0) & (ours.values(state) <= 1)).all()
    assert ours.values(state).tolist() == [0.0, 1.0]


def test_a_pull_holds_the_weights_near_their_start():
    """The minimum of (x - 3)^2 / 2 + pull (x - 1)^2 / 2 is (3 + pull) / (1 + pull)."""
    for pull in (0.0, 1.0, 9.0):
        ours = Descent(np.array([1.0]), wide(1), lr=0.05, pull=pull)
        state = ours.begin()
        for _ in range(3000):
            state = ours.step(state, ours.values(state) - 3)
        assert ours.values(state)[0] == pytest.approx((3 + pull) / (1 + pull), abs=1e-3)


def test_a_state_that_went_through_json_goes_on_with_the_same_bits():
    draw = np.random.default_rng(1)
    ours = Descent(draw.random(5), Box(np.zeros(5), np.ones(5)), lr=0.1, pull=0.3)
    state = again = ours.begin()
    for gradient in draw.normal(size=(30, 5)):
        state = ours.step(state, gradient)
        again = ours.step(State.from_dict(json.loads(json.dumps(again.to_dict()))), gradient)
    assert state.to_dict() == again.to_dict()


def test_a_state_says_whether_it_is_finite():
    ours = Descent(np.zeros(2), wide(2))
    assert ours.begin().is_finite
    assert not ours.step(ours.begin(), np.array([1.0, math.inf])).is_finite


# --- weights that keep their sum


def test_softmax_keeps_the_sum_of_each_region_and_stays_positive():
    space = made(granularity="layer_groups", groups=2, initial=0.3, range=[0.0, 0.9])
    start = space.initial() | {"e0[0-3]": 0.1, "e1[0-3]": 0.2}
    rule = simplex(space, start)
    ours = Descent(np.array([start[d.name] for d in space.dimensions]), rule, lr=0.5)
    state = ours.begin()
    np.testing.assert_allclose(ours.values(state), ours.start, rtol=1e-12)
    draw = np.random.default_rng(0)
    for _ in range(50):
        state = ours.step(state, draw.normal(size=6) + np.array([5, 0, 0, 0, 0, 0]))
    point = dict(zip((d.name for d in space.dimensions), ours.values(state).tolist(), strict=True))
    space.decode(point)  # inside the ranges
    assert sum(v for k, v in point.items() if "[0-3]" in k) == pytest.approx(0.6, rel=1e-12)
    assert sum(v for k, v in point.items() if "[4-7]" in k) == pytest.approx(0.9, rel=1e-12)
    assert min(point.values()) > 0


def test_tied_experts_count_as_many_as_they_are():
    space = made(tied=[["e0", "e1"]], initial=0.5)
    rule = simplex(space, space.initial())
    x = rule.coordinates(np.array([0.5, 0.5])) + np.array([1.0, 0.0])
    tied, alone = rule.values(x)
    assert 2 * tied + alone == pytest.approx(1.5, rel=1e-12)
    assert tied > 0.5 > alone


@pytest.mark.parametrize("tied", [[], [["e0", "e2"]]])
def test_the_gradient_by_the_coordinates_is_that_of_central_differences(tied):
    space = made(granularity="layer_groups", groups=2, tied=tied, initial=0.4)
    rule = simplex(space, space.initial())
    draw = np.random.default_rng(3)
    x, slope = draw.normal(size=len(space.dimensions)), draw.normal(size=len(space.dimensions))
    step = 1e-6
    numeric = [
        (slope @ rule.values(x + step * unit) - slope @ rule.values(x - step * unit)) / (2 * step)
        for unit in np.eye(len(x))
    ]
    np.testing.assert_allclose(rule.pull_back(x, slope), numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"granularity": "global"}, "only weight"),
        ({"fixed": {"e0": 1, "e1": 1}}, "only weight"),
        ({"initial": 0.0}, "starts at 0"),
        ({"range": [0.1, 3.0], "initial": 0.5}, r"\[0, 1.5\]"),
        ({"range": [0.0, 1.0], "initial": 0.5}, r"\[0, 1.5\]"),
    ],
    ids=str,
)
def test_spaces_that_cannot_keep_a_sum_are_refused(weights, words):
    space = made(**weights)
    with pytest.raises(SpecError, match=words) as raised:
        simplex(space, space.initial())
    assert "constraint: box" in str(raised.value)


def test_regions_that_share_some_weights_are_refused():
    space = made(granularity="layer_groups", groups=2, range=[0.0, 3.0])
    mixed = replace(space.regions[1], weights=(Moving("e0[0-3]"), *space.regions[1].weights[1:]))
    with pytest.raises(SpecError, match="several parts"):
        simplex(replace(space, regions=(space.regions[0], mixed)), space.initial())


# --- the chain rule


def test_a_dimension_gets_the_sum_of_the_gradients_of_all_weights_that_it_is():
    """Hand-made: two regions of three experts, numbered row by row; e1 is fixed."""
    space = made(granularity="layer_groups", groups=2, fixed={"e1": 0.5})
    assert [d.name for d in space.dimensions] == ["e0[0-3]", "e0[4-7]", "e2[0-3]", "e2[4-7]"]
    assert Chain(space).to_dimensions([1, 2, 3, 10, 20, 30]).tolist() == [1, 10, 3, 30]
    assert Chain(made(granularity="global")).to_dimensions([1, 2, 4]).tolist() == [7]
    assert Chain(made(tied=[["e0", "e2"]])).to_dimensions([1, 2, 4]).tolist() == [5, 2]
    with pytest.raises(ValueError, match="6 numbers"):
        Chain(space).to_dimensions([1, 2, 3])


@pytest.mark.parametrize("weights", [{"granularity": "global"}, {"granularity": "layer", "tied": [["e1", "e2"]]}])
def test_the_chain_rule_is_that_of_decode(weights):
    """A function that is linear in the recipe's weights has the slopes that central differences through decode give."""
    space = made(**weights)
    point, chain = space.initial(), Chain(space)
    draw = np.random.default_rng(0)
    slopes = draw.normal(size=chain.shape)

    def loss(at):
        return sum(float(s @ np.array(g.weights)) for s, g in zip(slopes, space.decode(at).groups, strict=True))

    numeric = [
        (loss(point | {d.name: point[d.name] + 0.25}) - loss(point | {d.name: point[d.name] - 0.25})) / 0.5
        for d in space.dimensions
    ]
    np.testing.assert_allclose(chain.to_dimensions(slopes.ravel()), numeric, rtol=1e-9, atol=1e-12)


def test_a_box_has_the_ranges_of_the_space():
    rule = box(made(range=[0.25, 1.75]))
    assert rule.low.tolist() == [0.25] * 3 and rule.high.tolist() == [1.75] * 3
    assert rule.project(np.array([0.0, 1.0, 9.0])).tolist() == [0.25, 1.0, 1.75]


# --- items

names = st.lists(st.text(max_size=5), min_size=1, max_size=40, unique=True)


@settings(max_examples=50, deadline=None)
@given(items=names, size=st.integers(1, 50), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_an_epoch_has_every_item_once_in_even_batches(items, size, seed, epoch):
    count = math.ceil(len(items) / size)
    batches = [
        descent.batch(items, seed=seed, task="one", turn=turn, size=size)
        for turn in range(epoch * count, (epoch + 1) * count)
    ]
    assert sorted(item for one in batches for item in one) == sorted(items)
    assert max(map(len, batches)) <= size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_epochs_tasks_and_seeds_have_orders_of_their_own():
    items = [str(i) for i in range(30)]

    def order(seed=0, task="one", epoch=0):
        return descent.batch(items, seed=seed, task=task, turn=epoch, size=30)

    assert order() == order()
    assert len({order(), order(seed=1), order(task="two"), order(epoch=1), order(epoch=2)}) == 5


@given(count=st.integers(0, 6), tasks=st.integers(1, 5), steps=st.integers(1, 12))
def test_tasks_have_their_turns_one_after_the_other(count, tasks, steps):
    named = [f"t{i}" for i in range(tasks)]
    had = dict.fromkeys(named, 0)
    for step in range(steps):
        taken = descent.turns(step, named, count)
        assert len({name for name, _ in taken}) == len(taken) == (min(count, tasks) or tasks)
        for name, turn in taken:
            assert turn == had[name]
            had[name] += 1
    assert max(had.values()) - min(had.values()) <= 1


@given(items=names, share=st.floats(0, 0.9), seed=st.integers(0, 3))
def test_held_out_items_are_never_trained_on(items, share, seed):
    train, held = descent.hold_out(items, seed=seed, task="one", share=share)
    assert set(train).isdisjoint(held) and {*train, *held} == set(items)
    assert train and (bool(held) == (share > 0 and len(items) > 1))
    assert [item for item in items if item in set(train)] == list(train)
    assert abs(len(held) - share * len(items)) <= 1
    assert (train, held) == descent.hold_out(items, seed=seed, task="one", share=share)


@given(items=names, size=st.integers(1, 50))
def test_pieces_are_the_items_in_their_order(items, size):
    cut = descent.pieces(items, size)
    assert [item for piece in cut for item in piece] == items
    assert len(cut) == math.ceil(len(items) / size) and max(map(len, cut)) <= size


def test_simplex_without_parts_moves_nothing():
    rule = Simplex((), np.ones(2))
    assert rule.pull_back(np.ones(2), np.ones(2)).tolist() == [0, 0]
