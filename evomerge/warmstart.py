"""Merges that a search begins with: from another study, a recipe, or a control, as points of its space."""

from __future__ import annotations

from dataclasses import replace

from evomerge.dimensions import Point
from evomerge.errors import SpecError, UserError, nearest
from evomerge.planning import Plan
from evomerge.recipe import Group, Recipe
from evomerge.spec import StartSpec
from evomerge.validation import at


def starting_points(plan: Plan, url: str) -> list[Point]:
    """The points that ``search.initial`` stands for, in order and without repetitions; none if it says nothing.

    Args:
        url: the study's storage, where ``from: NAME:TRIAL`` looks.

    Raises:
        UserError: an entry cannot be found, or is not near any point of the space; names the entry.
    """
    tensors = [plan.sources.info(name) for name in plan.sources.names if plan.sources.touched(name)]
    points: list[Point] = []
    for number, start in enumerate(plan.spec.search.initial):
        where = at(str(plan.spec.path or "experiment"), f"search.initial[{number}]")
        try:
            recipe = _recipe(plan, start, url)
            point = plan.space.nearest(recipe, tensors)
        except UserError as error:
            raise SpecError(error.problem, where=where, remedy=error.remedy) from error
        if point not in points:
            points.append(point)
    return points


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
    """A control as a recipe of the space's own (first) method."""
    experts = [source.name for source in plan.template.experts]
    known = ["average", *(f"expert:{expert}" for expert in experts)]
    if name not in known:
        raise SpecError(f"there is no control {name!r} to begin with", remedy=nearest(name, known))
    if name == "average":
        weights = (1.0 / len(experts),) * len(experts)
    else:
        weights = tuple(float(f"expert:{expert}" == name) for expert in experts)
    return replace(plan.template, method=plan.space.methods[0], params={}, groups=(Group(weights),))
