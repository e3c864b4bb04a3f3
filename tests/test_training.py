"""Searches by gradient, driven by a known function in place of a model: workers, deaths, failures, stops, refusals."""

# ruff: noqa: F811  (fixtures of test_study.py)

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_study import (  # noqa: F401
    BUDGET,
    EVALUATOR,
    Crash,
    ShuffledPool,
    die,
    lost,
    run,
    scores,
    trajectory,
    write,
)

from evomerge.errors import Interrupted, UserError
from evomerge.launch import sqlite_url
from evomerge.leaderboard import leaderboard, to_json, to_markdown
from evomerge.planning import build_plan
from evomerge.pools import BatchGradient, Failure, Job, Result
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.showing import show_trial
from evomerge.spec import load_spec
from evomerge.store import Store
from evomerge.study import idle_workers

GRADIENTS = f"""{EVALUATOR}

from types import SimpleNamespace
from evomerge.evaluation import FunctionEvaluator

class Predicting(FunctionEvaluator):
    def __init__(self, context):
        super().__init__(context, SimpleNamespace(**globals()), "score")

    def predicts(self, task):
        return frozenset(["answers"])
"""


def drawn_to(job: Job) -> Result:
    """Gradients of half the squared distance of all weights from a place that each item draws: nothing is merged."""
    assert job.gradient is not None
    weights = np.array([w for group in job.recipe["groups"] for w in group["weights"].values()])
    found = []
    shares = job.gradient.get("shares", [0.0] * len(job.gradient["batches"]))  # none where nothing is learned
    for (task, items), share in zip(job.gradient["batches"], shares, strict=True):
        places = [np.random.default_rng(zlib.crc32(item.encode())).normal(0.4, 0.1, len(weights)) for item in items]
        away = weights - np.mean(places, axis=0)
        gradient = tuple((share * away).tolist()) if job.gradient["learn"] else ()
        found.append(BatchGradient(task, float(away @ away) / 2, gradient))
    return Result(job.key, job.attempt, None, None, gradients=tuple(found))


class GradientPool(ShuffledPool):
    """Evaluates as ShuffledPool does, and gives gradients of a known function."""

    def wait(self, seconds: float) -> list[Result]:
        if not self.jobs:
            return []
        job = self.jobs.pop(self.random.randrange(len(self.jobs)))
        fault = self.faults(job) if self.faults else None
        if fault is not None:
            return [fault]
        assert self.worker is not None
        return [self.worker.evaluate(job) if job.gradient is None else drawn_to(job)]


@pytest.fixture
def write_gradients(write) -> Callable[..., Path]:
    """An experiment that learns by gradient: 12 steps, a candidate every 3, on a known function."""

    def make(**keys) -> Path:
        search = {"method": "adamerging", "budget": BUDGET, "steps": 12, "every": 3, "lr": 0.05, "batch": 2, "parts": 4}
        path = write(**{**keys, "search": {**search, **keys.get("search", {})}})
        (path.parent / "my_eval.py").write_text(GRADIENTS)
        data = json.loads(path.read_text())
        data["evaluate"]["with"] = "my_eval.py@Predicting"
        data["evaluate"]["batch_size"] = keys.get("batch_size", 1)
        path.write_text(json.dumps(data))
        return path

    return make


def die_at(
    writes: Iterable[int],
    path: Path,
    die: Callable[[int], None],
    make_pool: Callable[[int], Any],
    *,
    at_least: int = 1,
) -> Store:
    """The study after runs that each die at one of the store's ``writes`` of that run, and a last one that does not.

    Args:
        make_pool: of the number of the write.
        at_least: how many must have died: runs of a study that is complete do not get to their write.
    """
    crashes = 0
    for step in writes:
        die(step)
        try:
            run(path, make_pool(step), store="crashed.db")
        except Crash:
            crashes += 1
    die(10**9)
    resumed = run(path, make_pool(0), store="crashed.db")
    assert crashes >= at_least
    return resumed


