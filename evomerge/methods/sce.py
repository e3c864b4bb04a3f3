"""SCE: Select the parameters on which experts differ most, Calculate a coefficient an expert, Erase what disagrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods import fused
from evomerge.methods.arithmetic import SCALE, add_to_base
from evomerge.methods.base import ANY_WEIGHT, Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.selection import order_statistics
from evomerge.params import Param

SLICE = 16384  # entries: the dozen slices of a merge fit into a core's cache


@dataclass(frozen=True)
class Selection:
    """Of one tensor and some of the experts.

    Attributes:
        threshold: the smallest ``spread`` that is selected; 0 selects all, infinity nothing.
        squares: for each of these experts, the mean square of what is selected of its task vector.
    """

    threshold: float
    squares: tuple[float, ...]

    def shares(self, floor: float) -> list[float]:
        """e_t: each expert's share of the squares; equal ones where their sum is 0, or below ``floor``."""
        total = sum(self.squares)
        if total == 0 or total < floor:
            return [1 / len(self.squares)] * len(self.squares)
        return [square / total for square in self.squares]


@dataclass
class Selections:
    """By the experts that take part, by tensor name. Those of all experts are prepared; where a candidate leaves some
    out, their selections are made at its first tensor, and kept."""

    select_topk: float
    sources: SourceIterable
    of: dict[tuple[int, ...], dict[str, Selection]] = field(default_factory=dict)

    def for_tensor(self, name: str, chosen: tuple[int, ...]) -> Selection:
        if chosen not in self.of:
            self.of[chosen] = {
                info.name: select(base, [experts[t] for t in chosen], self.select_topk)
                for info, base, experts in self.sources
            }
        if name not in self.of[chosen]:
            raise MethodError(f"method sce was prepared without the tensor {name}")
        return self.of[chosen][name]


@final
class Sce(Method):
    """theta_0 + scale sum_t w_t e_t s_t tau_t / sum_t e_t s_t, tensor by tensor.

    Select: of the entries on which the experts differ at all, the ``select_topk`` share with the largest variance over
    the experts; the rest of every task vector is set to zero. Calculate: e_t, the share of expert t in the sum of
    squares of what is left. Erase: s_t is 1 where tau_t has the sign of sum_t tau_t (0 counts as +), else 0.

    The experts with a weight of 0 are left out of all this; other weights multiply what comes out. ``int(k n)`` entries
    are selected, and all that equal the last of them.
    """

    name = "sce"
    summary = "keep what varies most between experts, weigh experts by their energy, drop minority signs"
    reference = "Wan et al. 2024, FuseChat, arXiv:2408.07990, SCE merging as in mergekit 0.1.5"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "select_topk": Param(float, 1.0, "share of the entries that is kept, by their variance over experts", 0, 1),
            "floor": Param(
                float, 0.0, "sum over experts of mean squares below which all count the same (mergekit: 1e-6)", 0
            ),
            "scale": SCALE,
        }
    )
    weight = ANY_WEIGHT

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return isinstance(state, Selections) and state.select_topk == params["select_topk"]

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> Selections | None:
        """Thresholds and energies, if ``select_topk`` is fixed."""
        if "select_topk" not in fixed:
            return None
        state = Selections(fixed["select_topk"], sources)
        everyone: dict[tuple[int, ...], dict[str, Selection]] = {}
        for info, base, experts in sources:
            found = everyone.setdefault(tuple(range(len(experts))), {})
            found[info.name] = select(base, experts, state.select_topk)
        state.of.update(everyone)
        return state

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        select_topk: float,
        floor: float,
        scale: float,
        **_: Any,
    ) -> Tensor:
        chosen = tuple(t for t, weight in enumerate(weights) if weight != 0)
        taken = [experts[t] for t in chosen]
        if all(expert is base for expert in taken):
            return base.to(dtype, copy=True)
        if isinstance(state, Selections) and state.select_topk == select_topk:
            selection = state.for_tensor(info.name, chosen)
        else:
            selection = select(base, taken, select_topk)
        shares = selection.shares(floor)
        return _erase(base, taken, selection.threshold, shares, [weights[t] for t in chosen], dtype=dtype, scale=scale)


