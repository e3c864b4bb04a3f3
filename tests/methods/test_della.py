"""DELLA against a reference written from its paper, and what it reduces to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo, check_params
from evomerge.methods.chunks import merge_chunks
from evomerge.methods.della import ascending
from evomerge.recipe import Recipe

from .families import Family, assert_close, families
from .references import elect_and_merge, modes
from .test_random import documented_uniform

METHOD_NAMES = ["della_linear", "della"]
chances = st.floats(0.02, 0.999).flatmap(
    lambda density: st.tuples(st.just(density), st.floats(0, 0.99 * min(density, 1 - density)))
)
rescalings = st.sampled_from(["probability", "l1"])
seeds = st.integers(0, 2**40)


def probabilities(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Section 3, MagPrune, for one row: in equal steps from density - epsilon to density + epsilon, by rank."""
    by_rank = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
    found = np.full(len(row), density)
    for rank, i in enumerate(by_rank):
        if len(row) > 1:
            found[i] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return found


def drop(tau: np.ndarray, key: tuple[int, str, int], chance: tuple[float, float], rescale: str) -> np.ndarray:
    """Each entry stays with its own probability, and is divided by it (or all by what restores the L1 norm)."""
    n = tau.shape[-1] if tau.ndim else 1
    p = np.concatenate([probabilities(row, *chance) for row in tau.reshape(-1, n)]).reshape(tau.shape)
    kept = tau * (documented_uniform(*key, 0, tau.size).reshape(tau.shape) < p.astype(np.float32))
    if rescale == "l1":
        return kept * (np.abs(tau).sum() / np.abs(kept).sum() if kept.any() else 1)
    return kept / p


@given(families(), seeds, chances, rescalings, st.floats(-1, 2))
def test_della_linear(family: Family, seed: int, chance: tuple[float, float], rescale: str, scale: float):
    dropped = [drop(tau, (seed, family.name, t), chance, rescale) for t, tau in enumerate(family.taus)]
    expected = family.base + scale * sum(w * tau for w, tau in zip(family.weights, dropped, strict=True))
    options = {"density": chance[0], "epsilon": chance[1], "rescale": rescale, "scale": scale}
    assert_close(family.merge("della_linear", seed=seed, **options), expected)


@given(families(low=0.0), seeds, chances, rescalings, modes, st.booleans())
def test_della(family: Family, seed: int, chance: tuple[float, float], rescale: str, mode: str, normalize: bool):
    # Continuous numbers: on a grid, rescaled sums could cancel or not by a matter of rounding.
    rng = np.random.default_rng(seed)
    family.experts = [family.base + rng.standard_normal(family.base.shape) for _ in family.experts]
    dropped = [drop(tau, (seed, family.name, t), chance, rescale) for t, tau in enumerate(family.taus)]
    expected = family.base + elect_and_merge(dropped, family.weights, mode, normalize)
    options = {"density": chance[0], "epsilon": chance[1], "rescale": rescale, "mode": mode, "normalize": normalize}
    assert_close(family.merge("della", seed=seed, **options), expected)


@given(families(), seeds)
def test_at_density_1_it_is_what_follows_it(family: Family, seed: int):
    for rescale in ("probability", "l1"):
        options = {"seed": seed, "density": 1.0, "rescale": rescale}
        assert np.array_equal(family.merge("della_linear", **options), family.merge("task_arithmetic"))
        assert np.array_equal(family.merge("della", **options), family.merge("ties", density=1.0))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_with_epsilon_0_it_drops_as_dare_does(density: float):
    """Other draws, but the same distribution: whatever its magnitude an entry stays with ``density``, and gets the
    same number then."""
    rng = np.random.default_rng(0)
    shape, seeds = (40, 50), 100
    tau = rng.standard_normal(shape)
    family, n = Family(np.zeros(shape), [tau], [1.0]), tau.size
    for method in ("della_linear", "dare_linear", "della", "dare_ties"):
        epsilon = {"epsilon": 0.0} if "della" in method else {}
        count = np.zeros(shape)
        for seed in range(seeds):
            merged = family.merge(method, seed=seed, density=density, **epsilon)
            kept = merged != 0
            np.testing.assert_allclose(merged[kept], tau[kept] / density, rtol=1e-12)
            count += kept
            restored = family.merge(method, seed=seed, density=density, rescale="l1", **epsilon)
            assert np.array_equal(restored != 0, kept)
            np.testing.assert_allclose(restored[kept], tau[kept] * np.abs(tau).sum() / np.abs(tau[kept]).sum())
        spread = seeds * density * (1 - density)  # of one entry's count, which is binomial
        assert abs(count.sum() - n * seeds * density) < 5 * np.sqrt(n * spread)
        assert abs(((count - seeds * density) ** 2).mean() / spread - 1) < 5 * np.sqrt(2 / n)
        assert abs(np.corrcoef(count.ravel(), np.abs(tau).ravel())[0, 1]) < 5 / np.sqrt(n)


