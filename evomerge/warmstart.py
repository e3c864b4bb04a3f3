"""Merges that a search begins with: from another study, a recipe, or a control, as points of its space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evomerge.dimensions import Point
from evomerge.errors import SpecError, UserError, nearest
from evomerge.methods.lookup import method_of
from evomerge.parts import BASE
from evomerge.planning import Plan
from evomerge.recipe import Group, Recipe
from evomerge.space import UNTOUCHED
from evomerge.spec import StartSpec
from evomerge.validation import at

LATER = ("task_arithmetic",)  # controls that are known only once the others have been evaluated


def starting_points(plan: Plan, url: str) -> list[Point | None]:
    """The points that ``search.initial`` stands for, in order and without repetitions; none if it says nothing.

    None stands where a point is known only after the controls: task arithmetic at its best single weight.

    Args:
        url: the study's storage, where ``from: NAME:TRIAL`` looks.

    Raises:
        UserError: an entry cannot be found, or is not near any point of the space; names the entry.
    """
    points: list[Point | None] = []
    for number, start in enumerate(plan.spec.search.initial):
        where = at(str(plan.spec.path or "experiment"), f"search.initial[{number}]")
        try:
            point = None if start.control in LATER else _point(plan, _recipe(plan, start, url))
            if start.control == "base":
                _refuse_if_not_base(plan, point or {})
        except UserError as error:
            raise SpecError(error.problem, where=where, remedy=error.remedy) from error
        if point not in points:
            points.append(point)
    return points


def complete(plan: Plan, starts: Sequence[Point | None], weight: float) -> list[Point]:
    """``starts`` with the point of task arithmetic at ``weight`` where there is None; without repetitions."""
    best = _point(plan, _of_the_space(plan, (weight,) * len(plan.template.experts)))
    filled = [best if point is None else point for point in starts]
    return [point for n, point in enumerate(filled) if point not in filled[:n]]


def _point(plan: Plan, recipe: Recipe) -> Point:
    tensors = [plan.sources.info(name) for name in plan.sources.names if plan.sources.touched(name)]
    return plan.space.nearest(recipe, tensors)


def _of_the_space(plan: Plan, weights: Sequence[float]) -> Recipe:
    """One weight an expert, by task arithmetic if the space has it, else by its first method."""
    methods = plan.space.all_methods
    method = "task_arithmetic" if "task_arithmetic" in methods else methods[0]
    return replace(plan.template, method=method, params={}, groups=(Group(tuple(weights)),))


def _recipe(plan: Plan, start: StartSpec, url: str) -> Recipe:
    if start.recipe is not None:
        return Recipe.load(plan.spec.folder / start.recipe)
    if start.trial is not None:
        from evomerge.launch import open_study
        from evomerge.showing import resolve_subject

        study, colon, trial = start.trial.rpartition(":")
        if not colon:
            raise SpecError(
                f"a trial is written STUDY:TRIAL, but this is {start.trial!r}", remedy="Such as first:best."
            )
        file = plan.spec.folder / study
        store = open_study(str(file), None) if file.is_file() else open_study(study, url)
        return resolve_subject(store, trial)[1]
    return _control(plan, str(start.control))


def _control(plan: Plan, name: str) -> Recipe:
    """A control as a recipe of the space's own method."""
    experts = [source.name for source in plan.template.experts]
    known = ["average", "base", *LATER, *(f"expert:{expert}" for expert in experts)]
    if name not in known:
        raise SpecError(f"there is no control {name!r} to begin with", remedy=nearest(name, known))
    if name == "average":
        return _of_the_space(plan, (1.0 / len(experts),) * len(experts))
    return _of_the_space(plan, [float(f"expert:{expert}" == name) for expert in experts])


def _refuse_if_not_base(plan: Plan, point: Point) -> None:
    """SpecError unless ``point``, the nearest to all weights at zero, is the base itself."""
    recipe = plan.space.decode(point)
    pairs = list(zip(plan.space.regions, recipe.groups, strict=True))
    words = [region.word for region, _ in pairs if region.word not in ("", BASE, UNTOUCHED)]
    if words:
        raise SpecError(
            f"the base is no point of the space, which keeps a part at {words[0]}",
            remedy="Begin with control: average, or write rest: base.",
        )
    away = [weight for region, group in pairs if not region.word for weight in group.weights if weight != 0]
    if away:
        raise SpecError(
            f"the base has all weights at 0, but the nearest point of the space has one at {away[0]:g}",
            remedy="Widen space.weights.range to hold 0, or begin with control: average.",
        )
    by_base = [recipe.method_of(group)[0] for group in recipe.groups if not method_of(recipe, group).needs_base]
    if by_base:
        raise SpecError(
            f"the base is no merge by {by_base[0]}, which merges the experts without it",
            remedy="Begin with control: average, or use a method that adds to the base, such as task_arithmetic.",
        )
