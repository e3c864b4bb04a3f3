"""What a merge method must hold to that is about the factors of LoRA experts, not their products (``needs_factors``)::

class TestMine(FactorsContract):
    method = Mine()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import LowRank, TensorInfo, check_params
from evomerge.methods.chunks import CHUNK, merge_chunks
from evomerge.testing.methods import MethodContract, make_tensors

# Of MethodContract, what needs no experts with task vectors; and what is said anew here.
KEPT = {"test_declares_itself", "test_refuses_what_it_does_not_take"}


def make_adapters(
    shape: tuple[int, int], count: int, *, rank: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[LowRank]]:
    """A base of standard normal entries and LoRA experts of one rank."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return draw(*shape), [LowRank(draw(shape[0], rank), draw(rank, shape[1]), 0.5 + t) for t in range(count)]


class FactorsContract(MethodContract):
    """The contract of methods that take LoRA experts only, all of one rank in a tensor."""

    @pytest.fixture(autouse=True)
    def _no_dense_experts(self, request: pytest.FixtureRequest) -> None:
        inherited = request.function.__name__ in vars(MethodContract)
        if inherited and request.function.__name__ not in {*KEPT, *vars(FactorsContract)}:
            pytest.skip("takes LoRA experts only: FactorsContract says it of these")

    def call(self, base: Tensor, experts: Sequence[Any], **options: Any) -> Tensor:
        options.setdefault("weights", self.weights(len(experts)))
        return self.method.merge(base, experts, info=TensorInfo("w", shape=tuple(base.shape)), **options)

    def test_says_that_it_takes_factors(self) -> None:
        assert self.method.factors and self.method.needs_factors

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_arithmetic_is_in_the_wider_of_float32_and_storage(self, dtype: torch.dtype) -> None:
        base, experts = make_adapters((9, 11), self.num_experts(), dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        widened = [LowRank(e.B.to(wide), e.A.to(wide), e.scaling) for e in experts]
        for params in self.all_settings():
            merged = self.call(base, experts, **params)
            assert merged.shape == base.shape and merged.dtype == wide
            assert torch.isfinite(merged).all()
            assert torch.equal(merged, self.call(base.to(wide), widened, **params))

    def test_inputs_are_neither_changed_nor_returned_and_the_same_call_gives_the_same_bits(self) -> None:
        base, experts = make_adapters((8, 6), self.num_experts())
        tensors = [base, *(factor for e in experts for factor in (e.B, e.A))]
        before, random_state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
        for params in self.all_settings():
            for weights in (self.weights(len(experts)), [0.0] * len(experts)):
                merged = self.call(base, experts, weights=weights, seed=3, **params)
                assert torch.equal(merged, self.call(base, experts, weights=weights, seed=3, **params))
                merged.fill_(math.nan)
                assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_strides_do_not_matter(self) -> None:
        base, experts = make_adapters((31, 17), self.num_experts())
        strided = [LowRank(e.B.t().contiguous().t(), e.A.t().contiguous().t(), e.scaling) for e in experts]
        for params in self.all_settings():
            merged = self.call(base.t().contiguous().t(), strided, **params)
            assert torch.equal(merged, self.call(base, experts, **params))

    @pytest.mark.parametrize("shape", [(40, 50), (3, CHUNK), (CHUNK + 100, 2)], ids=str)
    def test_merge_chunks_gives_the_whole(self, shape: tuple[int, int]) -> None:
        base, experts = make_adapters(shape, self.num_experts())
        options: dict[str, Any] = {"weights": self.weights(len(experts)), "info": TensorInfo("w", shape=shape)}
        for params in self.all_settings():
            pieces = list(merge_chunks(self.method, base, experts, **options, params=params))
            starts = [0, *accumulate(piece.numel() for _, piece in pieces)]
            assert [start for start, _ in pieces] == starts[:-1]
            whole = self.call(base, experts, **params)
            flat = torch.cat([piece for _, piece in pieces])
            torch.testing.assert_close(flat, whole.reshape(-1), rtol=1e-12, atol=1e-12)

    def test_zero_weights_give_the_base(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            base, experts = make_adapters((20, 20), self.num_experts(), dtype=dtype)
            base[0, 0] = -0.0
            for params in self.all_settings():
                for chosen in (experts, [base] * len(experts)):  # and so do experts that leave the tensor alone
                    weights = [0.0 if chosen is experts else 0.5] * len(experts)
                    merged = self.call(base, chosen, weights=weights, **params)
                    assert torch.equal(merged, base.to(merged.dtype))
                    assert torch.equal(merged.signbit(), base.signbit())

    def test_a_weight_of_zero_leaves_an_expert_out(self) -> None:
        base, experts = make_adapters((20, 20), 3)
        for params in self.all_settings():
            without = self.call(base, experts[:2], weights=[0.5, 0.7], **params)
            assert torch.equal(self.call(base, experts, weights=[0.5, 0.7, 0.0], **params), without)
            assert torch.equal(self.call(base, [*experts[:2], base], weights=[0.5, 0.7, 1.0], **params), without)

    def test_merged_factors_are_the_merge(self) -> None:
        base, experts = make_adapters((20, 30), self.num_experts())
        info, weights = TensorInfo("w", shape=(20, 30)), self.weights(len(experts))
        for params in self.all_settings():
            given = check_params(self.method.name, self.method, params)
            made = self.method.merged_factors(
                experts, weights=weights, dtype=torch.float64, info=info, seed=0, **given
            )  # fmt: skip
            if made is not None:
                merged = self.call(base, experts, **params)
                torch.testing.assert_close(merged, base + made.scaling * made.B @ made.A, rtol=1e-12, atol=1e-12)

    def test_dense_experts_are_refused_unless_left_out(self) -> None:
        base, experts = make_adapters((6, 8), self.num_experts())
        dense = make_tensors((6, 8), 1, dtype=torch.float64)[1]
        weights = self.weights(len(experts))
        for params in self.all_settings():
            with pytest.raises(MethodError, match="factors"):
                self.call(base, [*experts[:-1], *dense], weights=weights, **params)
            self.call(base, [*experts[:-1], *dense], weights=[*weights[:-1], 0.0], **params)
