"""Tokenizers and chat templates of an export: what is chosen, what is refused, and what transformers finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from evomerge.companions import chat_templates, choose
from evomerge.errors import CheckpointError, SpecError
from evomerge.exporting import MANIFEST, export
from evomerge.merging import open_sources
from evomerge.recipe import Group, Recipe, Source

CHAT = [{"role": "user", "content": "hi"}]
BASE, EXPERT = "base: {{ messages[0].content }}", "expert: {{ messages[0].content }}"


@pytest.fixture
def family(dense_family: Path, tmp_path: Path) -> Path:
    """expert0 has a chat template and other words at its ends; expert1 has none."""
    folder = shutil.copytree(dense_family, tmp_path / "family")
    for name, template, ends in (("base", BASE, "<eos>"), ("expert0", EXPERT, "<pad>")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template, tokenizer.eos_token = template, ends
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def recipe(family: Path) -> Recipe:
    experts = tuple(Source(f"expert{t}", str(family / f"expert{t}")) for t in range(2))
    return Recipe(Source("base", str(family / "base")), experts, "task_arithmetic", (Group((0.5, 0.5)),))


def made(recipe: Recipe, out: Path, tokenizer: str | None, template: str | None):
    companions = choose(tokenizer, template, recipe, open_sources(recipe))
    return transformers.AutoTokenizer.from_pretrained(export(recipe, out, companions=companions))


@pytest.mark.parametrize(
    ("tokenizer", "template", "eos", "text"),
    [
        (None, None, "<eos>", "base: hi"),
        ("base", "base", "<eos>", "base: hi"),
        ("expert:expert0", None, "<pad>", "expert: hi"),
        (None, "expert:expert0", "<eos>", "expert: hi"),
        ("expert:expert0", "base", "<pad>", "base: hi"),
        ("FOLDER", "FILE", "<pad>", "file: hi"),
    ],
)
def test_what_transformers_finds(
    recipe: Recipe, family: Path, tmp_path: Path, tokenizer: str | None, template: str | None, eos: str, text: str
):
    (tmp_path / "own.jinja").write_text("file: {{ messages[0].content }}")
    places = {"FOLDER": str(family / "expert0"), "FILE": str(tmp_path / "own.jinja")}
    tokenizer, template = places.get(tokenizer or "", tokenizer), places.get(template or "", template)
    loaded = made(recipe, tmp_path / "out", tokenizer, template)
    assert loaded.eos_token == eos
    assert loaded.apply_chat_template(CHAT, tokenize=False) == text
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    label = {"expert:expert0": "expert:expert0", places["FOLDER"]: "expert0"}.get(tokenizer or "")
    assert manifest.get("tokenizer") == label
    assert ("Tokenizer: " in card) == (label is not None)
    if template == places["FILE"]:
        assert manifest["chat_template"] == "own.jinja"
        assert "Chat template: own.jinja." in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("in_config", [False, True])
def test_templates_with_names_replace_all_of_the_base(recipe: Recipe, family: Path, tmp_path: Path, in_config: bool):
    """Whether they lie in files of their own or in tokenizer_config.json, as older versions wrote them."""
    for folder, templates in (
        ("base", {"default": BASE, "rag": "rag"}),
        ("expert0", {"default": EXPERT, "tools": "t"}),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(family / folder)
        tokenizer.chat_template = templates
        shutil.rmtree(family / folder / "additional_chat_templates", ignore_errors=True)
        (family / folder / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(family / folder, save_jinja_files=not in_config)
    assert (family / "base" / "chat_template.jinja").exists() != in_config
    assert chat_templates(family / "base") == {"default": BASE, "rag": "rag"}
    assert made(recipe, tmp_path / "out", None, "expert:expert0").chat_template == {"default": EXPERT, "tools": "t"}
    assert made(recipe, tmp_path / "base", None, None).chat_template == {"default": BASE, "rag": "rag"}


def refused(recipe: Recipe, tokenizer: str | None, template: str | None, *words: str, error: type = SpecError) -> None:
    with pytest.raises(error) as caught:
        choose(tokenizer, template, recipe, open_sources(recipe))
    for word in words:
        assert word in str(caught.value)


def test_names_that_are_not_there(recipe: Recipe, tmp_path: Path):
    refused(recipe, "expert:expert7", None, "--tokenizer", "expert7", "expert0")
    refused(recipe, None, "expert:chat", "--chat-template", "chat", "expert0")
    refused(recipe, str(tmp_path / "nowhere"), None, "nowhere", error=CheckpointError)
    refused(recipe, str(tmp_path), None, "no tokenizer", error=CheckpointError)


def test_an_expert_without_a_template(recipe: Recipe):
    refused(recipe, None, "expert:expert1", "no chat template", "expert0")


@pytest.mark.parametrize("text", ["", "  \n", "{% if %}", "{{ messages", "{% for m in messages %}"])
def test_a_file_that_is_no_template(recipe: Recipe, tmp_path: Path, text: str):
    (tmp_path / "own.jinja").write_text(text)
    refused(recipe, None, str(tmp_path / "own.jinja"), "own.jinja", "no template")


def test_a_template_whose_name_leads_elsewhere(recipe: Recipe, family: Path):
    (family / "expert0" / "chat_template.jinja").unlink()
    file = family / "expert0" / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "chat_template": [{"name": "../../x", "template": "t"}]}
    file.write_text(json.dumps(settings))
    refused(recipe, None, "expert:expert0", "tokenizer_config.json", "letters")


def other_tokenizer(family: Path, folder: Path) -> Path:
    """One that gives two characters each other's number."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(family / "base" / name, folder / name)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_a_tokenizer_of_another_vocabulary(recipe: Recipe, family: Path, tmp_path: Path):
    folder = other_tokenizer(family, tmp_path / "other")
    refused(recipe, str(folder), None, "2 tokens differ", "'b'", error=CheckpointError)


def test_a_base_without_a_tokenizer(recipe: Recipe, family: Path, tmp_path: Path):
    """Then the ids must lie within the embeddings."""
    folder = other_tokenizer(family, tmp_path / "other")
    for name in ("base", "expert0", "expert1"):
        for file in (family / name).glob("token*"):
            file.unlink()
    assert choose(str(folder), None, recipe, open_sources(recipe)).folder == folder
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["far"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(data))
    refused(recipe, str(folder), None, "999", "99 embeddings", error=CheckpointError)
