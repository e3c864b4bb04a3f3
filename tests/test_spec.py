"""Experiment files: what is read, and that every mistake is named with its file, key, value and remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import SpecError
from evomerge.evaluation import TaskSpec
from evomerge.methods import METHODS
from evomerge.searchers import SEARCHERS
from evomerge.spec import Spec, json_schema, load_spec, parse_duration, resolve_file

FILE = """
name: skills
base: models/base
experts: {add: adapters/add, spam: adapters/spam}
space:
  method: ties
  params: {density: 0.3}
  weights: {granularity: task, range: [0, 1.5], initial: 1}
search: {method: cma, budget: 12, time: 1h30m, sigma: 1e-1}
evaluate:
  with: my_eval.py@score
  tasks:
    one:
    two: {weight: 2, metric: acc, fewshot: 3}
  split: {search: 8, select: 8, test: 8}
  template: chat
workers: {count: 2, timeout: 10m}
seed: 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("models/base", "adapters/add", "adapters/spam"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my_eval.py").write_text("")
    (tmp_path / "experiment.yaml").write_text(FILE)
    return tmp_path


def changed(folder: Path, changes: dict[str, Any]) -> Path:
    """The experiment with values replaced at dotted keys, as a file."""
    data = yaml.safe_load(FILE)
    for key, value in changes.items():
        *parents, last = key.split(".")
        here = data
        for parent in parents:
            here = here[parent]
        here[last] = value
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


# --- what is read


def test_load(folder: Path):
    spec = load_spec(folder / "experiment.yaml")
    assert spec.name == "skills"
    assert spec.base == "models/base"
    assert spec.base_path == folder / "models/base"
    assert spec.expert_paths == {"add": folder / "adapters/add", "spam": folder / "adapters/spam"}
    assert spec.search.method == "cma"
    assert spec.search.budget == 12
    assert spec.search.seconds == 5400
    assert spec.search.options == {"sigma": 0.1}  # YAML 1.1 would read 1e-1 as text
    assert spec.search.schedule == "reproducible"
    assert spec.evaluate.evaluator == "my_eval.py@score"
    assert spec.evaluate.options == {"template": "chat"}
    assert spec.evaluate.split == {"search": 8, "select": 8, "test": 8}
    assert spec.task_specs() == {
        "one": TaskSpec("one"),
        "two": TaskSpec("two", weight=2.0, metric="acc", options={"fewshot": 3}),
    }
    assert (spec.workers.count, spec.workers.timeout, spec.workers.retries) == (2, 600.0, 2)
    assert spec.objective.short() == "mean"
    assert (spec.export_dtype, spec.compute_dtype, spec.seed) == ("bfloat16", "float32", 3)
    assert spec.folder == folder
    assert spec.path == folder / "experiment.yaml"
    assert spec.space_where == f"{folder / 'experiment.yaml'}: space"


def test_json_is_yaml(folder: Path):
    path = folder / "experiment.json"
    path.write_text(json.dumps(yaml.safe_load(FILE.replace("1e-1", "0.1"))))
    assert load_spec(path).to_dict() == load_spec(folder / "experiment.yaml").to_dict()


def test_a_folder_stands_for_its_experiment(folder: Path):
    assert load_spec(folder).name == "skills"


def test_paths_start_at_the_experiment_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder / "models")
    assert load_spec("../experiment.yaml").base_path == folder / "models/base"


@pytest.mark.parametrize("form", ["space.yaml", "search_spaces/task.yaml", "task.yaml", "inline"])
def test_space_from_a_file_beside_it_or_among_those_shipped(folder: Path, form: str):
    (folder / "space.yaml").write_text("method: linear\nweights: {granularity: task, range: [0, 1]}\n")
    if form == "inline":
        assert load_spec(folder).space_file is None
        return
    spec = load_spec(changed(folder, {"space": form}))
    assert spec.space["weights"]["granularity"] == "task"
    assert spec.space_file == resolve_file(form, folder, "search_spaces")
    assert spec.space_where == str(spec.space_file)


def test_a_file_beside_the_experiment_comes_before_a_shipped_one(folder: Path):
    assert resolve_file("task.yaml", folder, "search_spaces").parent.name == "search_spaces"
    (folder / "task.yaml").write_text("method: linear\nweights: {granularity: task, range: [0, 1]}\n")
    assert resolve_file("task.yaml", folder, "search_spaces") == folder / "task.yaml"
    assert load_spec(changed(folder, {"space": "task.yaml"})).space["method"] == "linear"


