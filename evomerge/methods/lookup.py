"""Merge methods by name: evomerge's own, those of installed packages, and those of a user's files.

Reading a recipe or a space never runs the file that it names. A file's code runs on the user's word alone: because the
experiment file itself names it, or by ``--allow-code``. What has run once in this process is found again by the hash of
its code, wherever a recipe says that it lies.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evomerge import installed
from evomerge.errors import MethodError, nearest
from evomerge.methods import METHODS
from evomerge.methods.base import LowRank, Method, TensorInfo, check_experts, check_params, check_weights
from evomerge.methods.statistics import example_statistics, how_to_collect
from evomerge.params import Param
from evomerge.plugins import (
    METHOD,
    Code,
    code_files,
    code_hash,
    find_file,
    load_module,
    names_file,
    pick,
    run_user_code,
    split_reference,
)

if TYPE_CHECKING:
    from evomerge.recipe import Group, Recipe

_loaded: dict[tuple[str, str], Method] = {}  # (hash of its code, name in its file or package) -> method


@dataclass(frozen=True)
class Found:
    """A method, and its code if that is not evomerge's own."""

    method: Method
    code: Code | None = None


def find(name: str, folder: Path | None = None) -> Found:
    """The method that a user named: one of evomerge's own, of an installed package, or ``file.py@name``.

    Args:
        folder: what a file is relative to. Its code runs. None: whoever names it here may not make it run.

    Raises:
        MethodError: there is none, its code fails, or it breaks a rule of methods.
    """
    if names_file(name):
        if folder is None:
            raise MethodError(
                f"method {name} is a file's, and only an experiment file itself can name code that is to run",
                remedy="Write the space into the experiment file (space: {method: ...}) instead of naming its file.",
            )
        return _from_file(name, find_file(name, folder, METHOD))
    installed.refuse_clash(METHOD, name, METHODS)
    if name in METHODS:
        return Found(METHODS[name])
    others = installed.names(METHOD)
    if name not in others:
        raise MethodError(f"there is no method {name!r}", remedy=nearest(name, [*METHODS, *others]))
    return _installed(name)


def method_of(recipe: Recipe, group: Group | None = None) -> Method:
    """The method of a recipe's group, or that of all groups with none of their own.

    Raises:
        MethodError: there is none, or its code has not run in this process and may not by itself.
    """
    name, code = (recipe.method, recipe.code) if group is None else recipe.method_of(group)
    if code is None:
        if name not in METHODS:
            raise MethodError(f"there is no method {name!r}", remedy=nearest(name, METHODS))
        return METHODS[name]
    return _permitted(name, code, allow=False).method


def permit(recipe: Recipe, *, allow: bool = False) -> Recipe:
    """``recipe`` ready to be merged: the code of its methods, and of its stages', is there, and all numbers checked.

    Args:
        allow: run the file that the recipe names.

    Returns the recipe with the hash of the code and all parameters of its methods filled in. Raises MethodError if a
    file's code may not run, is not there, or is not what the recipe was made with, or needs statistics that the recipe
    does not name.
    """

    def stage(source: Any) -> Any:
        if source is None or source.recipe is None:
            return source
        return replace(source, recipe=permit(source.recipe, allow=allow))

    recipe = replace(recipe, base=stage(recipe.base), experts=tuple(stage(source) for source in recipe.experts))
    if recipe.code is None and all(group.code is None for group in recipe.groups):
        return recipe

    def found(name: str, code: Code | None) -> Found:
        if code is None:
            return Found(METHODS[name])
        foreign = _permitted(name, code, allow=allow)
        check_experts(foreign.method, recipe.base is not None, len(recipe.experts))
        kind = foreign.method.statistics
        if kind is not None and recipe.statistics is None:
            raise MethodError(
                f"method {name} needs statistics of each expert ({kind}), but the recipe names none",
                remedy=how_to_collect(kind),
            )
        return foreign

    top = found(recipe.method, recipe.code)
    params = check_params(recipe.method, top.method, recipe.params)
    groups = []
    for group in recipe.groups:
        name, code = recipe.method_of(group)
        own = top if group.method is None else found(name, code)
        check_weights(own.method, group.weights, len(recipe.experts))
        checked = check_params(name, own.method, recipe.params_of(group))
        if group.method is None:
            checked = {key: checked[key] for key in group.params}
        groups.append(replace(group, params=checked, code=None if group.method is None else own.code))
    return replace(recipe, code=top.code, params=params, groups=tuple(groups))


def load_codes(codes: Mapping[str, Mapping[str, str]]) -> None:
    """In a worker: run the code of the study's methods, by what names them in its recipes.

    Raises:
        MethodError: it is not on this machine, or says something else here.
    """
    for name, code in codes.items():
        _permitted(name, Code(**code), allow=True)


