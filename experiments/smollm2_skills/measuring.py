"""Accuracy of the base, the experts and uniform merges of them, on held-out items. Plain transformers and peft."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import lora
import skills
import torch
from safetensors.torch import load_file


def interval(right: Sequence[bool]) -> tuple[float, float, float]:
    """The share of right answers and its 95% interval (Wilson, 1927)."""
    n, p, z = len(right), sum(right) / len(right), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, middle - half, middle + half


def add_adapters(model: torch.nn.Module, folder: Path, weights: dict[str, float]) -> None:
    """Add weight x scaling x B A of every adapter to the model's parameters, in float32."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        config = json.loads((folder / name / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        tensors = load_file(folder / name / "adapter_model.safetensors")
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                b = tensors[key.replace(".lora_A.", ".lora_B.")]
                target = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                parameters[target].data.add_(b.float() @ a.float(), alpha=weight * scaling)


def score(model: torch.nn.Module, tokenizer: object, data: Path, task: str, items: int) -> list[bool]:
    rows = skills.read(data, task, "eval")[-items:]
    choices = skills.SKILLS[task].choices
    if choices:
        return lora.best_choice(model, tokenizer, rows, choices)
    return lora.exact_match(model, tokenizer, rows)


def table(
    base: Path, data: Path, adapters: Path, *, tasks: Sequence[str], items: int, coefficients: Sequence[float]
) -> None:
    """Print one row a model: accuracy with its 95% interval on the last ``items`` of each task's evaluation pool."""
    merges = {f"uniform 1/{len(tasks)}": 1 / len(tasks), **{f"uniform {c:g}": c for c in coefficients}}
    models = {"base": {}, **{f"expert {t}": {t: 1.0} for t in tasks}}
    models |= {name: dict.fromkeys(tasks, c) for name, c in merges.items()}
    print("| model | " + " | ".join(tasks) + " | mean |")
    print("|---" * (len(tasks) + 2) + "|")
    for name, weights in models.items():
        model, tokenizer = lora.load(base)
        add_adapters(model, adapters, weights)
        cells, means = [], []
        for task in tasks:
            p, low, high = interval(score(model, tokenizer, data, task, items))
            cells.append(f"{p:.3f} ({low:.3f}-{high:.3f})")
            means.append(p)
        print(f"| {name} | " + " | ".join(cells) + f" | {sum(means) / len(means):.3f} |", flush=True)
