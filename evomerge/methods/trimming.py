"""Task vectors cut by magnitude: what TIES, Model Breadcrumbs and Consensus Merging share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.selection import kept, order_statistics
from evomerge.methods.thinning import Thinned, experts_in
from evomerge.params import Param

SMALL = 4096  # entries of a tensor that is sorted: below, histograms of 65,536 bins take longer

SCOPE = Param(
    str,
    "tensor",
    "where the largest entries are looked for: in each tensor, or in the whole model (the paper)",
    choices=("tensor", "model"),
)


@dataclass(frozen=True)
class Trimming:
    """Which of a task vector's n entries stay: ``kept(n, density)`` of them, next to the ``gamma`` share on top.

    Those on top are ``round(gamma * n)``, or fewer where they and the kept ones are more than n. ``scope`` says what n
    is: the tensor, or the whole model.
    """

    density: float
    gamma: float = 0.0
    scope: str = "tensor"

    def ranks(self, n: int) -> list[int]:
        """Ranks of the smallest and (with ``gamma``) of the largest magnitude that stays."""
        keep = kept(n, self.density)
        top = min(round(self.gamma * n), n - keep)
        return [top + keep] if self.gamma == 0 else [top + keep, top + 1]


@dataclass(frozen=True)
class Thresholds:
    """The magnitudes at which each expert's task vector is cut, in the order of ``Trimming.ranks``.

    ``of`` has one list (an expert's thresholds) an expert for each tensor name, or the only one under "" for scope
    model.
    """

    trimming: Trimming
    of: Mapping[str, Sequence[Sequence[float]]]

    def for_tensor(self, method: str, name: str) -> Sequence[Sequence[float]]:
        key = "" if self.trimming.scope == "model" else name
        if key not in self.of:
            raise MethodError(f"method {method} was prepared without the tensor {name}")
        return self.of[key]


class TrimmedMethod(Method):
    """Thresholds are looked for once if no candidate changes them, otherwise tensor by tensor as it is merged.

    A method says by ``trimming`` how it cuts, and takes from ``thinned`` what stays.
    """

    widens = True

    @abstractmethod
    def trimming(self, params: Mapping[str, Any]) -> Trimming | None:
        """How these parameters cut; None if they cut nothing. What is absent has its default."""

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """Raises MethodError for scope model without its thresholds in ``state``: one tensor cannot give them."""
        trimming = self.trimming(params)
        if trimming is None or (isinstance(state, Thresholds) and state.trimming == trimming):
            return True
        if trimming.scope == "model":
            raise MethodError(
                f"method {self.name} with scope model and density {trimming.density} was not prepared over the whole "
                "model",
                remedy="Fix what it trims by (density cannot vary with scope: model), or use scope: tensor.",
            )
        return False

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> Thresholds | None:
        """The thresholds, if ``fixed`` holds all that cuts. Two passes over the sources for scope model in float32."""
        trimming = self.trimming(fixed)
        if trimming is None:
            return None
        if not all(name in fixed for name in ("density", "gamma") if name in self.params):
            if trimming.scope == "model":
                raise MethodError(
                    f"method {self.name} with scope model needs one density for all candidates, but it varies",
                    remedy="Fix density, or use scope: tensor.",
                )
            return None
        if trimming.scope == "tensor":
            found = {info.name: _of_tensor(base, experts, trimming) for info, base, experts in sources}
            return Thresholds(trimming, found)
        count = max((len(experts) for _, _, experts in sources), default=0)

        def stream() -> Iterator[tuple[int, Tensor]]:
            for _, base, experts in sources:
                yield from magnitudes(base, experts, zeros=True)

        return Thresholds(trimming, {"": order_statistics(stream, count, trimming.ranks)})

    def thinned(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        weights: Sequence[float],
        *,
        info: TensorInfo,
        state: State | None,
        params: Mapping[str, Any],
    ) -> list[Thinned]:
        """What stays of the task vectors of the experts that count. Without ``state`` the tensor must be whole."""
        trimming = self.trimming(params)
        chosen = list(experts_in(base, experts, weights))
        if trimming is None:
            return [Thinned(experts[t], weight) for t, weight in chosen]
        if self.chunked_with(state, **params):
            assert isinstance(state, Thresholds)
            thresholds = state.for_tensor(self.name, info.name)
        else:
            thresholds = _of_tensor(base, experts, trimming)
        return [Thinned(experts[t], weight, None, *thresholds[t]) for t, weight in chosen]


def magnitudes(base: Tensor | None, experts: Sequence[Tensor], zeros: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(t, |tau_t|) in flat pieces. An expert that is the base gives nothing, or its zeros if ``zeros``."""
    assert base is not None
    dtype = arithmetic_dtype(base, *experts)
    flat = base.reshape(-1)
    flats = [None if expert is base else expert.reshape(-1) for expert in experts]
    for start in range(0, flat.numel(), CHUNK):
        theta_0 = flat[start : start + CHUNK].to(dtype)
        for t, expert in enumerate(flats):
            if expert is not None:
                yield t, torch.sub(expert[start : start + CHUNK], theta_0).abs_()
            elif zeros:
                yield t, torch.zeros_like(theta_0)


def _of_tensor(base: Tensor | None, experts: Sequence[Tensor], trimming: Trimming) -> list[list[float]]:
    if base is not None and 0 < base.numel() <= SMALL:
        ranks, n = trimming.ranks(base.numel()), base.numel()
        found = [[0.0] * len(ranks) for _ in experts]
        for t, values in magnitudes(base, experts):
            ascending = values.sort().values
            found[t] = [float(ascending[n - rank]) for rank in ranks]
        return found
    return order_statistics(lambda: magnitudes(base, experts), len(experts), trimming.ranks)
