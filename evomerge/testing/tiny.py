"""Tiny model families: real transformers folders of a few thousand parameters, for tests and for trying things out."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evomerge.scaffold import SCORE

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def tokenizer():
    """A character-level tokenizer with <pad>, <eos> and <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


def llama_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 3 + len(CHARACTERS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def mixtral_config(**changes):
    from transformers import MixtralConfig

    settings = {
        "vocab_size": 3 + len(CHARACTERS), "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_local_experts": 4,
        "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    return MixtralConfig(**{**settings, **changes})


def save_model(folder: Path, config, *, seed: int, dtype: torch.dtype = torch.bfloat16, **save) -> Path:
    """A randomly initialised causal language model and its tokenizer in a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
    model.to(dtype).save_pretrained(str(folder), **save)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def save_dense_expert(base: Path, folder: Path, *, seed: int, size: float = 0.03, **save) -> Path:
    """A dense "fine-tuned" copy of ``base``: every matrix moved by normal noise of standard deviation ``size``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype))
    model.save_pretrained(folder, **save)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def add_tokens(folder: Path, tokens: Sequence[Any], *, seed: int, special: bool = True, **save) -> Path:
    """Give the model in ``folder`` more tokens, in its tokenizer and as rows of normal noise in its embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    tok.add_tokens(list(tokens), special_tokens=special)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    first = model.get_input_embeddings().weight.shape[0]
    if len(tok) > first:
        model.resize_token_embeddings(len(tok), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for token in tokens:
                row = module.weight[tok.convert_tokens_to_ids(str(token))]
                row.copy_((torch.randn(row.shape, generator=generator) * 0.15).to(row.dtype))
    model.save_pretrained(folder, **save)
    tok.save_pretrained(folder)
    return Path(folder)


def save_lora_expert(base: Path, folder: Path, *, seed: int, rank: int = 4, size: float = 0.08, **lora) -> Path:
    """A PEFT LoRA adapter on the attention and MLP projections of ``base`` with random, non-zero factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    peft_model = get_peft_model(model, LoraConfig(**{**settings, **lora}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    peft_model.save_pretrained(str(folder))
    return Path(folder)


def make_family(folder: Path, *, experts: int = 2, kind: str = "lora") -> Path:
    """``folder/base`` and ``folder/expert0`` .. : a tiny Llama with ``experts`` experts, LoRA or dense."""
    base = save_model(folder / "base", llama_config(), seed=0)
    make = save_lora_expert if kind == "lora" else save_dense_expert
    for t in range(experts):
        make(base, folder / f"expert{t}", seed=t + 1)
    return folder


def train_family(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    *,
    steps: int = 120,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """``folder/base``, trained a little on all ``texts``, and ``folder/NAME`` for each name, trained on its own.

    A few seconds on a CPU. Every expert is better than the base at its own texts and worse at the others'.

    Args:
        steps: of 16 texts each, for the base and again for each expert.
        progress: called with (steps done, steps in all).
    """
    from transformers import AutoModelForCausalLM

    everything = [text for group in texts.values() for text in group]
    base = save_model(folder / "base", llama_config(), seed=0, dtype=torch.float32)
    tok, done, total = tokenizer(), 0, steps * (1 + len(texts))
    for seed, (name, group) in enumerate({"base": everything, **texts}.items()):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        draw = random.Random(seed)
        for _ in range(steps // 4 if name == "base" else steps):
            batch = tok(draw.choices(group, k=16), padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            done += 4 if name == "base" else 1
            if progress is not None:
                progress(done, total)
        model.bfloat16().save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    return folder


EVALUATOR = (
    '''"""Mean log-likelihood of fixed texts: cheap, continuous, and different for every candidate."""

import torch


def items():
    words = ["alpha", "bravo", "carol", "delta", "eager", "fable", "gamma", "hotel"]
    return [{"task": task, "text": f"{task} {a} {b} {i}"}
            for task in ("one", "two") for i, (a, b) in enumerate((a, b) for a in words for b in words)]


'''
    + SCORE
)


def write_experiment(folder: Path, **changes) -> Path:
    """``folder/experiment.yaml`` (JSON is YAML) beside a family of ``make_family``, with a function evaluator."""
    experts = sorted(p.name for p in folder.iterdir() if p.name.startswith("expert") and p.is_dir())
    (folder / "my_eval.py").write_text(EVALUATOR)
    data = {
        "name": "tiny",
        "base": "base",
        "experts": {name: name for name in experts},
        "space": {
            "method": "task_arithmetic",
            "weights": {"granularity": "layer_groups", "groups": 2, "range": [0.0, 2.0], "initial": 1.0},
        },
        "search": {"method": "cma", "budget": 12, "population": 4},
        "evaluate": {
            "with": "my_eval.py@score",
            "tasks": {"one": {}, "two": {}},
            "split": {"search": 8, "select": 8, "test": 8},
        },
        "export_dtype": "bfloat16",
        "compute_dtype": "float32",
        "seed": 0,
    }
    data.update(changes)
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(data, indent=2))
    return path
