"""Merges and inner products of many tensors at once, against the plain way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.checkpoints import Sources, open_checkpoint
from evomerge.gradients import CoefficientGradients
from evomerge.merging import Merger, load_resident, open_sources
from evomerge.methods import fused
from evomerge.recipe import Group, Recipe, Source
from evomerge.task_vectors import TaskVectors
from evomerge.testing import tiny

pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="the compiled loops do not run here")
TOKENS = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35]])


def family(folder: Path, dtype: torch.dtype, experts: int) -> Path:
    base = tiny.save_model(folder / "base", tiny.llama_config(), seed=0, dtype=dtype)
    for t in range(experts):
        tiny.save_dense_expert(base, folder / f"expert{t}", seed=t + 1)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two dense experts of it."""
    folder = tmp_path_factory.mktemp("dense")
    return family(folder, request.param, 2)


def recipe_of(folder: Path, *groups: Group, **changed: Any) -> Recipe:
    experts = tuple(Source(f"expert{t}", str(folder / f"expert{t}")) for t in range(2))
    recipe = Recipe(Source("base", str(folder / "base")), experts, "task_arithmetic", groups, export_dtype="float32")
    return replace(recipe, **changed)


def resident(folder: Path) -> Any:
    return load_resident(folder / "base", auto_class="AutoModelForCausalLM", compute_dtype="float32")


def losses(model: Any) -> list[Callable[[], Tensor]]:
    def of(tokens: Tensor) -> Tensor:
        logs = model(input_ids=tokens).logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).mean()

    return [lambda tokens=tokens: of(tokens) for tokens in (TOKENS, TOKENS[:1], TOKENS[1:], TOKENS + 1, TOKENS + 2)]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, -1.3), (1e-50, 0.5), (0.0, 0.0)], ids=str)
def test_merges_have_the_bits_of_the_plain_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float], rounded: bool
):
    recipe = recipe_of(folder, Group(weights, (0, 2)), Group((0.5, 0.25), (2, 4)), params={"scale": 0.9})
    models = [resident(folder) for _ in range(3)]
    Merger(open_sources(recipe)).into(models[0], recipe, rounded=rounded)
    with fused.plain():
        Merger(open_sources(recipe)).into(models[1], recipe, rounded=rounded)
    with monkeypatch.context() as patched:
        patched.setattr(TaskVectors, "place", lambda *_: None)
        Merger(open_sources(recipe)).into(models[2], recipe, rounded=rounded)
    for name, tensor in models[0].state_dict().items():
        for other in models[1:]:
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_gradients_are_those_of_the_plain_way(folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(folder, Group((0.3, 0.7), (0, 2)), Group((0.5, 0.25), (2, 4)))
    model = resident(folder)
    gradients = CoefficientGradients(Merger(open_sources(recipe)), model, free=False)
    found = [gradients.of(loss, recipe) for loss in losses(model)]
    with fused.plain():
        plain = [gradients.of(loss, recipe) for loss in losses(model)]
    with monkeypatch.context() as patched:
        patched.setattr(TaskVectors, "place", lambda *_: None)
        sliced = [gradients.of(loss, recipe) for loss in losses(model)]
    for (loss, gradient), *others in zip(found, plain, sliced, strict=True):
        for other_loss, other in others:
            assert loss == other_loss
            torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12 * float(gradient.abs().max()))


def test_a_gradient_has_the_same_bits_kept_and_freed(folder: Path):
    recipe = recipe_of(folder, Group((0.3, 0.7)))
    model = resident(folder)
    merger = Merger(open_sources(recipe))
    kept, freed = (CoefficientGradients(merger, model, free=free) for free in (False, True))
    for loss in losses(model):
        (value, gradient), (own_value, own) = (gradients.of(loss, recipe) for gradients in (kept, freed))
        assert value == own_value and torch.equal(gradient, own)


def test_the_merge_shows_in_the_version_of_a_parameter(folder: Path):
    """What a graph has saved of the old numbers is then refused by autograd, not mistaken for the new ones."""
    recipe = recipe_of(folder, Group((0.3, 0.7)))
    model = resident(folder)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight._version
    Merger(open_sources(recipe)).into(model, recipe, rounded=False)
    assert weight._version > before


def test_what_has_no_place(tmp_path: Path):
    """Other types, other devices' copies, and tensors that an old writer did not align go the plain way."""
    family(tmp_path, torch.float32, 1)
    tensors = load_file(tmp_path / "expert0" / "model.safetensors")
    name = "model.norm.weight"
    base, expert = (open_checkpoint(tmp_path / part) for part in ("base", "expert0"))
    assert TaskVectors(Sources(base, [expert])).place(name) is not None
    assert TaskVectors(Sources(None, [base, expert])).place(name) is None
    sources = Sources(base, [expert])
    sources.kept[0, name] = torch.zeros(1)
    assert TaskVectors(sources).place(name) is None
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, tmp_path / "expert0" / "model.safetensors", metadata={"format": "pt"})
    mixed = TaskVectors(Sources(base, [open_checkpoint(tmp_path / "expert0")]))
    assert mixed.place(name) is None
    assert mixed.place("model.layers.0.mlp.up_proj.weight") is not None
    path = tmp_path / "base" / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    path.write_bytes((header + 1).to_bytes(8, "little") + data[8 : 8 + header] + b" " + data[8 + header :])
    shifted = open_checkpoint(tmp_path / "base")
    assert TaskVectors(Sources(shifted, [])).place(name) is None
