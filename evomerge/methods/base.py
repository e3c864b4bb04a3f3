"""What a merge method is: a pure function on tensors and the facts about its parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MethodError, nearest
from evomerge.params import Param

ANY_EXPERTS = "Use task_arithmetic or knots, which take any experts."
AFFINE = (
    "Use a method that is: task_arithmetic, ties_linear, dare_linear, breadcrumbs, della_linear, or linear with "
    "normalize: false."
)
ANY_WEIGHT = Param(float, 1.0, "what multiplies this expert's task vector; any sign, 0 leaves the expert out")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Which tensor, or which flat slice of it, a method is looking at. ``kind`` is among ``parts.KINDS``.

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


class Method(ABC):
    """The arithmetic that combines tensors. No modules, no files, no global random state; inputs are never changed.

    A method sets ``name``, ``summary``, ``reference`` and ``combine``, and what differs from the defaults below, which
    are those of most methods: entry by entry, without state, around a base.

    Attributes:
        name: its key in METHODS.
        summary: one line for ``evomerge methods``.
        reference: paper, section and equation.
        params: the method's own parameters (``weights`` is not among them: every method has one weight an expert).
        weight: default, legal range and meaning of one expert's weight.
        needs_base: False if the method works without a base.
        num_experts: how many experts it takes, as (fewest, most or None).
        factors: takes LoRA experts as LowRank; the others receive them dense. Its slices of a tensor that has such
            experts are whole rows.
        needs_factors: takes LoRA experts only, all of one rank in a tensor: it is about the factors, not their product.
        chunked: ``merge`` may be called on flat slices of a tensor (with ``info.start`` set), where ``chunked_with``
            agrees. What needs the whole tensor (norms, thresholds, angles) then comes from ``prepare``'s state.
        widens: casts what it reads itself, a slice at a time, so that slices may come in their storage dtype, uncopied.
        fills: ``combine`` takes ``out=``, memory in the shape and dtype of its result, and may return that, filled.
        draws: what ``prepare`` keeps depends on the seed, or is worth keeping for many candidates only. It is then
            called with ``seed=`` where many that share one will be merged, and without for a single merge.
        kept_bits: how many bits an entry and expert ``prepare``'s state comes to keep at the most; all of them together
            no more than ``masks.MOST_BYTES``. 0 for a few numbers a tensor.
        keeps_base: returns ``base`` unchanged where every expert *is* base (the same object).
        sums_task_vectors: of dense experts ``combine`` is ``arithmetic.sum_task_vectors`` by ``task_coefficients``, so
            that many tensors can be merged in one call.
        statistics: the kind of data about the experts that ``prepare`` must be given (``methods.statistics``): fisher,
            gram, gram_merged, loss, columns or components; None for a method that merges without any.
        affine_remedy: what to do where a merge must be affine in its weights, and with some parameters it is not.
    """

    name: str
    summary: str
    reference: str
    params: Mapping[str, Param] = MappingProxyType({})
    weight: Param = ANY_WEIGHT
    needs_base: bool = True
    num_experts: tuple[int, int | None] = (1, None)
    factors: bool = False
    needs_factors: bool = False
    chunked: bool = True
    widens: bool = False
    fills: bool = False
    draws: bool = False
    kept_bits: int = 0
    keeps_base: bool = True
    sums_task_vectors: bool = False
    statistics: str | None = None
    affine_remedy: str = AFFINE

    @abstractmethod
    def combine(
        self,
        base: Any,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        **params: Any,
    ) -> Tensor:
        """The method itself, in fresh memory. Called by ``merge`` with arguments that have been checked.

        Args:
            base: theta_0, or a slice of it; None only for a method that does not need it.
            experts: of the base's shape; LowRank only where ``factors``. One that *is* ``base`` has no task vector.
            weights: one legal weight an expert.
            dtype: the arithmetic dtype, which the result must have: the wider of float32 and the storage dtypes.
            info: which tensor or slice this is. A slice comes only where ``chunked_with`` agrees.
            params: all of the method's parameters, in their types. (Those not needed end in a ``**_``.)
        """

    def is_linear(self, **params: Any) -> bool:
        """True if the merged tensor is affine in the weights for these parameters."""
        return False

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        """c with merged = theta_0 + sum c_t tau_t for these weights and all the parameters; None if there is none.

        What such a merge makes of LoRA adapters is a LoRA adapter.
        """
        return None

    def counts_all(self, **params: Any) -> bool:
        """True if experts of weight zero have a say, too, such as a vote on a sign; else they leave no trace."""
        return False

    def directions(
        self,
        base: Tensor | None,
        experts: Sequence[Any],
        *,
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Iterator[tuple[int, Tensor | LowRank]]:
        """(t, v_t) with merged = c + sum w_t v_t, one expert at a time: the derivative of the merge by its weight.

        For task arithmetic v_t is scale tau_t, for a method that thins task vectors out what it leaves of them.

        Args:
            base, experts, info, state, seed: as for ``merge``, a whole tensor or a slice.
            params: all parameters, in their types.

        Returns:
            v_t in the arithmetic dtype, in fresh memory; or LowRank. Experts without any are left out.

        Raises:
            MethodError: the merge is not affine in its weights with these parameters (``require_affine``), or the call
                breaks a rule of ``merge``.
        """
        require_affine(self, params)
        coefficients = self.task_scales(len(experts), params)
        if coefficients is not None and base is not None:
            dtype = arithmetic_dtype(base, *(expert for expert in experts if isinstance(expert, Tensor)))
            theta_0 = base.to(dtype)
            for t, (expert, coefficient) in enumerate(zip(experts, coefficients, strict=True)):
                if isinstance(expert, LowRank):
                    yield t, replace(expert, scaling=coefficient * expert.scaling)
                elif expert is not base:
                    tau = torch.sub(expert, theta_0)
                    yield t, tau if coefficient == 1 else tau.mul_(coefficient)
            return
        call = {"info": info, "state": state, "seed": seed, **params}
        origin = self.merge(base, experts, weights=[0.0] * len(experts), **call)
        for t, weights in enumerate(_unit_weights(len(experts))):
            yield t, self.merge(base, experts, weights=weights, **call).sub_(origin)

    def task_scales(self, count: int, params: Mapping[str, Any]) -> list[float] | None:
        """c with v_t = c_t tau_t for ``count`` experts, where the ``directions`` are task vectors; else None."""
        if self.task_coefficients([0.0] * count, **params) != [0.0] * count:
            return None
        found: list[float] = []
        for t, weights in enumerate(_unit_weights(count)):
            coefficients = self.task_coefficients(weights, **params)
            if coefficients is None or any(coefficients[:t]) or any(coefficients[t + 1 :]):
                return None
            found.append(coefficients[t])
        return found

    def merged_factors(
        self,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        **params: Any,
    ) -> LowRank | None:
        """The merged task vector of LoRA experts as factors; None where there is none, or no way to have it so.

        For methods without ``task_coefficients`` whose merge of LoRA adapters is a LoRA adapter all the same.

        Args:
            experts: LowRank; one that leaves the tensor alone is the base object, or None.
            params: all of the method's parameters.
        """
        return None

    def check_together(self, params: Mapping[str, Any]) -> None:  # noqa: B027 (most methods have no such rule)
        """MethodError where parameters that are legal each (all are there) do not go together."""

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """True if ``merge`` may be called on flat slices with this state and these parameters.

        If False, ``prepare`` on the one tensor (it is its own source) may give the state that is missing; otherwise
        ``merge`` needs the whole tensor. ``methods.chunks.merge_chunks`` does all this.
        """
        return self.chunked

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> State | None:
        """What no candidate changes: thresholds, norms, angles. ``sources`` can be iterated again and again.

        State is keyed by tensor name, may be dropped and prepared anew, and holds no expert-sized tensors. ``fixed``
        are the parameters that no candidate changes; one that is absent varies.

        Args:
            statistics: one mapping an expert, where the method names a kind of them. They are read when they are
                looked up (from memory-mapped files), so that state may hold the mappings themselves.
        """
        return None

    def renew(self, state: State, sources: SourceIterable, statistics: Any, **fixed: Any) -> State | None:
        """As ``prepare``, where it was called before with the same sources and parameters and gave ``state``.

        For methods whose statistics change from candidate to candidate: what does not depend on them may be kept.
        """
        return self.prepare(sources, statistics, **fixed)

    def merge(
        self,
        base: Tensor | None,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        out: Tensor | None = None,
        **params: Any,
    ) -> Tensor:
        """The merged tensor (or slice) in the arithmetic dtype. Rounding to export_dtype is the caller's.

        ``out`` (contiguous, of the inputs' shape, in the arithmetic dtype, no part of the inputs' memory) is where a
        method that ``fills`` may put it; what is returned is the merged tensor in any case.

        Experts are tensors, or LowRank too for a method that takes ``factors``. One that *is* the ``base`` object has
        no task vector here.

        Raises:
            MethodError: base, experts, weights or parameters break a rule; a slice of what must be whole; or
                ``combine`` gave a tensor of another shape or dtype.
            InputsChanged: ``combine`` wrote into what it was given.
        """
        check_experts(self, base is not None, len(experts))
        check_weights(self, weights, len(experts))
        values = check_params(self.name, self, params)
        first = experts[0] if base is None else base
        if is_slice(info, first) and not self.chunked_with(state, **values):
            raise MethodError(
                f"method {self.name} got a slice of {info.name}, but needs the whole tensor with these parameters",
                remedy="Hand over the whole tensor, or the state that prepare gives for it.",
            )
        if self.needs_factors:
            check_factors(self.name, experts, weights, info.name, base)
        tensors = [t for e in (base, *experts) for t in ((e.B, e.A) if isinstance(e, LowRank) else (e,))]
        dtype = arithmetic_dtype(base, *(e for e in experts if isinstance(e, Tensor)))
        versions = [_version(tensor) for tensor in tensors]
        call = {"dtype": dtype, "info": info, "state": state, "seed": seed, **values}
        if self.fills and out is not None:
            call["out"] = out
        merged = self.combine(base, experts, weights=weights, **call)
        if [_version(tensor) for tensor in tensors] != versions:
            raise InputsChanged(
                f"method {self.name} wrote into the base or an expert at {info.name}, so that they are spoiled now",
                remedy="Work on copies: torch.sub(expert, base) instead of expert.sub_(base).",
            )
        if merged.shape != first.shape or merged.dtype != dtype:
            raise MethodError(
                f"method {self.name} gave {tuple(merged.shape)} in {merged.dtype} for {info.name}, which is "
                f"{tuple(first.shape)} and merged in {dtype}"
            )
        return merged


def require_affine(method: Method, params: Mapping[str, Any]) -> None:
    """MethodError unless what ``method`` merges with ``params`` (all of them) is affine in its weights."""
    if not method.is_linear(**params):
        raise MethodError(
            f"method {method.name} is not affine in its weights with these parameters, so that there is no gradient "
            "by them to go by",
            remedy=method.affine_remedy,
        )


def _unit_weights(count: int) -> Iterator[list[float]]:
    """One expert at weight 1, all others at 0; each expert in turn."""
    return ([float(s == t) for s in range(count)] for t in range(count))


class InputsChanged(MethodError):
    """A method wrote into its inputs: nothing can be built from these sources any more."""


def _version(tensor: Tensor | None) -> int:
    """How often ``tensor`` has been written to."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The wider of float32 and the storage dtypes."""
    wide = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            wide = torch.promote_types(wide, tensor.dtype)
    return wide


