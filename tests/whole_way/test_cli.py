"""Every command, on a study that a real run left behind."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .support import Run, Server, files, json_of, store

COMMANDS = [
    "run", "resume", "stop", "studies", "leaderboard", "show",
    "export", "merge", "evaluate", "methods", "schema", "doctor",
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(server: Server, finished: tuple[Path, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The winner of ``finished``, exported."""
    out = tmp_path_factory.mktemp("exported") / "winner"
    server.run("export", finished[0], "--out", out)
    return out


def winner(path: Path) -> str:
    """The subject that the study's last round chose, such as trial:5."""
    return store(path).record["rounds"][-1]["winner"]


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from evomerge.cli import main\n"
        "sys.argv = ['evomerge', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'optuna', 'transformers', 'lm_eval', 'scipy', 'sqlalchemy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(server: Server, command: str):
    assert f"evomerge {command}" in server.run(command, "--help").out


def test_no_arguments_print_the_help(server: Server):
    assert "leaderboard" in server.run(code=None).text


# --- run -----------------------------------------------------------------------------------------------------------


def test_run_says_what_it_does(finished: tuple[Path, Run]):
    path, run = finished
    assert "search: 8 of 8" in run.err
    assert "evomerge export" in run.out
    assert len(store(path).trials()) == 8


def test_run_leaves_only_the_study(finished: tuple[Path, Run], lora_family: Path):
    new = files(finished[0].parent) - files(lora_family)
    assert {name for name in new if not name.startswith("evomerge.db-")} == {
        "evomerge.db", "experiment.yaml", "my_eval.py",
    }  # fmt: skip


def test_dry_run_writes_nothing(server: Server, experiment):
    path = experiment(search={"method": "cma", "budget": 4, "initial": [{"control": "average"}]})
    before = files(path.parent)
    run = server.run("run", path, "--dry-run")
    assert files(path.parent) == before
    for fact in ("dimensions", "items", "sha256", "memory", "disk", "begins with  1 of its own points"):
        assert fact in run.text.lower()


def test_a_finished_study_runs_nothing_again(server: Server, finished_copy: Path):
    path = finished_copy
    before = [(a.key, a.attempt) for a in store(path).attempts()]
    server.run("run", path)
    assert [(a.key, a.attempt) for a in store(path).attempts()] == before


def test_more_budget_opens_a_new_round(server: Server, finished_copy: Path):
    path = finished_copy
    server.run("resume", path, "--budget", "+4")
    assert len(store(path).trials()) == 12
    assert len(store(path).record["rounds"]) == 2
    assert "test" in server.run("leaderboard", path).out


def test_the_time_limit_ends_the_search_and_resume_goes_on(server: Server, experiment):
    path = experiment()
    run = server.run("run", path, "--time", "1s", code=None)
    assert run.code in (0, 3), run.text
    assert len(store(path).trials()) < 12
    server.run("resume", path)
    assert len(store(path).trials()) == 12


def test_a_store_of_another_experiment_is_refused(server: Server, finished_copy: Path):
    path = finished_copy
    data = json.loads(path.read_text())
    data["seed"] = 1
    path.write_text(json.dumps(data))
    before = files(path.parent)
    run = server.run("run", path, code=2)
    assert "seed" in run.err
    assert files(path.parent) == before


# --- leaderboard, show, studies ------------------------------------------------------------------------------------


def test_leaderboard_in_the_terminal(server: Server, finished: tuple[Path, Run]):
    out = server.run("leaderboard", finished[0]).out
    for word in ("select", "test", "base", "expert0", "expert1", "average", "task_arithmetic"):
        assert word in out, f"{word!r} is missing in\n{out}"


def test_leaderboard_scores_are_the_stored_ones(server: Server, finished: tuple[Path, Run]):
    path, _ = finished
    board = json_of(server.run("leaderboard", path, "--format", "json"))
    stored = {e.subject: e.objective for e in store(path).evaluations(split="select")}
    assert {row["subject"]: row["score"]["value"] for row in board["select"]} == stored
    tested = {e.subject: e.objective for e in store(path).evaluations(split="test")}
    assert {row["subject"]: row["score"]["value"] for row in board["test"]} == tested
    assert board["winner"] == winner(path)


def test_leaderboard_formats_agree(server: Server, finished: tuple[Path, Run]):
    path, _ = finished
    board = json_of(server.run("leaderboard", path, "--format", "json"))
    rows = list(csv.DictReader(io.StringIO(server.run("leaderboard", path, "--format", "csv").out)))
    for section, ranked in (("select", board["select"]), ("test", board["test"])):
        assert [(r["subject"], float(r["score"])) for r in rows if r["section"] == section] == [
            (r["subject"], r["score"]["value"]) for r in ranked
        ]
    markdown = server.run("leaderboard", path, "--format", "md").out
    assert markdown.count("\n|") >= len(rows)


