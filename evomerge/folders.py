"""Checkpoint folders as they come from others: found, and read without running or following anything out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import CheckpointError

if TYPE_CHECKING:
    from evomerge.progress import Progress

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# fmt: off
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", *PROCESSOR_FILES,
)
# fmt: on
TEMPLATES = "additional_chat_templates"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_folder(path: str | Path, *, beside: str | Path = "", progress: Progress | None = None) -> Path:
    """The folder that a path names, or else the local copy of the model with that Hugging Face id.

    Args:
        beside: where a relative path starts.
        progress: where to show a download.

    Raises CheckpointError if there is neither.
    """
    folder = Path(beside, Path(path).expanduser())
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file, but a checkpoint is a folder", remedy="Name the folder it lies in.")
    from evomerge.hub import fetch, hub_id

    wanted = hub_id(str(path))
    if wanted is None:
        raise CheckpointError(
            f"there is no folder {folder}",
            remedy="Check the path: a checkpoint is a folder with config.json (or adapter_config.json) and "
            "*.safetensors. Models on the Hugging Face hub are named org/name or org/name@revision.",
        )
    try:
        return fetch(wanted, progress)
    except CheckpointError as error:
        raise CheckpointError(f"there is no folder {folder}, and {error.problem}", remedy=error.remedy) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table, or CheckpointError naming the file."""
    try:
        data = json.loads(inside(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}", remedy="Is it a Hugging Face checkpoint?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", remedy="Copy or download it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON table")
    return data


def inside(path: Path) -> Path:
    """``path``, unless it is a link that leaves its folder. The links of a Hugging Face cache stay in its blobs."""
    if path.is_symlink():
        target, folder = path.resolve(), path.parent.resolve()
        blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
        if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
            raise CheckpointError(
                f"{path} is a link that leaves its folder (to {target})", remedy="Put the file itself in the folder."
            )
    return path


def optional_files(folder: Path, names: Sequence[str]) -> list[Path]:
    return [inside(folder / name) for name in names if (folder / name).is_file()]


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's, processor's and chat templates' files; further templates lie in a folder of their own."""
    templates = folder / TEMPLATES
    more = sorted(templates.glob("*.jinja")) if templates.resolve().parent == folder.resolve() else []
    return [*optional_files(folder, TOKENIZER_FILES), *(inside(file) for file in more)]


def refuse_pickles(folder: Path, instead: str) -> None:
    """CheckpointError that names the pickled weights in ``folder``, if there are any: reading them can run code."""
    pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern) if p.name != "training_args.bin")
    if pickled:
        raise CheckpointError(
            f"{folder} has its weights in {some(pickled)}; pickled files can run code when they are read",
            remedy=f"Convert them to {instead} with save_pretrained on a machine where that is safe.",
        )


def some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
