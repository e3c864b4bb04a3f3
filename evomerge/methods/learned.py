"""Task arithmetic with numbers inside the task vectors, as many as a search by gradient can learn.

The numbers of a merge (what multiplies each output column, singular component or entry) come to a method as statistics
do: a mapping an expert, of tensors that a recipe names by their hash. All merges here are affine in them, so that the
gradient of a loss by them is a contraction of its gradient by the merged tensor (``contract``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import TASK_WEIGHT, add_low_rank, add_to_base, weighted_sum
from evomerge.methods.base import (
    LowRank,
    Method,
    SourceIterable,
    State,
    TensorInfo,
    arithmetic_dtype,
    check_params,
    require_affine,
)
from evomerge.methods.basic import TaskArithmetic
from evomerge.methods.decompositions import SVD, Decompositions, svd
from evomerge.methods.matrices import is_matrix, task_matrix
from evomerge.methods.statistics import Statistics
from evomerge.methods.symmetric import rows_of_block
from evomerge.methods.weighted import missing_statistics
from evomerge.params import Param

AT_ONCE = 2**20  # numbers in one go

MATRICES = Param(
    str,
    "inner",
    "which matrices have learned numbers: all of them, or the inner ones, those of attention and mlp; the other "
    "tensors are merged as by task_arithmetic",
    choices=("all", "inner"),
)


@dataclass(frozen=True)
class Numbers:
    """The learned numbers of T experts, and what their method keeps from one set of them to the next."""

    of: Statistics
    kept: Decompositions | None = None


class LearnedMethod(Method):
    """theta_0 + sum_t w_t f_t, with f_t the task vector of expert t as its numbers change it: affine in them.

    Tensors that ``takes`` leaves out are merged as task_arithmetic merges them. Needs whole tensors.
    """

    weight = TASK_WEIGHT
    factors = True
    chunked = False
    fewer: bool = False  # may an expert have fewer numbers than ``count`` says?
    params: Mapping[str, Param] = MappingProxyType({"matrices": MATRICES})

    @abstractmethod
    def count(self, shape: Sequence[int], rank: int | None) -> int:
        """How many numbers an expert has for a matrix.

        Args:
            shape: (out, in).
            rank: of a LoRA expert's factors; None for a dense expert.
        """

    @abstractmethod
    def changed(self, tau: Tensor | LowRank, numbers: Tensor, t: int, info: TensorInfo, state: Numbers) -> Any:
        """f_t: a tensor (tau's memory may be reused) or LowRank. ``numbers``: (count,) in the arithmetic dtype."""

    @abstractmethod
    def slopes(
        self, tau: Tensor | LowRank, gradient: Tensor, numbers: Tensor, t: int, info: TensorInfo, state: Numbers
    ) -> Tensor:
        """<gradient, d f_t / d number i> for each number: (count,), float64; or, where each is but one product, in the
        wider of the gradient's and the arithmetic dtype.

        Args:
            gradient: (out, in).
            numbers: (count,) in the arithmetic dtype.
        """

    def takes(self, info: TensorInfo, matrices: str) -> bool:
        """Has this tensor learned numbers?"""
        return is_matrix(info, matrices)

    def is_linear(self, **params: Any) -> bool:
        return True

    def prepare(self, sources: SourceIterable, statistics: Statistics | None = None, **fixed: Any) -> Numbers:
        if statistics is None:
            raise missing_statistics(self)
        return Numbers(statistics)

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: Numbers | None,
        matrices: str,
        **_: Any,
    ) -> Tensor:
        """Raises MethodError without numbers, or with numbers of another shape."""
        if state is None:
            raise missing_statistics(self)
        if not self.takes(info, matrices):
            return TaskArithmetic().combine(base, experts, weights=weights, dtype=dtype, scale=1.0)
        low: list[tuple[float, LowRank]] = []

        def dense() -> Iterator[tuple[float, Tensor]]:
            for t, (weight, expert) in enumerate(zip(weights, experts, strict=True)):
                if weight == 0 or expert is base:
                    continue
                vector = self._vector(base, expert, t, dtype, info, state)
                if isinstance(vector, LowRank):
                    low.append((weight, vector))
                else:
                    yield weight, vector

        return add_low_rank(add_to_base(base, weighted_sum(dense()), dtype), low)

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
        """(t, f_t)."""
        require_affine(self, params)
        if state is None or base is None:
            raise missing_statistics(self)
        if not self.takes(info, params["matrices"]):
            yield from TaskArithmetic().directions(base, experts, info=info, scale=1.0)
            return
        dtype = arithmetic_dtype(base, *(expert for expert in experts if isinstance(expert, Tensor)))
        for t, expert in enumerate(experts):
            if expert is not base:
                yield t, self._vector(base, expert, t, dtype, info, state)

    def contract(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        gradient: Tensor,
        *,
        info: TensorInfo,
        state: Numbers,
        **params: Any,
    ) -> Iterator[tuple[int, Tensor, float]]:
        """(t, r_t, <gradient, f_t>), r_t the gradient by expert t's numbers at weight 1: (count,), as ``slopes``.

        Of a tensor that ``takes`` agrees to; experts without a task vector are left out.

        Args:
            gradient: dL / d merged tensor, of its shape.
        """
        values = check_params(self.name, self, params)
        if not self.takes(info, values["matrices"]):
            return
        dtype = arithmetic_dtype(base, *(expert for expert in experts if isinstance(expert, Tensor)))
        for t, expert in enumerate(experts):
            if expert is not base:
                numbers = self._numbers(t, info, state, dtype, base.device)
                tau = expert if isinstance(expert, LowRank) else task_matrix(base, expert, dtype)
                slopes = self.slopes(tau, gradient, numbers, t, info, state)
                yield t, slopes, _product(slopes, numbers)

    def _vector(
        self, base: Tensor, expert: Any, t: int, dtype: torch.dtype, info: TensorInfo, state: Numbers
    ) -> Tensor | LowRank:
        numbers = self._numbers(t, info, state, dtype, base.device)
        if bool((numbers == 1).all()):
            return expert if isinstance(expert, LowRank) else task_matrix(base, expert, dtype)
        tau = expert if isinstance(expert, LowRank) else task_matrix(base, expert, dtype)
        return self.changed(tau, numbers, t, info, state)

    def _numbers(self, t: int, info: TensorInfo, state: Numbers, dtype: torch.dtype, device: Any) -> Tensor:
        found = state.of[t].get(info.name)
        if found is None:
            raise MethodError(
                f"expert {t} has no learned numbers ({self.statistics}) for {info.name}",
                remedy="They are of another search: take the folder that the search for this merge has left.",
            )
        most = max(self.count(info.shape, None), 1)
        if found.dim() != 1 or len(found) > most or (len(found) < most and not self.fewer):
            raise MethodError(
                f"the learned numbers ({self.statistics}) of {info.name} have the shape {tuple(found.shape)}, but the "
                f"tensor is {tuple(info.shape)}",
                remedy="They are of another search: take the folder that the search for this merge has left.",
            )
        return found.to(device, dtype)


