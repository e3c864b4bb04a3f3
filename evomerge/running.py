"""Jobs in, stored evaluations out: attempts, retries, reuse of identical recipes, and stopping."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from evomerge.errors import Interrupted
from evomerge.evaluation import task_scores
from evomerge.objectives import Objective
from evomerge.planning import Plan
from evomerge.pools import Failure, Job, Pool, Result
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.store import Evaluation, Store

STOP_POLL_SECONDS = 2.0
WAIT_SECONDS = 0.5
DRAIN, DROP = 1, 2


class StopSignal:
    """How urgently the user (or a scheduler) wants the run to end: 0 not, 1 drain what runs, 2 drop it.

    Ctrl-C and SIGTERM raise it by one each; ``evomerge stop`` raises it to 1 through the store. While ``nothing_runs``
    there is nothing to wait for: the first signal raises KeyboardInterrupt (in Ray's calls any other exception of a
    signal handler becomes a SystemError).
    """

    def __init__(self) -> None:
        self.level = 0
        self.reason = ""
        self.nothing_runs = False
        self._polled = 0.0

    @contextmanager
    def installed(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Catch SIGINT and SIGTERM inside the block. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: object) -> None:
            self.level += 1
            self.reason = signal.Signals(number).name
            if self.nothing_runs:
                raise KeyboardInterrupt(self.reason)
            if self.level == DRAIN:
                tell("stopping: waiting for the running evaluations (Ctrl-C again drops them)")
            elif self.level == DROP:
                tell("stopping now: running evaluations are dropped and will be run again on resume")
            else:  # whatever the main thread is waiting for, it does not end by itself
                raise KeyboardInterrupt(self.reason)

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def poll(self, store: Store) -> None:
        now = time.monotonic()
        if self.level == 0 and now - self._polled >= STOP_POLL_SECONDS:
            self._polled = now
            if store.stop_requested():
                self.level, self.reason = DRAIN, "evomerge stop"


@dataclass(frozen=True)
class Done:
    """An evaluation that has ended: its scores, or why there are none."""

    key: str
    objective: float | None
    failure: Failure | None
    seconds: float = 0.0


@dataclass
class _Running:
    job: Job
    subject: str
    split: str
    recipe: Recipe
    started: float


class Runner:
    """Evaluates recipes on splits through a pool and stores what comes back.

    Args:
        pool: made at the first submission by ``make_pool``, so that a finished study starts no worker.
        retries: how often an evaluation that lost its worker is tried again. Other failures are final: an outcome is a
            function of recipe and item, so an error or a NaN would only come again.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        make_pool: Callable[[], Pool],
        stop: StopSignal,
        progress: Progress,
        retries: int,
    ):
        self.plan, self.store, self.stop, self.progress, self.retries = plan, store, stop, progress, retries
        self._make_pool, self._pool = make_pool, None
        references = store.record.get("references")
        self.objective: Objective = plan.objective if references is None else plan.objective.bind(references)
        self._running: dict[str, _Running] = {}
        self._ready: list[Done] = []
        self._stored: dict[str, Evaluation] = {}
        self._by_recipe: dict[tuple[str, str], Evaluation] = {}
        for evaluation in store.evaluations():
            self._remember(evaluation)
        self._lost: dict[str, int] = {}
        self._failed: dict[str, Failure] = {}
        self._attempts: dict[str, int] = {}
        for attempt in store.attempts():
            self._attempts[attempt.key] = max(self._attempts.get(attempt.key, 0), attempt.attempt)
            if attempt.state == "lost":
                self._lost[attempt.key] = self._lost.get(attempt.key, 0) + 1
            elif attempt.state not in ("started", "complete"):
                self._failed[attempt.key] = Failure(attempt.state, attempt.reason, attempt.detail)

    @property
    def pool(self) -> Pool:
        if self._pool is None:
            self.progress.log("starting workers")
            began = time.monotonic()
            pool = self._make_pool()
            self._pool = pool
            self.stop.nothing_runs = True
            try:
                pool.start(self.plan.worker)
            finally:
                self.stop.nothing_runs = False
            self.progress.log(f"workers are ready after {time.monotonic() - began:.0f} s")
        return self._pool

    @property
    def running(self) -> int:
        return len(self._running) + len(self._ready)

    def stored(self, subject: str, split: str) -> Evaluation | None:
        return self._stored.get(f"{subject}/{split}")

    def failure(self, subject: str, split: str) -> Failure | None:
        """Why an earlier attempt at this failed for good, if it did."""
        key = f"{subject}/{split}"
        failed = self._failed.get(key)
        if failed is None and self._lost.get(key, 0) > self.retries:
            return self._gave_up(key)
        return failed

    def bind_objective(self, objective: Objective) -> None:
        """From now on ``objective`` judges; what was stored before it could is judged anew."""
        stored = {key: objective.judge(e.scores).score for key, e in self._stored.items()}
        assert objective.references is not None
        self.store.bind_objective(objective.references, stored)
        self.objective = objective
        for evaluation in self.store.evaluations():
            self._remember(evaluation)

    def has_room(self) -> bool:
        return self.stop.level == 0 and (self._pool is None or self._pool.idle() > 0)

    def submit(self, subject: str, split: str, recipe: Recipe) -> None:
        """Start an evaluation; one that is stored already, or has failed for good, is ready at once."""
        key = f"{subject}/{split}"
        if key in self._stored:
            self._ready.append(Done(key, self._stored[key].objective, None))
            return
        failed = self.failure(subject, split)
        if failed is not None:
            self._ready.append(Done(key, None, failed))
            return
        twin = self._by_recipe.get((recipe.hash, split))
        if twin is not None:
            self._store_evaluation(
                key, subject, split, recipe, self._with_outcomes(twin).outcomes, {}, f"as {twin.key}"
            )
            self._ready.append(Done(key, self._stored[key].objective, None))
            return
        self._start(key, subject, split, recipe)

    def _start(self, key: str, subject: str, split: str, recipe: Recipe) -> None:
        pool = self.pool
        attempt = self._attempts.get(key, 0) + 1
        self._attempts[key] = attempt
        job = Job(key, attempt, recipe.to_dict(), self.plan.item_ids(split))
        self.store.log_attempt(key, attempt, "started", "", "", 0.0, "")
        self._running[key] = _Running(job, subject, split, recipe, time.monotonic())
        pool.submit(job)

    def wait(self) -> list[Done]:
        """Evaluations that have ended since the last call; waits a moment for the first.

        Raises:
            Interrupted: the user asked twice to stop.
        """
        self.stop.poll(self.store)
        if self.stop.level >= DROP:
            raise Interrupted(self.stop.reason)
        done, self._ready = self._ready, []
        if done or self._pool is None:
            return done
        return [d for result in self.pool.wait(WAIT_SECONDS) if (d := self._take(result)) is not None]

    def _take(self, result: Result) -> Done | None:
        running = self._running.get(result.key)
        if running is None or running.job.attempt != result.attempt:
            self.progress.log(f"ignored a late result of {result.key}, attempt {result.attempt}")
            return None
        seconds = result.seconds.get("total", time.monotonic() - running.started)
        if result.failure is None:
            assert result.outcomes is not None
            self._store_evaluation(
                result.key,
                running.subject,
                running.split,
                running.recipe,
                result.outcomes,
                result.seconds,
                result.worker,
            )
            self.store.log_attempt(result.key, result.attempt, "complete", "", "", seconds, result.worker)
            del self._running[result.key]
            return Done(result.key, self._stored[result.key].objective, None, seconds)
        failure = result.failure
        self.store.log_attempt(
            result.key, result.attempt, failure.kind, failure.reason, failure.detail, seconds, result.worker
        )
        del self._running[result.key]
        if failure.kind == "lost":
            self._lost[result.key] = self._lost.get(result.key, 0) + 1
            if self._lost[result.key] <= self.retries:
                self.progress.log(f"{result.key}: {failure.reason}; trying again")
                if self.stop.level == 0:
                    self._start(result.key, running.subject, running.split, running.recipe)
                return None
            failure = self._gave_up(result.key, failure.reason)
        self._failed[result.key] = failure
        self.progress.log(f"{result.key} failed ({failure.kind}): {failure.reason}")
        return Done(result.key, None, failure, seconds)

    def _gave_up(self, key: str, last: str = "") -> Failure:
        reason = f"lost its worker {self._lost[key]} times" + (f", last: {last}" if last else "")
        return Failure("lost", reason)

    def _store_evaluation(self, key, subject, split, recipe, outcomes, seconds, worker) -> None:
        items = [item for item in self.plan.items if item.split == split]
        scores = task_scores(self.plan.evaluator, items, outcomes)
        evaluation = Evaluation(
            key=key,
            subject=subject,
            split=split,
            recipe_hash=recipe.hash,
            recipe=recipe.to_dict(),
            outcomes=tuple(outcomes),
            scores=scores,
            objective=self.objective.judge(scores).score,
            seconds=dict(seconds),
            worker=worker,
            time=time.time(),
        )
        self.store.save_evaluation(evaluation)
        self._remember(evaluation)

    def _remember(self, evaluation: Evaluation) -> None:
        self._stored[evaluation.key] = evaluation
        self._by_recipe.setdefault((evaluation.recipe_hash, evaluation.split), evaluation)

    def _with_outcomes(self, evaluation: Evaluation) -> Evaluation:
        return evaluation if evaluation.outcomes else self.store.evaluation(evaluation.key, with_outcomes=True)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
