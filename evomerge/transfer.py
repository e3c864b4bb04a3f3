"""A study as one JSON file, and back: all that the store keeps of it, for another database or another machine.

The file is plain data: {evomerge_study: version, ..., record, items, recipes, trials, evaluations, attempts, events},
a row a line, as the tables of database.py have them. Rows are written and read a few at a time, so that the number of
trials is no matter of memory. The same study gives the same bytes. Reading runs nothing and refuses what is not as it
must be.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from evomerge import database as db
from evomerge.database import Database
from evomerge.errors import SpecError, StudyError, UserError
from evomerge.json_stream import JsonStream
from evomerge.objectives import Objective
from evomerge.progress import Progress
from evomerge.spec import NAME
from evomerge.store import Store
from evomerge.study_file import FORMAT, HEAD, SECTIONS, Check, Head, Record, Section
from evomerge.validation import at, validate
from evomerge.writing import sync, umask

BATCH = 500  # rows that are read or written at a time


def dump(store: Store, out: Path, progress: Progress | None = None) -> Path:
    """Write the study to ``out``, compressed if the name ends in ``.gz``. It is there as a whole or not at all.

    The file shows one state of the store, also of a study that is running.

    Raises StudyError if ``out`` exists or cannot be written, or the store cannot be read.
    """
    out = Path(out).absolute()
    if out.exists():
        raise StudyError(f"{out} exists already", remedy="Choose another name. Nothing was written.")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
        os.close(number)
        temporary = Path(name)
        store.database.read(lambda connection: _write(connection, store, temporary, out, progress or Progress()))
        temporary.chmod(0o666 & ~umask())
        sync(temporary)
        temporary.rename(out)
        sync(out.parent)
    except OSError as error:
        raise StudyError(
            f"{out} could not be written: {error.strerror or error}", remedy="Check the folder and its room."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return out


def _write(connection: sa.Connection, store: Store, path: Path, out: Path, progress: Progress) -> None:
    from evomerge import __version__

    if connection.dialect.name == "postgresql":  # one state for all statements, as SQLite has it anyway
        connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    study = connection.execute(sa.select(db.studies).where(db.studies.c.id == store.study_id)).one()
    of_study = {name: part.table.c.study_id == store.study_id for name, part in SECTIONS.items()}
    there = {name: part for name, part in SECTIONS.items() if not part.optional or db.has_training(connection)}
    counts = {
        name: connection.execute(sa.select(sa.func.count()).select_from(part.table).where(of_study[name])).scalar_one()
        for name, part in there.items()
    }
    written = {name: part for name, part in there.items() if counts[name] or not part.optional}
    head = dict(zip(HEAD, (FORMAT, __version__, db.SCHEMA, study.name, study.created), strict=True))
    with _opened(path, out, "wt") as file, progress.stage("writing rows", sum(counts.values())) as stage:
        file.write("{" + "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items()))
        file.write(f'"record": {_line(json.loads(study.record))}')
        for name, part in written.items():
            query = sa.select(*part.columns).where(of_study[name]).order_by(part.order)
            file.write(f",\n{json.dumps(name)}: [")
            before = ""
            for row in connection.execute(query.execution_options(yield_per=BATCH)).mappings():
                data = {k: json.loads(v) if k in part.data and v is not None else v for k, v in row.items()}
                file.write(f"{before}\n{_line(data)}")
                before = ","
                stage.advance()
            file.write("\n]")
        file.write("\n}\n")


def load(file: Path, url: str | Path, *, name: str | None = None, progress: Progress | None = None) -> Store:
    """The study of a file that ``dump`` wrote, in the database ``url`` (made if it is not there): all of it or nothing.

    Optuna's copy is written when the study is next resumed.

    Args:
        name: another name for it.

    Raises StudyError if the name is taken, or the file is not what ``dump`` writes.
    """
    from evomerge.mirror import Mirror

    file = Path(file)
    if name is not None and not NAME.fullmatch(name):
        raise StudyError(f"a study cannot be called {name!r}", remedy="Use letters, digits, '_', '-' and '.'.")
    if not file.is_file():
        raise StudyError(f"there is no such file ({file.absolute()})", remedy="Name one that evomerge dump wrote.")
    with _reading(file) as stream:
        wanted = name or _head(stream, str(file))[1].name
    target = db.resolve_url(url)
    fresh = Path(str(target.database)) if target.get_backend_name() == "sqlite" else None
    fresh = None if fresh is None or fresh.exists() else fresh
    database = Database(target, create=True)
    taken = StudyError(
        f"study {wanted!r} exists already", where=database.where, remedy="Give it another name with --name."
    )
    tries = itertools.count()

    def body(connection: sa.Connection) -> int:
        known = sa.select(db.studies.c.id, db.studies.c.record).where(db.studies.c.name == wanted)
        there = connection.execute(known).one_or_none()
        first = next(tries) == 0
        if there is None:
            return _insert(connection, file, wanted, progress or Progress())
        with _reading(file) as stream:  # our own commit, whose answer was lost?
            if first or there.record != _record(stream, *_head(stream, str(file)), wanted, str(file)):
                raise taken
        return there.id

    try:
        if Mirror.is_taken(database, wanted):
            raise taken
        return Store(database, wanted, database.write(body))
    except StudyError as error:
        if fresh is not None:
            database.close()
            fresh.unlink(missing_ok=True)
        raise (taken if isinstance(error.__cause__, IntegrityError) else error) from error


def _insert(connection: sa.Connection, file: Path, wanted: str, progress: Progress) -> int:
    """All rows of the file; returns the study's id."""
    with _reading(file) as stream, progress.stage("reading", file.stat().st_size, unit="B") as stage:
        keys, head = _head(stream, str(file))
        study = {"name": wanted, "record": _record(stream, keys, head, wanted, str(file)), "created": head.created}
        connection.execute(sa.insert(db.studies).values(study))
        study_id = connection.execute(sa.select(db.studies.c.id).where(db.studies.c.name == wanted)).scalar_one()
        check = Check()
        for section, part in SECTIONS.items():
            key = next(keys, None)
            if key is None and part.optional:
                continue
            if key != section:
                raise ValueError("there is more than a study" if part.optional else f"{section} are missing")
            if part.optional:
                db.make_training(connection)
            rows = (_row(part, data, f"{file}: {section}[{n}]") for n, data in enumerate(stream.items()))
            while batch := list(itertools.islice(rows, BATCH)):
                for row in batch:
                    check.row(section, row)
                own = ({"token": uuid.uuid4().hex} if "token" in part.table.c else {} for _ in batch)
                text = [
                    {k: _line(v) if k in part.data and v is not None else v for k, v in row.items()} for row in batch
                ]
                connection.execute(
                    sa.insert(part.table),
                    [{"study_id": study_id, **row, **more} for row, more in zip(text, own, strict=True)],
                )
                stage.update(stream.offset)
        if next(keys, None) is not None:
            raise ValueError("there is more than a study")
        stream.end()
    return study_id


