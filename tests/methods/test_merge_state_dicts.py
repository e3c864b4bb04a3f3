"""merge_state_dicts: whole models in memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomerge.errors import CheckpointError, MethodError
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import TensorInfo
from evomerge.methods.statistics import example_statistics

from .families import NOT_AROUND_THE_BASE, OF_DENSE_EXPERTS, fitting


def make_model(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(700, 300, generator=generator).to(dtype),  # more than one chunk
        "norm.weight": torch.randn(16, generator=generator).to(dtype),
        "temperature": torch.randn((), generator=generator).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "position_ids": torch.arange(5) + seed,
        "mask": torch.tensor([True, False]),
    }


BASE, EXPERTS = make_model(0), [make_model(1), make_model(2)]


def merged_of(method: str, base, experts, **options) -> dict[str, Tensor]:
    """merge_state_dicts, with random statistics for a method that needs some."""
    shapes = {name: tensor.shape for name, tensor in experts[0].items() if tensor.is_floating_point()}
    statistics = example_statistics(METHODS[method].statistics, shapes, len(experts))
    return merge_state_dicts(method, base, experts, statistics=statistics, **options)


@pytest.mark.parametrize("method", OF_DENSE_EXPERTS)
def test_each_tensor_is_merged_and_rounded_once(method: str):
    experts, weights = fitting(method, EXPERTS), fitting(method, [0.4, 0.9])
    merged = merged_of(method, BASE, experts, weights=weights, seed=3)
    shapes = {name: tensor.shape for name, tensor in BASE.items() if tensor.is_floating_point()}
    statistics = example_statistics(METHODS[method].statistics, shapes, len(experts))
    state = METHODS[method].prepare([], statistics) if statistics else None
    assert list(merged) == list(BASE)
    for name, tensor in BASE.items():
        assert merged[name].shape == tensor.shape and merged[name].dtype == tensor.dtype
        if tensor.is_floating_point():
            whole = METHODS[method].merge(
                tensor,
                [expert[name] for expert in experts],
                weights=weights,
                info=TensorInfo(name, shape=tuple(tensor.shape)),
                state=state,
                seed=3,
            )
            assert torch.equal(merged[name], whole.to(tensor.dtype))
        else:
            assert torch.equal(merged[name], tensor)
            assert merged[name].data_ptr() != tensor.data_ptr()


def test_dtype_of_the_result():
    exact = merge_state_dicts("task_arithmetic", BASE, EXPERTS, dtype=torch.float32)
    assert exact["norm.weight"].dtype == torch.float32
    assert exact["position_ids"].dtype == torch.int64
    rounded = merge_state_dicts("task_arithmetic", BASE, EXPERTS)
    assert torch.equal(rounded["norm.weight"], exact["norm.weight"].bfloat16())
    wide = merge_state_dicts("task_arithmetic", make_model(0, torch.float64), [make_model(1, torch.float64)])
    assert wide["norm.weight"].dtype == torch.float64


@pytest.mark.parametrize("method", sorted(set(METHODS) - NOT_AROUND_THE_BASE))
def test_all_weights_zero_give_the_base_s_very_bytes(method: str):
    merged = merged_of(method, BASE, fitting(method, EXPERTS), weights=fitting(method, [0, 0]))
    for name, tensor in BASE.items():
        assert torch.equal(merged[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_default_weights_are_the_method_s_own():
    by_default = merge_state_dicts("task_arithmetic", BASE, EXPERTS)
    given = merge_state_dicts("task_arithmetic", BASE, EXPERTS, weights=[0.3, 0.3])
    assert all(torch.equal(by_default[name], given[name]) for name in BASE)
    mean = merge_state_dicts("linear", None, EXPERTS, dtype=torch.float64)
    torch.testing.assert_close(
        mean["norm.weight"],
        (EXPERTS[0]["norm.weight"].double() + EXPERTS[1]["norm.weight"].double()) / 2,
        atol=1e-6,
        rtol=0,
    )


def test_without_a_base():
    for method in ("linear", "slerp"):
        merged = merge_state_dicts(method, None, EXPERTS)
        assert torch.equal(merged["position_ids"], EXPERTS[0]["position_ids"])
        assert merged["norm.weight"].dtype == torch.bfloat16
    with pytest.raises(MethodError, match="there is no base"):
        merge_state_dicts("ties", None, EXPERTS)


def test_untouched_tensors_stay_the_base():
    """An adapter's state dict shares the tensors that it does not change."""
    expert = {**BASE, "norm.weight": EXPERTS[0]["norm.weight"]}
    for method in OF_DENSE_EXPERTS:
        merged = merged_of(method, BASE, fitting(method, [expert, expert]), dtype=torch.float32)
        assert torch.equal(merged["embed.weight"], BASE["embed.weight"].float()), method
        assert not torch.equal(merged["norm.weight"], BASE["norm.weight"].float()), method


def test_inputs_keep_their_bytes():
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in (BASE, *EXPERTS)]
    for method in OF_DENSE_EXPERTS:
        merged_of(method, BASE, fitting(method, EXPERTS))
    for model, copy in zip((BASE, *EXPERTS), before, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in copy)


def test_trainable_parameters_are_merged_without_a_graph():
    parameters = {"w": torch.nn.Parameter(torch.randn(4, 4))}
    for method in OF_DENSE_EXPERTS:
        merged = merged_of(method, parameters, fitting(method, [{"w": parameters["w"] + 1}, dict(parameters)]))
        assert not merged["w"].requires_grad


def test_refusals_name_the_tensor():
    lacking = {name: tensor for name, tensor in EXPERTS[1].items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"expert 1 lacks the tensor norm\.weight"):
        merge_state_dicts("linear", BASE, [EXPERTS[0], lacking])
    with pytest.raises(CheckpointError, match=r"norm\.weight .*\(17,\) in expert 0"):
        merge_state_dicts("linear", BASE, [{**EXPERTS[0], "norm.weight": torch.zeros(17)}])
    with pytest.raises(CheckpointError, match=r"lora_A"):
        merge_state_dicts("linear", BASE, [{**EXPERTS[0], "lora_A": torch.zeros(1)}])


def test_refusals_of_methods_and_parameters():
    with pytest.raises(MethodError, match="Did you mean 'ties'"):
        merge_state_dicts("tie", BASE, EXPERTS)
    with pytest.raises(MethodError, match="Did you mean 'density'"):
        merge_state_dicts("ties", BASE, EXPERTS, densty=0.5)
    with pytest.raises(MethodError, match="outside its legal range"):
        merge_state_dicts("ties", BASE, EXPERTS, density=0)
    with pytest.raises(MethodError, match="one weight an expert"):
        merge_state_dicts("ties", BASE, EXPERTS, weights=[1.0])
    with pytest.raises(MethodError, match="at least 1 experts"):
        merge_state_dicts("ties", BASE, [])
    with pytest.raises(MethodError, match="exactly 2 experts"):
        merge_state_dicts("slerp", BASE, EXPERTS[:1])


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["ties"]  # type: ignore[index]
