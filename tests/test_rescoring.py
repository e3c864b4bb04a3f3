"""Comparing a checkpoint with what a study stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.errors import StudyError
from evomerge.launch import new_record, sqlite_url
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.rescoring import check_comparable
from evomerge.spec import load_spec
from evomerge.store import Store


def test_a_study_with_other_items_or_batches_cannot_be_compared_with(experiment, tmp_path: Path):
    path = experiment()
    plan = build_plan(load_spec(path), Progress(quiet=True))
    store = Store.create(sqlite_url(tmp_path / "study.db"), "tiny", new_record(plan, 12), items=plan.items)
    check_comparable(plan, store)
    data = json.loads(path.read_text())
    data["evaluate"]["split"]["test"] = 7
    path.write_text(json.dumps(data))
    with pytest.raises(StudyError, match="items in test"):
        check_comparable(build_plan(load_spec(path), Progress(quiet=True)), store)
