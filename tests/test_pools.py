"""LocalPool: one worker in a child process, or inline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from evomerge.errors import EvaluatorError, UserError
from evomerge.pools import (
    BuildFailures,
    LocalPool,
    WorkerSpec,
    one_line,
    pack_error,
    unpack_error,
    worker_environment,
)
from evomerge.testing.pools import (
    KillablePoolContract,
    PoolContract,
    collect,
    make_job,
    make_spec,
    wait_for_file,
    wait_until_gone,
)
from evomerge.worker import Worker


@pytest.mark.slow  # some twenty workers are built
class TestLocalPool(KillablePoolContract):
    says = {  # noqa: RUF012
        "kill": ("possibly because the machine was out of memory", ""),
        "_exit": ("exited with status 3", ""),
        "segfault": ("SIGSEGV", "in fault"),
        "abort": ("SIGABRT", "in fault"),
        "hang": ("", "in fault"),
        "hang in C": ("", "in fault"),
    }

    @classmethod
    def make_pool(cls, timeout=None):
        return LocalPool(timeout)

    def test_what_an_evaluator_started_is_killed_with_it(self, pool, spec):
        os.kill(self.submit_and_wait_for_pid(pool, spec, "wait"), signal.SIGKILL)
        child = int(wait_for_file(Path(spec.folder, "child")))
        collect(pool, 1)
        assert wait_until_gone([child]) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_worker_lets_stop_signals_pass(self, pool, spec, number):
        pool.submit(make_job(spec, 0))
        (result,) = collect(pool, 1)
        os.kill(int(result.worker.rpartition(":")[2]), number)
        pool.submit(make_job(spec, 1))
        (again,) = collect(pool, 1)
        assert again.failure is None
        assert again.worker == result.worker


class TestInlineLocalPool(PoolContract):
    @classmethod
    def make_pool(cls, timeout=None):
        return LocalPool(timeout, inline=True)


# A driver that prints when its worker is in the middle of a job, and waits for the result (or for its end).
DRIVER = """
import sys, signal, time
from pathlib import Path
from evomerge.testing.pools import make_job
from evomerge.pools import LocalPool, WorkerSpec
import json
spec = WorkerSpec.from_dict(json.loads(sys.argv[1]))
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
pool = LocalPool()
pool.start(spec)
pool.submit(make_job(spec, 0, sys.argv[2]) if sys.argv[2] else make_job(spec, 0))
while not (results := pool.wait(1.0)):
    pass
print("stopped" if stopped else "undisturbed", results[0].failure)
pool.close()
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> WorkerSpec:
    return make_spec(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def start_driver(spec: WorkerSpec) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Starts a driver in a process group of its own, with its worker busy on ``item`` when this returns."""
    drivers: list[subprocess.Popen] = []

    def start(item: str) -> subprocess.Popen:
        for name in ("pid", "child"):
            Path(spec.folder, name).unlink(missing_ok=True)
        command = [sys.executable, "-c", DRIVER, json.dumps(spec.to_dict()), item]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        drivers.append(subprocess.Popen(command, start_new_session=True, **streams))
        wait_for_file(Path(spec.folder, "pid"))
        if item == "wait":
            wait_for_file(Path(spec.folder, "child"))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("item", ["wait", "hang in C"])
def test_kill_9_of_the_driver_ends_the_worker_and_what_it_started(start_driver, item):
    driver = start_driver(item)
    started = [p.pid for p in psutil.Process(driver.pid).children(recursive=True)]
    assert len(started) >= 2
    driver.kill()
    assert wait_until_gone(started) == []


@pytest.mark.slow
def test_ctrl_c_reaches_the_driver_alone(spec, start_driver):
    driver = start_driver("slow")
    os.killpg(driver.pid, signal.SIGINT)  # what a terminal does
    os.kill(int(Path(spec.folder, "pid").read_text()), signal.SIGINT)
    output, _ = driver.communicate(timeout=120)
    assert output.strip() == "stopped None"


def test_a_worker_that_is_killed_and_one_that_hangs_are_replaced(spec):
    """The short form of what TestLocalPool shows at length."""
    jobs = [make_job(spec, 0), make_job(spec, 0, "_exit"), make_job(spec, 0, "hang in C"), make_job(spec, 0)]
    expected = Worker(spec).evaluate(jobs[0]).outcomes  # compiles the loops, before time is limited
    pool = LocalPool(timeout=10)
    pool.start(spec)
    try:
        results = []
        for job in jobs:
            pool.submit(job)
            results += collect(pool, 1)
    finally:
        pool.close()
    assert [r.failure and r.failure.kind for r in results] == [None, "lost", "timeout", None]
    assert results[0].outcomes == results[3].outcomes == expected
    assert len({r.worker for r in results}) == 3


def test_user_errors_travel_as_plain_data():
    class Special(EvaluatorError):
        pass

    error = unpack_error(pack_error(Special("no such task", where="x.yaml", remedy="Name another.")))
    assert type(error) is EvaluatorError
    assert str(error) == "x.yaml: no such task\n  Name another."
    assert type(unpack_error(pack_error(UserError("plain")))) is UserError


def test_workers_that_die_in_a_row_end_the_run_but_successes_start_the_count_again():
    failures = BuildFailures(1)
    for _ in range(3):
        failures.failure("it crashed", "")
        failures.success()
    failures.failure("it crashed", "")
    with pytest.raises(UserError, match="2 times in a row"):
        failures.failure("it crashed", "its last words")


def test_one_line():
    assert one_line("\n  first \nsecond") == "first"
    assert one_line("") == ""
    assert len(one_line("x" * 1000)) == 300


def test_a_workers_environment_fixes_threads_and_keeps_offline_settings(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = worker_environment(3)
    assert settings["OMP_NUM_THREADS"] == "3"
    assert settings["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" not in worker_environment(3)


def test_importing_pools_needs_neither_torch_nor_ray():
    code = "import evomerge.pools, sys; print({'torch', 'ray', 'optuna'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
