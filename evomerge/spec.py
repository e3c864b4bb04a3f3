"""The experiment file: load and validate. Errors name the file, the key, the value, the rule and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    field_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from evomerge import installed
from evomerge.errors import SpecError, nearest
from evomerge.evaluation import TaskSpec
from evomerge.hub import hub_id
from evomerge.objective_file import WORDS, ObjectiveSpec, read_objective
from evomerge.plugins import EVALUATOR, METHOD, SEARCHER, Kind, names_file, split_reference
from evomerge.recipe import is_recipe_file
from evomerge.space_file import SpaceModel, check_space
from evomerge.tokenizer_choice import Choice, TokenizerChoice
from evomerge.validation import Strict, at, plain_mapping, read_yaml, short, validate

Dtype = Literal["bfloat16", "float16", "float32"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: Any, *, where: str | None = None) -> float:
    """Seconds in ``text``: ``90s``, ``30m``, ``6h``, ``2d``, ``1h30m``, ``1.5h``.

    Raises:
        SpecError: not a duration, or not above zero.
    """
    match = _DURATION.fullmatch(text.strip()) if isinstance(text, str) else None
    parts = match.groups() if match else ()
    seconds = sum(float(n) * unit for n, unit in zip(parts, (86400, 3600, 60, 1), strict=False) if n)
    if seconds <= 0:
        raise SpecError(
            f"a duration above zero is a number with a unit, but this is {short(text)}",
            where=where,
            remedy="Write it like 90s, 30m, 6h or 1h30m.",
        )
    return seconds


def resolve_file(name: str, folder: Path, kind: Literal["search_spaces", "evaluators"]) -> Path:
    """The file called ``name``: beside the experiment file (in ``folder``) first, then among those shipped.

    A shipped file is named with its folder or without: ``search_spaces/task.yaml`` or ``task.yaml``.

    Raises:
        SpecError: there is none; names the places that were looked at, and the nearest shipped one.
    """
    wanted = Path(name).expanduser()
    ours = shipped(kind)
    inner = Path(*wanted.parts[1:]) if wanted.parts[:1] == (kind,) else wanted
    places = [folder / wanted] if wanted.is_absolute() else [folder / wanted, ours / inner]
    for place in places:
        if place.is_file() and (place == places[0] or place.resolve().is_relative_to(ours.resolve())):
            return place.resolve()
    known = _shipped_names(kind)
    raise SpecError(
        f"there is no file {name!r}; looked for {' and '.join(str(p.resolve()) for p in places)}",
        remedy=nearest(f"{kind}/{wanted.name}", known) if known else "Check the path.",
    )


def _shipped_names(kind: Literal["search_spaces", "evaluators"]) -> list[str]:
    suffix = "*.yaml" if kind == "search_spaces" else "*.py"
    return [f"{kind}/{path.name}" for path in shipped(kind).glob(suffix)]


def shipped(kind: str) -> Path:
    """The folder of what comes with evomerge: search_spaces, evaluators or experiments."""
    package = Path(__file__).resolve().parent
    data = package / "_data"  # in a wheel; a checkout has the folders beside the package
    return (data if data.is_dir() else package.parent) / kind


def _check_name(value: Any) -> Any:
    if isinstance(value, str) and not (NAME.fullmatch(value) and len(value) <= 100):
        raise PydanticCustomError(
            "name",
            "a name is letters, digits, '_', '-' and '.', does not begin with '-' or '.', and has at most 100 of them, "
            "but this is {value}",
            {"value": short(value), "remedy": "Rename it: it becomes part of file names and labels."},
        )
    return value


def _check_expert_names(value: Any) -> Any:
    if isinstance(value, Mapping):
        for name in value:
            _check_name(name)
            if name == "base":
                raise PydanticCustomError(
                    "name", "an expert cannot be called 'base'", {"remedy": "Give it the name of its skill."}
                )
    return value


def _check_time(value: Any) -> Any:
    if value is not None:
        try:
            parse_duration(value)
        except SpecError as error:
            raise PydanticCustomError(
                "duration", "{problem}", {"problem": error.problem, "remedy": error.remedy}
            ) from None
    return value


def _seconds(value: Any) -> Any:
    """A number of seconds, or a duration."""
    if isinstance(value, str):
        _check_time(value)
        return parse_duration(value)
    return value


def _check_storage(value: Any) -> Any:
    if isinstance(value, str) and "://" not in value:
        raise PydanticCustomError(
            "storage",
            "storage must be a database URL, but is {value}",
            {
                "value": short(value),
                "remedy": "Write sqlite:///PATH.db or postgresql+psycopg://...; journal files are not supported, "
                "because a torn line makes them unreadable.",
            },
        )
    return value


def _null_is_empty(value: Any) -> Any:
    """``task:`` with nothing after it stands for a task with all defaults."""
    return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, Mapping) else value


class _Open(BaseModel):
    """Keys beyond the model's own are options for somebody else; a misspelt key of its own is still refused."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the model's own."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _refuse_misspelt(self) -> _Open:
        known = [field.alias or name for name, field in type(self).model_fields.items()]
        for key in self.model_extra or {}:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if close or key == "options":
                raise PydanticCustomError(
                    "extra",
                    "there is no key {key} here",
                    {
                        "key": repr(key),
                        "remedy": nearest(key, known) if close else "Write the options beside the other keys.",
                    },
                )
        return self


