"""What this machine has, and whether evomerge can work on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evomerge.progress import size

REQUIRED = ("torch", "transformers", "safetensors", "peft", "optuna", "cma", "ray", "lm-eval", "datasets", "scipy")


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str


def examine() -> list[Check]:
    """All checks; one that raises has failed, with the error as what was found."""
    checks = [_try("python", _python), *(_try(name, _library(name)) for name in REQUIRED)]
    checks += [
        _try("processor", _processor),
        _try("compiled merging", _compiled),
        _try("memory", _memory),
        _try("gpu", _gpu),
    ]
    checks += [_try("store", _store), _try("free disk here", _disk), _try("hash cache", _cache)]
    return checks


def _try(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _python() -> str:
    return platform.python_version()


def _library(name: str) -> Callable[[], str]:
    return lambda: importlib.metadata.version(name)


def _processor() -> str:
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def _compiled() -> str:
    from evomerge.methods.fused import kernels

    if kernels() is None:
        return "no: merges on the CPU take longer, to the same bits (pip install 'evomerge[fast]')"
    return f"numba {importlib.metadata.version('numba')}"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{size(memory.available)} free of {size(memory.total)}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch sees; searches run on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _store() -> str:
    """A SQLite store can be made, written and read in a temporary folder."""
    from evomerge.store import Store

    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'doctor.db'}"
        Store.create(url, "doctor", {"spec": {"name": "doctor"}, "budget": 0})
        names = [summary["name"] for summary in Store.names(url)]
        if names != ["doctor"]:
            raise RuntimeError(f"wrote a study and read back {names}")
    return "SQLite stores can be written and read"


def _disk() -> str:
    return size(shutil.disk_usage(Path.cwd()).free)


def _cache() -> str:
    from evomerge.checkpoints import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return f"{folder} can be written"
