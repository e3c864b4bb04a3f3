"""Where workers run: the Pool protocol and LocalPool."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge import errors
from evomerge.errors import ResourceError, UserError
from evomerge.evaluation import Outcome
from evomerge.scratch import remove_stale

if TYPE_CHECKING:
    import numpy as np

    from evomerge.worker import Worker


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker builds itself from: paths and plain data, never weights or live objects."""

    folder: str  # of the experiment file, absolute
    base: Mapping[str, str]  # name, path, sha256 (as recipe.Source)
    experts: tuple[Mapping[str, str], ...]
    evaluator: str  # path.py or path.py@name, absolute
    tasks: Mapping[str, Mapping[str, Any]]  # name -> TaskSpec as a dict
    options: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)  # item id -> split
    batch_size: int = 32
    seed: int = 0
    export_dtype: str = "bfloat16"
    compute_dtype: str = "float32"
    device: str = "cpu"  # cpu, cuda, or cuda:N
    threads: int = 1
    fixed_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by method: what no candidate changes
    sources: str = "mmap"  # where base and experts are kept: mmap, pinned, device, auto (see keeping.py)
    gpus: float = 0.0  # the share of a GPU that is this worker's
    count: int = 1  # how many workers may share its machine
    scratch: str = ""  # where an evaluator's checkpoints are written; "": the system's temporary folder
    tokenizer: Mapping[str, Any] | None = None  # the vocabulary that sources are brought to: tokenizer_choice, written
    codes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by method that is a plug-in: plugins.Code

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WorkerSpec:
        return cls(**{**data, "experts": tuple(data["experts"])})


@dataclass(frozen=True)
class Job:
    """One evaluation: a recipe on some items. ``key`` names it in the study (``trial:12/search``).

    ``gradient`` asks for losses and their gradients by the recipe's weights instead: loss (its name), over (see
    ``Evaluator.predictions``), batches (a list of [task, item ids]), learn (False: losses only), free (see
    ``CoefficientGradients``), experts (task -> place of its own expert, for losses that look at it). Where the recipe
    is merged by numbers that no file holds, ``learned`` has them: kind (of the statistics that they are) and tensors,
    for each expert (once, where all share them) tensor name -> array of one float type; their gradient is then wanted,
    too. To learn there are ``shares``, a number a batch: the gradient is that of the sum of share times loss.

    ``surgery`` asks for adapters behind the recipe's merge instead: tasks (task -> [place of its own expert, item ids])
    and rank, steps, lr, batch, seed (see ``surgery_training.train``).
    """

    key: str
    attempt: int
    recipe: Mapping[str, Any]  # Recipe.to_dict()
    item_ids: tuple[str, ...]
    gradient: Mapping[str, Any] | None = None
    surgery: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no result. kind: error, nan, timeout, memory, lost, incomplete (see CandidateError)."""

    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class BatchGradient:
    """The loss on one batch of a task's items; the first of a job's has the gradient of all by the recipe's weights.

    ``gradient``: (groups * experts,), group by group; empty for the others, and if only losses were asked for.
    ``learned``: one after the other the gradient by the numbers that came with the job, in their type.
    """

    task: str
    loss: float
    gradient: tuple[float, ...] = ()
    learned: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Trained:
    """Adapters behind a merge, by task: (down, up) in float32, and the L1 distance to the expert's features before and
    after."""

    adapters: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    distances: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Result:
    """What came back for a job: outcomes in the order of its item_ids, or a failure; never both.

    Of a job that asked for gradients, these in the order of its batches, in place of outcomes; of one that asked for
    adapters, these.
    """

    key: str
    attempt: int
    outcomes: tuple[Outcome, ...] | None
    failure: Failure | None
    seconds: Mapping[str, float] = field(default_factory=dict)  # merge, evaluate, total
    worker: str = ""  # host:pid
    gradients: tuple[BatchGradient, ...] | None = None
    trained: Trained | None = None


class Pool(Protocol):
    """A fixed number of workers that evaluate jobs."""

    def start(self, spec: WorkerSpec) -> None:
        """Build the workers; returns when at least one is ready. Raises UserError if none can be built."""
        ...

    def idle(self) -> int:
        """How many more jobs can start at once. A worker that is still being built counts: its job waits for it."""
        ...

    def submit(self, job: Job) -> None:
        """Start ``job`` on the next free worker."""
        ...

    def wait(self, seconds: float) -> list[Result]:
        """Results that have come in; waits up to ``seconds`` for the first.

        A worker that dies or passes the time limit is replaced, and its job comes back as a Failure of kind ``lost`` or
        ``timeout``. Retrying is the study's affair. Raises UserError if workers cannot be built any more, or if a job's
        recipe is not of the workers' sources.
        """
        ...

    def close(self) -> None:
        """End all workers, dropping what runs. May be called twice. Leaves no process behind."""
        ...


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker process, which libraries read when they are imported.

    Thread counts and hash order are fixed because outcomes may depend on them; progress bars and logs are off because
    nobody reads a worker's screen.
    """
    count = str(threads)
    settings = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "NUMEXPR_NUM_THREADS": count,
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch's deterministic CUDA matrix products ask for
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        if name in os.environ:
            settings[name] = os.environ[name]
    return settings


