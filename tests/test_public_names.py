"""The public surface: small, listed, documented, and importable without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import evomerge


def test_all_lists_every_public_name_and_each_is_documented():
    assert sorted(evomerge.__all__) == sorted([*evomerge._PUBLIC, "__version__"])
    for name in evomerge._PUBLIC:
        value = getattr(evomerge, name)
        assert value is not None
        if callable(value):
            assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_importing_evomerge_imports_nothing_heavy():
    code = "import sys, evomerge; print([m for m in ('torch', 'ray', 'optuna', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
