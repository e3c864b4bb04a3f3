"""Methods that are plug-ins: found by name, and run on the user's word alone."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evomerge import Method, merge_state_dicts
from evomerge.errors import MethodError, SpecError, UserError
from evomerge.methods import METHODS
from evomerge.methods.lookup import find, load_codes, method_of, permit
from evomerge.plugins import Code
from evomerge.recipe import Group, Recipe, Source
from evomerge.space import Space
from evomerge.spec import Spec

HALF = """
from pathlib import Path
from evomerge import Method, Param

Path(__file__).with_name("ran").touch()


class Half(Method):
    name, summary, reference = "half", "half of the sum of the task vectors", "none"
    params = {"share": Param(float, 0.5, "what multiplies it", 0, 1)}

    def combine(self, base, experts, *, weights, dtype, share, **_):
        return base.to(dtype) + share * sum(w * (e.to(dtype) - base.to(dtype)) for w, e in zip(weights, experts))
"""


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A file with a method that leaves a file ``ran`` behind. Its own text: what other tests ran does not count."""
    file = tmp_path / "half.py"
    file.write_text(f"# {tmp_path}\n{HALF}")
    return file


def ran(file: Path) -> bool:
    return file.with_name("ran").exists()


def recipe_data(method: str = "half.py@Half", **changes) -> dict:
    return {"method": method, "base": "b", "experts": {"a": "x", "c": "y"}, "weights": {"a": 1.0, "c": 0.5}, **changes}


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["half.py@Half", "half.py@half", "half.py", "./half.py@Half"])
def test_a_file_s_method_merges(half: Path, name: str):
    found = find(name, half.parent)
    assert found.code is not None and found.code.path == str(half)
    base, expert = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    merged = merge_state_dicts(found.method, base, [expert, expert], weights=[1.0, 0.5], share=0.25)
    assert torch.equal(merged["w"], torch.full((3,), 0.375))
    assert find(name, half.parent).method is found.method  # not run again


def test_what_runs_is_what_the_file_says_now(half: Path):
    """Two versions of one length within one second: a compiled file of Python's could not tell them apart."""
    base, expert = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    for share in (0.5, 0.4, 0.3):
        half.write_text(HALF.replace("0.5,", f"{share},"))
        method = find("half.py", half.parent).method
        assert merge_state_dicts(method, base, [expert], weights=[1.0])["w"].item() == pytest.approx(share)


def test_code_is_what_the_file_imports_too(half: Path):
    half.write_text("import beside_half\nfrom pack_half.inner import x\n" + HALF)
    (half.parent / "beside_half.py").write_text("N = 1\n")
    (half.parent / "pack_half").mkdir()
    (half.parent / "pack_half" / "__init__.py").touch()
    (half.parent / "pack_half" / "inner.py").write_text("x = 1\n")
    try:
        seen = {find("half.py", half.parent).code}
        for file in ("beside_half.py", "pack_half/inner.py"):
            (half.parent / file).write_text("N = x = 2\n")
            seen.add(find("half.py", half.parent).code)
        assert len(seen) == 3
    finally:
        for name in ("beside_half", "pack_half", "pack_half.inner"):
            sys.modules.pop(name, None)


CLASS = "from evomerge import Method, Param\nclass M(Method):\n    name, summary, reference = 'm', 's', 'r'\n"
COMBINE = "    def combine(self, base, experts, *, dtype, **_):\n        return "


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = (", "line 1: SyntaxError"),
        ("\nimport not_a_module", "broken.py, line 2: ModuleNotFoundError"),
        ("\nimport sys; sys.exit(0)", "broken.py, line 2: SystemExit: 0"),
        ("x = 1", "must define exactly one method, but defines 0"),
        (CLASS, "must define exactly one method, but defines 0"),  # combine is missing
        (CLASS + COMBINE + "base.add_(1)", "wrote into the base or an expert"),
        (CLASS + COMBINE + "base.to(dtype)[0]", r"gave \(4,\) in torch.float32 for probe.weight, which is \(6, 4\)"),
        (CLASS + COMBINE + "1 / 0", "broken.py, line 5: ZeroDivisionError"),
        (CLASS.replace("'s'", "None") + COMBINE + "base + 0", "must say its summary"),
        (CLASS + "    params = {'x': 1}\n" + COMBINE + "base + 0", "the parameter x must be a Param"),
        (CLASS + "    params = {'x': Param(float, 2.0, '', 0, 1)}\n" + COMBINE + "base + 0", "legal range"),
        (CLASS + "    def __init__(self):\n        raise KeyError('k')\n" + COMBINE + "base + 0", "line 5: KeyError"),
    ],
)
def test_broken_code_is_refused_with_its_file(tmp_path: Path, text: str, problem: str):
    (tmp_path / "broken.py").write_text(text + "\n")
    with pytest.raises(MethodError, match=problem) as refused:
        find("broken.py", tmp_path)
    assert refused.value.where == str(tmp_path / "broken.py")


