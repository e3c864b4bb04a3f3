"""The study: controls, search, finish. The loop is ask, submit, collect, store, tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from evomerge.dimensions import Point
from evomerge.errors import EvomergeError, Interrupted, StudyError
from evomerge.objectives import Judged, Objective
from evomerge.planning import Plan, make_searcher
from evomerge.pools import Failure
from evomerge.progress import Progress
from evomerge.ranking import SURGERY, Standing, best_control, choose_winner, ranked_trials
from evomerge.recipe import Group, Recipe
from evomerge.running import Done, Runner
from evomerge.searchers.base import GradientSearcher, Told
from evomerge.store import Store, TrialRecord
from evomerge.surgery_stage import TRAINING, Surgeries
from evomerge.training import Training, batches_at_once
from evomerge.warmstart import complete

SWEEP = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


class NothingCompleted(EvomergeError):
    """Not one candidate or not one control could be evaluated."""


def uniform(plan: Plan, method: str, weight: float, **params) -> Recipe:
    """A control: every expert gets the same ``weight`` everywhere."""
    weights = (weight,) * len(plan.template.experts)
    return replace(plan.template, method=method, params=params, groups=(Group(weights=weights),))


def opening_controls(plan: Plan) -> dict[str, Recipe]:
    """Subject -> recipe of the controls that need no choice: base, every expert, uniform average."""
    experts = plan.template.experts
    controls = {"control:base": uniform(plan, "task_arithmetic", 0.0)}
    for t, expert in enumerate(experts):
        alone = Group(weights=tuple(1.0 if i == t else 0.0 for i in range(len(experts))))
        controls[f"control:expert:{expert.name}"] = replace(plan.template, groups=(alone,))
    controls["control:average"] = uniform(plan, "linear", 1.0 / len(experts), normalize=True)
    return controls


def sweep_values(plan: Plan) -> tuple[float, ...]:
    return tuple(plan.spec.evaluate.finish.sweep or SWEEP)


def most_at_once(plan: Plan) -> int:
    """How many candidates the search can have in evaluation together before it must hear of one."""
    budget = plan.spec.search.budget
    if plan.spec.search.schedule == "asynchronous":
        return budget
    searcher = make_searcher(plan.spec, plan.space)
    if isinstance(searcher, GradientSearcher):
        return max(batches_at_once(searcher, plan) + 1, searcher.at_once(budget))
    return searcher.at_once(budget)


def idle_workers(plan: Plan, count: int) -> str | None:
    """What to tell a user who asks for more workers than the search keeps busy; None if all have work."""
    most = most_at_once(plan)
    if count <= most:
        return None
    if isinstance(make_searcher(plan.spec, plan.space), GradientSearcher):
        return (
            f"{count} workers, but the search keeps at most {most} busy: the others help with controls and the finish "
            "only. More search.parts share a step of the training out to more, as far as it has batches "
            "(evaluate.batch_size items of a task at most)."
        )
    return (
        f"{count} workers, but searcher {plan.spec.search.method} has at most {most} candidates in evaluation at a "
        "time here: the others help with controls and the finish only."
        + (" `schedule: asynchronous` keeps all busy." if make_searcher(plan.spec, plan.space).asynchronous else "")
    )


class Study:
    """One experiment being searched: the driver's side.

    Args:
        budget: how many trials the search may have in all.
        seconds: stop proposing after this long (None: no limit).
    """

    def __init__(
        self, plan: Plan, store: Store, runner: Runner, progress: Progress, *, budget: int, seconds: float | None = None
    ):
        self.plan, self.store, self.runner, self.progress = plan, store, runner, progress
        self.wanted = budget
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.asynchronous = plan.spec.search.schedule == "asynchronous"
        self.starts: list[Point | None] = store.record.get("starts", [])
        self._set_searcher()
        self.trials: list[TrialRecord] = []
        self.standing = Standing()
        self.told = 0  # reproducible schedule: the first `told` trials have been told

    def run(self) -> None:
        """Controls on search, the search itself, then finish; picks up wherever the store says it stopped.

        Raises:
            Interrupted: stopped from outside; the study can be resumed.
        """
        self.controls()
        self.search()
        self.finish()

    def _set_searcher(self) -> None:
        """A new searcher, and the budget as far as it has candidates."""
        known = [point for point in self.starts if point is not None]
        self.searcher = make_searcher(self.plan.spec, self.plan.space, known)
        self.budget = min(self.wanted, self.searcher.size or self.wanted)
        self.training = None
        if isinstance(self.searcher, GradientSearcher):
            self.training = Training(self.searcher, self.plan, self.store, self.runner, self.progress)

    # --- the search ------------------------------------------------------------------------------------------------

    def search(self) -> None:
        """Propose, evaluate and tell until the budget is spent."""
        if self.budget < self.wanted:
            self.progress.log(f"searcher {self.plan.spec.search.method} has {self.budget} candidates in all")
        waiting = self.replay()
        best = self._best_note()
        finished = sum(t.state != "running" for t in self.trials)
        with self.progress.stage("search", self.budget) as stage:
            stage.update(finished, best)
            while True:
                while self.runner.has_room() and (waiting or self.may_ask()):
                    trial = waiting.pop(0) if waiting else self.ask()
                    if trial is not None:
                        self.submit(trial)
                if not self.runner.running and (self.runner.stop.level or not (waiting or self.may_ask())):
                    break
                for done in self.runner.wait():
                    self.record(done)
                    stage.advance(1, self._best_note())
        self._stop_if_asked()
        if (why := self.searcher.ended(len(self.trials))) is not None:
            self.progress.log(f"no more candidates after {len(self.trials)}: {why}")
        if not self.trials:
            raise NothingCompleted("the time limit was over before the first candidate was proposed")
        if not any(t.state == "complete" for t in self.trials):
            reasons = "; ".join(sorted({str(t.failure) for t in self.trials})[:3])
            raise NothingCompleted(f"all {len(self.trials)} candidates failed: {reasons}")

    def may_ask(self) -> bool:
        n = len(self.trials)
        if n >= self.budget or (self.deadline is not None and time.monotonic() > self.deadline):
            return False
        if self.searcher.ended(n) is not None:
            return False
        if self.asynchronous:
            return True
        need = self.searcher.needs(n)
        return all(t.state != "running" for t in self.trials[self.told : need])

    def ask(self) -> TrialRecord | None:
        """Tell what trial n must know, propose it, and store it before it runs; None if it was stopped while it was
        trained for."""
        n = len(self.trials)
        if not self.asynchronous:
            self._tell_first(self.searcher.needs(n))
        try:
            point = self.searcher.ask(n) if self.training is None else self.training.ask(n)
        except Interrupted:
            return None  # what runs beside it may end; the loop sees the stop
        recipe = self.plan.space.decode(point) if self.training is None else self.training.recipe(point)
        if self.asynchronous:
            self.store.log_event("ask", n)
        self.store.add_trial(n, point, recipe.to_dict(), recipe.hash)
        self.trials.append(TrialRecord.running(n, point, recipe.to_dict(), recipe.hash))
        return self.trials[n]

    def submit(self, trial: TrialRecord) -> None:
        """Start the evaluation of a trial that is stored; one that the training did not reach has failed."""
        reason = self.searcher.failure(trial.n) if isinstance(self.searcher, GradientSearcher) else None
        if reason is not None:
            self.runner.give_up(f"trial:{trial.n}", "search", Failure("nan", reason))
        else:
            self.runner.submit(f"trial:{trial.n}", "search", Recipe.from_dict(trial.recipe))

    def record(self, done: Done) -> None:
        """A trial has ended: store it, and on the asynchronous schedule tell it at once."""
        n = int(done.key.removeprefix("trial:").partition("/")[0])
        state = "fail" if done.failure else "complete"
        reason = f"{done.failure.kind}: {done.failure.reason}" if done.failure else None
        judged = self._judged(f"trial:{n}")
        values = judged.values if judged and self.objective.several else ()
        margins = judged.margins if judged else ()
        self.store.finish_trial(n, state, done.objective, reason, values=values, margins=margins)
        self.trials[n] = replace(
            self.trials[n], state=state, score=done.objective, failure=reason, values=values, margins=margins
        )
        self.standing.add(self.trials[n])
        if self.asynchronous:
            self.store.log_event("tell", n)
            self.searcher.tell(self._told(n))

    def replay(self) -> list[TrialRecord]:
        """Bring a new searcher to where the stored study was; returns the trials that were running then."""
        self.trials = self.store.trials()
        self.standing = Standing(self.trials)
        if [t.n for t in self.trials] != list(range(len(self.trials))):
            raise StudyError(f"the store of study {self.plan.spec.name!r} has gaps in its trial numbers")
        if self.training is not None:
            self.training.restore()
        if self.asynchronous:
            self._replay_log()
        else:
            for trial in self.trials:
                self._tell_first(self.searcher.needs(trial.n))
                self.searcher.replay(trial.n, dict(trial.point))
        return [t for t in self.trials if t.state == "running"]

    def _replay_log(self) -> None:
        """Asynchronous schedule: repeat asks and tells in the order in which they happened."""
        told = set()
        events = list(self.store.events())
        # A driver that died before it stored trial n has left an ask of n that counts for nothing: n was asked again.
        last_ask = {n: position for position, (kind, n) in enumerate(events) if kind == "ask"}
        for position, (kind, n) in enumerate(events):
            if n >= len(self.trials) or (kind == "ask" and position != last_ask[n]):
                continue
            if kind == "ask":
                self.searcher.replay(n, dict(self.trials[n].point))
            else:
                told.add(n)
                self.searcher.tell(self._told(n))
        for trial in self.trials:  # finished, but the driver died before telling
            if trial.state != "running" and trial.n not in told:
                self.store.log_event("tell", trial.n)
                self.searcher.tell(self._told(trial.n))

    def _tell_first(self, count: int) -> None:
        while self.told < count:
            self.searcher.tell(self._told(self.told))
            self.told += 1

    def _told(self, n: int) -> Told:
        """Trial n as the searcher hears of it: its objectives less the penalty on its weights, if there is one."""
        trial, penalty = self.trials[n], self.objective.penalty
        paid = 0.0 if penalty is None else penalty.of(trial.recipe)
        score = None if trial.score is None else trial.score - paid
        values = tuple(value - paid for value in trial.values)
        return Told(n, dict(trial.point), trial.state, score, values, trial.margins)  # type: ignore[arg-type]

    # --- controls and finish ---------------------------------------------------------------------------------------

    def controls(self) -> None:
        """The controls and the sweep of the single lambda on `search`; not counted in the budget.

        What the objective is relative to comes first: nothing else can be judged before.
        """
        wanted = opening_controls(self.plan)
        if not self.objective.ready:
            needed = self.objective.subjects
            self._evaluate("references on search", "search", {s: wanted[s] for s in needed})
            self._bind_objective()
        wanted |= {f"sweep:{w:g}": uniform(self.plan, "task_arithmetic", w) for w in sweep_values(self.plan)}
        self._evaluate("controls on search", "search", wanted)
        if not any(self.runner.stored(s, "search") for s in wanted):
            failure = self.runner.failure("control:base", "search")
            raise NothingCompleted(f"not even the base could be evaluated: {failure.reason if failure else 'unknown'}")
        chosen = self.chosen_controls()
        self._evaluate("controls on search", "search", chosen)
        if None in self.starts:
            weight = chosen["control:task_arithmetic"].groups[0].weights[0]
            self.starts = [*complete(self.plan, self.starts, weight)]
            self.store.update_record(starts=self.starts)  # from now on a resume needs no control for it
            self._set_searcher()

    @property
    def objective(self) -> Objective:
        return self.runner.objective

    def _bind_objective(self) -> None:
        """The references' scores become constants of the study.

        Raises:
            StudyError: they are nothing that scores can be relative to.
            NothingCompleted: one could not be evaluated.
        """
        references = {}
        for subject in self.objective.subjects:
            evaluation = self.runner.stored(subject, "search")
            if evaluation is None:
                failure = self.runner.failure(subject, "search")
                raise NothingCompleted(
                    f"the objective is relative to {subject.removeprefix('control:')}, which could not be evaluated on "
                    f"search: {failure.reason if failure else 'unknown'}"
                )
            references[subject] = evaluation.scores
        self.runner.bind_objective(self.objective.bind(references))
        for line in self.objective.text():
            self.progress.log(f"objective: {line}")

    def _judged(self, subject: str) -> Judged | None:
        """What a subject's scores on search are worth; None if there are none."""
        evaluation = self.runner.stored(subject, "search")
        return None if evaluation is None else self.objective.judge(evaluation.scores)

    def chosen_controls(self) -> dict[str, Recipe]:
        """Task arithmetic at the lambda that is best on `search`, and random vectors at that lambda."""
        scored = [
            (judged.merit, -w) for w in sweep_values(self.plan) if (judged := self._judged(f"sweep:{w:g}")) is not None
        ]
        best = -max(scored)[1] if scored else sweep_values(self.plan)[0]
        return {
            "control:task_arithmetic": uniform(self.plan, "task_arithmetic", best),
            "control:random": uniform(self.plan, "random_vectors", best),
        }

    def finish(self) -> None:
        """Controls and the best k on `select`; the winner of that and the controls once on `test`."""
        controls = opening_controls(self.plan) | self.chosen_controls()
        finalists = self.finalists()
        self._evaluate("best candidates on search", "search", finalists)
        self._evaluate("controls and best on select", "select", controls | finalists)
        winner = choose_winner(self.store.evaluations(), self.objective)
        if winner is None:
            raise NothingCompleted("no candidate could be evaluated on the select items")
        self._evaluate(
            "winner and controls on test", "test", controls | {winner.subject: Recipe.from_dict(winner.recipe)}
        )
        if self.plan.spec.surgery is not None:
            control = best_control(self.store.evaluations("select"), self.objective)
            chosen = [winner] if control is None else [winner, control]
            self._operate({e.subject: Recipe.from_dict(e.recipe) for e in chosen})
        rounds = list(self.store.record.get("rounds", []))
        if not rounds or rounds[-1]["trials"] != len(self.trials) or rounds[-1]["winner"] != winner.subject:
            rounds.append({"trials": len(self.trials), "winner": winner.subject, "time": time.time()})
            self.store.update_record(rounds=rounds)

    def _operate(self, subjects: dict[str, Recipe]) -> None:
        """Adapters for each of ``subjects``, and what they are worth on `select` and `test`."""
        surgeries = Surgeries(self.plan, self.store)

        def train(subject: str, split: str, recipe: Recipe) -> None:
            plain = subject.removeprefix(SURGERY)
            self.runner.train(subject, split, recipe, surgeries.job(), lambda trained: surgeries.keep(plain, trained))

        there = surgeries.recipes(subjects)
        missing = {name: recipe for s, recipe in subjects.items() if (name := SURGERY + s) not in there}
        self._evaluate("adapters for the winner and the best control", TRAINING, missing, train)
        adapted = surgeries.recipes(subjects)
        for split in ("select", "test"):
            self._evaluate(f"with adapters on {split}", split, adapted)

    def finalists(self) -> dict[str, Recipe]:
        """The best k trials on search, distinct recipes, and the point that the searcher itself recommends."""
        chosen: dict[str, Recipe] = {}
        distinct = {t.recipe_hash: t for t in reversed(self.trials) if t.state == "complete"}  # the first of each
        for trial in ranked_trials(distinct.values(), self.plan.spec.evaluate.finish.top):
            chosen[f"trial:{trial.n}"] = Recipe.from_dict(trial.recipe)
        # Nothing is asked after this, so the searcher may now know all; a later round replays it from the store.
        if not self.asynchronous:
            self._tell_first(len(self.trials))
        point = self.searcher.recommend()
        if point is not None:
            recipe = self.plan.space.decode(point)
            if recipe.hash not in {r.hash for r in chosen.values()}:
                chosen[f"recommended:{len(self.trials)}"] = recipe
        return chosen

    def _evaluate(
        self,
        title: str,
        split: str,
        wanted: dict[str, Recipe],
        submit: Callable[[str, str, Recipe], None] | None = None,
    ) -> None:
        """Evaluate each recipe on ``split`` unless that is stored; failures are logged and leave a gap.

        Args:
            submit: what is done instead, with (subject, split, recipe).
        """
        submit = submit or self.runner.submit
        todo = [
            (s, r) for s, r in wanted.items() if not self.runner.stored(s, split) and not self.runner.failure(s, split)
        ]
        if not todo:
            return
        queue: Iterator[tuple[str, Recipe]] = iter(todo)
        left = len(todo)
        with self.progress.stage(title, len(todo)) as stage:
            stage.update(0)
            while True:
                while left and self.runner.has_room():
                    subject, recipe = next(queue)
                    left -= 1
                    submit(subject, split, recipe)
                if not self.runner.running and (self.runner.stop.level or not left):
                    break
                for done in self.runner.wait():
                    score = "failed" if done.failure else "" if done.objective is None else f"{done.objective:.3f}"
                    stage.advance(1, f"{done.key.rpartition('/')[0]} {score}")
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.runner.stop.level:
            raise Interrupted(self.runner.stop.reason)

    def _best_note(self) -> str:
        best, failed = self.standing.best, self.standing.failed
        notes = []
        if best is not None:
            notes.append(
                f"none keeps the constraints yet, nearest trial {best.n}"
                if best.violation
                else f"best {best.score:.3f} (trial {best.n})"
            )
            if self.standing.front:
                notes.append(f"{len(self.standing.front)} on the front")
        controls = {
            s: judged for s in [*opening_controls(self.plan), *self.chosen_controls()] if (judged := self._judged(s))
        }
        if controls:
            top = max(controls, key=lambda s: controls[s].merit)
            notes.append(f"best control {controls[top].score:.3f} ({top.removeprefix('control:')})")
        return ", ".join([*notes, *([f"{failed} failed"] if failed else [])])
