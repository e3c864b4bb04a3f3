"""Function evaluators, splits, scores: what the driver and the workers rest on."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import CandidateError, EvaluatorError
from evomerge.evaluation import (
    SPLITS,
    Evaluator,
    EvaluatorContext,
    Item,
    Outcome,
    Target,
    TaskSpec,
    assign_splits,
    check_outcomes,
    load_evaluator,
    task_scores,
)
from evomerge.splits import normalise_text
from evomerge.testing import tiny
from evomerge.testing.evaluators import EvaluatorCase, EvaluatorContract

NOWHERE = Target(model=None, tokenizer=None)


def context(folder: Path, *tasks: str, batch_size: int = 3, **changes: Any) -> EvaluatorContext:
    return EvaluatorContext(folder, {t: TaskSpec(t) for t in tasks or ("one", "two")}, batch_size=batch_size, **changes)


def write(folder: Path, score: str, items: str = '[{"task": "one", "n": i} for i in range(12)]', head: str = "") -> str:
    (folder / "my_eval.py").write_text(
        f"{head}\ndef items():\n    return {items}\n\n\ndef score(model, tokenizer, items):\n    {score}\n"
    )
    return "my_eval.py@score"


def prepared(folder: Path, score: str, **changes: Any) -> tuple[Evaluator, list[str]]:
    evaluator = load_evaluator(write(folder, score, **changes), context(folder, "one"))
    items = [Item(i.id, i.task, i.text, i.data, split="search") for i in evaluator.load()]
    evaluator.prepare(NOWHERE, items)
    return evaluator, [item.id for item in items]


class TestFunctionContract(EvaluatorContract):
    @pytest.fixture
    def case(self, lora_family: Path, tmp_path: Path) -> EvaluatorCase:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(lora_family / "base", dtype=torch.float32).eval()
        target = Target(model, AutoTokenizer.from_pretrained(lora_family / "base"))
        (tmp_path / "my_eval.py").write_text(tiny.EVALUATOR)
        split = {"search": 8, "select": 7, "test": 6}
        return EvaluatorCase(lambda: load_evaluator("my_eval.py@score", context(tmp_path)), target, split)


def test_a_function_gets_whole_batches_of_one_task_and_split_as_it_made_them(tmp_path):
    items = '[{"task": t, "n": i, "deep": [i]} for i in range(8) for t in ("one", "two")]'
    body = "SEEN.append([i.copy() for i in items])\n    items[0]['deep'].clear()\n    return [i['n'] for i in items]"
    name = write(tmp_path, body, items, head="SEEN = []")
    evaluator: Any = load_evaluator(name, context(tmp_path))
    study = assign_splits(evaluator.load(), {"search": 4, "select": 2, "test": 2}, seed=0)
    evaluator.prepare(NOWHERE, study)
    split = {item.data["n"]: item.split for item in study if item.task == "one"}
    mine = [item for item in study if item.task == "one" and item.split == "search"]
    outcomes = evaluator.evaluate(NOWHERE, [mine[2].id, mine[0].id])
    assert [o.values["score"] for o in outcomes] == [mine[2].data["n"], mine[0].data["n"]]
    seen = evaluator._score.__globals__["SEEN"]
    assert all(item["task"] == "one" and split[item["n"]] == "search" for batch in seen for item in batch)
    assert all(item["deep"] in ([item["n"]], []) for batch in seen for item in batch)
    evaluator.evaluate(NOWHERE, [mine[0].id])
    assert all(item.data["deep"] == [item.data["n"]] for item in study), "the function changed its items for good"
    assert max(len(batch) for batch in seen) == 3


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("return [1.0] * (len(items) - 1)", "incomplete", "gave 2 values for 3 items"),
        ("return [None] * len(items)", "incomplete", "None"),
        ("return None", "incomplete", "not a list"),
        ("return [float('nan')] * len(items)", "nan", "nan"),
        ("return [float('inf')] * len(items)", "nan", "inf"),
        ("return ['good'] * len(items)", "error", "'good'"),
        ("return [1 / 0 for i in items]", "error", "my_eval.py, line 7: ZeroDivisionError"),
    ],
)
def test_what_a_function_does_wrong_fails_the_candidate_with_its_reason(body, kind, message, tmp_path):
    evaluator, ids = prepared(tmp_path, body)
    with pytest.raises(CandidateError, match=message) as error:
        evaluator.evaluate(NOWHERE, ids)
    assert error.value.kind == kind


def test_memory_errors_are_left_to_the_worker(tmp_path):
    evaluator, ids = prepared(tmp_path, "raise MemoryError('all gone')")
    with pytest.raises(MemoryError):
        evaluator.evaluate(NOWHERE, ids)


def test_numbers_of_any_library_are_scores(tmp_path):
    body = "import numpy, torch\n    return [numpy.float32(1), torch.tensor(0.5), True]"
    evaluator, ids = prepared(tmp_path, body)
    assert Counter(o.values["score"] for o in evaluator.evaluate(NOWHERE, ids)) == {1.0: 8, 0.5: 4}


def test_a_functions_items_may_have_ids_texts_and_splits_of_their_own(tmp_path):
    items = '[{"task": "one", "id": i, "text": f"text {i}", "split": "dev"} for i in range(3)]'
    evaluator = load_evaluator(write(tmp_path, "return [1] * len(items)", items), context(tmp_path, "one"))
    assert [(i.id, i.text, i.own_split) for i in evaluator.load()] == [
        (f"one:{n}", f"text {n}", "dev") for n in range(3)
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ('[{"task": "uno"}]', r"none of task 'one'[\s\S]*uno"),
        ('[{"text": "no task"}]', r"items\(\)\[0\]: an item must be a dict with a 'task'"),
        ('[{"task": "one", "n": object()}]', "plain JSON"),
        ('[{"task": "one", "n": float("nan")}]', "plain JSON"),
        ('[{"task": "one", "id": 1}, {"task": "one", "id": 1}]', "more than once"),
        ('"abc"', "list of dicts"),
        ("[1 / 0]", r"my_eval.py, line 3: ZeroDivisionError"),
    ],
)
def test_items_that_cannot_be_used_are_refused(items, message, tmp_path):
    with pytest.raises(EvaluatorError, match=message):
        load_evaluator(write(tmp_path, "return []", items), context(tmp_path, "one")).load()


def test_a_function_takes_no_options_and_has_one_metric(tmp_path):
    name = write(tmp_path, "return []")
    with pytest.raises(EvaluatorError, match="include_path"):
        load_evaluator(name, context(tmp_path, "one", options={"include_path": "."}))
    for task in (TaskSpec("one", options={"num_fewshot": 1}), TaskSpec("one", metric="acc")):
        with pytest.raises(EvaluatorError, match=r"num_fewshot|acc"):
            load_evaluator(name, EvaluatorContext(tmp_path, {"one": task}))


CLASSES = """
from evomerge import Evaluator, Item, Outcome

