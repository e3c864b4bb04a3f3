"""RayPool on real Ray: on this machine, on clusters of several nodes, and when things die."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from evomerge.cluster import RayPool, check_resources
from evomerge.errors import ResourceError
from evomerge.pools import WorkerSpec
from evomerge.testing.pools import (
    KillablePoolContract,
    collect,
    make_job,
    make_spec,
    wait_for_file,
    wait_until_gone,
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> WorkerSpec:
    return make_spec(tmp_path_factory.mktemp("cluster"))


@pytest.mark.parametrize(
    ("count", "cpus", "gpus", "nodes", "room"),
    [
        (4, 1, 0, [{"CPU": 4}], None),
        (4, 0.5, 0, [{"CPU": 2}], None),
        (10, 0.1, 0, [{"CPU": 1}], None),
        (5, 1, 0, [{"CPU": 4}], 4),
        (2, 3, 0, [{"CPU": 4}, {"CPU": 2}], 1),  # a worker must fit on one node
        (2, 1, 1, [{"CPU": 64}, {"CPU": 64, "GPU": 1}], 1),
        (2, 1, 0.5, [{"CPU": 8, "GPU": 1}], None),
        (1, 1, 1, [{"CPU": 8}], 0),
        (3, 0, 0, [{}], None),
    ],
)
def test_workers_must_fit_on_the_nodes(count, cpus, gpus, nodes, room):
    if room is None:
        check_resources(count, cpus=cpus, gpus=gpus, nodes=nodes)
    else:
        with pytest.raises(ResourceError, match=rf"{count} workers.*room for {room}\b"):
            check_resources(count, cpus=cpus, gpus=gpus, nodes=nodes)


def test_what_this_machine_cannot_hold_is_refused_before_ray_starts(spec):
    pool = RayPool(10_000)
    with pytest.raises(ResourceError, match="this machine has"):
        pool.start(spec)
    if "ray" in sys.modules:
        import ray

        assert not ray.is_initialized()


def test_a_gpu_device_without_gpus_asked_for_is_refused(spec):
    with pytest.raises(ResourceError, match=r"workers\.gpus is 0"):
        RayPool(1).start(dataclasses.replace(spec, device="cuda"))


def test_two_workers_give_what_one_in_this_process_gives_and_leave_nothing_behind(spec):
    from evomerge.worker import Worker

    def mine(*_):
        pass

    before_handler = signal.signal(signal.SIGTERM, mine)
    before = set(psutil.Process().children(recursive=True))
    pool = RayPool(2, cpus=0.5)
    try:
        pool.start(spec)
        assert signal.getsignal(signal.SIGTERM) is mine
        started = [p.pid for p in psutil.Process().children(recursive=True) if p not in before]
        jobs = [make_job(spec, n) for n in range(4)]
        pending, results = list(jobs), []
        while len(results) < len(jobs):
            while pending and pool.idle():
                pool.submit(pending.pop(0))
            results += pool.wait(1.0)
    finally:
        pool.close()
        signal.signal(signal.SIGTERM, before_handler)
    worker = Worker(spec)
    for job, result in zip(jobs, sorted(results, key=lambda r: r.key), strict=True):
        assert result.outcomes == worker.evaluate(job).outcomes
    assert wait_until_gone(started) == []


@pytest.mark.slow
class TestRayPool(KillablePoolContract):
    says = {"hang": ("time limit", "")}  # noqa: RUF012

    @classmethod
    def make_pool(cls, timeout=None):
        return RayPool(2, cpus=0.1, timeout=timeout)  # small, so that all pools of this suite fit into one Ray

    def test_what_an_evaluator_started_is_killed_with_it(self, pool, spec):
        os.kill(self.submit_and_wait_for_pid(pool, spec, "wait"), signal.SIGKILL)
        child = int(wait_for_file(Path(spec.folder, "child")))
        collect(pool, 1)
        assert wait_until_gone([child]) == []

    def test_one_lost_worker_does_not_hold_up_the_other(self, spec):
        pool = self.make_pool(None)
        pool.start(spec)
        try:
            pid = self.submit_and_wait_for_pid(pool, spec, "wait")
            pool.submit(make_job(spec, 0))
            (good,) = collect(pool, 1)
            assert good.failure is None
            os.kill(pid, signal.SIGKILL)
            pool.submit(make_job(spec, 0))
            results = collect(pool, 2)
            assert [r.failure and r.failure.kind for r in results] == [None, "lost"]
        finally:
            pool.close()

    def test_every_worker_killed_at_once(self, pool, spec, works):
        for n in range(4):
            pool.submit(make_job(spec, n))
        names = {r.worker for r in collect(pool, 4)}
        for name in names:
            os.kill(int(name.rpartition(":")[2]), signal.SIGKILL)
        for n in range(2):
            pool.submit(make_job(spec, n))
        assert {r.failure and r.failure.kind for r in collect(pool, 2)} <= {None, "lost"}
        works()


# A driver that keeps stop signals to itself, as the study does, and prints what came of its job.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: stopped.append(signal.Signals(n).name))
from evomerge.cluster import RayPool
from evomerge.pools import WorkerSpec
from evomerge.testing.pools import make_job
spec = WorkerSpec.from_dict(json.loads(sys.argv[1]))
pool = RayPool(1, cpus=0.5)
pool.start(spec)
pool.submit(make_job(spec, 0, sys.argv[2]))
while not (results := pool.wait(1.0)):
    pass
print(sorted(stopped), results[0].failure)
pool.close()
"""


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
        while not Path(spec.folder, "pid").exists():
            assert drivers[-1].poll() is None, drivers[-1].communicate()[0]
            time.sleep(0.1)
        wait_for_file(Path(spec.folder, "pid"))
        if item == "wait":
            wait_for_file(Path(spec.folder, "child"))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()