def check_params(name: str, method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of ``method`` with defaults filled in; MethodError for unknown names and illegal values.

    Illegal are also values that do not go together (``Method.check_together``).
    """
    for key in params:
        if key not in method.params:
            raise MethodError(
                f"method {name} has no parameter {key!r}",
                remedy=nearest(key, method.params) if method.params else f"{name} has no parameters.",
            )
    values = {k: p.check(k, params.get(k, p.default), f"method {name}") for k, p in method.params.items()}
    method.check_together(values)
    return values


def check_experts(method: Method, has_base: bool, num_experts: int) -> None:
    """MethodError if ``method`` needs a base that is not there, or does not take that many experts."""
    if method.needs_base and not has_base:
        raise MethodError(f"method {method.name} works on task vectors, but there is no base", remedy="Name a base.")
    fewest, most = method.num_experts
    if num_experts < fewest or (most is not None and num_experts > most):
        allowed = (
            f"exactly {fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest}..{most}"
        )
        noun = "expert" if fewest == most == 1 else "experts"
        raise MethodError(f"method {method.name} takes {allowed} {noun}, but got {num_experts}")


def check_weights(method: Method, weights: Sequence[float], num_experts: int) -> list[float]:
    """One legal weight an expert, as floats, or MethodError."""
    if len(weights) != num_experts:
        raise MethodError(
            f"method {method.name} takes one weight an expert, but {num_experts} experts have {len(weights)} weights"
        )
    return [method.weight.check(f"weights[{t}]", w, f"method {method.name}") for t, w in enumerate(weights)]


def check_factors(
    name: str, experts: Sequence[Any], weights: Sequence[float], tensor: str, base: Tensor | None
) -> None:
    """MethodError if an expert with a weight has a tensor that is neither low-rank nor the very base."""
    for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        if weight != 0 and expert is not base and not isinstance(expert, LowRank):
            raise MethodError(
                f"method {name} works on the factors of LoRA experts, but {tensor} of expert {t} has none",
                remedy=ANY_EXPERTS,
            )


def is_slice(info: TensorInfo, tensor: Tensor) -> bool:
    """Is ``tensor`` only a part of the tensor that ``info`` describes?"""
    return info.start != 0 or tensor.numel() != math.prod(info.shape)
