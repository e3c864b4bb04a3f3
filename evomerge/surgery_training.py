"""In a worker: the adapters of surgery, trained on features that are computed once.

The merged model does not move, so that its features and those of each task's own expert are all that training needs:
no gradient goes through a model. It is done on the CPU in float32 wherever the models run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from evomerge.batch_losses import alone
from evomerge.descent import BETA1, BETA2, EPSILON, batch, task_key
from evomerge.errors import CandidateError
from evomerge.evaluation import Evaluator, Target
from evomerge.merging import Merger
from evomerge.pools import Trained
from evomerge.recipe import Recipe
from evomerge.searchers.base import keyed_generator
from evomerge.surgery import Adapter

START = 2  # keys the draw of the first weights apart from others of the same seed and task


def start(width: int, rank: int, *, seed: int, task: str) -> Adapter:
    """An adapter that changes nothing: down uniform in +-1 / sqrt(width), as torch initialises a linear layer."""
    bound = 1 / math.sqrt(width)
    down = keyed_generator(seed, START, task_key(task)).uniform(-bound, bound, (rank, width))
    return Adapter(torch.from_numpy(down).to(torch.float32), torch.zeros(width, rank))


def distance(features: Tensor, expert: Tensor) -> Tensor:
    """L1, the mean over items and features (equation 1 of the paper)."""
    return (features - expert).abs().mean()


def train(
    merged: Tensor, expert: Tensor, *, rank: int, steps: int, lr: float, size: int, seed: int, task: str
) -> Adapter:
    """The adapter that brings ``merged`` near to ``expert``, both (items, width) in float32 on the CPU: equation 3.

    Adam (Kingma and Ba 2015, algorithm 1) on the L1 distance of ``size`` items a step, which go through all items in a
    new order each time. A function of its arguments.
    """
    adapter = start(merged.shape[1], rank, seed=seed, task=task)
    weights = [adapter.down.requires_grad_(), adapter.up.requires_grad_()]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    rows = range(len(merged))
    for step in range(1, steps + 1):
        chosen = torch.tensor(batch(rows, seed=seed, task=f"surgery: {task}", turn=step - 1, size=size))
        loss = distance(adapter(merged[chosen]), expert[chosen])
        with torch.no_grad():
            for weight, g, m, v in zip(weights, torch.autograd.grad(loss, weights), means, squares, strict=True):
                m.mul_(BETA1).add_(g, alpha=1 - BETA1)
                v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
                slope = m / (1 - BETA1**step) / ((v / (1 - BETA2**step)).sqrt() + EPSILON)
                weight.sub_(slope, alpha=lr)
    return Adapter(*(weight.detach() for weight in weights))


class SurgeryTraining:
    """Adapters for whatever recipe of the worker's sources, on the study's items.

    Args:
        seeded: a context in which global random generators start from the study's seed.
    """

    def __init__(
        self,
        merger: Merger,
        evaluator: Evaluator,
        target: Target,
        seeded: Callable[[], AbstractContextManager[None]],
    ):
        self.merger, self.evaluator, self.target, self.seeded = merger, evaluator, target, seeded
        self._experts: dict[tuple[Any, ...], Tensor] = {}  # features, which are the same for every recipe

    def of(self, recipe: Recipe, wanted: Mapping[str, Any]) -> Trained:
        """See ``Job.surgery`` for ``wanted``.

        Raises:
            CandidateError: features or an adapter are not finite (kind nan), or not one row an item; names the task.
        """
        options = {"size": wanted["batch"], **{key: wanted[key] for key in ("rank", "steps", "lr", "seed")}}
        tasks: Mapping[str, tuple[int, Sequence[str]]] = wanted["tasks"]
        for task, (t, ids) in tasks.items():
            if (t, *ids) not in self._experts:
                self.merger.into(self.target.model, alone(recipe, t))
                self._experts[t, *ids] = self._features(task, ids)
        self.merger.into(self.target.model, recipe)
        merged = {task: self._features(task, ids) for task, (_, ids) in tasks.items()}
        adapters, distances = {}, {}
        for task, (t, ids) in tasks.items():
            mine, theirs = merged[task], self._experts[t, *ids]
            adapter = train(mine, theirs, task=task, **options)
            distances[task] = (float(distance(mine, theirs)), float(distance(adapter(mine), theirs)))
            if not math.isfinite(distances[task][1]):
                raise CandidateError("nan", f"task {task}: the adapter is not finite; lower surgery.lr")
            adapters[task] = adapter.down.numpy(), adapter.up.numpy()
        return Trained(adapters, distances)

    def _features(self, task: str, ids: Sequence[str]) -> Tensor:
        """(items, width) of the model as it is, in batches that depend on ``ids`` alone."""
        size, parts = self.evaluator.context.batch_size, []
        with self.seeded(), torch.no_grad():
            for begin in range(0, len(ids), size):
                some = list(ids[begin : begin + size])
                hidden = self.evaluator.predictions(self.target, some, over="answers", hidden=True).hidden
                if hidden is None or hidden.dim() != 2 or len(hidden) != len(some):
                    raise CandidateError("incomplete", f"task {task}: the evaluator gives no row of features an item")
                parts.append(hidden.to("cpu", torch.float32))
        features = torch.cat(parts)
        if not bool(features.isfinite().all()):
            raise CandidateError("nan", f"task {task}: features are not finite")
        return features
