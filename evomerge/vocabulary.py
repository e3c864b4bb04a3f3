"""Do a base and its experts mean the same token by the same number?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import CheckpointError
from evomerge.folders import inside, read_json

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint

FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


class _InFolder(Protocol):
    """A checkpoint or an adapter."""

    path: Path


def check_tokenizers(base: _InFolder, experts: Sequence[_InFolder]) -> None:
    """Raise CheckpointError if an expert comes with a tokenizer that numbers tokens differently from the base's.

    An expert without tokenizer files (most adapters) is taken to use the base's.
    """
    for expert in experts:
        for name in FILES:
            mine, its = expert.path / name, base.path / name
            if mine.is_file() and its.is_file():
                _compare_vocabularies(inside(mine), inside(its), base)
                break


@dataclass
class _Folder:
    path: Path


def check_tokenizer(folder: Path, base: Checkpoint) -> None:
    """Raise CheckpointError unless ``folder`` has a tokenizer that numbers tokens as the model does.

    The model's numbers are those of the base's tokenizer; without one, all that is known is how many rows its
    embeddings have.
    """
    if not _has(folder):
        raise CheckpointError(f"{folder} has no tokenizer", remedy=f"A tokenizer is one of {', '.join(FILES)}.")
    if any((folder / name).is_file() and (base.path / name).is_file() for name in FILES):
        check_tokenizers(base, [_Folder(folder)])
        return
    mine = _loaded_vocabulary(folder)
    if _has(base.path):
        _require_equal(mine, _loaded_vocabulary(base.path), folder, base)
        return
    from evomerge.checkpoints import text_config

    rows = text_config(base.config).get("vocab_size")
    if isinstance(rows, int) and max(mine.values(), default=0) >= rows:
        raise CheckpointError(
            f"the tokenizer in {folder} has ids up to {max(mine.values())}, but the model has {rows} embeddings",
            remedy="Choose the tokenizer that the model was trained with.",
        )


def _has(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _loaded_vocabulary(folder: Path) -> dict[str, int]:
    """token -> id, as transformers reads it from whatever files there are."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load the tokenizer in {folder}: {error}") from error


def _compare_vocabularies(mine: Path, its: Path, base: _InFolder) -> None:
    if mine.read_bytes() == its.read_bytes():
        return
    if mine.name != "tokenizer.json":
        raise CheckpointError(f"{mine} differs from the base's {its}", remedy=_remedy(base))
    _require_equal(_vocabulary(read_json(mine)), _vocabulary(read_json(its)), mine, base)


def _remedy(base: _InFolder) -> str:
    return f"Experts and exports must use the vocabulary of {base.path}."


def _require_equal(ours: Mapping[str, int], theirs: Mapping[str, int], mine: Path, base: _InFolder) -> None:
    differing = sorted(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    if differing:
        token = differing[0]
        raise CheckpointError(
            f"{mine}: {len(differing)} tokens differ from the base's vocabulary: "
            f"{token!r} has the id {ours.get(token)}, in the base {theirs.get(token)}",
            remedy=_remedy(base),
        )


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """token -> id of a tokenizer.json, added tokens included."""
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    return {**vocabulary, **{t["content"]: t["id"] for t in data.get("added_tokens") or []}}
