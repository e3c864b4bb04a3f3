"""evaluators/harness.py against lm_eval.simple_evaluate on the same tiny model and tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.errors import EvaluatorError
from evomerge.evaluation import (
    Evaluator,
    EvaluatorContext,
    Item,
    Outcome,
    Target,
    TaskSpec,
    assign_splits,
    load_evaluator,
)
from evomerge.testing.evaluators import EvaluatorCase, EvaluatorContract

from .conftest import ITEMS

HARNESS = Path(__file__).parents[2] / "evaluators" / "harness.py"
TOLERANCE = 1e-4  # nats: padding and batching move logits by about 1e-6
SPLIT = {"search": 12, "select": 12, "test": 12}


def evaluator(folder: Path, *, batch_size: int = 5, **tasks: dict[str, Any]) -> Evaluator:
    specs = {}
    for name, given in tasks.items():
        options = {key: value for key, value in given.items() if key != "metric"}
        specs[name] = TaskSpec(name, metric=given.get("metric"), options=options)
    return load_evaluator(str(HARNESS), EvaluatorContext(folder, specs, {"include_path": "."}, batch_size=batch_size))


def evaluate_all(harness: Evaluator, target: Target) -> tuple[dict[int, Outcome], dict[int, Item]]:
    """Outcomes and items of all test documents, by their index."""
    items = [item for item in harness.load() if item.own_split == "test"]
    harness.prepare(target, items)
    outcomes = harness.evaluate(target, [item.id for item in items])
    return dict(zip([i.data["index"] for i in items], outcomes, strict=True)), {i.data["index"]: i for i in items}


@pytest.fixture(scope="module")
def language_model(target: Target) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=target.model, tokenizer=target.tokenizer, batch_size=3)


def task_manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def samples(language_model: Any, tasks_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm_eval.simple_evaluate makes of every document, by task (one sample a filter)."""
    import lm_eval

    names = ["choice", "shots", "blank", "write", "filtered", "last_word", "whole"]
    result = lm_eval.simple_evaluate(
        language_model, tasks=names, task_manager=task_manager(tasks_folder), log_samples=True, bootstrap_iters=0
    )
    assert result is not None
    return result["samples"]


@pytest.mark.parametrize("task", ["choice", "shots", "blank"])
def test_multiple_choice_is_lm_evals_item_by_item(task, target, tasks_folder, samples):
    harness = evaluator(tasks_folder, **{task: {}})
    outcomes, items = evaluate_all(harness, target)
    assert len(samples[task]) == len(outcomes) == ITEMS
    ties = []
    for sample in samples[task]:
        i = sample["doc_id"]
        theirs = [response[0][0] for response in sample["resps"]]
        right = sample["doc"]["label"]
        ours = outcomes[i].values
        best_wrong = max(value for k, value in enumerate(theirs) if k != right)
        assert ours["loglikelihood"] == pytest.approx(theirs[right], abs=TOLERANCE)
        assert ours["margin"] == pytest.approx(theirs[right] - best_wrong, abs=2 * TOLERANCE)
        if abs(ours["margin"]) <= 2 * TOLERANCE:
            ties.append(items[i].text)
            continue
        assert ours["acc"] == sample["acc"]
        if "acc_norm" in sample:
            assert ours["acc_norm"] == sample["acc_norm"]
    print(f"{task}: {len(ties)} ties within {2 * TOLERANCE} nats: {ties}")
    assert len(ties) <= 1
    assert 0 < sum(sample["acc"] for sample in samples[task]) < ITEMS


@pytest.mark.parametrize("task", ["choice", "shots", "blank", "last_word"])
def test_every_choices_loglikelihood_and_greediness_are_lm_evals(task, target, tasks_folder, samples):
    harness: Any = evaluator(tasks_folder, **{task: {}})
    _, items = evaluate_all(harness, target)
    ids = [item.id for item in items.values()]
    answers = harness._questions[task, ""].answers(target.model, ids)
    for sample in samples[task]:
        ours = answers[items[sample["doc_id"]].id]
        for (value, greedy), response in zip(ours, sample["resps"], strict=True):
            assert value == pytest.approx(response[0][0], abs=TOLERANCE)
            assert greedy == response[0][1]


def test_prompts_with_examples_are_lm_evals(target, tasks_folder, samples):
    harness: Any = evaluator(tasks_folder, shots={})
    _, items = evaluate_all(harness, target)
    for sample in samples["shots"]:
        asked = [instance.args for instance in harness._instances[items[sample["doc_id"]].id]]
        assert asked == [tuple(arguments) for arguments in sample["arguments"]]
        assert asked[0][0].startswith("Pick one.")


