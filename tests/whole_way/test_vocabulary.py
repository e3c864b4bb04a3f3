"""A search over experts that added tokens, by the command line: what is scored is what is exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from evomerge.testing import tiny

from .support import Server, candidates, files

X, Y = "<|x|>", "<|y|>"
# The same text for every candidate, with the tokens that the experts added: cut by whatever tokenizer is given.
EVALUATOR = tiny.EVALUATOR.replace('{task} {a} {b} {i}"', '<|x|>{task} {a}<|y|>{b} {i}"')


@pytest.fixture
def family(dense_family: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(dense_family, tmp_path / "family")
    tiny.add_tokens(folder / "expert0", [X, Y], seed=1)
    tiny.add_tokens(folder / "expert1", [Y], seed=2)
    return folder


@pytest.mark.slow
def test_a_study_of_experts_that_added_tokens(server: Server, experiment: Callable[..., Path], family: Path):
    keys = {
        "search": {"method": "random", "budget": 3},
        "evaluate": {"with": "my_eval.py@score", "tasks": {"one": {}}, "split": {"search": 4, "select": 4, "test": 4}},
    }
    assert "tokenizer: {source: union}" in server.run(
        "run", "--dry-run", experiment(family, folder="plain", **keys), code=2
    ).err  # fmt: skip
    path = experiment(family, tokenizer="union", **keys)
    (path.parent / "my_eval.py").write_text(EVALUATOR)
    here = {"cwd": path.parent}
    shown = server.run("run", "--dry-run", "experiment.yaml", **here).out
    assert f"tokenizer    union: 101 tokens, 2 added ({X}, {Y}); 101 rows" in shown
    server.run("run", "experiment.yaml", **here)
    before = candidates(path)

    server.run("export", "experiment.yaml", "--out", "merged", **here)
    ids = transformers.AutoTokenizer.from_pretrained(path.parent / "merged").get_vocab()
    assert (ids[X], ids[Y]) == (99, 100)
    for what in ("merged", "merged/recipe.yaml"):
        again = server.run("evaluate", what, "experiment.yaml", "--split", "test", "--compare", **here)
        assert "identical" in again.out
    server.run("merge", "merged/recipe.yaml", "--out", "repeated", **here)
    for file in files(path.parent / "merged") - {"README.md", "evomerge_manifest.json"}:  # the card knows the study
        assert (path.parent / "merged" / file).read_bytes() == (path.parent / "repeated" / file).read_bytes(), file
    own = server.run("evaluate", "expert0", "experiment.yaml", "--split", "test", **here)  # with its own tokenizer
    assert "one" in own.out
    assert "another" in server.run("export", "experiment.yaml", "--out", "x", "--as", "adapter", code=2, **here).err

    server.run("resume", "experiment.yaml", "--budget", "4", **here)
    trials = [c for c in candidates(path) if isinstance(c[0], int)]
    assert trials[:3] == [c for c in before if isinstance(c[0], int)]
    assert len(trials) == 4
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "tokenizer": "base"}))
    assert "tokenizer" in server.run("resume", "experiment.yaml", code=2, **here).err
    path.write_text(json.dumps({**data, "tokenizer": {"source": "union", "tokens": {"<|no|>": {}}}}))
    assert "no model has the token" in server.run("resume", "experiment.yaml", code=2, **here).err


@pytest.mark.slow
def test_checkpoints_on_disk_have_the_tokens(server: Server, experiment: Callable[..., Path], family: Path):
    """An evaluator that loads a written candidate itself finds the merge's tokenizer and embeddings there."""
    path = experiment(
        family,
        tokenizer={"source": "union", "pad_to_multiple_of": 8},
        search={"method": "random", "budget": 1},
        evaluate={"with": "my_eval.py", "tasks": {"one": {}}, "split": {"search": 4, "select": 4, "test": 4}},
    )
    (path.parent / "my_eval.py").write_text(ON_DISK)
    here = {"cwd": path.parent}
    server.run("run", "experiment.yaml", **here)
    server.run("export", "experiment.yaml", "--out", "merged", **here)
    assert json.loads((path.parent / "merged" / "config.json").read_text())["vocab_size"] == 104
    again = server.run("evaluate", "merged", "experiment.yaml", "--split", "test", "--compare", **here)
    assert "identical" in again.out


ON_DISK = """
import torch
import transformers

from evomerge import Evaluator, Item, Outcome

TEXTS = {f"{a}{b}": f"<|x|>{a}<|y|>{b}" for a in "abcdef" for b in "uvwxyz"}


class Loaded(Evaluator):
    needs = "checkpoint"

    def load(self):
        return [Item(i, "one", text) for i, text in TEXTS.items()]

    def prepare(self, target, items):
        assert target is None

    def evaluate(self, target, item_ids):
        model = transformers.AutoModelForCausalLM.from_pretrained(target.checkpoint, dtype=torch.float32)
        tok = transformers.AutoTokenizer.from_pretrained(target.checkpoint)
        outcomes = []
        for i in item_ids:
            ids = torch.tensor([tok(TEXTS[i])["input_ids"]])
            assert ids.shape == (1, 4)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            each = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])
            outcomes.append(Outcome(i, {"score": each.mean().item()}))
        return outcomes
"""
