"""Gradients by a recipe's weights, against autograd through the merge written out as a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from evomerge.checkpoints import open_checkpoint
from evomerge.gradients import CoefficientGradients
from evomerge.merging import Merger, load_resident, open_sources
from evomerge.methods import merge_state_dicts
from evomerge.recipe import Group, Recipe, Source
from evomerge.space import Space
from evomerge.testing import tiny

CAUSAL = "AutoModelForCausalLM"
TOKENS = torch.tensor([[5, 17, 3, 42, 42, 9, 60], [1, 2, 30, 4, 50, 6, 70]])
PROCESSED: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}),
    ("task_arithmetic", {"scale": 0.7}),
    ("dare_linear", {"density": 0.4}),
    ("dare_linear", {"density": 0.4, "rescale": "l1"}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    ("della_linear", {"density": 0.5, "epsilon": 0.2}),
    ("della_linear", {"density": 0.5, "rescale": "l1", "scale": 0.6}),
    ("ties_linear", {"density": 0.3}),
    ("ties_linear", {"density": 0.3, "scope": "model"}),
    ("linear", {"normalize": False}),
    ("lines", {"inner": "dare_linear", "a": 0.3}),
    ("random_vectors", {}),
]
GRANULARITIES: list[dict[str, Any]] = [
    {"granularity": "global"},
    {"granularity": "layer"},
    {"granularity": "layer_groups", "groups": 2},
    {"granularity": "module"},
    {"granularity": "tensor"},
]


def family(folder: Path, *, dtype: torch.dtype = torch.float64, config: Any = None, kinds: str = "dl") -> Path:
    """A base with one expert a letter of ``kinds``: d for a dense one, l for a LoRA adapter."""
    base = tiny.save_model(folder / "base", tiny.llama_config() if config is None else config, seed=0, dtype=dtype)
    for t, kind in enumerate(kinds):
        make = tiny.save_dense_expert if kind == "d" else tiny.save_lora_expert
        make(base, folder / f"expert{t}", seed=t + 1)
    return folder


def recipe_of(
    folder: Path, method: str = "task_arithmetic", weights: Sequence[float] = (0.4, 0.7, -0.2), **changes: Any
) -> Recipe:
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith("expert"))
    return Recipe(
        base=Source("base", str(folder / "base")),
        experts=tuple(Source(name, str(folder / name)) for name in names),
        method=method,
        groups=changes.pop("groups", (Group(tuple(weights[: len(names)])),)),
        seed=3,
        **{"export_dtype": "bfloat16", **changes},
    )


def spread(folder: Path, weights: Mapping[str, Any], method: str = "task_arithmetic", **params: Any) -> Recipe:
    """The recipe of a point of a space, every weight of it another number."""
    template = recipe_of(folder)
    sources = open_sources(template)
    space = Space.from_dict(
        {"method": method, "params": params, "weights": {"range": [-2.0, 2.0], **weights}},
        template=template,
        num_layers=sources.reference.num_layers,
        tensors=[sources.info(name) for name in sources.names],
    )
    return space.decode({d.name: 0.3 + 0.01 * i for i, d in enumerate(space.dimensions)})


def entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def loss_of(model: Any, tokens: Tensor = TOKENS) -> Callable[[], Tensor]:
    return lambda: entropy(model(input_ids=tokens).logits)


# --- the reference: files read by safetensors, vectors from whole merges, autograd ---------------------------------


def state_dicts(folder: Path, num_experts: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The base and the experts, dense; what an adapter leaves alone is the very base tensor."""
    base = load_file(folder / "base" / "model.safetensors")
    experts = []
    for t in range(num_experts):
        dense = folder / f"expert{t}" / "model.safetensors"
        if dense.exists():
            experts.append(load_file(dense))
            continue
        pair, expert = load_file(folder / f"expert{t}" / "adapter_model.safetensors"), dict(base)
        for name, theta in base.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in pair:
                A, B = (pair[f"{key}.lora_{x}.weight"].to(theta.dtype) for x in "AB")
                expert[name] = theta + 2 * B @ A
        experts.append(expert)
    return base, experts


