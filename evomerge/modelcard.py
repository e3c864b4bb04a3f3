"""The README.md of an exported merge: what was merged, how, and how well it did, as far as that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge import __version__
from evomerge.hub import HubId, hub_id
from evomerge.recipe import Group, Recipe, Source

MOST_ROWS = 64  # groups that a card shows
NOT_PLAIN = (  # what must be said of adapters behind a merge wherever it is handed on
    "Not a plain checkpoint: the scores of the study need the adapters in surgery.safetensors, which transformers does "
    "not load. Of a task TASK take the model's pooled features Z (items, width) before they are normalised and go into "
    "the task's head, and put Z' = Z - ReLU(Z down^T) up^T in their place, by the tensors TASK.down (rank, width) and "
    "TASK.up (width, rank). Without this step the weights are an ordinary checkpoint, the merge alone."
)


def model_card(recipe: Recipe, config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Markdown with a YAML head.

    Args:
        recipe: what was merged.
        config: the base's config.json.
        card: what a study knows; every key may be absent. ``study`` and ``subject`` (names), ``scores`` (split ->
            {objective, objectives: {name: value} of several, misses: constraints in words, tasks: {task: {score,
            items}}}), ``objective`` (what it is, a line each; none for a plain mean or minimum), ``metrics`` (task ->
            metric), ``compute_dtype``, ``libraries`` (name -> version); ``tokenizer`` and ``chat_template``, where they
            are not the base's.
    """
    head = {"library_name": "transformers", "tags": ["merge", "evomerge", *recipe.methods]}
    on_hub = [found.repo for _, source, _ in all_sources(recipe) if (found := _on_hub(source)) is not None]
    if on_hub:
        head |= {"base_model": list(dict.fromkeys(on_hub)), "base_model_relation": "merge"}
    note = ""
    if recipe.surgery is not None:
        head["tags"].append("representation-surgery")
        source = "Representation surgery: Yang et al. 2024, [arXiv:2402.02705](https://arxiv.org/abs/2402.02705)."
        with_scores = " The scores below are with the adapters." if card.get("scores") else ""
        note = f"**{NOT_PLAIN.replace(':', ':**', 1)}{with_scores} {source} `evomerge evaluate` applies them."
    return _card(recipe, config, card, head, f"written in {recipe.export_dtype}", note)


