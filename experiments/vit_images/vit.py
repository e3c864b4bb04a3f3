"""The encoder: a small ViT, trained on all tasks together with heads, then on each alone under its frozen head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from building import Deck, Training, optimise, whole_folder
from images import SIZE
from torch import Tensor

MEAN, STD = 0.5, 0.25  # of all channels, as experiment.yaml says too
BASE = Training(steps=200, batch=64, learning_rate=1e-3)  # the batch is shared equally by the tasks
EXPERT = Training(steps=150, batch=64, learning_rate=3e-4)
Pool = tuple[np.ndarray, np.ndarray]  # images (items, 3, SIZE, SIZE) in whole numbers; labels (items,)
Head = Mapping[str, Tensor]  # weight (classes, hidden), bias (classes,)


def new(seed: int) -> Any:
    """An untrained ViT without a pooler: 17 tokens, 4 layers of width 96."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def load(folder: Path) -> Any:
    """The model without a pooler, in float32."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()


def save(model: Any, folder: Path) -> None:
    """Write a model as a Hugging Face folder, as a whole or not at all."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)


def features(model: Any, images: np.ndarray) -> Tensor:
    """(items, hidden): the last hidden state of the class token."""
    pixels = (torch.from_numpy(images).float() / 255 - MEAN) / STD
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def logits(head: Head, features: Tensor) -> Tensor:
    """(items, classes)"""
    return torch.nn.functional.linear(features, head["weight"], head["bias"])


def cross_entropy(head: Head, features: Tensor, labels: np.ndarray) -> Tensor:
    return torch.nn.functional.cross_entropy(logits(head, features), torch.from_numpy(labels))


def train_base(
    pools: Mapping[str, Pool], classes: Mapping[str, int], training: Training, report: Callable[[str], None] = print
) -> tuple[Any, dict[str, Head]]:
    """A new encoder and a head for each task, trained together on all tasks' pools; the losses count the same."""
    model = new(training.seed)
    width = model.config.hidden_size
    heads = {}
    for name, number in classes.items():
        heads[name] = {
            "weight": (torch.randn(number, width) * width**-0.5).requires_grad_(),
            "bias": torch.zeros(number, requires_grad=True),
        }
    decks = {name: Deck(len(labels), training.seed) for name, (_, labels) in pools.items()}
    share = training.batch // len(pools)

    def loss() -> Tensor:
        drawn = {name: decks[name].take(share) for name in pools}
        together = features(model, np.concatenate([pools[name][0][which] for name, which in drawn.items()]))
        parts = zip(drawn.items(), together.split(share), strict=True)
        return torch.stack(
            [cross_entropy(heads[name], part, pools[name][1][which]) for (name, which), part in parts]
        ).mean()

    parameters = [*model.parameters(), *(tensor for head in heads.values() for tensor in head.values())]
    optimise(parameters, loss, training, report)
    return model, {name: {key: value.detach() for key, value in head.items()} for name, head in heads.items()}


def train_expert(base: Path, head: Head, pool: Pool, training: Training, report: Callable[[str], None] = print) -> Any:
    """The base, tuned on one task's pool under its frozen head."""
    model, deck = load(base), Deck(len(pool[1]), training.seed)
    images, labels = pool

    def loss() -> Tensor:
        which = deck.take(training.batch)
        return cross_entropy(head, features(model, images[which]), labels[which])

    optimise(list(model.parameters()), loss, training, report)
    return model


@torch.no_grad()
def right(model: Any, head: Head, pool: Pool, batch: int = 250) -> list[bool]:
    """For each image, whether its class has the highest logit."""
    images, labels = pool
    starts = range(0, len(images), batch)
    answers = [logits(head, features(model, images[first : first + batch])).argmax(-1) for first in starts]
    return (torch.cat(answers).numpy() == labels).tolist()