def test_leaderboard_by_name_and_storage(server: Server, finished: tuple[Path, Run], tmp_path: Path):
    path, _ = finished
    url = f"sqlite:///{path.parent / 'evomerge.db'}"
    by_file = server.run("leaderboard", path).out
    assert server.run("leaderboard", "tiny", cwd=path.parent).out == by_file
    assert server.run("leaderboard", "tiny", "--storage", url, cwd=tmp_path).out == by_file
    assert server.run("leaderboard", "tiny", cwd=tmp_path, EVOMERGE_STORAGE=url).out == by_file


def test_reading_writes_nothing(server: Server, finished: tuple[Path, Run]):
    path, _ = finished
    database = path.parent / "evomerge.db"
    before = database.read_bytes()
    server.run("leaderboard", path)
    server.run("show", path, "0")
    server.run("studies", "--storage", f"sqlite:///{database}")
    assert database.read_bytes() == before


def test_show(server: Server, finished: tuple[Path, Run]):
    path, _ = finished
    out = server.run("show", path, "3").out
    trial = store(path).trials()[3]
    assert trial.recipe_hash[:8] in out
    assert "task_arithmetic" in out
    assert "expert0" in out


def test_show_of_a_trial_that_does_not_exist(server: Server, finished: tuple[Path, Run]):
    assert "99" in server.run("show", finished[0], "99", code=2).err


def test_studies(server: Server, finished: tuple[Path, Run]):
    assert "tiny" in server.run("studies", cwd=finished[0].parent).out


# --- export, evaluate, merge ---------------------------------------------------------------------------------------


def test_export_is_a_checkpoint(exported: Path):
    names = files(exported)
    assert {"config.json", "tokenizer.json", "recipe.yaml", "README.md"} <= names
    assert any(name.endswith(".safetensors") for name in names)


def test_export_scores_what_the_study_says(server: Server, finished: tuple[Path, Run], exported: Path):
    """Item by item and bit for bit: the leaderboard's candidate and the files are the same numbers."""
    path, _ = finished
    evaluation = store(path).evaluation(f"{winner(path)}/select", with_outcomes=True)
    stored = {o.item_id: dict(o.values) for o in evaluation.outcomes}
    again = json_of(server.run("evaluate", exported, path, "--split", "select", "--format", "json"))
    assert {o["id"]: o["values"] for o in again["items"]} == stored
    assert again["tasks"] == dict(evaluation.scores)


def test_recipe_evaluates_like_its_export(server: Server, finished: tuple[Path, Run], exported: Path):
    path, _ = finished
    by_recipe = json_of(server.run("evaluate", exported / "recipe.yaml", path, "--split", "select", "--format", "json"))
    evaluation = store(path).evaluation(f"{winner(path)}/select", with_outcomes=True)
    assert {o["id"]: o["values"] for o in by_recipe["items"]} == {
        o.item_id: dict(o.values) for o in evaluation.outcomes
    }


def test_merge_of_the_recipe_gives_the_same_bytes(server: Server, exported: Path, tmp_path: Path):
    server.run("merge", exported / "recipe.yaml", "--out", tmp_path / "again")
    weights = sorted(p.name for p in exported.glob("*.safetensors"))
    assert weights == sorted(p.name for p in (tmp_path / "again").glob("*.safetensors"))
    for name in weights:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("format", ["recipe", "mergekit"])
def test_merge_of_the_shown_recipe_gives_the_same_bytes(
    server: Server, finished: tuple[Path, Run], exported: Path, tmp_path: Path, format: str
):
    text = server.run("show", finished[0], "best", "--format", format).out
    assert ("merge_method" in text) == (format == "mergekit")
    (tmp_path / "shown.yaml").write_text(text)
    server.run("merge", tmp_path / "shown.yaml", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_plain_transformers_loads_the_export(finished: tuple[Path, Run], exported: Path):
    """In a process that never imports evomerge: the study's outcomes, from the files alone."""
    path, _ = finished
    evaluation = store(path).evaluation(f"{winner(path)}/test", with_outcomes=True)
    texts = {item.id: item.text for item in store(path).items() if item.split == "test"}
    stored = [(texts[o.item_id], o.values["score"]) for o in evaluation.outcomes]
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "torch.set_num_threads(1)\n"
        "folder, texts = sys.argv[1], json.loads(sys.argv[2])\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()\n"
        "scores = []\n"
        "for text in texts:\n"
        "    ids = torch.tensor([tokenizer(text)['input_ids']])\n"
        "    with torch.no_grad():\n"
        "        logits = model(input_ids=ids).logits[0, :-1].float()\n"
        "    scores.append(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).mean().item())\n"
        "assert 'evomerge' not in sys.modules\n"
        "print(json.dumps(scores))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(exported), json.dumps([text for text, _ in stored])],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [score for _, score in stored]


def test_export_of_a_trial(server: Server, finished: tuple[Path, Run], tmp_path: Path):
    path, _ = finished
    server.run("export", path, "--trial", "2", "--out", tmp_path / "second")
    recipe = yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())
    trial = store(path).trials()[2]
    assert recipe["groups"] == trial.recipe["groups"]