def adapter_card(recipe: Recipe, config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The same for a merge that was written as a LoRA adapter."""
    assert recipe.base is not None
    head: dict[str, Any] = {"library_name": "peft", "tags": ["merge", "evomerge", "lora", *recipe.methods]}
    on_hub = _on_hub(recipe.base)
    if on_hub is not None:
        head |= {"base_model": on_hub.repo, "base_model_relation": "adapter"}
    base = f"`{on_hub}`" if on_hub else f"`{_cell(recipe.base.name)}` below"
    note = (
        f"It belongs to the base {base}"
        + (f", whose content has the SHA-256 `{recipe.base.sha256}`" if recipe.base.sha256 else "")
        + ": `PeftModel.from_pretrained(base_model, FOLDER)`.\n\nThe experts' factors stand side by side in it, their "
        "weights multiplied in: its task vector is the merge's own. A merged checkpoint would be rounded to "
        f"{recipe.export_dtype} once the base is added, this is not: the scores of both are equal within rounding only"
        + (", and those below are of merged checkpoints." if card.get("scores") else ".")
    )
    return _card(recipe, config, card, head, "written as a LoRA adapter", note)


def _card(
    recipe: Recipe, config: Mapping[str, Any], card: Mapping[str, Any], head: dict[str, Any], how: str, note: str = ""
) -> str:
    architecture = next(iter(config.get("architectures") or []), config.get("model_type", "model"))
    title = card.get("study") or "Merged model"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_cell(title)}",
        f"A merge of {_count(len(recipe.experts), 'expert')} of one base ({_cell(architecture)}) by "
        f"{listed([f'`{method}`' for method in recipe.methods])}, {how} by evomerge {__version__}."
        + (f" It is `{_cell(card['subject'])}` of the study." if card.get("subject") else ""),
        *([note] if note else []),
        _sources(recipe),
        _weights(recipe),
    ]
    if card.get("scores"):
        parts.append(_scores(card))
    facts = [f"Computed in {card['compute_dtype']}."] if card.get("compute_dtype") else []
    if recipe.tokenizer is not None:
        facts.append(f"Vocabulary: {_cell(str(recipe.tokenizer.source))}, as the recipe's `tokenizer` says.")
    for key in ("tokenizer", "chat_template"):
        if card.get(key):
            scored = " The scores were taken with the base's." if card.get("scores") else ""
            facts.append(f"{key.replace('_', ' ').capitalize()}: {_cell(card[key])}.{scored}")
    if card.get("libraries"):
        facts.append("Libraries: " + ", ".join(f"{_cell(n)} {_cell(v)}" for n, v in card["libraries"].items()) + ".")
    parts += facts
    parts.append(
        f"Recipe `{recipe.hash}`: `recipe.yaml` holds all of its numbers, `evomerge merge recipe.yaml` repeats it."
    )
    return "\n\n".join(parts) + "\n"


def all_sources(recipe: Recipe, of: str = "") -> list[tuple[str, Source, str]]:
    """(role, source, content hash) of all that a merge is made of; what a stage is made of comes right after it."""
    rows: list[tuple[str, Source, str]] = []
    for role, source in [("base", recipe.base), *(("expert", source) for source in recipe.experts)]:
        if source is None:
            continue
        content = source.sha256 if source.recipe is None else source.recipe.hash
        rows.append((f"{role} of {of}" if of else role, source, content))
        if source.recipe is not None:
            rows += all_sources(source.recipe, f"{source.name}, {of}" if of else source.name)
    return rows


def _sources(recipe: Recipe) -> str:
    def name(source: Source) -> str:
        stage = source.recipe
        return (
            source.name
            if stage is None
            else f"{source.name}, a stage by {listed(stage.methods)} in {stage.export_dtype}"
        )

    header, rows = ["role", "name", "SHA-256 of its content"], []
    for role, source, content in all_sources(recipe):
        rows.append([role, name(source), f"`{content[:16]}`" if content else "not taken"])
    on_hub = [_on_hub(source) for _, source, _ in all_sources(recipe)]
    if any(on_hub):
        header.append("on the Hugging Face hub")
        rows = [[*row, f"`{found}`" if found else ""] for row, found in zip(rows, on_hub, strict=True)]
    return _table(header, rows)


def _on_hub(source: Source) -> HubId | None:
    """The id of a source that came from the hub. A folder's path says nothing to others."""
    return None if source.recipe is not None or Path(source.path).is_dir() else hub_id(source.path)


def _weights(recipe: Recipe) -> str:
    def label(group: Group) -> str:
        layers = "" if group.layers is None else f"layers {group.layers[0]} to {group.layers[1] - 1}"
        words = [layers, ", ".join(group.kinds or ()), ", ".join(group.tensors or ())]
        return ": ".join(word for word in words if word) or ("all" if len(recipe.groups) == 1 else "the rest")

    rows = []
    for group in recipe.groups[:MOST_ROWS]:
        params = ", ".join(f"{k} {v}" for k, v in group.params.items())
        method = [recipe.method_of(group)[0]] if len(recipe.methods) > 1 else []
        rows.append([label(group), *method, *(f"{weight:.4g}" for weight in group.weights), params])
    header = ["part", *["method"] * (len(recipe.methods) > 1), *(s.name for s in recipe.experts), "parameters"]
    if len(recipe.groups) > MOST_ROWS:
        rows.append([f"{len(recipe.groups) - MOST_ROWS} more in recipe.yaml", *[""] * (len(header) - 1)])
    if not any(group.params for group in recipe.groups):
        header, rows = header[:-1], [row[:-1] for row in rows]
    settings = {k: v for k, v in recipe.to_dict()["params"].items() if v is not None}
    shared = ", ".join(f"{key} {value}" for key, value in settings.items())
    if all(group.method is not None for group in recipe.groups):
        shared = ""  # those at the top are nobody's
    of = f" of {recipe.method}" if shared and len(recipe.methods) > 1 else ""
    return "Weights:\n\n" + _table(header, rows) + (f"\n\nParameters{of}: {shared}." if shared else "")


def _scores(card: Mapping[str, Any]) -> str:
    rows = []
    for split, result in card["scores"].items():
        for task, facts in result["tasks"].items():
            metric = (card.get("metrics") or {}).get(task, "")
            rows.append([split, task, metric, f"{facts['score']:.4f}", str(facts.get("items", ""))])
        rows += [[split, f"objective {n}", "", f"{v:.4f}", ""] for n, v in (result.get("objectives") or {}).items()]
        several = "mean of the objectives" if result.get("objectives") else "objective"
        rows.append([split, several, "", f"{result['objective']:.4f}", ""])
    table = "Scores, by the split they were taken on (the search saw `search`, and chose by `select`):\n\n" + _table(
        ["split", "task", "metric", "score", "items"], rows
    )
    what, *constraints = card.get("objective") or [""]
    facts = [f"The objective is {_cell(what)}."] if what else []
    facts += ["Constraints: " + _cell("; ".join(constraints)) + "."] if constraints else []
    missed = [(split, miss) for split, result in card["scores"].items() for miss in result.get("misses") or ()]
    facts += [f"**On {split} this merge misses a constraint**: {_cell(miss)}." for split, miss in missed]
    return "\n\n".join([table, *facts])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: object) -> str:
    """Text that stays inside its cell and is no markup."""
    return str(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
