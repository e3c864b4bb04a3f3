"""NSGA-II: the contract, that generations count whatever fails, and that its fronts are as good as Optuna's."""

from __future__ import annotations

import json
import math

import numpy as np
import optuna
import pytest
from optuna._hypervolume.wfg import compute_hypervolume

from evomerge import pareto
from evomerge.errors import SpecError
from evomerge.searchers import make
from evomerge.searchers.base import Point, Told
from evomerge.searchers.nsga2 import NSGA2Searcher
from evomerge.space import Space
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_mixed_space, make_space, smooth, two


class TestNSGA2(SearcherContract):
    searcher = NSGA2Searcher
    improves_within = 100


class TestNSGA2SmallPopulation(SearcherContract):
    searcher = NSGA2Searcher
    options = {"population": 4}  # noqa: RUF012
    improves_within = 100
    kill_budget = 12


def study(score=smooth, *, seed: int = 0, space=None, population: int = 8, **settings) -> MemoryStudy:
    def made():
        return make("nsga2", space or make_space(), seed=seed, population=population, num_objectives=objectives)

    objectives = 2 if "values" in settings else 1
    return MemoryStudy(made, score, **settings)


def test_generations_need_all_earlier_ones_and_nothing_of_their_own():
    searcher = make("nsga2", make_space(), population=5)
    assert [searcher.needs(n) for n in range(12)] == [0] * 5 + [5] * 5 + [10] * 2


@pytest.mark.parametrize("failing", [0.3, 0.8])
def test_a_failure_is_part_of_its_generation(failing):
    """Any number of workers sees the same study, with failures and infeasible trials in every generation."""

    def score(point: Point) -> float | None:
        luck = (sum(point.values()) * 1e6) % 1
        return None if luck < failing else smooth(point)

    settings = {"values": two, "margins": lambda p: (p["e0[0-3]"] - 1.5,)}
    alone = study(score, **settings).run(60)
    assert any(told.state == "fail" for told in alone.results.values())
    for workers in (3, 8):
        assert study(score, workers=workers, order=workers, **settings).run(60).points == alone.points


def test_parents_are_the_best_of_all_that_was_told():
    """With elitism the parents after a generation are the best of every trial so far: fronts, then room."""
    whole = study(values=two, margins=lambda p: (p["e0[0-3]"] - 1.2,)).run(8).tell_all()
    told = list(whole.results.values())
    for generation in range(1, 6):
        values = np.array([t.values for t in told])
        order = pareto.best(values, [t.violation for t in told], 8)
        assert isinstance(whole.searcher, NSGA2Searcher)
        parents = whole.searcher._parents
        assert [p.n for p in parents] == [told[i].n for i in order]
        whole.run(8 * (generation + 1)).tell_all()
        told = parents + [whole.results[n] for n in range(8 * generation, 8 * (generation + 1))]


def test_failed_and_infeasible_trials_are_nobodys_parents_while_there_are_others():
    searcher = NSGA2Searcher(make_space(), population=4, num_objectives=2)
    told = [
        Told(0, searcher.ask(0), "complete", 5.0, (9.0, 1.0), (0.5,)),
        Told(1, searcher.ask(1), "fail", None),
        Told(2, searcher.ask(2), "complete", math.nan, (math.nan, 1.0), (0.0,)),
        Told(3, searcher.ask(3), "complete", 0.1, (0.1, 0.1), (-0.5,)),
    ]
    for trial in told:
        searcher.tell(trial)
    assert [t.n for t in searcher._parents] == [3, 0]


def test_bounds_are_reached():
    """The optimum is in a corner: many a coordinate must end on its very bound."""
    corner = study(lambda p: -sum(p.values()), population=8).run(400).points[-8:]
    assert min(sum(value == 0.0 for value in p.values()) for p in corner) >= 3


def test_children_of_other_methods_have_their_own_dimensions():
    space = make_mixed_space()
    whole = study(lambda p: -abs(p.get("ties.density", 0.0) - 0.3), space=space, population=8).run(120)
    assert {p["method"] for p in whole.points} == {"ties", "dare_ties", "task_arithmetic"}
    for point in whole.points:
        assert [d.name for d in space.dimensions if d.name in point] == list(point)
        assert set(point) == {d.name for d in space.active(point["method"])}
    assert len({json.dumps(p) for p in whole.points}) == 120


def test_a_space_with_few_points_goes_on_when_all_were_tried():
    choices = {"normalize": {"choices": [True, False]}, "mode": {"choices": ["mean", "sum"]}}
    weights = {"granularity": "task", "range": [0.0, 1.0], "fixed": {f"e{t}": 0.5 for t in range(3)}}
    space = Space.from_dict(
        {"method": "ties", "params": choices, "weights": weights}, template=make_space().template, num_layers=8
    )
    whole = study(lambda _: 0.5, space=space, population=4).run(30)
    assert len({json.dumps(p) for p in whole.points}) == 4


def volume(values, reference) -> float:
    inside = [v for v in values if all(a > r for a, r in zip(v, reference, strict=True))]
    return float(compute_hypervolume(-np.array([*inside, reference]), -np.array(reference)))


def test_its_fronts_are_as_good_as_those_of_optunas_sampler():
    """Hypervolume after 120 trials in 6 dimensions, against Optuna's sampler with the same population, and random."""
    space = make_space(groups=2)
    goals, scale = np.random.default_rng(1).uniform([0.1, 0.5], [1.6, 2.0], (6, 2, 2)).transpose(2, 1, 0)

    def values(point: Point) -> tuple[float, ...]:
        x = np.array(list(point.values()))
        return tuple(-float((s * (x - g) ** 2).mean()) for g, s in zip(goals, scale, strict=True))

    def ours(seed: int, method: str) -> float:
        made = MemoryStudy(lambda: make(method, space, seed=seed, num_objectives=2), smooth, values=values).run(120)
        return volume([t.values for t in made.results.values()], reference)

    def optunas(seed: int) -> float:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.NSGAIISampler(population_size=12, seed=seed)
        reference_study = optuna.create_study(directions=[optuna.study.StudyDirection.MAXIMIZE] * 2, sampler=sampler)
        reference_study.enqueue_trial(space.initial())
        for _ in range(120):
            trial = reference_study.ask({d.name: d.distribution() for d in space.dimensions})
            reference_study.tell(trial, values(trial.params))
        return volume([t.values for t in reference_study.trials], reference)

    reference = [v - 1.0 for v in values(space.initial())]
    seeds = range(4)
    mine = sum(ours(seed, "nsga2") for seed in seeds)
    assert mine > 0.99 * sum(optunas(seed) for seed in seeds)
    assert mine > 1.02 * sum(ours(seed, "random") for seed in seeds)


@pytest.mark.parametrize("options", [{"population": 3}, {"population": 8.5}, {"populaton": 8}], ids=str)
def test_bad_options(options: dict):
    with pytest.raises(SpecError, match=next(iter(options))):
        make("nsga2", make_space(), **options)