def _product(slopes: Tensor, numbers: Tensor) -> float:
    """The inner product in float64, whose copies are small."""
    parts = zip(slopes.split(AT_ONCE), numbers.split(AT_ONCE), strict=True)
    return math.fsum(float(a.to(torch.float64) @ b.to(torch.float64)) for a, b in parts)


@final
class Columns(LearnedMethod):
    """theta_0 + sum_t w_t diag(c_t) tau_t: a coefficient c_t for each expert and output column of a matrix.

    Matrices are stored (out, in), so that c_t has a number for each of their rows.
    """

    name = "columns"
    summary = "task arithmetic with a learned coefficient for each expert and output column"
    reference = (
        "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089, section 2, with lambda for each "
        "expert and output column; learned as AdaMerging's (Yang et al. 2024, arXiv:2310.02575)"
    )
    statistics = "columns"

    def count(self, shape: Sequence[int], rank: int | None) -> int:
        return shape[0]

    def changed(
        self, tau: Tensor | LowRank, numbers: Tensor, t: int, info: TensorInfo, state: Numbers
    ) -> Tensor | LowRank:
        if isinstance(tau, LowRank):
            return replace(tau, B=tau.B.to(numbers.dtype) * numbers[:, None])
        return tau.mul_(numbers[:, None])

    def slopes(
        self, tau: Tensor | LowRank, gradient: Tensor, numbers: Tensor, t: int, info: TensorInfo, state: Numbers
    ) -> Tensor:
        """Row by row the inner product with tau."""
        wide = torch.float64
        if isinstance(tau, LowRank):
            B, A = tau.B.to(wide), tau.A.to(wide)
            found = [((rows.to(wide) @ A.T) * B[at : at + len(rows)]).sum(1) for at, rows in _blocks(gradient)]
            return torch.cat(found).mul_(tau.scaling)
        found = [(rows.to(wide) * tau[at : at + len(rows)].to(wide)).sum(1) for at, rows in _blocks(gradient)]
        return torch.cat(found)


