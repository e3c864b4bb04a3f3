"""What `evomerge export` and `evomerge merge` do: a recipe's sources fetched, checked and hashed, then written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.adapter_export import adapter_modules, export_adapter
from evomerge.companions import choose
from evomerge.errors import UserError
from evomerge.exporting import export, merged_bytes
from evomerge.merging import SHARD_SIZE, open_sources, pin_sources, verify_sources
from evomerge.progress import Progress, Stage, parse_size
from evomerge.recipe import Recipe
from evomerge.stages import built
from evomerge.worker import settle
from evomerge.writing import check_out


@dataclass(frozen=True)
class Wanted:
    """The options of both commands, as they were typed."""

    as_what: str = "checkpoint"  # or adapter
    shard_size: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None


def write_out(
    recipe: Recipe,
    out: Path,
    wanted: Wanted,
    progress: Progress,
    *,
    card: Mapping[str, Any] | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> Path:
    """Write the merge to ``out`` and return its path; UserError for whatever stands against it, cheapest first."""
    as_adapter = wanted.as_what == "adapter"
    if as_adapter and recipe.surgery is not None:
        raise UserError(
            "the adapters of surgery stand beside a checkpoint, not beside a LoRA adapter",
            remedy="Leave out --as adapter, or --surgery.",
        )
    if as_adapter and wanted.shard_size is not None:
        raise UserError("--shard-size is for checkpoints: an adapter is one file", remedy="Leave it out.")
    shard_size = SHARD_SIZE if wanted.shard_size is None else parse_size(wanted.shard_size, where="--shard-size")
    out = out.absolute()
    check_out(out)
    settle(threads=threads, device="cpu" if as_adapter else device)
    recipe = pin_sources(recipe, progress)
    sources = open_sources(recipe)
    companions = choose(wanted.tokenizer, wanted.chat_template, recipe, sources)
    if as_adapter:
        adapter_modules(recipe, sources)
        recipe = verify_sources(recipe)
        with progress.stage("writing", 1, unit="B") as stage:
            return export_adapter(recipe, out, card=card, companions=companions, progress=_reporter(stage))
    recipe = verify_sources(recipe)
    size = merged_bytes(recipe)
    with built(recipe, out.parent, progress, more=size) as ready, progress.stage("writing", size, unit="B") as stage:
        return export(
            ready,
            out,
            shard_size=shard_size,
            card=card,
            companions=companions,
            progress=_reporter(stage),
            device=device,
        )


def _reporter(stage: Stage):
    def report(done: int, total: int) -> None:
        stage.total = total
        stage.update(done)

    return report
