"""A folder of lm-eval tasks, and the tiny model that they are asked of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.evaluation import Target

ITEMS = 40  # of each task
MC = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
}


@pytest.fixture(scope="session")
def target(lora_family: Path) -> Target:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lora_family / "base", dtype=torch.float32).eval()
    return Target(model, AutoTokenizer.from_pretrained(lora_family / "base"))


def words(generator: random.Random, least: int, most: int) -> str:
    return " ".join(
        "".join(generator.choices("abcdeghiklmnorstu", k=generator.randint(2, 6)))
        for _ in range(generator.randint(least, most))
    )


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Path:
    """Six tasks as YAML on JSON: what a user's own folder of tasks looks like."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(5)

    def rows(n: int) -> list[dict[str, Any]]:
        made = []
        for i in range(n):
            choices = [words(draw, 1, 3) for _ in range(4)]
            made.append(
                {
                    "question": f"{words(draw, 2, 7)} {i}?",
                    "choices": choices,
                    "label": i % 4,
                    "text": words(draw, 5, 90),
                }
            )
        return made

    def greedy(prompt: str) -> str:
        ids = torch.tensor([target.tokenizer(prompt)["input_ids"]])
        made = target.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        return target.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    data = {"test": rows(ITEMS), "validation": rows(14), "train": rows(20)}
    for i, row in enumerate(data["test"] + data["validation"]):
        row["answer"] = greedy(row["question"]) if i % 2 else "no"  # a random model would never be right by itself
    for row in data["train"]:
        row["answer"] = "yes"
    for split, made in data.items():
        (folder / f"{split}.json").write_text(json.dumps(made))

    def task(name: str, *, splits: tuple[str, ...] = ("test",), **config: Any) -> None:
        files = {split: str(folder / f"{split}.json") for split in data}
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, **config}
        config |= {f"{'training' if split == 'train' else split}_split": split for split in splits}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def metrics(*names: str, better: bool = True) -> list[dict[str, Any]]:
        return [{"metric": n, "aggregation": "mean", "higher_is_better": better} for n in names]

    generation = {"until": ["z", "q "], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    task("choice", **MC, metric_list=metrics("acc", "acc_norm"))
    task("shots", **MC, metric_list=metrics("acc"), fewshot_split="train", num_fewshot=2, description="Pick one.\n")
    task(
        "blank",  # the choices are the contexts, as in winogrande
        output_type="multiple_choice", doc_to_text="label", doc_to_choice="{{choices}}", doc_to_target="question",
        metric_list=metrics("acc"),
    )  # fmt: skip
    task(
        "write",
        output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{answer}}",
        generation_kwargs=generation, metric_list=metrics("exact_match"),
    )  # fmt: skip
    first = [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]
    task(
        "filtered",
        output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{answer[:1]}}",
        generation_kwargs=generation, metric_list=metrics("exact_match"), target_delimiter="",
        filter_list=[{"name": "all", "filter": [{"function": "take_first"}]}, {"name": "first", "filter": first}],
    )  # fmt: skip
    task(
        "last_word",
        output_type="loglikelihood", doc_to_text="{{question}}", doc_to_target=" {{choices[0]}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, *metrics("acc")],
    )  # fmt: skip
    perplexities = [
        {"metric": name, "aggregation": how, "higher_is_better": False}
        for name, how in [("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte")]
    ]
    task(
        "whole", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=perplexities
    )
    task("own_splits", splits=("test", "validation", "train"), **MC, metric_list=metrics("acc"))
    task("no_examples", **MC, metric_list=metrics("acc"), fewshot_split="test", num_fewshot=5)
    return folder