def pack_error(error: UserError) -> dict[str, str | None]:
    """A user error as plain data, since its class may be the user's own and unknown to the driver."""
    kind = next(c.__name__ for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c)
    return {"kind": kind, "problem": error.problem, "where": error.where, "remedy": error.remedy}


def unpack_error(data: Mapping[str, str | None]) -> UserError:
    """The user error that ``pack_error`` took apart (as its nearest class in evomerge.errors)."""
    return getattr(errors, data["kind"] or "UserError")(data["problem"], where=data["where"], remedy=data["remedy"])


def ignore_stop_signals() -> None:
    """Ctrl-C and SIGTERM are the driver's affair: it lets a worker finish, or kills it.

    A handler that does nothing, rather than SIG_IGN: programs that an evaluator starts get the defaults back.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def one_line(text: str, limit: int = 300) -> str:
    """The first line of ``text`` that is not empty, cut to ``limit`` characters."""
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return line if len(line) <= limit else line[: limit - 3] + "..."


class BuildFailures:
    """Counts workers that died before they were ready, so that a machine that cannot hold one ends the run."""

    def __init__(self, allowed: int):
        self.allowed, self.in_a_row = allowed, 0

    def success(self) -> None:
        self.in_a_row = 0

    def failure(self, reason: str, detail: str) -> None:
        """Raises ResourceError when it happened more than ``allowed`` times in a row."""
        self.in_a_row += 1
        if self.in_a_row > self.allowed:
            last = f" Its last words:\n{detail.strip()[-2000:]}" if detail.strip() else ""
            raise ResourceError(
                f"a worker failed {self.in_a_row} times in a row before it was ready, last because {reason}",
                where="workers",
                remedy=f"Look at the memory of its machine and at the evaluator.{last}",
            )


class LocalPool:
    """One worker in a child process of its own, which is killed at the time limit and replaced when it dies.

    The child is a fresh interpreter in a session of its own: Ctrl-C in the driver's terminal does not reach it, and
    what its evaluator starts can be killed with it. It ends when the driver ends, however that happens.

    Args:
        timeout: seconds that one evaluation may take; None for no limit. Building the worker does not count.
        inline: run in this process instead, for debugging: no time limit, and a crash is the driver's.
        build_timeout: seconds that building the worker may take.
        max_restarts: how often in a row the worker may die before it is ready.
    """

    def __init__(
        self,
        timeout: float | None = None,
        inline: bool = False,
        *,
        build_timeout: float = 3600.0,
        max_restarts: int = 2,
    ):
        self.timeout, self.inline, self.build_timeout = timeout, inline, build_timeout
        self._failures = BuildFailures(max_restarts)
        self._spec: WorkerSpec | None = None
        self._worker: Worker | None = None
        self._child: _Child | None = None
        self._jobs: deque[Job] = deque()  # the first is the one that runs, if the child is busy

    def start(self, spec: WorkerSpec) -> None:
        self._spec = spec
        try:
            if self.inline:
                from evomerge.worker import Worker

                self._worker = Worker(spec)
                return
            while self._child is None or self._child.state == "building":
                self._step(POLL_SECONDS)
        except BaseException:
            self.close()
            raise

    def idle(self) -> int:
        return 0 if self._jobs or self._spec is None else 1

    def submit(self, job: Job) -> None:
        if self._spec is None:
            raise RuntimeError("the pool is not running: call start first")
        self._jobs.append(job)

    def wait(self, seconds: float) -> list[Result]:
        if self._spec is None:
            raise RuntimeError("the pool is not running: call start first")
        if self._worker is not None:
            if not self._jobs:
                time.sleep(seconds)
                return []
            return [self._worker.evaluate(self._jobs.popleft())]
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            result = self._step(min(max(left, 0.0), POLL_SECONDS))
            if result is not None:
                self._jobs.popleft()
                return [result]
            if left <= 0:
                return []

    def close(self) -> None:
        spec = self._spec
        self._spec = self._worker = None
        self._jobs.clear()
        if self._child is not None:
            self._child.kill()
            self._child = None
            if spec is not None:
                remove_stale(spec.scratch)

    def _step(self, seconds: float) -> Result | None:
        """Keep a child alive and busy; what it says within ``seconds``, if that ends the running job."""
        assert self._spec is not None
        if self._child is None:
            self._child = _Child(self._spec)
        child = self._child
        if child.state == "ready" and self._jobs and child.exit_reason() is None:
            child.send(self._jobs[0])
        message = child.receive(seconds)
        if message is not None:
            return self._hear(child, *message)
        exit_reason = child.exit_reason()
        if exit_reason is not None:
            last = child.receive(0)  # it may have answered just before it died
            return self._hear(child, *last) if last is not None else self._replace("lost", exit_reason)
        limit = self.build_timeout if child.state == "building" else self.timeout
        if child.state != "ready" and limit is not None and child.elapsed() > limit:
            child.print_stack()
            return self._replace("timeout", f"took longer than the time limit of {limit:g} s")
        return None

    def _hear(self, child: _Child, kind: str, content: Any) -> Result | None:
        if kind == "error":
            raise unpack_error(content)
        child.state = "ready"
        if kind == "ready":
            self._failures.success()
            return None
        return content

    def _replace(self, kind: str, reason: str) -> Result | None:
        """End the child; its job's failure. The next step starts another child."""
        child, self._child = self._child, None
        assert child is not None
        elapsed, detail = child.elapsed(), child.kill()
        if child.state == "building":
            self._failures.failure(f"it {reason}", detail)
        if child.state != "busy":
            return None
        job = self._jobs[0]
        reason = reason if kind == "timeout" else f"the worker {reason}"
        return Result(job.key, job.attempt, None, Failure(kind, reason, detail), {"total": elapsed}, child.name)


