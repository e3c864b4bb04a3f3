"""Means of the experts whose weights come from data: importance of each entry (Fisher), loss on examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo
from evomerge.methods.basic import Linear
from evomerge.methods.statistics import Statistics, how_to_collect
from evomerge.params import Param

NOT_NEGATIVE = Param(float, 1.0, "what multiplies this expert's share of the mean; 0 leaves the expert out", low=0.0)


class DataWeighted(Method):
    """A method that is weighted by data: its state is made from ``statistics``, without which it does nothing."""

    weight = NOT_NEGATIVE
    needs_base = False

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return self.chunked and state is not None

    def missing(self) -> MethodError:
        """What is raised where there are no statistics."""
        return missing_statistics(self)


def missing_statistics(method: Method) -> MethodError:
    return MethodError(
        f"method {method.name} needs statistics of each expert ({method.statistics}), but was prepared without",
        remedy=how_to_collect(str(method.statistics)),
    )


def refuse_no_weights(name: str, weights: Sequence[float]) -> None:
    """MethodError if no expert is left in."""
    if not any(weights):
        raise MethodError(
            f"method {name} is a weighted mean, but all weights are zero", remedy="Give one expert a weight above 0."
        )


@dataclass(frozen=True)
class _Importance:
    """The Fisher information of T experts, and their norms over all tensors (None: not asked for)."""

    statistics: Statistics
    norms: tuple[float, ...] | None

    def of(self, t: int, info: TensorInfo, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Expert t's F for the tensor or slice that ``like`` is, in fresh memory; None if it has none."""
        whole = self.statistics[t].get(info.name)
        if whole is None:
            return None
        if tuple(whole.shape) != tuple(info.shape):
            raise MethodError(
                f"the Fisher information of {info.name} has the shape {tuple(whole.shape)}, but the tensor "
                f"{tuple(info.shape)}",
                remedy="Collect it again, from this base and these experts.",
            )
        part = whole.reshape(-1)[info.start : info.start + like.numel()]
        return part.to(like.device, dtype, copy=True).view(like.shape)


@final
class Fisher(DataWeighted):
    """sum_t w_t F_t theta_t / sum_t w_t F_t, entry by entry; F_t the diagonal of expert t's Fisher information.

    ``normalize`` divides F_t by its norm over the whole model, so that no expert counts for more because its losses
    are steeper. F below ``floor`` (before that division) counts as ``floor``: where no expert has a gradient, the
    result is close to their weighted mean.
    """

    name = "fisher"
    summary = "mean of the experts, each entry weighted by how much the expert's predictions depend on it"
    reference = (
        "Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv:2111.09832, equation 3; floor "
        "and norm as in the authors' code (github.com/mmatena/model_merging)"
    )
    params: Mapping[str, Param] = MappingProxyType(
        {
            "floor": Param(float, 1e-6, "the least that F counts as", low=0.0),
            "floor_by": Param(
                str,
                "max",
                "max: F below the floor is raised to it (the paper's code); add: the floor is added to all F "
                "(FusionBench, RegMean's authors)",
                choices=("max", "add"),
            ),
            "favor_first": Param(
                bool,
                False,
                "the floor is for the first expert only, whose entries are then kept where nobody has a gradient: "
                "a target and its donors, as the paper's authors merge a pair",
            ),
            "normalize": Param(bool, True, "divide each expert's F by its Euclidean norm over the whole model"),
        }
    )
    statistics = "fisher"

    def prepare(self, sources: SourceIterable, statistics: Statistics | None = None, **fixed: Any) -> _Importance:
        """The mappings, and their norms unless ``normalize`` is fixed to false: one pass over the statistics."""
        if statistics is None:
            raise self.missing()
        norms = None
        if fixed.get("normalize", True):
            norms = tuple(_norm(mapping) for mapping in statistics)
        return _Importance(statistics, norms)

    def combine(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: _Importance | None,
        floor: float,
        floor_by: str,
        favor_first: bool,
        normalize: bool,
        **_: Any,
    ) -> Tensor:
        """Raises MethodError without statistics, or if all weights are zero."""
        if state is None:
            raise self.missing()
        refuse_no_weights(self.name, weights)
        kept = [(t, expert) for t, expert in enumerate(experts) if weights[t] != 0]
        if all(expert is kept[0][1] for _, expert in kept):
            return kept[0][1].to(dtype, copy=True)  # no rounding: the mean of one is that one
        importance = [state.of(t, info, expert, dtype) for t, expert in kept]
        if all(F is None for F in importance):
            return Linear().combine(base, experts, weights=weights, dtype=dtype, normalize=True)
        numerator = torch.zeros(kept[0][1].shape, dtype=dtype, device=kept[0][1].device)
        denominator = torch.zeros_like(numerator)
        for place, ((t, expert), F) in enumerate(zip(kept, importance, strict=True)):
            if F is None:
                raise MethodError(
                    f"expert {t} has no Fisher information for {info.name}, but others have",
                    remedy="Collect it for all experts in one go.",
                )
            if place == 0 or not favor_first:
                if floor_by == "max":
                    F.clamp_(min=floor)
                else:
                    F.add_(floor)
            F.mul_(weights[t] / (state.norms[t] if normalize and state.norms else 1.0))
            denominator += F
            numerator += F.mul_(expert)
        merged = numerator.div_(denominator)
        unknown = denominator == 0  # only without a floor
        if unknown.any():
            mean = Linear().combine(base, experts, weights=weights, dtype=dtype, normalize=True)
            merged = torch.where(unknown, mean, merged)
        return merged


