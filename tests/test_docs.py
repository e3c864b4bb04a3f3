"""The docs name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    there = {p.name for p in (ROOT / "evomerge").glob("*.py") if p.name != "__init__.py"}
    there |= {f"{p.parent.name}/" for p in (ROOT / "evomerge").glob("*/__init__.py")}
    assert there - named == set()
    assert [name for name in named if name.endswith(".py") and not any((ROOT / "evomerge").rglob(name))] == []


def test_experiment_file_names_every_key():
    from evomerge.spec import json_schema

    text = (ROOT / "docs" / "experiment_file.md").read_text()
    schema = json_schema()
    keys = set(schema["properties"])
    for definition in schema["$defs"].values():
        keys |= set(definition.get("properties", {}))
    assert {key for key in keys if not re.search(rf"`(\w+\.)*{key}[`.]", text)} == set()
    assert "additionalProperties" in json.dumps(schema)


def test_methods_page_has_a_line_for_every_method_with_its_parameters():
    from evomerge.methods import METHODS

    table = (ROOT / "docs" / "methods.md").read_text().partition("## All methods")[2].partition("\n## ")[0]
    lines = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`\w+`", cells[0]):
            assert len(cells) == 6, line
            lines[cells[0].strip("`")] = set(re.findall(r"`(\w+)`", cells[-1]))
    assert lines == {name: set(method.params) for name, method in METHODS.items()}


def test_docs_link_to_files_that_exist():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *ROOT.glob("experiments/*/README.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
