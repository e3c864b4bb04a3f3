"""The search space: named dimensions, and how a point decodes to a recipe. Bounds live here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.dimensions import Dimension, Point, Value
from evomerge.errors import SpecError, nearest
from evomerge.parts import KINDS
from evomerge.recipe import Collected, Group, Recipe, holds
from evomerge.space_file import (
    SpaceModel,
    WeightsModel,
    check_space,
    initial_weights,
    method_params,
    nothing_moves,
    section_params,
)
from evomerge.space_parts import Part, shares_of
from evomerge.validation import at

if TYPE_CHECKING:
    from evomerge.methods.base import TensorInfo
    from evomerge.plugins import Code

METHOD = "method"  # the dimension that the method is, where it is a choice
UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Moving:
    """Stands where a number would: the value is that of a dimension."""

    dimension: str


@dataclass(frozen=True)
class Region:
    """A part of the model that has weights of its own: one an expert, each a number or a dimension.

    ``of`` is the label of the space's part with a method of its own that it belongs to. ``word`` says whose weights
    these are if not the search's: average, base, an expert's name, or that no expert changes a tensor here.
    """

    layers: tuple[int, int] | None
    kinds: tuple[str, ...] | None
    tensors: tuple[str, ...] | None
    weights: tuple[float | Moving, ...]
    of: str = ""
    word: str = ""
    where: str = field(default="", compare=False)

    @property
    def part(self) -> Part:
        return self.layers, self.kinds, self.tensors


@dataclass(frozen=True)
class PartMethod:
    """The method of a part of the model, and all of its parameters, each a value or a dimension."""

    method: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """Named dimensions and the merge that a point stands for.

    Args:
        template: a recipe whose sources, seed and export_dtype every candidate shares.
        params: method -> all of its parameters, each a value or a dimension; the initial method first.
        regions: what the groups of every candidate are.
        dimensions: what may move: the method, its parameters, then the weights, expert by expert and within an expert
            region by region.
        codes: method -> its code, of those methods that are not evomerge's own.
        statistics: method -> what it is given, of those methods that are weighted by data.
        parts: label -> method, of the parts that have one of their own.
    """

    template: Recipe
    params: Mapping[str, Mapping[str, Any]]
    regions: tuple[Region, ...]
    dimensions: tuple[Dimension, ...]
    codes: Mapping[str, Code] = field(default_factory=dict)
    statistics: Mapping[str, Collected] = field(default_factory=dict)
    parts: Mapping[str, PartMethod] = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        template: Recipe,
        num_layers: int,
        tensors: Iterable[TensorInfo] = (),
        where: str = "space",
        folder: Path | None = None,
    ) -> Space:
        """The space that ``data`` describes (see SpaceModel), for a model with ``num_layers`` layers.

        Args:
            tensors: those that an expert may change; granularities of modules and tensors are made of them. All other
                tensors get the initial weights.
            folder: where methods that are files' are, which then run; None: the space may name none.

        Raises:
            SpecError: unknown key, method, parameter or granularity; a range upside down or outside the method's legal
                values; an initial value outside its range; a wrong number of experts; more groups than layers; nothing
                that moves.
        """
        experts = [source.name for source in template.experts]
        model = check_space(data, experts, where=where, folder=folder)
        dimensions: list[Dimension] = []
        if len(model.methods) > 1:
            choices = tuple(str(choice) for choice in model.method.choices or ())  # type: ignore[union-attr]
            dimensions.append(Dimension(METHOD, 0.0, len(choices) - 1.0, model.methods[0], choices=choices))
        params: dict[str, dict[str, Any]] = {}
        for name in model.methods:
            values, moving = method_params(model, name, where)
            params[name] = values | {d.name.rpartition(".")[2]: Moving(d.name) for d in moving}
            dimensions += moving
        parts: dict[str, PartMethod] = {}
        for section in model.sections:
            values, moving = section_params(model, section, where)
            if section.method is not None:
                own = values | {d.name.rpartition(".")[2]: Moving(d.name) for d in moving}
                parts[section.label] = PartMethod(section.method, own)
                dimensions += moving
        regions, weights = _regions(model, num_layers, list(tensors), experts, dimensions, where)
        dimensions += weights
        names = [dimension.name for dimension in dimensions]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise SpecError(
                f"two dimensions would be called {twice!r}: an expert has the name of a parameter, or of the method",
                where=where,
                remedy="Rename the expert.",
            )
        if not dimensions:
            raise nothing_moves(where)
        used = (*model.methods, *(part.method for part in parts.values()))
        codes = {name: code for name in used if (code := model.found(name).code) is not None}
        return cls(template, params, regions, tuple(dimensions), codes, parts=parts)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that a candidate may have, the initial one first; parts with one of their own aside."""
        return tuple(self.params)

    @property
    def all_methods(self) -> tuple[str, ...]:
        """Those, and the methods of the parts."""
        return tuple(dict.fromkeys((*self.params, *(part.method for part in self.parts.values()))))

    @property
    def fixed_params(self) -> dict[str, dict[str, Any]]:
        """Method -> its parameters that no candidate changes, with their defaults."""
        found: dict[str, dict[str, Any]] = {}
        for method, params in (*self.params.items(), *((part.method, part.params) for part in self.parts.values())):
            fixed = {key: value for key, value in params.items() if not isinstance(value, Moving)}
            known = found.get(method, fixed)
            found[method] = {key: value for key, value in fixed.items() if key in known and known[key] == value}
        return found

    def active(self, method: Value | None) -> tuple[Dimension, ...]:
        """The dimensions of the points whose method is ``method`` (None: where the method is no dimension)."""
        return tuple(d for d in self.dimensions if d.when is None or d.when == method)

    def decode(self, point: Mapping[str, Value]) -> Recipe:
        """The recipe that ``point`` stands for; its numbers are the point's own.

        Raises:
            SpecError: a dimension is missing, unknown, or has a value outside its bounds. Nothing is clipped or folded.
        """
        self._check(point)
        method = str(point.get(METHOD, self.methods[0]))

        def filled(params: Mapping[str, Any]) -> dict[str, Any]:
            return {k: point[v.dimension] if isinstance(v, Moving) else v for k, v in params.items()}

        params = filled(self.params[method])
        own = {
            label: {"method": part.method, "code": self.codes.get(part.method), "params": filled(part.params)}
            for label, part in self.parts.items()
        }
        groups = tuple(
            Group(
                tuple(float(point[w.dimension] if isinstance(w, Moving) else w) for w in region.weights),
                region.layers,
                kinds=region.kinds,
                tensors=region.tensors,
                where=region.where,
                **own.get(region.of, {}),
            )
            for region in self.regions
        )
        return replace(
            self.template,
            method=method,
            code=self.codes.get(method),
            params=params,
            groups=groups,
            statistics=self._statistics_of(method),
        )

    def _statistics_of(self, method: str) -> Collected | None:
        """What is given to the methods of a candidate: one folder, with the hashes of what they use of it."""
        used = [self.statistics[m] for m in (method, *(p.method for p in self.parts.values())) if m in self.statistics]
        return Collected(used[0].path, {k: v for one in used for k, v in one.sha256.items()}) if used else None

    def encode(self, recipe: Recipe) -> Point:
        """The point that decodes to ``recipe``: ``encode(decode(p)) == p``.

        Raises:
            SpecError: the recipe has other experts, method, parameters or groups, or numbers outside the bounds.
        """
        for what, mine, other in (
            ("experts", [s.name for s in self.template.experts], [s.name for s in recipe.experts]),
            ("method", recipe.method if recipe.method in self.params else " or ".join(self.methods), recipe.method),
            (
                "layers, kinds and tensors of its groups",
                [r.part for r in self.regions],
                [g.part for g in recipe.groups],
            ),
            (
                "methods of its groups",
                [self.parts[r.of].method if r.of else None for r in self.regions],
                [g.method for g in recipe.groups],
            ),
            ("params of its groups", {}, {k: v for g in recipe.groups if not g.method for k, v in g.params.items()}),
        ):
            if mine != other:
                raise SpecError(f"the recipe is not in the search space: its {what} are {other}, the space's {mine}")
        found: Point = {METHOD: recipe.method} if len(self.methods) > 1 else {}
        params = self.params[recipe.method]
        if set(params) != set(recipe.params):
            raise SpecError(f"the recipe is not in the search space: its params are {list(recipe.params)}")
        pairs = [(f"params.{key}", params[key], value) for key, value in recipe.params.items()]
        for region, group in zip(self.regions, recipe.groups, strict=True):
            if region.of:
                own = self.parts[region.of].params
                if set(own) != set(group.params):
                    raise SpecError(
                        f"the recipe is not in the search space: its params for {region.of} are {list(group.params)}"
                    )
                pairs += [(f"{region.of}.{key}", own[key], value) for key, value in group.params.items()]
            for source, mine, weight in zip(recipe.experts, region.weights, group.weights, strict=True):
                pairs.append((f"weight of {source.name}", mine, weight))
        for what, mine, value in pairs:
            expected = found.setdefault(mine.dimension, value) if isinstance(mine, Moving) else mine
            if value != expected:
                raise SpecError(
                    f"the recipe is not in the search space: its {what} is {value!r}, not equal to {expected!r}"
                )
        point = {d.name: found[d.name] for d in self.active(recipe.method)}
        self._check(point)
        return point

    def nearest(self, recipe: Recipe, tensors: Iterable[TensorInfo]) -> Point:
        """The point that is most like ``recipe``: in each dimension the mean of what the recipe says there.

        Values outside the bounds are moved to them; fixed weights and parameters stay the space's.

        Args:
            tensors: those that count.

        Raises:
            SpecError: the recipe lacks an expert of the space, or has a method that the space has not.
        """
        places = {source.name: t for t, source in enumerate(recipe.experts)}
        missing = [source.name for source in self.template.experts if source.name not in places]
        if missing:
            raise SpecError(f"the recipe has no expert {', '.join(missing)}, but {', '.join(places)}")
        shared = [name for name in recipe.methods if name in self.params] or [*self.methods]
        if not set(recipe.methods) <= set(self.all_methods) or (len(shared) > 1 and len(self.methods) > 1):
            raise SpecError(
                f"the recipe's method is {' and '.join(recipe.methods)}, but the space has "
                f"{' or '.join(self.methods) if not self.parts else ', '.join(self.all_methods)}"
            )
        method = shared[0] if len(self.methods) > 1 else next(iter(self.params))
        probe = self.decode(self.initial())
        region_of = {id(group): region for group, region in zip(probe.groups, self.regions, strict=True)}
        found: dict[str, list[Any]] = {}
        for info in tensors:
            given, region = recipe.group_for(info), region_of[id(probe.group_for(info))]
            for source, mine in zip(self.template.experts, region.weights, strict=True):
                if isinstance(mine, Moving):
                    found.setdefault(mine.dimension, []).append(given.weights[places[source.name]])
            own = self.parts[region.of] if region.of else PartMethod(method, self.params[method])
            if recipe.method_of(given)[0] == own.method and region.word != UNTOUCHED:
                said = recipe.params_of(given)
                for key, mine in own.params.items():
                    if isinstance(mine, Moving) and key in said:
                        found.setdefault(mine.dimension, []).append(said[key])
        point: Point = {}
        for d in self.active(method):
            values = found.get(d.name, [d.initial])
            first = values[0]
            if d.choices or not isinstance(first, int | float):
                value = first if d.holds(first) else d.initial
            else:
                value = values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)
            point[d.name] = method if d.name == METHOD else d.clip(value)
        return point

    def initial(self) -> Point:
        """Where the search starts."""
        return {d.name: d.initial for d in self.active(self.methods[0])}

    def at(self, shares: Sequence[float]) -> Point:
        """The point that lies at ``shares``, in [0, 1], of the way through each dimension; see ``Dimension.at``."""
        values = {d.name: d.at(share) for d, share in zip(self.dimensions, shares, strict=True)}
        return {d.name: values[d.name] for d in self.active(values.get(METHOD, self.methods[0]))}

    def clip(self, point: Mapping[str, Value]) -> Point:
        """``point`` with every value moved to the nearest legal one. The caller asks for this by name."""
        return {d.name: d.clip(point[d.name]) for d in self.dimensions if d.name in point}

    def to_dict(self) -> dict[str, Any]:
        """Canonical plain data: equal for equal spaces, however they were written; sources are not part of it."""

        def plain(value: Any) -> Any:
            return {"dimension": value.dimension} if isinstance(value, Moving) else value

        parts = {
            label: {"method": part.method, "params": {k: plain(v) for k, v in part.params.items()}}
            for label, part in self.parts.items()
        }
        return {
            "params": {method: {k: plain(v) for k, v in params.items()} for method, params in self.params.items()},
            "regions": [
                {
                    "layers": None if region.layers is None else list(region.layers),
                    "kinds": None if region.kinds is None else list(region.kinds),
                    "tensors": None if region.tensors is None else list(region.tensors),
                    "weights": [plain(weight) for weight in region.weights],
                    **({"of": region.of} if region.of else {}),
                }
                for region in self.regions
            ],
            "dimensions": [dimension.to_dict() for dimension in self.dimensions],
            **({"parts": parts} if parts else {}),
        }

    def _check(self, point: Mapping[str, Value]) -> None:
        method = point.get(METHOD, self.methods[0])
        active = {d.name: d for d in self.active(method)}
        for name in point:
            if name not in active:
                inactive = any(d.name == name for d in self.dimensions)
                raise SpecError(
                    f"the search space has no dimension {name!r}" + (f" where the method is {method}" * inactive),
                    remedy=nearest(name, active),
                )
        for d in active.values():
            if d.name not in point:
                raise SpecError(f"the point has no value for dimension {d.name!r}")
            if not d.holds(point[d.name]):  # NaN is nowhere
                bounds = d.text() if d.choices else f"[{d.low:g}, {d.high:g}]"
                raise SpecError(f"{d.name} must lie in {bounds}, but is {point[d.name]!r}")


