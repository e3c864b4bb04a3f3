"""Exact gradients of a loss by the weights of a recipe, where the merge is affine in them.

With merged_l = c_l + sum_t w_{t,g} v_{t,l} for each tensor l of a group g, dL/dw_{t,g} = sum_l <dL/dtheta_l, v_{t,l}>.
So the merge is written into the resident model as ever, an ordinary backward pass gives dL/dtheta, and inner products
with the sources, slice by slice, do the rest: no graph through the merge, and no copy of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints import grid
from evomerge.errors import CheckpointError, EvaluatorError
from evomerge.folders import some
from evomerge.merging import MergePlan, Merger
from evomerge.methods import fused
from evomerge.methods.base import LowRank, arithmetic_dtype, check_params, require_affine
from evomerge.methods.lookup import method_of
from evomerge.placement import owners, part_of
from evomerge.recipe import Recipe

Loss = Callable[[], Tensor]
OTHER_SEARCHERS = "Search with cma or tpe, which need no gradients."


def require_gradients(recipe: Recipe) -> None:
    """MethodError unless every group of ``recipe`` is merged by a method that is affine in its weights."""
    for group in recipe.groups:
        method = method_of(recipe, group)
        require_affine(method, check_params(method.name, method, recipe.params_of(group)))


class CoefficientGradients:
    """Gradients by the weights of recipes that ``merger`` writes into ``model``.

    Args:
        merger: its sources are the recipes'.
        model: resident, in evaluation mode.
        free: take a parameter's inner products as soon as its gradient is complete, and drop it, so that there is never
            a set of gradients as large as the model. Else all are kept until the backward pass (or the last of several)
            is over, and the sources are read once. Both give the same bits for one loss.
    """

    def __init__(self, merger: Merger, model: Any, *, free: bool):
        self.merger, self.model, self.free = merger, model, free
        self.placement = merger.adopt(model).placement
        self._plan: MergePlan | None = None  # the last one: the batches of a step are of one recipe

    def into(self, recipe: Recipe) -> MergePlan:
        """Merge into the model without rounding to the export_dtype; what it holds already stays untouched.

        Raises:
            MethodError: a group's method is not affine in its weights.
        """
        if self._plan is None or self._plan.recipe is not recipe:
            require_gradients(recipe)
            self._plan = MergePlan(self.merger, recipe, rounded=False)
        self.merger.write(self.model, self._plan)
        return self._plan

    def of(self, losses: Loss | Sequence[Loss], recipe: Recipe) -> tuple[float, Tensor]:
        """The loss at ``recipe``, which is merged into the model first, and its gradient.

        Afterwards no parameter has a gradient or requires one that did not before.

        Args:
            losses: called without arguments, gives the loss as a scalar that can be differentiated by the model's
                parameters. Of several the sum is meant, each with a backward pass of its own.

        Returns:
            (loss, gradient): the gradient float64 on the CPU, (T experts, G groups) in the recipe's order. Either may
            be NaN or infinite.

        Raises:
            MethodError: as ``into``.
            CheckpointError: a tensor has no place in the model that has a gradient.
            EvaluatorError: a loss does not depend on the model, or was computed without gradients.
        """
        plan = self.into(recipe)
        group_of = self.merger.moving(plan)
        held = self._held(plan, group_of)
        products = {name: torch.zeros(len(recipe.experts), dtype=torch.float64) for name in held}

        def take(parameter: Tensor, names: Sequence[str]) -> None:
            """Add the inner products with a parameter's gradient, and drop it."""
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                for name in names:
                    values = part_of(dense, parameter, self.placement.views[name])
                    products[name] += self._products(plan, name, values)

        parameters = _by_parameter(held)
        total = 0.0
        with _requiring(self.model, [parameter for parameter, _ in parameters]), torch.enable_grad():
            handles = []
            if self.free:
                hook = torch.no_grad()(take)
                handles = [
                    parameter.register_post_accumulate_grad_hook(lambda p, names=names: hook(p, names))
                    for parameter, names in parameters
                ]
            try:
                for loss in [losses] if callable(losses) else losses:
                    total += self._backward(loss, bool(parameters))
            finally:
                for handle in handles:
                    handle.remove()
            with torch.no_grad():
                for parameter, names in parameters:
                    take(parameter, names)
        gradient = torch.zeros(len(recipe.experts), len(recipe.groups), dtype=torch.float64)
        for name, found in products.items():
            gradient[:, group_of[name]] += found
        return total, gradient

    @staticmethod
    def _backward(loss: Loss, moves: bool) -> float:
        value = loss()
        if value.requires_grad:
            value.backward()
        elif moves:
            raise EvaluatorError(
                "the loss has no gradient by the model's parameters",
                remedy="Compute predictions from target.model with gradients on (no torch.no_grad, no detach).",
            )
        return float(value.detach())

    def _held(self, plan: MergePlan, moving: Mapping[str, int]) -> dict[str, Tensor]:
        """The tensors that the loss can be differentiated by, each with the parameter that holds it.

        Raises CheckpointError for one that reaches the model in another way. What the model has no place for has no
        influence; a buffer that no expert changes needs no gradient.
        """
        converted = [name for c in self.placement.conversions for _, name in c.sources if name in moving]
        if converted:
            raise CheckpointError(
                f"{type(self.model).__name__} has no part of a parameter that is the tensor {some(converted)}: it is "
                "converted on the way, so that there is no gradient by it",
                remedy=OTHER_SEARCHERS,
            )
        held = owners(self.placement, self.model.parameters())
        for name in moving:
            if name in self.placement.views and name not in held and self._changes(plan, name):
                raise CheckpointError(
                    f"{type(self.model).__name__} keeps the tensor {name} in a buffer, by which there is no gradient, "
                    "and an expert changes it",
                    remedy=OTHER_SEARCHERS,
                )
        return {name: held[name] for name in moving if name in held}

    def _changes(self, plan: MergePlan, name: str) -> bool:
        """Does the merged tensor depend on any weight?"""
        with torch.no_grad():
            return any(
                bool((vector.B @ vector.A if isinstance(vector, LowRank) else vector).any())
                for _, _, vector in self.merger.directions(plan, name)
            )

    def _products(self, plan: MergePlan, name: str, gradient: Tensor) -> Tensor:
        """(T,) float64 on the CPU: <gradient, v_t>. The gradient has the tensor's shape and any strides."""
        flat = gradient.reshape(-1)
        if (fused_products := self._task_products(plan, name, flat)) is not None:
            return fused_products
        totals: Tensor | None = None
        for start, t, vector in self.merger.directions(plan, name):
            product = _inner_product(flat, start, vector)
            if totals is None:
                totals = torch.zeros(len(plan.recipe.experts), dtype=torch.float64, device=product.device)
            totals[t] += product
        return torch.zeros(len(plan.recipe.experts), dtype=torch.float64) if totals is None else totals.cpu()

    def _task_products(self, plan: MergePlan, name: str, gradient: Tensor) -> Tensor | None:
        """The same by a compiled loop, where directions are task vectors of dense experts on the CPU; else None."""
        part, _, params = plan.of(name)
        sources, scales = self.merger.sources, part.method.task_scales(len(plan.recipe.experts), params)
        factors = part.method.factors and sources.has_factors(name)
        if scales is None or sources.base is None or factors or fused.kernels() is None:
            return None
        if self.merger.device != "cpu" or gradient.device.type != "cpu":
            return None
        from evomerge.methods import gradient_kernels

        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        totals = np.zeros(len(scales))
        for start, base, experts in self.merger.task_slices(plan, name):
            chosen = [t for t, expert in enumerate(experts) if expert is not base]
            dtype = arithmetic_dtype(base, *experts)
            theta_0, *alike = fused.alike([base, *(experts[t] for t in chosen)], dtype)
            found = np.zeros(len(chosen))
            slope = fused.array(wide[start : start + base.numel()])
            gradient_kernels.task_products(slope, fused.array(theta_0), fused.addresses(alike), found)
            totals[chosen] += found
        return torch.from_numpy(totals * scales)


def _inner_product(gradient: Tensor, start: int, vector: Tensor | LowRank) -> Tensor:
    """<g, v> as a float64 scalar on the device of v.

    Args:
        gradient: of the whole tensor, flat.
        start: where ``vector``, a slice, starts.
    """
    if isinstance(vector, LowRank):  # <G, s B A> = s <B'G, A>
        B, A = vector.B.to(torch.float64), vector.A.to(torch.float64)
        rows = gradient[start : start + len(B) * A.shape[1]].to(A.device).view(len(B), A.shape[1])
        return vector.scaling * (B.T @ rows.to(torch.float64)).mul_(A).sum()
    flat = vector.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for first, last in grid(flat.numel()):
        part = gradient[start + first : start + last].to(flat.device)
        total += torch.dot(part.to(torch.float64), flat[first:last].to(torch.float64))
    return total


def _by_parameter(held: Mapping[str, Tensor]) -> list[tuple[Tensor, list[str]]]:
    """The parameters, each with the names of the tensors in it."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, parameter in held.items():
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


@contextmanager
def _requiring(model: Any, wanted: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the ``wanted`` parameters require gradients and no others; afterwards all is as it was."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
