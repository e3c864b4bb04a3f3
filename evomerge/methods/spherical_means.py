"""Means on a sphere: directions are averaged apart from lengths. All are sums of the experts with coefficients that
depend on their inner products alone."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo
from evomerge.methods.inner_products import (
    ORIGIN,
    VECTORS,
    InnerProducts,
    cosines_of,
    inner_products,
    prepare_products,
    spread,
)
from evomerge.params import Param

COLINEAR = 1e-12  # squared sine below which two vectors count as (anti)parallel: an arc is a line, or not defined
CANCELLED = 1e-6  # share of the weights' sum below which directions cancel


class _SphericalMean(Method):
    """origin + sum_t c_t (theta_t - origin), c a function of the weights and of the inner products."""

    needs_base = False

    @abstractmethod
    def _coefficients(self, products: Tensor, weights: Sequence[float], info: TensorInfo, **params: Any) -> Tensor:
        """(vectors, T) float64.

        Args:
            products: (vectors, T, T) float64, of the experts that are different objects and have a weight.
            weights: theirs, none of them 0; two or more.
        """

    def _alone(self, weight: float, **params: Any) -> float:
        """The coefficient of an expert that has the only weight."""
        return 1.0

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return isinstance(state, InnerProducts) and state.fits(*self._geometry(params))

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> InnerProducts | None:
        """Inner products by tensor, if what they are of is fixed. MethodError where the origin is a base that is
        not there."""
        if any(key in self.params and key not in fixed for key in ("vectors", "origin")):
            return None
        return prepare_products(self.name, sources, *self._geometry(fixed))

    def combine(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        **params: Any,
    ) -> Tensor:
        """Raises MethodError where the weights or the experts' directions cancel."""
        vectors, origin = self._geometry(params)
        start = base if origin == "base" else None
        if origin == "base" and base is None:
            raise MethodError(f"method {self.name} with origin base needs a base", remedy="Name a base.")
        chosen, shares = self._distinct(experts, weights)
        if all(experts[t] is start for t in chosen):
            assert start is not None
            return start.to(dtype, copy=True)
        if len(chosen) == 1:
            coefficients = torch.full((1, 1), self._alone(shares[0], **params), dtype=torch.float64)
        else:
            if isinstance(state, InnerProducts) and state.fits(vectors, origin):
                products = state.for_tensor(self.name, info.name)
            else:
                products = inner_products(self.name, info, base, experts, vectors, origin)
            coefficients = self._coefficients(products[:, chosen][:, :, chosen], shares, info, **params)
        return _sum(start, [experts[t] for t in chosen], coefficients, info, vectors, dtype)

    def _distinct(self, experts: Sequence[Tensor], weights: Sequence[float]) -> tuple[list[int], list[float]]:
        """(first places, summed weights) of the experts that are different objects: those that are one (all
        untouched by their adapters) are one vector, and their mean is exactly it."""
        places: dict[int, int] = {}
        shares: dict[int, list[float]] = {}
        for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            if weight != 0:
                places.setdefault(id(expert), t)
                shares.setdefault(id(expert), []).append(weight)
        summed = {key: math.fsum(share) for key, share in shares.items()}
        chosen = [key for key in places if summed[key] != 0]
        if not chosen:
            raise MethodError(
                f"method {self.name} needs weights that do not cancel, but they are {list(weights)}",
                remedy="Keep the weights positive.",
            )
        return [places[key] for key in chosen], [summed[key] for key in chosen]

    def _geometry(self, params: Mapping[str, Any]) -> tuple[str, str]:
        return params.get("vectors", VECTORS.default), params.get("origin", ORIGIN.default)


def _sum(
    base: Tensor | None,
    experts: Sequence[Tensor],
    coefficients: Tensor,
    info: TensorInfo,
    vectors: str,
    dtype: torch.dtype,
) -> Tensor:
    """base + sum c_t (theta_t - base), or sum c_t theta_t without one; fresh memory in ``dtype``."""
    total: Tensor | None = None
    for t, expert in enumerate(experts):
        alpha: float | Tensor = 1.0
        if len(coefficients) == 1:
            alpha = float(coefficients[0, t])
        elif expert.numel():
            alpha = spread(coefficients[:, t].to(expert.device), info, expert.numel(), vectors, dtype)
            alpha = alpha.view(expert.shape)
        x = expert if base is None else torch.sub(expert, base.to(dtype))
        if total is None:
            total = (x.to(dtype, copy=True) if base is None else x).mul_(alpha)
        elif isinstance(alpha, Tensor):
            total.addcmul_(x.to(dtype), alpha)
        else:
            total.add_(x, alpha=alpha)
    assert total is not None
    return total if base is None else total.add_(base)


@final
class NuSlerp(_SphericalMean):
    """sin((1-s) O)/sin(O) x_1 + sin(s O)/sin(O) x_2 with s = w_2 / (w_1 + w_2), O the angle between x_1 and x_2.

    x is an expert, or (``origin`` base) its task vector; laid flat, or row by row or column by column. A line where the
    two are parallel or opposite. A zero vector counts as one at right angles.
    """

    name = "nuslerp"
    summary = "slerp by weights: of experts or task vectors, as a whole or row by row"
    reference = "mergekit 0.1.5 (Goddard et al. 2024, arXiv:2403.13257), method nuslerp; arc: Shoemake 1985"
    params: Mapping[str, Param] = MappingProxyType({"vectors": VECTORS, "origin": ORIGIN})
    weight = Param(float, 1.0, "only the two weights' proportion counts; any sign, but their sum must not be zero")
    num_experts: tuple[int, int | None] = (2, 2)

    def _coefficients(self, products: Tensor, weights: Sequence[float], info: TensorInfo, **params: Any) -> Tensor:
        total = math.fsum(weights)
        if abs(total) < 1e-12:
            raise MethodError(
                f"method nuslerp takes the place on the arc as w2 / (w1 + w2), but {list(weights)} sum to zero",
                remedy="Keep the weights positive.",
            )
        s = weights[1] / total
        _, cosines = cosines_of(products)
        cosine = cosines[:, 0, 1]
        line = 1 - cosine * cosine <= COLINEAR
        angle = torch.acos(torch.where(line, 0.0, cosine))
        arc = [torch.sin(share * angle) / torch.sin(angle) for share in (1 - s, s)]
        return torch.stack([torch.where(line, share, on) for share, on in zip((1 - s, s), arc, strict=True)], dim=1)


