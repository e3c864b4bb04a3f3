"""The server of processes that the tests of this folder use."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from .support import Server, alive, calls, kill_tree, slow_experiment, wait_for


@pytest.mark.parametrize("sent", [b"", b"\0\0", (100).to_bytes(8, "big"), (100).to_bytes(8, "big") + b'{"argu'])
def test_a_client_that_is_killed_while_it_asks_ends_no_server(server: Server, sent: bytes):
    server.run("--version")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.socket))
        client.sendall(sent)
    assert "evomerge" in server.run("--version").out


def test_exit_codes_and_what_is_printed(server: Server):
    refused = server.run("leaderboard", "nowhere.yaml", code=2)
    assert "nowhere.yaml" in refused.err and refused.out == ""


def test_a_killed_driver_says_so_and_its_worker_ends(server: Server, many: Callable[..., Path]):
    path = slow_experiment(many, pause=6000.0)
    driver = server.start("run", path)
    try:
        wait_for(lambda: calls(path.parent) or driver.poll() is not None, why="an evaluation")
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait(60) == -signal.SIGKILL
        wait_for(lambda: not any(alive(pid) for pid in calls(path.parent)), why="the worker ending with its driver")
    finally:
        kill_tree(driver.pid)
