"""The search space: named dimensions, and how a point decodes to a recipe. Bounds live here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from evomerge.errors import MethodError, SpecError, UserError, nearest
from evomerge.recipe import Group, Recipe
from evomerge.validation import at, short, validate

if TYPE_CHECKING:
    from evomerge.methods.base import Method

Point = dict[str, float]  # dimension name -> value, in the space's own units


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


class WeightsModel(BaseModel):
    """Which weights may move, between which bounds, from where."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, title="weights")

    granularity: Literal["global", "task", "layer_groups"] = Field(
        description="global: one weight for all experts; task: one an expert; layer_groups: one an expert and group of "
        "consecutive layers"
    )
    groups: int | None = Field(
        default=None, ge=1, description="how many groups of consecutive layers, for granularity layer_groups"
    )
    range: Annotated[list[float], BeforeValidator(_check_range)] = Field(
        description="[low, high]: the lowest and the highest weight that the search may try", min_length=2, max_length=2
    )
    initial: Annotated[float | dict[str, float] | None, BeforeValidator(_check_initial)] = Field(
        default=None,
        description="the weight that the search starts from, one for all or a mapping expert: weight; by default the "
        "method's own",
    )

    @model_validator(mode="after")
    def _groups_where_they_belong(self) -> WeightsModel:
        if self.granularity == "layer_groups" and self.groups is None:
            raise PydanticCustomError(
                "groups",
                "granularity layer_groups needs the number of groups",
                {"remedy": "Add, for example, groups: 6."},
            )
        if self.granularity != "layer_groups" and self.groups is not None:
            raise PydanticCustomError(
                "groups",
                "groups is {groups}, but granularity {granularity} has no groups",
                {
                    "groups": self.groups,
                    "granularity": self.granularity,
                    "remedy": "Remove groups, or set granularity: layer_groups.",
                },
            )
        return self