@final
class MultiSlerp(_SphericalMean):
    """L u / |u| with u = sum w_t x_t / |x_t| and L = sum w_t |x_t|: the weighted mean direction at the weighted mean
    length. x is an expert, or (``origin`` base) its task vector.

    mergekit adds a step in the tangent space at u / |u|: the weighted sum of the projections there, which is zero for
    the very weights that u was made with.
    """

    name = "multislerp"
    summary = "mean direction of any number of experts (or task vectors), at their mean length"
    reference = "mergekit 0.1.5 (Goddard et al. 2024, arXiv:2403.13257), method multislerp"
    params: Mapping[str, Param] = MappingProxyType(
        {"normalize": Param(bool, True, "divide the weights by their sum"), "origin": ORIGIN}
    )
    weight = Param(float, 1.0, "share of this expert; any sign, 0 leaves the expert out")
    keeps_base = False  # weights that do not sum to 1 scale the base too, if not normalised

    def _alone(self, weight: float, **params: Any) -> float:
        return 1.0 if params["normalize"] else abs(weight)

    def _coefficients(self, products: Tensor, weights: Sequence[float], info: TensorInfo, **params: Any) -> Tensor:
        w = torch.tensor(weights, dtype=torch.float64, device=products.device)
        if params["normalize"]:
            if abs(math.fsum(weights)) <= CANCELLED * math.fsum(map(abs, weights)):
                raise MethodError(
                    f"method multislerp with normalize divides by the sum of the weights, but {list(weights)} sum to "
                    "zero",
                    remedy="Keep the weights positive, or set normalize: false.",
                )
            w = w / math.fsum(weights)
        norms, cosines = cosines_of(products)
        if not norms.any():
            return torch.zeros_like(norms)
        length = (norms * w).sum(1)
        mean = (w @ cosines[0] @ w).clamp(min=0).sqrt()
        if mean <= CANCELLED * w.abs().sum():
            if len(weights) == 2:
                return w[None]
            raise MethodError(
                f"method multislerp: the directions of {info.name} cancel for the weights {list(weights)}",
                remedy="Choose other weights.",
            )
        return torch.where(norms > 0, length * w / (mean * norms), 0.0)


@final
class Karcher(_SphericalMean):
    """The Riemannian mean of the experts' directions, at their mean length: the point of the sphere with the least
    weighted sum of squared angles, by fixed-point steps from the mean direction."""

    name = "karcher"
    summary = "Riemannian (Karcher) mean of the experts' directions, at their mean length"
    reference = "Wang et al. 2026, Functionality-Oriented LLM Merging on the Fisher-Rao Manifold, arXiv:2603.04972; " \
        "Karcher 1977, Riemannian center of mass, CPAM 30"  # fmt: skip
    params: Mapping[str, Param] = MappingProxyType(
        {
            "steps": Param(int, 10, "most steps towards the mean", 0),
            "tol": Param(float, 1e-5, "angle of a step, in radians, below which the mean is found", 0),
        }
    )
    weight = Param(float, 1.0, "share of this expert (divided by the sum of all); 0 leaves the expert out", low=0)

    def _coefficients(self, products: Tensor, weights: Sequence[float], info: TensorInfo, **params: Any) -> Tensor:
        norms, cosines = (found[0] for found in cosines_of(products))
        w = torch.tensor(weights, dtype=torch.float64, device=products.device) / math.fsum(weights)
        there = norms > 0
        if not there.any():
            return torch.zeros_like(norms)[None]
        length = (w * norms).sum()
        mean = _karcher_mean(cosines[there][:, there], w[there] / w[there].sum(), params["steps"], params["tol"])
        coefficients = torch.zeros_like(norms)
        coefficients[there] = length * mean / norms[there]
        return coefficients[None]


def _karcher_mean(cosines: Tensor, weights: Tensor, steps: int, tol: float) -> Tensor:
    """The mean of unit vectors as a sum of them: its coefficients (T,).

    Args:
        cosines: (T, T) between the unit vectors.
        weights: (T,), positive, of sum 1.
    """

    def norm(coefficients: Tensor) -> Tensor:
        return (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()

    if norm(weights) <= CANCELLED:  # opposite directions: no mean is better than an expert's own
        return torch.eye(len(weights), dtype=weights.dtype, device=weights.device)[0]
    mean = weights / norm(weights)
    for _ in range(steps):
        towards = (cosines @ mean).clamp(-1, 1)  # cosine of the angle to each expert
        angle = torch.acos(towards)
        sine = torch.sin(angle)
        pull = torch.where(sine <= tol, 0.0, weights * angle / sine)  # none from there, or from the other side
        step = pull - (pull * towards).sum() * mean
        size = norm(step)
        if size <= tol:
            break
        mean = torch.cos(size) * mean + torch.sin(size) / size * step
        mean = mean / norm(mean)
    return mean