def _permitted(name: str, code: Code, *, allow: bool) -> Found:
    """The method whose code a recipe names, if that code may run and says what the recipe was made with."""
    if not code.path:
        found = _installed(name)
        _check_same(name, code, found.code)
        return found
    key = split_reference(name)[1]
    if (code.sha256, key) in _loaded:
        return Found(_loaded[code.sha256, key], code)
    path = Path(code.path)
    if not path.is_file():
        raise MethodError(
            f"the code of method {name} is not there: {path}",
            remedy="Restore the file, or give its place as code.path.",
        )
    now = replace(code, sha256=code_hash(code_files(path), path.parent))
    _check_same(name, code, now)
    if (now.sha256, key) in _loaded:
        return Found(_loaded[now.sha256, key], now)
    if not allow:
        raise MethodError(
            f"method {name} is code of {path}, and a recipe cannot make it run",
            remedy="Read that file. If you trust it, say --allow-code, or give the experiment file that names it.",
        )
    return _from_file(name, path)


def _check_same(name: str, wanted: Code, now: Code | None) -> None:
    assert now is not None
    if wanted.sha256 and wanted.sha256 != now.sha256:
        place = now.path or f"the installed package {now.package}"
        was = f" of {wanted.package}" if wanted.package else ""
        raise MethodError(
            f"the code of method {name} in {place} has the hash {now.sha256}, but the recipe was made with "
            f"{wanted.sha256}{was}",
            remedy="Restore it, or take the sha256 out of the recipe's code to merge by what is there now.",
        )


def _from_file(name: str, path: Path) -> Found:
    """The method that ``name`` (``file.py@method``) names in the file at ``path``, whose code runs."""
    code = Code(path=str(path), sha256=code_hash(code_files(path), path.parent))
    key = code.sha256, split_reference(name)[1]
    if key not in _loaded:
        found = pick(load_module(path, METHOD), key[1], _is_method, path, METHOD, "a Method class")
        method = run_user_code(found, path, METHOD) if isinstance(found, type) else found
        try:
            run_user_code(lambda: check_method(method), path, METHOD)
        except MethodError as error:
            raise MethodError(error.problem, where=error.where or str(path), remedy=error.remedy) from error
        _loaded[key] = method
    return Found(_loaded[key], code)


def _installed(name: str) -> Found:
    found, code = installed.load(METHOD, name)
    key = code.sha256, name
    if key not in _loaded:
        try:
            method = found() if isinstance(found, type) else found
            check_method(method)
        except Exception as error:
            problem = error.problem if isinstance(error, MethodError) else f"{type(error).__name__}: {error}"
            raise MethodError(f"method {name} of the installed package {code.package}: {problem}") from error
        _loaded[key] = method
    return Found(_loaded[key], code)


def _is_method(value: Any) -> bool:
    return isinstance(value, Method) or (
        isinstance(value, type) and issubclass(value, Method) and not inspect.isabstract(value)
    )


def check_method(method: Any) -> None:
    """The rules that a plug-in can be held to at once: what it declares, and one merge of small random tensors (and
    statistics, if it needs any).

    Raises:
        MethodError: names the rule. (``testing.methods.MethodContract`` looks at much more.)
    """
    if not isinstance(method, Method):
        raise MethodError(
            f"a method is an object of a class derived from evomerge.Method, but this is {method!r:.80}",
            remedy="Write class Mine(Method): with name, summary, reference and combine.",
        )
    who = type(method).__name__
    for key in ("name", "summary", "reference"):
        if not isinstance(getattr(method, key, None), str):
            raise MethodError(f"{who} must say its {key}, as text", remedy=f"Write {key} = ... in the class.")
    for key, param in {**method.params, "weight": method.weight}.items():
        if not isinstance(param, Param):
            raise MethodError(f"{who}: the parameter {key} must be a Param, but is {param!r:.80}")
        param.check(key, param.default, f"the default of method {method.name}")
    fewest, most = method.num_experts
    count = max(fewest, 2 if most is None else min(2, most))
    generator = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(6, 4, generator=generator) for _ in range(count + 1))
    if method.needs_factors:
        experts = [LowRank(expert[:, :2], expert[:2], 1.0) for expert in experts]
    info, params = TensorInfo("probe.weight", shape=(6, 4)), check_params(method.name, method, {})
    statistics = example_statistics(method.statistics, {info.name: info.shape}, count)
    state = method.prepare([(info, base, experts)], statistics, **params)
    weights = [method.weight.default] * count
    method.merge(base, experts, weights=weights, info=info, state=state, **params)
