"""AdaMerging: the contract of searchers with an oracle that differentiates a known function, and what it refuses."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError, SpecError
from evomerge.losses import LOSSES
from evomerge.searchers import adamerging
from evomerge.searchers.adamerging import AdaMergingSearcher
from evomerge.searchers.base import SearcherDrift
from evomerge.space import Space
from evomerge.testing.searchers import KnownOracle, SearcherContract, make_mixed_space, make_space


class Ready(AdaMergingSearcher):
    """With an oracle, as a study would have given it."""

    known: KnownOracle


def ready(space: Space, *, seed: int = 0, oracle: dict[str, Any] | None = None, **options: Any) -> Ready:
    searcher = Ready(space, seed=seed, **{"steps": 40, "every": 10, "lr": 0.05, "batch": 4} | options)
    searcher.oracle = searcher.known = KnownOracle(space, **(oracle or {}))
    return searcher


class TestAdaMerging(SearcherContract):
    searcher = AdaMergingSearcher
    options: ClassVar = {"steps": 120, "every": 2, "lr": 0.03, "batch": 4}
    scores = False
    improves_within = 60
    budget = 24
    kill_budget = 8


def test_losses_are_those_that_there_are():
    assert set(adamerging.LOSSES) == set(LOSSES)
    assert set(adamerging.OWN_EXPERTS) == {name for name, loss in LOSSES.items() if loss.teacher}


def test_it_is_adam_on_the_mean_over_tasks_by_their_weights():
    """Held against torch.optim.Adam on the same function, written as a loss of a tensor."""
    space = make_space(experts=2, groups=2, initial=0.3)
    searcher = ready(space, oracle={"weights": {"one": 3.0, "two": 1.0}})
    oracle = searcher.known
    x = torch.nn.Parameter(torch.full((4,), 0.3, dtype=torch.float64))  # in the order of the dimensions
    adam = torch.optim.Adam([x], lr=0.05)
    points = [searcher.ask(n) for n in range(5)]
    for n, point in enumerate(points):
        np.testing.assert_allclose(list(point.values()), x.detach().numpy(), rtol=1e-12)
        for step in range(10 * n, 10 * n + 10) if n < 4 else ():
            batches = dict(oracle.calls[step][1])
            # decode's groups are regions, with a weight an expert; dimensions go expert by expert
            weights = x.reshape(2, 2).T.reshape(-1)
            loss = torch.zeros((), dtype=torch.float64)
            for task, share in (("one", 0.75), ("two", 0.25)):
                for item in batches[task]:
                    places = torch.tensor(0.6 + 0.1 * np.random.default_rng(int(item[1:])).normal(size=4))
                    loss = loss + share * 0.5 * ((weights - places) ** 2).sum() / len(batches[task])
            adam.zero_grad()
            loss.backward()
            adam.step()


def test_pieces_of_a_batch_count_by_their_items():
    space = make_space()
    whole, cut = ready(space, batch=10), ready(space, batch=10, oracle={"piece": 3})
    for n in range(5):
        np.testing.assert_allclose(list(whole.ask(n).values()), list(cut.ask(n).values()), rtol=1e-12)
    assert max(len(items) for _, batches, _ in cut.known.calls for _, items in batches) == 3


def test_the_curve_has_a_row_a_step_since_the_last_proposal():
    searcher = ready(make_space())
    searcher.ask(0)
    assert searcher.curve == []
    searcher.ask(1)
    assert [row["step"] for row in searcher.curve] == list(range(10))
    searcher.ask(2)
    assert [row["step"] for row in searcher.curve] == list(range(10, 20))
    for row in searcher.curve:
        assert row["loss"] == pytest.approx((row["tasks"]["one"] + row["tasks"]["two"]) / 2, rel=1e-12)
        assert row["gradient"] > 0
    assert searcher.curve[-1]["loss"] < 0.3


def test_tasks_in_turn():
    searcher = ready(make_space(), tasks=1)
    searcher.ask(1)
    assert [[task for task, _ in batches] for _, batches, _ in searcher.known.calls] == [["one"], ["two"]] * 5


@pytest.mark.parametrize("steps", range(1, 40, 7))
@pytest.mark.parametrize(
    "options", [{}, {"constraint": "softmax"}, {"patience": 3, "holdout": 0.2, "pull": 0.1}], ids=str
)
def test_a_state_that_went_through_json_goes_on_with_the_same_bits(steps, options):
    space = make_space(low=0.0, high=6.0)
    whole = ready(space, **options)
    points = [whole.ask(n) for n in range(whole.size)]

    class Killed(BaseException):
        pass

    broken = ready(space, **options)
    oracle, told = broken.known, broken.known.gradients

    def dying(step, *args, **more):
        if step == steps:
            raise Killed
        return told(step, *args, **more)

    oracle.gradients = dying
    n = 0
    try:
        while True:
            assert broken.ask(n) == points[n]
            n += 1
    except Killed:
        state, curve = json.loads(json.dumps([broken.state(), broken.curve]))
    again = ready(space, **options)
    again.restored = n  # as the study says
    again.restore(state, curve)
    for earlier in range(n):
        again.replay(earlier, points[earlier])
    assert not again.known.calls
    assert [again.ask(m) for m in range(n, whole.size)] == points[n:]
    assert [again.state(), again.curve] == [whole.state(), whole.curve]
    assert min((call[0] for call in again.known.calls), default=steps) == steps


def test_a_state_that_is_not_the_trials_is_refused():
    searcher = ready(make_space())
    point = searcher.ask(1)
    with pytest.raises(SearcherDrift, match="proposal 1"):
        searcher.replay(1, point | {next(iter(point)): 1.999})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_training_that_fails_says_where_and_proposes_no_more(bad):
    space = make_space()
    searcher = ready(space)
    told = searcher.known.gradients

    def failing(step, point, batches, **more):
        if step == 13:
            raise CandidateError("nan", f"step {step}, task two: the loss is {bad}")
        return told(step, point, batches, **more)

    searcher.known.gradients = failing
    points = [searcher.ask(n) for n in range(3)]
    assert searcher.failure(0) is searcher.failure(1) is None
    assert searcher.failure(2) == f"step 13, task two: the loss is {bad}"
    assert searcher.ended(2) is None and "task two" in str(searcher.ended(3))
    space.decode(points[2])
    again = ready(space)
    again.restored = 2
    again.restore(json.loads(json.dumps(searcher.state())), searcher.curve)
    again.replay(1, points[1])
    assert again.ask(2) == points[2] and again.failure(2) == searcher.failure(2)
    assert not again.known.calls


def test_a_gradient_beyond_numbers_is_a_failure():
    searcher = ready(make_space(), oracle={"function": lambda weights, item: (1.0, [1e200] * len(weights))})
    before = searcher.ask(0)
    assert searcher.ask(1) == before
    assert "step 0" in str(searcher.failure(1)) and "too large" in str(searcher.failure(1))


def test_other_errors_are_the_studys_affair():
    searcher = ready(make_space())

    def broken(*args, **more):
        raise CandidateError("error", "what is this")

    searcher.known.gradients = broken
    with pytest.raises(CandidateError, match="what is this"):
        searcher.ask(1)
    assert searcher.failure(1) is None


def test_it_stops_when_held_out_items_get_worse():
    """Items to train on draw the weights to 1.5; those held out are best at about 0.9."""

    def drawn(weights, item):
        place = 0.9 if int(item[1:]) >= 100 else 1.5
        away = np.array(weights) - place
        return float(away @ away) / 2, away.tolist()

    searcher = ready(make_space(initial=0.5), steps=200, patience=2, holdout=0.2, lr=0.01, oracle={"function": drawn})
    points = []
    while searcher.ended(len(points)) is None and len(points) < searcher.size:
        points.append(searcher.ask(len(points)))
    losses = [sum(drawn(list(p.values()), "t100")[0] for _ in range(1)) for p in points]
    best = int(np.argmin(losses))
    assert 0 < best == len(points) - 3 < searcher.size - 3
    assert str(10 * best) in str(searcher.ended(len(points)))
    assert {learn for _, _, learn in searcher.known.calls} == {True, False}
    held = {item for _, batches, learn in searcher.known.calls if not learn for _, items in batches for item in items}
    assert held == {item for items in searcher.known.held.values() for item in items}


def test_beyond_its_size_there_is_nothing():
    searcher = ready(make_space(), steps=29)
    assert searcher.size == 3 and searcher.progress == (0, 20)
    assert [searcher.ask(n) for n in range(3)]
    with pytest.raises(ValueError, match="3 proposals"):
        searcher.ask(3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 50, "steps": 10}, "every <= steps"),
        ({"patience": 2}, "holdout"),
        ({"loss": "perplexity"}, "entropy"),
        ({"lr": 0}, "lr"),
        ({"constraint": "softmax"}, r"\[0, 3\]"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(SpecError, match=words):
        AdaMergingSearcher(make_space(), **options)


def test_several_starts_are_refused():
    space = make_space()
    with pytest.raises(SpecError, match="one point"):
        AdaMergingSearcher(space, starts=[space.initial(), space.at([0.1] * 6)])


@pytest.mark.parametrize("choice", [False, True])
def test_spaces_with_dimensions_that_are_no_weights_are_refused_by_name(choice):
    with pytest.raises(SpecError, match=r"ties.density|density") as raised:
        AdaMergingSearcher(make_mixed_space(choice))
    assert "tpe" in str(raised.value)
