"""What every evaluator must hold, as tests that a plug-in's author inherits::

    class TestMine(EvaluatorContract):
        evaluator = "mine.py@score"  # beside the test
        tasks = {"one": {}}

It is tried on a tiny Llama of random weights. Another model, or data made by fixtures: override the fixture ``case``,
with a batch size smaller than a split, so that a split has several batches. An evaluator that needs a checkpoint gets
that of the tiny Llama; a case of its own names another, ``Target(checkpoint=folder)``. Every evaluation has a scratch
folder of its own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from evomerge.evaluation import (
    Evaluator,
    EvaluatorContext,
    Item,
    Outcome,
    Predictions,
    Target,
    TaskSpec,
    assign_splits,
    check_outcomes,
    load_evaluator,
    task_scores,
)


@dataclass(frozen=True)
class EvaluatorCase:
    """An evaluator to try: how to make it anew, what it looks at, and how its items are split."""

    make: Callable[[], Evaluator]
    target: Target
    split: Mapping[str, Any]

    def prepared(self) -> tuple[Evaluator, list[Item]]:
        """A new evaluator, ready to evaluate, and the study's items."""
        evaluator = self.make()
        items = assign_splits(evaluator.load(), self.split, seed=0)
        evaluator.check(items)
        evaluator.prepare(self.target if evaluator.needs == "model" else None, items)
        return evaluator, items


def _evaluate(evaluator: Evaluator, target: Target, ids: list[str]) -> list[Outcome]:
    if evaluator.needs == "model":
        return evaluator.evaluate(target, ids)
    with tempfile.TemporaryDirectory() as scratch:
        return evaluator.evaluate(replace(target, model=None, tokenizer=None, scratch=Path(scratch)), ids)


@functools.cache
def _tiny_target(folder: Path) -> Target:
    from evomerge.merging import load_resident
    from evomerge.testing import tiny

    base = tiny.save_model(folder / "evaluated", tiny.llama_config(), seed=0)
    model = load_resident(base, auto_class="AutoModelForCausalLM", compute_dtype="float32")
    return Target(model, tiny.tokenizer(), checkpoint=base)


def _outcomes(evaluator: Evaluator, target: Target, ids: list[str]) -> dict[str, Outcome]:
    outcomes = _evaluate(evaluator, target, ids)
    check_outcomes(outcomes, ids)
    return {outcome.item_id: outcome for outcome in outcomes}


def _asked_for(case: EvaluatorCase, evaluator: Evaluator, items: list[Item]) -> list[tuple[list[str], dict[str, Any]]]:
    """What ``predictions`` can be asked for: a few items of one task in an order of their own, and the arguments."""
    asked = []
    for task in evaluator.context.tasks:
        serves = evaluator.predicts(task)
        assert serves <= {"answers", "tokens", "labels", "hidden"}
        ids = [item.id for item in items if item.task == task][:5]
        random.Random(2).shuffle(ids)
        for over in sorted(serves & {"answers", "tokens"}):
            for labels in (False, True)[: 1 + ("labels" in serves)]:
                asked.append((ids, {"over": over, "labels": labels, "hidden": "hidden" in serves}))
    if not asked:
        pytest.skip("it predicts nothing")
    return asked


def _adapting(evaluator: Evaluator) -> list[str]:
    """The tasks that take adapters."""
    tasks = [task for task in evaluator.context.tasks if evaluator.adapts(task)]
    if not tasks:
        pytest.skip("it takes no adapters")
    return tasks


def _in_float64(target: Target) -> Target:
    return replace(target, model=copy.deepcopy(target.model).double())


def _rows(predictions: Predictions) -> dict[str, torch.Tensor]:
    """All tensors of some predictions, with the logits' constants taken out."""
    tensors = {
        "log-probabilities": predictions.logits.log_softmax(1),
        "weights": predictions.weights,
        "right": predictions.right,
        "hidden": predictions.hidden,
        "hidden_weights": predictions.hidden_weights,
    }
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


