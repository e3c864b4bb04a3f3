"""Do a base and its experts mean the same token by the same number?"""

from __future__ import annotations

import json
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
        if any(getattr(source, "vocabulary", None) is not None for source in (base, expert)):  # a stage's own
            _require_equal(_ids(expert), _ids(base), expert.path, base)
            continue
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

    The model's numbers are those of the vocabulary that a recipe chose, else of the base's tokenizer; without one, all
    that is known is how many rows its embeddings have.
    """
    if not has_tokenizer(folder):
        raise _no_tokenizer(folder)
    if base.vocabulary is not None:
        _require_equal(_loaded_vocabulary(folder), base.vocabulary.ids, folder, base, whose="merge")
        return
    if any((folder / name).is_file() and (base.path / name).is_file() for name in FILES):
        check_tokenizers(base, [_Folder(folder)])
        return
    mine = _loaded_vocabulary(folder)
    if has_tokenizer(base.path):
        _require_equal(mine, _loaded_vocabulary(base.path), folder, base)
        return
    from evomerge.checkpoints import text_config

    rows = text_config(base.config).get("vocab_size")
    if isinstance(rows, int) and max(mine.values(), default=0) >= rows:
        raise CheckpointError(
            f"the tokenizer in {folder} has ids up to {max(mine.values())}, but the model has {rows} embeddings",
            remedy="Choose the tokenizer that the model was trained with.",
        )


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer knows.

    Attributes:
        ids: token -> id, added tokens included.
        added: added token -> its entry in tokenizer.json (special, lstrip, ...).
        kind: of its model, such as BPE.
        merges, pieces: what the model cuts text by: merges, and its tokens that are not added, with their scores.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str
    merges: tuple[str, ...]
    pieces: Mapping[str, float]


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the tokenizer in ``folder``, as transformers loads it; runs no code of the folder's.

    Raises CheckpointError if there is none, if it cannot be loaded, or if it is not one of the tokenizers library.
    """
    data = json.loads(_backend(folder).to_str())
    added = {entry["content"]: entry for entry in data["added_tokens"]}
    model = data["model"]
    vocabulary = model.get("vocab") or {}
    scored = vocabulary if isinstance(vocabulary, list) else [(token, 0.0) for token in vocabulary]
    merges = (m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ())
    pieces = {token: score for token, score in scored if token not in added}
    return Vocabulary(_vocabulary(data), added, model["type"], tuple(merges), pieces)


def _backend(folder: Path) -> Any:
    tokenizer = open_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"the tokenizer in {folder} is no fast one ({type(tokenizer).__name__}), so that its tokens cannot be "
            "matched with others'",
            remedy="Save it with a tokenizer.json, which transformers makes of most tokenizers.",
        )
    return tokenizer.backend_tokenizer


def check_cuts_alike(mine: Vocabulary, host: Vocabulary, label: str, host_label: str) -> None:
    """CheckpointError unless both cut text alike but for added tokens: then rows can be matched by token."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{what}: {label} cuts text into other tokens than {host_label}, so that rows of the same token have not "
            "learnt the same",
            remedy="Vocabularies may differ in added tokens and in ids. Leave this expert out.",
        )

    if mine.kind != host.kind:
        raise refuse(f"its tokenizer is a {mine.kind} model and not {host.kind}")
    if mine.merges != host.merges:
        differing = len({*mine.merges} ^ {*host.merges})
        what = f"{differing} merges differ" if differing else "its merges come in another order"
        raise refuse(what)
    differing = sorted(
        token
        for token in {*mine.pieces, *host.pieces} - {*mine.added, *host.added}
        if mine.pieces.get(token) != host.pieces.get(token)
    )
    if differing:
        raise refuse(f"{len(differing)} tokens that are no added ones differ, such as {differing[0]!r}")


def _ids(source: _InFolder) -> Mapping[str, int]:
    own: Vocabulary | None = getattr(source, "vocabulary", None)
    return _loaded_vocabulary(source.path) if own is None else own.ids


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder`` as transformers loads it; CheckpointError if there is none or it cannot be loaded."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise _no_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load the tokenizer in {folder}: {error}") from error


def has_tokenizer(folder: Path) -> bool:
    """Does the folder hold a tokenizer's vocabulary?"""
    return any((folder / name).is_file() for name in FILES)


def _loaded_vocabulary(folder: Path) -> dict[str, int]:
    """token -> id, as transformers reads it from whatever files there are."""
    return open_tokenizer(folder).get_vocab()


def _no_tokenizer(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder} has no tokenizer", remedy=f"A tokenizer is one of {', '.join(FILES)}.")


def _compare_vocabularies(mine: Path, its: Path, base: _InFolder) -> None:
    if mine.read_bytes() == its.read_bytes():
        return
    if mine.name != "tokenizer.json":
        raise CheckpointError(f"{mine} differs from the base's {its}", remedy=_remedy(base))
    _require_equal(_vocabulary(read_json(mine)), _vocabulary(read_json(its)), mine, base)


def _remedy(base: _InFolder) -> str:
    return (
        f"Experts and exports must use the vocabulary of {base.path}, unless the recipe or experiment brings them to "
        "one: tokenizer: {source: union}."
    )


def _require_equal(
    ours: Mapping[str, int], theirs: Mapping[str, int], mine: Path, base: _InFolder, *, whose: str = "base"
) -> None:
    differing = sorted(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    if differing:
        token = differing[0]
        raise CheckpointError(
            f"{mine}: {len(differing)} tokens differ from the {whose}'s vocabulary: "
            f"{token!r} has the id {ours.get(token)}, in the {whose} {theirs.get(token)}",
            remedy=_remedy(base) if whose == "base" else "Leave it out: the merge brings its own tokenizer.",
        )


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """token -> id of a tokenizer.json, added tokens included."""
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    return {**vocabulary, **{t["content"]: t["id"] for t in data.get("added_tokens") or []}}
