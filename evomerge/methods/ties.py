"""TIES: task vectors trimmed to their largest entries, then an election of signs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, add_to_base, task_vectors
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.election import MODE, NORMALIZE, elect_and_merge
from evomerge.methods.selection import magnitude_thresholds
from evomerge.params import Param


def trim(tau: Tensor, threshold: float) -> Tensor:
    """``tau`` with what is smaller than ``threshold`` (one of its magnitudes) in magnitude set to zero; NaN stays."""
    if threshold == 0:
        return tau
    below = torch.nextafter(torch.tensor(threshold, dtype=tau.dtype), torch.zeros((), dtype=tau.dtype))
    return torch.nn.functional.hardshrink(tau, float(below))


@dataclass(frozen=True)
class Thresholds:
    """The smallest magnitude that each expert's task vector keeps.

    ``of`` has one list (one number an expert) for each tensor name, or the only one under "" for scope model.
    """

    density: float
    scope: str
    of: Mapping[str, Sequence[float]]

    def for_tensor(self, name: str) -> Sequence[float]:
        key = "" if self.scope == "model" else name
        if key not in self.of:
            raise MethodError(f"method ties was prepared without the tensor {name}")
        return self.of[key]


@final
class Ties(Method):
    """Trim each task vector to its largest entries, elect a sign for every entry, merge the entries that agree.

    Kept are ``round(density * n)`` entries of an expert's task vector, at least one, and all that equal the smallest
    of them in magnitude. ``scope`` says what n is: the tensor, or (the paper) the whole model, where tensors in which
    the expert is the base count with their zeros. The weights multiply the trimmed task vectors before the election.
    """

    name = "ties"
    summary = "keep each task vector's largest entries, elect signs, merge the entries that agree"
    reference = "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "density": Param(float, 0.2, "share of each task vector's entries that is kept", 0, 1, low_open=True),
            "mode": MODE,
            "normalize": NORMALIZE,
            "scale": SCALE,
            "scope": Param(
                str,
                "tensor",
                "where the largest entries are looked for: in each tensor, or in the whole model (the paper)",
                choices=("tensor", "model"),
            ),
        }
    )

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """Raises MethodError for scope model without its thresholds in ``state``: one tensor cannot give them."""
        density, scope = self._trimming(params)
        if density == 1 or (isinstance(state, Thresholds) and (state.density, state.scope) == (density, scope)):
            return True
        if scope == "model":
            raise MethodError(
                f"method ties with scope model and density {density} was not prepared over the whole model",
                remedy="Fix density (it cannot vary with scope: model), or use scope: tensor.",
            )
        return False

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> Thresholds | None:
        """The thresholds, if ``density`` is fixed. Two passes over the sources for scope model in float32."""
        density, scope = self._trimming(fixed)
        if density == 1:
            return None
        if "density" not in fixed:
            if scope == "model":
                raise MethodError(
                    "method ties with scope model needs one density for all candidates, but it varies",
                    remedy="Fix density, or use scope: tensor.",
                )
            return None
        if scope == "tensor":
            return Thresholds(density, scope, {s[0].name: self._of_tensor(*s, density) for s in sources})
        count = max((len(experts) for _, _, experts in sources), default=0)

        def stream() -> Iterator[tuple[int, Tensor]]:
            for _, base, experts in sources:
                yield from _magnitudes(base, experts, zeros=True)

        return Thresholds(density, scope, {"": magnitude_thresholds(stream, count, density)})

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        density: float,
        mode: str,
        normalize: bool,
        scale: float,
        scope: str,
        **_: Any,
    ) -> Tensor:
        """Without ``state`` the thresholds come from the tensor itself. MethodError for scope model, which needs it."""
        if density == 1:
            thresholds: Sequence[float] = [0.0] * len(experts)
        elif self.chunked_with(state, density=density, scope=scope):
            assert state is not None
            thresholds = state.for_tensor(info.name)
        else:
            thresholds = self._of_tensor(info, base, experts, density)
        vectors = task_vectors(base, experts, weights, dtype)
        trimmed = ((weight, trim(tau, thresholds[t])) for t, weight, tau in vectors)
        merged = elect_and_merge(trimmed, mode=mode, normalize=normalize)
        return add_to_base(base, merged, dtype, scale=scale)

    def _trimming(self, params: Mapping[str, Any]) -> tuple[float, str]:
        density, scope = (params.get(key, self.params[key].default) for key in ("density", "scope"))
        return density, scope

    @staticmethod
    def _of_tensor(info: TensorInfo, base: Tensor | None, experts: Sequence[Tensor], density: float) -> list[float]:
        return magnitude_thresholds(lambda: _magnitudes(base, experts), len(experts), density)


def _magnitudes(base: Tensor | None, experts: Sequence[Tensor], zeros: bool = False) -> Iterator[tuple[int, Tensor]]:
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
