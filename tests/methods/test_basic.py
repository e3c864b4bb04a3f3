"""linear and task_arithmetic against their formulas."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, fused
from evomerge.methods.base import TensorInfo, check_params
from evomerge.methods.chunks import CHUNK, merge_into

from .families import Family, assert_close, families


@given(families(), st.booleans())
def test_linear(family: Family, normalize: bool):
    """Model soups, section 2: a (weighted) mean of the parameters."""
    total = sum(family.weights)
    assume(not normalize or abs(total) > 0.1)  # a mean over almost cancelling weights magnifies any rounding
    expected = np.zeros_like(family.base)
    for weight, expert in zip(family.weights, family.experts, strict=True):
        expected = expected + weight * expert / (total if normalize else 1)
    assert_close(family.merge("linear", normalize=normalize), expected)


@given(families(), st.floats(-2, 2))
def test_task_arithmetic(family: Family, scale: float):
    """Editing models with task arithmetic, section 2: theta_new = theta + lambda sum tau_t."""
    expected = family.base.copy()
    for weight, tau in zip(family.weights, family.taus, strict=True):
        expected = expected + scale * weight * tau
    assert_close(family.merge("task_arithmetic", scale=scale), expected)


@given(families(most=1), st.floats(0.1, 3))
def test_task_arithmetic_negation(family: Family, weight: float):
    """Section 3: theta_0 - lambda tau. Forgetting is addition with the sign turned: the two average to the base."""
    family.weights = [weight]
    added = family.merge("task_arithmetic")
    family.weights = [-weight]
    assert_close(family.merge("task_arithmetic"), family.base - weight * family.taus[0])
    assert_close((added + family.merge("task_arithmetic")) / 2, family.base)


@given(families(fewest=3, most=3), st.floats(0.1, 2))
def test_task_arithmetic_analogy(family: Family, weight: float):
    """Section 5: A is to B as C is to the new task, theta_0 + lambda (tau_C + tau_B - tau_A)."""
    a, b, c = family.taus
    family.weights = [-weight, weight, weight]
    assert_close(family.merge("task_arithmetic"), family.base + weight * (c + b - a))


@given(families(most=1))
def test_passthrough(family: Family):
    assert_close(family.merge("passthrough"), family.weights[0] * family.experts[0])
    family.weights = [1.0]
    assert np.array_equal(family.merge("passthrough"), family.experts[0])


@given(families(fewest=2))
def test_linear_with_one_weight_is_that_expert_to_the_bit(family: Family):
    for chosen, expert in enumerate(family.experts):
        for weight in (1.0, 0.3):  # normalised, one weight alone is 1 whatever it is
            family.weights = [weight if t == chosen else 0.0 for t in range(len(family.experts))]
            assert np.array_equal(family.merge("linear"), expert)
    assert np.array_equal(family.merge("linear", normalize=False), family.experts[-1] * 0.3)


def test_linear_of_one_object_is_that_object_to_the_bit():
    """Tensors that no adapter touches: a rounded mean of equal numbers would change them."""
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    info = TensorInfo("w", shape=(1000,))
    merged = METHODS["linear"].merge(base, [base] * 3, weights=[0.1, 0.2, 0.7], info=info)
    assert torch.equal(merged, base)


def test_linear_refuses_weights_that_sum_to_zero():
    experts = [torch.zeros(2), torch.ones(2)]
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(MethodError, match="sum to zero"):
            METHODS["linear"].merge(None, experts, weights=weights, info=TensorInfo("w", shape=(2,)))
    merged = METHODS["linear"].merge(None, experts, weights=[0, 0], info=TensorInfo("w", shape=(2,)), normalize=False)
    assert torch.equal(merged, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_task_arithmetic_with_one_weight_at_1_is_that_expert_within_an_ulp(dtype: torch.dtype, data: st.DataObject):
    """Truth 1: within one unit in the last place of max(|theta_0|, |theta_t|) in the arithmetic dtype."""
    # Large and small entries meet at random, where rounding is worst.
    number = st.floats(-1e4, 1e4, allow_subnormal=False) | st.floats(-1e-4, 1e-4, allow_subnormal=False)
    numbers = st.lists(st.tuples(number, number, number), min_size=1, max_size=50)
    base, *experts = torch.tensor(data.draw(numbers), dtype=torch.float64).to(dtype).unbind(1)
    info = TensorInfo("w", shape=tuple(base.shape))
    arithmetic = np.float64 if dtype == torch.float64 else np.float32
    for chosen, expert in enumerate(experts):
        weights = [float(t == chosen) for t in range(2)]
        merged = METHODS["task_arithmetic"].merge(base, experts, weights=weights, info=info).numpy()
        assert merged.dtype == arithmetic
        b, e = (tensor.to(torch.float64).numpy().astype(arithmetic) for tensor in (base, expert))
        ulp = np.spacing(np.maximum(np.abs(b), np.abs(e)))
        assert (np.abs(merged.astype(np.float64) - e.astype(np.float64)) <= ulp).all()


def test_is_linear_only_without_normalization():
    assert not METHODS["linear"].is_linear()
    assert METHODS["linear"].is_linear(normalize=False)
    assert METHODS["task_arithmetic"].is_linear(scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("plain", [False, True], ids=["loops", "plain"])
def test_written_in_place_are_the_numbers_of_the_whole(name: str, dtype: torch.dtype, plain: bool):
    """Longer than the longest piece; what lies behind the tensor is not touched, and no input is."""
    n = 16 * CHUNK + 100
    generator = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(n, generator=generator) for _ in range(4))
    before = [tensor.clone() for tensor in (base, *experts)]
    info = TensorInfo("w", shape=(n,))
    memory = torch.full((n + 64,), 7.0, dtype=dtype)
    with fused.plain() if plain else nullcontext():
        whole = METHODS[name].merge(base, experts, weights=[0.3, 0.4, 0.5], info=info)
        params = check_params(name, METHODS[name], {})
        merge_into(memory[:n], METHODS[name], base, experts, weights=[0.3, 0.4, 0.5], info=info, params=params)
    assert torch.equal(memory[:n], whole.to(dtype))
    assert (memory[n:] == 7).all()
    assert all(torch.equal(one, other) for one, other in zip(before, (base, *experts), strict=True))
