"""The measurements, a function a table: each returns rows of {method or shape, quantity, seconds of every round}."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.merging import Merger, load_resident, open_sources
from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo, check_params
from evomerge.methods.chunks import merge_into
from evomerge.recipe import Recipe
from merging.family import SIZES, make_tensors, write_family, write_many
from merging.peers import Peers, mergekit_config, run_script

EXPERTS = 3
WEIGHTS, OTHER_WEIGHTS = [0.3, 0.4, 0.5], [0.35, 0.3, 0.45]
PARAMS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "sce": {"select_topk": 0.1},
}
RANDOM = ("dare_ties", "della")
# wudi's 300 steps take the other side minutes a matrix; in 100 what comes before them weighs three times as much.
MATRIX_METHODS = {"wudi": {"steps": 100, "matrices": "all"}, "tsv_m": {}, "iso_c": {}}
MATRIX_EXPERTS = 4
BASE_SHAPES = [(768, 768), (3072, 768), (768, 3072)]  # of BERT's, GPT-2's and ViT's base models
OURS = Path(__file__).parent / "evomerge_merge.py"
Rows = list[dict[str, Any]]


@dataclass
class Setting:
    size: str
    rounds: int
    threads: int
    methods: list[str]
    cache: Path
    folder: Path  # for what is thrown away
    peers: Peers | None
    keep: Callable[[str, Rows], None]  # takes what has been measured so far, by the part's name

    def family(self) -> list[Path]:
        return write_family(self.cache, self.size, num_experts=EXPERTS, dtype="bfloat16")


class Clock:
    """CPU seconds by (what, quantity), in the order of the rounds; says on standard error what it does."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[float]] = {}
        self.facts: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, what: str, quantity: str, seconds: float, **facts: Any) -> None:
        self.rows.setdefault((what, quantity), []).append(seconds)
        self.facts.setdefault((what, quantity), {}).update(facts)
        print(f"  {what:20} {quantity:14} {seconds:9.3f} s", file=sys.stderr, flush=True)

    @contextmanager
    def time(self, what: str, quantity: str, **facts: Any) -> Iterator[None]:
        began = time.process_time()
        yield
        self.add(what, quantity, time.process_time() - began, **facts)

    def all(self) -> Rows:
        return [
            {"what": what, "quantity": quantity, "seconds": seconds, **self.facts[what, quantity]}
            for (what, quantity), seconds in self.rows.items()
        ]


def merge(setting: Setting) -> Rows:
    """Whole merges to disk beside mergekit's, then into a resident model: the first and the next candidate.

    Every method is a part of its own, kept in every round when it is done.
    """
    base, *experts = setting.family()
    known = [name for name in setting.methods if name in METHODS]
    model = load_resident(base, auto_class="AutoModelForCausalLM", compute_dtype="bfloat16")
    clocks = {name: Clock() for name in known}
    _warm_up(setting, known)
    for _ in range(setting.rounds):
        floors = Clock()
        _floors(floors, [base, *experts], setting.folder)
        for name, clock in clocks.items():
            for row in floors.all():
                clock.rows.setdefault((row["what"], row["quantity"]), []).extend(row["seconds"])
                clock.facts[row["what"], row["quantity"]] = {}
            taken = experts[: METHODS[name].num_experts[1]]
            for quantity, durable in (("stream", False), ("stream, synced and hashed", True)):
                with _gone(setting.folder / "ours") as out, clock.time(name, quantity):
                    recipe = _recipe(name, base, taken)
                    Merger(open_sources(recipe)).stream(recipe, out, durable=durable)
            merger = Merger(open_sources(_recipe(name, base, taken)), fixed_params={name: PARAMS[name]})
            for quantity, weights in (("first candidate", WEIGHTS), ("next candidate", OTHER_WEIGHTS)):
                recipe = _recipe(name, base, taken, weights)
                with clock.time(name, quantity):
                    merger.into(model, recipe)
            if setting.peers is not None:
                _mergekit(clock, setting, name, base, taken)
            setting.keep(f"merge {name}", clock.all())
    return []


