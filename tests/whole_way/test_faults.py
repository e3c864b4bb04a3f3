"""Killed, stopped, shuffled: a study goes on as if nothing had been. Real processes, real kill -9."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from .support import (
    Server,
    Started,
    alive,
    calls,
    candidates,
    end,
    evomerge,
    json_of,
    kill_tree,
    send,
    send_group,
    slow_experiment,
    start,
    store,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = ["cma", "tpe", "random"]
BUDGET = 30


def undisturbed(path: Path) -> None:
    """Run the whole study at ``path`` in this process: no pool, no worker, no command line."""
    from evomerge.launch import Options, open_or_create, storage_of
    from evomerge.planning import build_plan
    from evomerge.pools import LocalPool
    from evomerge.progress import Progress
    from evomerge.running import Runner, StopSignal
    from evomerge.spec import load_spec
    from evomerge.study import Study

    quiet = Progress(quiet=True)
    plan = build_plan(load_spec(path), quiet)
    opened, budget = open_or_create(plan, storage_of(plan.spec, None), Options(), quiet, must_exist=False)
    with opened.lock():
        runner = Runner(plan, opened, lambda: LocalPool(timeout=None, inline=True), StopSignal(), quiet, 2)
        Study(plan, opened, runner, quiet, budget=budget).run()
        runner.close()


def assert_whole(path: Path) -> None:
    """Every trial has ended once, none is lost, and the budget is exact."""
    trials = store(path).trials()
    assert [t.n for t in trials] == list(range(BUDGET))
    assert {t.state for t in trials} == {"complete"}


def disturb(path: Path, chance: random.Random, *options: str, server: Server | None = None) -> None:
    """Start the study at ``path``; kill -9 a worker at one random moment and the driver at a later one; resume.

    Driver and workers are processes of ``server``, or else new interpreters.
    """
    driver_at = chance.randrange(13, 13 + BUDGET)
    worker_at = chance.randrange(1, driver_at)
    driver = (server.start if server else start)("run", path, *options)
    try:
        wait_for(lambda: len(calls(path.parent)) >= worker_at or driver.poll() is not None, why="a first evaluation")
        assert driver.poll() is None, end(driver).text
        time.sleep(chance.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):  # it may have just ended
            os.kill(calls(path.parent)[-1], signal.SIGKILL)
        wait_for(lambda: len(calls(path.parent)) >= driver_at or driver.poll() is not None, why="the search")
        time.sleep(chance.uniform(0, 0.1))
        driver.kill()
        ended = end(driver, seconds=400)
        assert ended.code == -signal.SIGKILL, ended.text
        wait_for(lambda: not any(alive(pid) for pid in set(calls(path.parent))), why="workers ending with their driver")
    finally:
        kill_tree(driver.pid)
    (server.run if server else evomerge)("resume", path, *options, seconds=500)


@pytest.mark.parametrize("method", METHODS)
def test_kill_9_of_worker_and_driver(server: Server, many: Callable[..., Path], method: str):
    """Ten studies with seeds of their own, each with a worker and then the driver killed at random moments.

    The first of each ten has interpreters of its own, as users have; the others are spared the imports.
    """
    paths = [slow_experiment(many, pause=0.06, method=method, seed=seed) for seed in range(10)]
    with ThreadPoolExecutor(max_workers=2) as threads:
        list(
            threads.map(
                lambda seed: disturb(paths[seed], random.Random(f"{method} {seed}"), server=server if seed else None),
                range(10),
            )
        )
    lost = 0
    for seed, path in enumerate(paths):
        assert_whole(path)
        alone = slow_experiment(many, pause=0.0, method=method, seed=seed)
        undisturbed(alone)
        assert candidates(path) == candidates(alone), f"seed {seed}"
        lost += sum(attempt.state == "lost" for attempt in store(path).attempts())
    assert lost >= 1, "some workers should have been killed in the middle of an evaluation"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster on this machine with 4 CPUs (of bookkeeping), shared by the tests below: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = Path("/tmp") / f"evomerge-ray-{port}"  # Unix sockets: the path must be short
    # A machine that has run Ray holds a token; its new heads then ask for one, but drivers given an address send none.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
            f"--temp-dir={temporary}", "--object-store-memory=100000000",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def listens() -> bool:
        assert head.poll() is None, head.communicate()[0]
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens, every=0.2, why="Ray's head node")
        yield f"127.0.0.1:{port}"
    finally:
        del os.environ["RAY_AUTH_MODE"]
        kill_tree(head.pid)
        subprocess.run(["rm", "-rf", str(temporary)], check=False)


HALF = {"workers": {"count": 1, "cpus": 0.5, "threads": 1}}


@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_four_workers_on_ray(server: Server, many: Callable[..., Path], cluster: str, method: str):
    """The same study from 1, 2 and 4 workers of half a CPU, though candidates finish in a shuffled order."""
    alone = slow_experiment(many, pause=0.0, method=method, seed=3, **HALF)
    undisturbed(alone)
    for count in (1, 2, 4):
        path = slow_experiment(many, pause=0.15, method=method, seed=3, **HALF)
        there = ("--workers", str(count), "--address", cluster)
        server.run("run", path, *there, seconds=500, RAY_AUTH_MODE=os.environ["RAY_AUTH_MODE"])
        assert_whole(path)
        assert len(set(calls(path.parent))) == count
        assert candidates(path) == candidates(alone), f"{count} workers"
        if count == 4:
            trials = store(path).trials()
            ended = sorted(trials, key=lambda t: t.finished)
            assert [t.n for t in ended] != list(range(BUDGET)), "the order of completion was not shuffled"


@pytest.mark.parametrize("method", METHODS)
def test_kill_9_on_ray(many: Callable[..., Path], cluster: str, method: str):
    """As above with two Ray workers: an actor is killed, then the driver."""
    alone = slow_experiment(many, pause=0.0, method=method, seed=4, **HALF)
    undisturbed(alone)
    path = slow_experiment(many, pause=0.15, method=method, seed=4, **HALF)
    disturb(path, random.Random(method), "--workers", "2", "--address", cluster)
    assert_whole(path)
    assert candidates(path) == candidates(alone)


def test_ray_of_its_own(many: Callable[..., Path]):
    """Without an address, two workers bring a Ray of their own, and leave nothing of it behind."""
    alone = slow_experiment(many, pause=0.0, method="random", seed=5, **HALF)
    undisturbed(alone)
    path = slow_experiment(many, pause=0.1, method="random", seed=5, **HALF)
    driver = start("run", path, "--workers", "2")
    try:
        wait_for(lambda: len(calls(path.parent)) >= 15 or driver.poll() is not None, seconds=400)
        family = psutil.Process(driver.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in family)
        assert end(driver).code == 0
        wait_for(lambda: not any(alive(p.pid) for p in family), why="Ray's processes ending")
    finally:
        kill_tree(driver.pid)
    assert candidates(path) == candidates(alone)


# --- stopping ------------------------------------------------------------------------------------------------------


def small(many: Callable[..., Path], *, pause: float) -> Path:
    """Four candidates whose evaluations take up to ``pause`` seconds each."""
    return slow_experiment(many, pause=pause, search={"method": "random", "budget": 4})


def running(server: Server, path: Path, *, after: int) -> Started:
    """A driver of the study at ``path`` that is in its evaluation number ``after``."""
    driver = server.start("run", path)
    wait_for(lambda: len(calls(path.parent)) >= after or driver.poll() is not None, why="evaluations")
    assert driver.poll() is None, driver.communicate()
    return driver


def stored(path: Path) -> int:
    return len(store(path).evaluations())


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_stopped_once_drains(server: Server, many: Callable[..., Path], how: str):
    path = small(many, pause=2.0)
    driver = running(server, path, after=3)
    before = stored(path)
    send_group(driver, signal.SIGINT) if how == "Ctrl-C" else send(driver, signal.SIGTERM)
    run = end(driver, seconds=400)
    assert run.code == 130, run.text
    assert "evomerge resume" in run.err
    assert "Traceback" not in run.err, run.err
    assert stored(path) == len(calls(path.parent)) > before, "what was running should have been stored"
    assert not any(alive(pid) for pid in calls(path.parent))
    server.run("resume", path)
    alone = small(many, pause=0.0)
    undisturbed(alone)
    assert candidates(path) == candidates(alone)


@pytest.mark.parametrize("workers", [1, 2], ids=["a child", "Ray"])
@pytest.mark.parametrize("later", [0.2, 2.5, 4.5])
def test_stopped_while_workers_start(many: Callable[..., Path], workers: int, later: float):
    """Nothing is running, so that the first Ctrl-C ends it, wherever the start has come to."""
    path = small(many, pause=2.0)
    driver = start("run", path, "--workers", str(workers))
    assert driver.stderr is not None
    for line in driver.stderr:
        if "starting workers" in line:
            break
    time.sleep(later)
    send_group(driver, signal.SIGINT)
    run = end(driver, seconds=100)
    assert run.code == 130, run.text
    assert "Traceback" not in run.err, run.err
    assert "evomerge resume" in run.err
    assert "ready after" in run.err or stored(path) == 0
    assert not any(alive(pid) for pid in calls(path.parent))


def test_stopped_twice_drops(server: Server, many: Callable[..., Path]):
    path = small(many, pause=300.0)
    driver = running(server, path, after=1)
    send_group(driver, signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    send_group(driver, signal.SIGINT)
    run = end(driver, seconds=400)
    assert run.code == 130, run.text
    assert "evomerge resume" in run.err
    assert "Traceback" not in run.err, run.err
    assert time.monotonic() - began < 25
    assert not any(alive(pid) for pid in calls(path.parent))
    assert stored(path) == len(calls(path.parent)) - 1, "what was running should have been dropped"
    assert "Stopped after 0 of 4" in run.err


def test_two_drivers_and_stop(server: Server, many: Callable[..., Path]):
    path = small(many, pause=10.0)
    driver = running(server, path, after=1)
    second = server.run("resume", path, code=2)
    assert str(driver.pid) in second.err
    assert socket.gethostname() in second.err
    assert str(driver.pid) in server.run("stop", path).out
    first = end(driver)
    assert first.code == 130, first.text
    assert "evomerge resume" in first.err
    assert "nothing is running" in server.run("stop", path).out


# --- candidates that misbehave -------------------------------------------------------------------------------------

# The first 13 calls are the controls'. A killed evaluation is tried three times in all, the others once.
UNRULY = """
call = len((HERE / "calls.txt").read_text().splitlines())
    if call == 15:
        return [float("nan")] * len(items)
    if call == 16:
        raise ValueError("the evaluator did not like this one")
    if call == 17:
        time.sleep(3600)
    if call == 18:
        return [0.0] * (len(items) - 1)
    if call in (19, 21, 22, 23):
        os.kill(os.getpid(), 9)
    if call == 24:
        return [float("inf")] * len(items)
