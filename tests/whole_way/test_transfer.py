"""evomerge dump and load: a study goes on in another store as if it had never left its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.store import Store

from .support import Server, candidates


@pytest.fixture(params=["sqlite", "postgresql"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of another, empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'elsewhere.db'}"
    from test_store import start_postgres

    running = start_postgres(tmp_path / "pg")
    request.addfinalizer(running.cleanup)
    return running.get_uri()


@pytest.mark.slow
def test_a_study_goes_on_elsewhere(server: Server, many: Callable[..., Path], elsewhere: str, tmp_path: Path):
    """Half a generation into cma; the same leaderboard to the byte, the same trials, the same next candidates."""
    path = many(
        search={"method": "cma", "budget": 6, "population": 4},
        evaluate={"with": "my_eval.py@score", "tasks": {"one": {}}, "split": {"search": 4, "select": 4, "test": 4}},
    )
    file = tmp_path / "study.json.gz"
    server.run("run", path)
    server.run("dump", path, "--out", file)
    assert "exists already" in server.run("load", file, "--storage", f"sqlite:///{path.parent}/evomerge.db", code=2).err
    shown = server.run("load", file, "--storage", elsewhere).out
    assert "evomerge leaderboard tiny --storage" in shown
    assert "exists already" in server.run("load", file, "--storage", elsewhere, code=2).err

    for command in (
        *(("leaderboard", path, "--format", f) for f in ("table", "json", "csv", "md")),
        *(("show", path, subject) for subject in ("0", "5", "best", "control:average")),
    ):
        here, there = (server.run(*command, *more).out for more in ((), ("--storage", elsewhere)))
        assert here == there, command
    server.run("resume", path, "--budget", "11")
    server.run("resume", "tiny", "--storage", elsewhere, "--budget", "11")
    other = Store.open(elsewhere, "tiny")
    assert [(t.point, t.score, t.recipe_hash) for t in other.trials()] == [
        (t[2], t[4], t[3]) for t in ((c[0], c[1], dict(c[2]), *c[3:]) for c in candidates(path)[:11])
    ]
    boards = [server.run("leaderboard", path, "--format", "json", *more).out for more in ((), ("--storage", elsewhere))]
    assert boards[0] == boards[1]

    server.run("load", file, "--storage", elsewhere, "--name", "second")  # under another name, by its own record
    server.run("resume", "second", "--storage", elsewhere, "--budget", "8")
    assert [t.point for t in Store.open(elsewhere, "second").trials()] == [t.point for t in other.trials()][:8]