class StartSpec(Strict):
    """A merge to begin with."""

    model_config = ConfigDict(title="start")

    trial: str | None = Field(
        default=None,
        alias="from",
        description="STUDY:TRIAL of another study: an experiment file or a name in this storage; a number, or best",
    )
    recipe: str | None = Field(default=None, description="a recipe file, or a mergekit configuration")
    control: str | None = Field(
        default=None,
        description="average, expert:NAME, base, or task_arithmetic (at the best single weight of the sweep)",
    )

    @model_validator(mode="after")
    def _one(self) -> StartSpec:
        if sum(value is not None for value in (self.trial, self.recipe, self.control)) != 1:
            raise PydanticCustomError(
                "start", "exactly one of from, recipe and control must be given", {"remedy": "Make it two entries."}
            )
        return self


class SearchSpec(_Open):
    """Which searcher, how long, and its own options."""

    model_config = ConfigDict(title="search")

    method: str = Field(
        description="the searcher: cma, tpe, gp, nsga2, coordinate, soup, random, sobol, grid, adamerging, adarank, "
        "columns, concrete, hybrid, or your own file.py@name"
    )
    budget: int = Field(default=60, ge=1, description="how many candidates to evaluate; controls are not counted")
    time: Annotated[str | None, BeforeValidator(_check_time)] = Field(
        default=None, description="propose no candidate after this long, such as 90s, 30m, 6h or 1h30m"
    )
    schedule: Literal["reproducible", "asynchronous"] = Field(
        default="reproducible",
        description="reproducible: the same seed gives the same study on any number of workers; asynchronous: scores "
        "are used in the order of arrival, for large clusters with uneven durations",
    )

    initial: list[StartSpec] = Field(
        default_factory=list,
        description="merges that the search begins with, in place of the space's initial point; each as the nearest "
        "point of the space",
    )

    @property
    def seconds(self) -> float | None:
        """``time`` in seconds."""
        return None if self.time is None else parse_duration(self.time)


class TaskEntry(_Open):
    """One task: its weight, its metric, and options that the evaluator knows."""

    model_config = ConfigDict(title="task")

    weight: float = Field(default=1.0, gt=0, description="how much the task counts in the mean")
    metric: str | None = Field(
        default=None, description="the metric that counts; by default the evaluator's own choice"
    )


