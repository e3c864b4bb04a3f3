"""Which vocabulary a merge has, as it is written: the key ``tokenizer`` of recipes and experiment files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from evomerge.errors import SpecError, nearest
from evomerge.validation import Strict, at

UNION, BASE = "union", "base"
UNWRITABLE = re.compile("[\x85\ud800-\udfff]")  # a recipe's text would not read back to an equal one


def _check_token(token: str) -> str:
    if UNWRITABLE.search(token):
        raise PydanticCustomError(
            "token",
            "a token cannot be named that holds characters which YAML does not keep: {token}",
            {"token": ascii(token), "remedy": "Name another model's row by its token_id."},
        )
    return token


Token = Annotated[str, AfterValidator(_check_token)]


class RowSource(Strict):
    """A row that is none of the token's own: all zeros, or that of another token."""

    model_config = ConfigDict(title="row")

    kind: Literal["zero", "model_token"] = Field(description="zero: a row of zeros; model_token: another token's row")
    model: str | None = Field(default=None, description="whose row: an expert's name, or base")
    token: Token | None = Field(default=None, description="the token in that model whose row is taken")
    token_id: int | None = Field(default=None, ge=0, description="its number, in place of the token")

    @model_validator(mode="after")
    def _one_row(self) -> RowSource:
        given = [self.model is not None, (self.token is not None) + (self.token_id is not None) == 1]
        zero = self.kind == "zero" and not (self.model or self.token is not None or self.token_id is not None)
        if not (zero or (self.kind == "model_token" and all(given))):
            raise PydanticCustomError(
                "row",
                "model_token has a model and one of token and token_id, zero has none of them",
                {"remedy": "Write {kind: model_token, model: NAME, token: TEXT}, or {kind: zero}."},
            )
        return self


class TokenEntry(Strict):
    """Where one token's rows come from."""

    model_config = ConfigDict(title="token")

    source: str | RowSource | None = Field(
        default=None,
        description="the row of a model that lacks the token: an expert's name, base, {kind: zero}, or {kind: "
        "model_token, model: ..., token: ...}; null: by the rule",
    )
    force: bool = Field(default=False, description="true: that row for all models, also for those that have the token")

    @model_validator(mode="after")
    def _force_what(self) -> TokenEntry:
        if self.force and self.source is None:
            raise PydanticCustomError("force", "force needs a source", {"remedy": "Name whose row all models get."})
        return self


class TokenizerChoice(Strict):
    """The merge's vocabulary, and where rows come from that a model lacks."""

    model_config = ConfigDict(title="tokenizer")

    source: str = Field(
        default=UNION,
        min_length=1,
        description="whose tokens the merge has: union (the base's, then those that experts added), base, or an "
        "expert's name",
    )
    tokens: dict[Token, TokenEntry] = Field(
        default_factory=dict, description="tokens whose rows are chosen by hand; those nobody has are added"
    )
    pad_to_multiple_of: int | None = Field(
        default=None, ge=1, description="rows of the embeddings are filled up to a multiple of this"
    )

    def check(self, experts: Sequence[str], *, where: str) -> None:
        """SpecError if it names an expert that is not among ``experts``."""
        named: list[tuple[str, str, tuple[str, ...]]] = [("source", self.source, (UNION, BASE))]
        for token, entry in self.tokens.items():
            model = entry.source.model if isinstance(entry.source, RowSource) else entry.source
            if model is not None:
                named.append((f"tokens.{token}.source", model, (BASE,)))
        for key, name, more in named:
            if name not in more and name not in experts:
                raise SpecError(
                    f"there is no expert {name!r}", where=at(where, key), remedy=nearest(name, [*more, *experts])
                )

    def short(self) -> dict[str, Any]:
        """Plain data without what is left at its default; reads back to an equal choice."""
        return {"source": self.source, **self.model_dump(mode="json", exclude_defaults=True)}


def read_choice(value: Any) -> Any:
    """``tokenizer: union`` is short for ``tokenizer: {source: union}``."""
    return {"source": value} if isinstance(value, str) else value


Choice = Annotated[TokenizerChoice, BeforeValidator(read_choice)]
