"""Searchers that are plug-ins: found by name, and held to what a study rests on while they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import SpecError
from evomerge.searchers import SEARCHERS, make
from evomerge.searchers.base import Told
from evomerge.searchers.lookup import find
from evomerge.searchers.random import RandomSearcher
from evomerge.testing.searchers import make_space

SEARCHER = """
from evomerge import Param, Searcher, keyed_generator


class Mine(Searcher):
    name = "mine"
    params = {"step": Param(float, 0.5, "of each", 0, 1)}

    def needs(self, n):
        return 0

    def ask(self, n):
        return dict(self.starts[0]) if n == 0 else self.space.at([self.options["step"]] * len(self.space.dimensions))

    def tell(self, trial):
        self.last = trial
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SEARCHER)
    return tmp_path


@pytest.mark.parametrize("name", ["mine.py@Mine", "mine.py@mine", "mine.py"])
def test_a_file_s_searcher_proposes(mine: Path, name: str):
    found = find(name, mine)
    assert found.code is not None and len(found.code.sha256) == 64
    space = make_space(experts=2, groups=1)
    searcher = make(found.searcher, space, seed=3, step=0.25)
    assert isinstance(searcher, found.searcher) and searcher.name == "mine" and searcher.seed == 3
    assert searcher.ask(0) == space.initial() and set(searcher.ask(1).values()) == {0.5}
    searcher.tell(Told(0, searcher.ask(0), "complete", 1.0))
    assert searcher.recommend() is None
    with pytest.raises(SpecError, match=r"searcher mine has no option 'stpe'[\s\S]*Did you mean 'step'"):
        make(found.searcher, space, stpe=0.1)


def test_evomerge_s_own_are_found_by_name(tmp_path: Path):
    assert all(find(name, tmp_path).searcher is searcher for name, searcher in SEARCHERS.items())
    assert find("random", tmp_path).searcher is RandomSearcher
    with pytest.raises(SpecError, match=r"no searcher 'radnom'[\s\S]*Did you mean 'random'"):
        find("radnom", tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("class Mine(Searcher)", "class Mine", "must define exactly one searcher, but defines 0"),
        ("    def needs(self, n):\n        return 0\n", "", "must define exactly one searcher, but defines 0"),
        ("from evomerge import", "import nothing_like_it; from evomerge import", "line 2: ModuleNotFoundError"),
        ('Param(float, 0.5, "of each", 0, 1)', "0.5", "the option step must be a Param"),
    ],
)
def test_broken_code_is_refused_with_its_file(mine: Path, before: str, after: str, problem: str):
    assert before in SEARCHER
    (mine / "mine.py").write_text(SEARCHER.replace(before, after))
    with pytest.raises(SpecError, match=problem) as refused:
        find("mine.py", mine)
    assert refused.value.where == str(mine / "mine.py")


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("return 0", "return n + 1", "proposal 0 needs 1 told trials, but there are 0 before it"),
        ("return 0", "return -1", "needs -1 told trials"),
        ("return 0", "return 0.5", r"needs 0\.5 told trials"),
        ("return 0", "return 1 // 0", r"mine.py, line 10: ZeroDivisionError"),
        (
            "return dict(self.starts[0])",
            "return {d.name: 9.0 for d in self.space.dimensions}",
            r"proposed a point that is not in the space: .* must lie in \[0, 2\]",
        ),
        ("return dict(self.starts[0]) if n == 0 else", "return None if n else", "not in the space: it is None"),
        ("return dict(self.starts[0])", "return {'x': 1.0}", "not in the space: .* no dimension 'x'"),
        ("return dict(self.starts[0])", "return self.last", r"mine.py, line 13: AttributeError"),
    ],
)
def test_what_goes_wrong_while_it_runs_is_named(mine: Path, before: str, after: str, problem: str):
    assert before in SEARCHER
    (mine / "mine.py").write_text(SEARCHER.replace(before, after))
    searcher = make(find("mine.py", mine).searcher, make_space(experts=2, groups=1))
    with pytest.raises(SpecError, match=problem) as refused:
        for n in (0, 1, 4):
            searcher.needs(n)
            searcher.ask(n)
    assert "mine.py" in str(refused.value)