class SurgerySpec(Strict):
    """Adapters behind the winner and the best control (representation surgery)."""

    model_config = ConfigDict(title="surgery")

    rank: int = Field(default=16, ge=1, description="hidden width of an adapter: 2 x rank x width parameters a task")
    steps: int = Field(default=1000, ge=1, description="steps of Adam for each task")
    lr: float = Field(default=0.001, gt=0, description="Adam's step size")
    batch: int = Field(default=16, ge=1, description="search items of the task in a step")


class FinishSpec(Strict):
    """The closing stage of a study."""

    model_config = ConfigDict(title="finish")

    top: int = Field(default=5, ge=1, description="how many of the best candidates are evaluated on the select items")
    sweep: list[float] | None = Field(
        default=None,
        min_length=1,
        description="weights at which task arithmetic is tried as a control; null: the usual",
    )


class EvaluateSpec(_Open):
    """What candidates are evaluated on."""

    model_config = ConfigDict(title="evaluate")

    evaluator: str = Field(
        alias="with",
        min_length=1,
        description="the evaluator: file.py or file.py@name, beside the experiment file or among those shipped; or the "
        "name of one that an installed package offers",
    )
    tasks: Annotated[dict[str, TaskEntry], BeforeValidator(_null_is_empty)] = Field(
        min_length=1, description="tasks by name; each may have a weight, a metric and options of the evaluator"
    )
    split: dict[str, Annotated[Any, WithJsonSchema({"type": ["number", "string"]})]] = Field(
        min_length=1,
        description="which items are for search, select and test: numbers of items a task, shares, or the names of the "
        "task's own splits",
    )
    batch_size: int = Field(default=32, ge=1, description="requests in a batch; part of what makes scores exact")
    finish: FinishSpec = Field(default=FinishSpec(), description="the closing stage of the study")


class WorkersSpec(Strict):
    """How many workers there are and what each one gets."""

    model_config = ConfigDict(title="workers")

    count: int = Field(default=1, ge=1, description="how many workers evaluate at the same time")
    gpus: float = Field(default=0.0, ge=0, description="GPUs a worker; a fraction shares one GPU between workers")
    cpus: float = Field(default=1.0, gt=0, description="CPUs a worker, as Ray counts them")
    threads: int = Field(default=1, ge=1, description="torch threads a worker; part of what makes scores exact")
    timeout: Annotated[
        float | None,
        BeforeValidator(_seconds),
        WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}, {"type": "null"}]}),
    ] = Field(default=None, gt=0, description="longest time for one evaluation, in seconds or like 10m; null: no limit")
    retries: int = Field(default=2, ge=0, description="how often an evaluation that lost its worker is tried again")
    device: Literal["cpu", "cuda", "auto"] = Field(
        default="auto", description="where models run; auto: cuda where a worker has a GPU, else cpu"
    )
    sources: Literal["mmap", "pinned", "device", "auto"] = Field(
        default="mmap",
        description="where each worker keeps base and experts: mmap (the files, shared by all), pinned (a copy in "
        "page-locked memory), device (a copy where it merges), or auto",
    )
    scratch: str | None = Field(
        default=None,
        min_length=1,
        description="where candidates are written for an evaluator that needs a checkpoint on disk, relative to the "
        "experiment file; null: the system's temporary folder",
    )
    address: str | None = Field(
        default=None, min_length=1, description="of a Ray cluster: auto or ray://HOST:PORT; null: this machine"
    )


