"""A worker: one resident model and one prepared evaluator."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError, CheckpointError, EvaluatorError, MethodError, ResourceError
from evomerge.evaluation import Target
from evomerge.exporting import export
from evomerge.methods import lookup
from evomerge.pools import Job, WorkerSpec
from evomerge.recipe import Group, Recipe, Source
from evomerge.testing import tiny
from evomerge.testing.pools import make_job, make_spec, on_checkpoints
from evomerge.worker import Worker, failure_of


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> WorkerSpec:
    return make_spec(tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def worker(spec) -> Worker:
    return Worker(spec)


def with_evaluator(spec: WorkerSpec, folder: Path, code: str, name: str = "") -> WorkerSpec:
    (folder / "own.py").write_text(code)
    at = f"@{name}" if name else ""
    return dataclasses.replace(spec, evaluator=f"{folder / 'own.py'}{at}", tasks={"t": {"name": "t"}}, splits={})


def test_zero_weights_score_what_plain_transformers_scores_on_the_base(spec, worker):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Path(spec.folder, "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(base)("alpha")["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).mean().item()

    recipe = Recipe(
        Source(**spec.base), tuple(Source(**s) for s in spec.experts), "task_arithmetic", (Group(weights=(0.0, 0.0)),)
    )
    result = worker.evaluate(Job("k", 1, recipe.to_dict(), ("alpha",)))
    assert result.failure is None
    assert result.outcomes[0].values["score"] == expected


def test_splits_reach_the_evaluator(spec):
    splits = {"alpha": "search", "bravo": "test", "raise": "select"}
    worker = Worker(dataclasses.replace(spec, splits=splits))
    assert worker.evaluator.splits == splits


def test_outcomes_are_plain_python_numbers(worker, spec):
    result = worker.evaluate(make_job(spec, 1))
    assert {type(v) for o in result.outcomes for v in o.values.values()} == {float}


def test_an_evaluator_without_a_task_of_its_own_sees_the_experiments_folder(spec, tmp_path):
    code = (
        "from evomerge import Evaluator, Item, Outcome\n"
        "class E(Evaluator):\n"
        "    def load(self):\n"
        "        return [Item('i', 't', (self.context.folder / 'note.txt').read_text())]\n"
        "    def evaluate(self, target, item_ids):\n"
        "        return [Outcome(i, {'score': self.context.tasks['t'].weight}) for i in item_ids]\n"
    )
    spec = with_evaluator(spec, Path(spec.folder), code)
    Path(spec.folder, "note.txt").write_text("a note")
    worker = Worker(dataclasses.replace(spec, splits={"i": "search"}, tasks={"t": {"name": "t", "weight": 2.5}}))
    assert worker.items["i"].text == "a note"
    assert worker.evaluate(make_job(spec, 0, "i")).outcomes[0].values == {"score": 2.5}


def test_a_plain_function_is_an_evaluator(spec):
    (Path(spec.folder) / "my_eval.py").write_text(tiny.EVALUATOR)
    spec = dataclasses.replace(
        spec,
        evaluator=str(Path(spec.folder, "my_eval.py@score")),
        tasks={"one": {"name": "one"}, "two": {"name": "two"}},
        splits={},
    )
    items = [item.id for item in Worker(spec).evaluator.load()][:3]
    worker = Worker(dataclasses.replace(spec, splits=dict.fromkeys(items, "search")))
    result = worker.evaluate(make_job(spec, 0, *items))
    assert result.failure is None
    assert [o.item_id for o in result.outcomes] == items


def test_global_random_state_is_the_same_for_every_evaluation_and_untouched_outside(spec, worker):
    first = worker.evaluate(make_job(spec, 0, "alpha")).outcomes[0].values["draw"]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    assert worker.evaluate(make_job(spec, 1, "alpha")).outcomes[0].values["draw"] == first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()) == before


def test_threads_are_those_of_the_spec(spec):
    before = torch.get_num_threads()
    try:
        worker = Worker(dataclasses.replace(spec, threads=2))
        assert worker.evaluate(make_job(spec, 0, "alpha")).outcomes[0].values["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_an_evaluator_that_needs_a_checkpoint_gets_the_exported_one_and_no_model_is_loaded(spec, tmp_path, monkeypatch):
    """The program's scores are a hash of the checkpoint's bytes."""
    from evomerge import worker as module

    monkeypatch.setattr(module, "load_resident", lambda *_, **__: pytest.fail("a model was loaded"))
    spec = on_checkpoints(spec)
    worker = Worker(spec)
    job = make_job(spec, 1, *spec.splits)
    result = worker.evaluate(job)
    assert result.failure is None
    recipe = Recipe.from_dict(job.recipe)
    here = replace(
        recipe,
        base=replace(recipe.base, path=f"{spec.folder}/base"),
        experts=tuple(replace(s, path=f"{spec.folder}/{s.path}") for s in recipe.experts),
    )
    exported = export(here, tmp_path / "out")
    (tmp_path / "own").mkdir()
    again = worker.evaluator.evaluate(Target(checkpoint=exported, scratch=tmp_path / "own"), list(job.item_ids))
    assert [dict(o.values) for o in result.outcomes] == [dict(o.values) for o in again]
    assert list(Path(spec.scratch).iterdir()) == []


def test_a_candidate_that_cannot_be_written_is_a_failure_and_the_next_one_works(spec):
    spec = on_checkpoints(spec)
    worker = Worker(spec)
    job = make_job(spec, 1, *spec.splits)
    huge = {**job.recipe, "export_dtype": "float16", "groups": [{"weights": {"expert0": 1e9, "expert1": 1e9}}]}
    failure = worker.evaluate(Job("k", 1, huge, job.item_ids)).failure
    assert failure.kind == "nan"
    assert "is not finite in float16" in failure.reason
    assert worker.evaluate(job).failure is None
    assert list(Path(spec.scratch).iterdir()) == []


def test_a_worker_removes_what_a_killed_one_left(spec):
    spec = on_checkpoints(spec)
    code = (
        "import os, signal, sys\nfrom evomerge.scratch import scratch_folder\n"
        "with scratch_folder(sys.argv[1]):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, spec.scratch], check=False)
    assert len(list(Path(spec.scratch).iterdir())) == 2  # the folder and its lock
    Worker(spec)
    assert list(Path(spec.scratch).iterdir()) == []


def test_needs_is_one_of_two(spec):
    code = "from evomerge import Evaluator\nclass E(Evaluator):\n    needs = 'checkpiont'\n"
    with pytest.raises(EvaluatorError, match="'checkpiont'"):
        Worker(with_evaluator(spec, Path(spec.folder), code))


def test_an_evaluator_that_offloads_the_model_is_refused_when_the_worker_is_built(spec):
    code = (
        "import accelerate, torch\nfrom evomerge import Evaluator, Item\n"
        "class E(Evaluator):\n"
        "    def load(self):\n        return [Item('i', 't', 'i')]\n"
        "    def prepare(self, target, items):\n"
        "        accelerate.cpu_offload(target.model, execution_device=torch.device('cpu'))\n"
    )
    with pytest.raises(ResourceError, match="offloaded"):
        Worker(with_evaluator(spec, Path(spec.folder), code))


def test_a_gpu_that_is_not_there_is_refused(spec):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ResourceError, match=r"cuda:0.*no GPU"):
        Worker(dataclasses.replace(spec, device="cuda:0"))


def test_a_recipe_is_known_by_the_content_of_its_sources_not_by_their_places_or_names(spec, worker):
    recipe = make_job(spec, 0).recipe
    moved = {**recipe, "base": {**recipe["base"], "path": "elsewhere", "name": "other"}}
    assert worker.evaluate(Job("k", 1, moved, ("alpha",))).failure is None
    swapped = {**recipe, "experts": [{**s, "sha256": "9" * 64} for s in recipe["experts"]]}
    with pytest.raises(CheckpointError, match="9999"):
        worker.evaluate(Job("k", 1, swapped, ("alpha",)))


def test_a_nan_in_the_merge_is_a_failure_and_the_next_candidate_is_not_touched_by_it(spec, worker):
    expected = worker.evaluate(make_job(spec, 1)).outcomes
    recipe = make_job(spec, 0).recipe
    huge = {**recipe, "export_dtype": "float16", "groups": [{"weights": {"expert0": 1e9, "expert1": 1e9}}]}
    result = worker.evaluate(Job("k", 1, huge, ("alpha",)))
    assert result.outcomes is None
    assert result.failure.kind == "nan"
    assert worker.evaluate(make_job(spec, 1)).outcomes == expected


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (CandidateError("nan", "score is nan\nsecond line"), "nan", "score is nan"),
        (MemoryError(), "memory", "MemoryError"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "memory", "CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "memory", "can't allocate"),
        (RuntimeError("shapes differ"), "error", "RuntimeError: shapes differ"),
        (KeyError("x"), "error", "KeyError: 'x'"),
        (SystemExit(2), "error", "sys.exit(2)"),
    ],
)
def test_failures_have_a_kind_and_one_line(error, kind, reason):
    failure = failure_of(error)
    assert failure.kind == kind
    assert reason in failure.reason
    assert "\n" not in failure.reason


PLUGGED = """
from evomerge import Method

