"""Gradients by the numbers that a learned method has inside its task vectors: contractions of dL / d theta.

With merged_l = theta_0_l + sum_t w_t f_t(m_t), f_t linear in the numbers m_t, dL/dm_ti = w_t r_ti with the contraction
r_ti = <dL/dtheta_l, df_t/dm_ti>, and dL/dw_t = sum_i m_ti r_ti. So a tensor's sources are read once for both.
Numbers that all experts share have the sum over t.
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
from evomerge.methods.statistics import SHARED
from evomerge.recipe import Recipe
from evomerge.task_vectors import Numbers


def lend(merger: Merger, recipe: Recipe, learned: Mapping[str, Any]) -> None:
    """Let ``merger`` find the numbers that ``recipe`` names in ``learned``, as ``Job.gradient`` has them."""
    assert recipe.statistics is not None
    mappings = [
        {name: torch.from_numpy(numbers) for name, numbers in tensors.items()} for tensors in learned["tensors"]
    ]
    if learned["kind"] in SHARED:
        mappings *= len(recipe.experts)
    merger.lend(learned["kind"], recipe.statistics, mappings)


class LearnedGradients(CoefficientGradients):
    """Gradients by a recipe's weights, and (after those) by the numbers that its learned method has."""

    _numbers: dict[tuple[int, str], Tensor]  # (t, tensor name) -> the gradient, on the CPU; t = 0 of what is shared

    def by_numbers(self, tensors: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """(size,) the gradient by ``tensors``, a mapping an expert (or one, where all share it), one number after the
        other, in their type.

        Numbers that nothing depends on, such as those of tensors that are not in the model, have the gradient 0.
        """
        found = np.zeros(sum(numbers.size for mapping in tensors for numbers in mapping.values()), _dtype(tensors))
        place = 0
        for t, mapping in enumerate(tensors):
            for name, numbers in mapping.items():
                if (t, name) in self._numbers:
                    found[place : place + numbers.size] = self._numbers[t, name].numpy()
                place += numbers.size
        return found

    def _table(self, plan: MergePlan, names: Sequence[str]) -> Products:
        self._numbers = {}
        return _Contractions(self.merger, plan, names, self._numbers)


def _dtype(tensors: Sequence[Mapping[str, np.ndarray]]) -> np.dtype[Any]:
    return next((numbers.dtype for mapping in tensors for numbers in mapping.values()), np.dtype(np.float64))


class _Contractions(Products):
    """Takes those of the tensors that have learned numbers.

    Args:
        found: what is added to.
    """

    def __init__(self, merger: Merger, plan: MergePlan, names: Sequence[str], found: dict[tuple[int, str], Tensor]):
        super().__init__(merger, plan, names)
        self.found = found

    def add(self, gradients: Mapping[str, Tensor], out: Numbers) -> None:
        others = {}
        for name, gradient in gradients.items():
            method = self._method(name)
            if method is None:
                others[name] = gradient
            else:
                self._contract(method, name, gradient, out)
        super().add(others, out)

    def _method(self, name: str) -> LearnedMethod | None:
        part, _, params = self.plan.of(name)
        method = part.method
        if isinstance(method, LearnedMethod) and method.takes(self.merger.infos[name], params["matrices"]):
            return method
        return None

    def _contract(self, method: LearnedMethod, name: str, gradient: Tensor, out: Numbers) -> None:
        part, group, params = self.plan.of(name)
        for _, base, experts in self.merger.task_slices(self.plan, name):  # one: it takes whole tensors
            call = {"info": self.merger.infos[name], "state": part.state, **params}
            for t, slopes, product in method.contract(base, experts, gradient, **call):
                out[self._number[name], t] += product
                owner = 0 if method.statistics in SHARED else t
                mine, known = slopes.cpu().mul_(group.weights[t]), self.found.get((owner, name))
                self.found[owner, name] = mine if known is None else known.add_(mine)