@pytest.mark.slow
def test_stop_signals_to_the_whole_process_group_reach_the_driver_alone(start_driver):
    """A terminal's Ctrl-C, and a scheduler that ends a job, signal every process of the group."""
    driver = start_driver("slow")
    started = [p.pid for p in psutil.Process(driver.pid).children(recursive=True)]
    os.killpg(driver.pid, signal.SIGINT)
    os.killpg(driver.pid, signal.SIGTERM)
    output, _ = driver.communicate(timeout=180)
    assert output.strip().splitlines()[-1] == "['SIGINT', 'SIGTERM'] None"
    assert wait_until_gone(started) == []


@pytest.mark.slow
@pytest.mark.parametrize("item", ["wait", "hang in C"])
def test_kill_9_of_the_driver_ends_ray_and_its_workers(spec, start_driver, item):
    driver = start_driver(item)
    started = [p.pid for p in psutil.Process(driver.pid).children(recursive=True)]
    assert len(started) >= 3
    driver.kill()
    assert wait_until_gone([int(Path(spec.folder, "pid").read_text())], seconds=30) == []
    # Two of Ray's own agents look for their node a minute long before they give up.
    assert wait_until_gone(started, seconds=150) == []


@pytest.fixture
def cluster() -> Iterator:
    """A Ray cluster of one node with one CPU; nodes can be added."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_clusters_workers_survive_the_loss_of_a_node(cluster, spec):
    second = cluster.add_node(num_cpus=1)
    pool = RayPool(2, cluster.address)
    try:
        pool.start(spec)
        jobs = {n: make_job(spec, n, "slow") for n in range(2)}
        for job in jobs.values():
            pool.submit(job)
        time.sleep(1)
        cluster.remove_node(second, allow_graceful=False)
        results = collect(pool, 2)
        while lost := [r for r in results if r.failure is not None]:
            assert {r.failure.kind for r in lost} == {"lost"}
            results = [r for r in results if r.failure is None]
            for result in lost:
                pool.submit(next(job for job in jobs.values() if job.key == result.key))
            results += collect(pool, len(lost))
        assert {r.key for r in results} == {job.key for job in jobs.values()}
    finally:
        pool.close()


@pytest.mark.slow
def test_a_cluster_is_left_running_and_what_it_can_never_hold_is_refused_at_once(cluster, spec):
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"1 GPUs each were asked for.*1 nodes have 1 CPUs and 0 GPUs"):
        RayPool(1, cluster.address, gpus=1).start(spec)
    assert time.monotonic() - began < 60

    pool = RayPool(1, cluster.address)
    pool.start(spec)
    # Another study on the same cluster waits for a place, but not for ever.
    waiting = RayPool(1, cluster.address, place_timeout=2)
    with pytest.raises(ResourceError, match="found a node"):
        waiting.start(spec)
    pool.submit(make_job(spec, 0))
    assert collect(pool, 1)[0].failure is None
    pool.close()

    again = RayPool(1, cluster.address)
    again.start(spec)
    again.submit(make_job(spec, 0))
    assert collect(again, 1)[0].failure is None
    again.close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_where_no_cluster_answers_is_refused_at_once(spec, address):
    began = time.monotonic()
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}"):
        RayPool(1, address).start(spec)
    assert time.monotonic() - began < 30
