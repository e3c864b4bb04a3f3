"""Gradients by learned numbers, against autograd through the merge written out, and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_gradients import TOKENS, entropy, family, loss_of, recipe_of, resident, state_dicts
from torch import Tensor
from torch.func import functional_call

from evomerge.learned import Layout
from evomerge.learned_gradients import LearnedGradients, lend
from evomerge.merging import Merger, open_sources
from evomerge.methods import METHODS
from evomerge.recipe import Collected, Group, Recipe
from evomerge.searchers.concrete import ConcreteMask

GROUPS = (Group((0.3, 0.2, 0.5), (0, 2)), Group((0.1, 0.6, 0.0), (2, 4)))
Numbers = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in float64 with two dense experts and a LoRA adapter (of rank 4)."""
    return family(tmp_path_factory.mktemp("mixed"), kinds="ddl")


def learned_recipe(folder: Path, method: str, matrices: str = "inner", **changes: Any) -> Recipe:
    recipe = recipe_of(folder, method, params={"matrices": matrices}, **{"groups": GROUPS, **changes})
    return replace(recipe, statistics=Collected("in memory", {"numbers": "1"}))


def draw(folder: Path, method: str, matrices: str, values: Callable[[np.random.Generator, int], np.ndarray]) -> Numbers:
    """Numbers for all matrices that each of three experts changes; of concrete for those that any of them changes."""
    base, experts = state_dicts(folder, 3)
    random = np.random.default_rng(0)
    found: Numbers = []
    for expert in experts:
        numbers = {}
        for name, theta in base.items():
            inner = ".self_attn." in name or ".mlp." in name
            if theta.dim() == 2 and (inner or matrices == "all") and expert[name] is not theta:
                size = {"columns": theta.shape[0], "adarank": min(theta.shape), "concrete": theta.numel()}[method]
                numbers[name] = values(random, size)
        found.append(numbers)
    if method == "concrete":
        return [{name: numbers[name] for numbers in reversed(found) for name in numbers}]
    return found


def written_out(
    folder: Path, recipe: Recipe, method: str, numbers: list[dict[str, Tensor]]
) -> Callable[[], dict[str, Tensor]]:
    """The formula: theta_0 + sum w_t diag(c_t) tau_t, theta_0 + sum w_t U_t diag(m_t s_t) V_t', or theta_0 + sum w_t
    (m * tau_t)."""
    base, experts = state_dicts(folder, 3)
    with torch.no_grad():
        taus = [{name: expert[name] - base[name] for name in base} for expert in experts]
        svds = [
            {name: torch.linalg.svd(taus[t][name], full_matrices=False) for name in given}
            for t, given in enumerate(numbers)
            if method == "adarank"
        ]
    layer_of = {name: int(name.split(".")[2]) if ".layers." in name else None for name in base}

    def merged() -> dict[str, Tensor]:
        found = {}
        for name, theta in base.items():
            layer = layer_of[name]
            first = layer < 2 if layer is not None else "embed" in name
            total = theta
            for t, weight in enumerate(GROUPS[0 if first else 1].weights):
                given = numbers[0 if method == "concrete" else t].get(name)
                if given is None:
                    vector = taus[t][name]
                elif method == "columns":
                    vector = torch.diag(given) @ taus[t][name]
                elif method == "concrete":
                    vector = given.view(theta.shape) * taus[t][name]
                else:
                    U, S, rows = svds[t][name]
                    vector = U @ torch.diag(given * S) @ rows
                total = total + weight * vector
            found[name] = total
        return found

    return merged


def gradients_of(folder: Path, recipe: Recipe, numbers: Numbers, *, free: bool = False) -> tuple[Any, ...]:
    """(model, LearnedGradients), with the numbers lent."""
    model = resident(folder)
    merger = Merger(open_sources(recipe), fixed_params={recipe.method: dict(recipe.params)})
    lend(merger, recipe, {"kind": METHODS[recipe.method].statistics, "tensors": numbers})
    return model, LearnedGradients(merger, model, free=free)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("matrices", ["inner", "all"])
