"""Sources with different tokens, merged: real folders, transformers' own tokenizers, and references by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from evomerge.aligned import vocabulary_names
from evomerge.checkpoints import open_checkpoint
from evomerge.collecting import Wanted, collect
from evomerge.companions import choose
from evomerge.errors import CheckpointError, SpecError
from evomerge.exporting import export
from evomerge.keeping import keep
from evomerge.merging import Merger, load_resident, open_sources
from evomerge.methods import METHODS
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.spec import load_spec
from evomerge.testing import tiny

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
X, Y, Z, W = "<|x|>", "<|y|>", "<|z|>", "<|w|>"


def make_family(folder: Path, *, tied: bool) -> Path:
    """``base``; ``plain`` without a token of its own; ``a`` with X and Y, ``b`` with Y and Z, in their own order."""
    base = tiny.save_model(folder / "base", tiny.llama_config(tie_word_embeddings=tied, num_hidden_layers=2), seed=0)
    for seed, (name, tokens) in enumerate({"plain": (), "a": (X, Y), "b": (Y, Z)}.items(), start=1):
        tiny.save_dense_expert(base, folder / name, seed=seed)
        if tokens:
            tiny.add_tokens(folder / name, tokens, seed=10 + seed)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("untied"), tied=False)


def recipe_of(family: Path, tokenizer: Any = "union", experts=("plain", "a", "b"), **keys) -> Recipe:
    data = {
        "method": "task_arithmetic",
        "base": str(family / "base"),
        "experts": {name: str(family / name) for name in experts},
        "weights": {name: 0.25 * (t + 1) for t, name in enumerate(experts)},
        "export_dtype": "float32",
        **keys,
    }
    if tokenizer is not None:
        data["tokenizer"] = tokenizer
    return Recipe.from_dict(data)


def vocabulary(folder: Path) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def by_token(folder: Path, name: str) -> dict[str, Tensor]:
    tensor = load_file(folder / "model.safetensors")[name].double()
    return {token: tensor[i] for token, i in vocabulary(folder).items()}


def expected(family: Path, recipe: Recipe, name: str, token: str) -> Tensor:
    """theta_0 + sum w tau for one token, by the rule: its own row, else the base's, else the mean of all there are."""
    rows = [by_token(family / folder, name) for folder in ("base", *(s.name for s in recipe.experts))]
    there = [r[token] for r in rows if token in r]
    base = rows[0].get(token, torch.stack(there).mean(0))
    taus = [r.get(token, base) - base for r in rows[1:]]
    return base + sum(w * tau for w, tau in zip(recipe.groups[0].weights, taus, strict=True))


def resident(recipe: Recipe) -> Any:
    sources = open_sources(recipe)
    path = sources.reference.path
    model = load_resident(path, auto_class="AutoModelForCausalLM", compute_dtype="float32", alignment=sources.alignment)
    Merger(sources).into(model, recipe)
    return model


def assert_is_the_export(recipe: Recipe, out: Path) -> None:
    """What a worker scores is what is exported, parameter by parameter and word by word."""
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model, loaded = resident(recipe), exported.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    for key in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(model.config, key) == getattr(exported.config, key)
        assert key == "vocab_size" or getattr(model.generation_config, key) == getattr(exported.generation_config, key)
    alignment = open_sources(recipe).alignment
    written = transformers.AutoTokenizer.from_pretrained(out)
    assert alignment is not None
    text = f"a {X}b{Z} {Y}{W}c"
    assert alignment.tokenizer()(text)["input_ids"] == written(text)["input_ids"]
    assert written.get_vocab() == alignment.layout.ids


