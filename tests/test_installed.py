"""Entry points of installed packages: found without being imported, refused by name and package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evomerge import installed
from evomerge.errors import EvaluatorError, MethodError, SpecError
from evomerge.evaluation import EvaluatorContext, FunctionEvaluator, TaskSpec, load_evaluator
from evomerge.losses import find as find_loss
from evomerge.methods.lookup import find, permit
from evomerge.plugins import EVALUATOR, METHOD, SEARCHER
from evomerge.recipe import Recipe
from evomerge.searchers.lookup import find as find_searcher

PACKAGE = {
    "__init__.py": "",
    "merge.py": """
from evomerge import Method

class Half(Method):
    name, summary, reference = "half", "half the sum", "none"

    def combine(self, base, experts, *, weights, dtype, **_):
        return base.to(dtype) + 0.5 * sum(w * (e.to(dtype) - base.to(dtype)) for w, e in zip(weights, experts))

class Bad(Half):
    def combine(self, base, experts, **_):
        return base.add_(1)
""",
    "search.py": """
from evomerge import Searcher

class Still(Searcher):
    def needs(self, n):
        return 0

    def ask(self, n):
        return dict(self.starts[0])

    def tell(self, trial):
        pass
""",
    "loss.py": """
from evomerge import Loss

class Margin(Loss):
    def of(self, mine, expert):
        return -mine.logits.amax(1).mean()
""",
    "score.py": """
def items():
    return [{"task": "one", "text": str(n)} for n in range(9)]

def score(model, tokenizer, items):
    return [1.0] * len(items)
""",
}
POINTS = {
    "methods": {
        "half": "merge:Half",
        "bad": "merge:Bad",
        "gone": "gone:Gone",
        "no": "merge:nothing",
        "word": "score:score",
    },
    "searchers": {"still": "search:Still", "half": "merge:Half"},
    "evaluators": {"ones": "score:score", "number": "merge:__name__"},
    "losses": {"margin": "loss:Margin", "half": "merge:Half"},
}


def install(site: Path, module: str, package: str, points: dict[str, dict[str, str]]) -> None:
    """What pip would leave in ``site``."""
    (site / module).mkdir(parents=True)
    for name, text in PACKAGE.items():
        (site / module / name).write_text(text)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [
        line
        for group, entries in points.items()
        for line in (f"[evomerge.{group}]", *(f"{name} = {module}.{place}" for name, place in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path / "site", "first_plugins", "first-plugins", POINTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("first_plugins", "second_plugins")]:
        del sys.modules[name]


def test_names_are_known_without_importing_anything(site: Path):
    assert {"half", "bad", "gone", "no", "word"} <= set(installed.names(METHOD))
    assert "still" in installed.names(SEARCHER) and "ones" in installed.names(EVALUATOR)
    assert not any(name.startswith("first_plugins") for name in sys.modules)


def test_code_is_known_without_importing_it(site: Path):
    known = installed.code_of(EVALUATOR, "ones")
    assert not any(name.startswith("first_plugins") for name in sys.modules)
    assert installed.load(EVALUATOR, "ones")[1] == known


def test_each_kind_is_found_by_name(site: Path, tmp_path: Path):
    found = find("half")
    assert type(found.method).__name__ == "Half" and found.code is not None
    assert (found.code.package, found.code.path) == ("first-plugins 1.0", "")
    assert find_searcher("still", tmp_path).searcher.name == "Still"
    assert find_loss("margin", tmp_path).loss.name == "Margin"
    evaluator = load_evaluator("ones", EvaluatorContext(tmp_path, {"one": TaskSpec("one")}))
    assert isinstance(evaluator, FunctionEvaluator) and len(evaluator.load()) == 9


def test_the_hash_is_of_all_code_of_the_package(site: Path):
    first = installed.load(METHOD, "half")[1]
    assert installed.load(EVALUATOR, "ones")[1] == first
    (site / "first_plugins" / "score.py").write_text("# another\n")
    assert installed.load(METHOD, "half")[1].sha256 != first.sha256


@pytest.mark.parametrize(
    ("look", "error", "problem"),
    [
        (lambda folder: find("gone"), MethodError, "first-plugins 1.0 .* cannot be loaded: ModuleNotFoundError"),
        (lambda folder: find("no"), MethodError, "first-plugins 1.0 .* cannot be loaded: AttributeError"),
        (lambda folder: find("bad"), MethodError, "first-plugins 1.0: method half wrote into"),
        (lambda folder: find("word"), MethodError, "first-plugins 1.0: a method is an object of a class derived from"),
        (lambda folder: find("hafl"), MethodError, r"no method 'hafl'[\s\S]*Did you mean 'half'"),
        (lambda folder: find_searcher("half", folder), SpecError, "must be a class derived from evomerge.Searcher"),
        (lambda folder: find_searcher("stil", folder), SpecError, r"no searcher 'stil'[\s\S]*Did you mean 'still'"),
        (
            lambda folder: load_evaluator("number", EvaluatorContext(folder, {})),
            EvaluatorError,
            "neither a function nor an Evaluator class",
        ),
        (lambda folder: load_evaluator("one", EvaluatorContext(folder, {})), EvaluatorError, "no installed package"),
        (lambda folder: find_loss("half", folder), SpecError, "must be a class derived from evomerge.Loss"),
        (lambda folder: find_loss("magrin", folder), SpecError, r"no loss 'magrin'[\s\S]*Did you mean 'margin'"),
    ],
    ids=range(11),
)
def test_what_cannot_be_used_is_refused_by_name_and_package(site: Path, tmp_path: Path, look, error, problem: str):
    with pytest.raises(error, match=problem):
        look(tmp_path)
    assert find("half")  # the others stay usable


def test_one_name_twice(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = {"methods": {"half": "merge:Half", "linear": "merge:Half"}, "searchers": {"cma": "search:Still"}}
    install(tmp_path / "more", "second_plugins", "second-plugins", other)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    with pytest.raises(MethodError, match=r"'half' is offered by more than one installed package: .*first-plugins 1.0"):
        find("half")
    with pytest.raises(MethodError, match=r"'linear' is evomerge's own, but the installed package second-plugins 1.0"):
        find("linear")
    with pytest.raises(SpecError, match=r"'cma' is evomerge's own, but the installed package second-plugins 1.0"):
        find_searcher("cma", tmp_path)
    assert find("task_arithmetic").code is None


def test_a_recipe_of_a_package_s_method(site: Path):
    data = {"method": "half", "base": "b", "experts": {"a": "x"}, "weights": 0.5}
    recipe = Recipe.from_dict(data)
    assert not any(name.startswith("first_plugins") for name in sys.modules)
    permitted = permit(recipe)
    assert permitted.code is not None and permitted.to_dict()["code"]["package"] == "first-plugins 1.0"
    assert permit(Recipe.from_dict(permitted.to_dict())) == permitted
    (site / "first_plugins" / "merge.py").write_text(PACKAGE["merge.py"].replace("0.5", "0.4"))
    with pytest.raises(MethodError, match=r"the installed package first-plugins 1.0 has the hash"):
        permit(permitted)


def test_help_imports_nothing_heavy(site: Path):
    code = (
        "import sys; from typer.testing import CliRunner; from evomerge.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'ray', 'optuna', 'first_plugins') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