def _warm_up(setting: Setting, methods: list[str]) -> None:
    """Machine code is made (at its first use ever) and loaded; files lie in the page cache."""
    for folder in setting.family():
        (folder / "model.safetensors").read_bytes()
    tiny, *experts = write_family(setting.cache, "tiny", num_experts=EXPERTS, dtype="bfloat16")
    for name in methods:
        recipe = _recipe(name, tiny, experts[: METHODS[name].num_experts[1]])
        with _gone(setting.folder / "tiny") as out:
            Merger(open_sources(recipe), fixed_params={}).stream(recipe, out)


def _mergekit(clock: Clock, setting: Setting, name: str, base: Path, experts: list[Path]) -> None:
    assert setting.peers is not None
    config = mergekit_config(name, base, experts, WEIGHTS[: len(experts)], PARAMS[name])
    out = setting.folder / "mergekit"
    with _gone(out):
        cost = setting.peers.run("mergekit_merge.py", {"config": config, "out": str(out), "what": name})
    if cost is not None:
        clock.add(name, "mergekit", cost["seconds"], peak=cost["peak_bytes"])


def _floors(clock: Clock, folders: list[Path], scratch: Path) -> None:
    """Copying one checkpoint in memory; reading one, writing one as files; a draw for each entry of one."""
    tensors = load_file(folders[0] / "model.safetensors")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # pages that have been touched, on both sides
    size = sum(tensor.nbytes for tensor in tensors.values())
    with clock.time("floor", "copy", bytes=size):
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)
    buffer = bytearray(8 << 20)
    view = memoryview(buffer)
    with clock.time("floor", "read"), (folders[1] / "model.safetensors").open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    with clock.time("floor", "write"), (scratch / "floor").open("wb", buffering=0) as file:
        for start in range(0, size, len(view)):
            file.write(view[: size - start])
    (scratch / "floor").unlink()
    generator, out = np.random.Generator(np.random.SFC64(0)), np.empty(1 << 16, np.float32)
    with clock.time("floor", "draws"):
        for _ in range(sum(tensor.numel() for tensor in tensors.values()) >> 16):
            generator.random(dtype=np.float32, out=out)


def _recipe(name: str, base: Path, experts: list[Path], weights: list[float] = WEIGHTS) -> Recipe:
    data = {
        "base": str(base),
        "experts": {f"expert{t}": str(path) for t, path in enumerate(experts)},
        "method": name,
        "params": PARAMS[name],
        "weights": weights[: len(experts)],
        "export_dtype": "bfloat16",
    }
    return Recipe.from_dict(data)