def learned(store: Store) -> list[tuple]:
    return [(t.n, t.state, t.curve) for t in store.trainings()]


def test_a_search_by_gradient_has_a_candidate_every_so_many_steps(write_gradients):
    store = run(write_gradients(), GradientPool())
    trials = store.trials()
    assert [t.n for t in trials] == list(range(5)) and {t.state for t in trials} == {"complete"}
    assert set(trials[0].point.values()) == {1.0}
    away = [sum((v - 0.4) ** 2 for v in t.point.values()) for t in trials]
    assert away == sorted(away, reverse=True) and away[-1] < 0.5 * away[0]
    assert [t.n for t in store.trainings()] == list(range(5))
    assert [row["step"] for t in store.trainings() for row in t.curve] == list(range(12))
    assert len(store.evaluations("test")) == 7
    text = show_trial(store, "2")
    assert "training  6 steps" in text and "step 0 " in text and "step 5 " in text and "one " in text
    notes = " ".join(leaderboard(store).notes)
    assert "12 of 12 steps on entropy, on search items (inductive)" in notes


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("search", [{}, {"tasks": 1}, {"patience": 1, "holdout": 0.25, "pull": 0.5}], ids=str)
def test_gradients_are_the_same_bits_from_any_number_of_workers(write_gradients, slots, search):
    path = write_gradients(search=search)
    pool = GradientPool(slots, order_seed=slots)
    alone, shared = run(path, GradientPool(), store="alone.db"), run(path, pool, store="shared.db")
    assert trajectory(shared) == trajectory(alone)
    assert learned(shared) == learned(alone)
    assert scores(shared) == scores(alone)
    steps = [job.key for job in pool.submitted if job.gradient]
    assert len(set(steps)) < len(steps)  # some were shared out


@pytest.mark.parametrize("search", [{}, {"constraint": "softmax"}, {"patience": 1, "holdout": 0.25}], ids=str)
def test_a_driver_that_dies_around_any_store_write_learns_on_as_if_it_had_not(
    write_gradients, die, monkeypatch, search
):
    monkeypatch.setattr("evomerge.training.SAVE_SECONDS", -1.0)  # a write a step
    space = {"method": "task_arithmetic", "weights": {"granularity": "layer_groups", "groups": 2, "range": [0.0, 2.0]}}
    path = write_gradients(search=search, space=space)
    whole = run(path, GradientPool(), store="whole.db")
    resumed = die_at(range(2, 40), path, die, lambda write: GradientPool(2, order_seed=write), at_least=12)
    assert trajectory(resumed) == trajectory(whole)
    assert learned(resumed) == learned(whole)
    assert scores(resumed) == scores(whole)


HYBRID = {"method": "hybrid", "budget": 40, "candidates": 12, "refine": 6, "products": 3, "product_batch": 2}


@pytest.mark.parametrize("groups", [1, 2])  # 3 dimensions: all products; 6: the diagonal
def test_a_hybrid_search_is_the_same_from_any_number_of_workers_and_after_any_death(
    write_gradients, die, monkeypatch, groups
):
    monkeypatch.setattr("evomerge.training.SAVE_SECONDS", -1.0)  # a write a step
    weights = {"granularity": "layer_groups", "groups": groups, "range": [0.0, 2.0]}
    path = write_gradients(search=HYBRID, space={"method": "task_arithmetic", "weights": weights})
    whole = run(path, GradientPool(), store="whole.db")
    trials = whole.trials()
    assert len(trials) == 5 + 12 + 2 and {t.state for t in trials} == {"complete"}
    away = [sum((v - 0.4) ** 2 for v in t.point.values()) for t in trials]
    assert away[4] < 0.5 * away[0]
    notes = " ".join(leaderboard(whole).notes)
    assert "12 of 12 steps on entropy, by CMA-ES from there, and in 6 steps from its best" in notes
    shared = run(path, GradientPool(4, order_seed=1), store="shared.db")
    assert trajectory(shared) == trajectory(whole) and learned(shared) == learned(whole)
    resumed = die_at(range(2, 60, 4), path, die, lambda write: GradientPool(2, order_seed=write), at_least=8)
    assert trajectory(resumed) == trajectory(whole) and learned(resumed) == learned(whole)
    assert scores(resumed) == scores(whole)