@pytest.mark.parametrize("family", ["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_union_by_token(family: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(family)
    recipe = recipe_of(folder, export_dtype=dtype)
    out = export(recipe, tmp_path / "out")
    tokens = vocabulary(out)
    assert {t: i for t, i in tokens.items() if i >= 99} == {X: 99, Y: 100, Z: 101}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 102
    merged = load_file(out / "model.safetensors")
    assert (HEAD in merged) == (family == "untied")
    for name in {EMBED, HEAD} & merged.keys():
        assert merged[name].shape == (102, 32)
        for token in ("<pad>", "a", "~", X, Y, Z):
            reference = expected(folder, recipe, name, token)
            tolerance = 1e-6 if dtype == "float32" else 2**-8 * float(reference.abs().max())
            assert torch.allclose(merged[name][tokens[token]].double(), reference, rtol=0, atol=tolerance), token
        one = by_token(folder / "a", name)[X]  # only a has it: its own row, whatever the weights
        assert torch.equal(merged[name][tokens[X]].to(torch.float64), one)
    assert_is_the_export(recipe, out)


def test_it_is_the_same_recipe_and_the_same_bytes_where_vocabularies_are_equal(dense_family: Path, tmp_path: Path):
    keys = {"experts": ("expert0", "expert1")}
    plain, united = recipe_of(dense_family, None, **keys), recipe_of(dense_family, "union", **keys)
    assert "tokenizer" not in plain.to_dict()
    assert plain.hash != united.hash
    assert open_sources(united).alignment is None
    first, second = export(plain, tmp_path / "plain"), export(united, tmp_path / "united")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_other_methods_see_nothing_of_it(untied: Path, tmp_path: Path):
    """Each method gives for a token what it gives for an embedding of that token's rows alone."""
    for method, params in (("ties", {"density": 1.0}), ("linear", {})):
        recipe = recipe_of(untied, method=method, params=params)
        sources = open_sources(recipe)
        info, base, experts = sources.load(EMBED)
        assert info.shape == (102, 32) == base.shape
        out = export(recipe, tmp_path / method)
        whole = METHODS[method].merge(base, experts, weights=list(recipe.groups[0].weights), info=info, **params)
        assert torch.equal(load_file(out / "model.safetensors")[EMBED], whole.float())
        assert_is_the_export(recipe, out)


def test_slices_are_the_whole(untied: Path):
    """Gathered slice by slice, and all at once: the same numbers for base and experts."""
    sources = open_sources(recipe_of(untied))
    for name in (EMBED, HEAD):
        _, base, experts = sources.load(name)
        pieces = [[p.clone() for p in (b, *e)] for _, b, e in sources.chunks(name)]
        for source, whole in enumerate((base, *experts)):
            assert torch.equal(torch.cat([p[source] for p in pieces]), whole.flatten().float())


def test_kept_sources_have_the_same_numbers(untied: Path):
    """Copies on the device that merges (here the CPU) are of the gathered rows."""
    mapped, kept = (open_sources(recipe_of(untied)) for _ in range(2))
    keep(kept, "device", "cpu")
    assert kept.kept[-1, EMBED].shape == (102, 32)
    for (_, b, e), (_, c, f) in zip(mapped.chunks(EMBED), kept.chunks(EMBED), strict=True):
        assert all(torch.equal(x, y) for x, y in zip((b, *e), (c, *f), strict=True))


def test_an_adapter_without_a_tokenizer_as_the_host(untied: Path, tmp_path: Path):
    """Its tokens are the base's, and so is the tokenizer of the merge."""
    tiny.save_lora_expert(untied / "base", tmp_path / "lora", seed=1)
    experts = {"lora": str(tmp_path / "lora"), "a": str(untied / "a")}
    recipe = Recipe.from_dict({
        "method": "task_arithmetic", "base": str(untied / "base"), "experts": experts, "weights": 0.5,
        "tokenizer": {"source": "lora"}, "export_dtype": "float32",
    })  # fmt: skip
    out = export(recipe, tmp_path / "out")
    assert vocabulary(out) == vocabulary(untied / "base")
    assert_is_the_export(recipe, out)


def test_the_base_and_one_expert_as_hosts(tied: Path, tmp_path: Path):
    """base: no token is added, and the rows that experts added are left out. An expert: its tokens, and no others."""
    recipe = recipe_of(tied, "base")
    out = export(recipe, tmp_path / "base")
    assert vocabulary(out) == vocabulary(tied / "base")
    assert load_file(out / "model.safetensors")[EMBED].shape == (99, 32)
    assert torch.allclose(by_token(out, EMBED)["q"], expected(tied, recipe, EMBED, "q"), rtol=0, atol=1e-6)
    recipe = recipe_of(tied, {"source": "b"})
    out = export(recipe, tmp_path / "b")
    assert vocabulary(out) == vocabulary(tied / "b")
    for token in ("q", Y, Z):
        assert torch.allclose(by_token(out, EMBED)[token], expected(tied, recipe, EMBED, token), rtol=0, atol=1e-6)
    assert_is_the_export(recipe, out)


def test_rows_chosen_by_hand(untied: Path, tmp_path: Path):
    tokens = {
        Y: {"source": "b"},
        "a": {"source": "a", "force": True},
        W: {"source": {"kind": "model_token", "model": "b", "token": Z}},
        "<|0|>": {"source": {"kind": "zero"}},
        "<|id|>": {"source": {"kind": "model_token", "model": "base", "token_id": 5}},
    }
    recipe = recipe_of(untied, {"source": "union", "tokens": tokens, "pad_to_multiple_of": 16})
    out = export(recipe, tmp_path / "out")
    got, ids = by_token(out, EMBED), vocabulary(out)
    fifth = next(token for token, i in ids.items() if i == 5)
    assert [t for t, i in sorted(ids.items(), key=lambda e: e[1]) if i >= 99] == [X, Y, Z, "<|0|>", "<|id|>", W]
    a, b, base = (by_token(untied / name, EMBED) for name in ("a", "b", "base"))
    for token, row in (("a", a["a"]), (W, b[Z]), ("<|0|>", 0 * b[Z]), ("<|id|>", base[fifth])):
        assert torch.allclose(got[token], row, rtol=0, atol=1e-7), token
    mine = b[Y] + 0.5 * (a[Y] - b[Y])  # the base and plain stand at b's row, and a has its own (weight 0.5)
    assert torch.allclose(got[Y], mine, rtol=0, atol=1e-6)
    whole = load_file(out / "model.safetensors")[EMBED]
    assert whole.shape == (112, 32)
    mean = torch.stack(list(base.values())).mean(0)
    assert torch.allclose(whole[105:].double(), mean.expand(7, -1), rtol=0, atol=1e-6)
    assert_is_the_export(recipe, out)


def permuted(folder: Path, out: Path, *, specials: bool = False) -> Path:
    """The same model with its characters (and with ``specials`` also <eos>, <pad>) numbered in reverse."""
    shutil.copytree(folder, out)
    data = json.loads((out / "tokenizer.json").read_text())
    size, first = len(data["model"]["vocab"]), 0 if specials else 3
    new = {i: (first + size - 1 - i if i >= first else i) for i in range(size)}
    data["model"]["vocab"] = {t: new[i] for t, i in data["model"]["vocab"].items()}
    for entry in data["added_tokens"]:
        entry["id"] = new.get(entry["id"], entry["id"])
    (out / "tokenizer.json").write_text(json.dumps(data))
    tensors = load_file(out / "model.safetensors")
    order = torch.tensor([new.get(i, i) for i in range(len(tensors[EMBED]))])
    for name in {EMBED, HEAD} & tensors.keys():
        tensors[name] = tensors[name][order].contiguous()  # the reversal is its own inverse
    from safetensors.torch import save_file

    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_ids_that_differ_are_matched_by_token(untied: Path, tmp_path: Path):
    """Another numbering of the same tokens changes nothing of the merge, not even its bytes."""
    shutil.copytree(untied / "base", tmp_path / "base")
    shutil.copytree(untied / "plain", tmp_path / "plain")
    permuted(untied / "b", tmp_path / "b")
    shutil.copytree(untied / "a", tmp_path / "a")
    permuted(untied / "plain", tmp_path / "other")
    with pytest.raises(CheckpointError, match="96 tokens differ from the base's vocabulary"):
        open_sources(recipe_of(tmp_path, None, ("other",)))
    first, second = export(recipe_of(untied), tmp_path / "1"), export(recipe_of(tmp_path), tmp_path / "2")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert vocabulary(first) == vocabulary(second)


def test_special_tokens_follow_their_numbers(untied: Path, tmp_path: Path):
    """The vocabulary of an expert that numbers <eos> and <pad> otherwise: the configurations follow."""
    for name in ("base", "plain"):
        shutil.copytree(untied / name, tmp_path / name)
    permuted(untied / "a", tmp_path / "a", specials=True)
    recipe = recipe_of(tmp_path, {"source": "a"}, ("plain", "a"))
    out = export(recipe, tmp_path / "out")
    ids = vocabulary(out)
    assert ids["<eos>"] == 97
    for file in ("config.json", "generation_config.json"):
        data = json.loads((out / file).read_text())
        assert (data["eos_token_id"], data["pad_token_id"]) == (ids["<eos>"], ids["<pad>"]), file
    assert torch.allclose(by_token(out, EMBED)["k"], expected(tmp_path, recipe, EMBED, "k"), rtol=0, atol=1e-6)
    assert_is_the_export(recipe, out)


def test_without_a_base(untied: Path, tmp_path: Path):
    recipe = Recipe.from_dict({
        "method": "linear", "experts": {n: str(untied / n) for n in ("a", "b")}, "weights": 1,
        "tokenizer": "union", "export_dtype": "float32",
    })  # fmt: skip
    out = export(recipe, tmp_path / "out")
    a, b, got = by_token(untied / "a", EMBED), by_token(untied / "b", EMBED), by_token(out, EMBED)
    for token, row in ((X, a[X]), (Y, (a[Y] + b[Y]) / 2), (Z, b[Z]), ("q", (a["q"] + b["q"]) / 2)):
        assert torch.allclose(got[token], row, rtol=0, atol=1e-6)
    assert_is_the_export(recipe, out)


# --- adapters --------------------------------------------------------------------------------------------------------


def lora(base: Path, folder: Path, *tokens: str, train: Mapping[str, Any] | None = None) -> tuple[Path, Any]:
    """A LoRA adapter whose embeddings were resized for ``tokens`` and trained; and what PEFT merges it to."""
    from peft import LoraConfig, get_peft_model

    tok = transformers.AutoTokenizer.from_pretrained(base)
    tok.add_tokens(list(tokens), special_tokens=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tok) > model.config.vocab_size:
        model.resize_token_embeddings(len(tok), mean_resizing=False)
    settings = {"r": 4, "target_modules": ["q_proj"], **(train or {"modules_to_save": ["embed_tokens", "lm_head"]})}
    peft = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft.save_pretrained(str(folder))
    tok.save_pretrained(folder)
    return folder, peft.merge_and_unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["tied", "untied"])
def test_an_adapter_that_added_tokens(family: str, tmp_path: Path, request: pytest.FixtureRequest):
    """PEFT saves the resized embeddings whole: with one adapter at weight 1, the merge is what PEFT merges it to."""
    base = request.getfixturevalue(family) / "base"
    train: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
    if family == "tied":
        train = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    folder, merged = lora(base, tmp_path / "lora", W, Y, train=train)
    data = {"method": "task_arithmetic", "base": str(base), "experts": {"lora": str(folder)}, "weights": 1}
    with pytest.raises(CheckpointError, match=r"tokenizer: \{source: union\}"):
        open_sources(Recipe.from_dict(data))
    recipe = Recipe.from_dict({**data, "tokenizer": "union", "export_dtype": "float32"})
    out = export(recipe, tmp_path / "out")
    wanted, got = merged.state_dict(), load_file(out / "model.safetensors")
    assert got[EMBED].shape == (101, 32)
    for name, tensor in got.items():
        assert torch.allclose(tensor, wanted[name], rtol=0, atol=2e-6), name
    assert torch.equal(got[EMBED][99:], wanted[EMBED][99:])
    assert_is_the_export(recipe, out)


@pytest.mark.filterwarnings("ignore")
def test_adapters_beside_dense_experts(untied: Path, tmp_path: Path):
    """One adapter brought tokens, one has a LoRA on the embedding and the base's tokens, one touches neither."""
    family = tmp_path / "family"
    for name in ("base", "a"):
        shutil.copytree(untied / name, family / name)
    _, with_tokens = lora(family / "base", family / "tokens", Y)
    _, on_embedding = lora(family / "base", family / "lora", train={"target_modules": ["embed_tokens", "q_proj"]})
    lora(family / "base", family / "none", train={"target_modules": ["q_proj"]})
    experts = ("a", "tokens", "lora", "none")
    recipe = recipe_of(family, "union", experts)
    out = export(recipe, tmp_path / "out")
    base, a, got = by_token(family / "base", EMBED), by_token(family / "a", EMBED), by_token(out, EMBED)
    tokens = with_tokens.state_dict()[EMBED].double()
    moved = on_embedding.state_dict()[EMBED].double()
    i = vocabulary(family / "base")["q"]
    taus = [a["q"] - base["q"], tokens[i] - base["q"], moved[i] - base["q"]]
    row = base["q"] + sum(w * tau for w, tau in zip(recipe.groups[0].weights, taus, strict=False))
    assert torch.allclose(got["q"], row, rtol=0, atol=1e-6)
    mean = (a[Y] + tokens[99]) / 2
    row = mean + 0.25 * (a[Y] - mean) + 0.5 * (tokens[99] - mean)
    assert torch.allclose(got[Y], row, rtol=0, atol=1e-6)
    assert_is_the_export(recipe, out)


@pytest.mark.filterwarnings("ignore")
def test_a_token_in_rows_that_the_base_left_free(tmp_path: Path):
    """An embedding with spare rows: an expert's new token lies in one of them, with or without a new row for it."""
    base = tiny.save_model(tmp_path / "base", tiny.llama_config(vocab_size=128, num_hidden_layers=2), seed=0)
    tiny.save_dense_expert(base, tmp_path / "a", seed=1)
    tiny.add_tokens(tmp_path / "a", [X], seed=2)
    lora(base, tmp_path / "lora", W, train={"target_modules": ["q_proj"]})
    recipe = recipe_of(tmp_path, "union", ("a", "lora"))
    out = export(recipe, tmp_path / "out")
    whole, ids = load_file(out / "model.safetensors")[EMBED], vocabulary(out)
    assert whole.shape == (128, 32)
    assert (ids[X], ids[W]) == (99, 100)
    base_rows = load_file(base / "model.safetensors")[EMBED].double()
    a_rows = load_file(tmp_path / "a" / "model.safetensors")[EMBED].double()
    assert torch.equal(whole[99].double(), a_rows[99])
    assert torch.equal(whole[100].double(), base_rows[99])  # its id in the adapter is 99, whose row it left alone
    assert torch.allclose(
        whole[127].double(), base_rows[127] + 0.25 * (a_rows[127] - base_rows[127]), rtol=0, atol=1e-6
    )
    assert_is_the_export(recipe, out)


# --- stages, exports -------------------------------------------------------------------------------------------------


def test_a_stage_with_tokens_of_its_own(untied: Path, tmp_path: Path):
    """A merge of merges: the stage's union is its vocabulary, before it is built and after."""
    stage = recipe_of(untied, "union", ("a", "plain")).to_dict()
    data = {
        "method": "task_arithmetic", "base": str(untied / "base"), "weights": {"stage": 0.5, "b": 0.25},
        "experts": {"stage": {"recipe": stage}, "b": str(untied / "b")}, "export_dtype": "float32",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"shape|vocabulary"):
        open_sources(Recipe.from_dict(data))
    recipe = Recipe.from_dict({**data, "tokenizer": "union"})
    sources = open_sources(recipe)  # not built
    assert sources.alignment is not None
    assert sources.alignment.layout.ids == {**vocabulary(untied / "a"), Z: 101}
    assert sources.info(EMBED).shape == (102, 32)
    from evomerge.stages import built

    with built(recipe, tmp_path) as ready:
        out = export(ready, tmp_path / "out")
        of_stage = by_token(Path(ready.experts[0].path), EMBED)
    b, base, got = by_token(untied / "b", EMBED), by_token(untied / "base", EMBED), by_token(out, EMBED)
    row = base["q"] + 0.5 * (of_stage["q"] - base["q"]) + 0.25 * (b["q"] - base["q"])
    assert torch.allclose(got["q"], row, rtol=0, atol=1e-6)
    assert torch.allclose(got[X], of_stage[X], rtol=0, atol=1e-6)


def test_companions_of_another_vocabulary(untied: Path, tmp_path: Path):
    recipe = recipe_of(untied, "union", ("plain", "a"))
    sources = open_sources(recipe)
    assert choose("expert:a", None, recipe, sources).folder == untied / "a"  # the very tokens of the merge
    for other in ("base", "expert:plain", str(untied / "b")):
        with pytest.raises(CheckpointError, match=r"tokens? differ from the merge's vocabulary"):
            choose(other, None, recipe, sources)
    (tmp_path / "own.jinja").write_text("own: {{ messages[0].content }}")
    companions = choose(None, str(tmp_path / "own.jinja"), recipe, sources)
    tok = transformers.AutoTokenizer.from_pretrained(export(recipe, tmp_path / "out", companions=companions))
    assert tok.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "own: hi"
    assert X in tok.get_vocab()


def test_an_adapter_cannot_hold_other_tokens(untied: Path, tmp_path: Path):
    from evomerge.adapter_export import export_adapter

    tiny.save_lora_expert(untied / "base", tmp_path / "lora", seed=1)
    experts = {"lora": str(tmp_path / "lora"), "a": str(untied / "a")}
    recipe = Recipe.from_dict({
        "method": "task_arithmetic", "base": str(untied / "base"), "experts": experts, "tokenizer": "union",
        "weights": {"lora": 1, "a": 0},
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="an adapter has its base's vocabulary"):
        export_adapter(recipe, tmp_path / "out")


def test_the_same_bytes_again(untied: Path, tmp_path: Path):
    first, second = (export(recipe_of(untied), tmp_path / str(n)) for n in range(2))
    for file in sorted(p.name for p in first.iterdir()):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "bert"])
