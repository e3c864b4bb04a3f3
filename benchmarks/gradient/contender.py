"""Steps of AdaMerging by one contender, in a process of its own: prints a line of JSON with what they cost.

    python contender.py '{"what": "keep", "base": "folder", "experts": ["folder", ...], "batch": 16, "tokens": 64, ...}'

``what`` is one of ours (keep and free as a worker by itself has a step: in two parts; one: in one), passes (the model's
passes and nothing else), autograd (the merge is part of the graph, once a step), authors (once for each task, as in the
AdaMerging authors' code, main_layer_wise_adamerging.py), or fusion_bench (its LayerWiseMergedModel and the loop of its
layer_wise_adamerging.py), which the peers' Python runs.

All do the same: a coefficient an expert and tensor from 0.3, the entropy of a frozen head's classes on a batch of each
task, the sum over the tasks, Adam. CPU seconds of each step after the first; anonymous memory is sampled meanwhile.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertModel

START, LR, CLASSES = 0.3, 1e-3, 10
Step = Callable[[Sequence[Tensor]], float]  # a batch of token ids of each task -> the loss before the step


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    ways = {"passes": passes, "keep": ours, "one": ours, "free": ours, "fusion_bench": fusion_bench}
    step = ways.get(task["what"], autograd)(task)
    before, losses, seconds = anonymous(), [], []
    with Peak() as peak:
        for number in range(task["steps"] + 1):
            ids = batches(task, number)
            began = time.process_time()
            losses.append(step(ids))
            seconds.append(time.process_time() - began)
    print(json.dumps({"seconds": seconds[1:], "losses": losses, "peak_bytes": peak.most, "growth": peak.most - before}))


def batches(task: dict[str, Any], number: int) -> list[Tensor]:
    """(batch, tokens) of random token ids for each task."""
    draws = torch.Generator().manual_seed(1000 + number)
    return [
        torch.randint(0, task["vocabulary"], (task["batch"], task["tokens"]), generator=draws) for _ in task["experts"]
    ]


def heads(task: dict[str, Any], width: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(7)
    return [torch.randn(CLASSES, width, generator=draws) * 0.2 for _ in task["experts"]]


def entropy(hidden: Tensor, head: Tensor) -> Tensor:
    """The mean over items, of the classes that ``head`` gives the first token's last state: (items, tokens, width)."""
    logs = (hidden[:, 0] @ head.T).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def loaded(folder: str) -> Any:
    return BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()


# --- contenders ------------------------------------------------------------------------------------------------------


