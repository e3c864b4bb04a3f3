"""Relative scores, constraints and two objectives by the real command line: killed, resumed, exported, scored again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from .support import Server, candidates, end, json_of, kill_tree, store, wait_for
from .test_faults import undisturbed

OBJECTIVE = {
    "of": ["one", "two"],
    "normalize": "expert",
    "experts": {"one": "expert0", "two": "expert1"},
    "constraints": [{"task": "all", "at_least": 0.98, "of": "base"}],
}
BUDGET = 20


def experiment(many: Callable[..., Path]) -> Path:
    return many(
        objective=OBJECTIVE,
        search={"method": "nsga2", "budget": BUDGET, "population": 5},
        evaluate={
            "with": "my_eval.py@score",
            "tasks": {"one": {}, "two": {}},
            "split": {"search": 8, "select": 8, "test": 8},
            "finish": {"top": 4, "sweep": [0.3, 0.6]},
        },
    )


def trials_at(path: Path) -> int:
    from evomerge.store import Store

    states = ("running", "complete", "failed", "pruned")
    return sum(summary[state] for summary in Store.names(url_at(path)) for state in states)


def url_at(path: Path) -> str:
    return f"sqlite:///{path.parent / 'evomerge.db'}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_objectives_killed_resumed_and_exported(server: Server, many: Callable[..., Path], tmp_path: Path):
    path = experiment(many)
    driver = server.start("run", path)
    try:
        wait_for(lambda: trials_at(path) >= 8 or driver.poll() is not None, why="eight trials", every=0.05)
        driver.kill()
        end(driver)
    finally:
        kill_tree(driver.pid)
    assert trials_at(path) < BUDGET
    server.run("resume", path)
    alone = experiment(many)
    undisturbed(alone)
    assert candidates(path) == candidates(alone)

    study = store(path)
    record, scores = study.record, study.scores("search")
    wanted = ("control:base", "control:expert:expert0", "control:expert:expert1")
    assert record["references"] == {subject: scores[subject] for subject in wanted}
    own = {"one": scores["control:expert:expert0"]["one"], "two": scores["control:expert:expert1"]["two"]}
    assert max(own.values()) < 0  # log-likelihoods
    for e in study.evaluations():
        relative = [1 + (e.scores[t] - own[t]) / abs(own[t]) for t in own]
        assert math.isclose(e.objective, sum(relative) / 2, rel_tol=1e-12), e.key

    # Optuna's copy has both directions, and the constraints by which Optuna itself calls trials feasible.
    copy = optuna.load_study(study_name="tiny", storage=url_at(path))
    assert len(copy.directions) == 2
    base = scores["control:base"]
    for trial in copy.trials:
        at = scores[f"trial:{trial.number}"]
        assert trial.values == pytest.approx([1 + (at[t] - own[t]) / abs(own[t]) for t in own])
        missed = [(1.02 * base[t] - at[t]) / abs(base[t]) for t in own]
        assert list(trial.constraints.values()) == pytest.approx(missed)

    board = json_of(server.run("leaderboard", path, "--format", "json"))
    assert board["objectives"] == ["one", "two"]
    rows = {row["subject"]: row for row in board["select"]}
    feasible = [row for row in board["select"] if not row["misses"]]
    for row in feasible:
        values = [o["value"] for o in row["objectives"].values()]
        beaten = any(
            all(o["value"] >= v for o, v in zip(other["objectives"].values(), values, strict=True))
            and any(o["value"] > v for o, v in zip(other["objectives"].values(), values, strict=True))
            for other in feasible
        )
        assert (row["subject"] in board["front"]) == (not beaten)
    able = [row for row in feasible if row["kind"] == "candidate"] or [rows[board["winner"]]]
    assert board["winner"] == max(able, key=lambda row: row["score"]["value"])["subject"]

    other = next(s for s in rows if s.startswith("trial:") and s != board["winner"])
    server.run("export", path, "--trial", other.removeprefix("trial:"), "--out", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "objective one" in card and "relative to its own expert's" in card
    again = json_of(server.run("evaluate", tmp_path / "merged", path, "--compare", "--format", "json"))
    assert again["objective"] == rows[other]["score"]["value"]
    assert again["misses"] == rows[other]["misses"]
    shown = server.run("show", path, other.removeprefix("trial:")).out
    assert f"objective {again['objective']:.4f}" in shown
    summary = server.run("studies", "--storage", url_at(path)).out
    trials = [t.score for t in study.trials() if not t.violation]
    assert not trials or f"{max(trials):.3f}" in summary


def test_dry_run_says_what_scores_are_held_against(many, server):
    path = experiment(many)
    out = " ".join(server.run("run", "--dry-run", path).out.split())  # whatever line it stands on
    assert "2 objectives: task one and task two; each task's score relative to its own expert's on search" in out
    assert "one: expert0, two: expert1" in out
    assert "two at least 98% of base" in out
    assert "base, expert expert0, expert expert1 on search" in out


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"search": {"method": "cma"}, "objective": {"of": ["one", "two"]}},
            ["search.method", "cma", "nsga2", "random"],
        ),
        ({"objective": {"normalize": "expert"}}, ["objective.experts", "'one'", "expert0"]),
        ({"objective": {"of": "three"}}, ["objective.of", "'three'", "two"]),
    ],
    ids=["cma", "no expert", "no task"],
)
def test_what_cannot_be_is_refused_before_any_model_loads(many, server, keys, words):
    run = server.run("run", many(**keys), code=2)
    for word in words:
        assert word in run.err
    assert not run.model_modules and "Traceback" not in run.err
