"""A study as a JSON file: all of it comes back, and what is no study is refused with nothing written."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from test_store import ITEMS, RECORD, evaluation_of, outcomes_of, search_on, server, sqlite, url  # noqa: F401

from evomerge import database as db
from evomerge.dimensions import Dimension
from evomerge.errors import StudyError
from evomerge.evaluation import Outcome
from evomerge.json_stream import JsonStream
from evomerge.pools import WorkerSpec
from evomerge.store import Store
from evomerge.study_file import SECTIONS
from evomerge.transfer import dump, load

WORKER = WorkerSpec(
    folder="/x", base={"name": "base", "path": "b", "sha256": ""}, experts=({"name": "e", "path": "e", "sha256": ""},),
    evaluator="/x/e.py", tasks={}, options={}, splits={}, batch_size=1, seed=0, export_dtype="float32",
    compute_dtype="float32", device="cpu", threads=1, fixed_params={},
)  # fmt: skip
FULL = {
    "spec": {"name": "s", "base": "b", "experts": {"e": "e"}}, "folder": "/x", "fingerprint": {"seed": "0"},
    "libraries": {}, "worker": WORKER.to_dict(), "metrics": {"add": {"metric": "acc", "item_mean": True}},
    "rounds": [{"trials": 6, "winner": "trial:1", "time": 1.5}], "budget": 30,
}  # fmt: skip
DIMENSIONS = [
    *RECORD["dimensions"],
    Dimension("word", 0, 1, "a", choices=("a", "b")).to_dict(),
    Dimension("yes", 0, 1, True, choices=(True, False)).to_dict(),
    Dimension("n", 1, 5, 1, integer=True).to_dict(),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trials of all states, two versions of the items, evaluations with weights and items of their own, attempts."""
    path = tmp_path_factory.mktemp("transfer") / "first.db"
    record = {**FULL, "note": "ä \u2028 \x00 1e400", "dimensions": DIMENSIONS}
    store = Store.create(f"sqlite:///{path}", "s", record, items=ITEMS)
    with store.lock():
        search_on(store, 6)
        store.set_items(ITEMS[:-1])
        store.save_evaluation(evaluation_of(0, "control:base", "select", outcomes=outcomes_of(7, "select")[1:]))
        weighted = tuple(Outcome(o.item_id, o.values, 0.5) for o in outcomes_of(8, "test"))
        store.save_evaluation(evaluation_of(1, "control:base", "test", outcomes=weighted, round=2))
        store.log_attempt("trial:1/search", 1, "started")
        store.log_attempt("trial:1/search", 1, "lost", "its worker died \x00", "…\n\tTraceback", 1 / 3, "host:1")
        store.save_training(0, {"descent": {"step": 0, "x": [1 / 3]}, "failure": None}, [])
        store.save_training(
            1, {"descent": {"step": 1, "x": [1e-300]}}, [{"step": 0, "loss": 1 / 7, "tasks": {"one": 2}}]
        )
        store.log_event("ask", 6)
        point: dict[str, Any] = {"x": 1e-300, "word": "a", "yes": True, "n": 3}
        store.add_trial(6, point, {"method": "ties"}, "other")
    store.close()
    return path


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Store:
    return Store.open(f"sqlite:///{shutil.copy(made, tmp_path / 'first.db')}", "s")


@pytest.fixture(scope="module")
def good(made: Path) -> str:
    return dump(Store.open(f"sqlite:///{made}", "s"), made.with_name("good.json")).read_text()


def rows(store: Store) -> dict[str, list[dict]]:
    """All that the tables hold of a study, in order, but numbers that mean something in one database only."""
    with store.database.engine.connect() as connection:
        found = {}
        for name, part in SECTIONS.items():
            query = sa.select(part.table).where(part.table.c.study_id == store.study_id).order_by(part.order)
            found[name] = [
                {k: v for k, v in row.items() if k not in ("study_id", "seq", "token")}
                for row in connection.execute(query).mappings()
            ]
        return found


def test_the_file_names_every_column():
    """A new column must be thought of here: the rows' models have the tables' own columns."""
    assert {part.table for part in SECTIONS.values()} | {db.schema, db.studies, db.locks} == set(
        db.metadata.tables.values()
    )
    for part in SECTIONS.values():
        assert [column.name for column in part.columns] == list(part.model.model_fields)
        for column in part.columns:
            is_text = isinstance(column.type, sa.Text | sa.String)
            field = str(part.model.model_fields[column.name].annotation)
            assert (is_text and ("dict" in field or "list" in field)) == (column.name in part.data), column


@pytest.mark.parametrize("name", ["study.json", "study.json.gz"])
def test_all_comes_back(study: Store, url: str, tmp_path: Path, name: str):  # noqa: F811
    file = dump(study, tmp_path / "new" / name)
    again = load(file, url)
    assert rows(again) == rows(study)
    assert again.record == study.record
    assert again.evaluations(with_outcomes=True) == study.evaluations(with_outcomes=True)
    assert (again.trials(), again.items(), again.events()) == (study.trials(), study.items(), study.events())
    assert Store.names(url) == [{**s, "driver": None} for s in Store.names(study.url)]
    assert dump(again, tmp_path / f"again-{name}").read_bytes() == file.read_bytes()
    with again.lock():  # it can be gone on with: Optuna's copy is completed
        again.finish_trial(6, "complete", 0.5)


