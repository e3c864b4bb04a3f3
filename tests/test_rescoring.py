"""Comparing a checkpoint with what a study stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.adapter_export import export_adapter
from evomerge.errors import CheckpointError, StudyError
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


def test_an_adapter_is_scored_on_its_base(experiment, tmp_path: Path):
    """With export_dtype float32 the merge is rounded no more than the adapter: scores agree to float32's rounding."""
    plan = build_plan(load_spec(experiment(export_dtype="float32")), Progress(quiet=True))
    recipe = replace(plan.template, groups=(Group((0.5, 0.25)),))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    adapter = export_adapter(recipe, tmp_path / "adapter")
    by_adapter, by_recipe, base = (
        score_target(t, plan, "select") for t in (adapter, tmp_path / "recipe.yaml", plan.spec.base_path)
    )
    assert by_adapter.recipe is not None and by_adapter.recipe.hash == recipe.hash
    for ours, theirs, plain in zip(by_adapter.outcomes, by_recipe.outcomes, base.outcomes, strict=True):
        assert ours.values["score"] == pytest.approx(theirs.values["score"], abs=1e-5)
        assert abs(ours.values["score"] - plain.values["score"]) > 1e-3
    text = (adapter / "recipe.yaml").read_text().replace(recipe.base.sha256, "ab" * 32)
    (adapter / "recipe.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="belongs to a base"):
        score_target(adapter, plan, "select")