def test_a_loss_that_is_no_number_ends_the_training_and_the_study_finishes(write_gradients, die):
    def fault(job: Job) -> Result | None:
        if job.key == "gradient:7" and job.gradient and "two" in dict(job.gradient["batches"]):
            return Result(job.key, job.attempt, None, Failure("nan", "task two: the loss is nan"))
        return None

    path = write_gradients()
    store = run(path, GradientPool(5, faults=fault))
    trials = store.trials()
    assert [t.state for t in trials] == ["complete"] * 3 + ["fail"]
    assert trials[3].failure == "nan: step 7, task two: the loss is nan"
    assert store.evaluations("test") and store.record["rounds"]
    notes = " ".join(leaderboard(store).notes)
    assert "1 failed (1 nan)" in notes and "training failed (step 7, task two" in notes
    again = die_at(range(20, 45), path, die, lambda write: GradientPool(2, faults=fault, order_seed=write))
    assert trajectory(again) == trajectory(store)
    assert learned(again) == learned(store)


@pytest.mark.parametrize(
    ("kind", "words"), [("memory", "gradients: free"), ("timeout", "workers.timeout"), ("error", "boom")]
)
def test_a_training_that_cannot_go_on_here_keeps_its_steps(write_gradients, kind, words):
    def fault(job: Job) -> Result | None:
        if job.key == "gradient:7":
            return Result(job.key, job.attempt, None, Failure(kind, "ValueError: boom", "Traceback: boom"))
        return None

    path = write_gradients()
    with pytest.raises(UserError, match=rf"step 7[\s\S]*{words}[\s\S]*--budget"):
        run(path, GradientPool(faults=fault))
    store = Store.open(sqlite_url(path.parent / "study.db"), "tiny")
    assert len(store.trials()) == 3 and store.trainings()[-1].state["descent"]["step"] == 7
    pool = GradientPool()
    resumed = run(path, pool)
    assert {job.key for job in pool.submitted if job.gradient} == {f"gradient:{step}" for step in range(7, 12)}
    assert trajectory(resumed) == trajectory(run(write_gradients(folder="whole"), GradientPool()))


def test_lost_workers_are_made_up_for(write_gradients):
    lost_once = set()

    def fault(job: Job) -> Result | None:
        if job.gradient and job.key not in lost_once:
            lost_once.add(job.key)
            return lost(job)
        return None

    path = write_gradients()
    store = run(path, GradientPool(3, faults=fault), store="lost.db")
    assert len(lost_once) == 12
    assert trajectory(store) == trajectory(run(path, GradientPool(), store="whole.db"))

    with pytest.raises(UserError, match="killed"):
        run(path, GradientPool(faults=lambda job: lost(job) if job.key == "gradient:5" else None), store="often.db")


def test_a_stop_while_it_learns_keeps_its_steps_and_what_runs_beside(write_gradients, monkeypatch):
    path = write_gradients()
    whole = run(path, GradientPool(), store="whole.db")
    monkeypatch.setattr("evomerge.running.STOP_POLL_SECONDS", 0.0)

    class Stopped(GradientPool):
        def submit(self, job: Job) -> None:
            super().submit(job)
            if job.key == "gradient:7":
                Store.open(sqlite_url(path.parent / "study.db"), "tiny").request_stop()

    with pytest.raises(Interrupted):
        run(path, Stopped(2))
    store = Store.open(sqlite_url(path.parent / "study.db"), "tiny")
    assert [t.state for t in store.trials()] == ["complete"] * 3
    assert store.trainings()[-1].state["descent"]["step"] == 7
    resumed = run(path, GradientPool())
    assert trajectory(resumed) == trajectory(whole) and learned(resumed) == learned(whole)


