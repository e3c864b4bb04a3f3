"""Evaluators that run a program of their own, with a small Python script as the program."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from evomerge import EvaluatorContext, Target, TaskSpec
from evomerge.commands import CommandEvaluator
from evomerge.errors import CandidateError, EvaluatorError
from evomerge.evaluation import check_outcomes, load_evaluator
from evomerge.testing import engines
from evomerge.testing.evaluators import EvaluatorContract
from evomerge.testing.pools import is_alive, wait_for_file, wait_until_gone

PLACE = tempfile.TemporaryDirectory()  # removed when the tests end
SPLIT = {"search": 2, "select": 2, "test": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    engines.write(tmp_path)
    return tmp_path


def make(folder: Path, **options: Any) -> Any:
    tasks = {name: TaskSpec(name) for name in ("one", "two")}
    return load_evaluator("engine_eval.py", EvaluatorContext(folder, tasks, options, batch_size=1))


@pytest.fixture
def target(lora_family: Path, tmp_path: Path) -> Target:
    own = tmp_path / "own"
    own.mkdir()
    return Target(checkpoint=lora_family / "base", scratch=own)


def evaluate(evaluator: CommandEvaluator, target: Target, count: int = 3) -> list:
    items = evaluator.load()
    evaluator.prepare(None, items)
    ids = [item.id for item in items][:count]
    outcomes = evaluator.evaluate(target, ids)
    check_outcomes(outcomes, ids)
    return outcomes


class TestCommandEvaluator(EvaluatorContract):
    """As an author of one inherits it, on the suite's own model."""

    evaluator = str(engines.write(Path(PLACE.name)))
    tasks = {"one": {}, "two": {"weight": 2.0}}  # noqa: RUF012
    split = {"search": 2, "select": 2, "test": 2}  # noqa: RUF012


def test_outcomes_are_those_of_the_program(folder: Path, target: Target):
    outcomes = evaluate(make(folder, mode="weights"), target)
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert target.checkpoint is not None
    content = b"".join((target.checkpoint / file).read_bytes() for file in files)
    for outcome, text in zip(outcomes, ["one alpha", "one bravo", "one carol"], strict=True):
        expected = int(hashlib.sha256(content + text.encode()).hexdigest()[:13], 16) / 16**13
        assert outcome.item_id == text.replace(" ", "-")
        assert outcome.values == {"score": expected, "tokens": len(text)}
        assert outcome.weight == len(text)


@pytest.mark.parametrize(
    ("mode", "kind", "reason"),
    [
        ("exit", "error", "exited with status 3: RuntimeError: no room for the KV cache"),
        ("killed", "error", "ended by signal 9, Killed (possibly because the machine was out of memory)"),
        ("missing", "incomplete", "no outcome for 1 of 3 items, such as one-bravo"),
        ("twice", "incomplete", "two outcomes for item one-alpha"),
        ("stranger", "incomplete", "stranger, which was not asked for"),
        ("nothing", "incomplete", "wrote no outcomes"),
        ("garbage", "error", "line 4 of the program's outcomes is not"),
        ("nan", "nan", "score of item one-alpha is nan"),
        ("none", "incomplete", "score of item one-alpha is None"),
        ("words", "error", "score of item one-alpha is 'high', not a number"),
    ],
)
def test_a_program_that_goes_wrong_fails_the_candidate(folder: Path, target: Target, mode: str, kind: str, reason: str):
    with pytest.raises(CandidateError) as caught:
        evaluate(make(folder, mode=mode), target)
    assert caught.value.kind == kind
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason
    if mode in ("exit", "missing", "garbage"):
        assert "the engine prints" in caught.value.detail


@pytest.mark.parametrize(
    "line",
    ["[]", "3", '{"id": 3, "values": {}}', '{"id": "x"}', '{"id": "x", "values": 3}', '{"id": "x", "vaules": {}}'],
)
def test_lines_that_are_no_outcomes(folder: Path, tmp_path: Path, line: str):
    (tmp_path / "given").write_text(f'{{"id": "a", "values": {{"score": 1}}}}\n\n{line}\n')
    with pytest.raises(CandidateError, match="line 3"):
        make(folder).read_outcomes(tmp_path / "given")


def test_no_shell_sees_the_arguments(folder: Path, target: Target):
    mode = f"weights; touch {folder / 'touched'} $(touch {folder / 'touched'})"
    evaluate(make(folder, mode=mode), target)
    assert not (folder / "touched").exists()


def test_a_program_that_is_not_there_is_refused_before_anything_is_evaluated(folder: Path):
    with pytest.raises(EvaluatorError, match="no program 'vlllm'"):
        make(folder, program="vlllm").prepare(None, [])
    with pytest.raises(EvaluatorError, match=r"no program '\./engine'"):
        make(folder, program="./engine").prepare(None, [])


def test_a_command_that_is_one_string_is_refused(folder: Path):
    class Shell(CommandEvaluator):
        def command(self, checkpoint: Path, items: Path, outcomes: Path) -> Any:
            return f"engine {checkpoint}"

    with pytest.raises(EvaluatorError, match="a list of strings"):
        Shell(EvaluatorContext(folder, {})).prepare(None, [])


def test_the_program_has_a_workers_environment(folder: Path, target: Target, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    evaluator = make(folder, mode="environment")
    monkeypatch.setattr(type(evaluator), "environment", lambda self: {"VLLM_USE_V1": "1"})
    evaluate(evaluator, target)
    found = json.loads((folder / "environment").read_text())
    threads = str(torch.get_num_threads())
    expected = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": "0", "VLLM_USE_V1": "1"}
    assert {name: found[name] for name in expected} == expected


def test_what_a_program_leaves_running_is_killed(folder: Path, target: Target):
    evaluate(make(folder, mode="child"), target)
    engine, child = map(int, (folder / "pids").read_text().split())
    assert wait_until_gone([engine, child]) == []


# A process that evaluates with a program that hangs, as a worker would.
PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with Ctrl-C ignored
from evomerge import EvaluatorContext, Target, TaskSpec
from evomerge.evaluation import load_evaluator
folder, checkpoint = map(Path, sys.argv[1:])
evaluator = load_evaluator("engine_eval.py", EvaluatorContext(folder, {"one": TaskSpec("one")}, {"mode": "hang"}))
items = evaluator.load()
evaluator.prepare(None, items)
(folder / "own").mkdir(exist_ok=True)
evaluator.evaluate(Target(checkpoint=checkpoint, scratch=folder / "own"), [items[0].id])
"""


@pytest.mark.parametrize("how", ["kill -9", "kill -9 the group", "kill -9 with its children", "Ctrl-C"])
def test_the_program_and_what_it_started_end_with_their_worker(folder: Path, lora_family: Path, how: str):
    command = [sys.executable, "-c", PARENT, str(folder), str(lora_family / "base")]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for_file(folder / "pids")
        pids = [*map(int, (folder / "pids").read_text().split())]
        pids += [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
        assert len(set(pids)) == 4  # the program, what it started, the supervisor and its guard
        assert all(is_alive(pid) for pid in pids)
        if how == "kill -9":
            parent.kill()
        elif how == "kill -9 with its children":  # Ray's way, which spares their children
            for child in psutil.Process(parent.pid).children():
                child.kill()
            parent.kill()
        else:
            os.killpg(parent.pid, signal.SIGKILL if how == "kill -9 the group" else signal.SIGINT)
        assert wait_until_gone([*pids, parent.pid]) == []
    finally:
        parent.kill()
        parent.communicate()