def select(base: Tensor | None, experts: Sequence[Tensor], select_topk: float) -> Selection:
    """What is selected of a whole tensor, and each expert's mean square there. Three passes; one if all is selected."""
    assert base is not None
    dtype = arithmetic_dtype(base, *experts)
    threshold = 0.0
    if select_topk < 1:
        flats = [expert.reshape(-1) for expert in experts]
        differing = 0  # entries on which the experts are not all the same

        def stream() -> Iterator[tuple[int, Tensor]]:
            nonlocal differing
            differing = 0
            for start in range(0, base.numel(), CHUNK):
                spread = variation([flat[start : start + CHUNK] for flat in flats], dtype)
                differing += int(torch.count_nonzero(spread))
                yield 0, spread.abs_()  # NaN, too, without a sign

        ((threshold,),) = order_statistics(stream, 1, lambda n: [min(max(1, int(select_topk * differing)), n)])
        if int(select_topk * differing) == 0:
            threshold = float("inf")
    squares = [0.0] * len(experts)
    for _, theta_0, thetas in _slices(base, experts, dtype):
        keep = None if threshold == 0 else torch.ge(variation(thetas, dtype), threshold).to(dtype)
        for t, theta in enumerate(thetas):
            if theta is not theta_0:
                tau = torch.sub(theta, theta_0)
                tau = tau if keep is None else tau.mul_(keep)
                squares[t] += float(torch.linalg.vector_norm(tau, dtype=torch.float64)) ** 2
    return Selection(threshold, tuple(square / max(1, base.numel()) for square in squares))


def variation(thetas: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """T^2 times the variance over T experts, entry by entry, of any tensors: (n,) in ``dtype``.

    T sum d^2 - (sum d)^2 with d the differences from the first, so that it is zero where all are the same, and never
    loses more than a factor T to cancellation. The base plays no part.
    """
    if fused.kernels() is not None and fused.on_cpu(*thetas):
        from evomerge.methods import sce_kernels

        alike = fused.alike(thetas, dtype)
        out = torch.empty(thetas[0].numel(), dtype=dtype)
        sce_kernels.variation(fused.addresses(alike), fused.array(alike[0]), fused.array(out))
        return out
    first = thetas[0].reshape(-1).to(dtype)
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for theta in thetas[1:]:
        if theta is not thetas[0]:
            difference = torch.sub(theta.reshape(-1), first)
            total.add_(difference)
            squares.add_(difference.mul_(difference))
    return squares.mul_(len(thetas)).sub_(total.mul_(total))


def _slices(
    base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype, size: int = CHUNK
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """(start, theta_0, thetas): flat slices in ``dtype``. Tensors that are one object stay one."""
    flats = {id(tensor): tensor.reshape(-1) for tensor in (base, *experts)}
    for start in range(0, base.numel(), size):
        wide = {key: flat[start : start + size].to(dtype) for key, flat in flats.items()}
        yield start, wide[id(base)], [wide[id(expert)] for expert in experts]


def _erase(
    base: Tensor,
    experts: Sequence[Tensor],
    threshold: float,
    shares: Sequence[float],
    weights: Sequence[float],
    *,
    dtype: torch.dtype,
    scale: float,
) -> Tensor:
    """theta_0 + scale sum w e s tau / sum e s, over what is selected: fresh memory of the base's shape in ``dtype``."""
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    weighted = [weight * share for weight, share in zip(weights, shares, strict=True)]
    if fused.kernels() is not None and scale != 0 and fused.on_cpu(base, *experts):
        from evomerge.methods import sce_kernels

        theta_0, *thetas = fused.alike([base, *experts], dtype)
        out = fused.array(merged)
        limit, factor = (out.dtype.type(number) for number in (threshold, scale))
        numbers = (fused.scalars(values, out) for values in (shares, weighted))
        sce_kernels.erase(fused.array(theta_0), fused.addresses(thetas), limit, *numbers, factor, out)
        return merged
    flat = merged.view(-1)
    for start, theta_0, thetas in _slices(base, experts, dtype, SLICE):
        piece = _erase_slice(theta_0, thetas, threshold, shares, weighted)
        flat[start : start + piece.numel()] = add_to_base(theta_0, piece, dtype, scale=scale)
    return merged


def _erase_slice(
    base: Tensor, experts: Sequence[Tensor], threshold: float, shares: Sequence[float], weighted: Sequence[float]
) -> Tensor:
    """sum w e s tau / sum e s of a slice, all in the base's type."""
    taus = [torch.sub(expert, base) for expert in experts]
    total = torch.zeros_like(base)
    for tau in taus:
        total.add_(tau)
    sign = torch.ge(total, 0, out=total).mul_(2).sub_(1)  # in one dtype: a boolean mask takes many times longer
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for tau, share, weight in zip(taus, shares, weighted, strict=True):
        agreeing = tau.mul_(sign).clamp_(min=0)
        merged.add_(agreeing, alpha=weight)
        divisor.add_(agreeing.sign_(), alpha=share)
    if threshold > 0:
        merged.mul_(torch.ge(variation(experts, base.dtype), threshold))
    divisor.add_(torch.eq(divisor, 0))  # where nothing agrees the sum is zero, too
    return merged.mul_(sign).div_(divisor)