def test_tensors_with_a_row_for_each_token(kind: str, tmp_path: Path):
    """Found by what follows vocab_size: biases too, positions and token types not."""
    if kind == "mixtral":
        config: Any = tiny.mixtral_config()
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    else:
        config = transformers.BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=99
        )
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    found = vocabulary_names(open_checkpoint(tmp_path))
    assert (
        found
        == {
            "mixtral": {EMBED, HEAD},
            "gpt2": {"transformer.wte.weight"},
            "bert": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
        }[kind]
    )


# --- refused ---------------------------------------------------------------------------------------------------------


def refused(recipe: Recipe, *words: str, error: type = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        open_sources(recipe)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_names_that_are_not_there(untied: Path):
    for tokenizer, words in (
        ({"source": "c"}, ("tokenizer.source", "'c'")),
        ({"tokens": {X: {"source": "c"}}}, ("tokens.<|x|>.source", "'c'")),
        ({"tokens": {X: {"source": {"kind": "model_token", "model": "c", "token": X}}}}, ("'c'",)),
        ({"sorce": "union"}, ("sorce", "source")),
        ({"tokens": {X: {"force": True}}}, ("force needs a source",)),
        ({"tokens": {X: {"source": {"kind": "zero", "model": "a"}}}}, ("zero has none",)),
        ({"tokens": {X: {"source": {"kind": "model_token", "model": "a"}}}}, ("one of token and token_id",)),
        ({"pad_to_multiple_of": 0}, ("pad_to_multiple_of",)),
    ):
        with pytest.raises(SpecError) as caught:
            recipe_of(untied, tokenizer)
        for word in words:
            assert word in str(caught.value), str(caught.value)


def test_tokens_and_rows_that_are_not_there(untied: Path):
    def wrong(entry: dict, *words: str, token: str = W) -> None:
        refused(recipe_of(untied, {"tokens": {token: entry}}), f"tokens.{token}", *words, error=SpecError)

    wrong({}, "no model has the token", W)
    wrong({"source": "a"}, "a has no token", W)
    wrong({"source": "a"}, "a has no token", Z, token=Z)
    wrong({"source": {"kind": "model_token", "model": "b", "token": X}}, "b has no token", X)
    wrong({"source": {"kind": "model_token", "model": "b", "token_id": 101}}, "101 rows")


def test_a_source_without_a_tokenizer(untied: Path, tmp_path: Path):
    shutil.copytree(untied, tmp_path / "family")
    family = tmp_path / "family"
    for file in (family / "plain").glob("token*"):
        file.unlink()
    assert open_sources(recipe_of(family)).alignment is not None  # the base's rows: taken for the base's tokens
    for name, word in (("b", "other rows than the base's"), ("base", "others are matched to")):
        for file in (family / name).glob("token*"):
            file.unlink()
        refused(recipe_of(family), name, "has no tokenizer", word)


def test_fewer_rows_than_tokens(untied: Path, tmp_path: Path):
    shutil.copytree(untied, tmp_path / "family")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "family" / "a")
    tok.add_tokens(["<far>"])
    tok.save_pretrained(tmp_path / "family" / "a")
    refused(recipe_of(tmp_path / "family"), "expert a", "<far>", "101 rows")


