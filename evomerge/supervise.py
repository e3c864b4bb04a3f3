"""Run one program, and kill it with all that it started as soon as whoever waits for it is gone.

A script of its own, run by its path (see commands.py): python supervise.py STATUS COMMAND... Its standard input is a
pipe that its parent holds open. The file STATUS says how the program ended.

The pipe is watched by a process of its own, which is nobody's child once its parent is killed: Ray kills the children
of a worker along with it, but not their children.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


def main(status: str, *command: str) -> None:
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        Path(status).write_text(f"not started: {error.strerror}")
        return
    guard = os.fork()
    if guard == 0:
        os.setsid()
        os.read(0, 1)  # returns when the pipe's other end is closed
        kill_group(process.pid)
        os._exit(0)
    ended = process.wait()
    kill_group(process.pid)  # what a program that has ended left running
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    Path(status).write_text(str(ended))


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # handlers, since what is ignored stays so in the program
        signal.signal(number, lambda *_: None)
    main(*sys.argv[1:])