def test_shipped_files_do_not_lead_elsewhere(folder: Path):
    with pytest.raises(SpecError, match="no file"):
        resolve_file("search_spaces/../pyproject.toml", folder, "search_spaces")


def test_to_dict_is_plain_complete_and_read_back(folder: Path):
    """What a study stores: also when the space was a file, and without the models at hand."""
    for path in (folder / "experiment.yaml", changed(folder, {"space": "task.yaml"})):
        spec = load_spec(path)
        data = json.loads(json.dumps(spec.to_dict()))
        assert Spec.from_dict(data, folder).to_dict() == data
        elsewhere = Spec.from_dict(data, folder / "nowhere", check_files=False)
        assert elsewhere.to_dict() == data
        with pytest.raises(SpecError, match="my_eval"):
            Spec.from_dict(data, folder / "nowhere")


def test_imports_are_light():
    code = (
        "import sys, evomerge.spec, evomerge.searchers; "
        "print([m for m in ('torch', 'ray', 'optuna', 'cma') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("6h", 21600), ("1h30m", 5400), ("2d", 172800), ("1.5h", 5400), ("1h1m1s", 3661)],
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "h", "1x", "-5m", "0s", "30m1h", "1 hour", 90, None, True, ["1h"]], ids=repr
)
def test_bad_durations(text: Any):
    with pytest.raises(SpecError, match="unit") as caught:
        parse_duration(text, where="--time")
    assert caught.value.where == "--time"
    assert "1h30m" in (caught.value.remedy or "")


# --- refused. Each case: what is changed, the key that is named, words of the message (values, rule, remedy)

REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "an unknown key": ({"expert_dtype": "bfloat16"}, "expert_dtype", ["'export_dtype'"]),
    "an unknown key of workers": ({"workers": {"cont": 2}}, "workers.cont", ["'count'"]),
    "an unknown key of finish": ({"evaluate.finish": {"topp": 2}}, "evaluate.finish.topp", ["'top'"]),
    "a misspelt key of evaluate": ({"evaluate.batchsize": 2}, "evaluate", ["'batchsize'", "'batch_size'"]),
    "a misspelt key of a task": ({"evaluate.tasks.one": {"weigth": 2}}, "evaluate.tasks.one", ["'weigth'", "'weight'"]),
    "an unknown method": ({"space.method": "tie"}, "space.method", ["'tie'", "'ties'"]),
    "an unknown searcher": ({"search.method": "cmaes"}, "search.method", ["'cmaes'", "'cma'"]),
    "an unknown option": ({"search.sigmas": 1}, "search.sigmas", ["cma", "'sigma'"]),
    "another searcher's option": ({"search.window": 4}, "search.window", ["cma", "population"]),
    "an option out of range": ({"search.sigma": 0}, "search.sigma", ["0", "(0, 1]"]),
    "an option of the wrong type": ({"search.population": 7.5}, "search.population", ["7.5", "whole"]),
    "options in a mapping": ({"search.options": {"sigma": 1}}, "search", ["'options'", "beside"]),
    "an unknown granularity": ({"space.weights.granularity": "layers"}, "space.weights.granularity", ["'layers'"]),
    "a range upside down": ({"space.weights.range": [1.5, 0]}, "space.weights.range", ["1.5", "0", "Swap"]),
    "density 0": ({"space.params.density": 0}, "space.params.density", ["0", "(0, 1]", "ties"]),
    "no expert": ({"experts": {}}, "experts", ["empty"]),
    "one expert for two": (
        {"experts": {"a": "adapters/add"}, "space.method": "slerp", "space.params": {}},
        "space.method",
        ["exactly 2", "1"],
    ),
    "a list of experts": ({"experts": ["adapters/add"]}, "experts", ["mapping"]),
    "a negative budget": ({"search.budget": -3}, "search.budget", ["-3", ">= 1"]),
    "half a candidate": ({"search.budget": 2.5}, "search.budget", ["2.5", "whole"]),
    "true as a number": ({"search.budget": True}, "search.budget", ["True", "whole"]),
    "a number as text": ({"search.budget": "60"}, "search.budget", ["'60'", "whole"]),
    "a time without a unit": ({"search.time": 90}, "search.time", ["90", "unit"]),
    "a bad timeout": ({"workers.timeout": "5x"}, "workers.timeout", ["'5x'", "unit"]),
    "a negative timeout": ({"workers.timeout": -1}, "workers.timeout", ["-1", "> 0"]),
    "an infinite timeout": ({"workers.timeout": float("inf")}, "workers.timeout", ["finite"]),
    "an unknown schedule": ({"search.schedule": "async"}, "search.schedule", ["'async'", "asynchronous"]),
    "an unknown dtype": ({"export_dtype": "bf16"}, "export_dtype", ["'bf16'", "'bfloat16'"]),
    "an unknown objective": ({"objective": "max"}, "objective", ["'max'", "mean, min"]),
    "an unknown device": ({"workers.device": "gpu"}, "workers.device", ["'gpu'", "cuda"]),
    "negative GPUs": ({"workers.gpus": -1}, "workers.gpus", ["-1", ">= 0"]),
    "a negative seed": ({"seed": -1}, "seed", ["-1", ">= 0"]),
    "a name with a separator": ({"name": "a/b"}, "name", ["'a/b'", "Rename"]),
    "a name that leaves": ({"name": ".."}, "name", ["'..'"]),
    "a number as a name": ({"name": 3}, "name", ["3", "text"]),
    "an expert with a separator": ({"experts": {"a\\b": "adapters/add"}}, "experts", ["b'", "Rename"]),
    "an expert called base": ({"experts": {"base": "adapters/add"}}, "experts", ["'base'"]),
    "a weight below zero": ({"evaluate.tasks.one": {"weight": -1}}, "evaluate.tasks.one.weight", ["-1", "> 0"]),
    "no task": ({"evaluate.tasks": {}}, "evaluate.tasks", ["empty"]),
    "a journal file": ({"storage": "journal.log"}, "storage", ["'journal.log'", "sqlite:///"]),
    "no base": ({"base": "models/llama/bass"}, "base", ["models/llama/bass", "no folder"]),
    "a file as base": ({"base": "my_eval.py"}, "base", ["my_eval.py", "folder"]),
    "half an id as base": ({"base": "SmolLM2-135M@main"}, "base", ["no folder", "org/name@revision"]),
    "no expert folder": ({"experts.spam": "./adapters/span"}, "experts.spam", ["adapters/span", "no folder"]),
    "no space file": ({"space": "tasks.yaml"}, "space", ["tasks.yaml", "'search_spaces/task.yaml'"]),
    "no evaluator file": ({"evaluate.with": "mine.py@score"}, "evaluate.with", ["mine.py"]),
    "an evaluator that is no Python": ({"evaluate.with": "experiment.yaml"}, "evaluate.with", [".py"]),
    "a tokenizer of nobody": ({"tokenizer": {"source": "spma"}}, "tokenizer.source", ["'spma'", "'spam'"]),
    "a row of nobody": ({"tokenizer": {"tokens": {"x": {"source": "spma"}}}}, "tokenizer.tokens.x.source", ["'spam'"]),
    "a searcher alone": ({"search": "cma"}, "search", ["mapping", "'cma'"]),
    "no space": ({"space": None}, "space", ["mapping", "None"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, case: str):
    changes, key, words = REFUSED[case]
    path = changed(folder, changes)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert caught.value.where == f"{path}: {key}"
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["no base", "no expert folder", "no evaluator file", "no space file"])
def test_missing_files_are_named_with_their_whole_path(folder: Path, name: str):
    changes, _, words = REFUSED[name]
    with pytest.raises(SpecError, match=re.escape(str(folder / words[0]))):
        load_spec(changed(folder, changes))


