"""What is known before a model loads: the plan, its fingerprint, and drift."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from evomerge.errors import CheckpointError, EvaluatorError, MethodError, ResourceError
from evomerge.exporting import export
from evomerge.planning import Plan, build_plan, check_device, check_local_gpus, drift
from evomerge.progress import Progress, size
from evomerge.recipe import Group, Recipe, Source
from evomerge.spec import load_spec
from evomerge.testing import engines


def plan_of(path: Path) -> Plan:
    return build_plan(load_spec(path), Progress(quiet=True))


def change(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_a_plan_holds_items_of_the_stated_counts_and_a_worker_built_from_paths(experiment):
    path = experiment()
    plan = plan_of(path)
    assert {s: dict(c) for s, c in plan.split_sizes().items()} == {
        split: {"one": 8, "two": 8} for split in ("search", "select", "test")
    }
    assert set(plan.worker.splits) == {item.id for item in plan.items}
    assert plan.worker.evaluator == f"{path.parent / 'my_eval.py'}@score"
    assert json.loads(json.dumps(plan.worker.to_dict()))["base"]["path"] == str(path.parent / "base")


def test_the_same_experiment_has_no_drift(experiment):
    path = experiment()
    assert drift(plan_of(path).fingerprint, plan_of(path).fingerprint) == []


def test_code_of_a_stage_is_refused_with_a_remedy_that_run_has(experiment):
    """`run` has no option --allow-code."""
    path = experiment()
    stage = {"method": "half.py@half", "base": "base", "experts": {"a": "expert0"}, "weights": 1}
    (path.parent / "half.py").write_text("raise SystemExit")
    (path.parent / "stage.yaml").write_text(json.dumps(stage))
    change(path, experts={"mix": "stage.yaml", "b": "expert1"})
    with pytest.raises(MethodError) as raised:
        plan_of(path)
    assert "evomerge merge RECIPE --allow-code --out DIR" in str(raised.value)
    assert "say --allow-code" not in str(raised.value)


def test_moving_the_whole_folder_is_no_drift(experiment):
    path = experiment()
    before = plan_of(path).fingerprint
    moved = path.parent.rename(path.parent.parent / "moved")
    assert drift(before, plan_of(moved / path.name).fingerprint) == []


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"objective": "min"}, "objective"),
        ({"export_dtype": "float16"}, "export_dtype"),
        ({"search": {"method": "random", "budget": 12}}, "search"),
        ({"workers": {"threads": 2}}, "threads"),
    ],
)
def test_what_scores_rest_on_is_in_the_fingerprint(experiment, keys, named):
    path = experiment()
    before = plan_of(path).fingerprint
    change(path, **keys)
    assert any(line.startswith(f"{named}:") for line in drift(before, plan_of(path).fingerprint))


def test_budget_time_and_worker_count_may_change(experiment):
    path = experiment()
    before = plan_of(path).fingerprint
    change(
        path,
        search={"method": "cma", "budget": 500, "time": "6h", "population": 4},
        workers={"count": 7, "timeout": 60},
    )
    assert drift(before, plan_of(path).fingerprint) == []


def test_a_changed_source_evaluator_or_item_is_named(experiment):
    path = experiment()
    before = plan_of(path).fingerprint
    evaluator = path.parent / "my_eval.py"
    evaluator.write_text(evaluator.read_text().replace('"hotel"', '"india"'))
    config = path.parent / "expert1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    named = {line.partition(":")[0] for line in drift(before, plan_of(path).fingerprint)}
    assert "expert expert1" in named and "expert expert0" not in named
    assert any("my_eval.py" in name for name in named)
    assert "items in search" in named


def test_drift_says_what_was_what_is_and_what_is_new_or_gone():
    lines = drift({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert lines == ["b: was 2, is 9", "c: is gone (was 3)", "d: is new (4)"]


def test_gpus_that_are_not_there_are_refused_with_the_numbers():
    import torch

    have = torch.cuda.device_count()
    with pytest.raises(ResourceError, match=f"this machine has {have} GPUs"):
        check_local_gpus(have + 1, 1.0)
    check_local_gpus(4, 0.0)


def test_a_cuda_device_without_gpus_for_workers_is_refused():
    with pytest.raises(ResourceError, match=r"workers\.gpus is 0"):
        check_device("cuda", 0.0)
    assert check_device("auto", 0.0) == "cpu"
    assert check_device("auto", 0.5) == "cuda"


def test_a_split_that_a_task_has_no_items_in_is_refused(experiment):
    path = experiment()
    change(
        path,
        evaluate={"with": "my_eval.py@score", "tasks": {"one": {}}, "split": {"search": 1000, "select": 8, "test": 8}},
    )
    with pytest.raises(EvaluatorError, match="one"):
        plan_of(path)


def test_too_small_a_disk_for_candidates_is_refused_before_anything_is_hashed_or_loaded(experiment, monkeypatch):
    path = experiment(workers={"count": 3, "scratch": "scratch"})
    engines.write(path.parent)
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=200_000))
    plan_of(path)  # an evaluator that needs no checkpoint needs no room
    evaluate = {"with": "engine_eval.py", "tasks": {"one": {}}, "split": {"search": 2, "select": 2, "test": 2}}
    change(path, evaluate=evaluate)
    needed = sum(t.numel() * 2 for t in load_file(path.parent / "base" / "model.safetensors").values())
    monkeypatch.setattr("evomerge.planning.hash_sources", lambda *_: pytest.fail("sources were hashed"))
    with pytest.raises(ResourceError, match=rf"{size(3 * needed)} \(3 workers .* but {path.parent} has 200.0 kB left"):
        plan_of(path)


def test_where_candidates_are_written_is_no_drift(experiment):
    path = experiment()
    before = plan_of(path)
    assert before.worker.scratch == ""
    change(path, workers={"scratch": "elsewhere"})
    after = plan_of(path)
    assert after.worker.scratch == str(path.parent / "elsewhere")
    assert drift(before.fingerprint, after.fingerprint) == []


def test_a_method_on_factors_refuses_whole_checkpoints_before_a_model_loads(experiment, dense_family):
    space = {"method": "lorahub", "weights": {"granularity": "task", "range": [-1.5, 1.5], "initial": 0.0}}
    assert plan_of(experiment(space=space)).space.methods == ("lorahub",)
    with pytest.raises(CheckpointError, match=r"lorahub works on the factors .*expert0 is a whole checkpoint"):
        plan_of(experiment(dense_family, folder="dense", space=space))
    either = {"method": {"choices": ["ties", "lorahub"]}, "weights": {"granularity": "task", "range": [0.0, 1.5]}}
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        plan_of(experiment(dense_family, folder="either", space=either, search={"method": "random"}))


def test_a_recipe_of_a_method_on_factors_refuses_them_too(dense_family, tmp_path):
    sources = [Source(name, str(dense_family / name)) for name in ("base", "expert0")]
    recipe = Recipe(sources[0], (sources[1],), "lorahub", (Group((0.5,)),))
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        export(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
