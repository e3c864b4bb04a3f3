"""Adapters behind a merge: what they do to features, the file that holds them, and the recipe that names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from evomerge.errors import CheckpointError, SpecError
from evomerge.mergekit_writing import to_mergekit_yaml
from evomerge.recipe import Group, Recipe, Source, Surgery
from evomerge.surgery import FORMULA, Adapter, in_words, read, verify, write


def adapters(*tasks: str, rank: int = 2, width: int = 3) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {task: Adapter(draw(rank, width), draw(width, rank)) for task in tasks}


def recipe(**changes) -> Recipe:
    sources = Source("base", "base", "b" * 64), (Source("left", "left", "l" * 64), Source("right", "right", "r" * 64))
    return replace(Recipe(*sources, "task_arithmetic", (Group((0.5, 0.25)),), {"scale": 1.0}), **changes)


def test_an_adapter_by_hand():
    """Z = (2, -1), down Z = (1, -3) by rows (0, -1) and (-1, 1); ReLU leaves (1, 0); up of it is (4, 0.5)."""
    adapter = Adapter(torch.tensor([[0.0, -1.0], [-1.0, 1.0]]), torch.tensor([[4.0, 7.0], [0.5, 9.0]]))
    features = torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    # the second: down Z = (-1, 1), ReLU (0, 1), up (7, 9)
    assert adapter(features).tolist() == [[2.0 - 4.0, -1.0 - 0.5], [0.0 - 7.0, 1.0 - 9.0]]
    assert adapter.size == 8


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
def test_with_up_at_zero_features_stay_as_they_are_bit_for_bit(seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(5, 7, generator=generator, dtype=dtype) * 10
    features[0, 0], features[1, 1] = -0.0, 0.0
    same = Adapter(torch.randn(3, 7, generator=generator), torch.zeros(7, 3))(features)
    assert same.dtype == dtype
    assert same.numpy().tobytes() == features.numpy().tobytes()


def test_what_is_written_is_read_back(tmp_path: Path):
    wanted = adapters("one", "two.of.it")
    made = write(tmp_path / "surgery", wanted)
    path = Path(made.path)
    assert path.is_absolute() and path == tmp_path / "surgery" / f"{made.sha256}.safetensors"
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left behind"
    found = read(made)
    assert list(found) == list(wanted)
    for task, adapter in wanted.items():
        assert torch.equal(found[task].down, adapter.down) and torch.equal(found[task].up, adapter.up)
    with safe_open(path, "pt") as file:  # the library's own reader
        assert set(file.keys()) == {"one.down", "one.up", "two.of.it.down", "two.of.it.up"}
        assert file.get_slice("one.down").get_shape() == [2, 3] and file.get_slice("one.up").get_shape() == [3, 2]
        assert file.metadata()["evomerge_surgery"] == FORMULA
    assert write(tmp_path / "surgery", wanted) == made
    assert write(tmp_path / "other", wanted).sha256 == made.sha256
    assert in_words(found) == "2 adapters of 24 parameters"
    assert verify(Surgery(made.path)) == made


def test_a_file_that_is_gone_or_changed_is_refused(tmp_path: Path):
    made = write(tmp_path, adapters("one"))
    path = Path(made.path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="holds other adapters than before"):
        read(made)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(made)


@pytest.mark.parametrize(
    "tensors",
    [
        {"one.down": torch.zeros(2, 3)},
        {"one.down": torch.zeros(2, 3), "one.up": torch.zeros(2, 3)},
        {"one.down": torch.zeros(3), "one.up": torch.zeros(3)},
        {"one.down": torch.zeros(2, 3), "one.up": torch.zeros(3, 2), "one.more": torch.zeros(1)},
        {"weight": torch.zeros(2, 3)},
    ],
    ids=["half", "shapes", "vectors", "more", "another thing"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="are no adapter"):
        read(Surgery(str(tmp_path / "x.safetensors")))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "surgery").write_text("a file")
    with pytest.raises(CheckpointError, match="surgery, where the adapters"):
        write(tmp_path / "surgery", adapters("one"))


def test_a_recipe_is_another_with_adapters_wherever_they_lie(tmp_path: Path):
    plain = recipe()
    one = recipe(surgery=Surgery("a.safetensors", "1" * 64))
    assert one.hash == recipe(surgery=Surgery("b/c.safetensors", "1" * 64)).hash
    assert len({plain.hash, one.hash, recipe(surgery=Surgery("a.safetensors", "2" * 64)).hash}) == 3
    assert Recipe.from_dict(one.to_dict()) == one
    (tmp_path / "recipe.yaml").write_text(one.to_yaml())
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded.surgery == Surgery(str(tmp_path / "a.safetensors"), "1" * 64) and loaded.hash == one.hash
    short = {**plain.to_dict(), "surgery": "a.safetensors"}
    assert Recipe.from_dict(short).surgery == Surgery("a.safetensors")


@pytest.mark.parametrize("wrong", [3, {}, {"path": ""}, {"path": "a", "sha256": 3}, {"path": "a", "size": 3}], ids=str)
def test_a_recipe_that_says_it_wrongly_is_refused(wrong):
    with pytest.raises(SpecError, match="surgery"):
        Recipe.from_dict({**recipe().to_dict(), "surgery": wrong})


def test_what_cannot_take_adapters_says_so():
    """A merge takes weights alone, and mergekit has nothing of the kind."""
    adapted = recipe(surgery=Surgery("a.safetensors", "1" * 64))
    with pytest.raises(SpecError, match=r"experts\[0\].recipe: a merge of weights cannot take the adapters"):
        Recipe.from_dict({**recipe().to_dict(), "experts": [{"name": "stage", "recipe": adapted.to_dict()}]})
    with pytest.raises(SpecError, match="adapters behind the merge"):
        to_mergekit_yaml(adapted)