@dataclass
class Reference:
    """merged = origin + sum_t w_t vectors[t], by checkpoint name."""

    origin: dict[str, Tensor]
    vectors: list[dict[str, Tensor]]

    @classmethod
    def of(cls, folder: Path, recipe: Recipe) -> Reference:
        count = len(recipe.experts)
        base, experts = state_dicts(folder, count)

        def merge(weights: list[float]) -> dict[str, Tensor]:
            call = {"weights": weights, "seed": recipe.seed, "dtype": torch.float64}
            return merge_state_dicts(recipe.method, base, experts, **call, **recipe.params)

        origin = merge([0.0] * count)
        units = [merge([float(s == t) for s in range(count)]) for t in range(count)]
        return cls(origin, [{n: unit[n] - origin[n] for n in base} for unit in units])

    def merged(self, recipe: Recipe, of_module: Callable[[Any], Any]) -> dict[str, Tensor]:
        checkpoint = open_checkpoint(str(recipe.base and recipe.base.path))
        found = {}
        for name, origin in self.origin.items():
            weights = recipe.group_for(checkpoint.info(name)).weights
            found[name] = origin + sum(w * v[name] for w, v in zip(weights, self.vectors, strict=True))
        return of_module(found)

    def gradient(self, model: Any, recipe: Recipe, loss: Callable[[Any], Tensor], of_module: Any) -> Tensor:
        """By autograd, at the numbers that ``model`` holds."""
        checkpoint = open_checkpoint(str(recipe.base and recipe.base.path))
        moves = torch.zeros(len(recipe.experts), len(recipe.groups), dtype=torch.float64, requires_grad=True)
        shifts = {}
        for name in self.origin:
            group = next(g for g, group in enumerate(recipe.groups) if group is recipe.group_for(checkpoint.info(name)))
            shifts[name] = sum(moves[t, group] * v[name] for t, v in enumerate(self.vectors))
        held = dict(model.named_parameters())
        parameters = {n: held[n].detach() + shift.to(held[n].dtype) for n, shift in of_module(shifts).items()}
        outcome = loss(lambda **inputs: functional_call(model, parameters, (), inputs))
        return torch.autograd.grad(outcome, moves)[0]


def as_named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Modules that call their parameters what the files do."""
    return tensors


def as_mixtral(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's experts w1, w3 (joined) and w2, stacked."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".block_sparse_moe.")
        if rest.startswith("experts."):
            _, number, part, _ = rest.split(".")
            experts.setdefault(layer, {})[int(number), part] = tensor
        else:
            found[f"{layer}.mlp.{rest}" if rest else name] = tensor
    for layer, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        up = torch.stack([torch.cat([parts[n, "w1"], parts[n, "w3"]]) for n in numbers])
        found[f"{layer}.mlp.experts.gate_up_proj"] = up
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack([parts[n, "w2"] for n in numbers])
    return found


def resident(folder: Path, compute_dtype: str = "float64", auto_class: str = CAUSAL) -> Any:
    return load_resident(folder / "base", auto_class=auto_class, compute_dtype=compute_dtype)


def assert_gradient(
    folder: Path, recipe: Recipe, *, compute_dtype: str = "float64", rtol: float = 1e-10, of_module: Any = as_named
) -> None:
    """Kept and freed, against autograd, at the numbers of the formula."""
    model = resident(folder, compute_dtype)
    merger = Merger(open_sources(recipe), fixed_params={recipe.method: dict(recipe.params)})
    reference = Reference.of(folder, recipe)
    found = [CoefficientGradients(merger, model, free=free).of(loss_of(model), recipe) for free in (False, True)]
    expected = reference.merged(recipe, of_module)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name].double(), rtol=rtol, atol=rtol)
    gradient = reference.gradient(model, recipe, lambda m: entropy(m(input_ids=TOKENS).logits), of_module)
    largest = float(gradient.abs().max())
    assert largest > 0
    for loss, mine in found:
        assert loss == float(loss_of(model)())
        assert mine.dtype == torch.float64 and mine.shape == (len(recipe.experts), len(recipe.groups))
        torch.testing.assert_close(mine, gradient, rtol=rtol, atol=rtol * largest)
    assert torch.equal(found[0][1], found[1][1])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in float64 with two dense experts and a LoRA adapter."""
    return family(tmp_path_factory.mktemp("mixed"), kinds="ddl")


@pytest.mark.parametrize(("method", "params"), PROCESSED, ids=str)
def test_processed_task_vectors(mixed: Path, method: str, params: dict[str, Any]):
    groups = (Group((0.3, 0.2, 0.5), (0, 2)), Group((0.1, 0.6, 0.0), (2, 4)))
    assert_gradient(mixed, recipe_of(mixed, method, params=params, groups=groups))


@pytest.mark.parametrize("weights", GRANULARITIES, ids=lambda weights: weights["granularity"])
@pytest.mark.parametrize(("method", "params"), [("task_arithmetic", {}), ("ties_linear", {"density": 0.3})])
def test_granularities(mixed: Path, weights: dict[str, Any], method: str, params: dict[str, Any]):
    assert_gradient(mixed, spread(mixed, weights, method, **params))
