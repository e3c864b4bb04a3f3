"""Losses on batches in a worker, on a real tiny model: what they are held against is computed by hand each time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.batch_losses import BatchLosses
from evomerge.pools import Job, WorkerSpec
from evomerge.recipe import Group, Recipe, Source
from evomerge.worker import Worker

# Classes by the mean of the last hidden states; items say how long they are, so that batches are padded.
EVALUATOR = """
import torch
from evomerge import Evaluator, Item, Outcome, Predictions

class Classes(Evaluator):
    auto_class = "AutoModel"
    broken = ""

    def load(self):
        return [Item(f"{task}{i}", task, "alpha bravo carol"[: 5 + i]) for task in ("one", "two") for i in range(4)]

    def prepare(self, target, items):
        self.items = {item.id: item for item in items}

    def features(self, target, ids):
        rows = []
        for i in ids:
            tokens = torch.tensor([target.tokenizer(self.items[i].text)["input_ids"]])
            rows.append(target.model(input_ids=tokens).last_hidden_state[0].mean(0))
        return torch.stack(rows)

    def evaluate(self, target, ids):
        with torch.no_grad():
            return [Outcome(i, {"score": float(self.features(target, [i])[0, 0])}) for i in ids]

    def predicts(self, task):
        return frozenset(["answers", "hidden", "labels"])

    def predictions(self, target, item_ids, *, over="answers", labels=False, hidden=False):
        seen.append((tuple(item_ids), torch.is_grad_enabled(), torch.rand(()).item()))
        features = self.features(target, item_ids)
        logits = features[:, :3] * (float("nan") if self.broken in item_ids else 1.0)
        ones = torch.ones(len(item_ids))
        right = torch.tensor([0] * len(item_ids)) if labels else None
        return Predictions(logits, ones, right, features if hidden else None, ones if hidden else None)

