"""Do a base and its experts mean the same token by the same number?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from evomerge.errors import CheckpointError
from evomerge.folders import inside, read_json


class _InFolder(Protocol):
    """A checkpoint or an adapter."""

    path: Path


def check_tokenizers(base: _InFolder, experts: Sequence[_InFolder]) -> None:
    """Raise CheckpointError if an expert comes with a tokenizer that numbers tokens differently from the base's.

    An expert without tokenizer files (most adapters) is taken to use the base's.
    """
    for expert in experts:
        for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"):
            mine, its = expert.path / name, base.path / name
            if mine.is_file() and its.is_file():
                _compare_vocabularies(inside(mine), inside(its), base)
                break


def _compare_vocabularies(mine: Path, its: Path, base: _InFolder) -> None:
    if mine.read_bytes() == its.read_bytes():
        return
    remedy = f"Experts must use the vocabulary of {base.path}."
    if mine.name != "tokenizer.json":
        raise CheckpointError(f"{mine} differs from the base's {its}", remedy=remedy)
    ours, theirs = _vocabulary(read_json(mine)), _vocabulary(read_json(its))
    differing = sorted(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    if differing:
        token = differing[0]
        raise CheckpointError(
            f"{mine}: {len(differing)} tokens differ from the base's vocabulary: "
            f"{token!r} has the id {ours.get(token)}, in the base {theirs.get(token)}",
            remedy=remedy,
        )


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """token -> id of a tokenizer.json, added tokens included."""
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    return {**vocabulary, **{t["content"]: t["id"] for t in data.get("added_tokens") or []}}
