"""A search space as it is written: the model of its YAML, and all that can be checked without the checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from evomerge.dimensions import Dimension
from evomerge.errors import MethodError, SpecError, UserError, nearest
from evomerge.params import Param
from evomerge.parts import REST
from evomerge.space_parts import FilterModel, PartModel, Section, sections
from evomerge.validation import Strict, at, short, validate

if TYPE_CHECKING:
    from evomerge.methods.base import Method
    from evomerge.methods.lookup import Found

GROUPED = ("layer_groups", "layer_module")
Granularity = Literal["global", "task", "layer_groups", "layer", "module", "layer_module", "tensor"]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_range(value: Any) -> list[float]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(_number, value))):
        raise PydanticCustomError(
            "range", "range must be two numbers [low, high], but is {value}", {"value": short(value), "remedy": ""}
        )
    low, high = float(value[0]), float(value[1])
    if not low < high:
        raise PydanticCustomError(
            "range",
            "low < high must hold, but low is {low} and high is {high}",
            {"low": f"{low:g}", "high": f"{high:g}", "remedy": "Swap them." if low > high else "Widen the range."},
        )
    return [low, high]


def _check_initial(value: Any) -> Any:
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    if value is not None and not (numbers and all(map(_number, numbers))):
        raise PydanticCustomError(
            "initial",
            "initial must be a number, or one number for each expert, but is {value}",
            {"value": short(value), "remedy": ""},
        )
    return value


Range = Annotated[list[float], BeforeValidator(_check_range)]


class WeightsModel(Strict):
    """Which weights may move, between which bounds, from where."""

    model_config = ConfigDict(title="weights")

    granularity: Granularity = Field(
        description="what has a weight of its own. global: all experts together; task: each expert; layer_groups: each "
        "expert in each group of consecutive layers; layer: in each layer; module: in each kind of module (attention, "
        "mlp, norm, embedding, head); layer_module: in each kind of module of each layer or group of layers; tensor: "
        "in each tensor"
    )
    groups: int | None = Field(
        default=None,
        ge=1,
        description="how many groups of consecutive layers: for granularity layer_groups, and for layer_module (where "
        "every layer is a group by default)",
    )
    range: Range = Field(
        description="[low, high]: the lowest and the highest weight that the search may try", min_length=2, max_length=2
    )
    log: bool = Field(default=False, description="search the range by factors; low must be above 0")
    initial: Annotated[float | dict[str, float] | None, BeforeValidator(_check_initial)] = Field(
        default=None,
        description="the weight that the search starts from, one for all or a mapping expert: weight; by default the "
        "method's own",
    )
    fixed: dict[str, float] = Field(
        default_factory=dict,
        description="weights that do not move: of an expert (add: 1.0), or of one dimension (add[0-4]: 0.5)",
    )
    tied: list[list[str]] = Field(
        default_factory=list, description="lists of experts that share their weights, such as [[add, sort]]"
    )

    @model_validator(mode="after")
    def _groups_where_they_belong(self) -> WeightsModel:
        if self.granularity == "layer_groups" and self.groups is None:
            raise PydanticCustomError(
                "groups",
                "granularity layer_groups needs the number of groups",
                {"remedy": "Add, for example, groups: 6."},
            )
        if self.granularity not in GROUPED and self.groups is not None:
            raise PydanticCustomError(
                "groups",
                "groups is {groups}, but granularity {granularity} has no groups",
                {
                    "groups": self.groups,
                    "granularity": self.granularity,
                    "remedy": "Remove groups, or set granularity: layer_groups.",
                },
            )
        if self.log and self.range[0] <= 0:
            raise PydanticCustomError(
                "log",
                "a range that is searched by factors lies above 0, but its low is {low}",
                {"low": f"{self.range[0]:g}", "remedy": "Raise low, or leave log out."},
            )
        if self.granularity == "global" and (self.tied or self.fixed):
            raise PydanticCustomError(
                "granularity",
                "granularity global has one weight for all experts, so that none can be fixed or tied",
                {"remedy": "Use granularity: task."},
            )
        return self


class MovingModel(Strict):
    """A parameter, or the method, as a dimension."""

    model_config = ConfigDict(title="moving")

    range: Annotated[Range | None, Field(min_length=2, max_length=2)] = Field(
        default=None, description="[low, high] of a number; of a whole-number parameter, whole numbers"
    )
    choices: list[Any] | None = Field(default=None, min_length=2, description="the values to choose from")
    initial: Any = Field(default=None, description="where the search starts; by default the parameter's own default")
    log: bool = Field(default=False, description="search the range by factors; low must be above 0")

    @model_validator(mode="after")
    def _one_kind(self) -> MovingModel:
        if (self.range is None) == (self.choices is None):
            raise PydanticCustomError("moving", "exactly one of range and choices must be given", {"remedy": ""})
        if self.log and (self.range is None or self.range[0] <= 0):
            raise PydanticCustomError(
                "log", "log needs a range above 0", {"remedy": "Raise its low, or leave log out."}
            )
        if self.choices is not None:
            plain = all(isinstance(c, str | bool) or _number(c) for c in self.choices)
            if not plain or len({(type(c), c) for c in self.choices}) < len(self.choices):
                raise PydanticCustomError(
                    "choices", "choices must be different words, numbers or true and false", {"remedy": ""}
                )
        return self


class SpaceModel(Strict):
    """A search space: the method, its parameters, and the weights; what is a range or choices may move."""

    model_config = ConfigDict(title="space")

    method: str | MovingModel | None = Field(
        default=None,
        description="the merge method (`evomerge methods` lists them; file.py@name is one of your own), or choices: "
        "[ties, dare_ties] to search it too. This or methods",
    )
    parts: dict[str, str | PartModel] | None = Field(
        default=None,
        alias="methods",
        description="instead of method: a method for each part of the model, by kind of module (attention, mlp, norm, "
        "embedding, head, other) or by a pattern of tensors' names, and for the rest; each a method's name, {method: "
        "NAME, params: {...}}, average, base, or an expert's name",
    )
    filter: FilterModel | None = Field(
        default=None, description="which tensors the method merges, and what happens to the rest"
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="parameters of the method: a value stays fixed; {range: [0.1, 0.9]} (with initial, log) or "
        "{choices: [sum, mean]} may move. Where the method is a choice: a mapping method: parameters. `evomerge "
        "methods NAME` lists them",
    )
    weights: WeightsModel = Field(description="which weights may move, between which bounds, from where")

    @model_validator(mode="after")
    def _one_way_to_name_methods(self) -> SpaceModel:
        problem = None
        if (self.method is None) == (self.parts is None):
            problem = "exactly one of method and methods must be given"
        elif self.parts is not None and (self.params or self.filter is not None):
            problem = f"{'params' if self.params else 'filter'} cannot stand beside methods"
        if problem is not None:
            remedy = "With methods, parameters stand with their part, and the rest under methods.rest."
            raise PydanticCustomError("methods", "{problem}", {"problem": problem, "remedy": remedy})
        return self

    _found: dict[str, Found] = PrivateAttr(default_factory=dict)  # filled by check_space
    _sections: list[Section] = PrivateAttr(default_factory=list)  # as well

    def found(self, method: str) -> Found:
        """The method that the space calls so, with its code."""
        return self._found[method]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that a candidate may have, the initial one first; with parts, that of the rest."""
        if self.parts is not None:
            rest = self._sections[-1]
            return (rest.fixed.method if rest.fixed else self._named(self.parts[REST]),)
        if isinstance(self.method, str):
            return (self.method,)
        assert self.method is not None
        choices = [str(c) for c in self.method.choices or ()]
        first = self.method.initial or choices[0]
        return (first, *(c for c in choices if c != first))

    def params_of(self, method: str) -> dict[str, Any]:
        """What the file says of one method's parameters."""
        if self.parts is not None:
            return dict(self._sections[-1].params)
        return dict(self.params if isinstance(self.method, str) else self.params.get(method) or {})

    @property
    def sections(self) -> list[Section]:
        """The parts that are merged in ways of their own, in the order in which they take tensors."""
        return self._sections

    @staticmethod
    def _named(value: str | PartModel) -> str:
        return value if isinstance(value, str) else value.method