class First(Evaluator):
    def load(self):
        return [Item("a", "one", "a")]

    def evaluate(self, target, item_ids):
        return [Outcome(i, {"score": 1.0}) for i in item_ids]
"""


def test_a_file_names_its_one_class_or_says_which(tmp_path):
    (tmp_path / "one.py").write_text(CLASSES)
    (tmp_path / "two.py").write_text(CLASSES + "\nclass Second(First):\n    pass\n\ndef helper(): ...\n")
    first = load_evaluator("one.py", context(tmp_path, "one"))
    assert type(first).__name__ == "First"
    assert type(load_evaluator("two.py@Second", context(tmp_path, "one"))).__name__ == "Second"
    for name, message in [
        ("two.py", "exactly one Evaluator, but defines 2"),
        ("two.py@Secnod", r"'Secnod' is not there[\s\S]*Did you mean 'Second'"),
        ("two.py@helper", r"no items\(\)"),
        ("two.py@Item", "neither a function nor an Evaluator"),
        ("three.py@score", "no such evaluator file"),
    ]:
        with pytest.raises(EvaluatorError, match=message):
            load_evaluator(name, context(tmp_path, "one"))


def test_a_file_that_does_not_run_is_named_with_its_line(tmp_path):
    (tmp_path / "syntax.py").write_text("x = 1\ndef score(:\n")
    (tmp_path / "raises.py").write_text("\n\nimport not_a_module\n")
    before = set(sys.modules), list(sys.path)
    for name, message in [("syntax.py@score", "line 2: SyntaxError"), ("raises.py@score", "raises.py, line 3: Module")]:
        with pytest.raises(EvaluatorError, match=message):
            load_evaluator(name, context(tmp_path))
    assert (set(sys.modules), list(sys.path)) == before


def test_files_of_the_same_name_do_not_meet(tmp_path):
    loaded = []
    for value in (1, 2):
        folder = tmp_path / str(value)
        folder.mkdir()
        loaded.append(prepared(folder, f"return [VALUE] * len(items)", head=f"VALUE = {value}"))  # noqa: F541
    assert [evaluator.evaluate(NOWHERE, ids[:1])[0].values["score"] for evaluator, ids in loaded] == [1, 2]
    assert not any(name == "my_eval" for name in sys.modules)


def test_the_fingerprint_follows_the_file_what_it_imports_and_its_items(tmp_path):
    (tmp_path / "beside_it.py").write_text("N = 5\n")
    (tmp_path / "unrelated.py").write_text("N = 5\n")
    name = write(tmp_path, "return []", '[{"task": "one", "id": i} for i in range(beside_it.N)]', "import beside_it")

    def fingerprint() -> dict[str, str]:
        sys.modules.pop("beside_it", None)
        return load_evaluator(name, context(tmp_path, "one")).fingerprint()

    first = fingerprint()
    assert set(first) == {"my_eval.py", "beside_it.py", "items of my_eval.py"}
    assert first == fingerprint()
    (tmp_path / "beside_it.py").write_text("N = 6\n")
    second = fingerprint()
    assert {key for key in first if first[key] != second[key]} == {"beside_it.py", "items of my_eval.py"}
    sys.modules.pop("beside_it", None)


counts_of_splits = st.fixed_dictionaries({split: st.integers(1, 9) for split in SPLITS})
texts = st.lists(st.text("abAB \t", max_size=4), max_size=60)


def items_of(texts: list[str], task: str = "one", **changes: Any) -> list[Item]:
    return [Item(f"{task}{i}", task, text, **changes) for i, text in enumerate(texts)]


@given(texts, texts, counts_of_splits, st.integers(0, 3))
def test_counts_are_exact_disjoint_and_free_of_duplicates(first, second, counts, seed):
    items = [*items_of(first), *items_of(second, "two")]
    distinct = {
        task: len({normalise_text(i.text) or i.id for i in items if i.task == task}) for task in {i.task for i in items}
    }
    if any(n < sum(counts.values()) for n in distinct.values()):
        with pytest.raises(EvaluatorError) as error:
            assign_splits(items, counts, seed=seed)
        for task, n in distinct.items():
            assert (f"task {task}: {n} items" in str(error.value)) == (n < sum(counts.values()))
        return
    study = assign_splits(items, counts, seed=seed)
    for task in distinct:
        mine = [item for item in study if item.task == task]
        assert Counter(item.split for item in mine) == counts
        seen = [normalise_text(item.text) or item.id for item in mine]
        assert len(set(seen)) == len(seen)
    assert study == assign_splits(items, counts, seed=seed)


@given(st.permutations(range(40)), st.integers(0, 5))
def test_who_goes_where_does_not_depend_on_the_order_of_the_data(order, seed):
    items = items_of([str(i) for i in range(40)])
    counts = {"search": 10, "select": 7, "test": 5}
    shuffled = assign_splits([items[i] for i in order], counts, seed=seed)
    assert shuffled == assign_splits(items, counts, seed=seed)


def test_more_search_items_leave_select_and_test_as_they_are():
    items = items_of([str(i) for i in range(100)])

    def chosen(search: int) -> dict[str, set[str]]:
        study = assign_splits(items, {"search": search, "select": 20, "test": 30}, seed=1)
        return {split: {item.id for item in study if item.split == split} for split in SPLITS}

    few, many = chosen(10), chosen(40)
    assert few["select"] == many["select"]
    assert few["test"] == many["test"]
    assert few["search"] < many["search"]
    assert chosen(10) == few
    other = assign_splits(items, {"search": 10, "select": 20, "test": 30}, seed=2)
    assert {item.id for item in other if item.split == "test"} != few["test"]


@given(st.integers(3, 200), st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_shares_are_shares_of_what_is_there(n, search, select, test):
    items = items_of([str(i) for i in range(n)])
    shares = dict(zip(SPLITS, (search, select, test), strict=True))
    if sum(shares.values()) > 1:
        with pytest.raises(EvaluatorError, match="add up to at most 1"):
            assign_splits(items, shares, seed=0)
        return
    try:
        study = assign_splits(items, shares, seed=0)
    except EvaluatorError as error:
        assert "empty" in str(error)
        assert min(shares.values()) * n < 1.5
        return
    found = Counter(item.split for item in study)
    for split, share in shares.items():
        assert abs(found[split] - share * n) <= 1


def test_shares_that_add_up_to_one_use_every_item():
    study = assign_splits(items_of([str(i) for i in range(101)]), {"search": 0.2, "select": 0.3, "test": 0.5}, seed=0)
    assert len(study) == 101


def test_own_splits_are_kept_and_shared_evenly_where_named_twice():
    validation = items_of([str(i) for i in range(11)], own_split="validation")
    test = [Item(f"t{i}", "one", f"test {i}", own_split="test") for i in range(5)]
    for spec in (
        {"search": "validation", "test": "test"},
        {"search": "validation", "select": "validation", "test": "test"},
    ):
        study = assign_splits([*validation, *test], spec, seed=0)
        assert Counter((item.own_split, item.split) for item in study) == {
            ("validation", "search"): 6, ("validation", "select"): 5, ("test", "test"): 5,
        }  # fmt: skip


def test_a_text_in_two_own_splits_stays_in_test():
    validation = items_of(["same", "a", "b"], own_split="validation")
    test = [Item("t", "one", " SAME ", own_split="test")]
    study = assign_splits([*validation, *test], {"search": "validation", "test": "test"}, seed=0)
    assert {(item.id, item.split == "test") for item in study} == {("t", True), ("one1", False), ("one2", False)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"search": 5, "select": 5}, "test is missing"),
        ({"search": 5, "select": 5, "test": 0}, "at least one"),
        ({"search": 5, "select": 0.5, "test": "test"}, "all splits must be"),
        ({"search": True, "select": 5, "test": 5}, "all splits must be"),
        ({"search": 0.5, "select": 0.5, "test": 0.5}, "at most 1"),
        ({"serch": 5, "select": 5, "test": 5}, r"no split 'serch'[\s\S]*search"),
        ({"search": "dev", "test": "test"}, r"leave search, select, test empty; its own splits are validation"),
        ({"search": 500, "select": 5, "test": 5}, r"task one: 20 items \(0 duplicates aside\), but 500 search"),
    ],
)
def test_bad_splits_are_refused(spec, message):
    with pytest.raises(EvaluatorError, match=message):
        assign_splits(items_of([str(i) for i in range(20)], own_split="validation"), spec, seed=0)


def test_outcomes_are_checked_for_number_order_and_values():
    good = [Outcome("a", {"score": 1.0}), Outcome("b", {"score": 0})]
    check_outcomes(good, ["a", "b"])
    broken: list[tuple[Any, str]] = [
        (good[:1], "incomplete"),
        ([*good, good[0]], "incomplete"),
        (good[::-1], "incomplete"),
        ([good[0], None], "incomplete"),
        ([good[0], Outcome("b", {})], "incomplete"),
        ([good[0], Outcome("b", {"score": None})], "incomplete"),  # type: ignore[dict-item]
        ([good[0], Outcome("b", {"score": math.nan})], "nan"),
        ([good[0], Outcome("b", {"score": -math.inf})], "nan"),
        ([good[0], Outcome("b", {"score": 1.0}, weight=math.nan)], "nan"),
        ([good[0], Outcome("b", {"score": "1"})], "error"),  # type: ignore[dict-item]
    ]
    for outcomes, kind in broken:
        with pytest.raises(CandidateError) as error:
            check_outcomes(outcomes, ["a", "b"])
        assert error.value.kind == kind


def test_task_scores_are_weighted_means_and_the_objective_is_their_mean_or_minimum(tmp_path):
    tasks = {"two": TaskSpec("two", weight=3.0), "one": TaskSpec("one"), "unused": TaskSpec("unused", weight=0.0)}
    evaluator = Evaluator(EvaluatorContext(tmp_path, tasks))
    items = [Item("a", "one", ""), Item("b", "one", ""), Item("c", "two", "")]
    outcomes = [Outcome("a", {"score": 1.0}), Outcome("b", {"score": 0.0}, weight=3.0), Outcome("c", {"score": 0.5})]
    scores = task_scores(evaluator, items, outcomes)
    assert list(scores.items()) == [("two", 0.5), ("one", 0.25)]


def test_a_task_score_that_is_not_finite_fails_the_candidate(tmp_path):
    class Broken(Evaluator):
        def aggregate(self, task, outcomes):
            return math.nan

    evaluator = Broken(context(tmp_path, "one"))
    with pytest.raises(CandidateError) as error:
        task_scores(evaluator, [Item("a", "one", "")], [Outcome("a", {"score": 1.0})])
    assert error.value.kind == "nan"
