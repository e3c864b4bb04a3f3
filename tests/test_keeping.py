"""Where sources are kept: the same numbers everywhere, and what ``auto`` chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from statistics_folder import statistics_of

from evomerge.errors import ResourceError
from evomerge.keeping import choose, dense_bytes, keep, refuse_pinned
from evomerge.merging import Merger, open_sources
from evomerge.methods import METHODS
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.recipe import Group, Recipe, Source
from evomerge.spec import load_spec
from evomerge.testing import tiny
from evomerge.testing.pools import make_job, make_spec
from evomerge.worker import Worker

GB = 10**9


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a dense and a LoRA expert."""
    folder = tmp_path_factory.mktemp("mixed")
    base = tiny.save_model(folder / "base", tiny.llama_config(), seed=0)
    tiny.save_dense_expert(base, folder / "dense", seed=1)
    tiny.save_lora_expert(base, folder / "lora", seed=2)
    return folder


def recipe_of(folder: Path, method: str) -> Recipe:
    base, dense, lora = (Source(name, str(folder / name)) for name in ("base", "dense", "lora"))
    group = (Group((0.4, 0.6)),)
    if method == "slerp":
        return Recipe(None, (base, dense), method, group)
    if METHODS[method].num_experts[1] == 1 or METHODS[method].needs_factors:
        return Recipe(base, (lora,), method, (Group((0.6,)),))
    statistics = statistics_of(folder, ("dense", "lora"), METHODS[method].statistics)
    return Recipe(base, (dense, lora), method, group, statistics=statistics)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bytes_wherever_sources_are_kept(mixed: Path, tmp_path: Path, method: str):
    recipe = recipe_of(mixed, method)
    written = []
    for place in ("mmap", "device"):
        sources = open_sources(recipe)
        keep(sources, place, "cpu")
        assert bool(sources.kept) == (place == "device")
        out = tmp_path / place
        out.mkdir()
        Merger(sources).stream(recipe, out)
        written.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert written[0] == written[1]


def test_merges_read_the_copies_and_preparations_the_files(mixed: Path):
    """Copies with numbers of their own show who reads them."""
    sources = open_sources(recipe_of(mixed, "task_arithmetic"))
    keep(sources, "device", "cpu")
    name = "model.layers.0.self_attn.k_proj.weight"  # not among the LoRA's
    assert set(sources.kept) == {(t, n) for t in (-1, 0) for n in sources.names}
    sources.kept[-1, name].fill_(1.0)
    sources.kept[0, name].fill_(3.0)
    for _, base, (dense, lora) in sources.chunks(name):
        assert base is not None
        assert torch.equal(base, torch.ones_like(base))
        assert torch.equal(dense, torch.full_like(dense, 3.0))
        assert lora is base  # this adapter leaves the tensor alone
    _, base, (dense, lora) = sources.load(name, kept=True)
    assert base is sources.kept[-1, name]
    assert dense is sources.kept[0, name]
    assert lora is base
    _, mapped, (again, _) = sources.load(name)
    files = [load_file(mixed / folder / "model.safetensors")[name] for folder in ("base", "dense")]
    assert mapped is not None
    assert torch.equal(mapped, files[0])
    assert torch.equal(again, files[1])


def test_what_is_kept_is_counted_before_it_is_copied(mixed: Path):
    sources = open_sources(recipe_of(mixed, "task_arithmetic"))
    tensors = [t for folder in ("base", "dense") for t in load_file(mixed / folder / "model.safetensors").values()]
    assert dense_bytes(sources) == sum(t.numel() * 2 for t in tensors)
    keep(sources, "device", "cpu")
    assert sum(t.numel() * t.element_size() for t in sources.kept.values()) == dense_bytes(sources)


@pytest.mark.parametrize("expert", ["dense", "lora"])
def test_slices_come_on_the_device_that_asks(mixed: Path, expert: str):
    """On the meta device, which has shapes and types only: all that a machine without a GPU can show."""
    recipe = Recipe(
        Source("base", str(mixed / "base")), (Source(expert, str(mixed / expert)),), "ties", (Group((0.5,)),)
    )
    sources = open_sources(recipe)
    name = "model.layers.0.self_attn.q_proj.weight"
    there, here = sources.chunks(name, device="meta"), sources.chunks(name)
    for (_, base, (ours,)), (_, plain, (theirs,)) in zip(there, here, strict=True):
        assert base is not None and plain is not None
        assert base.device.type == ours.device.type == "meta"
        assert (base.shape, base.dtype) == (plain.shape, plain.dtype)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_auto_on_a_gpu_is_the_device_while_model_and_activations_have_room():
    def place(sources: int, room: int = 80 * GB, **changes) -> str:
        facts = {"model": 15 * GB, "device_room": room, "ram": 200 * GB, "workers": 1, **changes}
        return choose("auto", "cuda", sources=sources, **facts)

    assert place(49 * GB) == "device"  # 49 + 15 + 16 (a fifth of 80) = 80
    assert place(49 * GB + 1) == "pinned"
    assert place(49 * GB, engine=True) == "pinned"
    assert place(60 * GB, ram=120 * GB) == "pinned"
    assert place(60 * GB, ram=119 * GB) == "mmap"  # more than half of what is available
    assert place(60 * GB, workers=2) == "mmap"
    assert place(1 * GB, room=3 * GB, model=0) == "device"  # 2 GB stay free at least
    assert place(1 * GB, room=3 * GB - 1, model=0) == "pinned"


@pytest.mark.parametrize("wanted", ["mmap", "pinned", "device"])
def test_what_is_asked_for_is_what_is_done(wanted: str):
    assert choose(wanted, "cuda", sources=GB, model=GB, device_room=0, ram=0, workers=1) == wanted


def test_auto_on_the_cpu_is_the_files():
    assert choose("auto", "cpu", sources=1, model=1, device_room=0, ram=10**12, workers=1) == "mmap"


def test_pinned_memory_without_a_gpu_is_refused_before_anything_is_opened(experiment, monkeypatch: pytest.MonkeyPatch):
    path = experiment(workers={"sources": "pinned"})
    monkeypatch.setattr("evomerge.planning.open_sources", lambda *_: pytest.fail("sources were opened"))
    with pytest.raises(ResourceError, match=r"\(pinned\) was asked for, but workers run on cpu"):
        build_plan(load_spec(path), Progress(quiet=True))
    refuse_pinned("pinned", "cuda:1")
    refuse_pinned("device", "cpu")


def test_memory_that_does_not_suffice_is_the_users_error(mixed: Path, monkeypatch: pytest.MonkeyPatch):
    sources = open_sources(recipe_of(mixed, "task_arithmetic"))

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(ResourceError, match=r"cannot be kept in device memory \(cpu\): .*can't allocate"):
        keep(sources, "device", "cpu")
    assert sources.kept == {}


def test_where_sources_are_kept_is_no_drift_and_changes_no_outcome(experiment, tmp_path: Path):
    path = experiment()
    before = build_plan(load_spec(path), Progress(quiet=True))
    path.write_text(json.dumps({**json.loads(path.read_text()), "workers": {"sources": "device"}}))
    after = build_plan(load_spec(path), Progress(quiet=True))
    assert (before.worker.sources, after.worker.sources) == ("mmap", "device")
    assert before.fingerprint == after.fingerprint
    spec = make_spec(tmp_path / "family")
    job = make_job(spec, 1)
    outcomes = [Worker(replace(spec, sources=place)).evaluate(job).outcomes for place in ("mmap", "device", "auto")]
    assert outcomes[0] is not None
    assert outcomes[0] == outcomes[1] == outcomes[2]