def test_a_donor_with_factors(untied: Path, tmp_path: Path):
    lora(untied / "base", tmp_path / "lora", train={"target_modules": ["embed_tokens"]})
    recipe = {
        "method": "task_arithmetic", "base": str(untied / "base"), "weights": 1,
        "experts": {"low": str(tmp_path / "lora"), "a": str(untied / "a")},
        "tokenizer": {"tokens": {"q": {"source": "low", "force": True}}},
    }  # fmt: skip
    refused(Recipe.from_dict(recipe), "expert low", "LoRA on", EMBED)


def bpe(folder: Path, corpus: str, out: Path) -> Path:
    """The model in ``folder`` with a byte-level BPE tokenizer trained on ``corpus``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted({c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii()})
    trainer = trainers.BpeTrainer(
        vocab_size=98, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tok.train_from_iterator([corpus] * 5, trainer)
    shutil.copytree(folder, out)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>").save_pretrained(out)
    return out


def test_tokenizers_that_cut_text_otherwise(untied: Path, tmp_path: Path):
    bpe(untied / "base", "the cat the cat", tmp_path / "base")
    bpe(untied / "plain", "the cat the cat", tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "added")
    tiny.add_tokens(tmp_path / "added", [X], seed=1)
    bpe(untied / "plain", "dog dog dogs dogs", tmp_path / "other")
    sources = open_sources(recipe_of(tmp_path, "union", ("plain", "added")))
    assert sources.alignment is not None
    assert sources.alignment.added == (X,)
    text = f"the cat {X}the"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "added")
    assert sources.alignment.tokenizer()(text)["input_ids"] == theirs(text)["input_ids"]
    refused(recipe_of(tmp_path, "union", ("plain", "other")), "merges differ", "other", "base")
    shutil.copytree(untied / "plain", tmp_path / "words")
    refused(recipe_of(tmp_path, "union", ("plain", "words")), "WordLevel", "BPE", "words")
    shutil.copytree(untied / "base", tmp_path / "w" / "base")
    shutil.copytree(untied / "plain", tmp_path / "w" / "plain")
    data = json.loads((tmp_path / "w" / "plain" / "tokenizer.json").read_text())
    data["model"]["vocab"]["zebra"] = data["model"]["vocab"].pop("z")
    (tmp_path / "w" / "plain" / "tokenizer.json").write_text(json.dumps(data))
    refused(recipe_of(tmp_path / "w", "union", ("plain",)), "2 tokens that are no added ones differ", "'z'")


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_of_the_merges_rows(untied: Path, tmp_path: Path):
    """Fisher information is measured in the vocabulary of the experiment, and merges in another one refuse it."""
    family = tmp_path / "family"
    for name in ("base", "a", "b"):
        shutil.copytree(untied / name, family / ("base" if name == "base" else f"expert_{name}"))
    for name in "ab":
        (family / f"{name}.txt").write_text("\n".join(f"text {i} of {name} {X}{Z}" for i in range(9)))
    settings = {
        "tokenizer": "union",
        "space": {"method": "fisher", "weights": {"granularity": "task", "range": [0.1, 2.0], "initial": 1.0}},
        "search": {"method": "random", "budget": 1},
        "statistics": "stats",
        "evaluate": {
            "with": "evaluators/perplexity.py",
            "tasks": {f"expert_{name}": {"file": f"{name}.txt", "unit": "line"} for name in "ab"},
            "split": {"search": 3, "select": 3, "test": 3},
        },
    }
    spec = load_spec(tiny.write_experiment(family, **settings))
    collect(spec, Wanted(("fisher",)), Progress())
    fishers = [load_file(family / "stats" / f"expert_{name}.fisher.safetensors") for name in "ab"]
    assert all(F[EMBED].shape == F[HEAD].shape == (102, 32) for F in fishers)
    assert all(F[EMBED][99].abs().max() > 0 for F in fishers)  # X is in the texts, and has a row in both models
    recipe = recipe_of(
        family, "union", ("expert_a", "expert_b"), method="fisher", statistics=str(family / "stats"),
        params={"normalize": False},
    )  # fmt: skip
    got = load_file(export(recipe, tmp_path / "out") / "model.safetensors")[EMBED]
    rows = [by_token(family / f"expert_{name}", EMBED)["t"] for name in "ab"]
    F = [F[EMBED].double()[vocabulary(family / "base")["t"]].clamp(min=1e-6) for F in fishers]
    reference = (0.25 * F[0] * rows[0] + 0.5 * F[1] * rows[1]) / (0.25 * F[0] + 0.5 * F[1])
    assert torch.allclose(got[vocabulary(family / "base")["t"]].double(), reference, rtol=0, atol=1e-6)
    other = recipe_of(family, "base", ("expert_a", "expert_b"), method="fisher", statistics=str(family / "stats"))
    with pytest.raises(CheckpointError, match="were taken with the vocabulary"):
        export(other, tmp_path / "other")


def test_tokens_are_added_as_the_expert_has_them(untied: Path, tmp_path: Path):
    """Special or not, and with the spaces that they swallow: the entries of tokenizer.json are the expert's."""
    shutil.copytree(untied / "base", tmp_path / "base")
    shutil.copytree(untied / "plain", tmp_path / "a")
    tiny.add_tokens(tmp_path / "a", ["plain word"], seed=1, special=False)
    tiny.add_tokens(tmp_path / "a", [transformers.AddedToken(X, rstrip=True, normalized=False)], seed=2)
    out = export(recipe_of(tmp_path, "union", ("a",)), tmp_path / "out")
    mine, theirs = (json.loads((f / "tokenizer.json").read_text())["added_tokens"] for f in (out, tmp_path / "a"))
    assert mine == theirs
    assert [entry["special"] for entry in mine[-2:]] == [False, True]
