"""Real processes for the whole-way tests: the command line, its workers, and what they leave in the store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock

import psutil

from .server import Forked

# Scores a text by log-likelihood, as tiny.EVALUATOR does. Each call writes the worker's pid to calls.txt, by which a
# test sees how far a search is and whom to kill, and takes a time that depends on the weights alone: with several
# workers, candidates finish in another order than they were proposed in.
SLOW_EVALUATOR = """
import os
import time
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAUSE = {pause}  # seconds, at most


def items():
    words = ["alpha", "bravo", "carol", "delta", "eager", "fable", "gamma", "hotel"]
    return [{{"task": "one", "text": f"{{a}} {{b}}"}} for a in words for b in words]


def score(model, tokenizer, items):
    with open(HERE / "calls.txt", "a") as calls:
        calls.write(f"{{os.getpid()}}\\n")
    weights = b"".join(p.detach().float().sum().numpy().tobytes() for p in model.parameters())
    time.sleep(PAUSE * (10 + zlib.crc32(weights) % 91) / 100)
    scores = []
    for item in items:
        ids = torch.tensor([tokenizer(item["text"])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        scores.append(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).mean().item())
    return scores
"""


@dataclass(frozen=True)
class Run:
    """A command that has ended: its exit code, what it printed, and the code of models that it loaded, if known."""

    code: int
    out: str
    err: str
    model_modules: tuple[str, ...] | None = None

    @property
    def text(self) -> str:
        return self.out + self.err


def start(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """`evomerge ARGUMENTS` in a process group of its own, as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "evomerge.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str] | Started, *, seconds: float = 400) -> Run:
    """Wait for ``process``; one that does not end is killed, and the test fails with what it said."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate(timeout=30)
        raise AssertionError(f"did not end within {seconds} s: {process.args}\n{out}\n{err}") from None
    return Run(process.returncode, out, err)


def evomerge(
    *arguments: str | Path, cwd: Path | None = None, code: int | None = 0, seconds: float = 400, **environment: str
) -> Run:
    """Run `evomerge ARGUMENTS` in a new interpreter and expect ``code`` (None: any)."""
    return expect(end(start(*arguments, cwd=cwd, **environment), seconds=seconds), code)


def expect(run: Run, code: int | None) -> Run:
    assert code is None or run.code == code, f"exit code {run.code} instead of {code}\n{run.text}"
    return run


class Started(Forked):
    """A command line that a ``Server`` has started, with what it prints in files."""

    def __init__(self, server: str, folder: Path, arguments: tuple[str | Path, ...], cwd: Path | None, **environment):
        self._files = [folder / name for name in ("out", "err", "report")]
        request = {
            "arguments": [str(a) for a in arguments], "cwd": str(cwd or Path.cwd()), "environment": environment,
            "report": str(self._files[2]),
        }  # fmt: skip
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            super().__init__(server, request, [out.fileno(), err.fileno()])

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._files[0].read_text(), self._files[1].read_text()

    @property
    def model_modules(self) -> tuple[str, ...]:
        """The code of models that it loaded; for one that was not killed."""
        return tuple(json.loads(self._files[2].read_text()))


class Server:
    """Runs command lines in processes forked from one that has imported what they need (see server.py)."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="server-"))
        self.socket = self._folder / "socket"
        self._count = count()
        self._starts = Lock()

    def start(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> Started:
        """`evomerge ARGUMENTS` in a session of its own; several may run at once."""
        with self._starts:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("server.py")), str(self.socket)],
                    env={**os.environ, "PYTHONHASHSEED": "0"},  # as workers have it
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                assert self._process.stdout is not None
                assert self._process.stdout.readline() == "ready\n"
            folder = self._folder / str(next(self._count))
            folder.mkdir()
        return Started(str(self.socket), folder, arguments, cwd, **environment)

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, code: int | None = 0, seconds: float = 400, **environment
    ) -> Run:
        """Run `evomerge ARGUMENTS` and expect ``code`` (None: any)."""
        process = self.start(*arguments, cwd=cwd, **environment)
        run = end(process, seconds=seconds)
        return expect(Run(run.code, run.out, run.err, process.model_modules), code)

    def close(self) -> None:
        if self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def kill_tree(pid: int) -> None:
    """kill -9 a process and all that it started."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def wait_for(what: Callable[[], object], *, seconds: float = 240, every: float = 0.01, why: str = "") -> None:
    """Poll until ``what()`` is true."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited {seconds} s in vain: {why or what}"
        time.sleep(every)


def calls(folder: Path) -> list[int]:
    """The pids of the workers that evaluated something, one an evaluation, in order (SLOW_EVALUATOR)."""
    path = folder / "calls.txt"
    return [int(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def store(experiment: Path, name: str = "tiny"):
    """The study's store, opened for reading."""
    from evomerge.store import Store

    return Store.open(f"sqlite:///{experiment.parent / 'evomerge.db'}", name)


def candidates(experiment: Path, name: str = "tiny") -> list[tuple]:
    """(number, state, point, recipe hash, score) of every trial, and the outcomes of every item: bit for bit."""
    opened = store(experiment, name)
    outcomes = {
        e.key: (e.recipe_hash, [(o.item_id, sorted(o.values.items())) for o in e.outcomes], e.objective)
        for e in opened.evaluations(with_outcomes=True)
    }
    return [
        *((t.n, t.state, sorted(t.point.items()), t.recipe_hash, t.score) for t in opened.trials()),
        *sorted(outcomes.items()),
    ]


def files(folder: Path) -> set[str]:
    """Every file and folder below ``folder``, but Python's own caches."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    return {name for name in found if "__pycache__" not in name}


def send(process: subprocess.Popen[str] | Started, number: signal.Signals) -> None:
    """What a terminal (Ctrl-C) or a scheduler sends: to the driver alone. Workers must not die of it."""
    os.kill(process.pid, number)


def send_group(process: subprocess.Popen[str] | Started, number: signal.Signals) -> None:
    """What Ctrl-C in a terminal really does: the whole process group of the foreground gets it."""
    os.killpg(process.pid, number)


def json_of(run: Run):
    return json.loads(run.out)


def slow_experiment(write: Callable[..., Path], *, pause: float, method: str = "cma", seed: int = 0, **keys) -> Path:
    """An experiment of 30 candidates on SLOW_EVALUATOR, with few items and a short closing stage."""
    options: dict = {"population": 6} if method == "cma" else {}
    settings = {
        "search": {"method": method, "budget": 30, **options},
        "evaluate": {
            "with": "my_eval.py@score",
            "tasks": {"one": {}},
            "split": {"search": 4, "select": 4, "test": 4},
            "finish": {"top": 2},
        },
        "seed": seed,
        **keys,
    }
    path = write(**settings)
    (path.parent / "my_eval.py").write_text(SLOW_EVALUATOR.format(pause=pause))
    return path
