"""The study as Optuna sees it: a copy of the trials, for optuna-dashboard and every other tool that reads Optuna."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evomerge.database import Database, engine_options, make_durable, quiet_optuna
from evomerge.dimensions import Dimension
from evomerge.errors import StudyError
from evomerge.objectives import Objective
from evomerge.searchers.optuna_study import constraint_attributes

if TYPE_CHECKING:
    from evomerge.store import TrialRecord

MOST_PARAMS = 64  # dimensions; above, one attribute holds the whole point (a row a dimension costs ~1 ms a trial)
STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "fail": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}

log = logging.getLogger(__name__)


class Mirror:
    """Writes the trials of one study into Optuna's tables of the same database, under the same numbers.

    evomerge's own tables are the truth. Each write goes there first, so that Optuna's copy can only lack the last ones;
    ``repair`` adds what it lacks. Making one opens Optuna's storage (and its tables, if they are not there);
    ``start`` finds or makes the study.

    Args:
        database: the store.
        name: the study's name, in Optuna too.
        dimensions: of the space, as plain data, for Optuna's distributions.
        num_objectives: all to be maximised.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        dimensions: Sequence[Mapping[str, Any]] = (),
        num_objectives: int = 1,
    ):
        self.database, self.name, self.num_objectives = database, name, num_objectives
        self.dimensions = {d["name"]: Dimension.from_dict(d) for d in dimensions}
        self._ids: dict[int, int] = {}  # trial number -> Optuna's trial id
        # Optuna fills {SCHEMA_VERSION} into URLs, so braces of a path are doubled.
        url = database.url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        with quiet_optuna():
            try:
                self.storage = database.patiently(
                    lambda: optuna.storages.RDBStorage(url, engine_kwargs=engine_options(database.url))
                )
            except RuntimeError as error:
                raise StudyError(str(error), where=database.where) from error
        make_durable(self.storage.engine)
        self.storage.engine.dispose()  # connections that were made before the line above
        self.study_id = -1
        self.in_step = True

    @classmethod
    def of_record(cls, database: Database, name: str, record: Mapping[str, Any]) -> Mirror:
        """For the study that remembers ``record``."""
        return cls(database, name, record.get("dimensions", ()), len(Objective.of_record(record).terms))

    def start(self) -> Mirror:
        self.study_id = self.database.patiently(self._study)
        return self

    @staticmethod
    def is_taken(database: Database, name: str) -> bool:
        """True if Optuna already has a study ``name`` in this database. Creates nothing."""
        import sqlalchemy as sa

        def look(connection: sa.Connection) -> bool:
            if not sa.inspect(connection).has_table("studies"):
                return False
            query = sa.text("SELECT 1 FROM studies WHERE study_name = :name")
            return connection.execute(query, {"name": name}).first() is not None

        return database.read(look)

    def _study(self) -> int:
        with quiet_optuna():
            try:
                directions = [StudyDirection.MAXIMIZE] * self.num_objectives
                return self.storage.create_new_study(directions, study_name=self.name)
            except DuplicatedStudyError:
                return self.storage.get_study_id_from_name(self.name)

    def repair(self, states: Sequence[str], read_trials: Callable[[], Sequence[TrialRecord]]) -> int:
        """Add what Optuna's copy lacks; returns how many trials that were.

        Args:
            states: of all trials, in the order of their numbers.
            read_trials: the trials themselves; called only if something is lacking.
        """
        have = self._count(len(states))
        running = self.database.patiently(
            lambda: self.storage.get_all_trials(self.study_id, deepcopy=False, states=(TrialState.RUNNING,))
        )
        open_there = sorted(t.number for t in running if t.number < have and states[t.number] != "running")
        repaired = len(open_there) + len(states) - have
        if repaired:
            trials = read_trials()
            for trial in (trials[n] for n in open_there):
                self.finish(
                    trial.n, trial.state, trial.score, trial.failure, values=trial.values, margins=trial.margins
                )
            for trial in trials[have:]:
                self.add(trial)
            log.info("%s: %d trials were completed in Optuna's copy", self.name, repaired)
        return repaired

    def add(self, trial: TrialRecord) -> None:
        """Write ``trial`` under its number, in its present state. A trial that is there already is left alone."""
        params = dict(trial.point) if len(trial.point) <= MOST_PARAMS else {}
        frozen = FrozenTrial(
            number=trial.n,
            trial_id=-1,
            state=STATES[trial.state],
            value=None,
            values=self._values(trial.score, trial.values),
            datetime_start=datetime.fromtimestamp(trial.started),
            datetime_complete=datetime.fromtimestamp(trial.finished) if trial.finished is not None else None,
            params=params,
            distributions={name: self._distribution(name, value) for name, value in params.items()},
            user_attrs=self._attributes(trial),
            system_attrs=constraint_attributes(trial.margins),
            intermediate_values={},
        )

        def create() -> int:
            found = self._find(trial.n)
            if found is not None:
                return found
            made = self.storage.create_new_trial(self.study_id, template_trial=frozen)
            number = self.storage.get_trial(made).number
            if number != trial.n:
                self.in_step = False
                log.warning(
                    "another program added trials to Optuna's copy of %s: trial %d is number %d there. The study "
                    "itself is not touched; delete the copy (optuna delete-study) and the next resume writes it anew.",
                    self.name, trial.n, number,
                )  # fmt: skip
            return made

        if self.in_step:
            self._ids[trial.n] = self.database.patiently(create)

    def finish(
        self,
        n: int,
        state: str,
        score: float | None,
        failure: str | None,
        *,
        values: Sequence[float] = (),
        margins: Sequence[float] = (),
    ) -> None:
        """End trial ``n``; one that has ended already is left alone."""
        if not self.in_step:
            return

        def end() -> None:
            trial_id = self._ids.get(n)
            if trial_id is None:
                trial_id = self._find(n)
            if trial_id is None:
                return
            try:
                if failure is not None:  # an ended trial takes no attributes
                    self.storage.set_trial_user_attr(trial_id, "failure", failure)
                for key, margin in constraint_attributes(margins).items():
                    self.storage.set_trial_system_attr(trial_id, key, margin)
                self.storage.set_trial_state_values(trial_id, STATES[state], self._values(score, values))
            except UpdateFinishedTrialError:
                pass

        self.database.patiently(end)
        self._ids.pop(n, None)

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _find(self, n: int) -> int | None:
        try:
            return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, n)
        except KeyError:
            return None

    def _count(self, at_most: int) -> int:
        """How many of the first ``at_most`` numbers Optuna has: they have no gaps, so a few questions tell."""
        if at_most == 0 or self.database.patiently(lambda: self._find(at_most - 1)) is not None:
            return at_most
        low, high = 0, at_most - 1  # numbers below low are there, number high is not
        while low < high:
            middle = (low + high) // 2
            if self.database.patiently(lambda n=middle: self._find(n)) is not None:
                low = middle + 1
            else:
                high = middle
        return low

    def _values(self, score: float | None, values: Sequence[float]) -> list[float] | None:
        if score is None:
            return None
        return list(values) if self.num_objectives > 1 else [score]

    def _distribution(self, name: str, value: Any) -> BaseDistribution:
        return (self.dimensions.get(name) or Dimension(name, value, value, value)).distribution()

    @staticmethod
    def _attributes(trial: TrialRecord) -> dict[str, str]:
        attributes = {"point": json.dumps(trial.point), "recipe": trial.recipe_hash}
        if trial.failure is not None:
            attributes["failure"] = trial.failure
        return attributes