def ours(task: dict[str, Any]) -> Step:
    """evomerge: sources stay mapped files, gradients come from inner products."""
    import numpy as np

    from evomerge.descent import Box, Descent, pieces
    from evomerge.gradients import CoefficientGradients
    from evomerge.memory import keep_freed_memory
    from evomerge.merging import Merger, load_resident, open_sources
    from evomerge.methods import fused
    from evomerge.recipe import Group, Recipe, Source

    keep_freed_memory()  # as a worker does, and what it has in memory before the first job
    fused.kernels()
    experts = tuple(Source(f"expert{t}", path) for t, path in enumerate(task["experts"]))
    recipe = Recipe(
        Source("base", task["base"]), experts, "task_arithmetic", (Group((START,) * len(experts)),),
        params={"scale": 1.0}, export_dtype="float32",
    )  # fmt: skip
    sources = open_sources(recipe)
    names = [name for name in sources.names if sources.is_float(name)]
    merger = Merger(sources, fixed_params={"task_arithmetic": {"scale": 1.0}})
    model = load_resident(Path(task["base"]), auto_class="AutoModel", compute_dtype="float32", unused=("pooler.",))
    model.eval()
    gradients = CoefficientGradients(merger, model, free=task["what"] == "free")
    endless = np.full(len(experts) * len(names), np.inf)
    descent = Descent(np.full(len(endless), START), Box(-endless, endless), lr=LR)
    state = descent.begin()
    own = heads(task, model.config.hidden_size)

    def step(ids: Sequence[Tensor]) -> float:
        nonlocal state
        weights = descent.values(state).reshape(len(names), len(experts))
        groups = tuple(Group(tuple(w), tensors=(n,)) for n, w in zip(names, weights.tolist(), strict=True))
        point = Recipe(recipe.base, experts, recipe.method, groups, params=recipe.params, export_dtype="float32")

        def loss(t: int) -> Callable[[], Tensor]:
            return lambda: entropy(model(input_ids=ids[t]).last_hidden_state, own[t])

        total, by_weight = 0.0, torch.zeros(len(experts), len(names), dtype=torch.float64)
        for part in pieces(range(len(ids)), len(ids) if task["what"] == "one" else -(-len(ids) // 2)):
            values, gradient = gradients.together([loss(t) for t in part], [1.0] * len(part), point)
            total, by_weight = total + sum(values), by_weight + gradient
        state = descent.step(state, by_weight.T.reshape(-1).numpy())
        return total

    return step


def passes(task: dict[str, Any]) -> Step:
    """A forward and a backward pass for each task and nothing else: the floor of what we do."""
    from evomerge.memory import keep_freed_memory

    keep_freed_memory()
    model = loaded(task["base"])
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()  # in memory of its own, as merged ones are
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    own = heads(task, model.config.hidden_size)

    def step(ids: Sequence[Tensor]) -> float:
        total = 0.0
        for batch, head in zip(ids, own, strict=True):
            loss = entropy(model(input_ids=batch).last_hidden_state, head)
            loss.backward()
            total += float(loss.detach())
        return total

    return step


def autograd(task: dict[str, Any]) -> Step:
    """The merge as a part of the graph: theta_0 + sum lambda tau for every tensor, one backward pass through all.

    It is merged once for all tasks, or (authors) anew for each.
    """
    from torch.func import functional_call

    model = loaded(task["base"]).requires_grad_(False)
    base = dict(model.named_parameters())
    taus = [{n: p.detach() - base[n] for n, p in loaded(path).named_parameters()} for path in task["experts"]]
    weights = torch.full((len(taus), len(base)), START, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=LR)
    own = heads(task, model.config.hidden_size)

    def merge() -> dict[str, Tensor]:
        return {
            name: theta_0 + sum(weights[t, i] * tau[name] for t, tau in enumerate(taus))
            for i, (name, theta_0) in enumerate(base.items())
        }

    def step(ids: Sequence[Tensor]) -> float:
        losses, merged = [], merge()
        for number, (batch, head) in enumerate(zip(ids, own, strict=True)):
            if number and task["what"] == "authors":
                merged = merge()
            losses.append(entropy(functional_call(model, merged, (), {"input_ids": batch}).last_hidden_state, head))
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def fusion_bench(task: dict[str, Any]) -> Step:
    from fusion_bench.models.wrappers.layer_wise_fusion import (  # pyright: ignore[reportMissingImports]
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )

    model = loaded(task["base"])
    experts = [loaded(path) for path in task["experts"]]
    weights = get_layer_wise_weights(len(experts), len(list(model.parameters())), START)
    merged = LayerWiseMergedModel(weights, model, experts, clamp_weights=False, strict=False)  # buffers are not in it
    optimizer = torch.optim.Adam([merged.merge_weight], lr=LR)
    own = heads(task, model.config.hidden_size)
    merged.merge_weights()

    def step(ids: Sequence[Tensor]) -> float:
        total = 0.0
        for batch, head in zip(ids, own, strict=True):
            loss = entropy(merged(input_ids=batch).last_hidden_state, head)
            loss.backward(retain_graph=True)
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        merged.merge_weights()
        return total

    return step


# --- memory ----------------------------------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes that are this process's own: pages of mapped files do not count."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak:
    """The most anonymous memory while the block lasts, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.most, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


if __name__ == "__main__":
    main()
