"""`evomerge init`: a folder with a tiny family and an experiment that runs at once, to be made one's own."""

from __future__ import annotations

import runpy
import textwrap
from collections.abc import Callable
from pathlib import Path

from evomerge.writing import whole_folder

EXPERIMENT = """\
# An experiment on a tiny family that `evomerge init` made. It runs as it is, in about a minute:
#
#     evomerge run experiment.yaml
#
# Make it your own from top to bottom. `evomerge run --dry-run experiment.yaml` checks everything and starts nothing;
# `evomerge schema` prints a JSON schema for your editor.

name: {name}

# The common ancestor of the experts: a folder with a model in safetensors, or its id on the Hugging Face hub, such as
# HuggingFaceTB/SmolLM2-135M or org/name@revision, which is fetched once and recorded by its commit.
base: models/base

# Fine-tuned checkpoints of the base, or PEFT LoRA adapters of it, by names of your choice: folders or ids, or recipes
# (files that say what to merge) for what they make.
experts:
  count: models/count
  letters: models/letters

# What may move. Ready-made spaces are named like  space: search_spaces/task.yaml
# {spaces}
# `evomerge methods` lists the methods and their parameters.
space:
  method: task_arithmetic
  weights: {{granularity: layer_groups, groups: 2, range: [0.0, 1.5], initial: 0.5}}

# {searchers}
# cma is CMA-ES. More dimensions need more candidates.
search: {{method: cma, budget: 40}}

# What candidates are evaluated on. With my_eval.py, a function of yours; with evaluators/harness.py, lm-eval tasks:
#     with: evaluators/harness.py
#     tasks: {{arc_easy: {{}}, gsm8k: {{num_fewshot: 5, limit: 400}}}}
evaluate:
  with: my_eval.py@score
  tasks: {{count: {{}}, letters: {{}}}}
  # Items a task. The search learns from the first, the second pick the winner, the third say what it is worth.
  split: {{search: 20, select: 40, test: 60}}

# How the tasks' scores become one: mean or min. `evomerge schema` says how to have scores relative to those of base or
# experts, constraints, or several objectives.
objective: mean

# One worker runs on this machine without Ray. For more: {{count: 4, gpus: 1, device: cuda}}.
workers: {{count: 1}}

export_dtype: bfloat16   # what merged weights are rounded to, in search and export
compute_dtype: float32   # what the workers compute in
seed: 0
"""

SCORE = '''\
def score(model, tokenizer, items):
    """One finite number an item, higher is better; a function of model and item alone."""
    scores = []
    for item in items:
        ids = torch.tensor([tokenizer(item["text"])["input_ids"]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        scores.append(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).mean().item())
    return scores
'''

EVALUATOR = (
    '''\
"""What the search is after: two functions, of which evomerge calls one for the questions and one for the answers.

Here: how likely a model finds counting and spelling on, as the mean log-likelihood of a character.
"""

import torch


def items():
    """All questions. `task` is one of the experiment's; everything else is yours (plain JSON data)."""
    count = [{"task": "count", "text": " ".join(str(start + step * i) for i in range(6))}
             for step in (1, 2, 3) for start in range(1, 61)]
    letters = [{"task": "letters", "text": " ".join(chr(97 + (start + step * i) % 26) for i in range(length))}
               for step in (1, 2, 25) for start in range(26) for length in (8, 9)]
    return count + letters


'''
    + SCORE
)


def scaffold(out: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Make the folder ``out``: an experiment, its evaluator, and a tiny family that was trained on its tasks.

    Args:
        out: a folder that does not exist yet, or is empty. It is there as a whole or not at all.
        progress: called with (training steps done, steps in all).

    Returns ``out``. Raises CheckpointError if ``out`` is not empty.
    """
    from evomerge.testing.tiny import train_family

    out = Path(out).absolute()
    with whole_folder(out) as folder:
        (folder / "experiment.yaml").write_text(_experiment(_name(out.name)), encoding="utf-8")
        (folder / "my_eval.py").write_text(EVALUATOR, encoding="utf-8")
        texts: dict[str, list[str]] = {}
        for item in runpy.run_path(str(folder / "my_eval.py"))["items"]():
            texts.setdefault(item["task"], []).append(item["text"])
        train_family(folder / "models", texts, progress=progress)
    return out


def _experiment(name: str) -> str:
    """The experiment file; what there is to choose from is named by those who know."""
    from evomerge.searchers import SEARCHERS
    from evomerge.spec import shipped

    spaces = sorted(path.stem for path in shipped("search_spaces").glob("*.yaml") if path.stem != "task")
    width = {"width": 118, "break_long_words": False, "break_on_hyphens": False}
    lists = {
        "searchers": textwrap.fill(f"How to search: {', '.join(SEARCHERS)}.", **width).replace("\n", "\n# "),
        "spaces": textwrap.fill(f"(also {', '.join(spaces)});", **width).replace("\n", "\n# "),
    }
    return EXPERIMENT.format(name=name, **lists)


def _name(folder: str) -> str:
    """A study's name from a folder's."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "-" for c in folder).strip("-.")
    return kept[:100] or "my-search"