def check_space(data: Any, experts: Sequence[str], *, where: str, folder: Path | None = None) -> SpaceModel:
    """All that can be checked of a space without the model (see ``Space.from_dict``).

    Args:
        folder: where methods that are files' (``file.py@name``) are, which then run; None: the space may name none.

    Raises:
        SpecError: names the key, the rule and the remedy.
    """
    model = validate(SpaceModel, data, where=where)
    model._sections[:] = sections(model, experts, where)
    _check_methods(model, experts, where, folder)
    for method in model.methods:
        method_params(model, method, where)
    for section in model.sections:
        section_params(model, section, where)
    _check_experts(model, experts, where)
    initial_weights(model, experts, where)
    _refuse_if_nothing_moves(model, experts, where)
    return model


def method_params(model: SpaceModel, name: str, where: str) -> tuple[dict[str, Any], list[Dimension]]:
    """(all parameters of method ``name`` at their fixed or initial values, the dimensions among them).

    The ends of the ranges must go together (``Method.check_together``), whatever is proposed between them then does.

    A dimension is called like its parameter, and ``METHOD.PARAMETER`` where the method is a choice.
    """
    given = model.params_of(name)
    if model.parts is not None:
        return _params(model, name, given, f"{REST}.", at(where, f"methods.{REST}.params"))
    if isinstance(model.method, str):
        return _params(model, name, given, "", at(where, "params"))
    values, dimensions = _params(model, name, given, f"{name}.", at(where, f"params.{name}"))
    return values, [replace(dimension, when=name) for dimension in dimensions]


