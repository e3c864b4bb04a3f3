"""What ``evomerge methods`` prints."""

from __future__ import annotations

import re

import pytest

from evomerge.errors import MethodError
from evomerge.methods import METHODS
from evomerge.methods_text import show_method, show_methods


def test_statistics_say_where_they_come_from():
    assert "gram, by evomerge collect" in show_method("regmean")
    for name, kind in {"adarank": "components", "columns": "columns", "concrete": "entries"}.items():
        text = " ".join(show_method(name).split())
        assert f"{kind}, which the searcher {name} learns" in text and "evomerge collect" not in text


@pytest.mark.parametrize("columns", [80, 100])
def test_every_method_is_listed_and_shown_with_each_parameter(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    listing = show_methods()
    for name, method in METHODS.items():
        assert re.search(rf"^{name} ", listing, re.MULTILINE)
        text = show_method(name)
        assert method.reference in " ".join(text.split())
        assert all(f"\n{key} " in text for key in (*method.params, "weights"))
        starts = {len(line) - len(line.lstrip()) for line in text.splitlines()[2:] if line.startswith(" ")}
        assert len(starts) == 1  # one column, whatever the parameters are called
        assert max(map(len, [*text.splitlines(), *listing.splitlines()])) <= columns
    with pytest.raises(MethodError, match="slurp") as caught:
        show_method("slurp")
    assert "Did you mean 'slerp'?" in str(caught.value)
