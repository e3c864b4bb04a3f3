"""LiNeS: any merged task vector, scaled by how deep in the model it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import (
    ANY_WEIGHT,
    LowRank,
    Method,
    SourceIterable,
    State,
    TensorInfo,
    check_experts,
    check_params,
    check_weights,
    require_affine,
)
from evomerge.methods.matrices import num_kept
from evomerge.params import Param

PASSED_ON = ("density", "mode")  # parameters of the inner method that may be given here


@final
class Lines(Method):
    """theta_0 + (a + b (l - 1) / (L - 1)) tau in layer l of L, tau the merged task vector of the method ``inner``.

    Shallow layers, which hold what all tasks share, stay near the base; deep ones move.

    Args:
        inner: the methods to choose from, by name: those that add a task vector to a base, and need no data.
    """

    name = "lines"
    summary = "another method's merged task vector, scaled linearly with depth"
    reference = "Wang et al. 2025, LiNeS: post-training layer scaling, arXiv:2410.17146, equation 1"
    weight = ANY_WEIGHT
    affine_remedy = "Give a, which depends on the weights by default, and an inner method that is affine in them."

    def __init__(self, inner: Mapping[str, Method]):
        self._inner = dict(inner)
        self.params: Mapping[str, Param] = MappingProxyType(
            {
                "inner": Param(
                    str,
                    "task_arithmetic",
                    "the method whose merged task vector is scaled, with its default parameters",
                    choices=tuple(self._inner),
                ),
                "a": Param(
                    float,
                    None,
                    "what multiplies the task vector in the first layer; by default 1 / T of the T experts, the "
                    "paper's choice for a sum of T task vectors",
                ),
                "b": Param(
                    float,
                    None,
                    "how much more it is in the last layer; by default 1 - a, so that the last layer moves in full; "
                    "the paper searches it",
                ),
                "outside": Param(
                    str,
                    "first",
                    "what multiplies tensors outside the layers. first: a, for all of them (the authors' code); ends: "
                    "a for embeddings, a + b for the final norm, the head and the rest",
                    choices=("first", "ends"),
                ),
                "density": Param(
                    float,
                    None,
                    "of the inner method, if it has one; by default its own",
                    low=0.0,
                    high=1.0,
                    low_open=True,
                ),
                "mode": Param(
                    str, None, "of the inner method, if it has one; by default its own", choices=("mean", "sum")
                ),
            }
        )

    def is_linear(self, *, inner: str, a: float | None, b: float | None, **params: Any) -> bool:
        # By default a depends on how many weights are not zero.
        return a is not None and self._inner[inner].is_linear(**self._params(inner, params))

    def counts_all(self, *, inner: str, **params: Any) -> bool:
        return self._inner[inner].counts_all(**self._params(inner, params))

    def directions(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Iterator[tuple[int, Tensor | LowRank]]:
        require_affine(self, params)
        inner, a, b = params["inner"], params["a"], params["b"]
        factor = a + (1 - a if b is None else b) * _depth(info, params["outside"])
        call = {"info": info, "state": _of(state, inner), "seed": seed, **self._params(inner, params)}
        for t, vector in self._inner[inner].directions(base, experts, **call):
            assert isinstance(vector, Tensor)
            yield t, vector.mul_(factor)

    def chunked_with(self, state: State | None, *, inner: str, **params: Any) -> bool:
        return self._inner[inner].chunked_with(_of(state, inner), **self._params(inner, params))

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> State | None:
        """What the inner method prepares, where no candidate changes which one it is."""
        inner = fixed.get("inner")
        if inner is None:
            return None
        given = {key: fixed[key] for key in PASSED_ON if key in fixed}
        own = self._params(inner, given)
        for key in PASSED_ON:
            if key not in fixed:
                own.pop(key, None)  # it varies
        return inner, self._inner[inner].prepare(sources, None, **own)

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        inner: str,
        a: float | None,
        b: float | None,
        outside: str,
        **params: Any,
    ) -> Tensor:
        """Raises MethodError for weights, experts or parameters that the inner method does not take."""
        method = self._inner[inner]
        check_experts(method, True, len(experts))
        check_weights(method, weights, len(experts))
        merged = method.combine(
            base,
            experts,
            weights=weights,
            dtype=dtype,
            info=info,
            state=_of(state, inner),
            seed=seed,
            **self._params(inner, params),
        )
        a = 1 / max(1, num_kept(weights)) if a is None else a
        factor = a + (1 - a if b is None else b) * _depth(info, outside)
        if factor == 1 or not any(weights):
            return merged
        return merged.sub_(base).mul_(factor).add_(base)

    def _params(self, inner: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The inner method's parameters; MethodError for one that it does not have."""
        method = self._inner[inner]
        chosen = {key: given[key] for key in PASSED_ON if given.get(key) is not None}
        for key in chosen:
            if key not in method.params:
                raise MethodError(f"method lines: {inner} has no parameter {key!r}", remedy=f"Leave {key} out.")
        return check_params(inner, method, chosen)


def _of(state: State | None, inner: str) -> State | None:
    """The inner method's state, if it is this method's."""
    return state[1] if state is not None and state[0] == inner else None


def _depth(info: TensorInfo, outside: str) -> float:
    """From 0 in the first layer to 1 in the last one."""
    if info.layer is None:
        return 0.0 if outside == "first" or info.kind == "embedding" else 1.0
    return info.layer / (info.num_layers - 1) if info.num_layers > 1 else 0.0