def test_export_as_an_adapter(server: Server, finished: tuple[Path, Run], tmp_path: Path):
    """The search rounded to bfloat16 and the adapter does not: close to the study's scores, and not them."""
    path, _ = finished
    server.run("export", path, "--out", tmp_path / "adapter", "--as", "adapter", "--chat-template", chat(tmp_path))
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= files(tmp_path / "adapter")
    again = json_of(server.run("evaluate", tmp_path / "adapter", path, "--split", "select", "--format", "json"))
    stored = dict(store(path).evaluation(f"{winner(path)}/select").scores)
    assert again["tasks"] == pytest.approx(stored, abs=0.02)
    run = server.run("evaluate", tmp_path / "adapter", path, "--compare", code=3)
    assert "an adapter promises" in run.out


def chat(folder: Path) -> Path:
    (folder / "chat.jinja").write_text("{{ messages[0].content }}")
    return folder / "chat.jinja"


def test_export_in_shards(server: Server, finished: tuple[Path, Run], exported: Path, tmp_path: Path):
    from safetensors.torch import load_file

    server.run("export", finished[0], "--out", tmp_path / "out", "--shard-size", "50kB", "--tokenizer", "base")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(exported / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all((merged[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--as", "gguf"], ["--as", "adapter"]),
        (["--as", "adapter", "--shard-size", "1GB"], ["--shard-size", "one file"]),
        (["--shard-size", "huge"], ["--shard-size", "2GB"]),
        (["--tokenizer", "expert:chat"], ["--tokenizer", "expert0"]),
        (["--chat-template", "expert:expert0"], ["no chat template", ".jinja"]),
        (["--as", "adapter", "--trial", "ties"], ["method ties", "--as adapter"]),
    ],
)
def test_export_options_that_are_wrong(
    server: Server, finished: tuple[Path, Run], exported: Path, tmp_path: Path, options: list[str], words: list[str]
):
    if options[-1] == "ties":
        text = (exported / "recipe.yaml").read_text().replace("method: task_arithmetic", "method: ties")
        (tmp_path / "ties.yaml").write_text(text)
        run = server.run("merge", tmp_path / "ties.yaml", *options[:2], "--out", tmp_path / "out", code=2)
    else:
        run = server.run("export", finished[0], "--out", tmp_path / "out", *options, code=2)
    for word in words:
        assert word in run.err
    assert not (tmp_path / "out").exists()


def test_export_into_a_folder_that_is_not_empty(server: Server, finished: tuple[Path, Run], tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    run = server.run("export", finished[0], "--out", tmp_path / "mine", code=2)
    assert "mine" in run.err
    assert files(tmp_path) == {"mine", "mine/thesis.txt"}


def test_merge_of_a_short_recipe(server: Server, lora_family: Path, tmp_path: Path):
    """What a person writes by hand; with all weights zero the base's very bytes come out."""
    (tmp_path / "recipe.yaml").write_text(
        f"method: task_arithmetic\nbase: {lora_family / 'base'}\n"
        f"experts: {{a: {lora_family / 'expert0'}, b: {lora_family / 'expert1'}}}\nweights: {{a: 0, b: 0}}\n"
    )
    server.run("merge", "recipe.yaml", "--out", "merged", cwd=tmp_path)
    from safetensors.torch import load_file

    base = load_file(lora_family / "base" / "model.safetensors")
    merged = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        assert merged[name].dtype == tensor.dtype
        assert (merged[name] == tensor).all()


# --- methods, schema, doctor ---------------------------------------------------------------------------------------


def test_methods(server: Server):
    out = server.run("methods").out
    for name in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"):
        assert name in out


def test_methods_of_one(server: Server):
    out = server.run("methods", "ties").out
    assert "density" in out
    assert "(0, 1]" in out


def test_schema_accepts_the_experiment(server: Server, finished: tuple[Path, Run]):
    import jsonschema

    schema = json_of(server.run("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    data = json.loads(finished[0].read_text())
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "bass": "base"}, schema)


def test_doctor(server: Server):
    out = server.run("doctor").out
    for name in ("python", "torch", "transformers", "optuna", "ray"):
        assert name in out.lower()


def test_version(server: Server):
    from evomerge import __version__

    assert __version__ in server.run("--version").out