@pytest.mark.parametrize("key", ["name", "base", "experts", "space", "search", "evaluate"])
def test_missing_keys(folder: Path, key: str):
    data = yaml.safe_load(FILE)
    del data[key]
    (folder / "experiment.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError, match="missing") as caught:
        load_spec(folder)
    assert (caught.value.where or "").endswith(f": {key}")
    assert caught.value.remedy


def test_errors_in_a_space_file_name_that_file(folder: Path):
    (folder / "space.yaml").write_text("method: ties\nweights: {granularity: task, range: [2, 1]}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(changed(folder, {"space": "space.yaml"}))
    assert caught.value.where == f"{folder / 'space.yaml'}: weights.range"


def test_all_mistakes_are_listed(folder: Path):
    with pytest.raises(SpecError) as caught:
        load_spec(changed(folder, {"seed": -1, "objective": "max", "expert_dtype": "x"}))
    for word in ("seed", "objective", "expert_dtype"):
        assert word in str(caught.value)


YAML_REFUSED = {
    "not closed": ("name: [skills\nbase: x\n", "line"),
    "a key twice": (FILE + "seed: 4\n", "'seed' stands twice"),
    "a key twice inside": (FILE.replace("count: 2", "count: 2, count: 3"), "'count' stands twice"),
    "a key that YAML reads as true": (FILE.replace("{add:", "{on: adapters/add, add:"), "quotes"),
    "a tag": ("name: !!python/object/apply:os.system ['touch RAN']\n", "python/object"),
    "a list": ("- name\n", "mapping"),
    "nothing": ("", "mapping"),
    "text": ("name", "mapping"),
    "an alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "values",
    ),
    "an alias of itself": ("a: &a [*a]\n", "itself"),
}


@pytest.mark.parametrize("case", YAML_REFUSED)
def test_bad_yaml(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    text, words = YAML_REFUSED[case]
    (folder / "experiment.yaml").write_text(text)
    with pytest.raises(SpecError, match=words) as caught:
        load_spec("experiment.yaml")
    assert (caught.value.where or "").startswith("experiment.yaml")
    assert not (folder / "RAN").exists()


def test_aliases_are_fine(folder: Path):
    (folder / "experiment.yaml").write_text(FILE.replace("one:\n", "one: &t {weight: 3}\n    three: *t\n"))
    assert load_spec(folder).task_specs()["three"].weight == 3


def test_not_text_or_not_there(folder: Path):
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for name, words in (
        ("binary.yaml", "UTF-8"),
        ("nowhere.yaml", re.escape(str(folder / "nowhere.yaml"))),
        ("models", "folder"),
    ):
        with pytest.raises(SpecError, match=words):
            load_spec(folder / name)


# --- the JSON schema


def objects(schema: dict[str, Any]):
    yield "experiment", schema
    yield from schema["$defs"].items()


def test_every_field_in_the_schema_says_what_it_means():
    for name, model in objects(json_schema()):
        for key, field in model.get("properties", {}).items():
            assert len(field.get("description", "")) > 10, f"{name}.{key}"


def test_schema_knows_methods_searchers_and_options():
    definitions = json_schema()["$defs"]
    named, _ = definitions["SpaceModel"]["properties"]["method"]["anyOf"]
    assert set(METHODS) <= set(named["anyOf"][0]["enum"])
    search = definitions["SearchSpec"]
    assert set(SEARCHERS) <= set(search["properties"]["method"]["anyOf"][0]["enum"])
    for searcher in SEARCHERS.values():
        assert set(searcher.params) <= set(search["properties"])
    assert set(search["then"]["propertyNames"]["enum"]) == set(search["properties"])


def test_schema_takes_what_is_read_and_refuses_what_is_not(folder: Path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    spec = load_spec(folder)
    assert validator.is_valid(yaml.safe_load(FILE.replace("1e-1", "0.1")))
    assert validator.is_valid(spec.to_dict())
    assert validator.is_valid({**spec.to_dict(), "space": "task.yaml"})
    for shipped in (Path(__file__).parents[1] / "search_spaces").iterdir():
        validator.validate({**spec.to_dict(), "space": yaml.safe_load(shipped.read_text())})
    for tokenizer in ("union", {"source": "base", "tokens": {"<|x|>": {"source": {"kind": "zero"}, "force": True}}}):
        validator.validate({**spec.to_dict(), "tokenizer": tokenizer})
    assert not validator.is_valid({**spec.to_dict(), "tokenizer": {"sorce": "union"}})
    plugged = spec.to_dict()
    plugged["space"]["method"] = "my_methods.py@median"
    plugged["search"] = {"method": "my_search.py@Climb", "an_option_of_its_own": 0.5}
    validator.validate(plugged)
    for case in (
        "an unknown key",
        "an unknown method",
        "an unknown searcher",
        "an unknown option",
        "a negative budget",
    ):
        changes, _, _ = REFUSED[case]
        data = yaml.safe_load(changed(folder, changes).read_text())
        assert not validator.is_valid(data), case