seen = []
"""
IDS = tuple(f"{task}{i}" for task in ("one", "two") for i in range(4))
BATCHES = [["one", ["one0", "one2"]], ["two", ["two1", "two3", "two0"]], ["one", ["one3"]]]


@pytest.fixture(scope="module")
def worker(lora_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    file = tmp_path_factory.mktemp("classes") / "classes.py"
    file.write_text(EVALUATOR)
    return Worker(
        WorkerSpec(
            folder=str(lora_family),
            base={"name": "base", "path": "base", "sha256": "0" * 64},
            experts=tuple({"name": f"expert{t}", "path": f"expert{t}", "sha256": str(t + 1) * 64} for t in range(2)),
            evaluator=str(file),
            tasks={"one": {"name": "one"}, "two": {"name": "two"}},
            splits=dict.fromkeys(IDS, "search"),
        )
    )


def recipe_at(worker: Worker, *weights: float) -> Recipe:
    """One weight an expert for the lower half of the layers, and one for the upper: lower half first."""
    base, *experts = (Source(s["name"], s["path"], s["sha256"]) for s in (worker.spec.base, *worker.spec.experts))
    groups = (Group(weights[:2], (0, 2)), Group(weights[2:], (2, 4)))
    return Recipe(base, tuple(experts), "task_arithmetic", groups)


def wanted(**changes: Any) -> dict[str, Any]:
    settings = {"loss": "entropy", "over": "answers", "batches": BATCHES, "learn": True, "free": False}
    asked = {**settings, "experts": {"one": 0, "two": 1}, **changes}
    return {"shares": [1.0] * len(asked["batches"]), **asked}


def of(worker: Worker, recipe: Recipe, **changes: Any):
    result = worker.evaluate(Job("gradient:0", 1, recipe.to_dict(), (), wanted(**changes)))
    assert result.failure is None, result.failure
    assert result.outcomes is None and result.gradients is not None
    return result.gradients


def apart(worker: Worker, recipe: Recipe, **changes: Any):
    """Each batch as a job of its own."""
    return tuple(of(worker, recipe, batches=[batch], **changes)[0] for batch in BATCHES)


AT = (0.3, 0.7, 1.1, 0.2)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("loss", ["entropy", "cross_entropy", "kl_to_expert", "hidden_mse"])
def test_gradients_are_group_by_group_and_those_of_central_differences(worker, loss, free):
    found = apart(worker, recipe_at(worker, *AT), loss=loss, free=free)
    assert [one.task for one in found] == ["one", "two", "one"]
    step = 2e-2
    for place in range(4):
        ends = []
        for sign in (1, -1):
            moved = [w + sign * step * (i == place) for i, w in enumerate(AT)]
            ends.append(of(worker, recipe_at(worker, *moved), loss=loss, learn=False))
        for one, high, low in zip(found, *ends, strict=True):
            assert high.gradient == () and len(one.gradient) == 4
            numeric = (high.loss - low.loss) / (2 * step)
            assert one.gradient[place] == pytest.approx(numeric, rel=0.05, abs=2e-3)


def test_a_batch_has_the_same_bits_alone_and_after_anything_else(worker):
    recipe = recipe_at(worker, *AT)
    for loss in ("entropy", "kl_to_expert", "hidden_mse"):
        whole, alone = of(worker, recipe, loss=loss), apart(worker, recipe, loss=loss)
        worker.evaluate(Job("t", 1, recipe_at(worker, 1, 1, 1, 1).to_dict(), IDS))
        worker._losses = None
        assert [one.loss for one in whole] == [one.loss for one in alone]
        assert apart(worker, recipe, loss=loss) == alone and of(worker, recipe, loss=loss) == whole


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("loss", ["entropy", "kl_to_expert"])
def test_the_first_of_a_jobs_batches_has_the_gradient_of_the_sum(worker, loss, free):
    recipe, shares = recipe_at(worker, *AT), [0.5, 0.125, 0.375]
    alone = apart(worker, recipe, loss=loss)
    first, *others = summed = of(worker, recipe, loss=loss, free=free, shares=shares)
    assert [(one.task, one.loss) for one in summed] == [(one.task, one.loss) for one in alone]
    assert [one.gradient for one in others] == [(), ()]
    expected = np.array(shares) @ np.array([one.gradient for one in alone])
    np.testing.assert_allclose(first.gradient, expected, rtol=1e-4, atol=1e-6)


def test_an_evaluation_does_not_see_what_was_learned(worker):
    job = Job("t", 1, recipe_at(worker, *AT).to_dict(), IDS)
    before = worker.evaluate(job).outcomes
    for loss in ("entropy", "kl_to_expert"):
        of(worker, recipe_at(worker, *AT), loss=loss)
        assert worker.evaluate(job).outcomes == before
    assert all(p.grad is None for p in worker.target.model.parameters())


def test_an_experts_distance_to_itself_is_nothing(worker):
    alone = recipe_at(worker, 1, 0, 1, 0)
    alone = replace(alone, groups=tuple(replace(group, weights=(1.0, 0.0)) for group in alone.groups))
    for loss in ("kl_to_expert", "hidden_mse"):
        found = of(worker, alone, loss=loss)
        assert [one.loss for one in found if one.task == "one"] == pytest.approx([0, 0], abs=1e-6)
        assert next(one.loss for one in found if one.task == "two") > 1e-6


@pytest.mark.parametrize("room", [0, 2**20])
def test_experts_are_asked_once_an_item_as_far_as_there_is_room(worker, room):
    import sys

    assert worker.target is not None
    losses = BatchLosses(worker.merger, worker.evaluator, worker.target, worker_seed(worker), Path(), kept_bytes=room)
    seen = sys.modules[type(worker.evaluator).__module__].seen
    results = []
    for _ in range(2):
        seen.clear()
        results.append(losses.of(recipe_at(worker, *AT), wanted(loss="kl_to_expert")))
        alone = [ids for ids, grad, _ in seen if not grad]
        assert sorted(alone) == ([] if room and len(results) == 2 else sorted((i,) for _, ids in BATCHES for i in ids))
        assert len({draw for *_, draw in seen}) == 1  # every call starts from the study's seed
    assert results[0] == results[1]


def worker_seed(worker: Worker):
    from evomerge.worker import _seeded

    return lambda: _seeded(worker.spec.seed)


@pytest.mark.parametrize("learn", [True, False])
def test_a_loss_that_is_no_number_names_its_task(worker, monkeypatch, learn):
    monkeypatch.setattr(worker.evaluator, "broken", "two3")
    result = worker.evaluate(Job("gradient:3", 1, recipe_at(worker, *AT).to_dict(), (), wanted(learn=learn)))
    assert result.gradients is None and result.failure is not None
    assert (result.failure.kind, result.failure.reason) == ("nan", "task two: the loss is nan")
    assert torch.is_grad_enabled() and np.isfinite(of(worker, recipe_at(worker, *AT), batches=BATCHES[:1])[0].loss)


def test_a_loss_of_the_users_own_is_found_beside_the_experiment(worker: Worker, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from evomerge import Loss\n\n"
        "class Twice(Loss):\n"
        "    name, summary, reference, labels = 'twice', '', '', True\n\n"
        "    def of(self, mine, expert):\n"
        "        return -2 * mine.logits.log_softmax(1).gather(1, mine.right[:, None]).mean()\n"
    )
    assert worker.target is not None
    losses = BatchLosses(worker.merger, worker.evaluator, worker.target, worker_seed(worker), tmp_path)
    point = recipe_at(worker, *AT)
    mine = losses.of(point, wanted(loss="mine.py@twice"))
    own = losses.of(point, wanted(loss="cross_entropy"))
    assert mine[0].gradient
    for found, half in zip(mine, own, strict=True):
        assert found.loss == pytest.approx(2 * half.loss, rel=1e-6)
        assert found.gradient == pytest.approx([2 * g for g in half.gradient], rel=1e-4, abs=1e-9)
