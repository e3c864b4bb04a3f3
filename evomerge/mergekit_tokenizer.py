"""mergekit's ``tokenizer`` and ``tokenizer_source`` as a recipe's ``tokenizer``, and back: names in place of paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from evomerge.errors import SpecError
from evomerge.tokenizer_choice import BASE, UNION, RowSource, TokenEntry, TokenizerChoice
from evomerge.validation import Strict, at, validate

NameOf = Callable[[str, Any], str]  # key and a model as mergekit names it -> an expert's name, or base


class _Token(Strict):
    source: Any = None
    force: bool = False


class _Tokenizer(Strict):
    source: Any = UNION
    tokens: dict[str, _Token] | None = None
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


def read_tokenizer(data: Mapping[str, Any], name_of: NameOf, *, where: str) -> TokenizerChoice | None:
    """What a configuration says of the merge's tokens; None if it says nothing.

    Raises SpecError for what mergekit refuses as well, and for models that are not merged.
    """
    if data.get("tokenizer") is None:
        source = data.get("tokenizer_source")
        return None if source is None else TokenizerChoice(source=_whose("tokenizer_source", source, name_of))
    if data.get("tokenizer_source") is not None:
        raise SpecError(
            "tokenizer and tokenizer_source are both given",
            where=at(where, "tokenizer_source"),
            remedy="mergekit takes one of them: put the source into tokenizer.",
        )
    written = validate(_Tokenizer, data["tokenizer"], where=at(where, "tokenizer"))
    tokens = {
        token: validate(
            TokenEntry,
            {"source": _row(f"tokenizer.tokens.{token}.source", entry.source, name_of), "force": entry.force},
            where=at(where, f"tokenizer.tokens.{token}"),
        )
        for token, entry in (written.tokens or {}).items()
    }
    return TokenizerChoice(
        source=_whose("tokenizer.source", written.source, name_of),
        tokens=tokens,
        pad_to_multiple_of=written.pad_to_multiple_of,
    )


def _whose(key: str, source: Any, name_of: NameOf) -> str:
    return source if source in (UNION, BASE) else name_of(key, source)


def _row(key: str, source: Any, name_of: NameOf) -> Any:
    """The same with the name of a model in place of its path."""
    if not (isinstance(source, Mapping) and "kind" in source):
        return None if source is None else name_of(key, source)
    data = dict(source)
    if data.get("model") is not None:
        data["model"] = name_of(f"{key}.model", data["model"])
    return data


def write_tokenizer(choice: TokenizerChoice, reference_of: Mapping[str, Any]) -> dict[str, Any]:
    """The value of mergekit's key ``tokenizer``.

    Args:
        reference_of: an expert's name, or base -> the model as mergekit names it.

    Raises KeyError with the token that mergekit would need a source for.
    """
    data: dict[str, Any] = {"source": choice.source if choice.source in (UNION, BASE) else reference_of[choice.source]}
    tokens: dict[str, Any] = {}
    for token, entry in choice.tokens.items():
        if entry.source is None:
            raise KeyError(token)
        if isinstance(entry.source, RowSource):
            row = entry.source.model_dump(exclude_none=True)
            if entry.source.model is not None:
                row["model"] = reference_of[entry.source.model]
            tokens[token] = {"source": row}
        else:
            tokens[token] = {"source": reference_of[entry.source]}
        if entry.force:
            tokens[token]["force"] = True
    if tokens:
        data["tokens"] = tokens
    if choice.pad_to_multiple_of is not None:
        data["pad_to_multiple_of"] = choice.pad_to_multiple_of
    return data
