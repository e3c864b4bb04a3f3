"""Run one program, and kill it with all that it started as soon as whoever waits for it is gone.

A script of its own, run by its path (see commands.py): python supervise.py STATUS COMMAND... It reads standard input,
which its parent holds open. The file STATUS says how the program ended.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

POLL_SECONDS = 0.02


def main(status: str, *command: str) -> None:
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        Path(status).write_text(f"not started: {error.strerror}")
        return
    try:
        while process.poll() is None:
            ready, _, _ = select.select([0], [], [], POLL_SECONDS)
            if ready and not os.read(0, 1):
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a program that has ended left running
    Path(status).write_text(str(process.wait()))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # handlers, since what is ignored stays so in the program
        signal.signal(number, lambda *_: None)
    main(*sys.argv[1:])