def test_examples_come_from_none_of_the_studys_items(target, tasks_folder):
    """The task draws its examples from its own test split, and some of them are study's items in capitals."""
    harness: Any = evaluator(tasks_folder, no_examples={})
    everything = harness.load()
    items = everything[:10]
    pool = harness.tasks["no_examples"]._pool
    pool += [{**doc, **{k: v.upper() for k, v in doc.items() if k == "question"}} for doc in pool[:10]]
    for doc in pool[-10:]:
        doc["choices"] = [choice.upper() for choice in doc["choices"]]
    left = {item.text.split("?")[0] for item in everything[10:]}
    harness.prepare(target, items)
    for item in items:
        *examples, own = harness._instances[item.id][0].args[0].split("\n\n")
        assert len(examples) == 5
        assert {example.split("?")[0] for example in examples} <= left
        assert item.text.startswith(own)


def test_a_subset_of_the_study_keeps_the_examples_of_the_whole(target, tasks_folder):
    """Examples are drawn by a document's place, so a study of fewer items asks the same questions."""
    prompts = []
    for step in (1, 3):
        harness: Any = evaluator(tasks_folder, shots={})
        items = harness.load()[::step]
        harness.prepare(target, items)
        prompts.append({item.id: harness._instances[item.id][0].args[0] for item in items})
    assert prompts[1].items() <= prompts[0].items()


def test_generation_is_lm_evals_item_by_item(target, tasks_folder, samples):
    harness: Any = evaluator(tasks_folder, write={})
    outcomes, items = evaluate_all(harness, target)
    texts = harness._questions["write", ""].answers(target.model, [item.id for item in items.values()])
    samples = samples["write"]
    assert len(samples) == ITEMS
    for sample in samples:
        assert texts[items[sample["doc_id"]].id] == sample["resps"][0]
        assert outcomes[sample["doc_id"]].values == {"exact_match": sample["exact_match"]}
    assert 0 < sum(sample["exact_match"] for sample in samples) < ITEMS
    assert any(len(text[0]) < 5 for text in texts.values()), "no stop string was ever met"


def test_several_filters_give_a_metric_each(target, tasks_folder, samples):
    harness = evaluator(tasks_folder, filtered={"metric": "exact_match,first"})
    outcomes, _ = evaluate_all(harness, target)
    for sample in samples["filtered"]:
        assert outcomes[sample["doc_id"]].values[f"exact_match,{sample['filter']}"] == sample["exact_match"]
    assert harness.metric("filtered") == "exact_match,first"
    assert evaluator(tasks_folder, filtered={}).metric("filtered") == "exact_match,all"


def test_loglikelihood_and_its_perplexity_are_lm_evals(target, tasks_folder, samples):
    harness = evaluator(tasks_folder, last_word={})
    outcomes, _ = evaluate_all(harness, target)
    samples = samples["last_word"]
    for sample in samples:
        ours = outcomes[sample["doc_id"]].values
        assert ours["loglikelihood"] == pytest.approx(sample["perplexity"], abs=TOLERANCE)
        assert ours["acc"] == sample["acc"]
    mean = sum(sample["perplexity"] for sample in samples) / len(samples)
    assert harness.metric("last_word") == "loglikelihood"
    assert harness.aggregate("last_word", list(outcomes.values())) == pytest.approx(mean, abs=TOLERANCE)


def test_rolling_loglikelihood_is_lm_evals_beyond_the_context_length(target, tasks_folder, samples):
    harness = evaluator(tasks_folder, whole={})
    outcomes, _ = evaluate_all(harness, target)
    samples = samples["whole"]
    assert any(len(sample["doc"]["text"]) > 256 for sample in samples), "no text has several windows"
    for sample in samples:
        total, size = sample["word_perplexity"]
        ours = outcomes[sample["doc_id"]]
        assert ours.weight == size
        assert ours.values["loglikelihood_per_word"] * size == pytest.approx(total, abs=TOLERANCE * size)
        total, size = sample["bits_per_byte"]
        assert ours.values["loglikelihood_per_byte"] * size == pytest.approx(total, abs=TOLERANCE * size)
    words = sum(sample["word_perplexity"][1] for sample in samples)
    total = sum(sample["word_perplexity"][0] for sample in samples)
    assert harness.aggregate("whole", list(outcomes.values())) == pytest.approx(total / words, abs=TOLERANCE)


