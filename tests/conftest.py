"""Settings and families that all tests share.

The environment is set here, on import, because transformers, datasets and tokenizers read theirs when they are imported
themselves. Processes that a test starts inherit it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A short path: Unix sockets (Ray, PostgreSQL) below it must stay under 108 bytes.
SESSION = Path(tempfile.mkdtemp(prefix="evomerge-"))
# The processes of one run (pytest -n 2) share what evomerge keeps by its content. Compiled loops, which are kept by the
# source of all of them, outlive the run: making them takes longer than most tests.
if "PYTEST_XDIST_WORKER" in os.environ:
    CACHE = Path(os.environ["EVOMERGE_CACHE"])
else:
    CACHE = SESSION / "evomerge"
    LOOPS = Path(__file__).parents[1] / ".pytest_cache" / "loops"
    LOOPS.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir()
    (CACHE / "loops").symlink_to(LOOPS)

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=str(SESSION / "huggingface"),
    XDG_CACHE_HOME=str(SESSION / "cache"),
    EVOMERGE_CACHE=str(CACHE),
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
    OMP_NUM_THREADS="1",  # sums depend on it; and the cores are shared with the processes that tests start
    MKL_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    COLUMNS="200",  # rich wraps by the terminal's width, which would break lines that tests look for
    NO_COLOR="1",
)
for name in ("RAY_ADDRESS", "EVOMERGE_STORAGE", "FORCE_COLOR"):
    os.environ.pop(name, None)


def pytest_configure(config: pytest.Config) -> None:
    import hypothesis

    quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings.register_profile("local", deadline=None, max_examples=30, suppress_health_check=quiet)
    hypothesis.settings.register_profile(
        "ci", deadline=None, max_examples=30, derandomize=True, database=None, suppress_health_check=quiet
    )
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when they are asked for: by ``-m slow``, or by name (``pytest tests/x.py::test_y``)."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


RAY = re.compile(r"test_cluster\.py|[\W_]ray(?![a-z])", re.IGNORECASE)  # tests that start Ray say so in their names


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``-n 2 --dist loadfile`` keeps files together, and all tests that start Ray: there is one Ray at a time."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "Ray" if RAY.search(nodeid) else super()._split_scope(nodeid)

    return OneRay(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(SESSION, ignore_errors=True)


@pytest.fixture(scope="session")
def lora_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` (a tiny Llama) with LoRA experts ``expert0`` and ``expert1``. Shared: do not write into it."""
    from evomerge.testing import tiny

    return tiny.make_family(tmp_path_factory.mktemp("lora"), experts=2, kind="lora")


@pytest.fixture(scope="session")
def dense_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` (a tiny Llama) with dense experts ``expert0`` and ``expert1``. Shared: do not write into it."""
    from evomerge.testing import tiny

    return tiny.make_family(tmp_path_factory.mktemp("dense"), experts=2, kind="dense")


@pytest.fixture(scope="session")
def moe_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` (a tiny Mixtral) with dense experts ``expert0`` and ``expert1``. Shared: do not write into it."""
    from evomerge.testing import tiny

    folder = tmp_path_factory.mktemp("moe")
    base = tiny.save_model(folder / "base", tiny.mixtral_config(), seed=0)
    for t in range(2):
        tiny.save_dense_expert(base, folder / f"expert{t}", seed=t + 1)
    return folder


@pytest.fixture
def experiment(lora_family: Path, tmp_path: Path) -> Callable[..., Path]:
    """``experiment(family=lora_family, **keys)`` writes a fresh copy of a family with its experiment.yaml.

    Returns the path of the experiment file. ``keys`` replace top-level keys of ``tiny.write_experiment``.
    """
    from evomerge.testing import tiny

    def make(family: Path = lora_family, *, folder: str = "experiment", **keys) -> Path:
        shutil.copytree(family, tmp_path / folder)
        return tiny.write_experiment(tmp_path / folder, **keys)

    return make
