"""What every merge method must hold to. A plug-in inherits the suite in one line::

    class TestMine(MethodContract):
        method = Mine()

and pytest runs it. ``settings`` lists the parameter sets that are tried besides the defaults.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import LowRank, Method, TensorInfo, check_params
from evomerge.methods.chunks import CHUNK, merge_chunks, merge_into
from evomerge.methods.random import BLOCK
from evomerge.methods.statistics import example_statistics

SHAPES = [(), (0, 3), (1,), (7,), (5, 6), (2, 3, 4), (40, 50)]


def make_tensors(
    shape: tuple[int, ...], num_experts: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base of standard normal entries, and experts at normal distances of 0.1 from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    experts = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(num_experts)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


class MethodContract:
    """Subclasses name ``method``; they may narrow ``settings`` and say what zero weights give."""

    method: Method
    settings: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    zero_weights_give_base: ClassVar[bool] = True

    # -- helpers

    def num_experts(self, wanted: int = 3) -> int:
        fewest, most = self.method.num_experts
        return max(fewest, wanted if most is None else min(wanted, most))

    def weights(self, count: int) -> list[float]:
        """Different, positive, none of them 1."""
        return [0.2 + 0.15 * t for t in range(count)]

    def all_settings(self) -> list[dict[str, Any]]:
        return [check_params(self.method.name, self.method, params) for params in ({}, *self.settings)]

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *, state: Any = None, **options: Any) -> Tensor:
        """The whole tensor, prepared with all parameters fixed."""
        options.setdefault("weights", self.weights(len(experts)))
        info = TensorInfo("layer.weight", shape=tuple(experts[0].shape))
        params = {k: v for k, v in options.items() if k in self.method.params}
        if state is None:
            state = self.prepare(info, base, experts, **check_params("", self.method, params))
        return self.method.merge(base, experts, info=info, state=state, **options)

    def prepare(self, info: TensorInfo, base: Tensor | None, experts: Sequence[Tensor], **params: Any) -> Any:
        """The state for one tensor, from random statistics where the method needs any: the same for every call."""
        statistics = example_statistics(self.method.statistics, {info.name: info.shape}, len(experts))
        return self.method.prepare([(info, base, experts)], statistics, **params)

    def _directions(self, base: Tensor, experts: Sequence[Tensor], **call: Any) -> dict[int, Tensor]:
        """As dense matrices, by the experts' numbers."""
        found = self.method.directions(base, experts, **call)
        return {t: v.scaling * (v.B @ v.A) if isinstance(v, LowRank) else v for t, v in found}

    # -- facts

    def test_declares_itself(self) -> None:
        method = self.method
        assert method.name and method.summary and method.reference
        for name, param in {**method.params, "weight": method.weight}.items():
            assert param.meaning, name
            assert param.check(name, param.default, method.name) == param.default

    # -- numbers

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_keeps_shape_and_is_finite(self, shape: tuple[int, ...]) -> None:
        base, experts = make_tensors(shape, self.num_experts())
        for params in self.all_settings():
            merged = self.merge(base, experts, **params)
            assert merged.shape == shape
            assert torch.isfinite(merged).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_arithmetic_is_in_the_wider_of_float32_and_storage(self, dtype: torch.dtype) -> None:
        base, experts = make_tensors((9, 11), self.num_experts(), dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for params in self.all_settings():
            merged = self.merge(base, experts, **params)
            assert merged.dtype == wide
            # Widening is exact, so merging the widened tensors is the same merge.
            same = self.merge(base.to(wide), [expert.to(wide) for expert in experts], **params)
            assert torch.equal(merged, same)
            narrow = {torch.float64: torch.float32, torch.float32: torch.bfloat16}.get(dtype)
            if narrow and not any(torch.equal(merged, tensor) for tensor in (base, *experts)):
                assert not torch.equal(merged, merged.to(narrow).to(wide)), f"no more digits than {narrow} has"

    def test_mixed_dtypes(self) -> None:
        base, experts = make_tensors((9, 11), self.num_experts(), dtype=torch.bfloat16)
        widened = [experts[0].to(torch.float32), *experts[1:]]
        for params in self.all_settings():
            assert torch.equal(self.merge(base, widened, **params), self.merge(base, experts, **params))

    def test_inputs_are_neither_changed_nor_returned(self) -> None:
        base, experts = make_tensors((5, 8), self.num_experts())
        before = [tensor.clone() for tensor in (base, *experts)]
        tried = [self.weights(len(experts)), [1.0, *[0.0] * (len(experts) - 1)]]
        if self.zero_weights_give_base:
            tried.append([0.0] * len(experts))
        for params in self.all_settings():
            for weights in tried:
                merged = self.merge(base, experts, weights=weights, **params)
                merged.fill_(math.nan)
                assert all(torch.equal(*pair) for pair in zip((base, *experts), before, strict=True))
            merged = self.merge(base, [base] * len(experts), **params)
            merged.fill_(math.nan)
            assert torch.equal(base, before[0])

    def test_same_call_same_bits_and_no_global_random_state(self) -> None:
        base, experts = make_tensors((30, 30), self.num_experts())
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
        for params in self.all_settings():
            first = self.merge(base, experts, seed=5, **params)
            torch.manual_seed(99)
            assert torch.equal(first, self.merge(base, experts, seed=5, **params))
            torch.set_rng_state(torch_state)
            self.merge(base, experts, seed=6, **params)
            assert torch.equal(torch.get_rng_state(), torch_state)
            assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]

    def test_strides_do_not_matter(self) -> None:
        base, experts = make_tensors((31, 17), self.num_experts())
        transposed = [tensor.t().contiguous().t() for tensor in (base, *experts)]
        assert not transposed[0].is_contiguous()
        for params in self.all_settings():
            assert torch.equal(self.merge(transposed[0], transposed[1:], **params), self.merge(base, experts, **params))

    # -- slices

    def test_slices_equal_the_whole(self) -> None:
        shape = (3, BLOCK - 7)
        base, experts = make_tensors(shape, self.num_experts())
        info = TensorInfo("layer.weight", shape=shape)
        weights = self.weights(len(experts))
        cuts = [0, 1, 1000, BLOCK - 1, BLOCK + 1, 2 * BLOCK, base.numel()]
        for params in self.all_settings():
            state = self.prepare(info, base, experts, **params)
            options: dict[str, Any] = {"weights": weights, "state": state, "seed": 3, **params}
            whole = self.method.merge(base, experts, info=info, **options).reshape(-1)
            if not self.method.chunked_with(state, **params):
                continue
            for start, stop in pairwise(cuts):
                part = [tensor.reshape(-1)[start:stop] for tensor in (base, *experts)]
                piece = self.method.merge(part[0], part[1:], info=replace(info, start=start), **options)
                assert torch.equal(piece, whole[start:stop])

    def test_without_state_a_whole_tensor_does_and_a_slice_is_right_or_refused(self) -> None:
        base, experts = make_tensors((20, 30), self.num_experts())
        info = TensorInfo("layer.weight", shape=(20, 30))
        weights = self.weights(len(experts))
        for params in self.all_settings():
            # One tensor cannot know the model's threshold, or what was measured of the experts.
            if params.get("scope") == "model" or self.method.statistics is not None:
                with pytest.raises(MethodError):
                    self.method.merge(base, experts, weights=weights, info=info, **params)
                continue
            whole = self.method.merge(base, experts, weights=weights, info=info, **params)
            assert torch.equal(whole, self.merge(base, experts, weights=weights, **params))
            part = [tensor.reshape(-1)[100:200] for tensor in (base, *experts)]
            sliced = replace(info, start=100)
            if self.method.chunked_with(None, **params):
                piece = self.method.merge(part[0], part[1:], weights=weights, info=sliced, **params)
                assert torch.equal(piece, whole.reshape(-1)[100:200])
            else:
                with pytest.raises(MethodError):
                    self.method.merge(part[0], part[1:], weights=weights, info=sliced, **params)

    def test_merge_chunks_gives_the_whole(self) -> None:
        shape = (CHUNK + 100, 2)
        base, experts = make_tensors(shape, self.num_experts())
        info = TensorInfo("layer.weight", shape=shape)
        weights = self.weights(len(experts))
        for params in self.all_settings():
            whole = self.merge(base, experts, seed=4, **params).reshape(-1)
            ready = self.prepare(info, base, experts, **params)
            # Whether it is prepared, or (all parameters may vary) has to find out itself, as far as it can.
            alone = params.get("scope") != "model" and self.method.statistics is None
            for state in [ready, None] if alone else [ready]:
                at = 0
                call: dict[str, Any] = {"weights": weights, "info": info, "state": state, "seed": 4, "params": params}
                for start, piece in merge_chunks(self.method, base, experts, **call):
                    assert start == at
                    assert torch.equal(piece, whole[start : start + piece.numel()])
                    at += piece.numel()
                assert at == whole.numel()
            for dtype in (whole.dtype, torch.bfloat16) if self.method.fills else ():
                out = torch.empty(shape, dtype=dtype)
                merge_into(out, self.method, base, experts, **{**call, "state": ready})
                assert torch.equal(out.reshape(-1), whole.to(dtype))

    # -- low-rank experts

    @pytest.mark.parametrize("shape", [(40, 50), (3, CHUNK), (2, CHUNK + 100), (CHUNK, 2)], ids=str)
    def test_factors_are_the_task_vector_they_multiply_to(self, shape: tuple[int, int]) -> None:
        """Beside a dense expert, one that is the base and one of weight zero, whole and in pieces."""
        if not self.method.factors:
            pytest.skip("takes dense experts only")
        base, (tuned, *_) = make_tensors(shape, 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        low_rank = [
            LowRank(
                torch.randn(shape[0], rank, generator=generator, dtype=torch.float64),
                torch.randn(rank, shape[1], generator=generator, dtype=torch.float64),
                scaling,
            )
            for rank, scaling in ((2, 2.0), (1, 0.25), (3, 1.0))
        ]
        experts = [low_rank[0], tuned, base, *low_rank[1:]]
        dense = [base + e.scaling * e.B @ e.A if isinstance(e, LowRank) else e for e in experts]
        info = TensorInfo("layer.weight", shape=shape)
        options: dict[str, Any] = {"weights": [0.3, -0.4, 1.0, 0.7, 0.0], "info": info}
        for params in self.all_settings():
            if self.method.statistics is not None:  # without any there is nothing to merge by
                options["state"] = self.prepare(info, base, dense, **params)
            expected = self.method.merge(base, dense, **options, **params)
            merged = self.method.merge(base, experts, **options, **params)
            torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
            pieces = list(merge_chunks(self.method, base, experts, **options, params=params))
            starts = [0, *itertools.accumulate(piece.numel() for _, piece in pieces)]
            assert [start for start, _ in pieces] == starts[:-1]
            if self.method.chunked:
                assert all(piece.numel() <= max(CHUNK, shape[1]) for _, piece in pieces)
            flat = torch.cat([piece for _, piece in pieces])
            torch.testing.assert_close(flat, expected.reshape(-1), rtol=1e-12, atol=1e-12)
            if self.method.is_linear(**params):
                found = self.method.directions(base, experts, info=info, state=options.get("state"), **params)
                vectors = {t: v.scaling * v.B @ v.A if isinstance(v, LowRank) else v for t, v in found}
                summed = base + sum(options["weights"][t] * v for t, v in vectors.items())
                torch.testing.assert_close(summed, expected, rtol=1e-12, atol=1e-12)
            without = [base if expert is low_rank[-1] else expert for expert in experts]
            assert torch.equal(self.method.merge(base, without, **options, **params), merged)

    # -- identities

    def test_zero_weights_give_the_base(self) -> None:
        """For methods of the form base + sum w f(tau): to the bit, -0.0 included."""
        if not self.zero_weights_give_base:
            pytest.skip("not of the form base + sum w f(tau)")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            base, experts = make_tensors((20, 20), self.num_experts(), dtype=dtype)
            base[0, 0] = -0.0
            for params in self.all_settings():
                merged = self.merge(base, experts, weights=[0.0] * len(experts), **params)
                assert torch.equal(merged, base.to(merged.dtype))
                assert torch.equal(merged.signbit(), base.signbit())

    def test_experts_that_are_the_base_leave_it(self) -> None:
        base, experts = make_tensors((12, 5), self.num_experts())
        for params in self.all_settings():
            if self.method.keeps_base:
                assert torch.equal(self.merge(base, [base] * len(experts), **params), base)
            # The object is a short cut, not another meaning: equal numbers give the same.
            mixed = [base, *experts[1:]]
            equal = [base.clone(), *experts[1:]]
            torch.testing.assert_close(self.merge(base, mixed, **params), self.merge(base, equal, **params))

    def test_zero_task_vectors_stay_finite_and_give_the_base(self) -> None:
        if not self.method.keeps_base:
            pytest.skip("does not keep the base")
        base, experts = make_tensors((12, 5), self.num_experts())
        for tensor in (base, torch.zeros_like(base)):
            for params in self.all_settings():
                merged = self.merge(tensor, [tensor.clone() for _ in experts], **params)
                torch.testing.assert_close(merged, tensor)

    def test_a_weight_of_zero_leaves_an_expert_out(self) -> None:
        fewest, most = self.method.num_experts
        if most is not None and most <= fewest:
            pytest.skip("takes a fixed number of experts")
        base, experts = make_tensors((20, 20), 3)
        for params in self.all_settings():
            if self.method.counts_all(**params):
                continue
            without = self.merge(base, experts[:2], weights=[0.5, 0.7], **params)
            assert torch.equal(self.merge(base, experts, weights=[0.5, 0.7, 0.0], **params), without)

    def test_is_linear_is_true(self) -> None:
        base, experts = make_tensors((20, 20), self.num_experts(), dtype=torch.float64)
        count = len(experts)
        here, there = self.weights(count), [1.1 - 0.3 * t for t in range(count)]
        middle = [0.25 * a + 0.75 * b for a, b in zip(here, there, strict=True)]
        for params in self.all_settings():
            if self.method.is_linear(**params):
                ends = [self.merge(base, experts, weights=weights, **params) for weights in (here, there)]
                between = self.merge(base, experts, weights=middle, **params)
                torch.testing.assert_close(between, 0.25 * ends[0] + 0.75 * ends[1], rtol=1e-12, atol=1e-12)

    def test_directions_are_the_merge(self) -> None:
        """merged = c + sum w_t v_t; a slice of v_t is that of a slice; an expert that is the base may have none."""
        shape = (3, BLOCK - 7)
        base, experts = make_tensors(shape, self.num_experts(), dtype=torch.float64)
        info = TensorInfo("layer.weight", shape=shape)
        count = len(experts)
        for params in self.all_settings():
            for given in (experts, [base, *experts[1:]]):
                state = self.prepare(info, base, given, **params)
                call: dict[str, Any] = {"info": info, "state": state, "seed": 3, **params}
                if not self.method.is_linear(**params):
                    with pytest.raises(MethodError, match="affine"):
                        list(self.method.directions(base, given, **call))
                    continue
                found = self._directions(base, given, **call)
                assert all(vector.dtype == torch.float64 for vector in found.values())
                origin = self.method.merge(base, given, weights=[0.0] * count, **call)
                weights = self.weights(count)
                expected = self.method.merge(base, given, weights=weights, **call)
                merged = origin + sum(weights[t] * vector for t, vector in found.items())
                torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
                if not self.method.chunked_with(state, **params):
                    continue
                part = {id(t): t.reshape(-1)[1000 : BLOCK + 9] for t in (base, *given)}
                call["info"] = replace(info, start=1000)
                pieces = self._directions(part[id(base)], [part[id(e)] for e in given], **call)
                assert pieces.keys() == found.keys()
                for t, piece in pieces.items():
                    assert torch.equal(piece, found[t].reshape(-1)[1000 : BLOCK + 9])

    def test_task_coefficients_are_the_merge(self) -> None:
        base, experts = make_tensors((20, 20), self.num_experts(), dtype=torch.float64)
        count = len(experts)
        for weights in (self.weights(count), [1.0 / count] * count, [0.0] * count):
            for params in self.all_settings():
                given = check_params(self.method.name, self.method, params)
                coefficients = self.method.task_coefficients(weights, **given)
                if coefficients is not None:
                    tau = sum(c * (expert - base) for c, expert in zip(coefficients, experts, strict=True))
                    merged = self.merge(base, experts, weights=weights, **params)
                    torch.testing.assert_close(merged, base + tau, rtol=1e-12, atol=1e-12)

    # -- refusals

    def test_refuses_what_it_does_not_take(self) -> None:
        base, experts = make_tensors((4,), self.num_experts())
        weights = self.weights(len(experts))
        with pytest.raises(MethodError, match="weight"):
            self.merge(base, experts, weights=weights[:-1])
        with pytest.raises(MethodError, match="weights"):
            self.merge(base, experts, weights=[math.nan, *weights[1:]])
        info = TensorInfo("w", shape=(4,))
        with pytest.raises(MethodError, match="no parameter"):
            self.method.merge(base, experts, weights=weights, info=info, no_such_parameter=1)
        if self.method.needs_base:
            with pytest.raises(MethodError, match="base"):
                self.method.merge(None, experts, weights=weights, info=info)
        fewest, most = self.method.num_experts
        with pytest.raises(MethodError, match="expert"):
            self.method.merge(base, experts[: fewest - 1], weights=weights[: fewest - 1], info=info)
        if most is not None:
            many = make_tensors((4,), most + 1)[1]
            with pytest.raises(MethodError, match="expert"):
                self.method.merge(base, many, weights=self.weights(most + 1), info=info)