def test_chat_template_and_system_instruction_are_lm_evals(target, tasks_folder, language_model):
    import lm_eval

    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}
    loaded: Any = task_manager(tasks_folder).load(["shots"])
    loaded["tasks"]["shots"].set_fewshot_seed(1234)
    try:
        target.tokenizer.chat_template = turns + "{% if add_generation_prompt %}<a>{% endif %}"
        harness: Any = evaluator(tasks_folder, shots=options)
        outcomes, items = evaluate_all(harness, target)
        result: Any = lm_eval.evaluate(language_model, loaded, bootstrap_iters=0, **options)
    finally:
        target.tokenizer.chat_template = None
    for sample in result["samples"]["shots"]:
        i = sample["doc_id"]
        asked = [instance.args for instance in harness._instances[items[i].id]]
        assert asked == [tuple(arguments) for arguments in sample["arguments"]]
        assert "<system>Be brief." in asked[0][0]
        right = sample["resps"][sample["doc"]["label"]][0][0]
        assert outcomes[i].values["loglikelihood"] == pytest.approx(right, abs=TOLERANCE)


def test_own_splits_limit_and_data_splits(tasks_folder):
    items = evaluator(tasks_folder, own_splits={}).load()
    assert {item.own_split for item in items} == {"test", "validation"}
    split = assign_splits(items, {"search": "validation", "test": "test"}, seed=0)
    assert {(item.own_split, item.split) for item in split} == {
        ("validation", "search"), ("validation", "select"), ("test", "test")
    }  # fmt: skip
    limited = evaluator(tasks_folder, own_splits={"limit": 3, "data_splits": ["train", "test"]}).load()
    assert [item.own_split for item in limited] == ["test"] * 3 + ["train"] * 3


def test_ids_are_of_the_content_not_of_the_place(tasks_folder, tmp_path):
    rows = json.loads((tasks_folder / "test.json").read_text())
    config = yaml.safe_load((tasks_folder / "choice.yaml").read_text())
    (tmp_path / "moved.json").write_text(json.dumps(rows[::-1]))
    config["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "moved.json")}
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(config))
    moved, there = evaluator(tmp_path, choice={}), evaluator(tasks_folder, choice={})
    assert {item.id for item in moved.load()} == {item.id for item in there.load()}
    assert moved.load()[0].id == there.load()[-1].id
    assert moved.fingerprint()["data of task choice"] != there.fingerprint()["data of task choice"]


def test_the_fingerprint_names_the_evaluator_the_yaml_and_the_data(tasks_folder):
    fingerprint = evaluator(tasks_folder, choice={}).fingerprint()
    assert {"evaluators/harness.py", "choice.yaml", "data of task choice", "lm-eval"} <= set(fingerprint)


def test_examples_that_cannot_be_kept_apart_are_refused_without_a_model(tasks_folder):
    harness = evaluator(tasks_folder, no_examples={})
    with pytest.raises(EvaluatorError, match=r"5 few-shot examples must come from none of the items, but 0 of 40"):
        harness.check(harness.load())
    harness.check(harness.load()[:30])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"choise": {}}, r"no lm-eval task 'choise'[\s\S]*choice"),
        ({"hellaswagg": {}}, r"Did you mean[\s\S]*hellaswag"),
        ({"mmlu": {}}, "group"),
        ({"choice": {"num_fewshots": 2}}, "num_fewshot"),
        ({"choice": {"num_fewshot": -1}}, "whole number"),
        ({"choice": {"limit": 0}}, "whole number"),
        ({"choice": {"metric": "exact_match"}}, "no metric 'exact_match'"),
        ({"last_word": {"metric": "perplexity"}}, "lower-is-better"),
        ({"whole": {"metric": "bits_per_byte"}}, "loglikelihood_per_byte"),
        ({"write": {"generation_kwargs": {"do_sample": True, "temperature": 0.7}}}, "only greedy"),
        ({"choice": {"data_splits": ["validation"]}}, "no data split 'validation'"),
        ({"choice": {"fewshot_as_multiturn": True}}, "apply_chat_template"),
        ({"elsewhere": {"task": "nowhere.yaml"}}, "no file"),
    ],
)
def test_bad_tasks_are_refused_by_name(tasks, message, tasks_folder):
    with pytest.raises(EvaluatorError, match=message):
        evaluator(tasks_folder, **tasks).load()


