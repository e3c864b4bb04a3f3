"""Searches that learn numbers inside the task vectors, on a real tiny model, by the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.recipe import Recipe

from .support import candidates, evomerge, store
from .test_gradients import learned, learning, run_killed  # noqa: F401


@pytest.fixture
def masking(learning: Callable[..., Path]) -> Callable[..., Path]:  # noqa: F811
    """The experiment of ``learning`` for a searcher that learns numbers, on the method that is called like it."""

    def make(method: str, search: dict | None = None, **keys) -> Path:
        space = {"method": method, "weights": {"granularity": "task", "range": [0.0, 1.0], "initial": 0.4}}
        options = {"method": method, "batch": 8, **(search or {})}
        return learning(options, space=space, **keys)

    return make


def files(path: Path) -> set[str]:
    return {p.name for p in (path.parent / "learned").iterdir() if not p.name.startswith("training-")}


@pytest.mark.parametrize("method", ["adarank", "columns", "concrete"])
def test_numbers_are_learned_evaluated_and_exported(masking, method: str):
    path = masking(method, {"lr": 0.1})
    ran = evomerge("run", path)
    opened = store(path)
    trials = opened.trials()
    assert [t.state for t in trials] == ["complete"] * 3, ran.text
    losses = [row["loss"] for t in opened.trainings() for row in t.curve]
    assert len(losses) == 10 and losses[-1] < losses[0]
    recipes = [Recipe.from_dict(t.recipe) for t in trials]
    assert len({r.hash for r in recipes}) == 3
    assert files(path) == {Path(r.statistics.path).name for r in recipes if r.statistics}
    assert len(list((path.parent / "learned").glob("training-*/*.safetensors"))) == 1
    evomerge("export", path, "--trial", "2", "--out", path.parent / "merged")
    # What is exported scores, item by item, what the leaderboard says.
    assert (
        "identical to the study's"
        in evomerge("evaluate", path.parent / "merged", path, "--split", "search", "--compare").text
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adarank", "columns", "concrete"])
def test_killed_at_any_step_it_learns_on_to_the_same_bits(masking, method: str):
    search = {"steps": 60, "every": 20, "budget": 4, "loss": "kl_to_expert", "lr": 0.02}
    whole, broken = masking(method, search), masking(method, search)
    evomerge("run", whole)
    run_killed(broken, (1, 2, 3))
    assert candidates(broken) == candidates(whole)
    assert learned(broken) == learned(whole)
    assert files(broken) == files(whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adarank", "concrete"])
def test_two_workers_learn_the_same_bits_as_one(masking, method: str):
    one, two = masking(method), masking(method)
    evomerge("run", one)
    evomerge("run", two, "--workers", "2")
    assert candidates(one) == candidates(two)
    assert learned(one) == learned(two)