class SpaceModel(BaseModel):
    """A search space as it is written: a method, its fixed parameters, and the weights that may move."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, title="space")

    method: str = Field(description="the merge method; `evomerge methods` lists them")
    params: dict[str, Any] = Field(
        default_factory=dict, description="parameters of the method that stay fixed; `evomerge methods NAME` lists them"
    )
    weights: WeightsModel = Field(description="which weights may move, between which bounds, from where")


@dataclass(frozen=True)
class Dimension:
    """One number that a searcher may move, with its bounds and where it starts (all in the same units)."""

    name: str
    low: float
    high: float
    initial: float


@dataclass(frozen=True)
class Space:
    """Named dimensions and the merge that a point stands for.

    Args:
        template: a recipe whose sources, seed and export_dtype every candidate shares.
        method, params: of every candidate; ``params`` holds all of the method's parameters.
        granularity: global, task or layer_groups.
        layers: the half-open ranges of layers that have weights of their own, or (None,) for the whole model.
        dimensions: what may move; expert by expert, and within an expert group by group.
    """

    template: Recipe
    method: str
    params: Mapping[str, Any]
    granularity: str
    layers: tuple[tuple[int, int] | None, ...]
    dimensions: tuple[Dimension, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, template: Recipe, num_layers: int, where: str = "space") -> Space:
        """The space that ``data`` describes (see SpaceModel), for a model with ``num_layers`` layers.

        Raises:
            SpecError: unknown key, method, parameter or granularity; a range upside down or outside the method's legal
                weights; an initial weight outside the range; a wrong number of experts; more groups than layers.
        """
        experts = [source.name for source in template.experts]
        model = check_space(data, experts, where=where)
        weights = model.weights
        layers: tuple[tuple[int, int] | None, ...] = (None,)
        if weights.groups is not None:
            if weights.groups > num_layers:
                raise SpecError(
                    f"groups <= layers must hold, but groups is {weights.groups} and the model has {num_layers} layers",
                    where=at(where, "weights.groups"),
                    remedy=f"Use at most {num_layers} groups." if num_layers else "Use granularity task or global.",
                )
            layers = split_layers(num_layers, weights.groups)
        initial = _initial_weights(model, experts, where)
        low, high = weights.range
        if weights.granularity == "global":
            dimensions = [Dimension("weight", low, high, initial[experts[0]])]
        else:
            dimensions = [Dimension(_name(e, span), low, high, initial[e]) for e in experts for span in layers]
        return cls(
            template=template,
            method=model.method,
            params=_full_params(model, where),
            granularity=weights.granularity,
            layers=layers,
            dimensions=tuple(dimensions),
        )

    @property
    def fixed_params(self) -> dict[str, Any]:
        """The method's parameters that no candidate changes: all of them, with their defaults."""
        return dict(self.params)

    def decode(self, point: Mapping[str, float]) -> Recipe:
        """The recipe that ``point`` stands for; its weights are the point's own floats.

        Raises:
            SpecError: a dimension is missing, unknown, or has a value outside its bounds. Nothing is clipped or folded.
        """
        self._check(point)
        names = [source.name for source in self.template.experts]
        groups = []
        for span in self.layers:
            keys = ["weight"] * len(names) if self.granularity == "global" else [_name(e, span) for e in names]
            groups.append(Group(weights=tuple(float(point[key]) for key in keys), layers=span))
        return replace(self.template, method=self.method, params=dict(self.params), groups=tuple(groups))

    def encode(self, recipe: Recipe) -> Point:
        """The point that decodes to ``recipe``: ``encode(decode(p)) == p``.

        Raises:
            SpecError: the recipe has other experts, method, parameters or groups, or weights outside the bounds.
        """
        for what, mine, other in (
            ("experts", [s.name for s in self.template.experts], [s.name for s in recipe.experts]),
            ("method", self.method, recipe.method),
            ("params", dict(self.params), dict(recipe.params)),
            ("layers of its groups", list(self.layers), [g.layers for g in recipe.groups]),
            ("params of its groups", {}, {k: v for g in recipe.groups for k, v in g.params.items()}),
        ):
            if mine != other:
                raise SpecError(f"the recipe is not in the search space: its {what} are {other}, the space's {mine}")
        point: Point = {}
        for group in recipe.groups:
            if self.granularity == "global" and len(set(group.weights)) > 1:
                raise SpecError(
                    f"the recipe is not in the search space: its weights {list(group.weights)} are not equal"
                )
            for source, weight in zip(recipe.experts, group.weights, strict=True):
                point["weight" if self.granularity == "global" else _name(source.name, group.layers)] = weight
        point = {d.name: point[d.name] for d in self.dimensions}
        self._check(point)
        return point

    def initial(self) -> Point:
        """Where the search starts."""
        return {d.name: d.initial for d in self.dimensions}

    def clip(self, point: Mapping[str, float]) -> Point:
        """``point`` with every value moved to the nearest bound if it is outside. The caller asks for this by name."""
        return {d.name: min(max(float(point[d.name]), d.low), d.high) for d in self.dimensions}

    def to_dict(self) -> dict[str, Any]:
        """Canonical plain data: equal for equal spaces, however they were written; sources are not part of it."""
        return {
            "method": self.method,
            "params": dict(self.params),
            "granularity": self.granularity,
            "layers": [None if span is None else list(span) for span in self.layers],
            "dimensions": [
                {"name": d.name, "low": d.low, "high": d.high, "initial": d.initial} for d in self.dimensions
            ],
        }

    def _check(self, point: Mapping[str, float]) -> None:
        names = [d.name for d in self.dimensions]
        for name in point:
            if name not in names:
                raise SpecError(f"the search space has no dimension {name!r}", remedy=nearest(name, names))
        for d in self.dimensions:
            if d.name not in point:
                raise SpecError(f"the point has no value for dimension {d.name!r}")
            if not d.low <= point[d.name] <= d.high:  # false for NaN too
                raise SpecError(f"{d.name} must lie in [{d.low:g}, {d.high:g}], but is {point[d.name]!r}")


