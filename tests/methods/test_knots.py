"""KnOTS against its paper's equation on one dense decomposition, in float64.

Tolerance 1e-8 of the task vectors' size. Signs of singular vectors are free and cancel, unless entries of the right
parts cancel to zero; equal singular values have no basis of their own. Such families are left out by ``reject``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from evomerge.errors import MethodError
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import LowRank, TensorInfo

from .families import Family
from .matrix_families import kept, matrix_families
from .references import elect_and_merge, trim
from .test_masks import documented_mask


def parts_of(taus: list[np.ndarray], after: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """(U, [S V_1', ...]) of U S [V_1' .. V_T'] = [tau_1 .. tau_T], without the singular values that are zero; or
    (U S, [V_1', ...]) where they come ``after``."""
    U, S, Vh = np.linalg.svd(np.concatenate(taus, axis=1), full_matrices=False)
    rank = int((1e-11 * S[0] < S).sum())
    clear = (S[:rank] > 1e-6 * S[0]).all() and (np.diff(-S[:rank]) > 1e-5 * S[0]).all()
    if not clear:  # nearly zero, or equal: they have no basis of their own
        reject()
    if after:
        return U[:, :rank] * S[:rank], np.split(Vh[:rank], len(taus), axis=1)
    return U[:, :rank], np.split(S[:rank, None] * Vh[:rank], len(taus), axis=1)


def knots(family: Family, inner: str, density: float, mode: str, seed: int, after: bool = False) -> np.ndarray:
    """Stoica et al., section 4: the right parts merged by TIES, by DARE, or by DARE and TIES."""
    numbered = [(t, w, tau) for t, (w, tau) in enumerate(zip(family.weights, family.taus, strict=True)) if w != 0]
    if not any(tau.any() for _, _, tau in numbered):
        return np.zeros_like(family.base)
    U, parts = parts_of([tau for _, _, tau in numbered], after)
    weights = [w for _, w, _ in numbered]
    clear = True
    if inner == "ties":
        for part in parts:  # which entry is the last one kept must be clear
            size = np.sort(np.abs(part).reshape(-1))
            last = size.size - max(1, round(density * size.size))
            clear &= bool(last == 0 or size[last] - size[last - 1] > 1e-9 * size[-1])
        parts = [trim(part, density) for part in parts]
    elif density < 1:
        masks = [documented_mask(seed, family.name, t, parts[0].size, density) for t, _, _ in numbered]
        masks = [mask.reshape(parts[0].shape) for mask in masks]
        parts = [part * mask / density for part, mask in zip(parts, masks, strict=True)]
    weighted = [w * part for w, part in zip(weights, parts, strict=True)]
    if inner == "dare_linear":
        return U @ sum(weighted)
    # Entries that cancel, and rounding in entries that are zero, would leave the election to chance.
    largest = max(float(np.abs(part).max()) for part in weighted)
    some = np.abs(np.sum(weighted, axis=0))[np.any([part != 0 for part in weighted], axis=0)]
    clear &= (some > 1e-9 * largest).all() and all((abs(p[p != 0]) > 1e-9 * largest).all() for p in weighted)
    if not clear:
        reject()
    return U @ elect_and_merge(parts, weights, mode, normalize=False)


def assert_like(merged: np.ndarray, family: Family, tau: np.ndarray) -> None:
    size = max(1.0, *(float(np.abs(tau).max()) for tau in family.taus))
    np.testing.assert_allclose(merged, family.base + tau, rtol=0, atol=1e-8 * size)


@given(
    matrix_families(),
    st.sampled_from(["ties", "dare_ties", "dare_linear"]),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    st.sampled_from(["mean", "sum"]),
    st.floats(-1, 2),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_knots(family: Family, inner: str, density: float, mode: str, scale: float, seed: int, after: bool):
    assume(kept(family))
    expected = scale * knots(family, inner, density, mode, seed, after)
    place = "after" if after else "before"
    options = {"inner": inner, "density": density, "mode": mode, "singular_values": place, "scale": scale}
    assert_like(family.merge("knots", seed=seed, **options), family, expected)


@given(matrix_families())
def test_where_the_inner_merge_only_adds_it_is_task_arithmetic(family: Family):
    total = np.sum([w * tau for w, tau in zip(family.weights, family.taus, strict=True)], axis=0)
    assert_like(family.merge("knots", inner="dare_linear", density=1.0), family, total)


@given(matrix_families(most=1))
def test_one_expert_is_kept_where_nothing_is_trimmed(family: Family):
    family.weights = [1.0]
    for mode in ("mean", "sum"):
        assert_like(family.merge("knots", density=1.0, mode=mode), family, family.taus[0])


def adapters(rows: int, columns: int, ranks: list[int], dtype=torch.float64) -> tuple[torch.Tensor, list[LowRank]]:
    draws = torch.Generator().manual_seed(rows + columns)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)

    return random(rows, columns), [LowRank(random(rows, r), random(r, columns), 0.5 + r) for r in ranks]


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (9, 40), (40, 9)], ids=str)
@pytest.mark.parametrize("inner", ["ties", "dare_ties"])
def test_adapters_of_any_ranks_are_the_dense_decomposition(shape: tuple[int, int], inner: str):
    """With ranks that exceed the matrix's, too, and one that is written with more columns than it has rank."""
    base, experts = adapters(*shape, [2, 5, 4])
    experts[1] = LowRank(torch.cat([experts[1].B, experts[1].B], 1), torch.cat([experts[1].A, experts[1].A]), 0.7)
    dense = [(base + e.scaling * e.B @ e.A).numpy() for e in experts]
    family = Family(base.numpy(), dense, [0.5, -1.0, 0.8])
    merged = METHODS["knots"].merge(
        base, experts, weights=family.weights, info=family.info, inner=inner, density=0.6, mode="sum", seed=3
    )
    assert_like(merged.numpy(), family, knots(family, inner, 0.6, "sum", 3))


def test_density_is_the_inner_methods_own_unless_given():
    base, experts = adapters(20, 30, [3, 3])
    options = {"weights": [1.0, 1.0], "info": TensorInfo("w", shape=(20, 30))}
    for inner, density in (("ties", 0.2), ("dare_ties", 0.5), ("dare_linear", 0.5)):
        merged = METHODS["knots"].merge(base, experts, inner=inner, **options)
        assert torch.equal(merged, METHODS["knots"].merge(base, experts, inner=inner, density=density, **options))


class Largest(TorchDispatchMode):
    """The sizes, in numbers, of all tensors that operations make inside."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        outputs = made if isinstance(made, tuple | list) else [made]
        self.sizes += [t.untyped_storage().nbytes() // t.element_size() for t in outputs if isinstance(t, torch.Tensor)]
        return made


def test_adapters_are_not_multiplied_out():
    """Nothing of the matrix's size is made but the result; the right parts are a sum of ranks high."""
    m, n = 512, 640
    base, experts = adapters(m, n, [4] * 8, dtype=torch.float32)
    fresh = [LowRank(e.B.clone(), e.A.clone(), e.scaling) for e in experts]  # of storages of their own
    with Largest() as made:
        tau = METHODS["knots"].combine_matrix(  # pyright: ignore[reportAttributeAccessIssue]
            base, fresh, weights=[1.0] * 8, dtype=torch.float32, info=TensorInfo("w", shape=(m, n)), seed=0,
            inner="ties", density=0.2, mode="mean", singular_values="before",
        )  # fmt: skip
    assert tau.shape == (m, n)
    assert sorted(made.sizes)[-1] == m * n
    assert sorted(set(made.sizes))[-2] < m * n / 4  # right parts, and the histogram that finds their thresholds


@pytest.mark.parametrize("method", ["knots", "tsv_m", "iso_c", "iso_cts"])
def test_a_tall_matrix_that_nobody_tuned_costs_no_decomposition(method: str, monkeypatch: pytest.MonkeyPatch):
    """An embedding in dense experts that is the base's, to the number."""
    base = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("decomposed"))
    info = TensorInfo("w", shape=(3000, 8))
    merged = METHODS[method].merge(base, [base.clone(), base.clone()], weights=[1.0, 1.0], info=info)
    assert torch.equal(merged, base)


def test_not_finite_is_refused():
    base, experts = adapters(6, 8, [2, 2])
    experts[0].B[0, 0] = float("nan")
    with pytest.raises(MethodError, match="decomposed"):
        METHODS["knots"].merge(base, experts, weights=[1.0, 1.0], info=TensorInfo("w", shape=(6, 8)))


def test_other_tensors_get_the_mean():
    base = {"w": torch.zeros(4), "m": torch.eye(3)}
    experts = [{"w": torch.full((4,), float(t)), "m": torch.eye(3)} for t in (1, 2)]
    merged = merge_state_dicts("knots", base, experts, scale=2.0)
    assert merged["w"].tolist() == [3.0] * 4
    assert torch.equal(merged["m"], base["m"])
