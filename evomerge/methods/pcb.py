"""PCB-Merging: the experts compete for every entry, within their own task vector and with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, add_to_base
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.selection import order_statistics
from evomerge.params import Param

MOST_KNOWN = 20_000  # tensors, times sets of experts that take part, whose levels are kept
Present = tuple[bool, ...]  # of each expert: does it take part? Not with a weight of zero.


@dataclass(frozen=True)
class Levels:
    """What one expert's entries are held against."""

    low: float  # the magnitudes of its task vector are clipped to low..high
    high: float
    threshold: float = 0.0  # a score up to here counts nothing,
    top: float = 0.0  # the highest score counts 1


def clipped(tau: Tensor, levels: Levels) -> Tensor:
    """``tau`` with magnitudes between low and high; zeros stay."""
    return tau.abs().clamp_(levels.low, levels.high).mul_(tau.sign())


def scores(tau: Tensor, total: Tensor, levels: Levels, count: int) -> Tensor:
    """How an expert does in the competition for each entry: exp(N (s^2 - 1)) tanh(tau_t sum_j tau_j).

    s is the clipped magnitude as a share of the way from low to high, N the ``count`` of experts. (The constant factor
    exp(-N) has no effect on what follows, and keeps large N from overflowing.)
    """
    width = levels.high - levels.low
    share = tau.abs().clamp_(levels.low, levels.high).sub_(levels.low).div_(width if width > 0 else 1.0)
    intra = share.square_().sub_(1).mul_(count).exp_()
    return torch.mul(tau, total).tanh_().mul_(intra)


def coefficients(score: Tensor, levels: Levels) -> Tensor:
    """Drop and rescale: 0 up to the threshold, 1 at the top, in proportion between.

    Where the two are one number there is no between: the top counts 1, if it is a positive score.
    """
    width = levels.top - levels.threshold
    if width > 0:
        return score.sub_(levels.threshold).div_(width).clamp_(0, 1)
    return torch.ge(score, levels.top).to(score).mul_(float(levels.top > 0))


@dataclass(frozen=True)
class _Known:
    """Levels that were found already, of the whole model or of tensors: they are others where an expert is left out.

    They may be dropped at any time.
    """

    sources: SourceIterable
    found: dict[Any, list[Levels]] = field(default_factory=dict, repr=False)

    def levels(self, here: SourceIterable | None, name: str, *competition: Any) -> list[Levels]:
        """Of the tensor ``name``, which is all of ``here``, or (None) of the whole model; as ``find_levels``."""
        key = ("" if here is None else name, *competition)
        if key not in self.found:
            if len(self.found) >= MOST_KNOWN:
                self.found.clear()
            self.found[key] = find_levels(self.sources if here is None else here, *competition)
        return self.found[key]


def find_levels(sources: SourceIterable, present: Present, density: float, clip: float) -> list[Levels]:
    """The levels of each expert over all of ``sources``: four passes in float32, eight in float64.

    Ranks as in the authors' code. An expert that is the base in a tensor counts with its zeros there.
    """

    def magnitudes() -> Iterator[tuple[int, Tensor]]:
        for taus in _pieces(sources, present):
            for t, tau in taus.items():
                yield t, tau.abs()

    def competition() -> Iterator[tuple[int, Tensor]]:
        for taus in _pieces(sources, present):
            total = _total(taus)
            for t, tau in taus.items():
                yield t, scores(tau, total, clips[t], sum(present))

    def ends(n: int) -> tuple[int, int]:
        first = int(n * clip)
        return n - first, n - max(first, int(n * (1 - clip) - 1))

    def drop(n: int) -> tuple[int, int]:
        return n - min(int(n * (1 - density)), n - 1), 1

    count = len(present)
    clips = [Levels(low, high) for low, high in order_statistics(magnitudes, count, ends)]
    tops = order_statistics(competition, count, drop, signed=True)
    return [Levels(c.low, c.high, *found) for c, found in zip(clips, tops, strict=True)]


