"""Searches by gradient on a real tiny model, by the command line."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from evomerge.store import Store

from .support import candidates, end, evomerge, kill_tree, start, store, wait_for

WORDS = ("alpha", "bravo", "carol", "delta", "eager", "fable", "gamma", "hotel")


@pytest.fixture
def learning(many: Callable[..., Path]) -> Callable[..., Path]:
    """Texts of two tasks, scored and learned from by evaluators/perplexity.py: 10 steps, a candidate every 5."""

    def make(search: dict | None = None, **keys) -> Path:
        path = many(
            search={
                "method": "adamerging", "budget": 3, "steps": 10, "every": 5, "lr": 0.05, "over": "tokens", "batch": 4,
                **(search or {}),
            },
            evaluate={
                "with": "evaluators/perplexity.py",
                "tasks": {task: {"file": f"{task}.txt", "unit": "line"} for task in ("one", "two")},
                "split": {"search": 8, "select": 4, "test": 4},
                "finish": {"top": 2, "sweep": [0.5]},
            },
            **keys,
        )  # fmt: skip
        for task in ("one", "two"):
            (path.parent / f"{task}.txt").write_text("\n".join(f"{task} {a} {b}" for a in WORDS for b in WORDS))
        return path

    return make


def learned(path: Path) -> list[tuple]:
    return [(t.n, t.state, t.curve) for t in store(path).trainings()]


def has_trained(path: Path, count: int) -> bool:
    """Are so many candidates' trainings in the store?"""
    return (
        (path.parent / "evomerge.db").exists()
        and any(summary["name"] == "tiny" for summary in Store.names(f"sqlite:///{path.parent / 'evomerge.db'}"))
        and len(learned(path)) >= count
    )


def run_killed(path: Path, counts: Iterable[int]) -> None:
    """Run to the end, after a kill -9 somewhat later than each of these ``counts`` of candidates was trained."""
    draw = random.Random(0)
    for count in counts:
        process = start("run", path)
        there = partial(has_trained, path, count)
        wait_for(lambda p=process, t=there: p.poll() is not None or t(), every=0.1, why="no candidate was trained")
        time.sleep(draw.uniform(0.0, 3.0))
        kill_tree(process.pid)
        end(process)
    evomerge("run", path)


def test_coefficients_are_learned_shown_and_exported(learning):
    path = learning()
    ran = evomerge("run", path)
    assert "10 of 10 steps on entropy" in ran.text and "training" in ran.err
    opened = store(path)
    assert [t.state for t in opened.trials()] == ["complete"] * 3
    losses = [row["loss"] for t in opened.trainings() for row in t.curve]
    assert len(losses) == 10 and losses[-1] < losses[0]
    shown = evomerge("show", path, "2").out
    assert "training  10 steps" in shown and "step 9" in shown
    board = json.loads(evomerge("leaderboard", path, "--format", "json").out)
    assert any("inductive" in note for note in board["notes"])
    evomerge("export", path, "--trial", "2", "--out", path.parent / "merged")
    assert (path.parent / "merged" / "config.json").exists()


LONG = {"steps": 60, "every": 20, "budget": 4, "loss": "kl_to_expert"}
HYBRID = {"method": "hybrid", "steps": 20, "every": 10, "budget": 10, "candidates": 6, "refine": 10, "products": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("search", "stops"), [(LONG, (1, 1, 2, 2, 3)), (HYBRID, (1, 3, 4, 7, 9))], ids=["", "hybrid"])
def test_killed_at_any_step_it_learns_on_to_the_same_bits(learning, search, stops):
    whole = learning(search)
    evomerge("run", whole)
    assert len(store(whole).trials()) == search["budget"]
    broken = learning(search)
    run_killed(broken, stops)
    assert candidates(broken) == candidates(whole)
    assert learned(broken) == learned(whole)


@pytest.mark.slow
def test_two_workers_learn_the_same_bits_as_one(learning):
    one, two = learning(), learning({"loss": "entropy"})
    evomerge("run", one)
    evomerge("run", two, "--workers", "2")
    assert candidates(one) == candidates(two)
    assert learned(one) == learned(two)
