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

AT_ONCE = 4  # gradients that are kept for one pass over the sources; more gain little
KEPT_BYTES = 2**30  # of them, at the most, unless one takes more
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
            a set of gradients as large as the model. Else those of AT_ONCE losses are kept, as far as KEPT_BYTES go,
            and the sources are read once for them. Both give the same bits for one loss.
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

    def of(self, losses: Loss | Sequence[Loss], recipe: Recipe) -> tuple[float, Tensor]:
        """The loss at ``recipe``, which is merged into the model first, and its gradient; of several losses the sums.

        Args and errors as for ``each``.

        Returns:
            (loss, gradient): the gradient float64 on the CPU, (T experts, G groups) in the recipe's order. Either may
            be NaN or infinite.
        """
        losses = [losses] if callable(losses) else losses
        values, gradient = self.together(losses, [1.0] * len(losses), recipe)
        return sum(values[1:], values[0]), gradient

    def together(
        self,
        losses: Sequence[Loss],
        shares: Sequence[float],
        recipe: Recipe,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[list[float], Tensor]:
        """(the losses, the gradient of the sum of share times loss).

        Gradients by the parameters are summed before any inner product is taken, which is then one for each expert and
        not for each loss. With ``free`` each loss has its own, and the sum another rounding.

        Args and errors as for ``each``.
        """
        return self._found([list(zip(losses, shares, strict=True))], recipe, around)[0]

    def each(
        self,
        losses: Sequence[Loss],
        recipe: Recipe,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[tuple[float, Tensor]]:
        """(loss, gradient), as of ``of``, for each of the losses; what is found for one does not depend on the others.

        Afterwards no parameter has a gradient or requires one that did not before.

        Args:
            losses: called without arguments, each gives a scalar that can be differentiated by the model's parameters.
            around: a context for each loss with its backward pass.

        Raises:
            MethodError: as ``into``.
            CheckpointError: a tensor has no place in the model that has a gradient.
            EvaluatorError: a loss does not depend on the model, or was computed without gradients.
        """
        found = self._found([[(loss, 1.0)] for loss in losses], recipe, around)
        return [(value, gradient) for (value,), gradient in found]

    def _found(
        self,
        sums: Sequence[Sequence[tuple[Loss, float]]],
        recipe: Recipe,
        around: Callable[[], AbstractContextManager[None]],
    ) -> list[tuple[list[float], Tensor]]:
        """For each of several sums of (loss, share): the losses, and the gradient of the sum."""
        plan = self.into(recipe)
        group_of = self.merger.moving(plan)
        held = self._held(plan, group_of)
        parameters = _by_parameter(held)
        products = np.zeros((len(sums), len(held), len(recipe.experts)))
        table = self._table(plan, list(held), len(sums))
        at_once = max(1, min(AT_ONCE, KEPT_BYTES // max(1, sum(p.nbytes for p, _ in parameters))))
        values: list[list[float]] = []
        waiting: list[dict[str, Tensor]] = []  # gradients of the last sums

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
                hook = torch.no_grad()(
                    lambda p, names: table.add([take(p, names)], products[len(values), None], len(values))
                )
                handles = [
                    parameter.register_post_accumulate_grad_hook(lambda p, names=names: hook(p, names))
                    for parameter, names in parameters
                ]
            try:
                for number, losses in enumerate(sums, start=1):
                    own = []
                    for loss, share in losses:
                        with around():
                            own.append(self._backward(loss, share, bool(parameters)))
                    with torch.no_grad():
                        waiting.append({n: part for p, names in parameters for n, part in take(p, names).items()})
                        if len(waiting) == at_once or number == len(sums):
                            first = number - len(waiting)
                            table.add(waiting, products[first:number], first)
                            waiting.clear()
                    values.append(own)
            finally:
                for handle in handles:
                    handle.remove()
        groups = [group_of[name] for name in held]
        return [(value, _by_group(found, groups, recipe)) for value, found in zip(values, products, strict=True)]

    def _table(self, plan: MergePlan, names: Sequence[str], count: int) -> Products:
        """What takes the inner products of ``count`` gradients."""
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

    def add(self, gradients: Sequence[Mapping[str, Tensor]], out: Numbers, start: int) -> None:
        """out[b, n] += (T,) <gradient, v_t> of each gradient b and tensor n that it has.

        Args:
            gradients: B sets by the name of the tensor, each in its shape with any strides.
            out: (B, N, T) float64.
            start: the number of the sum that the first set is of; the others are of those after it.
        """
        at_once: dict[tuple[torch.dtype, torch.dtype], list[tuple[str, Place]]] = {}
        for name in dict.fromkeys(name for one in gradients for name in one):
            own = [one.get(name) for one in gradients]
            place = self._place(name, [gradient for gradient in own if gradient is not None])
            if place is None:
                for b, gradient in enumerate(own):
                    if gradient is not None:
                        out[b, self._number[name]] += self._of(name, gradient.reshape(-1))
                continue
            first = next(gradient for gradient in own if gradient is not None)
            if all(gradient is None or gradient.is_contiguous() for gradient in own):
                at_once.setdefault((first.dtype, place.dtype), []).append((name, place))
            else:  # copies of one tensor at a time
                self._add([(name, place)], [{name: g.contiguous()} if g is not None else {} for g in own], out)
        for found in at_once.values():
            self._add(found, gradients, out)

    def _add(self, found: Sequence[tuple[str, Place]], gradients: Sequence[Mapping[str, Tensor]], out: Numbers) -> None:
        """The same by a compiled loop, of contiguous gradients."""
        rows = [[one.get(name) for name, _ in found] for one in gradients]
        scales = np.array([self._scales_of(name) for name, _ in found])
        out[:, [self._number[name] for name, _ in found]] += scales * task_products([p for _, p in found], rows)

    def _place(self, name: str, gradients: Sequence[Tensor]) -> Place | None:
        """Where the task vectors lie that a compiled loop can take; else None."""
        types = {gradient.dtype for gradient in gradients}
        if len(types) > 1 or not types <= set(fused.WIDENED) or not self._compiled(name, *gradients):
            return None
        return self.merger.task_vectors.place(name)

    def _compiled(self, name: str, *gradients: Tensor) -> bool:
        """Are directions task vectors of dense experts on the CPU?"""
        here = fused.kernels() is not None and self.merger.device == "cpu" and fused.on_cpu(*gradients)
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


def _by_group(products: Numbers, groups: Sequence[int], recipe: Recipe) -> Tensor:
    """(T, G) from (N, T): the sums over each group's tensors, in their order."""
    gradient = np.zeros((len(recipe.groups), len(recipe.experts)))
    np.add.at(gradient, groups, products)
    return torch.from_numpy(gradient.T.copy())


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