def test_other_tools_can_read_it(study: Store, tmp_path: Path):
    data = json.loads(dump(study, tmp_path / "s.json").read_text())
    assert list(data) == ["evomerge_study", "written_by", "schema", "name", "created", "record", *SECTIONS]
    assert [t["point"] for t in data["trials"]] == [dict(t.point) for t in study.trials()]
    assert data["evaluations"][0]["outcomes"]["acc"][0][1][0] in (0, 1)
    (tmp_path / "pretty.json").write_text(json.dumps(data, indent=4, ensure_ascii=True))  # however it is laid out
    assert rows(load(tmp_path / "pretty.json", tmp_path / "b.db")) == rows(study)


def test_what_older_versions_made_is_read_and_gone_on_with(study: Store, tmp_path: Path):
    """Their stores have no table of trainings, and their files no section; nor have new files where there is none."""
    kept = study.trainings()
    study.database.write(lambda connection: connection.execute(sa.text("DROP TABLE evomerge_training")))
    old = dump(study, tmp_path / "old.json")
    assert "training" not in json.loads(old.read_text())
    again = load(old, tmp_path / "new.db")
    assert dump(again, tmp_path / "again.json").read_bytes() == old.read_bytes()
    for store in (study, again):
        assert store.trainings() == []
        with store.lock():
            store.save_training(1, {"step": 2}, [])
        assert [(t.n, t.state) for t in store.trainings()] == [(1, {"step": 2})]
    assert [t.n for t in kept] == [0, 1]
    full = dump(study, tmp_path / "full.json")
    study.database.write(lambda connection: connection.execute(sa.text("DROP TABLE evomerge_training")))
    assert [t.n for t in load(full, study.url, name="other").trainings()] == [1]


def test_a_study_that_is_being_written_is_dumped_in_one_state(tmp_path: Path):
    """Dumps taken while a driver adds trials can be loaded: each has all that its last rows refer to."""
    store = Store.create(f"sqlite:///{tmp_path / 'live.db'}", "s", {**FULL, "dimensions": DIMENSIONS}, items=ITEMS)

    def drive() -> None:
        with store.lock():
            search_on(store, 30)

    driver = threading.Thread(target=drive)
    driver.start()
    reader, seen = Store.open(store.url, "s"), []
    while driver.is_alive():
        again = load(dump(reader, tmp_path / f"{len(seen)}.json"), tmp_path / f"{len(seen)}.db")
        seen.append(len(again.trials()))
        assert len(again.evaluations()) >= sum(trial.state != "running" for trial in again.trials())
    driver.join()
    assert len(set(seen)) > 2  # it was being written


def test_names(study: Store, tmp_path: Path):
    file = dump(study, tmp_path / "s.json")
    before = rows(study)
    with pytest.raises(StudyError, match=r"'s' exists already"):
        load(file, study.url)
    other = load(file, study.url, name="t")
    assert (other.record["spec"]["name"], rows(other), rows(study)) == ("t", before, before)
    with pytest.raises(StudyError, match="'t' exists already"):
        load(file, study.url, name="t")
    with pytest.raises(StudyError, match="cannot be called"):
        load(file, study.url, name="../t")
    with pytest.raises(StudyError, match="exists already"):
        dump(study, file)


def test_a_file_that_cannot_be_written_leaves_nothing(study: Store, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="could not be written"):
        dump(study, tmp_path / "file" / "s.json")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    script = (
        "import resource, signal, sys; from evomerge.store import Store; from evomerge.transfer import dump\n"
        "store = Store.open(sys.argv[1], 's')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (500, {limit[1]}))\n"
        "dump(store, __import__('pathlib').Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, study.url, tmp_path / "s.json"], capture_output=True, text=True, check=False
    )
    assert "StudyError" in done.stderr and "could not be written" in done.stderr
    assert not [p for p in tmp_path.iterdir() if "s.json" in p.name]


def change(data: dict, path: str, value: object) -> None:
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        data = data[step]  # type: ignore[index]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