def _norm(mapping: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all tensors; 1 for an expert without any gradient, whose entries count as the floor."""
    squares = (float(torch.linalg.vector_norm(F, dtype=torch.float64)) ** 2 for F in mapping.values())
    return math.sqrt(math.fsum(squares)) or 1.0


@final
class LmCocktail(DataWeighted):
    """sum_t c_t theta_t with c = softmax(-L_t / temperature), L_t expert t's mean loss on a few examples of the target.

    The target are the experiment's tasks together: L_t is the mean over them. A weight multiplies exp(-L_t /
    temperature) before the division, so that a task that matters more, or a model that is to be kept, can be favoured.
    """

    name = "lm_cocktail"
    summary = "mean of the experts, weighted by how low their losses on a few examples of the tasks are"
    reference = (
        "Xiao et al. 2023, LM-Cocktail: resilient tuning of language models via model merging, arXiv:2311.13534, "
        "section 3; temperature 5 as in the authors' code (FlagEmbedding, mix_models_with_data)"
    )
    params: Mapping[str, Param] = MappingProxyType(
        {
            "temperature": Param(
                float, 5.0, "nats; small: only the best expert counts, large: all alike", low=0.0, low_open=True
            )
        }
    )
    statistics = "loss"
    keeps_base = True

    def prepare(self, sources: SourceIterable, statistics: Statistics | None = None, **fixed: Any) -> list[float]:
        """Each expert's mean loss over the tasks."""
        if statistics is None:
            raise self.missing()
        tasks = sorted(statistics[0])
        for t, mapping in enumerate(statistics):
            if sorted(mapping) != tasks or not tasks:
                raise MethodError(
                    f"losses must be of the same tasks for all experts, but expert {t} has "
                    f"{', '.join(mapping) or 'none'} and the first one {', '.join(tasks) or 'none'}",
                    remedy="Collect them for all experts in one go.",
                )
        return [math.fsum(float(mapping[task]) for task in tasks) / len(tasks) for mapping in statistics]

    def combine(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        state: list[float] | None,
        temperature: float,
        **_: Any,
    ) -> Tensor:
        """Raises MethodError without statistics, or if all weights are zero."""
        if state is None:
            raise self.missing()
        refuse_no_weights(self.name, weights)
        best = min(loss for loss, weight in zip(state, weights, strict=True) if weight != 0)
        shares = [
            weight * math.exp(-max(loss - best, 0.0) / temperature) if weight != 0 else 0.0
            for loss, weight in zip(state, weights, strict=True)
        ]
        return Linear().combine(base, experts, weights=shares, dtype=dtype, normalize=True)
