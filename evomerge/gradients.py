"""Exact gradients of a loss by the weights of a recipe, where the merge is affine in them.

With merged_l = c_l + sum_t w_{t,g} v_{t,l} for each tensor l of a group g, dL/dw_{t,g} = sum_l <dL/dtheta_l, v_{t,l}>.
So the merge is written into the resident model as ever, an ordinary backward pass gives dL/dtheta, and inner products
with the sources, slice by slice, do the rest: no graph through the merge, and no copy of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints import grid
from evomerge.errors import CheckpointError, EvaluatorError
from evomerge.folders import some
from evomerge.merging import MergePlan, Merger
from evomerge.methods import fused
from evomerge.methods.base import LowRank, check_params, require_affine
from evomerge.methods.lookup import method_of
from evomerge.placement import owners, part_of
from evomerge.recipe import Recipe
from evomerge.task_vectors import Numbers, Place, slice_products
from evomerge.task_vectors import products as task_products

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
            a set of gradients as large as the model. Else they are kept until the last of several losses, and the
            sources are read once. Both give the same bits for one loss.
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
        if self._plan is None or (self._plan.recipe is not recipe and self._plan.recipe != recipe):
            require_gradients(recipe)
            self._plan = MergePlan(self.merger, recipe, rounded=False)
        self.merger.write(self.model, self._plan)
        return self._plan

    def of(self, loss: Loss, recipe: Recipe) -> tuple[float, Tensor]:
        """(a loss, its gradient); see ``together``."""
        (value,), gradient = self.together([loss], [1.0], recipe)
        return value, gradient

    def together(
        self,
        losses: Sequence[Loss],
        shares: Sequence[float],
        recipe: Recipe,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[list[float], Tensor]:
        """(losses at ``recipe``, which is merged into the model first; the gradient of the sum of share times loss).

        Gradients by the parameters are summed before any inner product is taken, which is then one for each expert and
        not for each loss. With ``free`` each loss has its own, and the sum another rounding. Afterwards no parameter
        has a gradient or requires one that did not before.

        Args:
            losses: called without arguments, each gives a scalar that can be differentiated by the model's parameters,
                and has a backward pass of its own.
            around: a context for each loss with its backward pass.

        Returns:
            The gradient float64 on the CPU, (T experts, G groups) in the recipe's order. It and the losses may be NaN
            or infinite.

        Raises:
            MethodError: as ``into``.
            CheckpointError: a tensor has no place in the model that has a gradient.
            EvaluatorError: a loss does not depend on the model, or was computed without gradients.
        """
        plan = self.into(recipe)
        group_of = self.merger.moving(plan)
        held = self._held(plan, group_of)
        parameters = _by_parameter(held)
        products, table = np.zeros((len(held), len(recipe.experts))), self._table(plan, list(held))

        def take(parameter: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
            """The parts of a parameter's gradient, which is dropped."""
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return {}
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            return {name: part_of(dense, parameter, self.placement.views[name]) for name in names}

        with _requiring(self.model, [parameter for parameter, _ in parameters]), torch.enable_grad():
            handles = []
            if self.free:
                hook = torch.no_grad()(lambda p, names: table.add(take(p, names), products))
                handles = [
                    parameter.register_post_accumulate_grad_hook(lambda p, names=names: hook(p, names))
                    for parameter, names in parameters
                ]
            values = []
            try:
                for loss, share in zip(losses, shares, strict=True):
                    with around():
                        values.append(self._backward(loss, share, bool(parameters)))
            finally:
                for handle in handles:
                    handle.remove()
            with torch.no_grad():
                table.add({n: part for p, names in parameters for n, part in take(p, names).items()}, products)
        gradient = np.zeros((len(recipe.groups), len(recipe.experts)))
        np.add.at(gradient, [group_of[name] for name in held], products)
        return values, torch.from_numpy(gradient.T.copy())

    def _table(self, plan: MergePlan, names: Sequence[str]) -> Products:
        """What takes the inner products."""
        return Products(self.merger, plan, names)

    @staticmethod
    def _backward(loss: Loss, share: float, moves: bool) -> float:
        value = loss()
        if value.requires_grad:
            (value if share == 1 else value * share).backward()
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


class Products:
    """Inner products of gradients with what a plan's weights multiply.

    Args:
        names: of the tensors, in the order of what is added to.
    """

    def __init__(self, merger: Merger, plan: MergePlan, names: Sequence[str]):
        self.merger, self.plan = merger, plan
        self._number = {name: number for number, name in enumerate(names)}
        self._scales: dict[str, Sequence[float] | None] = {}

    def add(self, gradients: Mapping[str, Tensor], out: Numbers) -> None:
        """out[n] += (T,) <gradient, v_t> of each tensor n that has a gradient.

        Args:
            gradients: by the name of the tensor, in its shape with any strides.
            out: (N, T) float64.
        """
        at_once: dict[tuple[torch.dtype, torch.dtype], list[tuple[str, Place, Tensor]]] = {}
        for name, gradient in gradients.items():
            place = self._place(name, gradient)
            if place is None:
                out[self._number[name]] += self._of(name, gradient.reshape(-1))
            elif gradient.is_contiguous():
                at_once.setdefault((gradient.dtype, place.dtype), []).append((name, place, gradient))
            else:  # a copy of one tensor at a time
                self._add([(name, place, gradient.contiguous())], out)
        for found in at_once.values():
            self._add(found, out)

    def _add(self, found: Sequence[tuple[str, Place, Tensor]], out: Numbers) -> None:
        """The same by a compiled loop, of contiguous gradients."""
        names, places, gradients = zip(*found, strict=True)
        scales = np.array([self._scales_of(name) for name in names])
        out[[self._number[name] for name in names]] += scales * task_products(places, gradients)

    def _place(self, name: str, gradient: Tensor) -> Place | None:
        """Where the task vectors lie that a compiled loop can take; else None."""
        if gradient.dtype not in fused.WIDENED or not self._compiled(name, gradient):
            return None
        return self.merger.task_vectors.place(name)

    def _compiled(self, name: str, gradient: Tensor) -> bool:
        """Are directions task vectors of dense experts on the CPU?"""
        here = fused.kernels() is not None and self.merger.device == "cpu" and fused.on_cpu(gradient)
        return here and self._scales_of(name) is not None

    def _scales_of(self, name: str) -> Sequence[float] | None:
        if name not in self._scales:
            self._scales[name] = self.merger.task_scales(self.plan, name)
        return self._scales[name]

    def _of(self, name: str, gradient: Tensor) -> Numbers:
        """(T,) of one tensor, slice by slice: <gradient, v_t>, the gradient flat."""
        found = np.zeros(len(self.plan.recipe.experts))
        scales = self._scales_of(name)
        if scales is not None and self._compiled(name, gradient):
            for start, base, experts in self.merger.task_slices(self.plan, name):
                chosen = [t for t, expert in enumerate(experts) if expert is not base]
                part = gradient[start : start + base.numel()]
                found[chosen] += slice_products(part, base, [experts[t] for t in chosen])
            return found * np.array(scales)
        for start, t, vector in self.merger.directions(self.plan, name):
            found[t] += float(_inner_product(gradient, start, vector))
        return found


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