def section_params(model: SpaceModel, section: Section, where: str) -> tuple[dict[str, Any], list[Dimension]]:
    """The same of a part that has a method of its own; nothing of one that has the space's."""
    if section.method is None:
        return {}, []
    return _params(model, section.method, section.params, f"{section.label}.", at(where, f"{section.key}.params"))


def _params(
    model: SpaceModel, name: str, given: Mapping[str, Any], prefix: str, place: str
) -> tuple[dict[str, Any], list[Dimension]]:
    from evomerge.methods.base import check_params

    method, values, dimensions = model.found(name).method, {}, []
    for key in sorted(given, key=[*method.params, *given].index):  # the order of keys in a file means nothing
        value = given[key]
        if isinstance(value, Mapping) and key in method.params:
            dimension = _moving(f"{prefix}{key}", method.params[key], value, at(place, key), name)
            dimensions.append(dimension)
            values[key] = dimension.initial
            continue
        try:
            if key in method.params:
                method.params[key].check(key, value, f"method {name}")
            else:
                check_params(name, method, {key: value})
        except MethodError as error:
            meaning = f"{key}: {method.params[key].meaning}." if key in method.params else None
            raise SpecError(error.problem, where=at(place, key), remedy=error.remedy or meaning) from error
        values[key] = value
    try:
        checked = check_params(name, method, values)
        for corner in _corners(dimensions):
            method.check_together({**checked, **corner})
    except MethodError as error:
        raise SpecError(error.problem, where=place, remedy=error.remedy) from error
    return checked, dimensions