POLL_SECONDS = 0.2  # how long a dead child may go unnoticed

_CHILD_CODE = (
    "import json, sys; path, connection, lifeline = map(json.loads, sys.argv[1:]); sys.path[:] = path; "
    "from evomerge.pools import child_main; child_main(connection, lifeline)"
)


class _Child:
    """The driver's end of one child process. state: building, ready or busy."""

    def __init__(self, spec: WorkerSpec):
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()  # closed by the kernel when the driver ends, and then the child ends
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (what the child prints; read when it dies)
        fcntl.fcntl(self._log, fcntl.F_SETFL, fcntl.fcntl(self._log, fcntl.F_GETFL) | os.O_APPEND)
        path = [entry or str(Path.cwd()) for entry in sys.path]
        command = [sys.executable, "-c", _CHILD_CODE, *map(json.dumps, (path, theirs.fileno(), lifeline))]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **worker_environment(spec.threads)},
            pass_fds=(theirs.fileno(), lifeline),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        theirs.close()
        os.close(lifeline)
        self._connection = Connection(ours.detach())
        self.name = f"{socket.gethostname()}:{self._process.pid}"
        self.state = "building"
        self._since = time.monotonic()
        self._post(spec.to_dict())

    def send(self, job: Job) -> None:
        self._log.truncate(0)
        self.state, self._since = "busy", time.monotonic()
        self._post(job)

    def _post(self, content: Any) -> None:
        with contextlib.suppress(OSError):  # a child that died is noticed by its exit status
            self._connection.send(content)

    def receive(self, seconds: float) -> tuple[str, Any] | None:
        """What the child says within ``seconds``; None if nothing, or if it is dead."""
        try:
            return self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            return None

    def elapsed(self) -> float:
        """Seconds since the child was started or got its job."""
        return time.monotonic() - self._since

    def exit_reason(self) -> str | None:
        """How the child ended, as a clause that follows "the worker"; None if it lives."""
        status = self._process.poll()
        if status is None:
            return None
        if status >= 0:
            return f"exited with status {status} in the middle of its work"
        if -status == signal.SIGKILL:
            return "was killed (SIGKILL), possibly because the machine was out of memory"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"crashed ({name}: {(signal.strsignal(-status) or 'unknown').lower()})"

    def print_stack(self) -> None:
        """Let the child print where it is, for ``kill`` to return."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
            time.sleep(0.3)

    def kill(self) -> str:
        """End the child and all that it started; the end of what it printed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        os.close(self._lifeline)
        with self._log:
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
            return self._log.read().decode(errors="replace")


def child_main(connection_fd: int, lifeline_fd: int) -> None:
    """The child of a LocalPool: build a Worker from the spec that comes first, then evaluate jobs until the end."""
    ignore_stop_signals()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    for fd in (connection_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    _guard(connection_fd, lifeline_fd)
    connection = Connection(connection_fd)
    try:
        spec = WorkerSpec.from_dict(connection.recv())
        os.chdir(spec.folder)
        from evomerge.worker import Worker

        worker = Worker(spec)
        connection.send(("ready", None))
        while True:
            connection.send(("result", worker.evaluate(connection.recv())))
    except UserError as error:
        connection.send(("error", pack_error(error)))
    except EOFError:
        pass


def _guard(connection_fd: int, lifeline_fd: int) -> None:
    """Fork a process that kills this process group when the driver is gone.

    A process rather than a thread or Linux's parent-death signal: it works while this process is stuck in C code that
    holds the interpreter's lock, and reaches the programs that the evaluator has started.
    """
    if os.fork():
        os.close(lifeline_fd)
        return
    os.close(connection_fd)
    os.read(lifeline_fd, 1)
    os.killpg(0, signal.SIGKILL)