def _blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows): blocks whose copies in float64 are small."""
    step = rows_of_block(matrix)
    return ((first, matrix[first : first + step]) for first in range(0, len(matrix), step))


@final
class Concrete(LearnedMethod):
    """theta_0 + sum_t w_t m * tau_t, entry by entry: a mask m for each matrix, the same for all experts.

    As written, m need not be 0 or 1, nor be at most 1: a mask that was divided by its mean is not. An expert whose
    mapping is another has another mask.
    """

    name = "concrete"
    summary = "task arithmetic with a learned mask over the entries of the task vectors, one for all experts"
    reference = (
        "Tang et al. 2023, Concrete subspace learning based interference elimination for multi-task model fusion, "
        "arXiv:2312.06173, on task arithmetic; the mask divided by its mean as in the authors' code "
        "(github.com/tanganke/subspace_fusion, src/concrete_mask.py) is the searcher's affair"
    )
    statistics = "entries"

    def count(self, shape: Sequence[int], rank: int | None) -> int:
        return math.prod(shape)

    def changed(self, tau: Tensor | LowRank, numbers: Tensor, t: int, info: TensorInfo, state: Numbers) -> Tensor:
        """Dense, of LoRA experts too."""
        return _dense(tau, numbers.dtype).mul_(numbers.view(tuple(info.shape)))

    def slopes(
        self, tau: Tensor | LowRank, gradient: Tensor, numbers: Tensor, t: int, info: TensorInfo, state: Numbers
    ) -> Tensor:
        """Entry by entry the product with tau."""
        wide = torch.promote_types(gradient.dtype, numbers.dtype)
        found = torch.empty(gradient.shape, dtype=wide, device=numbers.device)
        for at, rows in _blocks(gradient):
            last = at + len(rows)
            vector = _dense(tau.rows(at, last), wide) if isinstance(tau, LowRank) else tau[at:last]
            torch.mul(rows.to(numbers.device, wide), vector.to(wide), out=found[at:last])
        return found.view(-1)


def _dense(tau: Tensor | LowRank, dtype: torch.dtype) -> Tensor:
    """A tensor itself, a LoRA expert's task vector multiplied out."""
    return (tau.B.to(dtype) @ tau.A.to(dtype)).mul_(tau.scaling) if isinstance(tau, LowRank) else tau


@final
class AdaRank(LearnedMethod):
    """theta_0 + sum_t w_t U_t diag(m_t s_t) V_t', with U_t diag(s_t) V_t' = tau_t: masks over singular components.

    Components that a decomposition does not tell from rounding are not masked. As written, m need not be 0 or 1.
    """

    name = "adarank"
    summary = "task arithmetic with learned masks over the singular components of each task vector"
    reference = (
        "Lee et al. 2025, AdaRank: adaptive rank pruning for enhanced model merging, arXiv:2503.22178; as in the "
        "authors' code (github.com/david3684/AdaRank, vision/src/models/merge_vit/adaptive.py, on task arithmetic)"
    )
    statistics = "components"
    fewer = True  # a LoRA expert has as many as its rank
    kept_bits = 64  # two float32 matrices of the task vector's size at the most

    def count(self, shape: Sequence[int], rank: int | None) -> int:
        return min(shape) if rank is None else min(*shape, rank)

    def renew(self, state: Numbers, sources: SourceIterable, statistics: Any, **fixed: Any) -> Numbers:
        """With the decompositions kept, which a single merge would keep for nothing."""
        return Numbers(statistics, state.kept or Decompositions())

    def changed(
        self, tau: Tensor | LowRank, numbers: Tensor, t: int, info: TensorInfo, state: Numbers
    ) -> Tensor | LowRank:
        """From the components that stay, or tau without those that go, whichever are fewer."""
        low = isinstance(tau, LowRank)
        dtype = numbers.dtype
        U, S, V = self._decomposed(tau, t, info, state, dtype)
        m = numbers[: len(S)]
        if len(m) < len(S):
            raise MethodError(
                f"expert {t} has {len(S)} singular components in {info.name}, but {len(m)} learned numbers",
                remedy="They are of another search: take the folder that the search for this merge has left.",
            )
        S = S.to(dtype)
        stay, go = m != 0, m != 1
        if low or int(stay.sum()) <= int(go.sum()):
            return LowRank(U[:, stay] * (m * S)[stay], V[:, stay].T, 1.0)
        return tau.addmm_(U[:, go] * ((m - 1) * S)[go], V[:, go].T)

    def slopes(
        self, tau: Tensor | LowRank, gradient: Tensor, numbers: Tensor, t: int, info: TensorInfo, state: Numbers
    ) -> Tensor:
        """s_i u_i' G v_i; 0 for numbers beyond the components that there are."""
        U, S, V = self._decomposed(tau, t, info, state, numbers.dtype)
        found = torch.zeros(len(numbers), dtype=torch.float64, device=U.device)
        found[: len(S)] = (gradient.to(U.device, U.dtype) @ V).to(torch.float64).mul_(U).sum(0).mul_(S)
        return found

    @staticmethod
    def _decomposed(tau: Tensor | LowRank, t: int, info: TensorInfo, state: Numbers, dtype: torch.dtype) -> SVD:
        return svd(tau, dtype) if state.kept is None else state.kept.of(info.name, t, lambda: svd(tau, dtype))
