"""Hugging Face ids: fetched from a real server on this machine, meant by their commit, and refused with a remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve

from evomerge.errors import CheckpointError
from evomerge.folders import find_folder
from evomerge.hub import HubId, hub_id, pin
from evomerge.merging import pin_sources
from evomerge.modelcard import model_card
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.recipe import Group, Recipe, Source
from evomerge.spec import load_spec

PINS = """
import json, sys
from evomerge.errors import UserError
from evomerge.folders import find_folder
from evomerge.hub import pin
from evomerge.progress import Progress
answers = {}
for name in sys.argv[1:]:
    try:
        pinned = pin(name, Progress())
        folder = find_folder(pinned)
        answers[name] = [pinned, sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))]
    except UserError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(lora_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """org/base with files that nobody asked for; org/adapter on a branch; org/gated; org/pickled."""
    folder = tmp_path_factory.mktemp("hub")
    base = shutil.copytree(lora_family / "base", folder / "base")
    for name in ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "onnx/model.safetensors"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"not wanted")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"can run code")
    with serve(folder / "published") as server:
        server.publish("org/base", base)
        server.publish("org/adapter", lora_family / "expert0", branch="refs/pr/1")
        server.publish("org/gated", base)
        server.gated.add("org/gated")
        server.publish("org/pickled", pickled)
        yield server


@pytest.fixture
def pins(hub: Hub, tmp_path: Path) -> Callable[..., dict]:
    """``pins(*names)``: in a new process with a cache of its own, what ``pin`` makes of each, or the error's text."""

    def ask(*names: str, **environment: str) -> dict:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", **environment}
        done = subprocess.run(
            [sys.executable, "-c", PINS, *names],
            env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("HuggingFaceTB/SmolLM2-1.7B_x.y", HubId("HuggingFaceTB/SmolLM2-1.7B_x.y")),
        ("org/name@main", HubId("org/name", "main")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        *((text, None) for text in ("name", "a/b/c", "./a/b", "../a", "/a/b", "~/a", "org/", "org/name@", "a b/c", "")),
        *((text, None) for text in ("org/name@../x", "org/../name", "org/name@v1@v2")),
    ],
)
def test_what_is_an_id(text: str, expected: HubId | None):
    assert hub_id(text) == expected
    assert expected is None or str(expected) == text


def test_ids_are_fetched_and_pinned_to_their_commits(hub: Hub, pins: Callable[..., dict], lora_family: Path):
    """The wanted files only, the same bytes; once they are there nothing is asked for, with or without a network."""
    base, adapter = hub.revisions["org/base"]["main"], hub.revisions["org/adapter"]["refs/pr/1"]
    answers = pins("org/base", "org/adapter@refs/pr/1", f"org/base@{base}")
    names = {p.name for p in (lora_family / "base").iterdir()} | {"additional_chat_templates"}
    expected = [f"org/base@{base}", sorted([*names, "additional_chat_templates/tools.jinja"])]
    assert answers["org/base"] == answers[f"org/base@{base}"] == expected
    assert answers["org/adapter@refs/pr/1"] == [
        f"org/adapter@{adapter}", ["adapter_config.json", "adapter_model.safetensors"],
    ]  # fmt: skip
    fetched = [r for r in hub.requests if "/resolve/" in r and r.startswith("GET")]
    assert len(fetched) == len(set(fetched))

    hub.requests.clear()
    assert pins(f"org/base@{base}") == {f"org/base@{base}": expected}
    assert pins("org/base", HF_HUB_OFFLINE="1") == {"org/base": expected}
    assert not [r for r in hub.requests if "org/" in r]
    assert pins("org/base", HF_ENDPOINT="http://127.0.0.1:9") == {"org/base": expected}


def test_refusals_say_what_to_do(hub: Hub, pins: Callable[..., dict]):
    commit = "0123456789" * 4
    answers = pins("org/nope", "org/base@v9", f"org/base@{commit}", "org/gated", "org/pickled", "models", "a..b/c")
    words = {
        "org/nope": ["no model org/nope", "private", "hf auth login", "there is no folder org/nope"],
        "org/base@v9": ["no revision v9", "@"],
        f"org/base@{commit}": [f"no revision {commit}"],
        "org/gated": ["owners", f"{hub.url}/org/gated", "HF_TOKEN"],
        "org/pickled": ["safetensors", "pickled", "save_pretrained"],
        "models": ["no folder models", "org/name@revision"],
        "a..b/c": ["no Hugging Face id"],
    }
    assert answers.keys() == words.keys()
    for name, expected in words.items():
        for word in expected:
            assert word in answers[name], answers[name]
    for environment, word in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ):
        answer = pins("org/elsewhere", **environment)["org/elsewhere"]
        assert word in answer
        assert "hf download org/elsewhere" in answer


def test_a_copy_that_is_not_whole(hub: Hub, pins: Callable[..., dict], tmp_path: Path):
    """A file is lost from the cache: refused by name without a network, fetched again with one."""
    ((pinned, files),) = pins("org/base").values()
    (lost,) = (tmp_path / "home").rglob("model.safetensors")
    lost.unlink()
    assert "not all of them" in pins(pinned, HF_HUB_OFFLINE="1")[pinned]
    assert pins(pinned)[pinned] == [pinned, files]


def test_a_folder_goes_before_an_id(lora_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(lora_family / "base", tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    assert pin("org/base") == "org/base"
    assert find_folder("org/base", beside=tmp_path) == tmp_path / "org" / "base"


@pytest.mark.parametrize("key", ["base", "experts.expert1"])
def test_the_plan_names_the_key(experiment: Callable[..., Path], key: str):
    path = experiment()
    data = json.loads(path.read_text())
    table = data if key == "base" else data["experts"]
    table[key.removeprefix("experts.")] = "org/somewhere@v1"
    path.write_text(json.dumps(data))
    spec = load_spec(path)
    with pytest.raises(CheckpointError, match=rf"experiment\.yaml: {key}: .*org/somewhere@v1(.|\n)*hf download"):
        build_plan(spec, Progress(quiet=True))


def test_the_card_says_where_sources_on_the_hub_are(lora_family: Path):
    commit = "a" * 40
    recipe = Recipe(
        Source("base", f"org/base@{commit}"), (Source("x", str(lora_family / "expert0")),), "linear", (Group((1.0,)),)
    )
    text = model_card(recipe, {}, {})
    assert f"`org/base@{commit}`" in text
    assert "base_model:\n- org/base\n" in text
    assert str(lora_family) not in text
    with pytest.raises(CheckpointError, match="base base: there is no folder org/base"):
        pin_sources(recipe)
