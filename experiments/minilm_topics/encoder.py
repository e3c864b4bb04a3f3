"""The encoder: features, frozen heads made of its own embeddings of the classes' names, and the experts' training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from building import Deck, Training, optimise, whole_folder
from corpora import Task
from torch import Tensor

MAX_TOKENS = 32
SCALE = 20.0  # of the heads: logits are SCALE times the cosine (Radford et al. 2021 learn such a factor for CLIP)
WORDS = "embeddings.word_embeddings"  # half of the parameters; few of them see a gradient
EXPERT = Training(steps=60, batch=32, learning_rate=1e-4)


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
    deck = Deck(len(rows), training.seed)

    def loss() -> Tensor:
        batch = [rows[i] for i in deck.take(training.batch)]
        logits = features(model, tokenizer, [row["text"] for row in batch]) @ head.T
        return torch.nn.functional.cross_entropy(logits, torch.tensor([labels.index(row["label"]) for row in batch]))

    model.train()
    optimise(parameters, loss, training, report)
    return model.eval()


def save(model: Any, base: Path, folder: Path) -> None:
    """Write a model with the base's tokenizer as a Hugging Face folder, as a whole or not at all."""
    from transformers import AutoTokenizer

    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(base).save_pretrained(temporary)


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
