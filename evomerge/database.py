"""The tables that evomerge keeps beside Optuna's, and how they are reached: URLs, durability, patience, errors."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from evomerge.errors import StudyError

SCHEMA = 1
RETRY_SECONDS = 120.0  # how long a call waits for a store that does not answer before it gives up
BUSY_SECONDS = 10.0  # how long SQLite itself waits for another process's commit, within one attempt

log = logging.getLogger(__name__)
T = TypeVar("T")

metadata = sa.MetaData()
_text = sa.Text().with_variant(sa.Text(2**32 - 1), "mysql")  # MySQL's plain TEXT ends at 64 kB


def _study_id() -> sa.Column[int]:
    return sa.Column("study_id", sa.ForeignKey("evomerge_studies.id"), nullable=False, index=True)


schema = sa.Table(
    "evomerge_schema",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # always 1
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("written_by", sa.String(64), nullable=False),
)
studies = sa.Table(
    "evomerge_studies",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("record", _text, nullable=False),  # JSON
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("stop_requested", sa.Double),  # when, or NULL
)
items = sa.Table(
    "evomerge_items",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    _study_id(),
    sa.Column("version", sa.Integer, nullable=False),  # a changed item list is a new version; old ones stay readable
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("item_id", sa.String(255), nullable=False),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("split", sa.String(32)),
    sa.Column("text", _text, nullable=False),
    sa.UniqueConstraint("study_id", "version", "position"),
)
recipes = sa.Table(
    "evomerge_recipes",
    metadata,
    sa.Column("study_id", sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("recipe", _text, nullable=False),  # JSON, as of its first use
)
trials = sa.Table(
    "evomerge_trials",
    metadata,
    sa.Column("study_id", sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),  # running, complete, fail, pruned
    sa.Column("point", _text, nullable=False),  # JSON
    sa.Column("recipe_hash", sa.String(64), nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("failure", _text),
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("finished", sa.Double),
)
evaluations = sa.Table(
    "evomerge_evaluations",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    _study_id(),
    sa.Column("key", sa.String(255), nullable=False),
    sa.Column("subject", sa.String(255), nullable=False),
    sa.Column("split", sa.String(32), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("recipe_hash", sa.String(64), nullable=False),
    sa.Column("scores", _text, nullable=False),  # JSON {task: score}
    sa.Column("objective", sa.Double),
    sa.Column("seconds", _text, nullable=False),  # JSON
    sa.Column("worker", sa.String(255), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("items_version", sa.Integer),  # whose split list the outcomes follow; NULL: item_ids says
    sa.Column("item_ids", _text),  # JSON list, or NULL
    sa.Column("outcomes", _text, nullable=False),  # JSON {metric: [[first position, [values]]]}
    sa.Column("item_weights", _text),  # JSON list, or NULL for all 1
    sa.UniqueConstraint("study_id", "key"),
)
attempts = sa.Table(
    "evomerge_attempts",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    _study_id(),
    sa.Column("token", sa.String(32), nullable=False, unique=True),  # a write that is tried again stays one row
    sa.Column("key", sa.String(255), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", _text, nullable=False),
    sa.Column("detail", _text, nullable=False),
    sa.Column("seconds", sa.Double),
    sa.Column("worker", sa.String(255), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
)
events = sa.Table(
    "evomerge_events",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    _study_id(),
    sa.Column("kind", sa.String(16), nullable=False),  # ask, tell
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.UniqueConstraint("study_id", "kind", "n"),
)
training = sa.Table(  # stores that older versions made lack it: see has_training, make_training
    "evomerge_training",
    metadata,
    sa.Column("study_id", sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True, autoincrement=False),  # the trial that is trained for
    sa.Column("state", _text, nullable=False),  # JSON, of the searcher
    sa.Column("curve", _text, nullable=False),  # JSON list, a row a step since the trial before
    sa.Column("time", sa.Double, nullable=False),
)
locks = sa.Table(
    "evomerge_locks",
    metadata,
    sa.Column("study_id", sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("token", sa.String(32), nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("machine", sa.String(255), nullable=False),  # boot id and pid namespace: where pid means something
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_started", sa.Double, nullable=False),
    sa.Column("acquired", sa.Double, nullable=False),
    sa.Column("heartbeat", sa.Double, nullable=False),
)


def has_training(connection: sa.Connection) -> bool:
    """Is there a table of trainings? A store of an older version has none, and gets one when it is needed: versions
    that do not know it pass it over, so that the schema is the same."""
    return sa.inspect(connection).has_table(training.name)


def make_training(connection: sa.Connection) -> None:
    """The table of trainings, if it is not there."""
    training.create(connection, checkfirst=True)


_JOURNAL = (".journal", ".journal.log", ".jsonl", ".log")


def resolve_url(url: str | Path) -> sa.URL:
    """The database that ``url`` names: an SQLAlchemy URL, or the path of an SQLite file (made absolute).

    Raises:
        StudyError: a journal file or another storage that would not survive a crash, or no URL at all.
    """
    text = str(url)
    if text.startswith(("journal:", "redis:")) or text.endswith(_JOURNAL):
        raise StudyError(
            f"{text!r} is an Optuna journal, and a study must be in a database: "
            "one line of a journal torn by a crash makes the whole study unreadable",
            remedy="Use a file that ends in .db (SQLite), sqlite:///PATH, or postgresql+psycopg://HOST/NAME.",
        )
    if "://" not in text:
        text = f"sqlite:///{text}"
    for short in ("postgres://", "postgresql://"):
        if text.startswith(short):
            text = "postgresql+psycopg://" + text.removeprefix(short)
    try:
        parsed = sa.make_url(text)
    except ArgumentError as error:
        raise StudyError(
            f"{url!r} is not the URL of a database",
            remedy="Use a path such as evomerge.db, sqlite:///PATH, or postgresql+psycopg://USER@HOST/NAME.",
        ) from error
    if parsed.get_backend_name() != "sqlite":
        return parsed
    if not parsed.database or parsed.database == ":memory:":
        raise StudyError(
            f"{text!r} is kept in memory only, and a study must outlive its driver",
            remedy="Name a file: sqlite:///evomerge.db.",
        )
    return parsed.set(database=str(Path(parsed.database).expanduser().absolute()))


def shown(url: sa.URL) -> str:
    """``url`` as an error or a log may show it: a path for SQLite, no password otherwise."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def engine_options(url: sa.URL) -> dict[str, Any]:
    """Arguments of ``create_engine`` that evomerge's and Optuna's engines share."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # A pooled connection may be one that the server dropped when it was restarted: ask before use.
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10} if "psycopg" in url.drivername else {}}


def make_durable(engine: sa.Engine) -> None:
    """SQLite: what a commit has returned survives a power cut; the file is whole by itself.

    The rollback journal (SQLite's default), not WAL: a WAL store is three files that must travel together, cannot be
    read from a folder one may not write to, and fails on network file systems, where a cluster's home folders are.
    Readers hold the file for one statement at a time, and the one writer waits for them (the busy timeout).
    """
    if engine.url.get_backend_name() != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        # EXTRA also flushes the folder once the journal is gone; with FULL a power cut can bring the journal back.
        connection.execute("PRAGMA synchronous=EXTRA")


class Database:
    """One engine, with transactions that wait for a store that is away for a while.

    Args:
        url: an SQLAlchemy URL or the path of an SQLite file.
        create: make the file and the tables if they are missing; otherwise a missing store is an error.
        retry_seconds: how long a call goes on trying while the store does not answer.
    """

    def __init__(self, url: str | Path | sa.URL, *, create: bool = False, retry_seconds: float = RETRY_SECONDS):
        self.url = url if isinstance(url, sa.URL) else resolve_url(url)
        self.where, self.retry_seconds = shown(self.url), retry_seconds
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            file = Path(str(self.url.database))
            if not create and not file.is_file():
                raise StudyError(
                    f"there is no store at {file}", remedy="Name the store with --storage, or start one: evomerge run."
                )
            if not file.parent.is_dir():
                raise StudyError(f"the folder {file.parent} of the store does not exist", remedy="Make it first.")
        try:
            self.engine = sa.create_engine(self.url, **engine_options(self.url))
        except (NoSuchModuleError, ImportError) as error:
            raise StudyError(
                f"no driver for {self.url.drivername} is installed ({error})",
                where=self.where,
                remedy="For PostgreSQL: pip install 'evomerge[postgres]' and a URL postgresql+psycopg://HOST/NAME.",
            ) from error
        make_durable(self.engine)
        if self.is_sqlite:
            # pysqlite's own transactions begin at the first write, too late to be sure of what was read before it.
            @event.listens_for(self.engine, "connect")
            def _(connection: Any, _record: Any) -> None:
                connection.isolation_level = None

            @event.listens_for(self.engine, "begin")
            def _(connection: sa.Connection) -> None:
                writing = connection.get_execution_options().get("evomerge_write")
                connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

        self._check_schema(create)

    def _check_schema(self, create: bool) -> None:
        """Fails at once if the store cannot be reached: waiting is for a store that has answered before."""

        def version(connection: sa.Connection) -> int | None:
            if not sa.inspect(connection).has_table(schema.name):
                return None
            return connection.execute(sa.select(schema.c.version)).scalar()

        def make(connection: sa.Connection) -> None:
            from evomerge import __version__

            metadata.create_all(connection)
            if connection.execute(sa.select(schema.c.version)).scalar() is None:
                connection.execute(sa.insert(schema).values(id=1, version=SCHEMA, written_by=__version__))

        found = self.read(version, retry_seconds=0)
        if found is None and create:
            self.write(make, retry_seconds=0)
        self.is_empty = found is None and not create
        if found is not None and found != SCHEMA:
            newer = found > SCHEMA
            raise StudyError(
                f"this store has schema {found}, written by {'a newer' if newer else 'an older'} evomerge; "
                f"this one knows schema {SCHEMA}",
                where=self.where,
                remedy="Upgrade evomerge." if newer else "Open it with the evomerge that wrote it.",
            )

    def read(self, body: Callable[[sa.Connection], T], *, retry_seconds: float | None = None) -> T:
        """``body`` in a transaction that sees one state of the store."""
        return self._run(body, False, retry_seconds)

    def write(self, body: Callable[[sa.Connection], T], *, retry_seconds: float | None = None) -> T:
        """``body`` in a transaction that is durable when this returns.

        ``body`` may run more than once, also after a commit whose answer was lost: it must recognise its own work.
        """
        return self._run(body, True, retry_seconds)

    def _run(self, body: Callable[[sa.Connection], T], writing: bool, retry_seconds: float | None) -> T:
        def once() -> T:
            with self.engine.connect() as plain:
                connection = plain.execution_options(evomerge_write=writing)
                with connection.begin():
                    return body(connection)

        return self.patiently(once, retry_seconds=retry_seconds)

    def patiently(self, call: Callable[[], T], *, retry_seconds: float | None = None) -> T:
        """``call()``, again and again while the store is away or busy.

        Raises:
            StudyError: the store cannot be written to (full, read-only, damaged), or did not answer for
                ``retry_seconds``.
        """
        patience = self.retry_seconds if retry_seconds is None else retry_seconds
        begun, pause = time.monotonic(), 0.05
        while True:
            try:
                return call()
            except Exception as error:
                cause = _database_error(error)
                if cause is None:
                    raise
                waited = time.monotonic() - begun
                if not _may_pass(cause) or waited >= patience:
                    raise self._plain(cause, waited) from error
                if pause >= 0.4:
                    log.warning("the store does not answer, trying again: %s", _first_line(cause))
                time.sleep(min(pause * (0.75 + 0.5 * random.SystemRandom().random()), patience - waited))
                pause = min(2 * pause, 5.0)

    def _plain(self, error: SQLAlchemyError, waited: float) -> StudyError:
        text = _first_line(error)
        if "full" in text or "No space left" in text:
            problem, remedy = f"the disk is full ({text})", "Make room, then go on with evomerge resume."
        elif "readonly" in text or "read-only" in text or "ermission denied" in text:
            problem = f"the store cannot be written to ({text})"
            remedy = "Check the rights of the file and of its folder, then go on with evomerge resume."
        elif "malformed" in text or "not a database" in text:
            problem = f"the file is not an intact SQLite database ({text})"
            remedy = "Name another file, or restore this one from a copy."
        elif _may_pass(error):
            for_so_long = f" for {waited:.0f} s" if waited >= 1 else ""
            problem = f"the store does not answer{for_so_long} ({text})"
            remedy = "All that was written before is kept: go on with evomerge resume when it is back."
        else:
            problem, remedy = f"the store refused a statement ({text})", None
        return StudyError(problem, where=self.where, remedy=remedy)

    def now(self, connection: sa.Connection) -> float:
        """Unix seconds by one clock for all drivers: the server's, or this machine's for SQLite."""
        if self.url.get_backend_name() == "postgresql":
            return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
        return time.time()

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def quiet_optuna():
    """Optuna's own chatter (a line a study, warnings that its storage is experimental) is not the user's affair."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _database_error(error: BaseException) -> SQLAlchemyError | None:
    """The database's error behind ``error``: itself, or what Optuna wrapped into a StorageInternalError."""
    cause = error.__cause__ if type(error).__name__ == "StorageInternalError" else error
    return cause if isinstance(cause, DBAPIError | PoolTimeout) else None


def _may_pass(error: SQLAlchemyError) -> bool:
    """True if waiting can help: the server is away or starting, or another process holds the file."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, PoolTimeout)
    if error.connection_invalidated:
        return True
    text = str(error.orig)
    if "sqlite3" in type(error.orig).__module__:
        return isinstance(error, OperationalError) and ("locked" in text or "busy" in text)
    lasting = ("does not exist", "authentication failed", "ermission denied", "No space left", "read-only")
    return isinstance(error, OperationalError) and not any(word in text for word in lasting)


def _first_line(error: SQLAlchemyError) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
