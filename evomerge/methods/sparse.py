"""Task vectors thinned out before they are merged: by magnitude (TIES) or at random (DARE)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.random import uniform
from evomerge.methods.selection import magnitude_thresholds
from evomerge.params import Param

MODE = Param(
    str,
    "mean",
    "mean: divide by the number of experts that agree with the elected sign; sum: by nothing",
    choices=("mean", "sum"),
)
NORMALIZE = Param(bool, False, "divide by the sum of the weights that agree with the elected sign, instead of by mode")
RESCALE = Param(
    str,
    "density",
    "density: divide what is kept by density (keeps the expectation); l1: restore the L1 norm of the task vector, "
    "tensor by tensor",
    choices=("density", "l1"),
)


def elect_and_merge(vectors: Iterable[tuple[float, Tensor]], *, mode: str, normalize: bool) -> Tensor | None:
    """TIES' second and third step: elect a sign for every entry, then merge the entries that agree with it.

    The sign of an entry is that of its weighted sum (zero counts as +). Sums of the positive and of the negative parts
    are all that is kept, so memory does not grow with T.

    Args:
        vectors: (w_t, trimmed tau_t); the memory of tau_t is reused.
        mode: ``mean`` divides by the number of entries that agree, ``sum`` by nothing.
        normalize: divide by the sum of their weights instead. (Below 1e-8 in magnitude it counts as 1.)

    Returns:
        The merged task vector, or None if there are no vectors.
    """
    # Operations with a boolean mask are many times slower on a CPU than those used here, which stay in one dtype.
    total = positive = share = positive_share = None
    for weight, vector in vectors:
        scaled = vector.mul_(weight)
        if total is None or positive is None or share is None or positive_share is None:
            total, positive, share, positive_share = (torch.zeros_like(scaled) for _ in range(4))
        up = scaled.clamp(min=0)
        total.add_(scaled)
        positive.add_(up)
        if normalize or mode == "mean":
            share.add_(scaled.sign_(), alpha=weight if normalize else 1)
            positive_share.add_(up.sign_(), alpha=weight if normalize else 1)
    if total is None or positive is None or share is None or positive_share is None:
        return None
    elected = torch.ge(total, 0, out=torch.empty_like(total))  # 1 for +, 0 for -
    merged = torch.lerp(total - positive, positive, elected)
    if mode == "sum" and not normalize:
        return merged
    divisor = torch.lerp(positive_share - share, positive_share, elected)
    if normalize:
        divisor.masked_fill_(divisor.abs() < 1e-8, 1)
    else:
        divisor.clamp_(min=1)  # where nothing agrees, the sum is zero anyway
    return merged.div_(divisor)


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


class _Dare(Method):
    """Drop and rescale: the part that DARE's two methods share."""

    reference = "Yu et al. 2024, Language models are super Mario (DARE), arXiv:2311.03099, section 3.2, equation 1"

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """False for rescale l1: the L1 norm of what a seed keeps needs the whole tensor."""
        density, rescale = (params.get(key, self.params[key].default) for key in ("density", "rescale"))
        return rescale == "density" or density == 1

    def _dropped(
        self,
        vectors: Iterable[tuple[int, float, Tensor]],
        *,
        info: TensorInfo,
        seed: int,
        density: float,
        rescale: str,
    ) -> Iterator[tuple[float, Tensor]]:
        """(w_t, tau_t with each entry kept with probability ``density``, the kept ones rescaled)."""
        for t, weight, tau in vectors:
            if density == 1:
                yield weight, tau
                continue
            norm = float(tau.abs().sum(dtype=torch.float64)) if rescale == "l1" else 0.0
            drawn = uniform(seed, info.name, t, info.start, tau.numel())
            keep = torch.lt(drawn, density, out=drawn)  # 1 and 0 in float32: much faster than a boolean mask
            tau.mul_(keep.view(tau.shape).to(tau))
            if rescale == "density":
                yield weight, tau.div_(density)
            else:
                kept = float(tau.abs().sum(dtype=torch.float64))
                yield weight, tau.mul_(norm / kept if kept else 1.0)


DARE_DENSITY = Param(float, 0.5, "probability with which an entry of a task vector is kept", 0, 1, low_open=True)


@final
class DareLinear(_Dare):
    """Task arithmetic on task vectors whose entries were dropped at random and rescaled."""

    name = "dare_linear"
    summary = "drop entries of the task vectors at random, rescale the rest, then task arithmetic"
    params: Mapping[str, Param] = MappingProxyType({"density": DARE_DENSITY, "rescale": RESCALE, "scale": SCALE})
    weight = TASK_WEIGHT

    def is_linear(self, **params: Any) -> bool:
        return True

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        """Where nothing is dropped."""
        return [params["scale"] * weight for weight in weights] if params["density"] == 1 else None

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        density: float,
        rescale: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        vectors = task_vectors(base, experts, [scale * weight for weight in weights], dtype)
        dropped = self._dropped(vectors, info=info, seed=seed, density=density, rescale=rescale)
        return add_to_base(base, weighted_sum(dropped), dtype)


@final
class DareTies(_Dare):
    """TIES' sign election and merging, with DARE's random drop in the place of the trimming.

    (DARE's authors also run TIES whole, with its trimming, on task vectors that DARE has thinned out.)
    """

    name = "dare_ties"
    summary = "drop entries of the task vectors at random, rescale the rest, then elect signs as ties does"
    params: Mapping[str, Param] = MappingProxyType(
        {"density": DARE_DENSITY, "mode": MODE, "normalize": NORMALIZE, "rescale": RESCALE, "scale": SCALE}
    )

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        density: float,
        mode: str,
        normalize: bool,
        rescale: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        vectors = task_vectors(base, experts, weights, dtype)
        dropped = self._dropped(vectors, info=info, seed=seed, density=density, rescale=rescale)
        merged = elect_and_merge(dropped, mode=mode, normalize=normalize)
        return add_to_base(base, merged, dtype, scale=scale)