def test_names_that_are_not_there(half: Path):
    with pytest.raises(MethodError, match=r"'Hafl' is not there[\s\S]*Did you mean 'Half'"):
        find("half.py@Hafl", half.parent)
    with pytest.raises(MethodError, match="'Path' is not a Method class"):
        find("half.py@Path", half.parent)
    with pytest.raises(MethodError, match=r"there is no file 'other\.py'"):
        find("other.py@Half", half.parent)
    with pytest.raises(MethodError, match=r"no method 'teis'[\s\S]*Did you mean 'ties'"):
        find("teis", half.parent)


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_reading_a_recipe_runs_nothing(half: Path):
    file = half.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe_data(params={"share": 0.3})))
    recipe = Recipe.load(file)
    assert recipe.code == Code(path=str(half))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    _ = recipe.hash, recipe.to_yaml()
    for refuse in (lambda: method_of(recipe), lambda: permit(recipe)):
        with pytest.raises(MethodError, match=r"half.py@Half is code of .*half.py, and a recipe cannot make it run"):
            refuse()
    assert not ran(half)
    permitted = permit(recipe, allow=True)
    assert ran(half)
    assert permitted.params == {"share": 0.3} and permitted.code is not None and len(permitted.code.sha256) == 64
    assert type(method_of(permitted)).__name__ == "Half"
    # Its word holds for what was read, not for the file.
    half.write_text(half.read_text() + "# changed\n")
    half.with_name("ran").unlink()
    with pytest.raises(MethodError, match="a recipe cannot make it run"):
        permit(recipe)
    with pytest.raises(MethodError, match="but the recipe was made with"):
        permit(replace(permitted, code=replace(permitted.code, sha256="0" * 64)), allow=True)
    assert not ran(half)


def test_a_stage_s_code_needs_the_word_as_well(half: Path):
    (half.parent / "stage.yaml").write_text(json.dumps(recipe_data()))
    (half.parent / "whole.yaml").write_text(json.dumps(recipe_data("linear", experts={"a": "stage.yaml", "c": "y"})))
    recipe = Recipe.load(half.parent / "whole.yaml")
    with pytest.raises(MethodError, match="a recipe cannot make it run"):
        permit(recipe)
    assert not ran(half)
    stage = permit(recipe, allow=True).experts[0].recipe
    assert stage is not None and stage.params == {"share": 0.5}


def test_the_hash_is_of_the_code_not_of_its_place(half: Path):
    moved = half.parent / "elsewhere"
    moved.mkdir()
    shutil.copy(half, moved / "other.py")
    hashes = set()
    for folder, name in ((half.parent, "half.py@Half"), (moved, "other.py@Half")):
        (folder / "recipe.yaml").write_text(json.dumps(recipe_data(name)))
        hashes.add(permit(Recipe.load(folder / "recipe.yaml"), allow=True).hash)
    assert len(hashes) == 1
    (moved / "other.py").write_text(half.read_text() + "# another\n")
    hashes.add(permit(Recipe.load(moved / "recipe.yaml"), allow=True).hash)
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"params": {"shrae": 0.1}}, "no parameter 'shrae'"),
        ({"params": {"share": 7}}, "outside its legal range"),
        ({"base": None}, "there is no base"),
    ],
    ids=str,
)
def test_a_permitted_recipe_is_checked_by_its_method(half: Path, changes: dict, problem: str):
    (half.parent / "recipe.yaml").write_text(json.dumps(recipe_data(**changes)))
    with pytest.raises(MethodError, match=problem):
        permit(Recipe.load(half.parent / "recipe.yaml"), allow=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "ties", "code": {"path": "half.py"}}, "ties is evomerge's own"),
        ({"code": {"package": "x 1.0"}}, "no 'package' here"),
        ({"method": "half", "code": {"path": "half.py"}}, "no 'path' here"),
        ({"method": "half"}, "there is no method 'half'"),
        ({"code": ["half.py"]}, "must be a table"),
        ({"code": {"path": 3}}, "must be a table"),
        ({"params": {"share": [1]}}, "must be a number, a word"),
        ({"weights": {"a": "1", "c": 1}}, "finite number"),
        ({"method": ["ties"]}, "must be a method's name"),
        ({"method": None}, "must be a method's name"),
    ],
    ids=str,
)
def test_odd_recipes_are_refused_without_running_anything(half: Path, changes: dict, problem: str):
    (half.parent / "recipe.yaml").write_text(json.dumps(recipe_data() | changes))
    with pytest.raises(UserError, match=problem):
        Recipe.load(half.parent / "recipe.yaml")
    assert not ran(half)


