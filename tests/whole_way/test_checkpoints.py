"""A whole study whose evaluator runs a program on written checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evomerge.testing import engines

from .support import Server, alive, candidates, end, evomerge, kill_tree, start, store, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def search(many: Callable[..., Path]) -> Callable[..., Path]:
    """Writes an experiment of 6 candidates that are evaluated by a program, written to the folder ``scratch``."""

    def make(**workers) -> Path:
        path = many(
            search={"method": "random", "budget": 6},
            evaluate={
                "with": "engine_eval.py",
                "tasks": {"one": {}, "two": {}},
                "split": {"search": 2, "select": 2, "test": 2},
                "finish": {"top": 2, "sweep": [0.5, 1.0]},
            },
            workers={"scratch": "scratch", **workers},
        )
        engines.write(path.parent)
        return path

    return make


def test_the_winner_scores_what_the_leaderboard_says(search: Callable[..., Path], server: Server):
    path = search()
    server.run("run", path)
    assert [t.state for t in store(path).trials()] == ["complete"] * 6
    assert list((path.parent / "scratch").iterdir()) == []
    server.run("export", path, "--out", path.parent / "merged")
    for target, split in ((path.parent / "merged", "test"), (path.parent / "merged" / "recipe.yaml", "search")):
        run = server.run("evaluate", target, path, "--split", split, "--compare")
        assert "bit for bit" in run.out


def engine_of(path: Path) -> tuple[int, int]:
    """The pids of the program that hangs, and of what it started."""
    pids = path.parent / "pids"
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2, why="the program")
    engine, child = map(int, pids.read_text().split())
    return engine, child


def test_killed_at_any_point_nothing_stays_behind(server: Server, search: Callable[..., Path]):
    """The worker, and then the driver, are killed while the program runs; a resume ends as if nothing had been."""
    alone, path = search(), search()
    server.run("run", alone)
    scratch, mode = path.parent / "scratch", path.parent / "mode"
    mode.write_text("hang")
    driver = start("run", path)
    try:
        first = engine_of(path)
        worker = next(p for p in psutil.Process(driver.pid).children() if p.pid not in first)
        assert len(list(scratch.iterdir())) == 2
        (path.parent / "pids").unlink()
        worker.kill()
        wait_for(lambda: not any(alive(pid) for pid in first), why="the program ending with its worker")
        second = engine_of(path)  # of the worker that took over
        wait_for(lambda: len(list(scratch.iterdir())) == 2, why="the first one's checkpoint going")
        driver.kill()
        end(driver)
        wait_for(lambda: not any(alive(pid) for pid in second), why="the program ending with its driver")
        mode.unlink()
        server.run("resume", path)
    finally:
        kill_tree(driver.pid)
    assert candidates(path) == candidates(alone)
    assert list(scratch.iterdir()) == []


def test_two_workers_on_ray_give_the_same_study(server: Server, search: Callable[..., Path]):
    alone, path = search(), search(count=2, cpus=0.5)
    server.run("run", alone)
    evomerge("run", path)
    assert candidates(path) == candidates(alone)
    assert list((path.parent / "scratch").iterdir()) == []
