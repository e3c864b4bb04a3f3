"""Wrong input is refused before any model loads: exit code 2, a message that names it, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .support import Run, Server, files

Refuse = Callable[..., Run]
RunRefused = Callable[..., None]


@pytest.fixture
def refused(server: Server) -> Refuse:
    """Runs a command on bad input in ``cwd``: it must end with 2, before any model, and leave nothing behind."""

    def refuse(*arguments: str | Path, cwd: Path) -> Run:
        before = files(cwd)
        run = server.run(*arguments, cwd=cwd, code=2)
        assert "Traceback" not in run.text, run.text
        assert run.model_modules == (), run.text
        assert files(cwd) == before, f"left behind: {files(cwd) - before}"
        return run

    return refuse


@pytest.fixture
def run_refused(refused: Refuse) -> RunRefused:
    """`evomerge run` refuses an experiment file in words that hold each of ``names``."""

    def check(path: Path, *names: str) -> None:
        text = " ".join(refused("run", path.name, cwd=path.parent).err.split())
        for name in names:
            assert name in text, f"{name!r} is not named in:\n{text}"

    return check


def change(path: Path, **keys) -> None:
    data = json.loads(path.read_text())
    for key, value in keys.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    path.write_text(json.dumps(data))


# --- keys and values of the experiment file ------------------------------------------------------------------------

BAD_VALUES = {
    "a key that does not exist": ({"expert_dtype": "bfloat16"}, ["expert_dtype", "export_dtype"]),
    "a nested key that does not exist": ({"workers": {"cont": 2}}, ["workers", "cont", "count"]),
    "a method that does not exist": ({"space": {"method": "task_aritmetic"}}, ["task_aritmetic", "task_arithmetic"]),
    "a searcher that does not exist": ({"search": {"method": "cmaes", "budget": 4}}, ["cmaes", "cma"]),
    "an option the searcher does not have": ({"search": {"popsize": 4}}, ["popsize", "population"]),
    "a task that does not exist": ({"evaluate": {"tasks": {"one": {}, "three": {}}}}, ["three"]),
    "a granularity that does not exist": (
        {"space": {"weights": {"granularity": "layers", "range": [0, 1]}}},
        ["layers", "layer_groups"],
    ),
    "a range upside down": (
        {"space": {"weights": {"granularity": "task", "range": [1.5, 0.5], "initial": 1.0}}},
        ["1.5", "0.5", "range"],
    ),
    "more groups than layers": (
        {"space": {"weights": {"granularity": "layer_groups", "groups": 9, "range": [0, 1]}}},
        ["groups", "9", "4"],
    ),
    "density 0": ({"space": {"method": "ties", "params": {"density": 0.0}}}, ["density", "0", "ties"]),
    "slerp of three": ({"space": {"method": "slerp"}, "experts": {"expert2": "expert0"}}, ["slerp"]),
    "a split with too few items": (
        {"evaluate": {"split": {"search": 60, "select": 8, "test": 8}}},
        ["one", "60", "64"],
    ),
    "an objective that does not exist": ({"objective": "max"}, ["objective", "max", "mean"]),
    "a dtype that does not exist": ({"export_dtype": "bf16"}, ["export_dtype", "bf16", "bfloat16"]),
    "GPUs where none are": ({"workers": {"gpus": 1, "count": 2}}, ["GPU"]),
    "a budget below zero": ({"search": {"budget": -3}}, ["budget", "-3"]),
    "a journal file as the store": ({"storage": "journal.log"}, ["journal.log"]),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(run_refused: RunRefused, experiment: Callable[..., Path], case: str):
    if "GPU" in case and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    changes, names = BAD_VALUES[case]
    path = experiment()
    change(path, **changes)
    run_refused(path, *names)


def test_experiment_file_is_missing(refused: Refuse, tmp_path: Path):
    assert "nowhere.yaml" in refused("run", "nowhere.yaml", cwd=tmp_path).err


def test_experiment_file_is_no_yaml(refused: Refuse, tmp_path: Path):
    (tmp_path / "experiment.yaml").write_text("name: [tiny\nbase: base\n")
    assert "experiment.yaml" in refused("run", "experiment.yaml", cwd=tmp_path).err


def test_yaml_tags_run_nothing(refused: Refuse, tmp_path: Path):
    marker = tmp_path / "ran"
    (tmp_path / "experiment.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {marker}']\n")
    refused("run", "experiment.yaml", cwd=tmp_path)
    assert not marker.exists()


def test_evaluator_is_missing(run_refused: RunRefused, experiment: Callable[..., Path]):
    path = experiment()
    change(path, evaluate={"with": "their_eval.py@score"})
    run_refused(path, "their_eval.py")


def test_evaluator_has_no_such_function(run_refused: RunRefused, experiment: Callable[..., Path]):
    path = experiment()
    change(path, evaluate={"with": "my_eval.py@scores"})
    run_refused(path, "my_eval.py", "scores")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_base_is_missing(run_refused: RunRefused, experiment: Callable[..., Path]):
    path = experiment()
    change(path, base="nowhere")
    run_refused(path, "nowhere", "base")


def test_expert_is_missing(run_refused: RunRefused, experiment: Callable[..., Path]):
    path = experiment()
    change(path, experts={"expert1": "nowhere"})
    run_refused(path, "nowhere", "expert1")


def test_expert_of_another_architecture(
    run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path, moe_family: Path
):
    path = experiment(dense_family)
    change(path, experts={"expert1": str(moe_family / "expert0")})
    run_refused(path, "expert0", "mixtral", "llama")


def test_expert_of_another_vocabulary(run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path):
    path = experiment(dense_family)
    file = path.parent / "expert1" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(data))
    run_refused(path, "expert1", "vocabulary")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.self_attn.q_proj.weight"


def test_tensor_is_missing(run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path):
    path = experiment(dense_family)
    edit_weights(path.parent / "expert1", lambda tensors: tensors.pop(NAME))
    run_refused(path, "expert1", NAME)


def test_tensor_of_another_shape(run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path):
    path = experiment(dense_family)
    edit_weights(path.parent / "expert1", lambda tensors: tensors.update({NAME: tensors[NAME][:16].clone()}))
    run_refused(path, "expert1", NAME, "16", "32")


@pytest.mark.parametrize("left", [0, 5, 200, 0.5, 0.999], ids=str)
def test_truncated_file(run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path, left: float):
    path = experiment(dense_family)
    file = path.parent / "expert0" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: left if isinstance(left, int) else int(len(content) * left)])
    run_refused(path, "expert0", "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_tensor_is_not_finite(
    run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path, value: float
):
    path = experiment(dense_family)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][3, 4] = value

    edit_weights(path.parent / "expert1", spoil)
    run_refused(path, "expert1", NAME)


def test_adapter_is_not_finite(run_refused: RunRefused, experiment: Callable[..., Path]):
    path = experiment()
    file = path.parent / "expert1" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    run_refused(path, "expert1", name.removeprefix("base_model.model.").split(".lora_")[0])


def test_pickle_checkpoint(run_refused: RunRefused, experiment: Callable[..., Path], dense_family: Path):
    path = experiment(dense_family)
    folder = path.parent / "expert0"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    run_refused(path, "expert0", "pytorch_model.bin", "safetensors")


def test_adapter_of_another_base(run_refused: RunRefused, experiment: Callable[..., Path], tmp_path: Path):
    from evomerge.testing import tiny

    other = tiny.save_model(tmp_path / "other", tiny.llama_config(hidden_size=48), seed=5)
    tiny.save_lora_expert(other, tmp_path / "stranger", seed=1)
    path = experiment()
    change(path, experts={"expert1": str(tmp_path / "stranger")})
    run_refused(path, "stranger", "down_proj", "48", "32")


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("bias", "all"), ("target_parameters", ["mlp.weight"]), ("trainable_token_indices", [1])],
)
def test_adapter_that_is_more_than_low_rank(
    run_refused: RunRefused, experiment: Callable[..., Path], key: str, value: object
):
    path = experiment()
    file = path.parent / "expert1" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    run_refused(path, "expert1", key)


# --- the other commands --------------------------------------------------------------------------------------------


def test_recipe_with_an_unknown_method(refused: Refuse, lora_family: Path, tmp_path: Path):
    recipe = {
        "method": "tie",
        "base": str(lora_family / "base"),
        "experts": {"a": str(lora_family / "expert0"), "b": str(lora_family / "expert1")},
        "weights": {"a": 0.5, "b": 0.5},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert "ties" in refused("merge", "recipe.yaml", "--out", "merged", cwd=tmp_path).err


@pytest.mark.parametrize(
    ("device", "named"),
    [
        ("tpu", "--device"),
        pytest.param("cuda", "GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_merge_on_a_device_that_is_not_there(
    refused: Refuse, lora_family: Path, tmp_path: Path, device: str, named: str
):
    recipe = {"base": str(lora_family / "base"), "experts": {"a": str(lora_family / "expert0")}, "weights": [1.0]}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"evomerge_recipe": 1, "method": "task_arithmetic", **recipe}))
    assert named in refused("merge", "recipe.yaml", "--out", "merged", "--device", device, cwd=tmp_path).err


def test_merge_into_a_folder_that_is_not_empty(refused: Refuse, lora_family: Path, tmp_path: Path):
    recipe = {
        "method": "task_arithmetic",
        "base": str(lora_family / "base"),
        "experts": {"a": str(lora_family / "expert0"), "b": str(lora_family / "expert1")},
        "weights": {"a": 0.5, "b": 0.5},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("mine")
    assert "merged" in refused("merge", "recipe.yaml", "--out", "merged", cwd=tmp_path).err


@pytest.mark.parametrize("command", [["leaderboard"], ["resume"], ["stop"], ["show"], ["export"]], ids=lambda c: c[0])
def test_study_that_does_not_exist(refused: Refuse, tmp_path: Path, command: list[str]):
    more = {"show": ["0"], "export": ["--out", "merged"]}.get(command[0], [])
    assert "nothing-here" in refused(*command, "nothing-here", *more, cwd=tmp_path).err


def test_method_that_does_not_exist(refused: Refuse, tmp_path: Path):
    assert "ties" in refused("methods", "tie", cwd=tmp_path).err
