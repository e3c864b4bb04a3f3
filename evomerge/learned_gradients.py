"""Gradients by the numbers that a learned method has inside its task vectors: contractions of dL / d theta.

With merged_l = theta_0_l + sum_t w_t f_t(m_t), f_t linear in the numbers m_t, dL/dm_ti = w_t r_ti with the contraction
r_ti = <dL/dtheta_l, df_t/dm_ti>, and dL/dw_t = sum_i m_ti r_ti. So a tensor's sources are read once for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.gradients import CoefficientGradients, Products
from evomerge.merging import MergePlan, Merger
from evomerge.methods.learned import LearnedMethod
from evomerge.recipe import Recipe
from evomerge.task_vectors import Numbers


def lend(merger: Merger, recipe: Recipe, learned: Mapping[str, Any]) -> None:
    """Let ``merger`` find the numbers that ``recipe`` names in ``learned``, as ``Job.gradient`` has them."""
    assert recipe.statistics is not None
    mappings = [
        {name: torch.from_numpy(numbers) for name, numbers in tensors.items()} for tensors in learned["tensors"]
    ]
    merger.lend(learned["kind"], recipe.statistics, mappings)


class LearnedGradients(CoefficientGradients):
    """Gradients by a recipe's weights, and by the numbers that its learned method has: after each of its methods."""

    _numbers: list[dict[tuple[int, str], Tensor]]  # a sum: (t, tensor name) -> the gradient, float64 on the CPU

    def by_numbers(self, tensors: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """(losses, size) the gradients by ``tensors``, a mapping an expert, one number after the other; (1, size) after
        a sum of losses.

        Numbers that nothing depends on, such as those of tensors that are not in the model, have the gradient 0.
        """
        places = [(t, name, numbers.size) for t, mapping in enumerate(tensors) for name, numbers in mapping.items()]
        rows = np.zeros((len(self._numbers), sum(size for _, _, size in places)))
        for row, found in zip(rows, self._numbers, strict=True):
            place = 0
            for t, name, size in places:
                if (t, name) in found:
                    row[place : place + size] = found[t, name].numpy()
                place += size
        return rows

    def _table(self, plan: MergePlan, names: Sequence[str], count: int) -> Products:
        self._numbers = [{} for _ in range(count)]
        return _Contractions(self.merger, plan, names, self._numbers)


class _Contractions(Products):
    """Takes those of the tensors that have learned numbers.

    Args:
        found: for each sum, what is added to.
    """

    def __init__(
        self, merger: Merger, plan: MergePlan, names: Sequence[str], found: Sequence[dict[tuple[int, str], Tensor]]
    ):
        super().__init__(merger, plan, names)
        self.found = found

    def add(self, gradients: Sequence[Mapping[str, Tensor]], out: Numbers, start: int) -> None:
        names = dict.fromkeys(name for one in gradients for name in one if self._method(name) is not None)
        for name in names:
            have = [b for b, one in enumerate(gradients) if name in one]
            self._contract(name, [gradients[b][name] for b in have], have, out, start)
        super().add([{n: g for n, g in one.items() if n not in names} for one in gradients], out, start)

    def _method(self, name: str) -> LearnedMethod | None:
        part, _, params = self.plan.of(name)
        method = part.method
        if isinstance(method, LearnedMethod) and method.takes(self.merger.infos[name], params["matrices"]):
            return method
        return None

    def _contract(self, name: str, gradients: Sequence[Tensor], have: Sequence[int], out: Numbers, start: int) -> None:
        part, group, params = self.plan.of(name)
        method, number = self._method(name), self._number[name]
        assert method is not None
        for _, base, experts in self.merger.task_slices(self.plan, name):  # one: it takes whole tensors
            call = {"info": self.merger.infos[name], "state": part.state, **params}
            for t, slopes, products in method.contract(base, experts, gradients, **call):
                for b, slope, product in zip(have, slopes, products, strict=True):
                    out[b, number, t] += product
                    mine, known = slope.cpu().mul_(group.weights[t]), self.found[start + b].get((t, name))
                    self.found[start + b][t, name] = mine if known is None else known.add_(mine)
