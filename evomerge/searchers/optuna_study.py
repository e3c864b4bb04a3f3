"""Optuna's samplers by ask and tell, on a study in memory that only the searcher sees."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from evomerge.params import Param
from evomerge.searchers.base import Point, Searcher, Told, keyed_generator, uniform_point
from evomerge.space import METHOD

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

STARTUP = Param(int, 10, "proposals before the model is used: the initial point, then uniform ones", low=1)
WINDOW = Param(int, 4, "most trials open at once on the reproducible schedule; 1 is purely sequential", low=1)


class OptunaSearcher(Searcher):
    """A sampler of Optuna's. Subclasses say which by ``sampler``.

    The first proposals are the starts, those up to ``n_startup`` - 1 are uniform. Each proposal has a sampler seeded
    from (seed, n), so that it depends on what was proposed and told, and on nothing else.

    On the reproducible schedule at most ``window`` proposals are open at once, the new one included: trial n waits for
    the first max(0, n - window + 1). The window is part of the search: another number of workers changes nothing, but
    more workers than ``window`` stay idle, and a larger window learns later.
    """

    params: ClassVar[Mapping[str, Param]] = {"n_startup": STARTUP, "window": WINDOW}

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        import optuna

        self._optuna = optuna
        self._distributions = {d.name: d.distribution() for d in space.dimensions}
        self.conditional = any(d.when for d in space.dimensions)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study in memory is nobody's news
        try:
            self._study = optuna.create_study(
                directions=[optuna.study.StudyDirection.MAXIMIZE] * self.num_objectives,
                storage=optuna.storages.InMemoryStorage(),
            )
        finally:
            optuna.logging.set_verbosity(verbosity)

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """A new sampler for one proposal, whose random draws derive from ``seed``."""

    def needs(self, n: int) -> int:
        return max(0, n - self.options["window"] + 1)

    def ask(self, n: int) -> Point:
        if n < max(self.options["n_startup"], len(self.starts)):
            given = n < len(self.starts)
            point = dict(self.starts[n]) if given else uniform_point(self.space, keyed_generator(self.seed, n))
            self.replay(n, point)
            return point
        seed = int(keyed_generator(self.seed, n).integers(2**32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)  # a pinned version is known
            sampler = self.sampler(seed)
        # Where every trial has all dimensions, there is no need to look through all trials for those they share.
        known = self.num_objectives == 1 and not self.conditional
        self._study.sampler = _known_space(sampler, self._distributions) if known else sampler
        trial = self._study.ask(fixed_distributions=None if self.conditional else self._distributions)
        if self.conditional:
            method = self._suggest(trial, METHOD)
            for dimension in self.space.active(method):
                self._suggest(trial, dimension.name)
        if trial.number != n:
            raise ValueError(f"proposals are asked for in order: expected {trial.number}, not {n}")
        proposed = trial.params  # a deep copy on every access
        return {name: proposed[name] for name in self._distributions if name in proposed}

    def _suggest(self, trial: Any, name: str) -> Any:
        kind = self._distributions[name]
        if isinstance(kind, self._optuna.distributions.CategoricalDistribution):
            return trial.suggest_categorical(name, kind.choices)
        suggest = (
            trial.suggest_int if isinstance(kind, self._optuna.distributions.IntDistribution) else trial.suggest_float
        )
        return suggest(name, kind.low, kind.high, log=kind.log)

    def replay(self, n: int, point: Point) -> None:
        """Record ``point`` as proposal n, open. Nothing is drawn again: later draws are keyed by (seed, n) alone."""
        if len(self._study.get_trials(deepcopy=False)) != n:
            raise ValueError(f"proposals are asked for in order, but {n} is not the next")
        state = self._optuna.trial.TrialState.RUNNING
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state, params=dict(point), distributions={name: self._distributions[name] for name in point}
            )
        )

    def tell(self, trial: Told) -> None:
        states = self._optuna.trial.TrialState
        if trial.usable:
            trial_id = self._study.get_trials(deepcopy=False)[trial.n]._trial_id
            for key, margin in constraint_attributes(trial.margins).items():
                self._study._storage.set_trial_system_attr(trial_id, key, margin)
            self._study.tell(trial.n, list(trial.values) if self.num_objectives > 1 else trial.score)
        else:
            pruned = trial.state == "pruned"
            self._study.tell(trial.n, state=states.PRUNED if pruned else states.FAIL)


def constraint_attributes(margins: Sequence[float]) -> dict[str, float]:
    """The attributes by which Optuna keeps constraints, for trials that are no more than a record in its storage."""
    if not margins:
        return {}
    import optuna

    record = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    for number, margin in enumerate(margins):
        record.set_constraint(str(number), margin)
    return dict(record.system_attrs)


def _known_space(sampler: BaseSampler, space: Mapping[str, Any]) -> BaseSampler:
    """``sampler`` on a relative search space that is known.

    Optuna's samplers find it by comparing the dimensions of all trials, in time that grows with trials times
    dimensions; sorted by name as theirs, so that the draws are the same.
    """
    import optuna

    class KnownSpace(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return dict(sorted(space.items()))

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return sampler.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return sampler.sample_independent(study, trial, param_name, param_distribution)

        def before_trial(self, study: Any, trial: Any) -> None:
            sampler.before_trial(study, trial)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            sampler.after_trial(study, trial, state, values)

    return KnownSpace()