@pytest.mark.parametrize("method", ["columns", "adarank", "masks", "concrete"])
def test_equal_to_autograd_through_the_merge(mixed: Path, method: str, matrices: str, free: bool):
    """By the numbers and by the weights; masks are adarank's numbers at 0 and 1."""
    only_bits, method = method == "masks", "adarank" if method == "masks" else method

    def values(random: np.random.Generator, count: int) -> np.ndarray:
        return random.integers(0, 2, count).astype(float) if only_bits else random.normal(1.0, 0.5, count)

    numbers = draw(mixed, method, matrices, values)
    recipe = learned_recipe(mixed, method, matrices)
    model, gradients = gradients_of(mixed, recipe, numbers, free=free)
    loss, by_weights = gradients.of(loss_of(model), recipe)
    leaves = [{n: torch.tensor(v, requires_grad=True) for n, v in given.items()} for given in numbers]
    merged = written_out(mixed, recipe, method, leaves)()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, merged[name].detach(), rtol=1e-10, atol=1e-12)
    outcome = at_what_it_holds(model, merged)
    assert loss == float(outcome.detach())
    wanted = [leaf for given in leaves for leaf in given.values()]
    expected = np.concatenate([g.numpy() for g in torch.autograd.grad(outcome, wanted)])
    found = gradients.by_numbers(numbers)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    for g, t in ((0, 0), (0, 2), (1, 1)):
        assert float(by_weights[t, g]) == pytest.approx(
            float(by_weight(mixed, recipe, method, numbers, model, g, t)), rel=1e-8, abs=1e-12
        )


def by_weight(mixed: Path, recipe: Recipe, method: str, numbers: Numbers, model: Any, g: int, t: int) -> Tensor:
    """dL/dw of expert t in group g, by autograd along the straight line."""
    given = [{n: torch.tensor(v) for n, v in one.items()} for one in numbers]
    here = written_out(mixed, recipe, method, given)()
    shared = method == "concrete"
    nothing = [{n: torch.zeros_like(v) for n, v in one.items()} if s == t else one for s, one in enumerate(given)]
    weight = recipe.groups[g].weights[t]
    without = {} if shared else written_out(mixed, recipe, method, nothing)()
    base, experts = state_dicts(mixed, 3)
    move = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shifted = {}
    for name, value in here.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        first = layer < 2 if layer is not None else "embed" in name
        if (0 if first else 1) != g:
            direction = torch.zeros_like(value)
        elif shared and name in given[0]:
            direction = given[0][name].view(value.shape) * (experts[t][name] - base[name])
        elif not shared and name in given[t]:
            direction = (value - without[name]) / weight
        else:
            direction = experts[t][name] - base[name]
        shifted[name] = value + move * direction
    return torch.autograd.grad(at_what_it_holds(model, shifted), move)[0]


