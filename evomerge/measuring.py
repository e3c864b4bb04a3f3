"""What is measured of an expert on examples: squared gradients, Gram matrices of inputs, losses.

The expert is what a resident model holds. Names are checkpoint names: a module's parameter is cut into the tensors that
files hold by the same placement that merges write through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import tensor_kind
from evomerge.errors import CandidateError
from evomerge.evaluation import Evaluator, Likelihoods, Target
from evomerge.placement import Placement, owners, part_of

Advance = Callable[[], None]  # called after each item


def fisher(
    evaluator: Evaluator,
    target: Target,
    placement: Placement,
    item_ids: Sequence[str],
    *,
    labels: str,
    advance: Advance,
) -> dict[str, Tensor]:
    """Mean squared gradients by checkpoint name, float32: the diagonal of the Fisher information.

    F = 1/N sum_n sum_y p(y | x_n) (d log p(y | x_n) / d theta)^2 over the possible answers y, as the model itself sees
    them (Matena and Raffel 2022, arXiv:2111.09832, section 3.1); an item that has one answer counts with that one.

    Args:
        labels: ``model``: the above. ``right``: of each item the right answer only, the "empirical" Fisher information.

    Raises:
        CandidateError: a gradient is not finite (kind ``nan``).
    """
    with _squared_gradients(target.model) as squares:
        for item in evaluator.likelihoods(target, item_ids, alternatives=labels == "model"):
            _add_item(item, squares, labels, len(item_ids))
            advance()
    held, sums = owners(placement, [p for p, _ in squares.sums]), {id(p): total for p, total in squares.sums}
    found = {
        name: part_of(sums[id(parameter)], parameter, placement.views[name]).contiguous()
        for name, parameter in held.items()
    }
    for name, part in found.items():
        if not math.isfinite(part.sum(dtype=torch.float64)):
            raise CandidateError("nan", f"the gradient of {name} is not finite")
    return found


def _add_item(item: Likelihoods, squares: _Squares, labels: str, num_items: int) -> None:
    if labels == "right" or len(item.logs) == 1:
        squares.factor = 1 / num_items
        item.logs[item.right].backward()
        return
    logs = item.logs.log_softmax(0)  # over the answers that there are
    shares = logs.detach().exp().tolist()
    for answer, share in enumerate(shares):
        squares.factor = share / num_items
        logs[answer].backward(retain_graph=answer + 1 < len(shares))


class _Squares:
    """Sums of squared gradients by parameter; each gradient is added and dropped as soon as it is complete."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.factor = 1.0
        self.sums = [(p, torch.zeros_like(p, dtype=torch.float32)) for p in parameters]
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, total=total: self._add(p, total)) for p, total in self.sums
        ]

    def _add(self, parameter: Tensor, total: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        total.addcmul_(gradient, gradient, value=self.factor)
        parameter.grad = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _squared_gradients(model: Any) -> Iterator[_Squares]:
    """Gradients are on inside."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    squares = _Squares([p.requires_grad_(True) for p in parameters])
    try:
        with torch.enable_grad():
            yield squares
    finally:
        squares.close()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def gram(
    evaluator: Evaluator, target: Target, placement: Placement, item_ids: Sequence[str], *, advance: Advance
) -> dict[str, Tensor]:
    """X'X / rows by the checkpoint name of each linear layer's weight: (in, in), float32; X its inputs: (rows, in).

    The inputs are those of the items with their right answers. An embedding that is the head, too, is no linear layer
    here. A layer that no item reaches has a matrix of zeros.

    Raises:
        CandidateError: an input is not finite (kind ``nan``).
    """
    layers = linear_layers(target.model, placement)
    inputs = GramHooks(list(layers))
    try:
        for _ in evaluator.likelihoods(target, item_ids, alternatives=False):
            advance()
    finally:
        inputs.close()
    found = {name: inputs.mean(module) for module, names in layers.items() for name in names}
    for name, matrix in found.items():
        if not math.isfinite(matrix.sum(dtype=torch.float64)):
            raise CandidateError("nan", f"an input of the layer {name} is not finite")
    return {name: found[name] for name in placement.views if name in found}


def linear_layers(model: Any, placement: Placement) -> dict[torch.nn.Linear, list[str]]:
    """Each linear layer and the checkpoint names of its weight: several where it joins the tensors of a file."""
    by_memory: dict[int, list[str]] = {}
    for name, view in placement.views.items():
        if view.dim() == 2 and tensor_kind(name)[0] != "embedding":
            by_memory.setdefault(view.untyped_storage().data_ptr(), []).append(name)
    found: dict[torch.nn.Linear, list[str]] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            names = [
                name
                for name in by_memory.get(weight.untyped_storage().data_ptr(), ())
                if placement.views[name].stride() == weight.stride()
                and placement.views[name].shape[1] == module.in_features
            ]
            if names:
                found[module] = names
    return found


class GramHooks:
    """Sums X'X of the inputs of ``modules`` as a model runs; layers that read the same input share one product."""

    def __init__(self, modules: Sequence[torch.nn.Linear]):
        self._sums: dict[torch.nn.Linear, Tensor] = {}
        self._rows = dict.fromkeys(modules, 0)
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)  # an input and its X'X
        self._handles = [module.register_forward_pre_hook(self._add) for module in modules]

    def _add(self, module: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        seen, product = self._last
        if x is not seen or product is None:
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            product = rows.T @ rows
            self._last = x, product
        if module in self._sums:
            self._sums[module] += product
        else:
            self._sums[module] = product.clone()
        self._rows[module] += x.numel() // x.shape[-1]

    def mean(self, module: torch.nn.Linear) -> Tensor:
        """X'X / rows of one module."""
        if module not in self._sums:
            return torch.zeros(module.in_features, module.in_features)
        return (self._sums[module] / self._rows[module]).cpu()

    def close(self) -> None:
        self._last = (None, None)
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def loss(
    evaluator: Evaluator, target: Target, tasks: Mapping[str, Sequence[str]], *, advance: Advance
) -> dict[str, Tensor]:
    """Task -> the mean over its items of -log p(right answer) / its tokens, float64 scalars.

    Raises:
        CandidateError: a loss is not finite (kind ``nan``).
    """
    found = {}
    for task, item_ids in tasks.items():
        losses = []
        for item in evaluator.likelihoods(target, item_ids, alternatives=False):
            losses.append(-float(item.logs[item.right]) / item.tokens)
            advance()
        found[task] = torch.tensor(math.fsum(losses) / len(losses), dtype=torch.float64)
        if not math.isfinite(found[task]):
            raise CandidateError("nan", f"the loss on task {task} is {float(found[task])}")
    return found