def test_a_broken_task_file_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: [broken\n")
    with pytest.raises(EvaluatorError, match=r"broken.yaml cannot be read"):
        evaluator(tmp_path, broken={}).load()


def test_data_that_are_not_there_are_an_evaluator_error(tasks_folder, tmp_path):
    config = yaml.safe_load((tasks_folder / "choice.yaml").read_text())
    config["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "gone.json")}
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(EvaluatorError, match=r"could not load 'choice'"):
        evaluator(tmp_path, choice={}).load()


def test_unknown_options_and_folders_are_refused(tasks_folder):
    tasks = {"choice": TaskSpec("choice")}
    with pytest.raises(EvaluatorError, match="include_path"):
        load_evaluator(str(HARNESS), EvaluatorContext(tasks_folder, tasks, {"include_paths": "."})).load()
    with pytest.raises(EvaluatorError, match="is not a folder"):
        load_evaluator(str(HARNESS), EvaluatorContext(tasks_folder, tasks, {"include_path": "nowhere"})).load()


def test_predictions_without_labels_need_none(target, tasks_folder, monkeypatch):
    """Documents whose labels nobody may look at, once the prompts are made."""
    tasks: dict[str, dict] = {name: {} for name in ("choice", "shots", "blank", "write", "last_word", "whole")}
    harness: Any = evaluator(tasks_folder, **tasks)
    items = harness.load()
    harness.prepare(target, items)

    def asked(labels: bool) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                harness.predictions(
                    target, [i.id for i in items if i.task == name][:3], over=over, labels=labels
                ).logits
                for name in tasks
                for over in sorted(harness.predicts(name) & {"answers", "tokens"})
            ]

    expected = asked(labels=False)
    for task in harness.tasks.values():
        for name in ("_right", "answer_pairs"):
            monkeypatch.setattr(task, name, None)
        monkeypatch.setattr(task.lm, "doc_to_target", None)
    for ours, theirs in zip(asked(labels=False), expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(TypeError):
        asked(labels=True)


def test_unlabelled_tokens_are_those_after_the_prompt(target, tasks_folder):
    """One row an item, where the greedy answer begins; of choices that are contexts, one row each."""
    harness: Any = evaluator(tasks_folder, write={}, choice={}, blank={})
    items = harness.load()
    harness.prepare(target, items)
    for name in ("write", "choice", "blank"):
        some = [item for item in items if item.task == name][:4]
        with torch.no_grad():
            found = harness.predictions(target, [item.id for item in some], over="tokens")
        rows = 4 if name == "blank" else 1
        assert found.right is None
        assert found.weights.tolist() == [1 / rows] * (4 * rows)
        for n, item in enumerate(some):
            texts = dict.fromkeys(instance.args[0] for instance in harness._instances[item.id])
            for k, text in enumerate(texts):
                ids = torch.tensor([target.tokenizer.encode(text)])
                with torch.no_grad():
                    logits = target.model(input_ids=ids).logits[0, -1]
                assert (found.logits[rows * n + k] - logits).abs().max() < 1e-4


def test_a_label_that_is_not_there_is_an_error_only_where_labels_are_asked_for(target, tasks_folder, monkeypatch):
    harness: Any = evaluator(tasks_folder, choice={})
    items = harness.load()[:3]
    harness.prepare(target, items)
    ids = [item.id for item in items]
    monkeypatch.setattr(harness.tasks["choice"].lm, "doc_to_target", lambda doc: -1)
    with pytest.raises(EvaluatorError, match="no right choice"):
        harness.predictions(target, ids, labels=True)
    assert harness.predictions(target, ids).logits.shape == (3, 4)


def test_predictions_are_of_one_task_and_of_items_that_are_there_once(target, tasks_folder):
    harness: Any = evaluator(tasks_folder, choice={}, write={})
    items = harness.load()
    harness.prepare(target, items)
    ids = [next(item.id for item in items if item.task == task) for task in ("choice", "write")]
    for wrong in (ids, [ids[0], ids[0]], []):
        with pytest.raises(ValueError, match="items of one task"):
            harness.predictions(target, wrong, over="tokens")
    with pytest.raises(ValueError, match="not 'labels'"):
        harness.predictions(target, ids[:1], over="labels")
    with pytest.raises(NotImplementedError, match="asked for answers"):
        harness.predictions(target, ids[1:])


class TestHarnessContract(EvaluatorContract):
    @pytest.fixture
    def case(self, tasks_folder: Path, target: Target) -> EvaluatorCase:
        tasks = {"choice": {}, "shots": {}, "write": {}, "last_word": {}, "whole": {"limit": 38}}
        return EvaluatorCase(lambda: evaluator(tasks_folder, **tasks), target, SPLIT)
