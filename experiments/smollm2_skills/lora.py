"""Training of the LoRA experts, and plain scoring of any model: exact match for all answers, greedy."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
END = "\n"  # follows every answer


@dataclass(frozen=True)
class Training:
    """How an expert is trained. AdamW, linear warm-up over the first tenth, then linear decay to zero."""

    steps: int = 120
    batch: int = 16
    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 16
    clip: float = 1.0
    seed: int = 0


# As few steps as give about nine right answers of ten. At a higher rate, experts learn faster, but merge badly.
TRAINING = {"add": Training(steps=80), "topic": Training(steps=40), "sort": Training(steps=50)}


def card(name: str, training: Training, examples: int) -> str:
    """The README of an adapter."""
    return (
        f"# {name}\n\nA LoRA adapter (rank {training.rank}, alpha {training.alpha}, all linear layers, bfloat16) of "
        f"SmolLM2-135M-Instruct for the\ntask `{name}` of this experiment: {training.steps} steps of {training.batch}"
        f" on {examples} examples, learning rate {training.learning_rate:g}, seed {training.seed}.\nBuilt by "
        f"`python experiments/smollm2_skills/build.py experts --tasks {name} --force` against the base that its\nstep "
        "`base` makes. Licence: Apache-2.0.\n"
    )


def load(base: Path) -> tuple[Any, Any]:
    """The base in float32 and its tokenizer, set to pad on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tokenizer


def encode(tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of each row. The two are encoded apart, so no token can straddle them."""
    return [(tokenizer(row["prompt"]).input_ids, tokenizer(row["answer"] + END).input_ids) for row in rows]


def train(
    base: Path, rows: Sequence[Mapping[str, str]], training: Training, report: Callable[[str], None] = print
) -> Any:
    """Train one adapter on the rows and return the PEFT model. The same rows and settings give the same adapter on
    the same machine and thread count."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(base)
    torch.manual_seed(training.seed)  # the adapter's first values
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    warmup = max(1, training.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warmup, (training.steps - s) / max(1, training.steps - warmup))
    )
    draws = torch.Generator().manual_seed(training.seed)
    encoded = encode(tokenizer, rows)
    order: list[int] = []
    start, losses = time.monotonic(), []
    for step in range(1, training.steps + 1):
        if len(order) < training.batch:
            order += torch.randperm(len(encoded), generator=draws).tolist()
        batch, order = [encoded[i] for i in order[: training.batch]], order[training.batch :]
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0 or step == training.steps:
            mean = sum(losses[-10:]) / len(losses[-10:])
            report(f"  step {step}/{training.steps}  loss {mean:.4f}  {(time.monotonic() - start) / step:.2f} s/step")
    return model.eval()


def answer_loss(model: Any, batch: Sequence[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens. Logits are computed where an answer token is predicted, only."""
    length = max(len(p) + len(a) for p, a in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(batch):
        n = len(prompt) + len(answer)
        ids[row, :n] = torch.tensor(prompt + answer)
        mask[row, :n] = 1
        labels[row, len(prompt) : n] = torch.tensor(answer)
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = causal.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])


def save_adapter(model: Any, folder: Path, card: str) -> None:
    """Write the adapter in bfloat16, with a config that names no path of this machine, as a whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    from safetensors.torch import load_file, save_file

    weights = {
        k: v.to(torch.bfloat16).contiguous() for k, v in load_file(temporary / "adapter_model.safetensors").items()
    }
    save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((temporary / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
    config["target_modules"] = sorted(config["target_modules"])
    (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (temporary / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], batch: int = 50) -> list[bool]:
    """For each row, whether the greedy continuation up to the end of the line is the answer."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    longest = max(len(tokenizer(row["answer"]).input_ids) for row in rows)
    right = [False] * len(rows)
    for first in range(0, len(rows), batch):
        chosen = order[first : first + batch]
        inputs = tokenizer([rows[i]["prompt"] for i in chosen], return_tensors="pt", padding=True)
        output = model.generate(
            **inputs, max_new_tokens=longest + 1, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            right[i] = text.split(END)[0].strip() == rows[i]["answer"].strip()
    return right


@torch.no_grad()
def best_choice(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], choices: Sequence[str], batch: int = 50
) -> list[bool]:
    """For each row, whether its answer is the most likely of ``choices``, all of which must be single tokens."""
    ids = [tokenizer(choice).input_ids for choice in choices]
    if any(len(i) != 1 for i in ids):
        raise ValueError(f"every choice must be one token, but {dict(zip(choices, ids, strict=True))}")
    tokens = torch.tensor([i[0] for i in ids])
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    right = [False] * len(rows)
    for first in range(0, len(rows), batch):
        chosen = order[first : first + batch]
        inputs = tokenizer([rows[i]["prompt"] for i in chosen], return_tensors="pt", padding=True)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1, tokens]
        for i, k in zip(chosen, logits.argmax(-1).tolist(), strict=True):
            right[i] = choices[k] == rows[i]["answer"]
    return right
