"""Merge methods: pure functions on tensors, one family a file, all of them in the table METHODS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CheckpointError
from evomerge.methods.base import Method, TensorInfo, check_experts, check_params, check_weights
from evomerge.methods.basic import Linear, Passthrough, TaskArithmetic
from evomerge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from evomerge.methods.chunks import merge_into
from evomerge.methods.consensus import Consensus
from evomerge.methods.control import RandomVectors
from evomerge.methods.dare import DareLinear, DareTies
from evomerge.methods.della import Della, DellaLinear
from evomerge.methods.depth import Lines
from evomerge.methods.entrywise import MagMax, NearSwap, Ram
from evomerge.methods.fusion import ArceeFusion
from evomerge.methods.knots import Knots
from evomerge.methods.learned import AdaRank, Columns, Concrete
from evomerge.methods.lorahub import LoraHub
from evomerge.methods.low_rank import TSVM, IsoC, IsoCTS, SVDLinear
from evomerge.methods.optimised import WUDI
from evomerge.methods.pcb import Pcb
from evomerge.methods.regression import RegMean, RegMeanPP
from evomerge.methods.sce import Sce
from evomerge.methods.spherical import Slerp
from evomerge.methods.spherical_means import Karcher, MultiSlerp, NuSlerp
from evomerge.methods.statistics import check_statistics
from evomerge.methods.stock import ModelStock
from evomerge.methods.ties import Ties, TiesLinear
from evomerge.methods.weighted import Fisher, LmCocktail

_ALL: tuple[Method, ...] = (
    Linear(),
    TaskArithmetic(),
    Ties(),
    TiesLinear(),
    DareLinear(),
    DareTies(),
    Della(),
    DellaLinear(),
    Breadcrumbs(),
    BreadcrumbsTies(),
    Consensus(),
    Pcb(),
    Slerp(),
    NuSlerp(),
    MultiSlerp(),
    Karcher(),
    ModelStock(),
    NearSwap(),
    MagMax(),
    Ram(),
    ArceeFusion(),
    Sce(),
    Passthrough(),
    SVDLinear(),
    TSVM(),
    IsoC(),
    IsoCTS(),
    WUDI(),
    Knots(),
    LoraHub(),
    RandomVectors(),
    Fisher(),
    RegMean(),
    RegMeanPP(),
    LmCocktail(),
    AdaRank(),
    Concrete(),
    Columns(),
)
# What LiNeS can scale: the merged task vector of any method that adds one to a base.
_ALL += (
    Lines({m.name: m for m in _ALL if m.needs_base and m.keeps_base and m.statistics is None and not m.needs_factors}),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


@torch.no_grad()
def merge_state_dicts(
    method: str | Method,
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    statistics: Any = None,
    dtype: torch.dtype | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory.

    Args:
        method: a name in METHODS or of an installed package's method, or a method itself.
        base: theta_0 by tensor name; None for methods that need no base.
        experts: T mappings with the base's names and shapes. A tensor that *is* the base's has no task vector.
        weights: one an expert; by default each is the method's own (0.3 for task_arithmetic, 1 for ties, ...).
        seed: of the methods' random draws.
        statistics: one mapping an expert, for the methods that are weighted by data (``Method.statistics``).
        dtype: of the merged tensors. By default the base's storage dtype (without a base, the first expert's), to which
            each tensor is rounded once; the arithmetic itself is in the wider of float32 and the storage dtypes.
        params: the method's own parameters (``METHODS[method].params``).

    Returns:
        The merged tensors in fresh memory, in the order of the base's names. What is not floating point (counters,
        token ids) is copied from the base.

    Raises:
        MethodError: an unknown method, an illegal parameter or weight, a number of experts the method does not take,
            statistics that it needs and has not.
        CheckpointError: an expert lacks a tensor, has one too many, or has one of another shape.
    """
    merger = METHODS.get(method) if isinstance(method, str) else method
    if merger is None:
        from evomerge.methods.lookup import find

        merger = find(str(method)).method
    check_experts(merger, base is not None, len(experts))
    values = check_params(merger.name, merger, params)
    chosen = check_weights(merger, [merger.weight.default] * len(experts) if weights is None else weights, len(experts))
    first = experts[0] if base is None else base
    check_statistics(merger, statistics, len(experts))
    for t, expert in enumerate(experts):
        _check_same_tensors(first, expert, f"expert {t}")
    sources = _Sources(first, base, experts)
    state = merger.prepare(sources, statistics, **values)
    merged: dict[str, Tensor] = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        out = merged[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
        info, theta_0, thetas = sources.load(name)
        call = {"weights": chosen, "info": info, "state": state, "seed": seed, "params": values}
        merge_into(out, merger, theta_0, thetas, **call)
    return merged


@dataclass(frozen=True)
class _Sources:
    """The floating-point tensors of state dicts, as ``Method.prepare`` reads them: again and again."""

    first: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None
    experts: Sequence[Mapping[str, Tensor]]

    @cached_property
    def num_layers(self) -> int:
        from evomerge.checkpoints import tensor_kind

        return 1 + max((layer for _, layer in map(tensor_kind, self.first) if layer is not None), default=-1)

    def load(self, name: str) -> tuple[TensorInfo, Tensor | None, list[Tensor]]:
        from evomerge.checkpoints import tensor_kind  # here, because checkpoints.py is built on this package

        info = TensorInfo(name, *tensor_kind(name), self.num_layers, tuple(self.first[name].shape))
        return info, None if self.base is None else self.base[name], [expert[name] for expert in self.experts]

    def __iter__(self):
        return (self.load(name) for name, tensor in self.first.items() if tensor.is_floating_point())


def _check_same_tensors(first: Mapping[str, Tensor], expert: Mapping[str, Tensor], who: str) -> None:
    for name, tensor in first.items():
        if name not in expert:
            raise CheckpointError(f"{who} lacks the tensor {name}", remedy="All experts must be tuned from one base.")
        if expert[name].shape != tensor.shape:
            raise CheckpointError(
                f"the tensor {name} must have one shape everywhere, but has {tuple(expert[name].shape)} in {who} "
                f"instead of {tuple(tensor.shape)}",
                remedy="All experts must be tuned from one base.",
            )
    for name in expert:
        if name not in first:
            raise CheckpointError(f"{who} has a tensor {name} that the others lack", remedy="Leave it out or add it.")
