"""Where workers run: the Pool protocol and LocalPool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from evomerge.evaluation import Outcome


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker builds itself from: paths and plain data, never weights or live objects."""

    folder: str  # of the experiment file, absolute
    base: Mapping[str, str]  # name, path, sha256 (as recipe.Source)
    experts: tuple[Mapping[str, str], ...]
    evaluator: str  # path.py or path.py@name, absolute
    tasks: Mapping[str, Mapping[str, Any]]  # name -> TaskSpec as a dict
    options: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)  # item id -> split
    batch_size: int = 32
    seed: int = 0
    export_dtype: str = "bfloat16"
    compute_dtype: str = "float32"
    device: str = "cpu"  # cpu, cuda, or cuda:N
    threads: int = 1
    fixed_params: Mapping[str, Any] = field(default_factory=dict)  # method parameters that no candidate changes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WorkerSpec:
        return cls(**{**data, "experts": tuple(data["experts"])})


@dataclass(frozen=True)
class Job:
    """One evaluation: a recipe on some items. ``key`` names it in the study (``trial:12/search``)."""

    key: str
    attempt: int
    recipe: Mapping[str, Any]  # Recipe.to_dict()
    item_ids: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """Why there is no result. kind: error, nan, timeout, memory, lost, incomplete (see CandidateError)."""

    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Result:
    """What came back for a job: outcomes in the order of its item_ids, or a failure; never both."""

    key: str
    attempt: int
    outcomes: tuple[Outcome, ...] | None
    failure: Failure | None
    seconds: Mapping[str, float] = field(default_factory=dict)  # merge, evaluate, total
    worker: str = ""  # host:pid


class Pool(Protocol):
    """A fixed number of workers that evaluate jobs."""

    def start(self, spec: WorkerSpec) -> None:
        """Build the workers; returns when at least one is ready. Raises UserError (ResourceError, ...) if it cannot be."""
        ...

    def idle(self) -> int:
        """How many more jobs can start at once."""
        ...

    def submit(self, job: Job) -> None:
        """Start ``job`` on an idle worker."""
        ...

    def wait(self, seconds: float) -> list[Result]:
        """Results that have come in; waits up to ``seconds`` for the first. A worker that dies or passes the time limit
        is replaced, and its job comes back as a Failure of kind ``lost`` or ``timeout``. Retrying is the study's affair."""
        ...

    def close(self) -> None:
        """End all workers, dropping what runs. May be called twice. Leaves no process behind."""
        ...
