"""The key ``tokenizer`` as it is written: what it reads back to, and what recipes make of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import SpecError
from evomerge.recipe import Recipe
from evomerge.tokenizer_choice import RowSource, TokenEntry, TokenizerChoice

SHORT = {"method": "linear", "base": "m/base", "experts": {"a": "m/a", "b": "m/b"}, "weights": 1}

names = st.sampled_from(["a", "b", "base"])
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=8)
rows = st.one_of(
    st.none(),
    names,
    st.just(RowSource(kind="zero")),
    st.builds(lambda m, t: RowSource(kind="model_token", model=m, token=t), names, texts),
    st.builds(lambda m, i: RowSource(kind="model_token", model=m, token_id=i), names, st.integers(0, 10**6)),
)
entries = rows.flatmap(
    lambda row: st.builds(TokenEntry, source=st.just(row), force=st.booleans() if row is not None else st.just(False))
)
choices = st.builds(
    TokenizerChoice,
    source=st.sampled_from(["union", "base", "a", "b"]),
    tokens=st.dictionaries(texts, entries, max_size=3),
    pad_to_multiple_of=st.none() | st.integers(1, 512),
)


@given(choices)
def test_a_choice_reads_back_from_a_recipes_text(choice: TokenizerChoice):
    recipe = Recipe.from_dict({**SHORT, "tokenizer": choice.short()})
    assert recipe.tokenizer == choice
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again.tokenizer == choice
    assert again.hash == recipe.hash


def test_the_short_form():
    assert Recipe.from_dict({**SHORT, "tokenizer": "b"}).tokenizer == TokenizerChoice(source="b")
    assert Recipe.from_dict({**SHORT, "tokenizer": {}}).tokenizer == TokenizerChoice(source="union")


def test_what_is_chosen_is_part_of_the_recipe():
    choices: list[Any] = [
        None, "union", "base", "a", {"pad_to_multiple_of": 8}, {"tokens": {"x": {}}},
        {"tokens": {"x": {"source": "a"}}}, {"tokens": {"x": {"source": "a", "force": True}}},
        {"tokens": {"x": {"source": {"kind": "zero"}}}},
    ]  # fmt: skip
    hashes = [Recipe.from_dict({**SHORT, **({"tokenizer": c} if c else {})}).hash for c in choices]
    assert len(set(hashes)) == len(hashes)
    two = {"x": {"source": "a"}, "y": {"source": "b"}}
    first, second = ({"tokens": dict(order)} for order in (two.items(), reversed(two.items())))
    assert Recipe.from_dict({**SHORT, "tokenizer": first}).hash == Recipe.from_dict({**SHORT, "tokenizer": second}).hash


def test_a_recipe_without_it_keeps_its_hash():
    """The text that is hashed has no such key: the hash of recipes that were made before there was one."""
    recipe = Recipe.from_dict(SHORT)
    assert "tokenizer" not in recipe.to_dict()
    assert recipe.hash == "a428faed40173a49ff91304ecccb668e1d98d0b644dc367b4b4577b305d7f21f"


@pytest.mark.parametrize(
    "tokenizer", [3, ["union"], {"source": 3}, {"tokens": ["x"]}, {"pad_to_multiple_of": 1.5}, {"tokens": {"\x85": {}}}]
)
def test_other_shapes_are_refused(tokenizer: Any):
    with pytest.raises(SpecError, match="tokenizer"):
        Recipe.from_dict({**SHORT, "tokenizer": tokenizer})
