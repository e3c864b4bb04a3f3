"""RegMean++ layer by layer, against a loop over the layers of plain transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.evaluation import EvaluatorContext, Target, TaskSpec, load_evaluator
from evomerge.merging import Merger, load_resident, open_sources
from evomerge.methods import merge_state_dicts
from evomerge.prefix import merged_grams, num_steps
from evomerge.recipe import Group, Recipe, Source
from evomerge.testing import tiny

PERPLEXITY = Path(__file__).parents[1] / "evaluators" / "perplexity.py"
TEXTS = [["abc de", "hello there"], ["a", "the quick brown fox", "lazy dogs"]]


def measured(family: Path, experts: tuple[str, ...], texts: list[list[str]], rho: float = 0.9) -> tuple[Any, Any, list]:
    """(merger, model, statistics) of the experts on their own texts."""
    recipe = Recipe(
        Source("base", str(family / "base")),
        tuple(Source(f"e{t}", str(family / name)) for t, name in enumerate(experts)),
        "linear",
        (Group((1.0,) * len(experts)),),
    )
    tasks = {}
    for t, lines in enumerate(texts):
        (family / f"texts{t}.txt").write_text("\n".join(lines))
        tasks[f"e{t}"] = TaskSpec(f"e{t}", options={"file": f"texts{t}.txt", "unit": "line"})
    evaluator = load_evaluator(str(PERPLEXITY), EvaluatorContext(family, tasks))
    model = load_resident(family / "base", auto_class="AutoModelForCausalLM", compute_dtype="float32")
    target, items = Target(model, tiny.tokenizer()), evaluator.load()
    evaluator.prepare(target, items)
    ids = [[item.id for item in items if item.task == task] for task in tasks]
    merger = Merger(open_sources(recipe))
    counts: list[int] = []
    found = merged_grams(merger, evaluator, target, ids, rho=rho, export_dtype=torch.float32, advance=counts.append)
    assert len(counts) <= num_steps(merger) * len(items)
    return merger, model, found


@pytest.fixture
def family(tmp_path: Path) -> Path:
    base = tiny.save_model(tmp_path / "base", tiny.llama_config(tie_word_embeddings=False), seed=0, dtype=torch.float32)
    tiny.save_dense_expert(base, tmp_path / "dense", seed=1)
    tiny.save_lora_expert(base, tmp_path / "lora", seed=2)
    return tmp_path


def whole(family: Path, name: str) -> dict[str, torch.Tensor]:
    """An expert's dense weights, by PEFT where it is an adapter."""
    from peft import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(family / ("base" if name == "lora" else name))
    if name == "lora":
        model = PeftModel.from_pretrained(model, str(family / name)).merge_and_unload()
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


@torch.no_grad()
def test_each_layer_is_merged_on_what_the_merged_layers_before_it_give(family: Path):
    """The reference knows transformers' own layers and regmean on whole state dicts, nothing of hooks."""
    _, model, found = measured(family, ("dense", "lora"), TEXTS)
    base, experts = whole(family, "base"), [whole(family, "dense"), whole(family, "lora")]
    mean = {name: (experts[0][name] + experts[1][name]) / 2 for name in base}
    merged = AutoModelForCausalLM.from_pretrained(family / "base")
    merged.load_state_dict(mean)
    ids = [[torch.tensor([[1, *tiny.tokenizer()(text)["input_ids"]]])[:, :-1] for text in lines] for lines in TEXTS]
    for layer in range(4):
        grams: list[dict[str, torch.Tensor]] = []
        for expert, rows in zip(experts, ids, strict=True):
            trial = {n: expert[n] if f".layers.{layer}." in n else t for n, t in merged.state_dict().items()}
            probe: Any = AutoModelForCausalLM.from_pretrained(family / "base")
            probe.load_state_dict(trial)
            block = probe.model.layers[layer]
            X = []
            for row in rows:
                hidden = probe(row, output_hidden_states=True).hidden_states[layer]
                X.append(block.input_layernorm(hidden)[0])
            grams.append(
                {f"model.layers.{layer}.self_attn.q_proj.weight": torch.cat(X).T @ torch.cat(X) / len(torch.cat(X))}
            )
        for name in grams[0]:
            for theirs, ours in zip(grams, found, strict=True):
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        names = [name for name in base if f".layers.{layer}." in name]
        parts = [{name: weights[name] for name in names} for weights in (base, *experts)]
        done = merge_state_dicts(
            "regmean", parts[0], parts[1:], statistics=[{n: G[n] for n in names if n in G} for G in found]
        )
        merged.load_state_dict({**merged.state_dict(), **done})
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-4, atol=1e-5)
    # The head is last: its inputs are the final states of the merged model.
    states = [merged.model(row).last_hidden_state[0] for row in ids[0]]
    X = torch.cat(states)
    torch.testing.assert_close(found[0]["lm_head.weight"], X.T @ X / len(X), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_merge_by_these_statistics_is_the_model_that_was_built(family: Path):
    merger, model, found = measured(family, ("dense", "lora"), TEXTS, rho=0.7)
    tensors = {name: merger.sources.load(name) for name in merger.sources.names}
    base = {name: base for name, (_, base, _) in tensors.items()}
    experts = [{name: loaded[t] for name, (_, _, loaded) in tensors.items()} for t in range(2)]
    merged = merge_state_dicts("regmean_pp", base, experts, statistics=found, rho=0.7)
    for name, tensor in merged.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@torch.no_grad()
def test_equal_experts_stay_what_they_are(family: Path):
    _, model, _ = measured(family, ("dense", "dense"), TEXTS)
    for name, tensor in whole(family, "dense").items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
