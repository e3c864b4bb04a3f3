"""Comparing a checkpoint with what a study stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import StudyError
from evomerge.exporting import export
from evomerge.launch import new_record, sqlite_url
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.recipe import Group
from evomerge.rescoring import check_comparable, score_target
from evomerge.spec import load_spec
from evomerge.store import Store
from evomerge.testing import engines


def test_a_study_with_other_items_or_batches_cannot_be_compared_with(experiment, tmp_path: Path):
    path = experiment()
    plan = build_plan(load_spec(path), Progress(quiet=True))
    store = Store.create(sqlite_url(tmp_path / "study.db"), "tiny", new_record(plan, 12), items=plan.items)
    check_comparable(plan, store)
    data = json.loads(path.read_text())
    data["evaluate"]["split"]["test"] = 7
    path.write_text(json.dumps(data))
    with pytest.raises(StudyError, match="items in test"):
        check_comparable(build_plan(load_spec(path), Progress(quiet=True)), store)


def test_checkpoint_folders_and_recipes_are_scored_by_programs_too(experiment, tmp_path: Path):
    """On disk as well, a recipe scores what its export scores, and nothing stays behind."""
    path = experiment(
        evaluate={
            "with": "engine_eval.py",
            "tasks": {"one": {}},
            "split": {"search": 2, "select": 2, "test": 2},
        },
        workers={"scratch": "scratch"},
    )
    engines.write(path.parent)
    plan = build_plan(load_spec(path), Progress(quiet=True))
    recipe = replace(plan.template, groups=(Group((0.5, 0.25)),))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    exported = export(recipe, tmp_path / "out")
    merge, folder, base = (
        score_target(target, plan, "select") for target in (tmp_path / "recipe.yaml", exported, plan.spec.base_path)
    )
    assert merge.outcomes == folder.outcomes
    assert merge.recipe is not None and folder.recipe is not None
    assert merge.recipe.hash == folder.recipe.hash == recipe.hash
    assert merge.tasks["one"] == pytest.approx(sum(o.values["score"] for o in merge.outcomes) / 2)
    assert base.outcomes != merge.outcomes
    assert list((path.parent / "scratch").iterdir()) == []
