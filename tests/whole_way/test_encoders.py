"""Encoders of texts and of images go the whole way: models without a head, with frozen heads in files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evomerge.testing import tiny

from .support import Server, json_of, store

WIDTH = 32


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config)


def vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4,
        num_channels=1, initializer_range=0.3,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def write_family(folder: Path, kind: str) -> Path:
    """A base and two experts, two tasks with their data and heads, and the experiment file, whose path is returned."""
    draw, generator = random.Random(1), np.random.default_rng(1)
    torch.manual_seed(0)
    model = (bert if kind == "texts" else vit)()
    for name in ("base", "left", "right"):
        model.save_pretrained(folder / name)
        if kind == "texts":
            tiny.tokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tasks = {}
    for task in ("one", "two"):
        save_file({"weight": torch.randn(3, WIDTH)}, folder / f"{task}.safetensors")
        if kind == "texts":
            file = f"{task}.jsonl"
            rows = [{"text": "".join(draw.choices("abcdefgh", k=20)), "label": i % 3} for i in range(40)]
            (folder / file).write_text("\n".join(json.dumps(row) for row in rows))
        else:
            file = f"{task}.npz"
            np.savez(folder / file, images=generator.random((40, 1, 8, 8)), labels=np.arange(40) % 3)
        tasks[task] = {"file": file, "head": f"{task}.safetensors", "metric": "loglikelihood"}
    tasks["two"]["metric"] = "macro_f1"
    experiment = {
        "name": "tiny",
        "base": "base",
        "experts": {"left": "left", "right": "right"},
        "space": "search_spaces/module.yaml",
        "search": {"method": "sobol", "budget": 5},
        "evaluate": {
            "with": "evaluators/classification.py",
            "tasks": tasks,
            "split": {"search": 12, "select": 12, "test": 12},
            "finish": {"top": 2, "sweep": [0.5, 1.0]},
        },
    }
    (folder / "experiment.yaml").write_text(json.dumps(experiment))
    return folder / "experiment.yaml"


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_an_encoder_goes_the_whole_way(server: Server, tmp_path: Path, kind: str):
    path = write_family(tmp_path / "family", kind)
    server.run("run", path)
    out = tmp_path / "winner"
    server.run("export", path, "--out", out)

    study = store(path)
    assert len({round(t.score, 9) for t in study.trials()}) > 1
    board = json_of(server.run("leaderboard", path, "--format", "json"))
    winner = next(row for row in board["select"] if row["subject"] == study.record["rounds"][-1]["winner"])
    assert winner["score"]["low"] < winner["score"]["high"], "a macro F1 has its interval by the evaluator's own rule"
    compared = server.run("evaluate", out, path, "--split", "test", "--compare").out
    assert "identical" in compared

    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert all(name.startswith("pooler.") for name in info["missing_keys"]) and not info["unexpected_keys"]
    assert model.config.hidden_size == WIDTH
