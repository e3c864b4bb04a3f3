"""The encoder: features, frozen heads made of its own embeddings of the classes' names, and the experts' training."""

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
from corpora import Task
from torch import Tensor

MAX_TOKENS = 32
SCALE = 20.0  # of the heads: logits are SCALE times the cosine (Radford et al. 2021 learn such a factor for CLIP)
WORDS = "embeddings.word_embeddings"  # half of the parameters; few of them see a gradient


@dataclass(frozen=True)
class Training:
    """How an expert is trained. AdamW, linear warm-up over the first tenth, then linear decay to zero."""

    steps: int = 60
    batch: int = 32
    learning_rate: float = 1e-4
    clip: float = 1.0
    seed: int = 0


def load(folder: Path) -> tuple[Any, Any]:
    """The model without its pooler, which nothing here uses, in float32; and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def features(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(texts, hidden): the mean over the tokens of the last hidden states, scaled to length 1."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def make_head(model: Any, tokenizer: Any, task: Task) -> Tensor:
    """(classes, hidden): SCALE times the base's features of a sentence for each class."""
    return SCALE * features(model, tokenizer, [task.prompt.format(name) for name in task.classes.values()])


def save_head(weight: Tensor, task: Task, path: Path) -> None:
    """Write a head with its classes' labels, in their order, as a whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"weight": weight.contiguous()}, temporary, metadata={"labels": json.dumps(list(task.classes))})
    temporary.rename(path)


def train(
    base: Path,
    head: Tensor,
    rows: Sequence[Mapping[str, str]],
    labels: Sequence[str],
    training: Training,
    report: Callable[[str], None] = print,
) -> Any:
    """The base, tuned on the rows under the frozen head. The same rows and settings give the same expert on the same
    machine and thread count."""
    model, tokenizer = load(base)
    torch.manual_seed(training.seed)  # dropout
    parameters = [p.requires_grad_(not name.startswith(WORDS)) for name, p in model.named_parameters()]
    parameters = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    warmup = max(1, training.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warmup, (training.steps - s) / max(1, training.steps - warmup))
    )
    draws = torch.Generator().manual_seed(training.seed)
    order: list[int] = []
    start, losses = time.monotonic(), []
    model.train()
    for step in range(1, training.steps + 1):
        if len(order) < training.batch:
            order += torch.randperm(len(rows), generator=draws).tolist()
        batch, order = [rows[i] for i in order[: training.batch]], order[training.batch :]
        logits = features(model, tokenizer, [row["text"] for row in batch]) @ head.T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([labels.index(row["label"]) for row in batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0 or step == training.steps:
            mean = sum(losses[-20:]) / len(losses[-20:])
            report(f"  step {step}/{training.steps}  loss {mean:.4f}  {(time.monotonic() - start) / step:.2f} s/step")
    return model.eval()


def save(model: Any, base: Path, folder: Path) -> None:
    """Write a model with the base's tokenizer as a Hugging Face folder, as a whole or not at all."""
    from transformers import AutoTokenizer

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(base).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@torch.no_grad()
def right(
    model: Any, tokenizer: Any, head: Tensor, rows: Sequence[Mapping[str, str]], labels: Sequence[str], batch: int = 64
) -> list[bool]:
    """For each row, whether its class has the highest logit."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))
    answers = [False] * len(rows)
    for first in range(0, len(rows), batch):
        chosen = order[first : first + batch]
        logits = features(model, tokenizer, [rows[i]["text"] for i in chosen]) @ head.T
        for i, k in zip(chosen, logits.argmax(-1).tolist(), strict=True):
            answers[i] = labels[k] == rows[i]["label"]
    return answers