def _corners(dimensions: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Parameter -> value for every combination of the ends of the ranges.

    Just inside, because an end may be an exception: a density of 1 goes with anything.
    """
    ends = [[d.at(1e-9), d.at(1 - 1e-9)] for d in dimensions if not d.choices]
    names = [d.name.rpartition(".")[2] for d in dimensions if not d.choices]
    return (dict(zip(names, corner, strict=True)) for corner in itertools.product(*ends))


def initial_weights(model: SpaceModel, experts: Sequence[str], where: str) -> dict[str, float]:
    """Expert -> where its weights start."""
    weights, key = model.weights, at(where, "weights.initial")
    if isinstance(weights.initial, Mapping):
        if weights.granularity == "global":
            raise SpecError(
                "granularity global has one weight for all experts, but initial is a mapping",
                where=key,
                remedy="Give one number, or use granularity: task.",
            )
        for name in weights.initial:
            if name not in experts:
                raise SpecError(f"there is no expert {name!r}", where=key, remedy=nearest(name, experts))
        missing = [e for e in experts if e not in weights.initial and e not in weights.fixed]
        if missing:
            raise SpecError(
                f"no initial weight for {', '.join(missing)}", where=key, remedy="Give one for every expert."
            )
        initial = {e: float(weights.initial.get(e, weights.fixed.get(e, 0.0))) for e in experts}
    else:
        value = _own_weight(model, where) if weights.initial is None else weights.initial
        initial = dict.fromkeys(experts, float(value))
    for group in weights.tied:
        if len({initial[e] for e in group}) > 1:
            raise SpecError(
                f"the experts {', '.join(group)} are tied, but start from different weights",
                where=key,
                remedy="Give them one initial weight.",
            )
    low, high = weights.range
    for name, value in initial.items():
        if name not in weights.fixed and not low <= value <= high:
            chosen = f"the default of method {_merging(model)[0]}, " if weights.initial is None else ""
            raise SpecError(
                f"low <= initial <= high must hold, but initial is {chosen}{value:g} for expert {name!r} and the range "
                f"is [{low:g}, {high:g}]",
                where=key,
                remedy="Set initial to a weight inside the range, or widen the range.",
            )
    return {e: weights.fixed.get(e, value) for e, value in initial.items()}


def _own_weight(model: SpaceModel, where: str) -> float:
    """Where weights start by themselves: the default of the method, which methods of several parts must share."""
    first = {name: model.found(name).method.weight.default for name in _merging(model)}
    if model.parts is not None and len(set(first.values())) > 1:
        raise SpecError(
            "the methods' own weights differ: " + ", ".join(f"{name} {value:g}" for name, value in first.items()),
            where=at(where, "weights.initial"),
            remedy="Say where the search starts, such as initial: 0.7.",
        )
    return next(iter(first.values()), 0.0)


def _merging(model: SpaceModel) -> tuple[str, ...]:
    """The methods whose weights are the search's, the initial one first."""
    if model.parts is None:
        return model.methods
    by_part = [(s.method or model.methods[0]) for s in model.sections if s.fixed is None]
    return tuple(dict.fromkeys(reversed(by_part)))


def nothing_moves(where: str) -> SpecError:
    return SpecError(
        "nothing moves in this space: every weight and parameter is fixed",
        where=where,
        remedy="Leave out one of `fixed`, or use `evomerge merge` for a single merge.",
    )


def _moving(label: str, param: Param, data: Mapping[str, Any], where: str, method: str) -> Dimension:
    """The dimension that ``data`` (see MovingModel) makes of a method's parameter."""
    model = validate(MovingModel, data, where=where)
    counted = param.type in (int, float) and not param.choices
    if counted != (model.range is not None) and not (counted and model.choices):
        raise SpecError(
            f"{label} is {param.range_text()}: it needs choices, not a range",
            where=where,
            remedy=f"Write choices: [{', '.join(param.choices) or 'true, false'}].",
        )
    initial = param.default if model.initial is None else model.initial
    if model.choices is not None:
        values = [_legal(label, param, value, where, method) for value in model.choices]
        initial = values[0] if initial is None else initial
        dimension = Dimension(label, 0.0, len(values) - 1.0, initial, choices=tuple(values))
    else:
        assert model.range is not None
        low, high = (float(_legal(label, param, end, where, method)) for end in model.range)
        initial = (low + high) / 2 if initial is None else initial
        dimension = Dimension(label, low, high, initial, log=model.log, integer=param.type is int)
    if not dimension.holds(dimension.initial):
        origin = "" if model.initial is not None else ", the parameter's default,"
        raise SpecError(
            f"the search would start at {label}={dimension.initial!r}{origin} but {label} is {dimension.text()}",
            where=at(where, "initial"),
            remedy="Set initial to one of these values.",
        )
    return dimension


def _legal(label: str, param: Param, value: Any, where: str, method: str) -> Any:
    try:
        return param.check(label, value, f"method {method}")
    except MethodError as error:
        raise SpecError(error.problem, where=where, remedy=error.remedy or f"{label}: {param.meaning}.") from error


def _check_methods(model: SpaceModel, experts: Sequence[str], where: str, folder: Path | None) -> None:
    from evomerge.methods.lookup import find

    if isinstance(model.method, MovingModel) and (
        model.method.choices is None or (model.method.initial or model.methods[0]) not in model.method.choices
    ):
        raise SpecError("choices of methods are needed, and initial must be one of them", where=at(where, "method"))
    named = [("method", name) for name in model.methods] if model.parts is None else []
    named += [(s.key, s.method or model.methods[0]) for s in model.sections if s.key and (s.method or model.parts)]
    for key, name in named:
        try:
            found = model._found[name] = find(name, folder)
        except MethodError as error:
            place = at(where, key) + (f": {error.where}" if error.where else "")
            raise SpecError(error.problem, where=place, remedy=error.remedy) from error
        _check_method(key, name, found.method, model, experts, where)
    if isinstance(model.method, MovingModel):
        for name, params in model.params.items():
            if name not in model.methods or not isinstance(params, Mapping | None):
                raise SpecError(
                    f"where the method is a choice, params is a mapping method: parameters, but {name!r} is not one of "
                    f"{', '.join(model.methods)}",
                    where=at(where, "params"),
                    remedy=f"Write params: {{{model.methods[0]}: {{...}}}}.",
                )


def _check_method(key: str, name: str, method: Method, model: SpaceModel, experts: Sequence[str], where: str) -> None:
    if method.statistics == "gram_merged":
        raise SpecError(
            f"method {name} is for a single merge: its statistics are measured while one model is merged, layer by "
            "layer, and are not those of another candidate",
            where=at(where, key),
            remedy="Merge by a recipe (evomerge merge), or search with regmean.",
        )
    fewest, most = method.num_experts
    if len(experts) < fewest or (most is not None and len(experts) > most):
        wanted = (
            f"exactly {fewest}" if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        )
        raise SpecError(
            f"method {name} needs {wanted} experts, but there are {len(experts)} ({', '.join(experts)})",
            where=at(where, key),
            remedy="Change the experts, or choose another method (`evomerge methods`).",
        )
    if name not in _merging(model):
        return
    for place, weight in (
        *(("weights.range", end) for end in model.weights.range),
        *((f"weights.fixed.{name}", weight) for name, weight in model.weights.fixed.items()),
    ):
        try:
            method.weight.check("a weight", weight, f"method {name}")
        except MethodError as error:
            raise SpecError(
                error.problem, where=at(where, place), remedy="Narrow the range to the method's legal weights."
            ) from error


def _check_experts(model: SpaceModel, experts: Sequence[str], where: str) -> None:
    """The experts that ``tied`` and ``fixed`` name. Dimensions in ``fixed`` are looked at when they are known."""
    seen: set[str] = set()
    for group in model.weights.tied:
        for name in group:
            if name not in experts:
                raise SpecError(
                    f"there is no expert {name!r}", where=at(where, "weights.tied"), remedy=nearest(name, experts)
                )
            if name in seen or name in model.weights.fixed:
                raise SpecError(
                    f"expert {name!r} is tied and fixed, or tied twice",
                    where=at(where, "weights.tied"),
                    remedy="Name each expert once.",
                )
            seen.add(name)
        if len(group) < 2:
            raise SpecError("at least two experts are tied to each other", where=at(where, "weights.tied"))


def _refuse_if_nothing_moves(model: SpaceModel, experts: Sequence[str], where: str) -> None:
    """Refuse a space whose points are all the same merge, such as one weight for all experts of a normalised mean.

    Two points are drawn and merged on a small random matrix. A method that cannot merge that is let through.
    """
    import numpy as np
    import torch

    from evomerge.methods import merge_state_dicts

    if isinstance(model.method, MovingModel):
        return
    weights = model.weights
    tried = [(s.method or model.methods[0], *section_params(model, s, where)) for s in model.sections if s.method]
    tried.append((model.methods[0], *method_params(model, model.methods[0], where)))
    if any(moving for _, _, moving in tried):
        return
    names = _merging(model)
    if not names or all(e in weights.fixed for e in experts):
        raise nothing_moves(where)
    label = {e: "+".join(group) for group in weights.tied for e in group}
    label = {e: "all" if weights.granularity == "global" else label.get(e, e) for e in experts}
    rng, (low, high) = np.random.default_rng(0), weights.range
    base, *taus = (torch.from_numpy(rng.standard_normal((16, 16))) for _ in range(len(experts) + 1))
    sources = [{"probe.weight": base + tau} for tau in taus]
    drawn = []
    for _ in range(2):
        draws = {one: float(rng.uniform(low, high)) for one in dict.fromkeys(label.values())}
        drawn.append([weights.fixed.get(e, draws[label[e]]) for e in experts])
    for name, params, _ in tried:
        if name not in names:
            continue
        method = model.found(name).method
        try:
            first, second = (
                merge_state_dicts(method, {"probe.weight": base}, sources, weights=chosen, **params)["probe.weight"]
                for chosen in drawn
            )
        except (UserError, ArithmeticError):
            return
        if not torch.allclose(first, second, rtol=1e-9, atol=1e-9):
            return
    raise SpecError(
        f"every point of this space is the same merge: with these parameters {' and '.join(names)} "
        f"{'do' if len(names) > 1 else 'does'} not depend on the weights of granularity {weights.granularity}",
        where=where,
        remedy="Use granularity: task (where only the proportion of the weights counts), set normalize: false, or "
        "leave out the parameter that takes the weights' place.",
    )
