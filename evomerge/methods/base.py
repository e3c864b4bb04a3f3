"""What a merge method is: a pure function on tensors and the facts about its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evomerge.errors import MethodError, nearest

KINDS = ("attention", "mlp", "norm", "embedding", "head", "other")


@dataclass(frozen=True)
class Param:
    """One parameter of a method or a searcher: the single owner of its type, default, range and meaning.

    ``low_open`` excludes ``low`` itself. ``default=None`` means "derived"; ``meaning`` says from what.
    """

    type: type
    default: Any
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any, owner: str) -> Any:
        """Return ``value`` in this parameter's type, or raise MethodError naming the legal range."""
        if value is None and self.default is None:
            return None
        if self.choices:
            if value not in self.choices:
                raise MethodError(
                    f"{owner}: {name}={value!r} is not one of {', '.join(self.choices)}",
                    remedy=nearest(str(value), self.choices),
                )
            return value
        if self.type is bool:
            if not isinstance(value, bool):
                raise MethodError(f"{owner}: {name} must be true or false, but is {value!r}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MethodError(f"{owner}: {name} must be a number, but is {value!r}")
        if self.type is int and value != int(value):
            raise MethodError(f"{owner}: {name} must be a whole number, but is {value!r}")
        value = self.type(value)
        low_ok = value > self.low if self.low_open else value >= self.low
        if not (low_ok and value <= self.high and math.isfinite(value)):
            raise MethodError(f"{owner}: {name}={value} is outside its legal range {self.range_text()}")
        return value

    def range_text(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        if self.type is bool:
            return "true | false"
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class TensorInfo:
    """Which tensor, or which flat slice of it, a method is looking at.

    ``shape`` is the whole tensor's; ``start`` is the flat (row-major) offset of the first entry that was handed over, so
    that a method with random draws or per-tensor state gives the same numbers for a slice as for the whole.
    """

    name: str
    kind: str = "other"
    layer: int | None = None
    num_layers: int = 0
    shape: tuple[int, ...] = ()
    start: int = 0


@dataclass(frozen=True)
class LowRank:
    """A LoRA expert's task vector in factors: tau = scaling * B @ A, B: (out, rank), A: (rank, in)."""

    B: Tensor
    A: Tensor
    scaling: float

    def dense(self, dtype: torch.dtype) -> Tensor:
        """tau: (out, in), multiplied in ``dtype`` and never rounded to the base's dtype."""
        return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scaling)


State = Any
SourceIterable = Iterable[tuple[TensorInfo, Tensor | None, Sequence[Tensor]]]


class Method(Protocol):
    """The arithmetic that combines tensors. No modules, no files, no global random state; inputs are never changed.

    Attributes:
        params: the method's own parameters (``weights`` is not among them: every method has one weight an expert).
        summary: one line for ``evomerge methods``.
        reference: paper, section and equation.
        needs_base: False if the method works without a base.
        num_experts: how many experts it takes, as (fewest, most or None).
        factors: takes LoRA experts as LowRank; the others receive them dense.
        chunked: ``merge`` may be called on flat slices of a tensor (with ``info.start`` set). What needs the whole
            tensor (norms, thresholds, angles) then comes from ``prepare``'s state.
        keeps_base: returns ``base`` unchanged where every expert *is* base (the same object).
    """

    params: Mapping[str, Param]
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

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> State | None:
        """What no candidate changes: thresholds, norms, angles. ``sources`` can be iterated again and again.

        State is keyed by tensor name, may be dropped and prepared anew, and holds no expert-sized tensors. ``fixed``
        are the parameters that no candidate changes; one that is absent varies.
        """
        ...

    def merge(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Tensor:
        """The merged tensor (or slice) in the arithmetic dtype: the wider of float32 and the storage dtype.

        An expert that *is* the ``base`` object has no task vector here. Rounding to export_dtype is the caller's.
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