def test_it_begins_where_initial_says(write_gradients):
    store = run(write_gradients(search={"initial": [{"control": "task_arithmetic"}], "budget": 2}), GradientPool())
    best = Recipe.from_dict(store.evaluation("control:task_arithmetic/search").recipe).groups[0].weights[0]
    assert set(store.trials()[0].point.values()) == {best} and len(store.trials()) == 2


def test_transductive_learns_on_test_items_and_the_leaderboard_says_so(write_gradients):
    path = write_gradients(search={"protocol": "transductive"})
    pool = GradientPool()
    store = run(path, pool)
    splits = {item.id: item.split for item in store.items()}
    seen = {splits[i] for job in pool.submitted if job.gradient for _, items in job.gradient["batches"] for i in items}
    assert seen == {"test"}
    board = leaderboard(store)
    for text in (to_json(board), to_markdown(board)):
        assert "transductive" in text and "no choice has seen" not in text


def test_held_out_items_are_not_learned_from(write_gradients):
    pool = GradientPool()
    run(write_gradients(search={"holdout": 0.5, "patience": 3}), pool)
    used: dict[bool, set[str]] = {True: set(), False: set()}
    for job in pool.submitted:
        for _, items in job.gradient["batches"] if job.gradient else ():
            assert job.gradient
            used[job.gradient["learn"]].update(items)
    assert len(used[True]) == len(used[False]) == 4 and not used[True] & used[False]


@pytest.mark.parametrize(
    ("keys", "words", "where"),
    [
        ({"search": {"schedule": "asynchronous"}}, "reproducible", "search.method"),
        ({"search": {"loss": "cross_entropy"}}, "needs labels of task 'one'", "search.loss"),
        ({"search": {"loss": "entrpy"}}, "not one of entropy", "search.loss"),
        ({"search": {"loss": "nothing.py@mine"}}, "no file 'nothing.py'", "search.loss"),
        ({"search": {"loss": 3}}, "not one of entropy", "search.loss"),
        ({"search": {"over": "tokens"}}, "needs tokens of task 'one'", "search.loss"),
        ({"search": {"loss": "hidden_mse"}}, "needs hidden of task 'one'", "search.loss"),
        ({"search": {"loss": "cross_entropy", "protocol": "transductive"}}, "test items", "search.protocol"),
        ({"search": {"initial": [{"control": "average"}, {"control": "base"}]}}, "one point", "search.initial"),
        (
            {"search": {"loss": "kl_to_expert"}, "objective": {"of": "mean", "experts": {"one": "expert0"}}},
            "task 'two' has none",
            "search.loss",
        ),
        ({"space": {"method": "ties", "weights": {"granularity": "task", "range": [0, 1]}}}, "affine", "space"),
        (
            {
                "space": {
                    "method": "dare_linear",
                    "params": {"density": {"range": [0.1, 1.0]}},
                    "weights": {"granularity": "task", "range": [0.0, 1.0]},
                }
            },
            "density",
            "search.method",
        ),
    ],
    ids=str,
)
def test_what_has_no_gradient_is_refused_before_anything_loads(write_gradients, keys, words, where):
    with pytest.raises(UserError, match=words) as raised:
        run(write_gradients(**keys))
    assert where in str(raised.value)


def test_a_loss_of_the_users_own_is_part_of_what_a_study_was_made_from(write_gradients):
    path = write_gradients(search={"loss": "mine.py@half"})
    code = "from evomerge.losses import Entropy\n\nclass Half(Entropy):\n    name = 'half'\n"
    (path.parent / "mine.py").write_text(code)
    pool = GradientPool()
    run(path, pool)
    assert {job.gradient["loss"] for job in pool.submitted if job.gradient} == {"mine.py@half"}
    (path.parent / "mine.py").write_text(code + "    summary = 'other'\n")
    with pytest.raises(UserError, match=r"loss mine\.py") as raised:
        run(path)
    assert "belongs to another experiment" in str(raised.value)


