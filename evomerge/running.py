"""Jobs in, stored evaluations out: attempts, retries, reuse of identical recipes, and stopping."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from evomerge.descent import pieces
from evomerge.errors import CandidateError, Interrupted, ResourceError
from evomerge.evaluation import task_scores
from evomerge.objectives import Objective
from evomerge.planning import Plan
from evomerge.pools import BatchGradient, Failure, Job, Pool, Result, Trained
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.store import Evaluation, Store

STOP_POLL_SECONDS = 2.0
GRADIENT = "gradient:"  # how keys of jobs begin that are no evaluations
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
    keep: Callable[[Trained], None] | None = None  # of a job that trains adapters


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
        self._gradient_jobs = 0
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

    def train(
        self, subject: str, split: str, recipe: Recipe, wanted: Mapping[str, Any], keep: Callable[[Trained], None]
    ) -> None:
        """Start training adapters for ``recipe``, as an evaluation on a split of that name would be; one that has
        failed for good is ready at once.

        Args:
            wanted: ``Job.surgery``.
            keep: stores what comes back.
        """
        failed = self.failure(subject, split)
        if failed is not None:
            self._ready.append(Done(f"{subject}/{split}", None, failed))
            return
        self._start(f"{subject}/{split}", subject, split, recipe, wanted, keep)

    def give_up(self, subject: str, split: str, failure: Failure) -> None:
        """What ``failure`` says stands against an evaluation: it is ready at once, as one that failed."""
        key = f"{subject}/{split}"
        if self.failure(subject, split) is None:
            attempt = self._attempts[key] = self._attempts.get(key, 0) + 1
            self.store.log_attempt(key, attempt, failure.kind, failure.reason, failure.detail, 0.0, "")
            self._failed[key] = failure
            self.progress.log(f"{key} failed ({failure.kind}): {failure.reason}")
        self._ready.append(Done(key, None, self.failure(subject, split)))

    def gradients(
        self,
        step: int,
        recipe: Recipe,
        batches: Sequence[tuple[str, Sequence[str]]],
        options: Mapping[str, Any],
        *,
        shares: Sequence[float] | None = None,
        parts: int = 1,
    ) -> list[BatchGradient]:
        """Losses of ``recipe`` on batches, (task, items), and their gradients, in the order of the batches.

        The batches are shared out among the workers that are free; one that is lost is made up for as evaluations are.
        Evaluations that end meanwhile are stored, and come with the next ``wait``.

        Args:
            step: of the training, for messages.
            options: the rest of ``Job.gradient``.
            shares: what each batch counts. The gradients of share times loss are then summed in ``parts`` parts by
                whoever is there: so the bits do not depend on the workers.

        Raises:
            CandidateError: of kind nan, if a loss or a gradient is not finite.
            ResourceError: workers were lost too often, ran out of memory or time, or failed in another way.
            Interrupted: the user asked to stop; what the workers are at is dropped.
        """
        places = range(len(batches))
        jobs = max(1, self.pool.idle()) if shares is None else parts
        todo = deque(pieces(places, -(-len(batches) // jobs)))
        running: dict[tuple[str, int], tuple[int, ...]] = {}
        found: dict[int, BatchGradient] = {}
        lost = 0
        while todo or running:
            self.stop.poll(self.store)
            if self.stop.level:
                raise Interrupted(self.stop.reason)
            while todo and self.pool.idle() > 0:
                share = todo.popleft()
                self._gradient_jobs += 1
                wanted = {**options, "batches": [[task, list(items)] for task, items in (batches[i] for i in share)]}
                if shares is not None:
                    wanted["shares"] = [shares[i] for i in share]
                job = Job(f"{GRADIENT}{step}", self._gradient_jobs, recipe.to_dict(), (), wanted)
                running[job.key, job.attempt] = share
                self.pool.submit(job)
            for result in self.pool.wait(WAIT_SECONDS):
                share = running.pop((result.key, result.attempt), None)
                if share is None:
                    done = self._take(result)
                    self._ready += [done] if done is not None else []
                elif result.failure is None:
                    assert result.gradients is not None
                    found.update(zip(share, result.gradients, strict=True))
                elif result.failure.kind == "lost" and lost < self.retries:
                    lost += 1
                    self.progress.log(f"step {step}: {result.failure.reason}; trying again")
                    todo.append(share)
                else:
                    raise self._no_gradient(step, result.failure)
        return [found[i] for i in places]

    @staticmethod
    def _no_gradient(step: int, failure: Failure) -> CandidateError | ResourceError:
        """A NaN would only come again; all else may be mended."""
        if failure.kind == "nan":
            return CandidateError("nan", f"step {step}, {failure.reason}", failure.detail)
        remedy = {
            "memory": "Lower evaluate.batch_size (with --allow-drift) or search.batch, or set search.gradients: free.",
            "timeout": "Raise workers.timeout.",
        }.get(failure.kind, "Mend what it says.")
        detail = f"\n{failure.detail.rstrip()}" if failure.kind == "error" and failure.detail else ""
        return ResourceError(
            f"step {step} of the training failed ({failure.kind}): {failure.reason}{detail}",
            remedy=f"{remedy} The steps before it are kept: go on with evomerge resume, or finish with the candidates "
            "that there are by giving their number as --budget.",
        )

    def _start(
        self,
        key: str,
        subject: str,
        split: str,
        recipe: Recipe,
        surgery: Mapping[str, Any] | None = None,
        keep: Callable[[Trained], None] | None = None,
    ) -> None:
        pool = self.pool
        attempt = self._attempts.get(key, 0) + 1
        self._attempts[key] = attempt
        job = Job(key, attempt, recipe.to_dict(), self.plan.item_ids(split), surgery=surgery)
        self.store.log_attempt(key, attempt, "started", "", "", 0.0, "")
        self._running[key] = _Running(job, subject, split, recipe, time.monotonic(), keep)
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
        if result.key.startswith(GRADIENT):
            return None  # of a training that was stopped meanwhile
        if running is None or running.job.attempt != result.attempt:
            self.progress.log(f"ignored a late result of {result.key}, attempt {result.attempt}")
            return None
        seconds = result.seconds.get("total", time.monotonic() - running.started)
        if result.failure is None and running.keep is not None:
            assert result.trained is not None
            running.keep(result.trained)
            self.store.log_attempt(result.key, result.attempt, "complete", "", "", seconds, result.worker)
            del self._running[result.key]
            return Done(result.key, None, None, seconds)
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
                    job = running.job
                    self._start(job.key, running.subject, running.split, running.recipe, job.surgery, running.keep)
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