WRONG = [
    ("evomerge_study", 2, "format 2"),
    ("evomerge_study", "x", "format 'x'"),
    ("name", "", "name"),
    ("created", "now", "created"),
    ("record", [], "record"),
    ("record.spec", 3, "record.spec"),
    ("record.spec.base", KeyError, "'base' is missing"),
    ("record.spec.objective", {"of": 3}, "objective"),
    ("record.folder", KeyError, "'folder' is missing"),
    ("record.worker", {"threads": 1}, "worker and dimensions"),
    ("record.dimensions", [{"name": "x"}], "worker and dimensions"),
    ("record.metrics.add.item_mean", "yes", "item_mean"),
    ("record.rounds.0.winner", None, "winner"),
    ("record.budget", "many", "budget"),
    ("more", 1, "more than a study"),
    ("events", KeyError, "events are missing"),
    ("items.1.position", 5, "out of order"),
    ("items.0.position", -1, "items[0].position"),
    ("items.0.extra", 1, "no key 'extra'"),
    ("items.0.task", "t" * 300, "items[0].task"),
    ("items.0.task", None, "items[0].task"),
    ("items.0.version", 2**40, "items[0].version"),
    ("recipes.0.recipe", "x", "recipes[0].recipe"),
    ("recipes.1.hash", "hash0", "'hash0' stands twice"),
    ("trials.1.n", 2, "trial 1 is missing"),
    ("trials.0.state", "done", "trials[0].state"),
    ("trials.0.score", None, "has a score"),
    ("trials.0.recipe_hash", "nothing", "'nothing' is missing"),
    ("trials.0.point.x", [1], "trials[0].point"),
    ("trials.0.started", KeyError, "'started' is missing"),
    ("evaluations.0.outcomes.acc", [[0, [1, 0] * 50]], "not of its 8 items"),
    ("evaluations.0.outcomes.acc", [[[0], [1]]], "not of its 8 items"),
    ("evaluations.0.outcomes.acc", [[0, ["x"]]], "outcomes"),
    ("evaluations.0.items_version", 9, "not of its 0 items"),
    ("evaluations.0.items_version", None, "by a version or a list"),
    ("evaluations.0.item_weights", [1.0], "weights"),
    ("evaluations.0.scores.add", True, "scores"),
    ("evaluations.1.key", "trial:0/search", "stands twice"),
    ("attempts.0.seconds", "1", "attempts[0].seconds"),
    ("events.0.kind", "run", "events[0].kind"),
    ("events.1.kind", "ask", "stands twice"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=lambda v: str(v)[:40])
def test_what_is_no_study_is_refused_and_nothing_is_written(
    study: Store, good: str, tmp_path: Path, path, value, words: str
):
    data = json.loads(good)
    change(data, path, value)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    for target in (tmp_path / "new.db", study.url):
        with pytest.raises(StudyError) as raised:
            load(tmp_path / "bad.json", target, name="new")
        assert words in str(raised.value)
        assert "bad.json" in str(raised.value)
    assert not (tmp_path / "new.db").exists()
    assert [s["name"] for s in Store.names(study.url)] == ["s"]


HOSTILE = {
    "nothing": b"",
    "not JSON": b"SQLite format 3\x00",
    "a pickle": b"\x80\x04cos\nsystem\n",
    "not text": b'{"evomerge_study": 1, "written_by": "\xff"}',
    "not finite": b'{"evomerge_study": 1, "written_by": "x", "schema": 1, "name": "s", "created": NaN}',
    "too large a number": b'{"evomerge_study": 1, "written_by": "x", "schema": 1, "name": "s", "created": 1e999}',
    "endless digits": b'{"evomerge_study": ' + b"9" * 10_000 + b"}",
    "deep": b'{"evomerge_study": 1, "written_by": ' + b"[" * 200_000,
    "a key twice": b'{"evomerge_study": 1, "evomerge_study": 1}',
    "an endless string": b'{"evomerge_study": "' + b"x" * 70_000_000,
    "gzip that is none": gzip.compress(b"{}"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str):
    (tmp_path / "bad.json").write_bytes(HOSTILE[case])
    with pytest.raises(StudyError, match=r"bad\.json"):
        load(tmp_path / "bad.json", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()


def test_cut_off_anywhere(study: Store, tmp_path: Path):
    """A copy that was not finished is refused wherever it ends."""
    for name in ("s.json", "s.json.gz"):
        content = dump(study, tmp_path / name).read_bytes()
        for end in range(0, len(content) - 2, max(1, len(content) // 40)):
            (tmp_path / f"cut-{name}").write_bytes(content[:end])
            with pytest.raises(StudyError):
                load(tmp_path / f"cut-{name}", tmp_path / "new.db")
    content = bytearray((tmp_path / "s.json.gz").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "flipped.json.gz").write_bytes(content)
    with pytest.raises(StudyError, match="flipped"):
        load(tmp_path / "flipped.json.gz", tmp_path / "new.db")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(values=st.lists(plain, max_size=8), piece=st.integers(1, 40), indent=st.sampled_from([None, 2]), data=st.data())
def test_a_stream_reads_what_json_reads(values: list, piece: int, indent, data):
    """Whatever the pieces are that the text comes in; and what is cut off is refused."""
    import io

    from evomerge import json_stream

    before, json_stream.PIECE = json_stream.PIECE, piece
    try:
        text = json.dumps({"first": values, "second": 12}, indent=indent)
        stream = JsonStream(io.StringIO(text))
        keys = stream.fields()
        assert next(keys) == "first"
        assert list(stream.items()) == values
        assert (next(keys), stream.value(), list(keys)) == ("second", 12, [])
        stream.end()
        cut = JsonStream(io.StringIO(text[: data.draw(st.integers(0, len(text) - 1))]))
        with pytest.raises(ValueError):
            for key in cut.fields():
                list(cut.items()) if key == "first" else cut.value()
    finally:
        json_stream.PIECE = before
