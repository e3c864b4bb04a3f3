"""What commands print about studies, trials and methods."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evomerge.errors import StudyError
from evomerge.launch import Options, sqlite_url
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.recipe import Group, Recipe, Source
from evomerge.showing import describe_plan, needs_a_look, resolve_subject
from evomerge.spec import load_spec
from evomerge.store import Evaluation, Store

SOURCES = Source("base", "base", "0" * 64), (Source("a", "a", "1" * 64), Source("b", "b", "2" * 64))


def recipe(weight: float) -> Recipe:
    return Recipe(SOURCES[0], SOURCES[1], "task_arithmetic", (Group((weight, weight)),))


def evaluation(subject: str, split: str, weight: float, score: float) -> Evaluation:
    r = recipe(weight)
    return Evaluation(f"{subject}/{split}", subject, split, r.hash, r.to_dict(), (), {"one": score}, score)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Ten finished trials and a control, without finish."""
    store = Store.create(sqlite_url(tmp_path / "study.db"), "shown", {"spec": {"name": "shown"}, "budget": 10})
    with store.lock():
        for n in range(10):
            r = recipe(n / 10)
            store.add_trial(n, {"weight": n / 10}, r.to_dict(), r.hash)
            store.finish_trial(n, "complete", n / 10, None)
        store.save_evaluation(evaluation("control:expert:a", "search", 1.0, 0.5))
    return store


def test_a_trial_is_found_by_number_and_a_control_with_or_without_its_prefix(store):
    def found(name: str) -> tuple[str, str]:
        subject, its_recipe = resolve_subject(store, name)
        return subject, its_recipe.hash

    assert found("7") == ("trial:7", recipe(0.7).hash)
    for name in ("a", "expert:a", "control:expert:a"):
        assert found(name) == ("control:expert:a", recipe(1.0).hash)


def test_best_is_the_highest_on_select_and_missing_before_finish(store):
    with pytest.raises(StudyError, match="no winner yet"):
        resolve_subject(store, "best")
    with store.lock():
        store.save_evaluation(evaluation("trial:9", "select", 0.9, 0.4))
        store.save_evaluation(evaluation("trial:3", "select", 0.3, 0.6))
        store.save_evaluation(evaluation("control:base", "select", 0.0, 0.9))
    assert resolve_subject(store, "best")[0] == "trial:3"


@pytest.mark.parametrize("name", ["10", "nobody"])
def test_what_is_not_there_is_refused_by_name(store, name):
    with pytest.raises(StudyError, match=name):
        resolve_subject(store, name)


def test_a_study_needs_a_look_when_a_control_or_more_than_a_tenth_failed(store):
    assert not needs_a_look(store)
    with store.lock():
        store.log_attempt("control:base/search", 1, "lost", "killed", "", 1.0, "w")
        assert not needs_a_look(store)  # was tried again
        for n in (10, 11):
            store.add_trial(n, {"weight": 0.0}, recipe(0.0).to_dict(), recipe(0.0).hash)
        store.finish_trial(10, "fail", None, "nan: score")
        assert not needs_a_look(store)  # 1 of 12
        store.finish_trial(11, "fail", None, "nan: score")
        assert needs_a_look(store)  # 2 of 12


def test_a_failed_control_needs_a_look(store):
    with store.lock():
        store.log_attempt("control:base/search", 1, "nan", "score is nan", "", 1.0, "w")
    assert needs_a_look(store)


def test_what_run_would_do_is_at_most_100_columns_wide(experiment):
    """But for words that do not fit, such as long paths, each with nothing but its label's column before it."""
    path = experiment(search={"method": "nsga2", "budget": 40, "population": 8}, workers={"count": 30})
    text = describe_plan(build_plan(load_spec(path), Progress(quiet=True)), Options())
    wide = [line for line in text.splitlines() if len(line) > 100]
    assert all(len(line.split()) == 1 for line in wide)
    assert max(map(len, text.splitlines())) > 80
    assert len(re.findall(r"sha256 [0-9a-f]{12}", text)) == text.count("sha256") >= 3  # each beside its hash
    # What was one line stands below its text, and no word is lost.
    found = re.search(r"^time {9}unknown .*\n {13}\S.*(\n {13}\S.*)*\nnothing was written$", text, re.M)
    assert found and "the progress line says how long is left" in " ".join(found[0].split())


def test_a_search_that_ends_by_itself_is_not_said_to_be_longer(experiment):
    path = experiment(
        space={"method": "task_arithmetic", "weights": {"granularity": "task", "range": [0.0, 1.0], "initial": 0.5}},
        search={"method": "soup", "budget": 40},
    )
    text = describe_plan(build_plan(load_spec(path), Progress(quiet=True)), Options())
    assert "soup, 3 trials" in text  # 2T - 1 for two experts
    assert "3 trials + " in text
