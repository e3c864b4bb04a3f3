"""Gradients by a recipe's weights, against autograd through the merge written out as a sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from evomerge.checkpoints import content_hash, open_checkpoint
from evomerge.errors import CheckpointError, EvaluatorError, MethodError
from evomerge.gradients import CoefficientGradients, require_gradients
from evomerge.merging import Merger, load_resident, open_sources
from evomerge.methods import METHODS, merge_state_dicts
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
    ("svd_linear", {"rank_share": 0.3}),
    ("svd_linear", {"rank_share": 0.2, "matrices": "inner", "scale": 0.6}),
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
    if of_module is as_mixtral:
        model.set_experts_implementation("eager")  # the fast one does not take float64
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


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties_linear"])
def test_a_mixture_of_experts(tmp_path: Path, method: str):
    """Its module stacks and joins what the file has apart; experts that no token is sent to have no gradient."""
    folder = family(tmp_path, config=tiny.mixtral_config(), kinds="dd")
    recipe = spread(folder, {"granularity": "tensor"}, method)
    assert len(recipe.groups) > 20
    assert_gradient(folder, recipe, of_module=as_mixtral)


def test_embeddings_that_are_not_tied(tmp_path: Path):
    folder = family(tmp_path, config=tiny.llama_config(tie_word_embeddings=False), kinds="dl")
    assert_gradient(folder, spread(folder, {"granularity": "tensor"}))


def test_adapters_alone(tmp_path: Path):
    """Only the parameters that an adapter changes require gradients, while the loss is computed."""
    folder = family(tmp_path, kinds="ll")
    recipe = spread(folder, {"granularity": "module"})
    assert_gradient(folder, recipe)
    model, required = resident(folder), set()

    def loss() -> Tensor:
        required.update(name for name, p in model.named_parameters() if p.requires_grad)
        return loss_of(model)()

    CoefficientGradients(Merger(open_sources(recipe)), model, free=True).of(loss, recipe)
    parts = ("q_proj", "v_proj", "up_proj", "down_proj")
    assert required == {n for n, _ in model.named_parameters() if n.split(".")[-2] in parts}


def test_without_a_base(tmp_path: Path):
    folder = family(tmp_path, kinds="dd")
    recipe = replace(recipe_of(folder, "linear", params={"normalize": False}), base=None)
    model = resident(folder)
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=False)
    _, found = gradients.of(loss_of(model), recipe)
    with_base = recipe_of(folder, "linear", params={"normalize": False})
    reference = Reference.of(folder, with_base)
    expected = reference.gradient(model, with_base, lambda m: entropy(m(input_ids=TOKENS).logits), as_named)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("kinds", ["dd", "ll"])
def test_in_float32(tmp_path: Path, kinds: str):
    """Sources in bfloat16 and arithmetic in float32, against a model and a sum in float64."""
    folder = family(tmp_path, dtype=torch.bfloat16, kinds=kinds)
    for method in ("task_arithmetic", "dare_linear"):
        recipe = spread(folder, {"granularity": "layer_groups", "groups": 2}, method)
        model, exact = resident(folder, "float32"), resident(folder)
        _, found = CoefficientGradients(Merger(open_sources(recipe)), model, free=True).of(loss_of(model), recipe)
        wide = tmp_path / method
        for name in ("base", "expert0", "expert1"):  # what the reference reads, without a rounding of its own
            (wide / name).mkdir(parents=True)
            for file in (folder / name).glob("*.safetensors"):
                save_file({n: t.double() for n, t in load_file(file).items()}, wide / name / file.name)
        reference = Reference.of(wide, recipe)
        with torch.no_grad():
            for name, tensor in reference.merged(recipe, as_named).items():
                exact.get_parameter(name).copy_(tensor)
        expected = reference.gradient(exact, recipe, lambda m: entropy(m(input_ids=TOKENS).logits), as_named)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_finite_differences(tmp_path: Path):
    """Of the loss of the merged model itself, with parameters that the module keeps transposed (GPT-2)."""
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1, pad_token_id=0
    )
    folder = family(tmp_path, config=config, kinds="dd")
    recipe = spread(folder, {"granularity": "layer"}, "ties_linear", density=0.4)
    model = resident(folder)
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=False)
    _, found = gradients.of(loss_of(model), recipe)
    step = 1e-4
    for g, group in enumerate(recipe.groups):
        for t in range(2):
            ends = []
            for shift in (step, -step):
                weights = tuple(w + shift * (s == t) for s, w in enumerate(group.weights))
                groups = (*recipe.groups[:g], replace(group, weights=weights), *recipe.groups[g + 1 :])
                gradients.into(replace(recipe, groups=groups))
                ends.append(float(loss_of(model)()))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(slope - float(found[t, g])) < 1e-5 * float(found.abs().max())


# --- how it is done ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [False, True])
def test_micro_batches_add(mixed: Path, free: bool):
    recipe = recipe_of(mixed, "dare_linear")
    model = resident(mixed)
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=free)
    parts = [loss_of(model, TOKENS[:1]), loss_of(model, TOKENS[1:])]
    losses, found = zip(*(gradients.of(part, recipe) for part in parts), strict=True)
    values, apart = gradients.together(parts, [1.0, 1.0], recipe)
    assert tuple(values) == losses
    loss, together = gradients.of(lambda: parts[0]() + parts[1](), recipe)
    assert loss == pytest.approx(sum(losses), rel=1e-12)
    # Powers of two: the model's norms round what flows back through them to float32.
    _, weighed = gradients.together(parts, [0.25, 4.0], recipe)
    for summed, expected in (
        (apart, found[0] + found[1]),
        (together, found[0] + found[1]),
        (weighed, 0.25 * found[0] + 4 * found[1]),
    ):
        torch.testing.assert_close(summed, expected, rtol=1e-10, atol=1e-12)


def test_freed_gradients_are_gone_before_the_next_comes(mixed: Path):
    recipe, model = recipe_of(mixed), resident(mixed)
    counts = []

    def loss() -> Tensor:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _: counts.append(sum(p.grad is not None for p in model.parameters()))
            )
        return loss_of(model)()

    CoefficientGradients(Merger(open_sources(recipe)), model, free=True).of(loss, recipe)
    assert counts and not any(counts)


@pytest.mark.parametrize("free", [False, True])
def test_evaluation_is_what_it_was_and_sources_too(mixed: Path, tmp_path: Path, free: bool):
    recipe, other = recipe_of(mixed, "dare_linear"), recipe_of(mixed, "dare_linear", (0.1, 0.2, 0.3))
    model, fresh = resident(mixed, "float32"), resident(mixed, "float32")
    merger = Merger(open_sources(recipe), fixed_params={"dare_linear": {}})
    Merger(open_sources(recipe)).into(fresh, recipe)
    merger.into(model, recipe)
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
    files = [mixed / name for name in ("base", "expert0", "expert1", "expert2")]
    hashes = [content_hash(folder, cache=tmp_path / "before.json") for folder in files]
    tensors = {i.name: [t.clone() for t in (base, *experts) if t is not None] for i, base, experts in merger.sources}
    gradients = CoefficientGradients(merger, model, free=free)
    for step in (recipe, other):
        gradients.of(loss_of(model), step)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    merger.into(model, recipe)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, before)
    assert [content_hash(folder, cache=tmp_path / "after.json") for folder in files] == hashes
    for info, base, experts in merger.sources:
        now = [t for t in (base, *experts) if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(tensors[info.name], now, strict=True))


def test_a_loss_that_fails_leaves_no_trace(mixed: Path):
    recipe, model = recipe_of(mixed), resident(mixed)
    norm = model.model.norm.weight
    norm.requires_grad_(True).grad = kept = torch.ones_like(norm)

    def loss() -> Tensor:
        entropy(model(input_ids=TOKENS).logits).backward()
        raise ZeroDivisionError

    for free in (False, True):
        with pytest.raises(ZeroDivisionError):
            CoefficientGradients(Merger(open_sources(recipe)), model, free=free).of(loss, recipe)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
        assert norm.grad is kept and torch.equal(kept, torch.ones_like(norm))
        assert sum(p.grad is not None for p in model.parameters()) == 1
        norm.grad = None
        entropy(model(input_ids=TOKENS).logits).backward()
        assert norm.grad is not None  # no hook is left that takes it
        norm.grad = kept


# --- the merge that is trained on -----------------------------------------------------------------------------------


def assert_same(one: Any, other: Any) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["lora_family", "dense_family"])
def test_an_unrounded_merge_has_the_digits_of_the_arithmetic(request: pytest.FixtureRequest, kind: str):
    """As an export in float32 has them; what is rounded for scoring afterwards is what a fresh model holds."""
    folder = request.getfixturevalue(kind)
    recipe = recipe_of(folder)
    merger = Merger(open_sources(recipe))
    model, exact, fresh = (resident(folder, "float32") for _ in range(3))
    merger.into(exact, replace(recipe, export_dtype="float32"))
    merger.into(fresh, recipe)
    for history in ([], [True], [True, False], [False]):
        for rounded in history:
            merger.into(model, recipe, rounded=rounded)
        merger.into(model, recipe, rounded=False)
        assert_same(model, exact)
    merger.into(model, recipe)
    assert_same(model, fresh)
    assert any(not torch.equal(t, fresh.state_dict()[name]) for name, t in exact.state_dict().items())


def test_an_unrounded_merge_writes_what_has_changed(lora_family: Path):
    """Another weight in the upper layers leaves the lower ones alone; another seed, none of task arithmetic's concern,
    writes what experts touch."""
    lower, upper = Group((0.4, 0.7), (0, 2)), Group((0.4, 0.7), (2, 4))
    recipe = recipe_of(lora_family, groups=(lower, upper))
    model, merger = resident(lora_family, "float32"), Merger(open_sources(recipe))

    def versions() -> list[int]:
        layers = [model.model.layers[i].self_attn.q_proj.weight for i in (0, 3)]
        return [tensor._version for tensor in (*layers, model.model.norm.weight)]

    merger.into(model, recipe, rounded=False)
    first = versions()
    merger.into(model, recipe, rounded=False)
    assert versions() == first
    merger.into(model, replace(recipe, groups=(lower, Group((0.5, 0.7), (2, 4)))), rounded=False)
    second = versions()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    merger.into(model, replace(recipe, seed=5), rounded=False)
    assert [a == b for a, b in zip(second, versions(), strict=True)] == [False, False, True]


def test_a_merge_that_was_interrupted_is_not_taken_for_one(lora_family: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(lora_family)
    model, exact, merger = (
        resident(lora_family, "float32"),
        resident(lora_family, "float32"),
        Merger(open_sources(recipe)),
    )
    merger.into(exact, recipe, rounded=False)
    method, calls = type(METHODS["task_arithmetic"]), []
    combine = method.combine

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return combine(*args, **kwargs)

    monkeypatch.setattr(method, "combine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merger.into(model, recipe, rounded=False)
    merger.into(model, recipe, rounded=False)
    assert_same(model, exact)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params", "remedy"),
    [
        ("ties", {}, "ties_linear"),
        ("linear", {}, "normalize: false"),
        ("lines", {"a": None}, "Give a"),
        ("consensus", {}, "task_arithmetic"),
        ("tsv_m", {}, "task_arithmetic"),
        ("slerp", {}, "task_arithmetic"),
    ],
)
def test_methods_that_are_not_affine(mixed: Path, method: str, params: dict[str, Any], remedy: str):
    """By a recipe alone: no file is opened. In a part of the model, too."""
    affine, other = recipe_of(mixed), recipe_of(mixed, method, params=params)
    with pytest.raises(MethodError, match=rf"method {method} is not affine[\s\S]*{remedy}"):
        require_gradients(other)
    part = Group((0.1, 0.2, 0.3), tensors=("*.mlp.*",), method=method, params=params)
    with pytest.raises(MethodError, match=method):
        require_gradients(replace(affine, groups=(part, *affine.groups)))
    require_gradients(affine)


def test_affine_methods_are_not_refused(mixed: Path):
    for method, params in PROCESSED:
        require_gradients(recipe_of(mixed, method, params=params))


def test_tensors_that_are_converted_on_the_way(tmp_path: Path):
    """transformers splits this model's Wqkv, so that no part of a parameter is the file's tensor."""
    config = transformers.NomicBertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, intermediate_size=48
    )
    for name in ("base", "expert0", "expert1"):
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    recipe = recipe_of(tmp_path)
    model = resident(tmp_path, "float32", "AutoModel")
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=False)
    with pytest.raises(CheckpointError, match=r"NomicBertModel[\s\S]*Wqkv[\s\S]*cma"):
        gradients.of(lambda: model(input_ids=TOKENS).last_hidden_state.square().mean(), recipe)


@pytest.mark.parametrize("changed", [False, True])
def test_a_buffer_that_an_expert_changes(tmp_path: Path, changed: bool):
    """Old files hold computed buffers; as long as they are the base's there is nothing to differentiate."""
    folder = family(tmp_path, kinds="dd")
    for number, name in enumerate(("base", "expert0", "expert1")):
        tensors = load_file(folder / name / "model.safetensors")
        tensors["model.rotary_emb.inv_freq"] = torch.arange(1.0, 5.0) + (number if changed else 0)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    recipe, model = recipe_of(folder), resident(folder)
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=False)
    if changed:
        with pytest.raises(CheckpointError, match=r"model\.rotary_emb\.inv_freq in a buffer"):
            gradients.of(loss_of(model), recipe)
    else:
        assert gradients.of(loss_of(model), recipe)[1].abs().sum() > 0


def test_a_loss_without_gradients(mixed: Path):
    recipe, model = recipe_of(mixed), resident(mixed)
    with pytest.raises(EvaluatorError, match="no gradient"):
        CoefficientGradients(Merger(open_sources(recipe)), model, free=False).of(
            torch.no_grad()(loss_of(model)), recipe
        )


def test_numbers_that_are_not_finite_come_back_as_they_are(mixed: Path):
    recipe, model = recipe_of(mixed), resident(mixed)
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=False)
    loss, found = gradients.of(lambda: loss_of(model)() * torch.nan, recipe)
    assert math.isnan(loss) and found.isnan().all()