def test_keeps_each_rank_with_its_probability_and_the_expectation():
    """Independent of how masks are keyed: kept shares are binomial, and the mean over seeds is task arithmetic."""
    rng = np.random.default_rng(0)
    rows, n, seeds, density, epsilon = 40, 50, 200, 0.5, 0.3
    tau = np.sort(np.abs(rng.standard_normal((rows, n))), axis=1) * rng.choice([-1, 1], (rows, n))  # ranks by column
    family = Family(np.zeros((rows, n)), [tau], [1.0])
    kept, total = np.zeros((rows, n)), np.zeros((rows, n))
    for seed in range(seeds):
        merged = family.merge("della_linear", seed=seed, density=density, epsilon=epsilon)
        kept += merged != 0
        total += merged
    p = np.linspace(density - epsilon, density + epsilon, n)
    trials = rows * seeds
    assert (np.abs(kept.sum(axis=0) - trials * p) < 5 * np.sqrt(trials * p * (1 - p))).all()
    assert abs(kept.sum() - trials * n * density) < 5 * np.sqrt(trials * (p * (1 - p)).sum())
    deviation = (total / seeds - tau) / (np.abs(tau) * np.sqrt((1 / p - 1) / seeds))
    assert abs(deviation.mean()) < 5 / np.sqrt(rows * n)
    assert abs(deviation.std() - 1) < 0.1


def test_ranks_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 17, 300):
        normal = torch.randn(20, n, generator=generator).abs()
        for magnitudes in (normal, (normal * 2).round(), torch.zeros(20, n), normal * 1e-42):
            expected = np.argsort(magnitudes.numpy(), axis=1, kind="stable")
            assert np.array_equal(ascending(magnitudes).numpy(), expected)
            assert np.array_equal(ascending(magnitudes.double()).numpy(), expected)


def test_l1_rescaling_restores_the_norm_of_each_task_vector():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 5000, generator=generator, dtype=torch.float64)  # more than one block of rows
    expert = base + torch.randn(30, 5000, generator=generator, dtype=torch.float64)
    info = TensorInfo("w", shape=(30, 5000))
    for method in METHOD_NAMES:
        merged = METHODS[method].merge(base, [expert], weights=[1.0], info=info, density=0.2, rescale="l1")
        torch.testing.assert_close((merged - base).abs().sum(), (expert - base).abs().sum())