class Plugged(Method):
    name, summary, reference = "plugged", "the base plus the task vectors", "none"

    def combine(self, base, experts, *, weights, dtype, info, **_):
        if info.name.endswith("up_proj.weight"):
            FAULT
        return base.to(dtype) + sum(w * (e.to(dtype) - base.to(dtype)) for w, e in zip(weights, experts))
"""


def plugged(spec: WorkerSpec, folder: Path, fault: str) -> tuple[WorkerSpec, Job]:
    """A worker's spec and a job by a method of a file of its own, with a fault that shows in some tensors only."""
    (folder / "plugged.py").write_text(PLUGGED.replace("FAULT", fault))
    code = lookup.find("plugged.py@Plugged", folder).code
    assert code is not None
    job = make_job(spec, 1)
    recipe = replace(Recipe.from_dict(job.recipe), method="plugged.py@Plugged", code=code, params={})
    return replace(spec, codes={"plugged.py@Plugged": code.to_dict()}), replace(job, recipe=recipe.to_dict())


def test_a_method_from_a_file_merges_as_our_own(spec, worker, tmp_path):
    """The base plus weighted task vectors: task_arithmetic, up to rounding. Its weights stand in the same recipe."""
    own, job = plugged(spec, tmp_path, "pass")
    result = Worker(own).evaluate(job)
    expected = worker.evaluate(make_job(spec, 1))
    assert result.failure is None
    for outcome, other in zip(result.outcomes, expected.outcomes, strict=True):
        assert outcome.values["score"] == pytest.approx(other.values["score"], abs=0.02)


def test_a_method_that_fails_is_one_candidate_s_failure(spec, tmp_path):
    own, job = plugged(spec, tmp_path, "1 / 0")
    worker = Worker(own)
    result = worker.evaluate(job)
    assert result.failure is not None and result.failure.kind == "error"
    assert "ZeroDivisionError" in result.failure.reason and "plugged.py" in result.failure.detail
    assert worker.evaluate(make_job(spec, 1)).failure is None


def test_a_method_that_spoils_the_sources_ends_the_worker(spec, tmp_path):
    """Every candidate after it would be built from something else than the base and the experts."""
    own, job = plugged(spec, tmp_path, "base.mul_(2)")
    with pytest.raises(MethodError, match=r"method plugged wrote into the base or an expert at .*up_proj\.weight"):
        Worker(own).evaluate(job)


def test_a_worker_runs_no_code_but_the_study_s(spec, worker, tmp_path):
    _, job = plugged(spec, tmp_path, "pass  # another")
    lookup._loaded.clear()
    result = worker.evaluate(job)
    assert result.failure is not None and "a recipe cannot make it run" in result.failure.reason