def split_layers(num_layers: int, groups: int) -> tuple[tuple[int, int], ...]:
    """``groups`` consecutive half-open ranges that cover ``num_layers`` layers; their sizes differ by at most one."""
    edges = [g * num_layers // groups for g in range(groups + 1)]
    return tuple(pairwise(edges))


def _parts(weights: WeightsModel, num_layers: int, tensors: Sequence[TensorInfo], where: str) -> list[Part]:
    """The parts of the model that have weights of their own."""
    granularity, groups = weights.granularity, weights.groups
    if granularity in ("global", "task"):
        return [(None, None, None)]
    layered = granularity in ("layer", "layer_groups", "layer_module")
    if groups is not None and groups > num_layers:
        raise SpecError(
            f"groups <= layers must hold, but groups is {groups} and the model has {num_layers} layers",
            where=at(where, "weights.groups"),
            remedy=f"Use at most {num_layers} groups." if num_layers else "Use granularity task or global.",
        )
    if layered and not num_layers:
        raise SpecError(
            f"granularity {granularity} needs a model with layers, but no tensor's name has a layer number",
            where=at(where, "weights.granularity"),
            remedy="Use granularity task, module or tensor.",
        )
    spans = split_layers(num_layers, groups or num_layers)
    if granularity in ("layer", "layer_groups"):
        return [(span, None, None) for span in spans]
    if not tensors:
        raise SpecError(
            f"no expert changes a tensor, so that granularity {granularity} has nothing to move", where=where
        )
    if granularity == "tensor":
        return [(None, None, (info.name,)) for info in tensors]
    kinds = [kind for kind in KINDS if any(info.kind == kind for info in tensors)]
    if granularity == "module":
        return [(None, (kind,), None) for kind in kinds]
    return [
        (span, (kind,), None)
        for span in spans
        for kind in kinds
        if any(holds(info, span, (kind,), num_layers) for info in tensors)
    ]


def _regions(
    model: SpaceModel,
    num_layers: int,
    tensors: Sequence[TensorInfo],
    experts: Sequence[str],
    params: Sequence[Dimension],
    where: str,
) -> tuple[tuple[Region, ...], list[Dimension]]:
    """The regions of every part of the space, one more for what they leave over, and the dimensions of the weights.

    Where a space has parts, those of its granularity that hold no tensor in them are left out.
    """
    weights, initial = model.weights, initial_weights(model, experts, where)
    sections, grains = model.sections, _parts(model.weights, num_layers, tensors, where)
    shares, several = shares_of(sections, tensors), len(model.sections) > 1
    if several and tensors:
        _refuse_empty(model, shares, params, where)
    placed: list[tuple[int, Part, int]] = []  # (section, part, grain; -1 for what they leave over)
    for s, (section, share) in enumerate(zip(sections, shares, strict=True)):
        if section.fixed is None:
            for g, grain in enumerate(grains):
                part = section.within(grain)
                if part is not None and (not several or not tensors or _any_in(share, grain, num_layers)):
                    placed.append((s, part, g))
        parts = [grain for grain in grains if any(grain[1:]) or (several and any(grain))]
        if section.fixed is not None or parts or all(other != s for other, _, _ in placed):
            placed.append((s, (None, section.kinds, section.tensors), -1))
    cells, dimensions = _cells(weights, experts, initial, grains, {g for _, _, g in placed if g >= 0}, where)
    regions = []
    for s, part, g in placed:
        section = sections[s]
        row = cells[g] if g >= 0 else section.fixed.weights if section.fixed else tuple(initial[e] for e in experts)
        word = section.word or (UNTOUCHED if g < 0 else "")
        place = at(where, section.key) if section.key else ""
        regions.append(Region(*part, row, section.label if section.method else "", word, place))
    return tuple(regions), dimensions


def _cells(
    weights: WeightsModel,
    experts: Sequence[str],
    initial: Mapping[str, float],
    grains: Sequence[Part],
    used: set[int],
    where: str,
) -> tuple[dict[int, tuple[float | Moving, ...]], list[Dimension]]:
    """(the weights of each part of the granularity that is used, one an expert; their dimensions)."""
    low, high = weights.range
    tied = {expert: "+".join(group) for group in weights.tied for expert in group}
    dimensions: dict[str, Dimension] = {}
    known = set(experts)
    rows: dict[int, list[float | Moving]] = {g: [] for g in sorted(used)}
    for expert in experts:
        for g, row in rows.items():
            name = "weight" if weights.granularity == "global" else _name(tied.get(expert, expert), grains[g])
            known.add(name)
            if expert in weights.fixed or name in weights.fixed:
                row.append(float(weights.fixed.get(expert, weights.fixed.get(name, 0.0))))
                continue
            dimensions.setdefault(name, Dimension(name, low, high, initial[expert], log=weights.log))
            row.append(Moving(name))
    for name in weights.fixed:
        if name not in known:
            raise SpecError(
                f"there is no expert and no dimension {name!r}",
                where=at(where, "weights.fixed"),
                remedy=nearest(name, known),
            )
    return {g: tuple(row) for g, row in rows.items()}, list(dimensions.values())


def _any_in(share: Sequence[TensorInfo], grain: Part, num_layers: int) -> bool:
    layers, kinds, tensors = grain
    return any((tensors is None or info.name in tensors) and holds(info, layers, kinds, num_layers) for info in share)


def _refuse_empty(
    model: SpaceModel, shares: Sequence[Sequence[TensorInfo]], params: Sequence[Dimension], where: str
) -> None:
    """SpecError if what the search moves is in no tensor that an expert changes."""
    for section, share in zip(model.sections, shares, strict=True):
        moving = [d.name for d in params if section.label and d.name.startswith(f"{section.label}.")]
        if not share and moving:
            raise SpecError(
                f"no expert changes a tensor of this part, so that {', '.join(moving)} would move nothing",
                where=at(where, section.key),
                remedy="Give its parameters values, or leave the part to the rest.",
            )
    pairs = list(zip(model.sections, shares, strict=True))
    if not any(share for section, share in pairs if section.fixed is None):
        raise SpecError(
            "no expert changes a tensor that is merged by these weights: "
            + ", ".join(f"{section.text} holds {len(share)}" for section, share in pairs),
            where=at(where, model.sections[0].key),
            remedy=f"Experts change tensors such as {max(shares, key=len)[0].name}: a LoRA expert what it adapts only.",
        )


def _name(expert: str, part: Part) -> str:
    """``add``, ``add[0-4]`` (layers 0 to 4), ``add[3]``, ``add.mlp``, ``add[0-4].mlp``, ``add:model.norm.weight``."""
    layers, kinds, tensors = part
    name = expert
    if layers is not None:
        name += f"[{layers[0]}]" if layers[1] == layers[0] + 1 else f"[{layers[0]}-{layers[1] - 1}]"
    if kinds is not None:
        name += f".{'+'.join(kinds)}"
    return name if tensors is None else f"{name}:{'+'.join(tensors)}"
