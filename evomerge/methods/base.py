"""What a merge method is: a pure function on tensors and the facts about its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evomerge.errors import MethodError, nearest
from evomerge.params import Param


@dataclass(frozen=True)
class TensorInfo:
    """Which tensor, or which flat slice of it, a method is looking at. ``kind`` is among ``recipe.KINDS``.

    ``shape`` is the whole tensor's; ``start`` is the flat (row-major) offset of the first entry that was handed over,
    so that a method with random draws or per-tensor state gives the same numbers for a slice as for the whole.
    """

    name: str
    kind: str = "other"
    layer: int | None = None
    num_layers: int = 0
    shape: tuple[int, ...] = ()
    start: int = 0


@dataclass(frozen=True)
class LowRank:
    """A LoRA expert's task vector in factors: tau = scaling * B @ A, B: (out, rank), A: (rank, in).

    A slice of it is a range of whole rows.
    """

    B: Tensor
    A: Tensor
    scaling: float

    def rows(self, first: int, last: int) -> LowRank:
        """The rows [first, last) of tau: the same A, fewer rows of B."""
        return LowRank(self.B[first:last], self.A, self.scaling)


State = Any
SourceIterable = Iterable[tuple[TensorInfo, Tensor | None, Sequence[Any]]]  # info, base, experts (LoRA ones dense)


class Method(Protocol):
    """The arithmetic that combines tensors. No modules, no files, no global random state; inputs are never changed.

    Attributes:
        name: its key in METHODS.
        params: the method's own parameters (``weights`` is not among them: every method has one weight an expert).
        weight: default, legal range and meaning of one expert's weight.
        summary: one line for ``evomerge methods``.
        reference: paper, section and equation.
        needs_base: False if the method works without a base.
        num_experts: how many experts it takes, as (fewest, most or None).
        factors: takes LoRA experts as LowRank; the others receive them dense. Its slices of a tensor that has such
            experts are whole rows.
        chunked: ``merge`` may be called on flat slices of a tensor (with ``info.start`` set), where ``chunked_with``
            agrees. What needs the whole tensor (norms, thresholds, angles) then comes from ``prepare``'s state.
        keeps_base: returns ``base`` unchanged where every expert *is* base (the same object).
    """

    name: str
    params: Mapping[str, Param]
    weight: Param
    summary: str
    reference: str
    needs_base: bool
    num_experts: tuple[int, int | None]
    factors: bool
    chunked: bool
    keeps_base: bool

    def is_linear(self, **params: Any) -> bool:
        """True if the merged tensor is affine in the weights for these parameters."""
        ...

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """True if ``merge`` may be called on flat slices with this state and these parameters.

        If False, ``prepare`` on the one tensor (it is its own source) may give the state that is missing; otherwise
        ``merge`` needs the whole tensor. ``methods.chunks.merge_chunks`` does all this.
        """
        ...

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> State | None:
        """What no candidate changes: thresholds, norms, angles. ``sources`` can be iterated again and again.

        State is keyed by tensor name, may be dropped and prepared anew, and holds no expert-sized tensors. ``fixed``
        are the parameters that no candidate changes; one that is absent varies.
        """
        ...

    def merge(
        self,
        base: Tensor | None,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Tensor:
        """The merged tensor (or slice) in the arithmetic dtype: the wider of float32 and the storage dtype.

        Experts are tensors, or LowRank too for a method that takes ``factors``. One that *is* the ``base`` object has
        no task vector here. Rounding to export_dtype is the caller's.
        """
        ...


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The wider of float32 and the storage dtypes."""
    wide = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            wide = torch.promote_types(wide, tensor.dtype)
    return wide


def check_params(name: str, method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of ``method`` with defaults filled in; MethodError for unknown names and illegal values."""
    for key in params:
        if key not in method.params:
            raise MethodError(
                f"method {name} has no parameter {key!r}",
                remedy=nearest(key, method.params) if method.params else f"{name} has no parameters.",
            )
    return {k: p.check(k, params.get(k, p.default), f"method {name}") for k, p in method.params.items()}