class EvaluatorContract:
    """Inherit and name ``evaluator`` and ``tasks``, as an experiment would, or provide the fixture ``case``."""

    evaluator: ClassVar[str]
    tasks: ClassVar[Mapping[str, Mapping[str, Any]]]  # name -> its options, weight and metric
    options: ClassVar[Mapping[str, Any]] = {}
    split: ClassVar[Mapping[str, Any]] = {"search": 8, "select": 8, "test": 8}
    label_keys: ClassVar[Sequence[str]] = ("label", "target", "answer")  # of items' data: what says what is right

    @pytest.fixture
    def case(self, tmp_path_factory: pytest.TempPathFactory) -> EvaluatorCase:
        folder = Path(inspect.getfile(type(self))).parent
        tasks = {}
        for name, entry in self.tasks.items():
            options = {key: value for key, value in entry.items() if key not in ("weight", "metric")}
            tasks[name] = TaskSpec(name, entry.get("weight", 1.0), entry.get("metric"), options)
        context = EvaluatorContext(folder, tasks, self.options, batch_size=3)
        target = _tiny_target(tmp_path_factory.getbasetemp())
        return EvaluatorCase(lambda: load_evaluator(self.evaluator, context), target, self.split)

    def test_loading_twice_gives_the_same_items(self, case: EvaluatorCase) -> None:
        assert case.make().load() == case.make().load()

    def test_ids_are_unique_and_tasks_are_the_experiments(self, case: EvaluatorCase) -> None:
        evaluator = case.make()
        items = evaluator.load()
        assert len({item.id for item in items}) == len(items) > 0
        assert {item.task for item in items} == set(evaluator.context.tasks)

    def test_outcomes_are_finite_and_in_the_order_asked_for(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        ids = [item.id for item in items]
        random.Random(1).shuffle(ids)
        outcomes = _evaluate(evaluator, case.target, ids)
        check_outcomes(outcomes, ids)
        for item in items:
            metric = evaluator.metric(item.task)
            assert all(metric in o.values for o in outcomes if o.item_id == item.id)

    def test_an_outcome_does_not_depend_on_what_else_is_asked_for(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        ids = [item.id for item in items]
        together = _outcomes(evaluator, case.target, ids)
        for some in (ids[:1], ids[-1:], ids[1::3], list(reversed(ids[::2]))):
            assert _outcomes(evaluator, case.target, some) == {i: together[i] for i in some}

    def test_evaluating_again_is_the_same_bit_for_bit(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        ids = [item.id for item in items if item.split == "search"]
        assert _outcomes(evaluator, case.target, ids) == _outcomes(evaluator, case.target, ids)

    def test_another_worker_gives_the_same_bit_for_bit(self, case: EvaluatorCase) -> None:
        (first, items), (second, again) = case.prepared(), case.prepared()
        assert items == again
        ids = [item.id for item in items if item.split == "select"]
        assert _outcomes(first, case.target, ids) == _outcomes(second, case.target, ids)

    def test_global_random_state_has_no_effect(self, case: EvaluatorCase) -> None:
        results = []
        state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                for seed in (1, 2):
                    random.seed(seed)
                    np.random.seed(seed)
                    torch.manual_seed(seed)
                    evaluator, items = case.prepared()
                    ids = [item.id for item in items if item.split == "search"]
                    results.append(_outcomes(evaluator, case.target, ids))
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
        assert results[0] == results[1]

    def test_likelihoods_are_those_of_the_outcomes_and_have_gradients(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        if not evaluator.has_likelihoods:
            pytest.skip("it has none")
        ids = [item.id for item in items[:4]]
        outcomes = _outcomes(evaluator, case.target, ids)
        weight = next(p for p in case.target.model.parameters() if p.dim() == 2).requires_grad_(True)
        try:
            with torch.enable_grad():
                found = list(evaluator.likelihoods(case.target, ids))
                (gradient,) = torch.autograd.grad(sum(item.logs[item.right] for item in found), weight)  # type: ignore[arg-type]
        finally:
            weight.requires_grad_(False)
        assert gradient.abs().sum() > 0
        alone = list(evaluator.likelihoods(case.target, ids[::-1], alternatives=False))[::-1]
        for item_id, item, right in zip(ids, found, alone, strict=True):
            assert item.logs.dim() == 1 and torch.isfinite(item.logs).all() and item.tokens >= 1
            torch.testing.assert_close(right.logs[right.right], item.logs[item.right], rtol=1e-4, atol=1e-4)
            assert right.tokens == item.tokens
            stated = outcomes[item_id].values.get("loglikelihood")
            if stated is not None:
                assert math.isclose(float(item.logs[item.right].detach()), stated, rel_tol=1e-4, abs_tol=1e-3)

    @pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
    def test_predictions_are_those_of_likelihoods(self, case: EvaluatorCase, wide: bool) -> None:
        """Padding is rounding at most: item by item they are what the item has alone."""
        evaluator, items = case.prepared()
        target = _in_float64(case.target) if wide else case.target
        tolerance = 1e-9 if wide else 1e-4
        for ids, arguments in _asked_for(case, evaluator, items):
            if not evaluator.has_likelihoods:
                pytest.skip("it has no likelihoods")
            with torch.no_grad():
                found = evaluator.predictions(target, ids, **arguments)
                alone = [evaluator.predictions(target, [i], **arguments) for i in ids]
                likelihoods = list(evaluator.likelihoods(target, ids))
            logs = found.logits.log_softmax(1).split([len(part.logits) for part in alone])
            rights = None if found.right is None else found.right.split([len(part.logits) for part in alone])
            for n, item in enumerate(likelihoods):
                if arguments["over"] == "answers":
                    expected = item.logs.log_softmax(0)
                    torch.testing.assert_close(logs[n][0, : len(expected)], expected, rtol=tolerance, atol=tolerance)
                    assert len(logs[n]) == 1 and (logs[n][0, len(expected) :] == -torch.inf).all()
                    assert rights is None or rights[n].tolist() == [item.right]
                elif rights is not None:
                    total = logs[n].gather(1, rights[n][:, None]).sum()
                    torch.testing.assert_close(
                        total, item.logs[item.right], rtol=tolerance, atol=tolerance * item.tokens
                    )
                    assert len(logs[n]) == item.tokens

    @pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
    def test_a_batch_of_predictions_is_its_items_one_after_the_other(self, case: EvaluatorCase, wide: bool) -> None:
        evaluator, items = case.prepared()
        target = _in_float64(case.target) if wide else case.target
        tolerance = 1e-9 if wide else 1e-4
        for ids, arguments in _asked_for(case, evaluator, items):
            with torch.no_grad():
                found = _rows(evaluator.predictions(target, ids, **arguments))
                alone = [_rows(evaluator.predictions(target, [i], **arguments)) for i in ids]
            names = {"log-probabilities", "weights"} | ({"right"} if arguments["labels"] else set())
            names |= {"hidden", "hidden_weights"} if arguments["hidden"] else set()
            assert set(found) == names
            classes = found["log-probabilities"].shape[1]
            for part in alone:
                assert part["log-probabilities"].isfinite().any(1).all() and part["log-probabilities"].shape[0] > 0
                short = classes - part["log-probabilities"].shape[1]
                part["log-probabilities"] = torch.nn.functional.pad(
                    part["log-probabilities"], (0, short), value=-torch.inf
                )
                for kind in sorted(names & {"weights", "hidden_weights"}):
                    assert math.isclose(float(part[kind].sum()), 1, rel_tol=1e-5) and (part[kind] >= 0).all()
            assert len(found["weights"]) == len(found["log-probabilities"])
            assert found["log-probabilities"].dtype in (torch.float32, torch.float64)
            for name in names:
                joined = torch.cat([part[name] for part in alone])
                torch.testing.assert_close(found[name], joined, rtol=tolerance, atol=tolerance)
            if arguments["hidden"]:
                assert len(found["hidden"]) == len(found["hidden_weights"])

    def test_predictions_have_finite_gradients(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        weight = next(p for p in case.target.model.parameters() if p.dim() == 2).requires_grad_(True)
        try:
            for ids, arguments in _asked_for(case, evaluator, items):
                with torch.enable_grad():
                    found = evaluator.predictions(case.target, ids, **arguments)
                    first = found.logits.log_softmax(1)[:, 0] @ found.weights.to(found.logits)
                    values = [first] if found.hidden is None else [first, found.hidden[:, 0].sum()]
                    for value in values:
                        (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
                        assert torch.isfinite(gradient).all()
                        assert gradient.abs().sum() > 0
        finally:
            weight.requires_grad_(False)

    def test_adapters_that_change_nothing_change_no_outcome(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        tasks, ids = _adapting(evaluator), [item.id for item in items]
        behind = replace(case.target, adapters={task: lambda features: features for task in tasks})
        assert _outcomes(evaluator, behind, ids) == _outcomes(evaluator, case.target, ids)

    def test_an_adapter_is_given_what_predictions_call_hidden(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        for task in _adapting(evaluator):
            assert {"answers", "hidden"} <= evaluator.predicts(task)
            ids = [item.id for item in items if item.task == task][:5]
            random.Random(3).shuffle(ids)
            given: list[torch.Tensor] = []
            adapter = lambda features, given=given: given.append(features.clone()) or features + 1  # noqa: E731
            with torch.no_grad():
                behind = replace(case.target, adapters={task: adapter})
                found = evaluator.predictions(behind, ids, over="answers", hidden=True).hidden
                plain = evaluator.predictions(case.target, ids, over="answers", hidden=True).hidden
            assert found is not None and plain is not None and found.dim() == 2 and len(found) == len(ids)
            torch.testing.assert_close(torch.cat(given), found, rtol=0, atol=0)
            torch.testing.assert_close(plain, found, rtol=0, atol=0)

    def test_an_adapter_counts_wherever_its_own_task_is_scored_and_nowhere_else(self, case: EvaluatorCase) -> None:
        """With one that makes all items look alike, all get the same prediction, by whatever way it is asked for."""
        evaluator, items = case.prepared()
        outcomes = _outcomes(evaluator, case.target, [item.id for item in items])
        for task in _adapting(evaluator):
            behind = replace(case.target, adapters={task: torch.ones_like})
            adapted = _outcomes(evaluator, behind, [item.id for item in items])
            others = {item.id for item in items if item.task != task}
            assert {i: adapted[i] for i in others} == {i: outcomes[i] for i in others}
            ids = [item.id for item in items if item.task == task][:5]
            labels = "labels" in evaluator.predicts(task)
            with torch.no_grad():
                found = evaluator.predictions(behind, ids, over="answers", labels=labels)
                likelihoods = list(evaluator.likelihoods(behind, ids)) if evaluator.has_likelihoods else []
            logs = found.logits.log_softmax(1)
            torch.testing.assert_close(logs, logs[:1].expand_as(logs), rtol=1e-5, atol=1e-5)
            for row, item in zip(logs, likelihoods, strict=bool(likelihoods)):
                torch.testing.assert_close(item.logs.log_softmax(0), row, rtol=1e-4, atol=1e-4)
            for row, right, i in zip(logs, [] if found.right is None else found.right.tolist(), ids, strict=labels):
                stated = adapted[i].values.get("loglikelihood")
                assert stated is None or math.isclose(float(row[right]), stated, rel_tol=1e-4, abs_tol=1e-3)

    def test_predictions_without_labels_read_none(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        blind = case.make()
        unlabelled = [
            replace(item, data={key: value for key, value in item.data.items() if key not in self.label_keys})
            for item in items
        ]
        blind.check(items)
        blind.prepare(case.target, unlabelled)
        for ids, arguments in _asked_for(case, evaluator, items):
            with torch.no_grad():
                found = evaluator.predictions(case.target, ids, **arguments)
                assert (found.right is None) != arguments["labels"]
                other = blind.predictions(case.target, ids, **{**arguments, "labels": False})
            if arguments["over"] == "answers" or not arguments["labels"]:
                torch.testing.assert_close(other.logits, found.logits, rtol=0, atol=0)

    def test_what_it_does_not_predict_is_refused(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        for task in evaluator.context.tasks:
            serves = evaluator.predicts(task)
            ids = [item.id for item in items if item.task == task][:2]
            for over in ("answers", "tokens"):
                for labels, hidden in ((False, False), (True, False), (False, True)):
                    asked = {over, *(["labels"] if labels else []), *(["hidden"] if hidden else [])}
                    if not asked <= serves:
                        with pytest.raises(NotImplementedError):
                            evaluator.predictions(case.target, ids, over=over, labels=labels, hidden=hidden)

    def test_a_checkpoint_is_only_read(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        if evaluator.needs == "model":
            pytest.skip("it needs none")
        folder = case.target.checkpoint
        assert folder is not None

        def content() -> dict[str, bytes]:
            return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

        before = content()
        _evaluate(evaluator, case.target, [items[0].id])
        assert content() == before

    def test_every_task_has_a_finite_score(self, case: EvaluatorCase) -> None:
        evaluator, items = case.prepared()
        search = [item for item in items if item.split == "search"]
        scores = task_scores(evaluator, search, _evaluate(evaluator, case.target, [item.id for item in search]))
        assert set(scores) == set(evaluator.context.tasks)
        assert all(math.isfinite(score) for score in scores.values())

    def test_the_fingerprint_is_there_and_stays(self, case: EvaluatorCase) -> None:
        first = case.make().fingerprint()
        assert first
        assert first == case.make().fingerprint()
