"""One driver a study: a row in the store that says who drives, and whether it still lives."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from evomerge.database import Database, locks
from evomerge.errors import StudyError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # an owner on another machine that has not been heard of for so long is taken to be dead

log = logging.getLogger(__name__)


def machine() -> str:
    """Where a pid means something: this boot of this machine, and this pid namespace (container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return f"boot {psutil.boot_time():.0f}"


def is_alive(pid: int, process_started: float) -> bool:
    """True if ``pid`` runs on this machine and is the process that started at ``process_started`` (unix seconds)."""
    try:
        process = psutil.Process(pid)
        # The kernel keeps start times since boot; the clock they are added to may have been set by a second or two.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - process_started) < 5.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def is_held(owner: sa.Row[Any], now: float) -> bool:
    """True if the driver that wrote this lock row is alive, as far as can be known from here. ``now``: unix seconds."""
    if owner.host == socket.gethostname() and owner.machine == machine():
        return is_alive(owner.pid, owner.process_started)
    return now - owner.heartbeat < STALE_SECONDS


class DriverLock:
    """The lock of one study. ``acquire`` and ``release`` are the driver's; ``check`` stands in every write.

    Args:
        database: where the lock row is.
        study_id: of evomerge_studies.
        name: the study's name, for messages.
    """

    def __init__(self, database: Database, study_id: int, name: str):
        self.database, self.study_id, self.name = database, study_id, name
        self.token: str | None = None  # of the row we own, also after it was lost
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, *, wait: float = 0.0) -> None:
        """Take the lock; ``wait``: seconds to wait for another owner to end or to be given up.

        Raises:
            StudyError: another driver has it; names its host, its pid and since when.
        """
        token, until = uuid.uuid4().hex, time.monotonic() + wait

        def take(connection: sa.Connection) -> sa.Row[Any] | None:
            now = self.database.now(connection)
            owner = self._row(connection)
            if owner is not None and owner.token != token and is_held(owner, now):
                return owner
            if owner is not None:
                if owner.token != token:
                    log.warning("taking over study %s from %s pid %d, which is gone", self.name, owner.host, owner.pid)
                connection.execute(sa.delete(locks).where(locks.c.study_id == self.study_id))
            me = psutil.Process()
            connection.execute(
                sa.insert(locks).values(
                    study_id=self.study_id, token=token, host=socket.gethostname(), machine=machine(), pid=os.getpid(),
                    process_started=me.create_time(), acquired=now, heartbeat=now,
                )
            )  # fmt: skip
            return None

        while True:
            try:
                owner = self.database.write(take)
            except StudyError as error:
                if not isinstance(error.__cause__, IntegrityError):
                    raise
                continue  # two drivers inserted at once (a server), and the other one was first: look again
            if owner is None:
                break
            if time.monotonic() >= until:
                raise self._refusal(owner)
            time.sleep(min(1.0, max(0.0, until - time.monotonic())))
        self.token = token
        self._end.clear()
        self._thread = threading.Thread(target=self._beat, args=(token,), name="evomerge-heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back. If it was lost, nothing is touched."""
        if self.token is None:
            return
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * HEARTBEAT_SECONDS)
        token, self.token = self.token, None
        ours = (locks.c.study_id == self.study_id) & (locks.c.token == token)
        self.database.write(lambda connection: connection.execute(sa.delete(locks).where(ours)))

    def check(self, connection: sa.Connection) -> None:
        """Within a write's transaction: hold the lock row until it ends, or refuse.

        Raises:
            StudyError: another driver owns the study, or has taken it over.
        """
        owner = self._row(connection)
        if owner is not None and owner.token == self.token:
            return
        if self.token is not None:
            now_by = f"host {owner.host}, pid {owner.pid}" if owner is not None else "nobody"
            raise StudyError(
                f"this driver has lost study {self.name} (it is now driven by {now_by}), so nothing more is written",
                where=self.database.where,
                remedy="It was silent for too long and was taken to be dead. Follow the other driver, or resume later.",
            )
        if owner is not None and is_held(owner, self.database.now(connection)):
            raise self._refusal(owner)

    def owner(self) -> sa.Row[Any] | None:
        """The lock row of the driver that lives, or None. Reads only."""

        def look(connection: sa.Connection) -> sa.Row[Any] | None:
            row = self._row(connection, hold=False)
            return row if row is not None and is_held(row, self.database.now(connection)) else None

        return self.database.read(look)

    def _row(self, connection: sa.Connection, *, hold: bool = True) -> sa.Row[Any] | None:
        query = sa.select(locks).where(locks.c.study_id == self.study_id)
        # On a server, no one can take the lock over while our transaction writes; SQLite has one writer anyway.
        return connection.execute(query.with_for_update() if hold else query).one_or_none()

    def _refusal(self, owner: sa.Row[Any]) -> StudyError:
        since = datetime.fromtimestamp(owner.acquired).strftime("%Y-%m-%d %H:%M:%S")
        elsewhere = owner.host != socket.gethostname() or owner.machine != machine()
        return StudyError(
            f"study {self.name} is driven by another process: host {owner.host}, pid {owner.pid}, since {since}",
            where=self.database.where,
            remedy=f"Stop that one first: evomerge stop {self.name}."
            + (f" If its machine is gone, wait {STALE_SECONDS:.0f} s and try again." if elsewhere else ""),
        )

    def _beat(self, token: str) -> None:
        """In a thread, with a connection of its own: a long evaluation or a slow disk must not look like a death."""
        ours = (locks.c.study_id == self.study_id) & (locks.c.token == token)

        def beat(connection: sa.Connection) -> int:
            now = self.database.now(connection)
            return connection.execute(sa.update(locks).where(ours).values(heartbeat=now)).rowcount

        while not self._end.wait(HEARTBEAT_SECONDS):
            try:
                if self.database.write(beat, retry_seconds=HEARTBEAT_SECONDS) == 0:
                    return  # taken over: the next write finds out
            except StudyError as error:
                log.warning("no sign of life could be written: %s", error.problem)
