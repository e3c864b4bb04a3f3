"""The contract of pools: inherit ``PoolContract`` (or ``KillablePoolContract``), give ``make_pool``, and run pytest."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from evomerge.errors import CheckpointError, EvaluatorError
from evomerge.evaluation import Outcome
from evomerge.pools import Job, Pool, Result, WorkerSpec
from evomerge.recipe import Group, Recipe, Source
from evomerge.scratch import remove_stale
from evomerge.testing import engines, tiny

EVALUATOR = '''"""Log-likelihoods of short texts, and one item for every way in which an evaluation can go wrong."""

import ctypes, os, random, re, signal, subprocess, sys, time

import numpy
import torch

from evomerge import Evaluator, Item, Outcome, Predictions

WORDS = ["alpha", "bravo", "carol", "delta", "eager", "fable"]
FAULTS = ["raise", "nan", "none", "short", "text", "exit", "memory", "_exit", "segfault", "abort",
          "hang", "hang in C", "wait", "slow"]


class Faults(Evaluator):
    def load(self):
        return [Item(id=w, task="words", text=w) for w in WORDS] + [Item(id=f, task="faults", text=f) for f in FAULTS]

    def prepare(self, target, items):
        if self.context.options.get("prepare") == "fails":
            raise KeyError("no such thing")
        if self.context.options.get("prepare") == "dies":
            print("about to die")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        self.splits = {item.id: item.split for item in items}

    def evaluate(self, target, item_ids):
        print("an evaluator that prints")
        answer = [self.one(target, i) for i in item_ids]
        if "none" in item_ids:
            return None
        return answer[:-1] if "short" in item_ids else answer

    def predicts(self, task):
        return frozenset(["answers"]) if task == "words" else frozenset()

    def predictions(self, target, item_ids, *, over="answers", labels=False, hidden=False):
        rows = []
        for item_id in item_ids:
            ids = torch.tensor([target.tokenizer(item_id)["input_ids"]], device=target.device)
            rows.append(target.model(input_ids=ids).logits[0, -1].float())
        return Predictions(torch.stack(rows), torch.ones(len(rows), device=target.device), None, None, None)

    def one(self, target, item_id):
        if item_id in FAULTS:
            value = self.fault(item_id)
            return Outcome(item_id, {"score": value})
        ids = torch.tensor([target.tokenizer(item_id)["input_ids"]], device=target.device)
        with torch.no_grad():
            logits = target.model(input_ids=ids).logits[0, :-1].double()
        score = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).mean().item()
        draw = random.random() + numpy.random.rand() + torch.rand(()).item()
        return Outcome(item_id, {"score": score, "draw": draw, "threads": torch.get_num_threads()})

    def fault(self, name):
        (self.context.folder / "pid").write_text(str(os.getpid()))
        if name == "raise":
            raise ValueError("a deliberate mistake")
        if name == "nan":
            return float("nan")
        if name == "text":
            return "many"
        if name == "exit":
            sys.exit(7)
        if name == "memory":
            torch.empty(2**60, dtype=torch.uint8)
        if name == "_exit":
            os._exit(3)
        if name == "segfault":
            ctypes.string_at(0)
        if name == "abort":
            os.abort()
        if name == "hang in C":
            re.match(r"(a+)+$", "a" * 64 + "b")  # never lets go of the interpreter's lock
        if name in ("hang", "wait"):
            child = subprocess.Popen(["sleep", "600"])
            (self.context.folder / "child").write_text(str(child.pid))
            while True:
                time.sleep(1)
        if name == "slow":
            time.sleep(3)
        return 0.0
'''
WORDS = ("alpha", "bravo", "carol", "delta", "eager", "fable")
FAULTS = (
    *("raise", "nan", "none", "short", "text", "exit", "memory", "_exit", "segfault", "abort"),
    *("hang", "hang in C", "wait", "slow"),
)


def make_spec(folder: Path) -> WorkerSpec:
    """A tiny family in ``folder`` with an evaluator that can go wrong in every way, and the spec of its workers."""
    tiny.make_family(folder, experts=2)
    (folder / "faults.py").write_text(EVALUATOR)
    return WorkerSpec(
        folder=str(folder),
        base={"name": "base", "path": "base", "sha256": "0" * 64},
        experts=tuple({"name": f"expert{t}", "path": f"expert{t}", "sha256": str(t + 1) * 64} for t in range(2)),
        evaluator=str(folder / "faults.py"),
        tasks={"words": {"name": "words"}, "faults": {"name": "faults"}},
        splits=dict.fromkeys((*WORDS, *FAULTS), "search"),
    )


def on_checkpoints(spec: WorkerSpec) -> WorkerSpec:
    """The same family with an evaluator that runs a program on written checkpoints, in the folder ``scratch``."""
    folder = Path(spec.folder)
    evaluator = engines.write(folder)
    splits = {f"one-{word}": "search" for word in ("alpha", "bravo")}
    tasks = {"one": {"name": "one"}}
    return dataclasses.replace(
        spec, evaluator=str(evaluator), tasks=tasks, splits=splits, scratch=str(folder / "scratch")
    )


def make_job(spec: WorkerSpec, n: int, *items: str, attempt: int = 1) -> Job:
    """Job ``n``: task arithmetic with weights of its own, on ``items`` or on all words."""
    recipe = Recipe(
        base=_source(spec.base),
        experts=tuple(_source(source) for source in spec.experts),
        method="task_arithmetic",
        groups=(Group(weights=(0.1 * n, 1.0 - 0.05 * n)),),
    )
    return Job(f"trial:{n}/search", attempt, recipe.to_dict(), items or WORDS)


BATCHES = (("words", ("alpha", "bravo")), ("words", ("carol",)), ("words", ("delta", "eager", "fable")))

SHARES = [0.25, 0.25, 0.5]


def make_gradient_job(spec: WorkerSpec, n: int, *, free: bool, batches: Sequence[Any] = BATCHES) -> Job:
    """The recipe of job ``n`` and the gradient of the entropy of the next letter, of all batches of words."""
    wanted: dict[str, Any] = {
        "loss": "entropy",
        "over": "answers",
        "learn": True,
        "free": free,
        "experts": {"words": 0},
    }
    listed = [[task, list(words)] for task, words in batches]
    return dataclasses.replace(
        make_job(spec, n), key=f"gradient:{n}", gradient={**wanted, "batches": listed, "shares": SHARES[: len(listed)]}
    )


def _source(source: Mapping[str, str]) -> Source:
    return Source(source["name"], source["path"], source["sha256"])


def collect(pool: Pool, count: int, seconds: float = 180) -> list[Result]:
    """The next ``count`` results, in the order of their keys."""
    results: list[Result] = []
    end = time.monotonic() + seconds
    while len(results) < count:
        assert time.monotonic() < end, f"{len(results)} of {count} results after {seconds} s"
        results += pool.wait(1.0)
    assert len(results) == count
    return sorted(results, key=lambda r: r.key)


def wait_for_file(path: Path, seconds: float = 180) -> str:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.05)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10) -> list[int]:
    """Those of ``pids`` that still live after ``seconds``."""
    end = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


class PoolContract:
    """What every pool does. One pool serves all tests, so each also shows that the pool survived the one before."""

    @classmethod
    def make_pool(cls, timeout: float | None = None) -> Pool:
        """A pool that is not started."""
        raise NotImplementedError

    timeout = 8.0  # seconds; of the pool that all tests share

    @pytest.fixture(scope="class")
    def spec(self, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
        return make_spec(tmp_path_factory.mktemp("pool"))

    @pytest.fixture(scope="class")
    def pool(self, spec: WorkerSpec, reference: Callable) -> Iterator[Pool]:
        reference(make_job(spec, 0))  # loops are compiled and kept, before workers' time is limited
        pool = self.make_pool(self.timeout)
        pool.start(spec)
        yield pool
        pool.close()

    @pytest.fixture(autouse=True)
    def no_traces(self, spec: WorkerSpec) -> Iterator[None]:
        yield
        for name in ("pid", "child"):
            (Path(spec.folder) / name).unlink(missing_ok=True)

    @pytest.fixture(scope="class")
    def worker(self, spec: WorkerSpec) -> Any:
        """A Worker in this process."""
        from evomerge.worker import Worker

        return Worker(spec)

    @pytest.fixture(scope="class")
    def reference(self, worker: Any) -> Callable[[Job], tuple[Outcome, ...] | None]:
        """What that gives for a job."""
        return lambda job: worker.evaluate(job).outcomes

    @pytest.fixture
    def works(self, pool: Pool, spec: WorkerSpec, reference: Callable) -> Callable[[], None]:
        """Checks that the pool gives what a Worker in this process gives."""

        def check() -> None:
            job = make_job(spec, 1)
            pool.submit(job)
            (result,) = collect(pool, 1)
            assert result.failure is None, result.failure
            assert result.outcomes == reference(job)

        return check

    def test_results_are_those_of_a_worker_in_this_process_bit_for_bit(self, pool: Pool, spec: WorkerSpec, reference):
        jobs = [make_job(spec, n) for n in range(5)]
        pending, results = list(jobs), []
        while len(results) < len(jobs):
            while pending and pool.idle():
                pool.submit(pending.pop(0))
            results += pool.wait(1.0)
        for job, result in zip(jobs, sorted(results, key=lambda r: r.key), strict=True):
            assert (result.key, result.attempt, result.failure) == (job.key, job.attempt, None)
            assert result.outcomes == reference(job)
            assert [o.item_id for o in result.outcomes or ()] == list(job.item_ids)
            assert set(result.seconds) == {"merge", "evaluate", "total"}
        assert len({str(r.outcomes) for r in results}) == len(jobs)

    def test_an_outcome_does_not_depend_on_what_ran_before(self, pool: Pool, spec: WorkerSpec):
        first = [*range(4), *range(4)]
        results: dict[int, list] = {n: [] for n in range(4)}
        for n in first:
            pool.submit(make_job(spec, n))
            (result,) = collect(pool, 1)
            results[n].append(result.outcomes)
        assert all(a is not None and a == b for a, b in results.values())

    @pytest.mark.parametrize("free", [False, True])
    def test_gradients_are_those_of_a_worker_in_this_process_bit_for_bit(self, pool, spec, worker, works, free):
        """Of one batch and of several: so the parts of a step may be split over any number of workers."""
        for n in range(2):
            for part in (BATCHES, BATCHES[:1], BATCHES[1:]):
                job = make_gradient_job(spec, n, free=free, batches=part)
                expected = worker.evaluate(job).gradients
                assert [one.task for one in expected] == [task for task, _ in part]
                assert any(expected[0].gradient)
                pool.submit(job)
                (result,) = collect(pool, 1)
                assert (result.key, result.outcomes, result.failure) == (job.key, None, None)
                assert result.gradients == expected
        works()

    @pytest.mark.parametrize(
        ("item", "kind", "reason"),
        [
            ("raise", "error", "ValueError: a deliberate mistake"),
            ("exit", "error", "sys.exit(7)"),
            ("text", "error", ""),
            ("nan", "nan", "nan"),
            ("none", "incomplete", "None"),
            ("short", "incomplete", ""),
            ("memory", "memory", "allocate"),
        ],
    )
    def test_a_failed_evaluation_says_why_and_the_next_one_works(self, pool, spec, works, item, kind, reason):
        pool.submit(make_job(spec, 1, "alpha", item))
        (result,) = collect(pool, 1)
        assert result.outcomes is None and result.failure is not None
        assert result.failure.kind == kind
        assert reason in result.failure.reason
        assert "\n" not in result.failure.reason
        works()

    def test_what_an_evaluator_prints_stays_off_the_screen(self, pool, spec, capfd):
        if getattr(pool, "inline", False):
            pytest.skip("a debugger needs the screen")
        pool.submit(make_job(spec, 2))
        collect(pool, 1)
        time.sleep(0.5)
        out, err = capfd.readouterr()
        assert "prints" not in out + err

    def test_a_pool_is_idle_until_it_has_a_job_for_every_worker(self, pool: Pool, spec: WorkerSpec):
        count = pool.idle()
        assert count >= 1
        for n in range(count):
            assert pool.idle() == count - n
            pool.submit(make_job(spec, n))
        assert pool.idle() == 0
        collect(pool, count)
        assert pool.idle() == count
        assert pool.wait(0.1) == []

    @pytest.mark.parametrize("fault", ["evaluator", "expert", "splits", "prepare"])
    def test_a_worker_that_cannot_be_built_is_the_users_error(self, spec: WorkerSpec, fault: str):
        self.check_build_error(spec, fault)

    def check_build_error(self, spec: WorkerSpec, fault: str) -> None:
        broken, error, message = {
            "evaluator": (dataclasses.replace(spec, evaluator=spec.evaluator + "x"), EvaluatorError, "faults.pyx"),
            "expert": (
                dataclasses.replace(spec, experts=({**spec.experts[0], "path": "nowhere"}, spec.experts[1])),
                CheckpointError,
                "nowhere",
            ),
            "splits": (dataclasses.replace(spec, splits={**spec.splits, "gone": "test"}), EvaluatorError, "gone"),
            "prepare": (dataclasses.replace(spec, options={"prepare": "fails"}), EvaluatorError, "no such thing"),
        }[fault]
        before = psutil.Process().children(recursive=True)
        pool = self.make_pool(self.timeout)
        with pytest.raises(error, match=message) as caught:
            pool.start(broken)
        assert type(caught.value) is error
        pool.close()
        started = [p.pid for p in psutil.Process().children(recursive=True) if p not in before]
        assert wait_until_gone(started) == []

    def test_a_recipe_of_other_sources_is_refused(self, spec: WorkerSpec):
        pool = self.make_pool(self.timeout)
        pool.start(spec)
        job = make_job(dataclasses.replace(spec, base={**spec.base, "sha256": "f" * 64}), 0)
        try:
            pool.submit(job)
            with pytest.raises(CheckpointError, match="ffffff"):
                collect(pool, 1)
        finally:
            pool.close()

    def test_an_evaluator_that_needs_a_checkpoint_gets_one(self, spec: WorkerSpec):
        from evomerge.worker import Worker

        spec = on_checkpoints(spec)
        jobs = [make_job(spec, n, *spec.splits) for n in range(2)]
        pool = self.make_pool(self.timeout)
        pool.start(spec)
        try:
            results = []
            for job in jobs:
                pool.submit(job)
                results += collect(pool, 1)
        finally:
            pool.close()
        worker = Worker(spec)
        for job, result in zip(jobs, results, strict=True):
            assert result.failure is None, result.failure
            assert result.outcomes == worker.evaluate(job).outcomes
            assert set(result.seconds) == {"merge", "evaluate", "total"}
        assert results[0].outcomes != results[1].outcomes
        assert list(Path(spec.scratch).iterdir()) == []

    def test_close_can_be_called_twice_and_before_start(self, spec: WorkerSpec):
        pool = self.make_pool(self.timeout)
        pool.close()
        pool.start(spec)
        pool.close()
        pool.close()
        with pytest.raises(RuntimeError):
            pool.submit(make_job(spec, 0))


class KillablePoolContract(PoolContract):
    """What a pool with worker processes of its own does."""

    def submit_and_wait_for_pid(self, pool: Pool, spec: WorkerSpec, item: str) -> int:
        pool.submit(make_job(spec, 3, item))
        end = time.monotonic() + 180
        path = Path(spec.folder, "pid")
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < end
            assert pool.wait(0.1) == []
        return int(path.read_text())

    says: Mapping[str, tuple[str, str]] = {}  # item -> what must be found in the failure's reason and its detail

    def check_failure(self, result: Result, item: str, kind: str) -> None:
        assert result.outcomes is None and result.failure is not None
        reason, detail = self.says.get(item, ("", ""))
        assert result.failure.kind == kind
        assert reason in result.failure.reason
        assert detail in result.failure.detail

    def test_a_worker_killed_in_the_middle_is_lost_and_replaced(self, pool: Pool, spec: WorkerSpec, works):
        pid = self.submit_and_wait_for_pid(pool, spec, "wait")
        psutil.Process(pid).kill()
        (result,) = collect(pool, 1)
        assert (result.key, result.attempt) == ("trial:3/search", 1)
        self.check_failure(result, "kill", "lost")
        works()

    @pytest.mark.parametrize("item", ["_exit", "segfault", "abort"])
    def test_an_evaluator_that_ends_its_process_is_lost(self, pool: Pool, spec: WorkerSpec, works, item: str):
        pool.submit(make_job(spec, 3, item))
        (result,) = collect(pool, 1)
        self.check_failure(result, item, "lost")
        works()

    @pytest.mark.parametrize("item", ["hang", "hang in C"])
    def test_an_evaluation_is_killed_at_the_time_limit(self, pool: Pool, spec: WorkerSpec, works, item: str):
        pid = self.submit_and_wait_for_pid(pool, spec, item)
        began = time.monotonic()
        (result,) = collect(pool, 1)
        assert time.monotonic() - began < self.timeout + 5
        self.check_failure(result, item, "timeout")
        assert result.failure is not None and f"{self.timeout:g} s" in result.failure.reason
        works()
        assert wait_until_gone([pid]) == []

    def test_at_the_time_limit_a_program_ends_and_its_checkpoint_goes(self, spec: WorkerSpec):
        spec = on_checkpoints(spec)
        job, mode, pids = make_job(spec, 1, *spec.splits), Path(spec.folder, "mode"), Path(spec.folder, "pids")
        pool = self.make_pool(self.timeout)
        pool.start(spec)
        try:
            mode.write_text("hang")
            pool.submit(job)
            (result,) = collect(pool, 1)
            assert result.failure is not None and result.failure.kind == "timeout"
            assert wait_until_gone([*map(int, pids.read_text().split())]) == []
            mode.unlink()
            pool.submit(job)
            (result,) = collect(pool, 1)
            assert result.failure is None, result.failure
        finally:
            mode.unlink(missing_ok=True)
            pids.unlink(missing_ok=True)
            pool.close()
        # A pool may kill without waiting for the death: what that leaves is known as stale once the process has gone.
        end = time.monotonic() + 30
        while list(Path(spec.scratch).iterdir()) and time.monotonic() < end:
            time.sleep(0.2)
            remove_stale(spec.scratch)
        assert list(Path(spec.scratch).iterdir()) == []

    def test_a_worker_that_dies_whenever_it_is_built_ends_the_run(self, spec: WorkerSpec):
        from evomerge.errors import ResourceError

        pool = self.make_pool(self.timeout)
        with pytest.raises(ResourceError, match="in a row"):
            pool.start(dataclasses.replace(spec, options={"prepare": "dies"}))

    def test_close_leaves_no_process_behind_even_in_the_middle_of_a_job(self, spec: WorkerSpec):
        before = psutil.Process().children(recursive=True)
        pool = self.make_pool(self.timeout)
        pool.start(spec)
        self.submit_and_wait_for_pid(pool, spec, "wait")
        child = int(wait_for_file(Path(spec.folder, "child")))
        started = [p.pid for p in psutil.Process().children(recursive=True) if p not in before]
        assert child in started
        pool.close()
        assert wait_until_gone(started) == []
