"""A recipe applied to sources: the resident model and the files hold the same numbers, whatever came before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.families import NOT_AROUND_THE_BASE, OF_DENSE_EXPERTS, fitting
from safetensors.torch import load_file, save_file
from statistics_folder import statistics_of

from evomerge.checkpoints import content_hash
from evomerge.collected import open_collected
from evomerge.errors import CheckpointError, EvaluatorError, SpecError
from evomerge.exporting import export
from evomerge.merging import Merger, load_resident, open_sources, verify_sources
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.recipe import Group, Recipe, Source
from evomerge.testing import tiny

CAUSAL = "AutoModelForCausalLM"


def recipe_of(folder: Path, method: str = "task_arithmetic", weights: tuple = (0.4, 0.7), **changes: Any) -> Recipe:
    """A recipe for ``folder/base`` and its experts."""
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith("expert"))
    experts, weights = fitting(method, names), tuple(fitting(method, weights))
    changes.setdefault("statistics", statistics_of(folder, experts, METHODS[method].statistics))
    return Recipe(
        base=Source("base", str(folder / "base")),
        experts=tuple(Source(name, str(folder / name)) for name in experts),
        method=method,
        groups=changes.pop("groups", (Group(weights),)),
        **changes,
    )


def perturbed(base: Path, folder: Path, seed: int) -> Path:
    """A dense expert made on the files alone: every floating-point tensor moved by noise."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        moved = {
            name: (t.float() + torch.randn(t.shape, generator=generator) * 0.05).to(t.dtype)
            if t.is_floating_point()
            else t
            for name, t in sorted(tensors.items())
        }
        save_file(moved, file, metadata={"format": "pt"})
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def resident(folder: Path, auto_class: str = CAUSAL, compute_dtype: str = "float32"):
    return load_resident(folder / "base", auto_class=auto_class, compute_dtype=compute_dtype)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


# --- families: each in a folder with base, expert0 and expert1 -----------------------------------------------------


