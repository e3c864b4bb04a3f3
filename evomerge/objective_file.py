"""An experiment's `objective` as it is written: the model of its YAML, and all that can be checked without scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from evomerge.errors import SpecError, nearest
from evomerge.validation import Strict, at, short

WORDS = ("mean", "min")


class ConstraintSpec(Strict):
    """What no winner may miss."""

    model_config = ConfigDict(title="constraint")

    task: str = Field(description="the task whose score is meant, or all: each of them")
    at_least: float = Field(description="a score; with `of`, a share of another's score, such as 0.95")
    of: Literal["base", "expert", "best_expert"] | None = Field(
        default=None,
        description="whose score `at_least` is a share of. base; expert: the task's own; best_expert: the best of all "
        "at the task. null: of nobody's, at_least is the score itself",
    )

    @model_validator(mode="after")
    def _share(self) -> ConstraintSpec:
        if self.of is not None and not 0 < self.at_least <= 10:
            raise PydanticCustomError(
                "share",
                "at_least must be a share above 0 and at most 10 where `of` is given, but is {value}",
                {"value": f"{self.at_least:g}", "remedy": "Write 0.95 for 95%. Without `of` it is a score."},
            )
        return self


class PenaltySpec(Strict):
    """What the searcher is told less for large weights."""

    model_config = ConfigDict(title="penalty")

    l1: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="what is taken off for each unit of the weights' sizes, summed over the experts; an expert whose "
        "weights differ between parts of the model counts with their mean size",
    )


def _one_or_more(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError(
            "of",
            "of must be mean, min, a task's name, or a list of these, but is {value}",
            {"value": short(value), "remedy": ""},
        )
    twice = [name for name, count in Counter(value).items() if count > 1]
    if twice:
        raise PydanticCustomError("of", "of names {name} twice", {"name": repr(twice[0]), "remedy": "Name it once."})
    return value


class ObjectiveSpec(Strict):
    """How the tasks' scores become what the search maximises, and what no winner may miss."""

    model_config = ConfigDict(title="objective")

    of: Annotated[
        list[str],
        BeforeValidator(_one_or_more),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ] = Field(
        default=["mean"],
        description="mean: the tasks' mean by their weights; min: the lowest; or a task's name. A list of these: "
        "several objectives",
    )
    normalize: Literal["none", "expert"] = Field(
        default="none", description="expert: each task's score is taken relative to its own expert's score on search"
    )
    experts: dict[str, str] = Field(
        default_factory=dict, description="task: its own expert, where the two have different names"
    )
    constraints: list[ConstraintSpec] = Field(default_factory=list, description="what no winner may miss")
    penalty: PenaltySpec | None = Field(
        default=None,
        description="what the searcher is told less for large weights; finalists and winner are chosen by their scores",
    )

    @field_serializer("of")
    def _written(self, of: list[str]) -> Any:
        return of[0] if len(of) == 1 else of

    def short(self) -> Any:
        """Plain data: one word where nothing else is said."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return self.of[0] if set(data) <= {"of"} and len(self.of) == 1 else {"of": self._written(self.of), **data}

    def check(self, tasks: Sequence[str], experts: Sequence[str], where: str, *, learned: bool = False) -> None:
        """SpecError, naming the key below ``where``, unless all that is named is there.

        Args:
            learned: the search or surgery learns from the tasks' own experts, so that ``experts`` is for it, too.
        """
        for name in self.of:
            if name not in WORDS and name not in tasks:
                raise SpecError(
                    f"of is {name!r}, which is neither {' nor '.join(WORDS)} nor a task",
                    where=at(where, "of"),
                    remedy=nearest(name, [*WORDS, *tasks]),
                )
        for number, constraint in enumerate(self.constraints):
            if constraint.task != "all" and constraint.task not in tasks:
                raise SpecError(
                    f"there is no task {constraint.task!r}",
                    where=at(where, f"constraints[{number}].task"),
                    remedy=nearest(constraint.task, ["all", *tasks]),
                )
        for task, expert in self.experts.items():
            for name, known, kind in ((task, tasks, "task"), (expert, experts, "expert")):
                if name not in known:
                    raise SpecError(
                        f"there is no {kind} {name!r}", where=at(where, f"experts.{task}"), remedy=nearest(name, known)
                    )
        needed = self.tasks_with_experts(tasks)
        for task in needed:
            if self.own_expert(task) not in experts:
                raise SpecError(
                    f"task {task!r} has no expert of its own: none is called like it",
                    where=at(where, "experts"),
                    remedy=f"Write `experts: {{{task}: EXPERT}}`, with one of {', '.join(sorted(experts))}.",
                )
        for task in self.experts:
            if task not in needed and not learned:
                raise SpecError(
                    f"nothing here looks at the expert of task {task!r}",
                    where=at(where, f"experts.{task}"),
                    remedy="Add `normalize: expert` or a constraint `of: expert`, or leave it out.",
                )

    def own_expert(self, task: str) -> str:
        return self.experts.get(task, task)

    def tasks_in(self, name: str, tasks: Sequence[str]) -> list[str]:
        """The tasks that an objective of this name, or a constraint's ``task``, is about."""
        return list(tasks) if name in (*WORDS, "all") else [name]

    def tasks_with_experts(self, tasks: Sequence[str]) -> list[str]:
        """The tasks whose own expert's score is needed."""
        names = list(self.of) if self.normalize == "expert" else []
        wanted = {task for name in names for task in self.tasks_in(name, tasks)}
        for constraint in self.constraints:
            if constraint.of == "expert":
                wanted |= set(list(tasks) if constraint.task == "all" else [constraint.task])
        return [task for task in tasks if task in wanted]


def read_objective(value: Any) -> Any:
    """``objective: mean`` and ``objective: min`` are short for ``objective: {of: ...}``."""
    if isinstance(value, str):
        if value not in WORDS:
            raise PydanticCustomError(
                "objective",
                "objective is {value}, which is not one of {words}",
                {
                    "value": short(value),
                    "words": ", ".join(WORDS),
                    "remedy": f"{nearest(value, WORDS)} One task alone is `objective: {{of: TASK}}`.",
                },
            )
        return {"of": value}
    return value
