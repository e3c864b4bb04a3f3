"""Numbers inside task vectors against the formulas, and what they come to where all are 1 or 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, TensorInfo, merge_state_dicts
from evomerge.methods.base import LowRank

from .families import Family, assert_close, families

seeds = st.integers(0, 2**32)


def count_of(method: str, shape: Sequence[int]) -> int:
    return {"columns": shape[0], "adarank": min(shape), "concrete": int(np.prod(shape))}[method]


def draw(family: Family, method: str, seed: int) -> list[np.ndarray]:
    rng, count = np.random.default_rng(seed), count_of(method, family.base.shape)
    return [rng.normal(1.0, 1.0, count) * (rng.random(count) < 0.7) for _ in family.experts]


def merge(method: str, family: Family, numbers: Sequence[np.ndarray], **options) -> np.ndarray:
    tensors = [{family.name: torch.tensor(a)} for a in (family.base, *family.experts)]
    given = [{family.name: torch.tensor(n)} for n in numbers]
    options = {"matrices": "all", **options}
    call = {"weights": family.weights, "statistics": given, "dtype": torch.float64}
    return merge_state_dicts(method, tensors[0], tensors[1:], **call, **options)[family.name].numpy()


def is_matrix(family: Family) -> bool:
    return family.base.ndim == 2 and family.base.size > 0


@given(families(), seeds)
def test_columns(family: Family, seed: int):
    if not is_matrix(family):
        return
    numbers, expected = draw(family, "columns", seed), family.base.copy()
    for w, c, expert in zip(family.weights, numbers, family.experts, strict=True):
        expected += w * np.diag(c) @ (expert - family.base)
    assert_close(merge("columns", family, numbers), expected)


@given(families(), seeds)
def test_adarank(family: Family, seed: int):
    """Components as NumPy finds them, one after the other, from the largest on."""
    if not is_matrix(family):
        return
    numbers, expected = draw(family, "adarank", seed), family.base.copy()
    for w, m, expert in zip(family.weights, numbers, family.experts, strict=True):
        U, S, rows = np.linalg.svd(expert - family.base, full_matrices=False)
        if len(S) and (S[-1] < 1e-6 * S[0] or (len(S) > 1 and np.diff(-S).min() < 1e-3 * S[0])):
            return  # components at the rounding level, or in no order of their own, are no fact
        for i in range(len(S)):
            expected += w * m[i] * S[i] * np.outer(U[:, i], rows[i])
    assert_close(merge("adarank", family, numbers), expected)


@given(families(), seeds)
def test_concrete(family: Family, seed: int):
    """One mask, and the sum of the task vectors, entry by entry."""
    if not is_matrix(family):
        return
    mask = draw(family, "concrete", seed)[0]
    summed = sum(w * (expert - family.base) for w, expert in zip(family.weights, family.experts, strict=True))
    expected = family.base + mask.reshape(family.base.shape) * summed
    assert_close(merge("concrete", family, [mask] * len(family.experts)), expected)


def test_a_mask_of_known_entries():
    """(1, 2; 3, 4) and (10, 20; 30, 40) at weights 1 and 1/2: sums 6, 12, 18 and 24."""
    base, taus = torch.full((2, 2), 100.0), [torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * scale for scale in (1, 10)]
    experts = [{"w": base + tau} for tau in taus]
    for mask, expected in (([1, 0, 0, 1], [[106, 100], [100, 124]]), ([0, 0.5, 2, 0], [[100, 106], [136, 100]])):
        for numbers in (torch.tensor(mask, dtype=torch.float32), torch.tensor(mask, dtype=torch.float64)):
            call = {"weights": [1.0, 0.5], "statistics": [{"w": numbers}] * 2, "matrices": "all"}
            assert merge_state_dicts("concrete", {"w": base}, experts, **call)["w"].tolist() == expected
    bits = {"weights": [1.0, 0.5], "statistics": [{"w": torch.tensor([True, False, False, True])}] * 2}
    assert merge_state_dicts("concrete", {"w": base}, experts, **bits, matrices="all")["w"].tolist() == [
        [106, 100],
        [100, 124],
    ]


@given(families(), st.sampled_from(["adarank", "columns", "concrete"]))
def test_all_ones_are_task_arithmetic_and_zeros_the_base(family: Family, method: str):
    tensors = [{family.name: torch.tensor(a)} for a in (family.base, *family.experts)]
    plain = merge_state_dicts("task_arithmetic", tensors[0], tensors[1:], weights=family.weights, dtype=torch.float64)[
        family.name
    ].numpy()
    shape = family.base.shape
    count = count_of(method, shape) if is_matrix(family) else 0
    ones = [np.ones(count) for _ in family.experts]
    assert np.array_equal(merge(method, family, ones), plain)
    assert np.array_equal(merge(method, family, ones, matrices="inner"), plain)
    if is_matrix(family):
        assert_close(merge(method, family, [np.zeros(count)] * len(ones)), family.base)


def test_half_the_components_of_a_known_matrix():
    """tau = diag(4, 3, 2, 1): the mask takes entries of the diagonal."""
    base, tau = torch.zeros(4, 4, dtype=torch.float64), torch.diag(torch.tensor([2.0, 4.0, 1.0, 3.0])).double()
    for mask, expected in (([1, 0, 0, 0], [0, 4, 0, 0]), ([1, 0, 1, 1], [2, 4, 1, 0]), ([0, 1, 0, 1], [0, 0, 1, 3])):
        statistics = [{"w": torch.tensor(mask, dtype=torch.bool)}]
        call = {"weights": [0.5], "statistics": statistics, "matrices": "all"}
        merged = merge_state_dicts("adarank", {"w": base}, [{"w": tau}], **call)["w"]
        torch.testing.assert_close(merged, 0.5 * torch.diag(torch.tensor(expected, dtype=torch.float64)))


def test_only_inner_matrices_have_numbers():
    shapes = {"model.layers.0.mlp.up_proj.weight": (3, 2), "lm_head.weight": (4, 2), "model.norm.weight": (2,)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    expert = {name: torch.ones(shape) for name, shape in shapes.items()}
    numbers = [{"model.layers.0.mlp.up_proj.weight": torch.tensor([2.0, 0.0, -1.0])}]
    merged = merge_state_dicts("columns", base, [expert], weights=[0.5], statistics=numbers)
    rows = merged["model.layers.0.mlp.up_proj.weight"]
    assert rows.tolist() == [[1.0, 1.0], [0.0, 0.0], [-0.5, -0.5]]
    assert all((merged[name] == 0.5).all() for name in shapes if name in ("lm_head.weight", "model.norm.weight"))


@pytest.mark.parametrize(
    ("method", "numbers", "words"),
    [
        ("columns", {}, "expert 0 has no learned numbers"),
        ("columns", {"w": torch.ones(2)}, r"shape \(2,\)"),
        ("columns", {"w": torch.ones(3, 1)}, r"shape \(3, 1\)"),
        ("adarank", {"w": torch.ones(4)}, r"shape \(4,\)"),
        ("concrete", {}, "expert 0 has no learned numbers"),
        ("concrete", {"w": torch.ones(8)}, r"shape \(8,\)"),
        ("concrete", {"w": torch.ones(3, 3)}, r"shape \(3, 3\)"),
        ("adarank", {"w": torch.zeros(2)}, "3 singular components"),
    ],
)
def test_numbers_of_another_tensor_are_refused(method: str, numbers: dict, words: str):
    tau = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    with pytest.raises(MethodError, match=words):
        merge_state_dicts(method, {"w": torch.zeros(3, 3)}, [{"w": tau}], statistics=[numbers], matrices="all")


def test_a_lora_expert_has_as_many_components_as_its_rank():
    method, generator = METHODS["adarank"], torch.Generator().manual_seed(0)
    B, A = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, 2), (2, 5)))
    base, info = torch.zeros(7, 5, dtype=torch.float64), TensorInfo("w", shape=(7, 5))
    U, S, rows = torch.linalg.svd(3.0 * B @ A, full_matrices=False)
    for i, mask in enumerate(([1.0, 0.0], [0.0, 1.0])):
        state = method.prepare([], [{"w": torch.tensor(mask)}])
        call = {"weights": [1.0], "info": info, "state": state, "matrices": "all"}
        merged = method.merge(base, [LowRank(B, A, 3.0)], **call)
        torch.testing.assert_close(merged, S[i] * torch.outer(U[:, i], rows[i]), rtol=1e-12, atol=1e-12)