def _record(stream: JsonStream, keys: Iterator[str], head: Head, wanted: str, where: str) -> str:
    """The record of the study's experiment, under the name that the study is to have."""
    if next(keys, None) != "record":
        raise ValueError("the record of the study's experiment is missing")
    record = stream.value()
    validate(Record, record, where=at(where, "record"))
    try:
        Objective.of_record(record)
    except (UserError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"the record's objective is none: {error}") from error
    if wanted != head.name:
        record["spec"]["name"] = wanted
    return _line(record)


def _row(part: Section, data: Any, where: str) -> dict[str, Any]:
    return validate(part.model, data, where=where).model_dump()


def _head(stream: JsonStream, where: str) -> tuple[Iterator[str], Head]:
    """(the keys that are left, the first values): who wrote the file, in which format, and the study's name."""
    keys = stream.fields()
    values = {}
    for wanted in HEAD:
        if next(keys, None) != wanted:
            raise ValueError(f"{wanted} is missing")
        values[wanted] = stream.value()
        if wanted == "evomerge_study" and values[wanted] != FORMAT:
            raise StudyError(
                f"the file has the format {values[wanted]!r}, and this version reads {FORMAT}",
                where=where,
                remedy="Use the version of evomerge that wrote it.",
            )
    return keys, validate(Head, values, where=where)


@contextmanager
def _reading(file: Path) -> Iterator[JsonStream]:
    """The JSON of a file; whatever is wrong with it is a StudyError that names it."""
    try:
        with _opened(file, file, "rt") as handle:
            yield JsonStream(handle)
    except SpecError as error:
        raise StudyError(error.problem, where=error.where, remedy=error.remedy) from error
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StudyError(
            f"not a study that evomerge dump wrote: {error}", where=str(file), remedy="Dump or copy it again."
        ) from error
    except OSError as error:
        raise StudyError(f"{file} cannot be read: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path, named: Path, mode: str) -> Iterator[TextIO]:
    """``path`` as UTF-8 text, compressed if it will be, or is, ``named`` so."""
    if named.suffix != ".gz":
        with path.open(mode, encoding="utf-8", newline="\n") as plain:
            yield plain  # type: ignore[misc]
        return
    with (
        path.open(mode[0] + "b") as raw,
        gzip.GzipFile("", mode[0] + "b", 6, raw, mtime=0) as packed,  # no time: the same study, the same bytes
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
    ):
        yield text


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