def _pieces(sources: SourceIterable, present: Present) -> Iterator[dict[int, Tensor]]:
    """t -> tau_t of those present, in flat pieces of all tensors."""
    for _, base, experts in sources:
        assert base is not None
        dtype = arithmetic_dtype(base, *experts)
        flat = base.reshape(-1)
        flats = [flat if expert is base else expert.reshape(-1) for expert in experts]
        for start in range(0, flat.numel(), CHUNK):
            theta_0 = flat[start : start + CHUNK].to(dtype)
            parts = [theta_0 if expert is flat else expert[start : start + CHUNK] for expert in flats]
            yield {t: torch.sub(part, theta_0) for t, part in enumerate(parts) if present[t]}


def _total(taus: Mapping[int, Tensor]) -> Tensor:
    first, *others = taus.values()
    total = first.clone()
    for tau in others:
        total.add_(tau)
    return total


@final
class Pcb(Method):
    """sum_t w_t c_t tau_t / sum_t c_t, entry by entry, where c_t says how an expert did in the competition for it.

    Its score is high where the entry is large among the expert's own (intra-balancing), and where it agrees with the
    sum of all (inter-balancing). Only the ``density`` share of an expert's entries with the highest scores has
    coefficients above zero; they grow in proportion up to 1.
    """

    name = "pcb"
    summary = "the experts compete for each entry; low scores are dropped, the rest are weighted means"
    reference = (
        "Du et al. 2024, Parameter competition balancing (PCB-Merging), arXiv:2410.02396, as in the authors' "
        "pcb-merging.py"
    )
    params: Mapping[str, Param] = MappingProxyType(
        {
            "clip": Param(float, 0.0001, "share of the magnitudes, at either end, that is clipped", 0, 0.5),
            "density": Param(float, 0.1, "share of the entries whose scores count", 0, 1, low_open=True),
            "scale": SCALE,
            "scope": Param(
                str,
                "tensor",
                "where an expert's entries compete: in each tensor, or in the whole model (the paper)",
                choices=("tensor", "model"),
            ),
        }
    )

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """Raises MethodError for scope model without ``state``: one tensor cannot give its levels."""
        if params.get("scope", self.params["scope"].default) == "tensor":
            return False  # which experts take part is known only when the tensor is merged
        if isinstance(state, _Known):
            return True
        raise MethodError(
            f"method {self.name} with scope model was not prepared over the whole model",
            remedy="Fix scope: model for all candidates, or use scope: tensor.",
        )

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> State | None:
        """Room for the levels, unless they are a tensor's and vary; they are found when they are first needed."""
        if fixed.get("scope") == "model" or {"scope", "density", "clip"} <= fixed.keys():
            return _Known(sources)
        return None

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
        clip: float,
        scale: float,
        scope: str,
        **_: Any,
    ) -> Tensor:
        """Piece by piece: besides the result nothing is as large as the tensor."""
        present = tuple(weight != 0 for weight in weights)
        if not any(present) or all(expert is base for expert in experts):
            return base.to(dtype, copy=True)
        here = [(info, base, experts)]
        whole_model = self.chunked_with(state, scope=scope)
        known = state if isinstance(state, _Known) else _Known(here)
        levels = known.levels(None if whole_model else here, info.name, present, density, clip)
        merged = torch.empty(base.numel(), dtype=dtype, device=base.device)
        start = 0
        for taus in _pieces(here, present):
            piece = _mean(taus, levels, weights)
            merged[start : start + piece.numel()] = piece
            start += piece.numel()
        return add_to_base(base, merged.view(base.shape), dtype, scale=scale)


def _mean(taus: Mapping[int, Tensor], levels: Sequence[Levels], weights: Sequence[float]) -> Tensor:
    """The mean of the clipped task vectors of one piece, by their coefficients; the weights multiply on top only."""
    total = _total(taus)
    top, bottom = torch.zeros_like(total), torch.zeros_like(total)
    for t, tau in taus.items():
        share = coefficients(scores(tau, total, levels[t], len(taus)), levels[t])
        bottom.add_(share)
        top.addcmul_(share, clipped(tau, levels[t]), value=weights[t])
    return top.div_(bottom.clamp_(min=1e-12))
