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

import functools
import inspect
import math
import random
import tempfile
from collections.abc import Callable, Mapping
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


class EvaluatorContract:
    """Inherit and name ``evaluator`` and ``tasks``, as an experiment would, or provide the fixture ``case``."""

    evaluator: ClassVar[str]
    tasks: ClassVar[Mapping[str, Mapping[str, Any]]]  # name -> its options, weight and metric
    options: ClassVar[Mapping[str, Any]] = {}
    split: ClassVar[Mapping[str, Any]] = {"search": 8, "select": 8, "test": 8}

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