def test_bfloat16_merges_as_its_numbers_in_float64_within_rounding():
    """Many equal magnitudes: the same entries stay, whatever the arithmetic is in."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 5000, generator=generator).bfloat16()
    experts = [(base + 0.01 * torch.randn(30, 5000, generator=generator)).bfloat16() for _ in range(2)]
    info = TensorInfo("w", shape=(30, 5000))
    for method in METHOD_NAMES:
        narrow, wide = (
            METHODS[method].merge(base.to(t), [e.to(t) for e in experts], weights=[0.5, 0.7], info=info, seed=3)
            for t in (torch.bfloat16, torch.float64)
        )
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=1e-6)


SHAPE = (150, 5000)  # two blocks of rows


def candidates(method: str, params: dict[str, Any], state: Any) -> Iterator[Any]:
    """Candidates of one search, each held against a merge of its own; yields the state after each.

    The last one has another seed than the search.
    """
    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.randn(4, *SHAPE, generator=generator)
    info = TensorInfo("w", shape=SHAPE)
    for seed, weights in ((3, [1, 2, 0]), (3, [0.5, -1, 1]), (3, [-1, 0.3, 2]), (4, [1, 1, 1])):
        call = {"weights": weights, "info": info, "seed": seed}
        pieces = merge_chunks(METHODS[method], base, experts, state=state, params=params, **call)
        merged = torch.cat([piece for _, piece in pieces])
        assert torch.equal(merged, METHODS[method].merge(base, experts, **call, **params).reshape(-1))
        yield state


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_stays_is_kept_between_candidates_where_l1_restores(method: str):
    params = check_params(method, METHODS[method], {"rescale": "l1"})
    state = METHODS[method].prepare([], seed=3, **params)
    masks = [found.kept_bytes / 93_752 for found in candidates(method, params, state)]  # a bit an entry, in whole words
    assert masks == [2, 3, 3, 3]


@pytest.mark.parametrize("varies", [[], ["density"], ["density", "epsilon"]], ids=str)
@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_ranks_are_kept_between_candidates(method: str, rescale: str, varies: list[str]):
    params = check_params(method, METHODS[method], {"rescale": rescale})
    fixed = {key: value for key, value in params.items() if key not in varies and (varies or key != "rescale")}
    state = METHODS[method].prepare([], seed=3, **fixed)
    # Two bytes an entry, of the experts that have had a weight. What says who stays is of no use to another seed.
    assert [found.kept_bytes / 1_500_000 for found in candidates(method, params, state)] == [2, 3, 3, 3]


@pytest.mark.parametrize("room", [0, 2_900_000, 10**9])
def test_what_is_beyond_the_room_is_found_anew(room: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evomerge.methods.della.MOST_BYTES", room)
    params = check_params("della", METHODS["della"], {})
    state = METHODS["della"].prepare([], seed=3, **params)
    *_, last = candidates("della", params, state)
    assert last.kept_bytes <= room and (last.kept_bytes > 0) == (room > 0)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_single_merge_keeps_nothing(method: str):
    params = check_params(method, METHODS[method], {})
    assert METHODS[method].prepare([], **params) is None
    assert METHODS[method].prepare([], seed=3, **{**params, "density": 1.0}) is None  # no ranks are asked for


def test_rows_too_long_for_16_bits_are_merged_and_not_kept():
    base, expert = torch.randn(2, 2, 65536, generator=torch.Generator().manual_seed(0))
    params = check_params("della", METHODS["della"], {})
    state = METHODS["della"].prepare([], seed=3, **params)
    info = TensorInfo("w", shape=(2, 65536))
    merged = METHODS["della"].merge(base, [expert], weights=[1.0], info=info, state=state, seed=3, **params)
    tau = (expert - base).double().numpy()
    expected = base.double().numpy() + drop(tau, (3, "w", 0), (params["density"], params["epsilon"]), "probability")
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert state.kept_bytes == 0


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_probabilities_must_be_probabilities(method: str):
    for density, epsilon in ((0.05, 0.1), (0.1, 0.1), (0.95, 0.1), (0.5, 0.51), (0, 0), (1.5, 0), (0.5, -0.1)):
        with pytest.raises(MethodError, match=r"density|epsilon"):
            check_params(method, METHODS[method], {"density": density, "epsilon": epsilon})
    for density, epsilon in ((0.9, 0.1), (0.7, 0.3), (1.0, 0.5), (0.05, 0.0), (0.94, 0.06)):
        check_params(method, METHODS[method], {"density": density, "epsilon": epsilon})


def test_a_recipe_is_refused_before_anything_is_opened():
    recipe = {"method": "della", "base": "a", "experts": {"b": "b"}, "params": {"density": 0.95}, "weights": 1}
    with pytest.raises(MethodError, match=r"density \+ epsilon at most 1"):
        Recipe.from_dict(recipe)
