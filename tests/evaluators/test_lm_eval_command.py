"""evaluators/lm_eval_command.py against evaluators/harness.py on the same candidates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import CandidateError, EvaluatorError
from evomerge.evaluation import EvaluatorContext, Target, TaskSpec, assign_splits, check_outcomes, load_evaluator
from evomerge.pools import Job, WorkerSpec
from evomerge.recipe import Group, Recipe, Source
from evomerge.worker import Worker

EVALUATORS = Path(__file__).parents[2] / "evaluators"
TOLERANCE = 1e-4  # nats: batching and padding move logits by about 1e-6
SPLIT = {"search": 8, "select": 4, "test": 4}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {},
    "shots": {},
    "blank": {},
    "write": {},
    "filtered": {"metric": "exact_match,first"},
    "last_word": {},
    "whole": {},
}


def context(folder: Path, tasks: dict[str, dict[str, Any]] = TASKS, **options: Any) -> EvaluatorContext:
    specs = {}
    for name, given in tasks.items():
        specs[name] = TaskSpec(
            name, metric=given.get("metric"), options={k: v for k, v in given.items() if k != "metric"}
        )
    return EvaluatorContext(folder, specs, {"include_path": ".", **options}, batch_size=5)


def make(folder: Path, tasks: dict[str, dict[str, Any]] = TASKS, **options: Any) -> Any:
    return load_evaluator(str(EVALUATORS / "lm_eval_command.py"), context(folder, tasks, **options))


def make_harness(folder: Path, tasks: dict[str, dict[str, Any]] = TASKS) -> Any:
    return load_evaluator(str(EVALUATORS / "harness.py"), context(folder, tasks))


def run_in_this_process(evaluator: Any, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval as its command line runs it, without the 15 seconds that its start takes; on the model of ``target``."""

    def run(argv: list[str], scratch: Path) -> str:
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        given = dict(zip(argv[4::2], argv[5::2], strict=False))
        tracker = EvaluationTracker(output_path=given["--output_path"])
        manager = TaskManager(include_path=given["--include_path"], include_defaults=False)
        model = HFLM(pretrained=target.model, tokenizer=target.tokenizer, batch_size=given["--batch_size"])
        results: Any = lm_eval.simple_evaluate(
            model, tasks=given["--tasks"].split(","), task_manager=manager, evaluation_tracker=tracker
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples)
        for task in results["configs"]:
            tracker.save_results_samples(task, samples[task])
        return ""

    monkeypatch.setattr(evaluator, "_run", run)