@contextmanager
def _gone(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def copy(setting: Setting) -> Rows:
    """linear and task_arithmetic on state dicts in memory, beside copying as many bytes."""
    clock = Clock()
    for dtype in ("float32", "bfloat16"):
        base, *experts = (make_tensors(SIZES[setting.size], which, getattr(torch, dtype)) for which in range(4))
        out = {name: torch.empty_like(tensor) for name, tensor in base.items()}
        size = sum(tensor.nbytes for tensor in base.values())
        for number in range(-1, setting.rounds * 3):
            timed = clock if number >= 0 else Clock()
            with timed.time(dtype, "copy", bytes=size):
                for name in base:
                    out[name].copy_(experts[0][name])
            for method in ("linear", "task_arithmetic"):
                with timed.time(f"{method} {dtype}", "merge"):
                    _into(out, method, base, experts)
    return clock.all()


def _into(out: dict[str, Tensor], method: str, base: dict[str, Tensor], experts: list[dict[str, Tensor]]) -> None:
    merger = METHODS[method]
    params = check_params(method, merger, {})
    for name, tensor in base.items():
        info = TensorInfo(name, shape=tuple(tensor.shape))
        thetas = [expert[name] for expert in experts]
        merge_into(out[name], merger, tensor, thetas, weights=WEIGHTS, info=info, params=params)


def matrices(setting: Setting) -> Rows:
    """Methods on single matrices beside fusion-bench's functions on the same tensors."""
    shapes = [(32, 32), (64, 32)] if setting.size == "tiny" else BASE_SHAPES
    generator = torch.Generator().manual_seed(0)
    families: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for rows, columns in shapes:
        base = torch.randn(rows, columns, generator=generator) * 0.05
        taus = [torch.randn(rows, columns, generator=generator) * 0.002 for _ in range(MATRIX_EXPERTS)]
        families[f"{rows} x {columns}"] = base, [base + tau for tau in taus]
    file = setting.folder / "tensors.safetensors"
    save_file(
        {f"{t}/{key}": expert - base for key, (base, experts) in families.items() for t, expert in enumerate(experts)},
        file,
    )
    clock = Clock()
    for number in range(-1, setting.rounds):
        timed = clock if number >= 0 else Clock()
        for name, params in MATRIX_METHODS.items():
            if name not in METHODS:
                continue
            method = METHODS[name]
            for key, (base, experts) in families.items():
                info = TensorInfo("model.layers.0.mlp.w", "mlp", 0, 1, tuple(base.shape))
                with timed.time(f"{name} {key}", "ours", steps=params.get("steps")):
                    method.merge(base, experts, weights=[1.0] * MATRIX_EXPERTS, info=info, **params)
            if number < 0 or setting.peers is None:
                continue
            task = {"tensors": str(file), "method": name, "steps": params.get("steps", 0), "what": name}
            cost = setting.peers.run("fusion_bench_merge.py", task)
            for key, seconds in (cost or {"seconds": {}})["seconds"].items():
                clock.add(f"{name} {key}", "fusion-bench", seconds)
        if number >= 0:
            setting.keep("matrices", clock.all())
    return clock.all()


def many(setting: Setting) -> Rows:
    """Checkpoints of many small tensors: planned and merged to disk. (mergekit takes only an architecture's names.)"""
    clock = Clock()
    for _ in range(setting.rounds):
        for count in (2500, 5000, 10000, 20000):
            base, *experts = write_many(setting.cache, count, num_experts=2)
            for name in ("linear", "ties"):
                task = {"recipe": _recipe(name, base, experts).to_dict(), "out": str(setting.folder / "many")}
                task |= {"durable": False, "threads": setting.threads, "watch": True, "what": name}
                with _gone(Path(task["out"])):
                    cost = run_script(sys.executable, OURS, task, {})
                clock.add(f"{name} {count}", "ours", cost["seconds"], anonymous=cost["anonymous"])
    return clock.all()


def memory(setting: Setting) -> Rows:
    """The most memory of a merge to disk, for models of the same tensors and ever more layers."""
    clock = Clock()
    shapes = SIZES[setting.size]
    for share in (4, 2, 1):
        layers = max(1, shapes.num_hidden_layers // share)
        size = f"{setting.size}-{layers}layers" if share > 1 else setting.size
        SIZES.setdefault(size, replace(shapes, num_hidden_layers=layers))
        base, *experts = write_family(setting.cache, size, num_experts=EXPERTS, dtype="bfloat16")
        for name in [name for name in ("linear", "ties", "dare_ties", "della", "sce", "tsv_m") if name in METHODS]:
            PARAMS.setdefault(name, {})
            if name == "tsv_m" and share == 1 and setting.size != "tiny":
                continue  # minutes of decompositions, and not another number
            task = {"recipe": _recipe(name, base, experts).to_dict(), "out": str(setting.folder / "memory")}
            task |= {"durable": False, "threads": setting.threads, "watch": True, "what": name}
            with _gone(Path(task["out"])):
                cost = run_script(sys.executable, OURS, task, {})
            clock.add(f"{name} {layers}", "memory", cost["seconds"], anonymous=cost["anonymous"], layers=layers)
    return clock.all()