def split_layers(num_layers: int, groups: int) -> tuple[tuple[int, int], ...]:
    """``groups`` consecutive half-open ranges that cover ``num_layers`` layers; their sizes differ by at most one."""
    edges = [g * num_layers // groups for g in range(groups + 1)]
    return tuple(pairwise(edges))


def check_space(data: Any, experts: Sequence[str], *, where: str) -> SpaceModel:
    """All that can be checked of a space without the model: see ``Space.from_dict``, except groups against layers."""
    from evomerge.methods import METHODS

    model = validate(SpaceModel, data, where=where)
    if model.method not in METHODS:
        raise SpecError(
            f"there is no merge method {model.method!r}",
            where=at(where, "method"),
            remedy=nearest(model.method, METHODS),
        )
    method = METHODS[model.method]
    fewest, most = method.num_experts
    if len(experts) < fewest or (most is not None and len(experts) > most):
        wanted = (
            f"exactly {fewest}" if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        )
        raise SpecError(
            f"method {model.method} needs {wanted} experts, but there are {len(experts)} ({', '.join(experts)})",
            where=at(where, "method"),
            remedy="Change the experts, or choose another method (`evomerge methods`).",
        )
    params = _full_params(model, where)
    for end in model.weights.range:
        try:
            method.weight.check("a weight", end, f"method {model.method}")
        except MethodError as error:
            raise SpecError(
                error.problem,
                where=at(where, "weights.range"),
                remedy="Narrow the range to the method's legal weights.",
            ) from error
    _initial_weights(model, experts, where)
    _refuse_if_nothing_moves(model, method, params, len(experts), where)
    return model


def _full_params(model: SpaceModel, where: str) -> dict[str, Any]:
    """All parameters of the method, with defaults; SpecError that names the key."""
    from evomerge.methods import METHODS
    from evomerge.methods.base import check_params

    method = METHODS[model.method]
    for key, value in model.params.items():
        try:
            if key in method.params:
                method.params[key].check(key, value, f"method {model.method}")
            else:
                check_params(model.method, method, {key: value})
        except MethodError as error:
            meaning = f"{key}: {method.params[key].meaning}." if key in method.params else None
            raise SpecError(error.problem, where=at(where, f"params.{key}"), remedy=error.remedy or meaning) from error
    try:
        return check_params(model.method, method, model.params)
    except MethodError as error:
        raise SpecError(error.problem, where=at(where, "params"), remedy=error.remedy) from error


def _initial_weights(model: SpaceModel, experts: Sequence[str], where: str) -> dict[str, float]:
    """Expert -> where its weights start."""
    from evomerge.methods import METHODS

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
        missing = [e for e in experts if e not in weights.initial]
        if missing:
            raise SpecError(
                f"no initial weight for {', '.join(missing)}", where=key, remedy="Give one for every expert."
            )
        initial = {e: float(weights.initial[e]) for e in experts}
    else:
        value = METHODS[model.method].weight.default if weights.initial is None else weights.initial
        initial = dict.fromkeys(experts, float(value))
    low, high = weights.range
    for name, value in initial.items():
        if not low <= value <= high:
            chosen = f"the default of method {model.method}, " if weights.initial is None else ""
            raise SpecError(
                f"low <= initial <= high must hold, but initial is {chosen}{value:g} for expert {name!r} and the range "
                f"is [{low:g}, {high:g}]",
                where=key,
                remedy="Set initial to a weight inside the range, or widen the range.",
            )
    return initial


def _refuse_if_nothing_moves(
    model: SpaceModel, method: Method, params: Mapping[str, Any], num_experts: int, where: str
) -> None:
    """Refuse a space whose points are all the same merge, such as one weight for all experts of a normalised mean.

    Two points are drawn and merged on a small random matrix. A method that cannot merge that is let through.
    """
    import numpy as np
    import torch

    from evomerge.methods import merge_state_dicts

    rng = np.random.default_rng(0)
    base, *taus = (torch.from_numpy(rng.standard_normal((16, 16))) for _ in range(num_experts + 1))
    low, high = model.weights.range
    merged = []
    for _ in range(2):
        draws = rng.uniform(low, high, size=1 if model.weights.granularity == "global" else num_experts)
        weights = [float(w) for w in np.broadcast_to(draws, num_experts)]
        try:
            sources = [{"probe.weight": base + tau} for tau in taus]
            result = merge_state_dicts(model.method, {"probe.weight": base}, sources, weights=weights, **params)
        except (UserError, ArithmeticError):
            return
        merged.append(result["probe.weight"])
    if torch.allclose(merged[0], merged[1], rtol=1e-9, atol=1e-9):
        raise SpecError(
            f"every point of this space is the same merge: with these parameters {model.method} does not depend on the "
            f"weights of granularity {model.weights.granularity}",
            where=where,
            remedy="Use granularity: task (where only the proportion of the weights counts), set normalize: false, or "
            "leave out the parameter that takes the weights' place.",
        )


def _name(expert: str, span: tuple[int, int] | None) -> str:
    """``add`` for the whole model, ``add[0-4]`` for layers 0 to 4 inclusive."""
    return expert if span is None else f"{expert}[{span[0]}-{span[1] - 1}]"
