"""Starts processes quickly: imports what they need once, and forks a process for each.

    python server.py SOCKET        until its standard input closes

A client connects, sends one request (JSON, its length before it) with file descriptors, and is answered by two lines:
the process's id when it has started, and its exit code when it has ended. Two kinds of processes are made:

* a command line: ``arguments``, ``cwd``, ``environment`` (what is to be added), the path ``report``, to which goes what
  code of models was loaded, and descriptors for standard output and standard error;
* the worker of a LocalPool, when such a command line starts one: its ``path``, ``environment`` and ``log``, with its
  connection and its lifeline. So a worker is forked from this process, which has run nothing, and not from its driver:
  it knows as little of the driver as a new interpreter would.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

PRELOADED = [
    "scipy.stats", "sqlalchemy.dialects.sqlite", "tokenizers", "safetensors.torch", "transformers", "torch._dynamo",
    "transformers.modeling_utils", "numba", "optuna", "alembic.context", "evomerge.cli", "evomerge.exporting",
    "evomerge.launch", "evomerge.leaderboard", "evomerge.methods", "evomerge.rescoring", "evomerge.showing",
    "evomerge.spec", "evomerge.worker",
]  # fmt: skip

# What libraries read when they are imported: a worker with other values of these gets an interpreter of its own.
SETTLED = {
    name: os.environ.get(name)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_ENDPOINT", "HF_HUB_CACHE")
}


class Forked:
    """A process that a server has started, with what is used of subprocess.Popen."""

    def __init__(self, server: str, request: Mapping[str, Any], fds: Sequence[int]):
        self.args = request
        self.returncode: int | None = None
        self._answers = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(server)
        content = json.dumps(request).encode()
        socket.send_fds(self._socket, [len(content).to_bytes(8, "big")], list(fds))
        self._socket.sendall(content)
        self.pid: int = self._answer(None)

    def _answer(self, seconds: float | None) -> int | None:
        """The next line from the server; None if there is none within ``seconds``."""
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._answers:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return None
            more = self._socket.recv(4096)
            if not more:
                return -signal.SIGKILL  # the server is gone, and all of its processes with it
            self._answers += more
        line, _, self._answers = self._answers.partition(b"\n")
        return int(line)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.args), timeout or 0)
        return code

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._answer(seconds)
            if self.returncode is not None:
                self._socket.close()
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def model_modules() -> list[str]:
    """Loaded modules that define a model of transformers'."""
    return sorted(m for m in sys.modules if m.startswith("transformers.models.") and ".modeling_" in m)


def run_and_exit(work: Callable[[], object]) -> NoReturn:
    """End this process as an interpreter that runs ``work`` would end."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command_line(request: Mapping[str, Any], fds: Sequence[int], server: str) -> None:
    """`evomerge ARGUMENTS` in this process; its workers are forked by ``server``."""
    for number, fd in zip((1, 2), fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    extra = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [entry for entry in extra if entry and entry not in sys.path]
    sys.argv = ["evomerge", *request["arguments"]]

    def popen(command: Sequence[str], **options: Any) -> Forked | subprocess.Popen:
        worker, environment = pools._CHILD_CODE in command, options["env"]
        if not worker or any(environment.get(name) != value for name, value in SETTLED.items()):
            return subprocess.Popen(command, **options)
        path = json.loads(command[-3])
        about = {"path": path, "environment": environment, "cwd": os.getcwd()}  # noqa: PTH109
        return Forked(server, about, [options["stdout"].fileno(), *map(int, command[-2:])])

    pools = importlib.import_module("evomerge.pools")
    pools.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    try:
        importlib.import_module("evomerge.cli").main()
    finally:
        with open(request["report"], "w") as report:  # noqa: PTH123
            json.dump(model_modules(), report)


def worker(request: Mapping[str, Any], fds: Sequence[int]) -> None:
    """The worker of a LocalPool in this process."""
    log, connection, lifeline = fds
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-c"]
    sys.path[:] = request["path"]
    importlib.import_module("evomerge.pools").child_main(connection, lifeline)


class Server:
    def __init__(self, path: str):
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.ended, self.wake = os.pipe()  # a byte for each child that ends
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        self.children: dict[int, socket.socket] = {}

    def serve(self) -> None:
        while True:
            ready = select.select([0, self.listener, self.ended], [], [])[0]
            if self.ended in ready:
                os.read(self.ended, 4096)
                self.reap()
            if self.listener in ready:
                self.start()
            if 0 in ready and not os.read(0, 4096):
                return

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.tell(self.children.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]), last=True)

    @staticmethod
    def tell(client: socket.socket, number: int, *, last: bool = False) -> None:
        with contextlib.suppress(OSError):  # a client that is gone
            client.sendall(f"{number}\n".encode())
        if last:
            client.close()

    @staticmethod
    def hear(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
        """A request with its descriptors; None instead of one that did not come whole."""
        fds: list[int] = []
        try:
            size, fds, _, _ = socket.recv_fds(client, 8, 8)
            content, left = b"", int.from_bytes(size, "big")
            while left and (more := client.recv(left)):
                content, left = content + more, left - len(more)
        except OSError:
            return None, fds
        return (json.loads(content) if content and not left else None), fds

    def start(self) -> None:
        client = self.listener.accept()[0]
        request, fds = self.hear(client)
        if request is None:  # the client was killed while it asked
            client.close()
            for fd in fds:
                os.close(fd)
            return
        pid = os.fork()
        if pid == 0:
            for connection in (client, self.listener, *self.children.values()):
                os.close(connection.detach())
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self.ended)
            os.close(self.wake)
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
            if "arguments" in request:
                run_and_exit(lambda: command_line(request, fds, self.path))
            run_and_exit(lambda: worker(request, fds))
        for fd in fds:
            os.close(fd)
        self.children[pid] = client
        self.tell(client, pid)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    assert not model_modules()
    server = Server(sys.argv[1])
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