"""


def test_failures_are_trials_with_a_reason(server: Server, many: Callable[..., Path]):
    path = slow_experiment(
        many, pause=0.0, search={"method": "cma", "budget": 14, "population": 4}, workers={"timeout": 5, "retries": 2}
    )
    code = (path.parent / "my_eval.py").read_text()
    (path.parent / "my_eval.py").write_text(code.replace("    weights = b", f"    {UNRULY.strip()}\n    weights = b"))
    run = server.run("run", path, code=None)
    assert run.code in (0, 3), run.text
    trials = store(path).trials()
    assert len(trials) == 14
    failed = {t.n: t.failure for t in trials if t.state == "fail"}
    kinds = sorted(str(reason).partition(":")[0] for reason in failed.values())
    assert kinds == ["error", "incomplete", "lost", "nan", "nan", "timeout"], failed
    assert any("did not like this one" in str(reason) for reason in failed.values())
    assert all(t.score is None for t in trials if t.state == "fail")
    board = json_of(server.run("leaderboard", path, "--format", "json"))
    assert not {f"trial:{n}" for n in failed} & {row["subject"] for row in board["select"]}
    attempts = store(path).attempts()
    assert sum(a.state == "lost" for a in attempts) == 4


# --- drift ---------------------------------------------------------------------------------------------------------


def test_drift_is_refused_by_name(server: Server, finished_copy: Path):
    path = finished_copy
    code = path.parent / "my_eval.py"
    code.write_text(code.read_text() + "\n# a change\n")
    config = path.parent / "expert1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    run = server.run("resume", path, "--budget", "+1", code=2)
    assert "my_eval.py" in run.err
    assert "expert1" in run.err
    assert "expert0" not in run.err
    assert "--allow-drift" in run.err
    assert len(store(path).trials()) == 8
    server.run("resume", path, "--budget", "+1", "--allow-drift")
    assert len(store(path).trials()) == 9
    assert store(path).record["drift"]


# --- the winner ----------------------------------------------------------------------------------------------------

# Scores on the items that the search sees grow with the weights, on all others they shrink.
PLANTED = """
def items():
    splits = [name for name in ("train", "dev", "eval") for _ in range(8)]
    return [{"task": "one", "text": f"question {i}", "split": split} for i, split in enumerate(splits)]


def score(model, tokenizer, items):
    size = sum(float(p.detach().double().norm()) for p in model.parameters())
    return [size if item["split"] == "train" else -size for item in items]
"""


def test_a_planted_candidate_does_not_win(server: Server, many: Callable[..., Path]):
    """Best of all on search, worst of the re-tested on select: it is not the winner."""
    path = slow_experiment(
        many,
        pause=0.0,
        search={"method": "random", "budget": 12},
        evaluate={
            "with": "my_eval.py@score",
            "tasks": {"one": {}},
            "split": {"search": "train", "select": "dev", "test": "eval"},
            "finish": {"top": 4},
        },
    )
    (path.parent / "my_eval.py").write_text(PLANTED)
    server.run("run", path)
    trials = [t for t in store(path).trials() if t.state == "complete"]
    planted = f"trial:{max(trials, key=lambda t: t.score).n}"
    finalists = [e for e in store(path).evaluations(split="select") if e.subject.startswith("trial:")]
    assert min(finalists, key=lambda e: e.objective).subject == planted
    assert len(finalists) == 4
    board = json_of(server.run("leaderboard", path, "--format", "json"))
    assert board["winner"] == max(finalists, key=lambda e: e.objective).subject != planted