DESCENT = re.search(
    r"^```python\n# my_descent.py\n(.*?)^```",
    (Path(__file__).parents[1] / "docs" / "extending.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


def test_a_searcher_of_the_users_own_learns_is_killed_and_stopped_like_evomerges(write_gradients, die, monkeypatch):
    """The one that the docs have."""
    assert DESCENT
    monkeypatch.setattr("evomerge.training.SAVE_SECONDS", -1.0)  # a write a step
    path = write_gradients()
    (path.parent / "my_descent.py").write_text(DESCENT[1])
    data = json.loads(path.read_text())
    data["search"] = {"method": "my_descent.py@Downhill", "budget": 5, "steps": 4, "lr": 0.3}
    path.write_text(json.dumps(data))
    whole = run(path, GradientPool(), store="whole.db")
    points = [list(t.point.values()) for t in whole.trials()]
    assert [t.state for t in whole.trials()] == ["complete"] * 5
    for before, after in itertools.pairwise(points):  # the loss is half the squared distance from a place
        place = [(b - 0.7 * a) / 0.3 for a, b in zip(before, after, strict=True)]
        np.testing.assert_allclose(place, [(points[1][i] - 0.7 * points[0][i]) / 0.3 for i in range(len(place))])
    assert "learned by gradient, on search items (inductive)" in " ".join(leaderboard(whole).notes)
    resumed = die_at(range(2, 30, 3), path, die, lambda write: GradientPool(2, order_seed=write))
    assert trajectory(resumed) == trajectory(whole) and learned(resumed) == learned(whole)

    monkeypatch.setattr("evomerge.running.STOP_POLL_SECONDS", 0.0)

    class Stopped(GradientPool):
        def submit(self, job: Job) -> None:
            super().submit(job)
            if job.key == "gradient:2":
                Store.open(sqlite_url(path.parent / "stopped.db"), "tiny").request_stop()

    with pytest.raises(Interrupted):
        run(path, Stopped(2), store="stopped.db")
    assert trajectory(run(path, GradientPool(), store="stopped.db")) == trajectory(whole)


def test_own_experts_are_by_name_by_the_objective_or_by_order(write_gradients):
    pool = GradientPool()
    run(write_gradients(search={"loss": "kl_to_expert"}), pool)
    assert {str(job.gradient["experts"]) for job in pool.submitted if job.gradient} == {"{'one': 0, 'two': 1}"}
    pool = GradientPool()
    objective = {"of": "mean", "experts": {"one": "expert1", "two": "expert0"}}
    run(write_gradients(search={"loss": "kl_to_expert"}, objective=objective, folder="other"), pool)
    assert {str(job.gradient["experts"]) for job in pool.submitted if job.gradient} == {"{'one': 1, 'two': 0}"}


def test_workers_that_a_step_cannot_keep_busy_are_told_of(write_gradients):
    plan = build_plan(load_spec(write_gradients()), Progress(quiet=True))
    assert idle_workers(plan, 5) is None  # two items of two tasks, one at a time, and an evaluation
    assert "at most 5 busy" in str(idle_workers(plan, 6))


def test_a_training_is_kept_once_a_trial_as_it_was_last(tmp_path):
    store = Store.create(sqlite_url(tmp_path / "s.db"), "s", {})
    with store.lock():
        assert store.trainings() == []
        numbers = {"x": [1 / 3, 1e-300, -0.0], "failure": None}
        store.save_training(0, numbers, [])
        store.save_training(1, {"x": [0.1]}, [{"step": 0, "loss": 0.1}])
        store.save_training(1, {"x": [0.2]}, [{"step": 0, "loss": 0.1}, {"step": 1, "loss": 1 / 7}])
    kept = Store.open(sqlite_url(tmp_path / "s.db"), "s").trainings()
    assert [(t.n, t.state, [row["loss"] for row in t.curve]) for t in kept] == [
        (0, numbers, []),
        (1, {"x": [0.2]}, [0.1, 1 / 7]),
    ]
    assert str(kept[0].state["x"][2]) == "-0.0"
    assert Store.create(sqlite_url(tmp_path / "s.db"), "other", {}).trainings() == []