def assert_same(ours: Any, theirs: Any) -> None:
    assert [o.item_id for o in ours] == [o.item_id for o in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.weight == other.weight
        assert set(mine.values) == set(other.values)
        for name, value in mine.values.items():
            if name.startswith(("acc", "exact_match")):
                assert value == other.values[name], (name, mine, other)
            else:
                assert value == pytest.approx(other.values[name], abs=2 * TOLERANCE), name


def without_ties(harness_outcomes: Any) -> set[str]:
    """Ids of items whose right choice is not within the tolerance of the best wrong one."""
    return {o.item_id for o in harness_outcomes if abs(o.values.get("margin", 1.0)) > 4 * TOLERANCE}


def test_outcomes_are_those_of_the_resident_model(
    target: Target, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All kinds of requests, with few-shot examples, filters and whole texts, on items of one split only."""
    harness, command = make_harness(tasks_folder), make(tasks_folder)
    items = assign_splits(harness.load(), SPLIT, seed=0)
    assert items == assign_splits(command.load(), SPLIT, seed=0)
    harness.prepare(target, items)
    command.prepare(None, items)
    run_in_this_process(command, target, monkeypatch)
    ids = [item.id for item in items if item.split == "search"]
    theirs = harness.evaluate(target, ids)
    ours = command.evaluate(Target(checkpoint=tmp_path, scratch=tmp_path), ids)
    check_outcomes(ours, ids)
    sharp = without_ties(theirs)
    assert len(sharp) >= len(ids) - 2
    assert_same([o for o in ours if o.item_id in sharp], [o for o in theirs if o.item_id in sharp])
    for task in TASKS:
        assert command.metric(task) == harness.metric(task)
    asked = {
        json.loads(line)["id"].partition(":")[2]
        for file in (tmp_path / "items").glob("*.jsonl")
        for line in file.read_text().splitlines()
    }
    assert asked == set(ids), "items of another split were run"


def test_chat_templates_are_rendered_by_the_checkpoints_tokenizer(
    target: Target, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tasks = {"shots": {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}}
    turns = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(target.tokenizer, "chat_template", turns)
    target.tokenizer.save_pretrained(tmp_path / "checkpoint")
    harness, command = make_harness(tasks_folder, tasks), make(tasks_folder, tasks)
    items = assign_splits(harness.load(), SPLIT, seed=0)
    harness.prepare(target, items)
    command.prepare(None, items)
    run_in_this_process(command, target, monkeypatch)
    ids = [item.id for item in items if item.split == "select"]
    scratch = tmp_path / "own"
    scratch.mkdir()
    ours = command.evaluate(Target(checkpoint=tmp_path / "checkpoint", scratch=scratch), ids)
    assert_same(ours, harness.evaluate(target, ids))
    (file,) = (scratch / "items").glob("*.jsonl")
    assert "<system>Be brief." in json.loads(file.read_text().splitlines()[0])["context"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "evaluate.model: must be a name"),
        ({"model_args": "dtype=float32"}, "evaluate.model_args: must be a mapping"),
        ({"model_args": {"pretrained": "gpt2"}}, "pretrained is the candidate's own"),
        ({"modle": "vllm"}, "no option 'modle'"),
    ],
)
def test_what_is_refused(tasks_folder: Path, options: dict[str, Any], message: str):
    with pytest.raises(EvaluatorError, match=message):
        make(tasks_folder, **options).load()


def test_the_command_is_what_was_asked_for(tasks_folder: Path, tmp_path: Path):
    options = {"model": "vllm", "model_args": {"dtype": "bfloat16", "max_model_len": 512}, "engine_batch_size": "auto"}
    command = make(tasks_folder, **options).command(tmp_path / "a, b=c", tmp_path / "items.jsonl", tmp_path / "o.jsonl")
    given = dict(zip(command[4::2], command[5::2], strict=False))
    assert command[1:4] == ["-m", "lm_eval", "run"]
    assert given["--model"] == "vllm"
    assert json.loads(given["--model_args"]) == {
        "pretrained": str(tmp_path / "a, b=c"), "dtype": "bfloat16", "max_model_len": 512
    }  # fmt: skip
    assert given["--batch_size"] == "auto"
    assert "--device" not in given


def test_answers_to_other_questions_are_a_failure(
    target: Target, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = make(tasks_folder, {"choice": {}})
    items = assign_splits(command.load(), SPLIT, seed=0)
    command.prepare(None, items)
    run_in_this_process(command, target, monkeypatch)
    ids = [item.id for item in items if item.split == "select"]
    command.evaluate(Target(checkpoint=tmp_path, scratch=tmp_path), ids)
    (log,) = (tmp_path / "outcomes").rglob("samples_*.jsonl")
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]))
    with pytest.raises(CandidateError, match="answered 3 of 4"):
        command.read_outcomes(tmp_path / "outcomes.jsonl")
    context = json.loads(lines[0])["doc"]["context"]
    log.write_text(lines[0].replace(json.dumps(context)[1:-1], "Something else?"))
    with pytest.raises(CandidateError, match="asked 'Something else"):
        command.read_outcomes(tmp_path / "outcomes.jsonl")
    log.unlink()
    with pytest.raises(CandidateError, match="logged no samples"):
        command.read_outcomes(tmp_path / "outcomes.jsonl")


@pytest.fixture(scope="module")
def specs(lora_family: Path, tasks_folder: Path) -> Callable[[str], WorkerSpec]:
    """A worker's spec for either evaluator."""
    items = assign_splits(make_harness(tasks_folder).load(), SPLIT, seed=0)

    def make(file: str, **options: Any) -> WorkerSpec:
        return WorkerSpec(
            folder=str(tasks_folder),
            base={"name": "base", "path": str(lora_family / "base"), "sha256": "0" * 64},
            experts=tuple(
                {"name": f"expert{t}", "path": str(lora_family / f"expert{t}"), "sha256": str(t + 1) * 64}
                for t in range(2)
            ),
            evaluator=str(EVALUATORS / file),
            tasks={name: dataclasses.asdict(task) for name, task in context(tasks_folder).tasks.items()},
            options={"include_path": ".", **options},
            splits={item.id: str(item.split) for item in items},
            batch_size=5,
        )

    return make


@pytest.mark.slow
def test_the_real_command_line_scores_candidates_as_the_resident_model_does(specs: Callable[..., WorkerSpec]):
    spec = specs("harness.py")
    resident, written = Worker(spec), Worker(specs("lm_eval_command.py", model_args={"dtype": "float32"}))
    ids = tuple(i for i, split in spec.splits.items() if split == "search")
    scores = []
    for weights in ((0.0, 0.0), (1.0, 0.7)):
        recipe = Recipe(
            Source(**spec.base), tuple(Source(**s) for s in spec.experts), "task_arithmetic", (Group(weights=weights),)
        )
        job = Job("k", 1, recipe.to_dict(), ids)
        theirs, ours = resident.evaluate(job), written.evaluate(job)
        assert ours.failure is None, ours.failure
        sharp = without_ties(theirs.outcomes)
        assert len(sharp) >= len(ids) - 2
        assert_same(
            [o for o in ours.outcomes or () if o.item_id in sharp],
            [o for o in theirs.outcomes or () if o.item_id in sharp],
        )
        scores.append(ours.outcomes)
    assert scores[0] != scores[1]
