"""RegMean++: a model merged layer by layer, each layer on the inputs that the merged layers before it give.

Nguyen et al. 2025, arXiv:2508.03121: embeddings and all else that is no linear layer by the mean; then, from the first
layer to the last, Gram matrices of its inputs for each expert (the expert's own layer, behind the merged ones, on the
expert's own examples), the layer's weights by RegMean, and on. What lies outside the layers (a head) comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError, CheckpointError
from evomerge.evaluation import Evaluator, Target
from evomerge.folders import some
from evomerge.measuring import GramHooks, linear_layers
from evomerge.merging import Merger
from evomerge.methods import METHODS


def num_steps(merger: Merger) -> int:
    """How often the examples of each expert run: once a layer, and once for what is outside of them."""
    return merger.sources.reference.num_layers + 1


@torch.no_grad()
def merged_grams(
    merger: Merger,
    evaluator: Evaluator,
    target: Target,
    item_ids: Sequence[Sequence[str]],
    *,
    rho: float,
    export_dtype: torch.dtype,
    advance: Callable[[int], None],
) -> list[dict[str, Tensor]]:
    """For each expert X'X / rows by checkpoint name, and ``rho``. The model is left merged by them, at equal weights.

    Args:
        item_ids: of each expert's own examples.
        advance: called with the expert's number after each item.

    Raises:
        CheckpointError: the model keeps linear layers in a form that files do not (transformers' own conversions).
        CandidateError: an input is not finite (kind ``nan``).
    """
    placement = merger.adopt(target.model).placement
    if placement.conversions:
        names = [name for conversion in placement.conversions for _, name in conversion.sources]
        raise CheckpointError(f"{some(names)} cannot be merged layer by layer: transformers converts it as it loads")
    building = _Building(merger, placement.views, rho, export_dtype)
    building.merge(placement.views)
    layers = linear_layers(target.model, placement)
    for step in [*range(merger.sources.reference.num_layers), None]:
        inside = [name for name in placement.views if merger.sources.info(name).layer == step]
        modules = {module: names for module, names in layers.items() if names[0] in inside}
        if step is None:
            inside = [name for names in modules.values() for name in names]  # embeddings and norms stay merged
        if not modules:
            continue
        for t, ids in enumerate(item_ids):
            building.put_expert(t, inside)
            hooks = GramHooks(list(modules))
            try:
                for _ in evaluator.likelihoods(target, ids, alternatives=False):
                    advance(t)
            finally:
                hooks.close()
            for module, names in modules.items():
                for name in names:
                    building.add_gram(t, name, hooks.mean(module))
        building.merge(inside)
    order = list(placement.views)
    return [
        {"rho": torch.tensor(rho, dtype=torch.float64), **{name: G[name] for name in order if name in G}}
        for G in building.grams
    ]


class _Building:
    """The model while it is merged: what is known of each layer, and tensors written into their places."""

    def __init__(self, merger: Merger, views: Mapping[str, Tensor], rho: float, export_dtype: torch.dtype):
        self.merger, self.views, self.rho, self.export_dtype = merger, views, rho, export_dtype
        self.grams: list[dict[str, Tensor]] = [{} for _ in merger.sources.experts]

    def add_gram(self, t: int, name: str, gram: Tensor) -> None:
        if not torch.isfinite(gram).all():
            raise CandidateError("nan", f"an input of the layer {name} is not finite")
        self.grams[t][name] = gram

    def put_expert(self, t: int, names: Iterable[str]) -> None:
        """One expert's tensors, rounded as a merge is."""
        for name in self._floats(names):
            experts: Any = self.merger.sources.load(name)[2]
            self.views[name].copy_(experts[t].to(self.export_dtype))

    def merge(self, names: Iterable[str]) -> None:
        """By regmean_pp and the Gram matrices so far; the mean where there are none."""
        method: Any = METHODS["regmean_pp"]
        for name in self._floats(names):
            info, base, experts = self.merger.sources.load(name)
            merged = method.merge(
                base, experts, weights=[1.0] * len(experts), info=info, state=self.grams, rho=self.rho
            )
            self.views[name].copy_(merged.to(self.export_dtype))

    def _floats(self, names: Iterable[str]) -> Iterable[str]:
        return (name for name in names if self.merger.sources.is_float(name))
