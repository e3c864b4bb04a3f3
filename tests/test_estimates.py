"""Intervals and tests of an objective: a relative score is what the same score would be of items that are relative."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from evomerge.estimates import Estimates
from evomerge.evaluation import Outcome
from evomerge.objective_file import ObjectiveSpec
from evomerge.objectives import Objective
from evomerge.store import Evaluation

WEIGHTS = {"add": 3.0, "loss": 1.0}
REFERENCES = {"control:expert:add": {"add": 0.8, "loss": -9.0}, "control:expert:loss": {"add": 0.1, "loss": -1.6}}
KEYS = itertools.count()
METRICS = {task: {"metric": "m", "item_mean": True} for task in WEIGHTS}
ITEM_TASKS = {f"{task}/{i}": task for task in WEIGHTS for i in range(40)}


def values(seed: int) -> dict[str, np.ndarray]:
    """Task -> values of its items: neither zeros nor ones, and alike between seeds."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    return {
        "add": np.clip(shared.uniform(0.2, 0.9, 40) + own.normal(0.02 * seed, 0.1, 40), 0.01, 0.99),
        "loss": -(shared.gamma(4.0, 0.4, 40) + own.uniform(0, 0.3, 40)),
    }


def evaluation(objective: Objective, of: dict[str, np.ndarray]) -> Evaluation:
    outcomes = tuple(
        Outcome(f"{task}/{i}", {"m": float(v)}) for task, column in of.items() for i, v in enumerate(column)
    )
    scores = {task: float(column.mean()) for task, column in of.items()}
    score = objective.judge(scores).score
    return Evaluation(f"k{next(KEYS)}", "trial:0", "select", "h", {}, outcomes, scores, score)


def estimates(objective: Objective, **changes) -> Estimates:
    return Estimates(
        objective, tuple(WEIGHTS), METRICS | changes, ITEM_TASKS, lambda _, o: np.mean([x.values["m"] for x in o])
    )


def made(weights=WEIGHTS, **keys) -> Objective:
    objective = Objective.of_spec(ObjectiveSpec.model_validate(keys), weights, ("add", "loss"))
    return objective.bind(REFERENCES) if objective.subjects else objective


def relative(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"add": of["add"] / 0.8, "loss": 2 - of["loss"] / -1.6}


def close(one, other) -> None:
    for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True):
        assert a == b or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12), (one, other)


@pytest.mark.parametrize("of", ["mean", "min", "add", "loss"])
@pytest.mark.parametrize("item_mean", [True, False])
def test_relative_scores_have_the_intervals_of_relative_items(of, item_mean):
    """An independent way to the same numbers: make every item relative first, and take the plain objective."""
    changes = {task: {"metric": "m", "item_mean": item_mean} for task in WEIGHTS}
    ours, plain = made(of=of, normalize="expert"), made(of=of)
    one, other = values(1), values(2)
    here, there = estimates(ours, **changes), estimates(plain, **changes)
    close(here.score(evaluation(ours, one)), there.score(evaluation(plain, relative(one))))
    difference = here.difference(evaluation(ours, one), evaluation(ours, other))
    close(difference, there.difference(evaluation(plain, relative(one)), evaluation(plain, relative(other))))
    assert difference.low < difference.value < difference.high
    assert difference.test == ("sign-flip" if item_mean and of != "min" else "bootstrap")
    assert difference.num_items == (80 if of in ("mean", "min") else 40)


def test_the_mean_of_objectives_is_a_mean_with_other_weights():
    """(mean + add) / 2 with weights 3 to 1 counts add 0.875 and loss 0.125."""
    ours, plain = made(of=["mean", "add"]), made({"add": 7.0, "loss": 1.0}, of="mean")
    one, other = values(3), values(4)
    close(estimates(ours).score(evaluation(ours, one)), estimates(plain).score(evaluation(plain, one)))
    close(
        estimates(ours).difference(evaluation(ours, one), evaluation(ours, other)),
        estimates(plain).difference(evaluation(plain, one), evaluation(plain, other)),
    )


def test_each_objective_has_its_own_interval():
    ours = made(of=["add", "loss"], normalize="expert")
    found = estimates(ours).objectives(evaluation(ours, values(5)))
    for task in ("add", "loss"):
        alone = made(of=task, normalize="expert")
        close(found[task], estimates(alone).score(evaluation(alone, values(5))))
    assert found["add"].num_items == 40


def test_the_interval_of_one_task_is_that_of_its_scores_as_they_are():
    ours, plain = made(of="mean", normalize="expert"), made(of="mean")
    close(
        estimates(ours).task(evaluation(ours, values(6)), "loss"),
        estimates(plain).task(evaluation(plain, values(6)), "loss"),
    )


def test_a_mean_beside_a_minimum_is_resampled():
    ours = made(of=["mean", "min"], normalize="expert")
    one, other = evaluation(ours, values(7)), evaluation(ours, values(8))
    estimate, difference = estimates(ours).score(one), estimates(ours).difference(one, other)
    assert estimate.low < estimate.value < estimate.high
    assert difference.test == "bootstrap" and difference.low < difference.value < difference.high
