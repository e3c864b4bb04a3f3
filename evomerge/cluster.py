"""All that imports Ray: RayPool and the check that a cluster can hold it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil

from evomerge.errors import ResourceError, UserError
from evomerge.pools import (
    BuildFailures,
    Failure,
    Job,
    Result,
    WorkerSpec,
    ignore_stop_signals,
    one_line,
    pack_error,
    unpack_error,
    worker_environment,
)
from evomerge.scratch import remove_stale

if TYPE_CHECKING:
    from evomerge.worker import Worker

OBJECT_STORE_BYTES = 100_000_000  # recipes and outcomes are all that travels; Ray's least is 75 MB
START_ATTEMPTS = 3
RAY_SETTINGS = {  # read by Ray when it is imported and when its node starts
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 otherwise: on a shared machine, workers would get next to no processor time
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",  # on the driver's screen, log_to_driver or not
}
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
SLICE_SECONDS = 0.5  # the longest wait in one piece, so that time limits and signals are seen


def check_resources(
    count: int, *, cpus: float, gpus: float, nodes: Sequence[Mapping[str, float]] | None = None, where: str = "workers"
) -> None:
    """Refuse workers that the nodes can never hold, even when nothing else runs on them.

    Args:
        count: number of workers.
        cpus, gpus: what one worker asks for; it must find both on one node.
        nodes: the resources of each node, as Ray names them (``CPU``, ``GPU``); None for this machine.

    Raises:
        ResourceError: says what was asked for and what there is.
    """
    here = nodes is None
    if nodes is None:
        nodes = [_this_machine(gpus)]
    room = sum(_fit(node, cpus, gpus) for node in nodes)
    if room >= count:
        return
    asked = f"{count} workers with {cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "") + " each were asked for"
    if here:
        node = nodes[0]
        there = f"this machine has {node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs"
    else:
        there = f"the cluster's {len(nodes)} nodes have " + (
            "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes[:8])
            + ("; ..." if len(nodes) > 8 else "")
        )
    raise ResourceError(
        f"{asked}, but {there}: room for {room}",
        where=where,
        remedy="Lower workers.count (--workers), workers.cpus or workers.gpus (shares such as 0.5 are allowed)"
        + (", or name a larger cluster with --address." if here else ", or add nodes."),
    )


def _fit(node: Mapping[str, float], cpus: float, gpus: float) -> float:
    """How many workers a node has room for."""
    asked = (("CPU", cpus), ("GPU", gpus))
    return min((math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in asked if amount), default=math.inf)


def _this_machine(gpus: float) -> dict[str, float]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if not gpus:
        return {"CPU": float(cpus)}
    import torch

    return {"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}


class Actor:
    """A Worker in a Ray actor. It is built by a call, not by the constructor, so that the spec never lies in the object
    store for a restart to find lost, and so that what is wrong with it comes back as it is."""

    def __init__(self):
        ignore_stop_signals()
        # What the evaluator starts must not inherit the blocked signals of `_signals_kept`, or it could not be ended.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self.worker: Worker | None = None

    def where(self) -> str:
        """host:pid"""
        return f"{socket.gethostname()}:{os.getpid()}"

    def build(self, spec: Mapping[str, Any]) -> tuple[str, Any]:
        try:
            os.chdir(spec["folder"])
            from evomerge.worker import Worker

            self.worker = Worker(WorkerSpec.from_dict(spec))
        except UserError as error:
            return "error", pack_error(error)
        return "ready", None

    def evaluate(self, job: Job) -> tuple[str, Any]:
        assert self.worker is not None
        try:
            return "result", self.worker.evaluate(job)
        except UserError as error:
            return "error", pack_error(error)


@dataclass
class _Slot:
    """One worker: placing (waits for a node), building, ready or busy; ``ref`` is the call that is awaited."""

    actor: Any
    state: Literal["placing", "building", "ready", "busy"]
    ref: Any
    since: float
    name: str = ""
    job: Job | None = None


class RayPool:
    """Workers in Ray actors, on this machine or on a cluster.

    A worker that dies, or is killed at the time limit, is replaced by a new actor, which loads everything from paths;
    Ray itself restarts and retries nothing, so that no evaluation runs twice unseen.

    Args:
        count: number of workers.
        address: of a running cluster (``auto``, ``host:port``, ``ray://host:port``); None starts Ray on this machine.
        cpus, gpus: what each worker asks of Ray.
        threads: torch threads of a worker; None for the spec's, which it must equal otherwise.
        timeout: seconds that one evaluation may take; None for no limit. Building a worker does not count.
        max_restarts: how often in a row workers may die before they are ready.
        place_timeout: seconds that a cluster may leave all workers waiting for a node.
        build_timeout: seconds that building a worker may take.
    """

    def __init__(
        self,
        count: int,
        address: str | None = None,
        *,
        cpus: float = 1,
        gpus: float = 0,
        threads: int | None = None,
        timeout: float | None = None,
        max_restarts: int = 2,
        place_timeout: float = 300.0,
        build_timeout: float = 3600.0,
    ):
        self.count, self.address, self.cpus, self.gpus = count, address, cpus, gpus
        self.threads, self.timeout = threads, timeout
        self.place_timeout, self.build_timeout = place_timeout, build_timeout
        self._failures = BuildFailures(max(max_restarts, 0) * count)
        self._spec: WorkerSpec | None = None
        self._slots: list[_Slot] = []
        self._queue: deque[Job] = deque()
        self._started_ray = False
        self._processes: list[psutil.Process] = []  # those that ray.init started here

    def start(self, spec: WorkerSpec) -> None:
        if self.threads not in (None, spec.threads):
            raise ValueError(f"the pool was asked for {self.threads} threads a worker, the spec says {spec.threads}")
        if spec.device.startswith("cuda") and not self.gpus:
            raise ResourceError(
                f"workers.device is {spec.device}, but workers.gpus is 0, and Ray hides all GPUs from such a worker",
                remedy="Set workers.gpus to the share of a GPU that one worker gets, such as 1.",
            )
        if self.address is None:
            check_resources(self.count, cpus=self.cpus, gpus=self.gpus)
        try:
            with _signals_kept(block=self.address is None):
                for name, value in RAY_SETTINGS.items():
                    os.environ.setdefault(name, value)
                import ray

                if not ray.is_initialized():
                    self._connect(ray, spec)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            check_resources(self.count, cpus=self.cpus, gpus=self.gpus, nodes=nodes)
            self._spec = spec
            self._slots = [self._new_slot() for _ in range(self.count)]
            while not any(slot.state == "ready" for slot in self._slots):
                self._step(SLICE_SECONDS)
        except BaseException:
            self.close()
            raise

    def _connect(self, ray: Any, spec: WorkerSpec) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        self._started_ray = True
        if self.address is not None:
            try:
                _knock(self.address)
                ray.init(address=self.address, **quiet)
            except Exception as error:  # Ray raises all kinds here
                raise ResourceError(
                    f"no Ray cluster answers at {self.address}: {one_line(str(error))}",
                    where="workers.address",
                    remedy="Start one with `ray start --head`, or leave the address out to run on this machine. If the "
                    "cluster asks for a token, set RAY_AUTH_MODE=token.",
                ) from error
            return
        before = psutil.Process().children()
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(
                    address="local",  # never a cluster that happens to run on this machine
                    num_cpus=max(1, math.ceil(self.count * self.cpus)),
                    num_gpus=None if self.gpus else 0,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
                return
            except Exception as error:  # Ray gives its node 30 s to start, which a busy machine may exceed
                self._note_processes(before)
                self._disconnect([])
                self._started_ray = True
                if attempt == START_ATTEMPTS - 1:
                    raise ResourceError(
                        f"Ray did not start on this machine in {START_ATTEMPTS} attempts: {one_line(str(error))}",
                        where="workers",
                        remedy="Look at /tmp/ray/session_latest/logs; one worker needs no Ray (--workers 1).",
                    ) from error
            finally:
                self._note_processes(before)

    def _note_processes(self, before: Sequence[psutil.Process]) -> None:
        self._processes = [p for p in psutil.Process().children() if p not in before]

    def _new_slot(self) -> _Slot:
        import ray

        assert self._spec is not None
        actor_class = ray.remote(Actor).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=1,
            runtime_env={"env_vars": worker_environment(self._spec.threads)},
        )
        actor = actor_class.remote()
        return _Slot(actor, "placing", actor.where.remote(), time.monotonic())

    def idle(self) -> int:
        busy = sum(slot.state == "busy" for slot in self._slots)
        return max(0, len(self._slots) - busy - len(self._queue))

    def submit(self, job: Job) -> None:
        if self._spec is None:
            raise RuntimeError("the pool is not running: call start first")
        self._queue.append(job)
        self._dispatch()

    def _dispatch(self) -> None:
        for slot in self._slots:
            if slot.state == "ready" and self._queue:
                slot.job = self._queue.popleft()
                slot.state, slot.since, slot.ref = "busy", time.monotonic(), slot.actor.evaluate.remote(slot.job)

    def wait(self, seconds: float) -> list[Result]:
        if self._spec is None:
            raise RuntimeError("the pool is not running: call start first")
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            results = self._step(min(left, SLICE_SECONDS))
            if results or left <= 0:
                return results

    def _step(self, seconds: float) -> list[Result]:
        """Hand out jobs, hear the actors for up to ``seconds``, and replace those that died or take too long."""
        import ray

        self._dispatch()
        slots = {slot.ref: slot for slot in self._slots if slot.ref is not None}
        if not slots:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(slots), num_returns=1, timeout=seconds)
        if done:
            done, _ = ray.wait(list(slots), num_returns=len(slots), timeout=0)
        results = [self._hear(slots[ref]) for ref in done]
        results += [self._check_time(slot) for slot in self._slots]
        self._check_placing()
        self._dispatch()
        return [result for result in results if result is not None]

    def _hear(self, slot: _Slot) -> Result | None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayError

        assert self._spec is not None
        try:
            answer: Any = ray.get(slot.ref)
        except OutOfMemoryError as error:
            return self._replace(slot, "memory", "the worker was ended by Ray: its node was out of memory", str(error))
        except RayError as error:
            return self._replace(slot, "lost", f"the worker died: {_cause(error)}", str(error))
        if slot.state == "placing":
            slot.name, slot.state, slot.since = answer, "building", time.monotonic()
            slot.ref = slot.actor.build.remote(self._spec.to_dict())
            return None
        kind, content = answer
        if kind == "error":
            raise unpack_error(content)
        slot.state, slot.ref, slot.job = "ready", None, None
        if kind == "ready":
            self._failures.success()
            return None
        return content

    def _check_time(self, slot: _Slot) -> Result | None:
        limit = {"busy": self.timeout, "building": self.build_timeout}.get(slot.state)
        if limit is None or time.monotonic() - slot.since <= limit:
            return None
        return self._replace(slot, "timeout", f"took longer than the time limit of {limit:g} s", "")

    def _check_placing(self) -> None:
        """ResourceError if no worker has found a node for too long: others may hold what the cluster has."""
        waiting = [slot for slot in self._slots if slot.state == "placing"]
        if len(waiting) < len(self._slots) or time.monotonic() - max(s.since for s in waiting) <= self.place_timeout:
            return
        import ray

        free = ray.available_resources()
        raise ResourceError(
            f"no worker found a node with {self.cpus:g} CPUs and {self.gpus:g} GPUs free within "
            f"{self.place_timeout:g} s; the whole cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} "
            "GPUs free",
            where="workers",
            remedy="Others hold the rest: wait for them, or ask for less.",
        )

    def _replace(self, slot: _Slot, kind: str, reason: str, detail: str) -> Result | None:
        """Kill the actor (it may live, if only its connection broke) and start another; its job's failure."""
        import ray

        with contextlib.suppress(Exception):  # dead already
            ray.kill(slot.actor, no_restart=True)
        elapsed = time.monotonic() - slot.since
        if slot.state in ("placing", "building"):
            self._failures.failure(reason, detail)
        self._slots[self._slots.index(slot)] = self._new_slot()
        if slot.job is None:
            return None
        job = slot.job
        return Result(job.key, job.attempt, None, Failure(kind, reason, detail), {"total": elapsed}, slot.name)

    def close(self) -> None:
        spec, self._spec = self._spec, None
        self._queue.clear()
        slots, self._slots = self._slots, []
        if "ray" not in sys.modules:
            return
        import ray

        descendants = [child for p in self._processes for child in _children(p)]  # while it is known whose they are
        for slot in slots:
            with contextlib.suppress(Exception):  # dead already, or the cluster is gone
                ray.kill(slot.actor, no_restart=True)
        if self._started_ray:
            self._disconnect(descendants)
        if spec is not None:
            remove_stale(spec.scratch)  # of this machine's workers; on others, whoever starts there next does it

    def _disconnect(self, descendants: Sequence[psutil.Process]) -> None:
        """Leave the cluster, or end the one on this machine, with every process of it."""
        import ray

        self._started_ray = False
        ours, self._processes = [*self._processes, *descendants], []
        with _signals_kept(block=False):
            ray.shutdown()
        # A worker that is stuck in C code, and what an evaluator has started, outlive Ray's own shutdown.
        _, alive = psutil.wait_procs(ours, timeout=1)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


def _knock(address: str) -> None:
    """OSError if nobody listens at ``host:port``, which Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].partition("?")[0].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _cause(error: Exception) -> str:
    """One line of what Ray says about a death, without its headings and its advice."""
    text = str(error)
    for mark in ("Worker exit detail:", "The actor is dead because"):
        if mark in text:
            text = text[text.index(mark) + len(mark) :]
            break
    return one_line(text.partition("Some common causes")[0], 200)


@contextlib.contextmanager
def _signals_kept(*, block: bool) -> Iterator[None]:
    """Keep stop signals the driver's affair while Ray starts or ends.

    The driver's own handlers are restored, because ray.init puts one for SIGTERM in their place. With ``block`` the
    signals are blocked meanwhile, as the processes that Ray starts inherit that: a terminal's Ctrl-C, or a scheduler's
    SIGTERM to the whole process group, would otherwise end the node under a driver that wants to finish first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS if block else ())
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
