"""The other tools, in a virtual environment of their own: made once, asked for one merge at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("mergekit==0.1.5", "fusion-bench==0.2.33")
SCRIPTS = Path(__file__).parents[1] / "peers"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
SHARED = ("accelerate", "datasets", "huggingface_hub", "numpy", "peft", "safetensors", "scipy", "tokenizers", "torch",
          "transformers")  # fmt: skip  # of the same version on both sides


def cache_folder() -> Path:
    """Where the peers and the random checkpoints are kept: outside of the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evomerge-benchmarks"


class Peers:
    """The peers' Python. ``problems`` says, by package, why it could not be run."""

    def __init__(self, folder: Path, threads: int = 1):
        self.python, self.threads = folder / "bin" / "python", threads
        self.problems: dict[str, str] = {}
        if not (folder / ".installed").exists() and not self._imports("mergekit"):
            self._install(folder)
        self.problems |= {p: "it cannot be imported" for p in ("mergekit", "fusion_bench") if not self._imports(p)}

    def _imports(self, module: str) -> bool:
        if not self.python.exists():
            return False
        return not subprocess.run([self.python, "-c", f"import {module}"], capture_output=True, check=False).returncode

    def _install(self, folder: Path) -> None:
        """torch first and alone, in the version that evomerge has: pip is never left to choose one."""
        print(f"installing {' and '.join(PACKAGES)} into {folder} (once)", file=sys.stderr, flush=True)
        pins = [line for line in CONSTRAINTS.read_text().splitlines() if line.partition("==")[0] in SHARED]
        torch = next(pin for pin in pins if pin.startswith("torch=="))
        limits = folder / "constraints.txt"
        steps = ["-m", "venv", folder], ["-m", "pip", "install", "-q", torch]
        subprocess.run([sys.executable, *steps[0]], check=True)
        limits.write_text("\n".join(pins))
        subprocess.run([self.python, *steps[1]], check=True)
        for package in PACKAGES:
            done = subprocess.run([self.python, "-m", "pip", "install", "-q", "-c", limits, package], check=False)
            if done.returncode:
                print(f"{package} could not be installed", file=sys.stderr)
        (folder / ".installed").touch()

    def run(self, script: str, task: dict[str, Any]) -> dict[str, Any] | None:
        """What the script prints, or None where it fails: ``problems`` has the reason then."""
        return run_script(self.python, SCRIPTS / script, {**task, "threads": self.threads}, self.problems)


def run_script(python: Path | str, script: Path, task: dict[str, Any], problems: dict[str, str]) -> Any:
    """The last line of a script's output, as JSON; None where it fails, with its last words in ``problems``."""
    threads = str(task["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(CONSTRAINTS.parent) if script.parent != SCRIPTS else ""
    done = subprocess.run(
        [python, script, json.dumps(task)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        problems[f"{script.stem} {task.get('what', '')}".strip()] = words
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def mergekit_config(method: str, base: Path, experts: list[Path], weights: list[float], params: dict[str, Any]) -> Any:
    """mergekit's configuration of the same merge. ``params`` under evomerge's names; what mergekit calls otherwise is
    translated."""
    names = {"t": "t", "density": "density", "gamma": "gamma", "epsilon": "epsilon", "select_topk": "select_topk"}
    own = {names[key]: value for key, value in params.items() if key in names}
    each = {key: own.pop(key) for key in ("density", "gamma", "epsilon") if key in own}
    if method == "sce":
        weights = [1.0] * len(experts)
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(path), "parameters": {"weight": weight, **each}}
            for path, weight in zip(experts, weights, strict=True)
        ],
        "parameters": own,
        "dtype": "bfloat16",
    }
    if method == "slerp":
        config["base_model"] = str(experts[0])
        config["models"] = [{"model": str(path)} for path in experts]
    elif method != "linear":
        config["base_model"] = str(base)
    return config