def at_what_it_holds(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """The loss as a function of ``tensors``, at the numbers of the model: its norms are in float32 and jump."""
    held = {name: p.detach() + (tensors[name] - tensors[name].detach()) for name, p in model.named_parameters()}
    return entropy(functional_call(model, held, (), {"input_ids": TOKENS}).logits)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kinds", ["ldl", "lll"])
def test_masks_with_noise_are_equal_to_autograd_through_the_merge(tmp_path: Path, kinds: str, rescale: bool):
    """By the logits of a mask that was drawn, where the first expert leaves most matrices alone, or all do."""
    folder = family(tmp_path, kinds=kinds)
    logits = draw(folder, "concrete", "all", lambda random, count: random.normal(0.2, 1.0, count))
    counts = tuple(given.size for given in logits[0].values())
    x = np.concatenate(list(logits[0].values()))
    noise = np.random.default_rng(5).logistic(size=x.size)
    mask = ConcreteMask(counts, temperature=0.7, rescale=rescale, noise=noise)
    recipe = learned_recipe(folder, "concrete", "all")
    layout = Layout("entries", (dict(zip(logits[0], counts, strict=True)),))
    numbers = layout.split(mask.values(x))
    model, gradients = gradients_of(folder, recipe, numbers)
    gradients.of(loss_of(model), recipe)
    found = mask.pull_back(x, gradients.by_numbers(numbers))
    leaf, masks = torch.tensor(x, requires_grad=True), {}
    soft = torch.sigmoid((leaf + torch.tensor(noise)) / 0.7)
    for name, part in zip(logits[0], soft.split(list(counts)), strict=True):
        masks[name] = part / part.mean() if rescale else part
    merged = written_out(folder, recipe, "concrete", [masks])()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, merged[name].detach(), rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(at_what_it_holds(model, merged), leaf)[0].numpy()
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_a_shared_gradient_has_the_type_of_the_numbers(mixed: Path):
    numbers = draw(mixed, "concrete", "inner", lambda random, count: random.random(count, dtype=np.float32))
    recipe = learned_recipe(mixed, "concrete")
    model, gradients = gradients_of(mixed, recipe, numbers)
    gradients.of(loss_of(model), recipe)
    found = gradients.by_numbers(numbers)
    assert found.dtype == np.float32
    wide = [{name: given.astype(np.float64) for name, given in numbers[0].items()}]
    np.testing.assert_allclose(found, gradients.by_numbers(wide), rtol=1e-6)


@pytest.mark.parametrize("method", ["columns", "adarank", "concrete"])
def test_finite_differences(tmp_path: Path, method: str):
    """Of the loss of the merged model itself, with parameters that the module keeps transposed (GPT-2)."""
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1, pad_token_id=0
    )
    folder = family(tmp_path, config=config, kinds="ddd")
    numbers = draw(folder, method, "all", lambda random, count: random.normal(1.0, 0.5, count))
    recipe = learned_recipe(folder, method, "all", groups=(Group((0.3, 0.2, 0.5)),))
    model, gradients = gradients_of(folder, recipe, numbers)
    gradients.of(loss_of(model), recipe)
    found = gradients.by_numbers(numbers)
    places = [(t, name, i) for t, given in enumerate(numbers) for name, v in given.items() for i in range(v.size)]
    random, step = np.random.default_rng(1), 1e-4
    for place in random.choice(np.argsort(-np.abs(found))[:200], 12, replace=False):
        t, name, i = places[place]
        ends = []
        for sign in (1, -1):
            moved = [{n: v.copy() for n, v in given.items()} for given in numbers]
            moved[t][name][i] += sign * step
            shifted = replace(recipe, statistics=Collected("in memory", {"numbers": f"{sign}{place}"}))
            lend(gradients.merger, shifted, {"kind": METHODS[method].statistics, "tensors": moved})
            gradients.into(shifted)
            ends.append(float(loss_of(model)().detach()))
        assert abs((ends[0] - ends[1]) / (2 * step) - found[place]) < 1e-5 * np.abs(found).max()


def test_batches_add_up(mixed: Path):
    numbers = draw(mixed, "adarank", "inner", lambda random, count: random.integers(0, 2, count).astype(float))
    recipe = learned_recipe(mixed, "adarank")
    model, gradients = gradients_of(mixed, recipe, numbers)
    parts = [loss_of(model, TOKENS[:1]), loss_of(model, TOKENS[1:])]
    apart = []
    for part in parts:
        gradients.of(part, recipe)
        apart.append(gradients.by_numbers(numbers))
    gradients.together(parts, [1.0, 0.5], recipe)
    together = gradients.by_numbers(numbers)
    np.testing.assert_allclose(together, apart[0] + 0.5 * apart[1], rtol=1e-12, atol=1e-12 * np.abs(together).max())


def test_decompositions_are_found_once_for_a_search_and_give_the_same_bits(mixed: Path, monkeypatch: Any):
    from evomerge.methods import learned

    calls = []
    monkeypatch.setattr(learned, "svd", lambda *a, _true=learned.svd: (calls.append(1), _true(*a))[1])
    recipe = learned_recipe(mixed, "adarank", groups=(Group((0.3, 0.2, 0.5)),))
    seen: list[Mapping[str, Tensor]] = []
    merger = Merger(open_sources(recipe), fixed_params={"adarank": {"matrices": "inner"}})
    model, counts = resident(mixed), []
    for turn in range(4):
        numbers = draw(mixed, "adarank", "inner", lambda random, count: (np.arange(count) % 2).astype(float))
        mine = replace(recipe, statistics=Collected("in memory", {"numbers": str(turn)}))
        lend(merger, mine, {"kind": "components", "tensors": numbers})
        merger.into(model, mine, rounded=False)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        counts.append(len(calls))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]  # the second time they are kept
    assert counts[3] == counts[1]
    for later in seen[1:]:
        assert all(torch.equal(tensor, later[name]) for name, tensor in seen[0].items())