def small(config: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base = tiny.save_model(folder / "base", config, seed=0)
        for t in range(2):
            perturbed(base, folder / f"expert{t}", seed=t + 1)
        return folder

    return make


def encoder(config: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder / "base")
        tiny.tokenizer().save_pretrained(folder / "base")
        for t in range(2):
            perturbed(folder / "base", folder / f"expert{t}", seed=t + 1)
        return folder

    return make


def lora(config: Any, **settings: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base = tiny.save_model(folder / "base", config, seed=0)
        for t in range(2):
            tiny.save_lora_expert(base, folder / f"expert{t}", seed=t + 1, **settings)
        return folder

    return make


def mixed(folder: Path) -> Path:
    """A LoRA and a dense expert of a base in float32 with a head of its own."""
    config = tiny.llama_config(tie_word_embeddings=False)
    base = tiny.save_model(folder / "base", config, seed=0, dtype=torch.float32)
    perturbed(base, folder / "expert0", seed=1)
    tiny.save_lora_expert(base, folder / "expert1", seed=2, target_modules=["q_proj", "lm_head"])
    return folder


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llama, tied, lora": (lora(tiny.llama_config()), CAUSAL),
    "llama, untied, mixed": (mixed, CAUSAL),
    "mixtral, dense": (small(tiny.mixtral_config()), CAUSAL),
    "mixtral, lora": (lora(tiny.mixtral_config(), target_modules=["q_proj", "v_proj"]), CAUSAL),
    "qwen2, biases": (
        small(transformers.Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, eos_token_id=1)),
        CAUSAL,
    ),
    "gpt2, transposed": (
        small(transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1)),
        CAUSAL,
    ),
    "bert encoder": (encoder(transformers.BertConfig(**SIZES, intermediate_size=48)), "AutoModel"),
    # transformers splits its Wqkv: no part of a parameter is the file's tensor, so its own operations do the work
    "nomic bert, split": (encoder(transformers.NomicBertConfig(**SIZES, intermediate_size=48)), "AutoModel"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    make, auto_class = FAMILIES[request.param]
    return make(tmp_path_factory.mktemp("family")), auto_class


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_what_was_scored_is_what_is_exported(family: tuple[Path, str], tmp_path: Path, method: str):
    """The resident model after ``into`` equals the export loaded by plain transformers, bit for bit, in float32 and in
    bfloat16; and the merge did move it away from the base."""
    folder, auto_class = family
    recipe = recipe_of(folder, method)
    sources = open_sources(recipe)
    out = export(recipe, tmp_path / "out", shard_size=20_000)
    for compute_dtype in ("float32", "bfloat16"):
        model = resident(folder, auto_class, compute_dtype)
        before = snapshot(model)
        Merger(sources).into(model, recipe)
        plain = getattr(transformers, auto_class).from_pretrained(out, dtype=getattr(torch, compute_dtype))
        assert_equal(model.state_dict(), plain.state_dict())
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_exports_have_the_bases_names_and_shapes(family: tuple[Path, str], tmp_path: Path):
    folder, _ = family
    base = weights_in(folder / "base")
    merged = weights_in(export(recipe_of(folder), tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in base.items()}


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_into_and_to_disk(lora_family: Path, tmp_path: Path, method: str):
    recipe = recipe_of(lora_family, method, seed=11)
    model = resident(lora_family)
    Merger(open_sources(recipe)).into(model, recipe)
    out = export(recipe, tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert_equal(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("method", OF_DENSE_EXPERTS)
def test_files_hold_what_the_method_computes(dense_family: Path, tmp_path: Path, method: str):
    """Chunk by chunk from mapped files is the same as on state dicts in memory."""
    recipe = recipe_of(dense_family, method, seed=3)
    base, *experts = (load_file(dense_family / n / "model.safetensors") for n in ("base", "expert0", "expert1"))
    experts, weights = fitting(method, experts), fitting(method, (0.4, 0.7))
    kind = METHODS[method].statistics
    statistics = None if recipe.statistics is None else open_collected(recipe.statistics, str(kind), recipe)
    options: dict[str, Any] = {"weights": weights, "statistics": statistics, "seed": 3, "dtype": torch.bfloat16}
    expected = merge_state_dicts(method, base, experts, **options)
    assert_equal(weights_in(export(recipe, tmp_path / "out")), expected)


def test_task_arithmetic_by_its_formula(lora_family: Path, tmp_path: Path):
    """theta_0 + sum w_t (alpha / r) B_t A_t, written out in float64 and rounded once: at most one unit in the last
    place of bfloat16 apart, and seldom that."""
    base = load_file(lora_family / "base" / "model.safetensors")
    factors = [load_file(lora_family / f"expert{t}" / "adapter_model.safetensors") for t in range(2)]
    merged = weights_in(export(recipe_of(lora_family), tmp_path / "out"))
    off = total = 0
    for name, theta in base.items():
        exact, key = theta.double(), f"base_model.model.{name.removesuffix('.weight')}"
        for weight, pair in zip((0.4, 0.7), factors, strict=True):
            if f"{key}.lora_A.weight" in pair:
                exact = (
                    exact + weight * 2 * pair[f"{key}.lora_B.weight"].double() @ pair[f"{key}.lora_A.weight"].double()
                )
        expected = exact.to(torch.bfloat16)
        off += int((merged[name] != expected).sum())
        total += expected.numel()
        torch.testing.assert_close(merged[name].double(), exact, rtol=2**-8, atol=1e-30)
    assert off / total < 1e-3


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name not in NOT_AROUND_THE_BASE])
@pytest.mark.parametrize("kind", ["lora_family", "dense_family", "moe_family"])
def test_zero_weights_give_the_bases_bytes(request: pytest.FixtureRequest, tmp_path: Path, kind: str, method: str):
    folder = request.getfixturevalue(kind)
    merged = weights_in(export(recipe_of(folder, method, (0.0, 0.0)), tmp_path / "out"))
    assert_equal(merged, weights_in(folder / "base"))


def test_zero_weights_round_the_base_once(tmp_path: Path):
    folder = mixed(tmp_path / "family")
    merged = weights_in(export(recipe_of(folder, weights=(0.0, 0.0)), tmp_path / "out"))
    assert_equal(merged, {name: t.to(torch.bfloat16) for name, t in weights_in(folder / "base").items()})


def test_weight_one_gives_that_expert(dense_family: Path, tmp_path: Path):
    """linear: its very numbers. task_arithmetic: within one float32 unit of the larger of base and expert."""
    base, expert = (weights_in(dense_family / name) for name in ("base", "expert1"))
    exact = weights_in(export(recipe_of(dense_family, "linear", (0.0, 1.0)), tmp_path / "linear"))
    assert_equal(exact, expert)
    recipe = recipe_of(dense_family, "task_arithmetic", (0.0, 1.0), export_dtype="float32")
    near = weights_in(export(recipe, tmp_path / "arithmetic"))
    for name, tensor in near.items():
        largest = torch.maximum(base[name].float().abs(), expert[name].float().abs())
        unit = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
        assert ((tensor - expert[name].float()).abs() <= unit).all()


# --- always from the sources ---------------------------------------------------------------------------------------


def candidates(folder: Path) -> list[Recipe]:
    """Methods that keep the base, and one that does not: unnormalised linear scales untouched tensors, too."""
    return [
        recipe_of(folder),
        recipe_of(folder, "linear", (0.9, 0.9), params={"normalize": False}),
        recipe_of(folder, "ties", (1.0, -0.5), params={"density": 0.3}),
        recipe_of(folder, export_dtype="float16"),
        recipe_of(folder, "dare_ties", (0.3, 1.1), seed=5, params={"density": 0.4}),
        recipe_of(folder, "slerp", (0.3, 0.7)),
        recipe_of(folder, "ties", groups=(Group((0.1, 0.2), (0, 1)), Group((1.0, 0.0), (1, 4), {"density": 0.9}))),
        recipe_of(folder, weights=(0.0, 0.0)),
    ]


def test_a_candidate_does_not_depend_on_the_ones_before(lora_family: Path):
    """A long history in one model, twice over, against a fresh model for each candidate."""
    recipes = candidates(lora_family)
    fresh = []
    for recipe in recipes:
        model = resident(lora_family)
        Merger(open_sources(recipe)).into(model, recipe)
        fresh.append(snapshot(model))
    nothing = {recipe.method: {} for recipe in recipes}
    model, merger = resident(lora_family), Merger(open_sources(recipes[0]), fixed_params=nothing)
    order = [0, 1, 0, 3, 0, 2, 1, 7, 4, 5, 6, 3, 1, 6, 2]
    for i in order:
        merger.into(model, recipes[i])
        assert_equal(model.state_dict(), fresh[i])


def test_two_models_of_one_merger(lora_family: Path):
    recipe = recipe_of(lora_family)
    merger = Merger(open_sources(recipe))
    first, second = resident(lora_family), resident(lora_family, compute_dtype="bfloat16")
    merger.into(first, recipe)
    merger.into(second, recipe)
    assert_equal({n: t.to(torch.bfloat16) for n, t in first.state_dict().items()}, second.state_dict())


def test_tensors_that_no_expert_touches_are_written_once(lora_family: Path):
    recipe = recipe_of(lora_family)
    model, merger = resident(lora_family), Merger(open_sources(recipe))
    merger.into(model, recipe)
    norm = model.model.norm.weight
    version = norm._version
    merger.into(model, recipe)
    assert norm._version == version
    merger.into(model, recipe_of(lora_family, "linear", (0.9, 0.9), params={"normalize": False}))
    assert norm._version > version


@pytest.mark.parametrize("kind", ["lora_family", "dense_family"])
def test_sources_are_never_changed(request: pytest.FixtureRequest, tmp_path: Path, kind: str):
    """On disk, by hash; in memory, by what the same mapping gives afterwards."""
    folder = request.getfixturevalue(kind)
    sources = open_sources(recipe_of(folder))
    parts = ("base", "expert0", "expert1")
    before = [content_hash(folder / p, cache=tmp_path / "before.json") for p in parts]
    tensors = {i.name: [b.clone(), *(e.clone() for e in experts)] for i, b, experts in sources}
    model = resident(folder, compute_dtype="bfloat16")
    merger = Merger(sources)
    for i, recipe in enumerate(candidates(folder)):
        merger.into(model, recipe)
        (tmp_path / str(i)).mkdir()
        merger.stream(recipe, tmp_path / str(i))
    assert [content_hash(folder / p, cache=tmp_path / "after.json") for p in parts] == before
    for info, base, experts in sources:
        assert all(torch.equal(a, b) for a, b in zip(tensors[info.name], [base, *experts], strict=True))


@pytest.mark.parametrize(
    "fixed", [None, {}, {"ties": {}}, {"ties": {"density": 0.3}}, {"ties": {"density": 0.9}}], ids=str
)
def test_what_is_prepared_changes_no_number(lora_family: Path, fixed: dict | None):
    recipe = recipe_of(lora_family, "ties", params={"density": 0.3})
    expected, model = resident(lora_family), resident(lora_family)
    Merger(open_sources(recipe)).into(expected, recipe)
    Merger(open_sources(recipe), fixed_params=fixed).into(model, recipe)
    assert_equal(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_masks_are_kept_for_a_search_and_not_for_one_merge(lora_family: Path, method: str):
    recipes = [
        recipe_of(lora_family, method, weights, seed=seed) for seed in (0, 7) for weights in ((0.4, 0.7), (1, -1))
    ]
    merger, model = Merger(open_sources(recipes[0]), fixed_params={}), resident(lora_family)
    for recipe in [*recipes, recipes[0]]:
        alone, expected = Merger(open_sources(recipe)), resident(lora_family)
        alone.into(expected, recipe)
        assert [state for *_, state in alone._states.values()] == [None]
        merger.into(model, recipe)
        assert_equal(model.state_dict(), expected.state_dict())
        ((*_, masks),) = merger._states.values()
        assert masks.seed == recipe.seed
        assert masks.draw("model.layers.0.self_attn.q_proj.weight", 0, 0, 1) is not None
        assert masks.kept_bytes > 1000


def test_integers_and_masks_are_the_bases(dense_family: Path, tmp_path: Path):
    """Of any width, between floats: the files stay readable, the numbers are the base's."""
    folder = shutil.copytree(dense_family, tmp_path / "family")
    extra = {"model.layers.0.mask": torch.tensor([True, False, True]), "model.layers.0.count": torch.tensor([7, 8])}
    for t, name in enumerate(("base", "expert0", "expert1")):
        file = folder / name / "model.safetensors"
        save_file({**load_file(file), **{k: v + t if v.dtype == torch.int64 else v for k, v in extra.items()}}, file)
    merged = weights_in(export(recipe_of(folder), tmp_path / "out", shard_size=20_000))
    for name, tensor in extra.items():
        assert torch.equal(merged[name], tensor)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_groups_that_do_not_fit_the_model(lora_family: Path):
    recipe = recipe_of(lora_family, groups=(Group((1.0, 1.0), (0, 2)), Group((1.0, 1.0), (2, 6))))
    with pytest.raises(SpecError, match="end at layer 6, but the model has 4 layers"):
        Merger(open_sources(recipe)).into(resident(lora_family), recipe)


def test_sources_are_named_in_errors(lora_family: Path, tmp_path: Path):
    recipe = recipe_of(lora_family)
    missing = replace(recipe, experts=(recipe.experts[0], Source("spam", str(tmp_path / "nowhere"))))
    with pytest.raises(CheckpointError, match=r"expert spam: .*nowhere"):
        open_sources(missing)


def test_sources_are_verified(lora_family: Path):
    recipe = verify_sources(recipe_of(lora_family))
    assert recipe.base.sha256 == content_hash(lora_family / "base")
    assert verify_sources(recipe) == recipe
    with pytest.raises(CheckpointError, match=rf"expert expert1: .*{recipe.experts[1].sha256}.*{'0' * 64}"):
        verify_sources(replace(recipe, experts=(recipe.experts[0], replace(recipe.experts[1], sha256="0" * 64))))


def test_resident_model(lora_family: Path):
    model = resident(lora_family, compute_dtype="bfloat16")
    assert not model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())
    assert_equal(
        model.state_dict(), transformers.AutoModelForCausalLM.from_pretrained(lora_family / "base").state_dict()
    )


def test_resident_model_that_would_be_filled_at_random(lora_family: Path):
    with pytest.raises(CheckpointError, match=r"lacks score\.weight.*AutoModelForSequenceClassification"):
        resident(lora_family, "AutoModelForSequenceClassification")


def test_unknown_model_class(lora_family: Path):
    with pytest.raises(EvaluatorError, match="AutoModelForCausalLM"):
        resident(lora_family, "AutoModelForCasualLM")


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import ctypes, json, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from evomerge.merging import Merger, open_sources
from evomerge.recipe import Recipe

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

torch.ones(2, 2) @ torch.ones(2, 2)
for name, (small, data) in json.loads(sys.argv[1]).items():
    recipe = Recipe.from_dict(small)
    Path(sys.argv[2], "small", name).mkdir(parents=True)
    Merger(open_sources(recipe)).stream(recipe, Path(sys.argv[2], "small", name))  # compiling takes memory, too
    recipe = Recipe.from_dict(data)
    sources = open_sources(recipe)
    out = Path(sys.argv[2], name)
    out.mkdir()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier merge has freed is not idle memory
    peak, done, idle = 0, False, anonymous()
    thread = threading.Thread(target=watch, daemon=True)  # an error ends the process
    thread.start()
    Merger(sources).stream(recipe, out, shard_size=50_000_000)
    done = True
    thread.join()
    print(name, peak - idle)
"""


def wide_family(folder: Path, *, hidden: int, inner: int) -> Path:
    """A base with three matrices of ``hidden * inner`` entries, one dense and two LoRA experts."""
    config = tiny.llama_config(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1)
    base = tiny.save_model(folder / "base", config, seed=0)
    perturbed(base, folder / "expert0", seed=1)
    for t in (1, 2):
        tiny.save_lora_expert(base, folder / f"expert{t}", seed=t, target_modules=["up_proj", "down_proj", "gate_proj"])
    return folder


def three_experts(folder: Path, method: str) -> Recipe:
    """All that the method takes of a wide family's."""
    few = {"steps": 2} if "steps" in METHODS[method].params else {}  # 300 steps need no more memory than two
    recipe = recipe_of(folder, method, (0.3, 0.4, 0.5), params=few)
    if METHODS[method].needs_factors:
        return replace(recipe, experts=recipe.experts[1:], groups=(Group((0.4, 0.5)),))
    if len(recipe.experts) == 2:  # not both of the dense ones
        return replace(recipe, experts=recipe_of(folder).experts[1:])
    return recipe


def test_streaming_needs_little_memory(tmp_path: Path):
    """At most (T + 3) times the largest tensor in the arithmetic dtype, above idle, in anonymous memory."""
    largest = 512 * 8192 * 4
    small = wide_family(tmp_path / "warm", hidden=64, inner=128)
    large = wide_family(tmp_path / "large", hidden=512, inner=8192)
    recipes = {method: three_experts(large, method) for method in METHODS}
    data = json.dumps({name: (three_experts(small, name).to_dict(), r.to_dict()) for name, r in recipes.items()})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, data, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed goes back at once, and is not counted
    )
    assert done.returncode == 0, done.stderr
    peaks = {method: int(peak) for method, peak in map(str.split, done.stdout.splitlines())}
    assert peaks.keys() == recipes.keys()
    for method, peak in peaks.items():
        assert peak <= (len(recipes[method].experts) + 3) * largest, (method, peak / largest)