class Spec(Strict):
    """An experiment: everything that a study is made from.

    ``base``, ``experts`` and the evaluator stand as they were written; ``base_path``, ``expert_paths`` and
    ``resolve_file`` give absolute paths. ``space`` is the plain data of the space, already read if a file was named.
    """

    model_config = ConfigDict(title="evomerge experiment")

    name: Annotated[str, BeforeValidator(_check_name)] = Field(description="the study's name in its storage")
    base: str = Field(
        min_length=1,
        description="the base model: a folder relative to the experiment file, a Hugging Face id, or a recipe file "
        "that makes it",
    )
    experts: Annotated[dict[str, str], BeforeValidator(_check_expert_names)] = Field(
        min_length=1,
        description="experts by name: folders or ids of fine-tuned models or LoRA adapters of the base, or recipe "
        "files",
    )
    tokenizer: Choice | None = Field(
        default=None,
        description="whose tokens the merges have, where experts added some: union, base, an expert's name, or keys; "
        "null: all experts have the base's",
    )
    space: dict[str, Any] = Field(description="the search space: a file, or written here")
    search: SearchSpec = Field(description="which searcher, how long, and its own options")
    evaluate: EvaluateSpec = Field(description="what candidates are evaluated on")
    surgery: SurgerySpec | None = Field(
        default=None,
        description="adapters on each task's features, trained for the winner and the best control and scored beside "
        "them; {} for the defaults, null: none",
    )
    objective: Annotated[ObjectiveSpec, BeforeValidator(read_objective)] = Field(
        default=ObjectiveSpec(),
        description="what the search maximises: mean, the tasks' mean by their weights; min, the lowest; or keys",
    )
    workers: WorkersSpec = Field(default=WorkersSpec(), description="how many workers, and what each one gets")
    export_dtype: Dtype = Field(
        default="bfloat16", description="what merged weights are rounded to, in search and export"
    )
    compute_dtype: Dtype = Field(default="float32", description="what the workers compute in")
    statistics: str | None = Field(
        default=None,
        min_length=1,
        description="the folder of what `evomerge collect` measured of the experts, for methods that are weighted by "
        "data, relative to this file; collect writes there, too",
    )
    seed: int = Field(default=0, ge=0, description="all random draws of the study derive from it")
    storage: Annotated[str | None, BeforeValidator(_check_storage)] = Field(
        default=None, description="database URL of the study; null: evomerge.db beside the experiment file"
    )

    _folder: Path = PrivateAttr(default=Path())
    _path: Path | None = PrivateAttr(default=None)
    _space_file: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """Absolute; relative paths in the experiment start here."""
        return self._folder

    @property
    def path(self) -> Path | None:
        """The experiment file, as it was given; None for a spec made from data."""
        return self._path

    @property
    def space_file(self) -> Path | None:
        """The file that the space was read from, absolute; None if it stands in the experiment."""
        return self._space_file

    @property
    def code_folder(self) -> Path | None:
        """Where methods by path are that the space names; None if it stands in a file, which can make nothing run."""
        return None if self._space_file else self._folder

    @property
    def space_where(self) -> str:
        """What errors about the space name as its place."""
        return str(self._space_file) if self._space_file else at(_label(self._path), "space")

    @property
    def base_path(self) -> Path:
        """The base's folder, absolute. Where there is none, ``base`` is a Hugging Face id."""
        return _absolute(self.base, self.folder)

    @property
    def expert_paths(self) -> dict[str, Path]:
        """Expert -> its folder, absolute. Where there is none, it is a Hugging Face id."""
        return {name: _absolute(path, self.folder) for name, path in self.experts.items()}

    @property
    def scratch_path(self) -> Path | None:
        """``workers.scratch``, absolute; None for the temporary folder of whatever machine a worker runs on."""
        return None if self.workers.scratch is None else _absolute(self.workers.scratch, self.folder)

    @property
    def statistics_path(self) -> Path | None:
        """``statistics``, absolute."""
        return None if self.statistics is None else _absolute(self.statistics, self.folder)

    def task_specs(self) -> dict[str, TaskSpec]:
        """The tasks as evaluators see them."""
        return {
            name: TaskSpec(name=name, weight=task.weight, metric=task.metric, options=task.options)
            for name, task in self.evaluate.tasks.items()
        }

    @field_serializer("tokenizer")
    def _short_tokenizer(self, tokenizer: TokenizerChoice | None) -> Any:
        return None if tokenizer is None else tokenizer.short()

    @field_serializer("objective")
    def _short_objective(self, objective: ObjectiveSpec) -> Any:
        return objective.short()

    def to_dict(self) -> dict[str, Any]:
        """Plain (JSON) data with all defaults filled in and the space inline; ``from_dict`` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], folder: str | Path, *, path: str | Path | None = None, check_files: bool = True
    ) -> Spec:
        """The spec that ``data`` describes, checked against methods, searchers and (unless told otherwise) files.

        Args:
            data: as in an experiment file.
            folder: relative paths start here.
            path: the file that ``data`` was read from, for errors.
            check_files: False to look at a study whose models are not here.

        Raises:
            SpecError: any rule is broken.
        """
        folder = Path(folder).resolve()
        path = Path(path) if path is not None else None
        where = _label(path)
        data = plain_mapping(data, where=where, what="an experiment")
        space_file = None
        if isinstance(data.get("space"), str):
            try:
                space_file = resolve_file(data["space"], folder, "search_spaces")
            except SpecError as error:
                raise SpecError(error.problem, where=at(where, "space"), remedy=error.remedy) from None
            space = read_yaml(space_file, what="a search space")
            data["space"] = plain_mapping(space, where=str(space_file), what="a search space")
        spec = validate(cls, data, where=where)
        spec._folder, spec._path, spec._space_file = folder, path, space_file
        _check_search(spec, where)
        if spec.tokenizer is not None:
            spec.tokenizer.check(list(spec.experts), where=at(where, "tokenizer"))
        from evomerge.searchers.adamerging import may_look_at_experts

        learned = may_look_at_experts(spec.search.options.get("loss")) or spec.surgery is not None
        where_objective = at(where, "objective")
        spec.objective.check(list(spec.evaluate.tasks), list(spec.experts), where=where_objective, learned=learned)
        check_space(spec.space, list(spec.experts), where=spec.space_where, folder=spec.code_folder)
        if check_files:
            _check_files(spec, where)
        return spec


def load_spec(path: str | Path, *, check_files: bool = True) -> Spec:
    """The experiment in a YAML file; see ``Spec.from_dict``.

    Raises:
        SpecError: there is no such file, it is not YAML, or any rule is broken.
    """
    path = Path(path)
    if path.is_dir() and (path / "experiment.yaml").is_file():
        path = path / "experiment.yaml"
    data = read_yaml(path, what="an experiment file")
    return Spec.from_dict(data, path.resolve().parent, path=path, check_files=check_files)


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of experiment files, with the methods, searchers and options there are."""
    from evomerge.methods import METHODS
    from evomerge.searchers import SEARCHERS

    schema = Spec.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    space = SpaceModel.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(space.pop("$defs"))
    definitions["SpaceModel"] = space
    ways = space["properties"]["method"]["anyOf"] = [
        kind for kind in space["properties"]["method"]["anyOf"] if kind.get("type") != "null"
    ]
    (name,) = [kind for kind in ways if kind.get("type") == "string"]
    name["anyOf"] = _names(METHODS, METHOD)
    schema["properties"]["space"] = {
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/SpaceModel"}],
        "description": schema["properties"]["space"]["description"],
    }
    schema["properties"]["tokenizer"]["anyOf"].append({"type": "string"})
    objective = schema["properties"]["objective"]
    schema["properties"]["objective"] = {
        "anyOf": [{"type": "string", "enum": list(WORDS)}, {"$ref": "#/$defs/ObjectiveSpec"}],
        "default": "mean",
        "description": objective["description"],
    }
    task = definitions["EvaluateSpec"]["properties"]["tasks"]["additionalProperties"]
    definitions["EvaluateSpec"]["properties"]["tasks"]["additionalProperties"] = {"anyOf": [task, {"type": "null"}]}
    search = definitions["SearchSpec"]
    search["properties"]["method"]["anyOf"] = _names(SEARCHERS, SEARCHER)
    for name, searcher in SEARCHERS.items():
        for key, param in searcher.params.items():
            kind = {int: "integer", float: "number", bool: "boolean"}.get(param.type, "string")
            option = search["properties"].setdefault(key, {"type": kind, "description": ""})
            option["description"] = f"{option['description']} {name}: {param.meaning} {param.range_text()}.".strip()
    # The options of a searcher that is a plug-in are not known here.
    own = {"properties": {"method": {"enum": sorted(SEARCHERS)}}}
    search |= {"if": own, "then": {"propertyNames": {"enum": sorted(search["properties"])}}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _names(own: Iterable[str], kind: Kind) -> list[dict[str, Any]]:
    """What a plug-in's name may be: evomerge's own, an installed package's, or in a file."""
    return [{"enum": sorted({*own, *installed.names(kind)})}, {"pattern": r"\.py(@\w+)?$"}]


def _label(path: Path | None) -> str:
    return str(path) if path else "experiment"


def _absolute(name: str, folder: Path) -> Path:
    return (folder / Path(name).expanduser()).resolve()


def _check_search(spec: Spec, where: str) -> None:
    from evomerge.searchers.base import check_options
    from evomerge.searchers.lookup import find

    method, options = spec.search.method, spec.search.options
    try:
        params = find(method, spec.folder).searcher.params
    except SpecError as error:
        place = at(where, "search.method") + (f": {error.where}" if error.where else "")
        raise SpecError(error.problem, where=place, remedy=error.remedy) from error
    own = list(SearchSpec.model_fields)
    for key, value in options.items():
        place = at(where, f"search.{key}")
        if key not in params:
            raise SpecError(
                f"there is no key {key!r} here, and searcher {method} has no such option",
                where=place,
                remedy=nearest(key, [*own, *params]),
            )
        try:
            check_options(method, params, {key: value})
        except SpecError as error:
            raise SpecError(
                error.problem, where=place, remedy=error.remedy or f"{key}: {params[key].meaning}."
            ) from None


def _check_files(spec: Spec, where: str) -> None:
    for key, name in [("base", spec.base), *((f"experts.{e}", p) for e, p in spec.experts.items())]:
        folder = _absolute(name, spec.folder)
        if folder.is_dir() or (is_recipe_file(name) and folder.is_file()):
            continue
        if folder.exists():
            problem = f"{name!r} must be a folder, but {folder} is a file"
        elif hub_id(name):
            continue  # fetched when a plan is made: not to look at a study
        else:
            problem = f"there is no folder {name!r} ({folder})"
        raise SpecError(
            problem,
            where=at(where, key),
            remedy="Give the folder, relative to the experiment file, or a Hugging Face id as org/name@revision.",
        )
    resolve_evaluator(spec, where)


def resolve_evaluator(spec: Spec, where: str | None = None) -> str:
    """The evaluator's file as an absolute path, with ``@name`` kept; or the name of an installed package's evaluator.

    Raises:
        SpecError: there is no such file, and no package offers that name.
    """
    name, key = spec.evaluate.evaluator, at(where or _label(spec.path), "evaluate.with")
    if names_file(name):
        file, inner = split_reference(name)
        try:
            found = resolve_file(file, spec.folder, "evaluators")
        except SpecError as error:
            raise SpecError(error.problem, where=key, remedy=error.remedy) from None
        return f"{found}@{inner}" if inner else str(found)
    others = installed.names(EVALUATOR)
    if name not in others:
        raise SpecError(
            f"no installed package offers an evaluator {name!r}, and a file's name ends in .py",
            where=key,
            remedy="Write file.py, or file.py@name for one function or class in it. "
            + nearest(name, [*others, *_shipped_names("evaluators")]),
        )
    return name
