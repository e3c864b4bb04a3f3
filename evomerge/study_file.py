"""The file that a study is written to: which rows it holds, and what they must be. Plain data, for strangers' eyes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from evomerge import database as db
from evomerge.dimensions import Dimension
from evomerge.pools import WorkerSpec
from evomerge.validation import Strict

FORMAT = 1
Name = Annotated[str, Field(max_length=255)]
Word = Annotated[str, Field(max_length=32)]
Hash = Annotated[str, Field(max_length=64)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Number = int | float  # as they were written: 0 and 1 of outcomes have no fraction


class _Item(Strict):
    version: Count
    position: Count
    item_id: Name
    task: Name
    split: Word | None
    text: str


class _Recipe(Strict):
    hash: Hash
    recipe: dict[str, Any]


class _Trial(Strict):
    n: Count
    state: Literal["running", "complete", "fail", "pruned"]
    point: dict[str, Number | str | bool]
    recipe_hash: Hash
    score: float | None
    failure: str | None
    started: float
    finished: float | None


class _Evaluation(Strict):
    key: Name
    subject: Name
    split: Word
    round: Count
    recipe_hash: Hash
    scores: dict[str, Number]
    objective: float | None
    seconds: dict[str, Number]
    worker: Name
    time: float
    items_version: Count | None
    item_ids: list[str] | None
    outcomes: dict[str, list[Annotated[list[Count | list[Number]], Field(min_length=2, max_length=2)]]]
    item_weights: list[Number] | None


class _Attempt(Strict):
    key: Name
    attempt: Count
    state: Annotated[str, Field(max_length=16)]
    reason: str
    detail: str
    seconds: float | None
    worker: Name
    time: float


class _Event(Strict):
    kind: Literal["ask", "tell"]
    n: Count
    time: float


class _Training(Strict):
    n: Count
    state: dict[str, Any]
    curve: list[dict[str, Any]]
    time: float


class _More(BaseModel):
    """A part of the record: later versions may say more than is read here."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class _Experiment(_More):
    name: str
    base: str
    experts: dict[str, str]


class _Metric(_More):
    metric: str
    item_mean: bool


class _Round(_More):
    trials: Count
    winner: str


class Record(_More):
    """What every reader of a study's record relies on."""

    spec: _Experiment
    folder: str
    fingerprint: dict[str, str]
    libraries: dict[str, str]
    worker: dict[str, Any]
    metrics: dict[str, _Metric]
    dimensions: list[dict[str, Any]]
    budget: Count
    rounds: list[_Round]

    @model_validator(mode="after")
    def _can_be_built(self) -> Record:
        try:
            WorkerSpec.from_dict(self.worker)
            for dimension in self.dimensions:
                Dimension.from_dict(dimension)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise PydanticCustomError(
                "record", "worker and dimensions must be as evomerge writes them: {error}", {"error": str(error)}
            ) from None
        return self


class Head(Strict):
    evomerge_study: int
    written_by: str
    schema_version: int = Field(alias="schema")
    name: Annotated[str, Field(min_length=1, max_length=255)]
    created: float


@dataclass(frozen=True)
class Section:
    """Rows of one table, in ``order``. ``data`` are the columns that hold JSON."""

    table: sa.Table
    model: type[Strict]
    order: sa.Column[Any]
    data: tuple[str, ...] = ()
    optional: bool = False  # left out where there are no rows, as older versions do, which do not know it

    @property
    def columns(self) -> list[sa.Column[Any]]:
        """All but those that mean something in their own database only."""
        return [column for column in self.table.c if column.name not in ("study_id", "seq", "token")]


# In the order of the file: rows refer to earlier ones only.
SECTIONS = {
    "items": Section(db.items, _Item, db.items.c.seq),
    "recipes": Section(db.recipes, _Recipe, db.recipes.c.hash, ("recipe",)),
    "trials": Section(db.trials, _Trial, db.trials.c.n, ("point",)),
    "evaluations": Section(
        db.evaluations,
        _Evaluation,
        db.evaluations.c.seq,
        ("scores", "seconds", "item_ids", "outcomes", "item_weights"),
    ),
    "attempts": Section(db.attempts, _Attempt, db.attempts.c.seq),
    "events": Section(db.events, _Event, db.events.c.seq),
    "training": Section(db.training, _Training, db.training.c.n, ("state", "curve"), optional=True),
}
HEAD = tuple(field.alias or name for name, field in Head.model_fields.items())


class Check:
    """What rows must be to each other, so that nobody who reads the study stumbles over them."""

    def __init__(self) -> None:
        self.items: Counter[int] = Counter()  # version -> number of items
        self.splits: Counter[tuple[int, str | None]] = Counter()
        self.recipes: set[str] = set()
        self.seen: set[Any] = set()  # keys of evaluations, events
        self.trials = 0

    def row(self, section: str, row: Mapping[str, Any]) -> None:
        getattr(self, f"_{section}", lambda row: None)(row)

    def _items(self, row: Mapping[str, Any]) -> None:
        version = row["version"]
        if row["position"] != self.items[version]:
            raise ValueError(f"item {row['item_id']!r} is out of order")
        self.items[version] += 1
        self.splits[version, row["split"]] += 1

    def _recipes(self, row: Mapping[str, Any]) -> None:
        self._once(row["hash"], "recipe")
        self.recipes.add(row["hash"])

    def _trials(self, row: Mapping[str, Any]) -> None:
        self._has_recipe(row)
        if row["n"] != self.trials:
            raise ValueError(f"trial {self.trials} is missing")
        if (row["state"] == "complete") != (row["score"] is not None):
            raise ValueError(f"a complete trial, and no other, has a score; trial {row['n']} is {row['state']}")
        self.trials += 1

    def _evaluations(self, row: Mapping[str, Any]) -> None:
        self._once(row["key"], "evaluation")
        self._has_recipe(row)
        ids, version = row["item_ids"], row["items_version"]
        if (version is None) == (ids is None):
            raise ValueError(f"evaluation {row['key']!r} must say by a version or a list which items it has")
        count = len(ids) if ids is not None else self.splits[version, row["split"]]
        for start, values in (run for runs in row["outcomes"].values() for run in runs):
            if not isinstance(start, int) or not isinstance(values, list) or start + len(values) > count:
                raise ValueError(f"evaluation {row['key']!r} has outcomes that are not of its {count} items")
        if row["item_weights"] is not None and len(row["item_weights"]) != count:
            raise ValueError(f"evaluation {row['key']!r} has weights that are not of its {count} items")

    def _events(self, row: Mapping[str, Any]) -> None:
        self._once((row["kind"], row["n"]), "event")

    def _training(self, row: Mapping[str, Any]) -> None:
        self._once(row["n"], "training")

    def _once(self, key: Any, what: str) -> None:
        if (what, key) in self.seen:
            raise ValueError(f"{what} {key!r} stands twice")
        self.seen.add((what, key))

    def _has_recipe(self, row: Mapping[str, Any]) -> None:
        if row["recipe_hash"] not in self.recipes:
            raise ValueError(f"the recipe {row['recipe_hash']!r} is missing")