def test_a_worker_refuses_other_code_than_the_study_s(half: Path):
    code = find("half.py@Half", half.parent).code
    assert code is not None
    load_codes({"half.py@Half": code.to_dict()})
    half.write_text(half.read_text() + "# another machine's\n")
    with pytest.raises(MethodError, match="has the hash"):
        load_codes({"half.py@Half": {**code.to_dict(), "sha256": "1" * 64}})
    half.unlink()
    with pytest.raises(MethodError, match="is not there"):
        load_codes({"half.py@Half": {**code.to_dict(), "sha256": "1" * 64}})


# --- spaces -----------------------------------------------------------------------------------------------------------


def space_data(method) -> dict:
    return {"method": method, "weights": {"granularity": "task", "range": [0, 2], "initial": 1.0}}


def make(method, half: Path, **changes) -> Space:
    template = Recipe(
        Source("base", "b", "0"), (Source("a", "x", "1"), Source("c", "y", "2")), "linear", (Group((0, 0)),)
    )
    return Space.from_dict(space_data(method) | changes, template=template, num_layers=2, folder=half.parent)


def test_a_space_of_a_file_s_method(half: Path):
    space = make("half.py@Half", half, params={"share": {"range": [0.1, 0.9]}})
    assert [d.name for d in space.dimensions] == ["share", "a", "c"]
    recipe = space.decode(space.initial())
    assert recipe.method == "half.py@Half" and recipe.code is not None and recipe.code.sha256
    assert space.encode(recipe) == space.initial()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_one_of_several_methods(half: Path):
    space = make({"choices": ["ties", "half.py@Half"]}, half, params={"half.py@Half": {"share": {"range": [0.1, 0.9]}}})
    assert [d.name for d in space.dimensions] == ["method", "half.py@Half.share", "a", "c"]
    own = space.decode(space.initial())
    assert (own.method, own.code) == ("ties", None)
    point = {"method": "half.py@Half", "half.py@Half.share": 0.2, "a": 1.0, "c": 1.0}
    plugged = space.decode(point)
    assert plugged.params == {"share": 0.2} and plugged.code is not None
    assert space.encode(plugged) == point


def test_a_space_file_runs_nothing(half: Path, lora_family: Path, tmp_path: Path):
    (tmp_path / "space.yaml").write_text(json.dumps(space_data("half.py@Half")))
    (tmp_path / "score.py").write_text("")
    data = {
        "name": "x",
        "base": str(lora_family / "base"),
        "experts": {"a": str(lora_family / "expert0"), "c": str(lora_family / "expert1")},
        "space": "space.yaml",
        "search": {"method": "random"},
        "evaluate": {"with": "score.py@s", "tasks": {"t": {}}, "split": {"search": 1, "select": 1, "test": 1}},
    }
    with pytest.raises(SpecError, match="only an experiment file itself can name code") as refused:
        Spec.from_dict(data, tmp_path)
    assert "space.yaml" in str(refused.value) and not ran(half)
    Spec.from_dict(data | {"space": space_data("half.py@Half")}, tmp_path)
    assert ran(half)


def test_a_method_s_own_numbers_are_checked_in_a_space(half: Path):
    for changes, problem in [
        ({"params": {"shrae": 0.1}}, r"no parameter 'shrae'[\s\S]*Did you mean 'share'"),
        ({"params": {"share": {"range": [0, 7]}}}, "outside its legal range"),
    ]:
        with pytest.raises(SpecError, match=problem):
            make("half.py@Half", half, **changes)
    with pytest.raises(SpecError, match=r"method: .*broken.py: .*ZeroDivisionError"):
        (half.parent / "broken.py").write_text(CLASS + COMBINE + "1 / 0\n")
        make("broken.py", half)


def test_our_own_methods_pass_the_checks_of_plug_ins():
    from evomerge.methods.lookup import check_method

    for method in METHODS.values():
        check_method(method)
        assert isinstance(method, Method)
