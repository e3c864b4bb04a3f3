"""Searches that learn numbers inside task vectors: what is laid out, kept, resumed, evaluated, exported and refused.

Merges and evaluations are real; gradients are those of a known function, in place of a model.
"""

# ruff: noqa: F811  (fixtures of test_study.py)

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_study import Crash, ShuffledPool, die, run, scores, trajectory, write  # noqa: F401
from test_training import GRADIENTS, die_at, learned

from evomerge.collected import open_collected
from evomerge.errors import CheckpointError, ResourceError, StudyError, UserError
from evomerge.exporting import export
from evomerge.leaderboard import leaderboard
from evomerge.learned import Layout, LearnedFiles, layout_of
from evomerge.merging import open_sources, verify_sources
from evomerge.planning import build_plan
from evomerge.pools import BatchGradient, Job, Result
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.spec import load_spec
from evomerge.store import Store

KINDS = {"adarank": "components", "columns": "columns", "concrete": "entries"}


def drawn_to(job: Job) -> Result:
    """Gradients of half the squared distance of weights and numbers from places that each item draws."""
    assert job.gradient is not None
    weights = np.array([w for group in job.recipe["groups"] for w in group["weights"].values()])
    numbers = np.concatenate([v for tensors in job.gradient["learned"]["tensors"] for v in tensors.values()])
    found = []
    shares = job.gradient.get("shares", [0.0] * len(job.gradient["batches"]))  # none where nothing is learned
    for (task, items), share in zip(job.gradient["batches"], shares, strict=True):
        draws = [np.random.default_rng(zlib.crc32(item.encode())) for item in items]
        away = weights - np.mean([draw.normal(0.4, 0.1, len(weights)) for draw in draws], axis=0)
        pulled = numbers - np.mean([draw.normal(0.6, 0.3, len(numbers)) for draw in draws], axis=0)
        loss = float(away @ away + pulled @ pulled) / 2
        if job.gradient["learn"]:
            slope = (share * pulled).astype(numbers.dtype)
            found.append(BatchGradient(task, loss, tuple((share * away).tolist()), slope.tobytes()))
        else:
            found.append(BatchGradient(task, loss))
    return Result(job.key, job.attempt, None, None, gradients=tuple(found))


class LearnedPool(ShuffledPool):
    """Evaluates as ShuffledPool does, and gives gradients of the known function."""

    def wait(self, seconds: float) -> list[Result]:
        if not self.jobs:
            return []
        job = self.jobs.pop(self.random.randrange(len(self.jobs)))
        assert self.worker is not None
        return [self.worker.evaluate(job) if job.gradient is None else drawn_to(job)]


@pytest.fixture
def write_learned(write) -> Callable[..., Path]:
    """An experiment that learns numbers: 9 steps, a candidate every 3, on the known function."""

    def make(method: str, search: dict | None = None, **keys) -> Path:
        space = {"method": method, "weights": {"granularity": "task", "range": [0.0, 2.0], "initial": 0.5}}
        options = {"method": method, "budget": 10, "steps": 9, "every": 3, "lr": 0.05, "batch": 2, **(search or {})}
        path = write(**{"space": space, **keys, "search": options})
        (path.parent / "my_eval.py").write_text(GRADIENTS)
        data = json.loads(path.read_text())
        data["evaluate"]["with"], data["evaluate"]["batch_size"] = "my_eval.py@Predicting", 1
        path.write_text(json.dumps(data))
        return path

    return make


def recipes(store: Store) -> list[Recipe]:
    return [Recipe.from_dict(trial.recipe) for trial in store.trials()]


def numbers_of(recipe: Recipe) -> np.ndarray:
    assert recipe.statistics is not None
    mappings = open_collected(recipe.statistics, KINDS[recipe.method], recipe)
    return np.concatenate([tensor.double().numpy() for mapping in mappings for tensor in mapping.values()])


def kept(path: Path) -> list[str]:
    return sorted(p.name for p in (path.parent / "learned").iterdir() if not p.name.startswith("training-"))


# --- a study ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adarank", "columns", "concrete"])
def test_a_candidate_is_what_was_learned_so_far(write_learned, method):
    path = write_learned(method)
    store = run(path, LearnedPool())
    assert [t.state for t in store.trials()] == ["complete"] * 4
    found = [numbers_of(recipe) for recipe in recipes(store)]
    assert set(found[0]) == {1.0}
    assert all(len(numbers) == len(found[0]) > 100 for numbers in found)
    if method == "adarank":
        assert set(np.concatenate(found)) == {0.0, 1.0}
        assert len({numbers.tobytes() for numbers in found}) == 4
        assert "masks over singular components were learned in 9 of 9" in " ".join(leaderboard(store).notes)
        assert set(store.trials()[3].point.values()) != {0.5}  # the weights are learned, too
    elif method == "concrete":
        assert "masks over single entries were learned in 9 of 9" in " ".join(leaderboard(store).notes)
        assert set(store.trials()[3].point.values()) != {0.5}
        assert len({numbers.tobytes() for numbers in found}) == 4
        assert all(abs(numbers.mean() - 1) < 1e-6 for numbers in found)  # as many in each matrix's file as it has
    else:
        away = [float(np.abs(numbers - 0.6).mean()) for numbers in found]
        assert away == sorted(away, reverse=True) and len(set(away)) == 4
        assert set(store.trials()[3].point.values()) == {0.5}
    assert kept(path) == sorted({Path(r.statistics.path).name for r in recipes(store) if r.statistics})
    assert len({e.recipe_hash for e in store.evaluations("search") if e.subject.startswith("trial")}) == 4


@pytest.mark.parametrize("method", ["adarank", "columns", "concrete"])
def test_what_is_exported_is_what_was_evaluated(write_learned, tmp_path, method):
    """And the first candidate, whose numbers are all 1, is task arithmetic."""
    store = run(write_learned(method), LearnedPool())
    first, *_, last = recipes(store)
    exported = load_file(export(verify_sources(last), tmp_path / "last") / "model.safetensors")
    model = ShuffledPool.worker.target.model  # pyright: ignore[reportOptionalMemberAccess]
    ShuffledPool.worker.merger.into(model, last)  # pyright: ignore[reportOptionalMemberAccess]
    held = model.state_dict()
    assert all(torch.equal(tensor.to(held[name].dtype), held[name]) for name, tensor in exported.items())
    arithmetic = {k: v for k, v in first.to_dict().items() if k != "statistics"}
    arithmetic |= {"method": "task_arithmetic", "params": {}}
    plain = load_file(export(Recipe.from_dict(arithmetic), tmp_path / "plain") / "model.safetensors")
    ours = load_file(export(first, tmp_path / "first") / "model.safetensors")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("method", ["adarank", "concrete"])
def test_any_number_of_workers_learns_the_same_bits(write_learned, method, slots):
    path = write_learned(method, {"tasks": 1, "patience": 2, "holdout": 0.25})
    alone, shared = (
        run(path, pool, store=f"{name}.db")
        for name, pool in (("alone", LearnedPool()), ("shared", LearnedPool(slots, order_seed=slots)))
    )
    assert trajectory(shared) == trajectory(alone) and learned(shared) == learned(alone)
    assert recipes(shared) == recipes(alone)
    assert scores(shared) == scores(alone)


@pytest.mark.parametrize("method", ["adarank", "columns", "concrete"])
def test_a_driver_that_dies_around_any_store_write_learns_on_as_if_it_had_not(write_learned, die, monkeypatch, method):
    monkeypatch.setattr("evomerge.training.SAVE_SECONDS", -1.0)  # a write a step
    path = write_learned(method)
    whole = run(path, LearnedPool(), store="whole.db")
    resumed = die_at(range(2, 34), path, die, lambda write: LearnedPool(2, order_seed=write), at_least=9)
    assert trajectory(resumed) == trajectory(whole)
    assert learned(resumed) == learned(whole)
    assert recipes(resumed) == recipes(whole) and scores(resumed) == scores(whole)
    trainings = [list(folder.iterdir()) for folder in (path.parent / "learned").glob("training-*")]
    assert [len(files) for files in trainings] == [1, 1]  # of each study the state that it ended with


@pytest.mark.parametrize("at", ["_write_file", "sync", "shutil.rmtree"])
def test_a_driver_that_dies_while_it_writes_files_learns_on_as_if_it_had_not(write_learned, monkeypatch, at):
    monkeypatch.setattr("evomerge.training.SAVE_SECONDS", -1.0)
    path = write_learned("columns")
    whole = run(path, LearnedPool(), store="whole.db")
    from evomerge import learned as module

    owner, name = (module.shutil, "rmtree") if "." in at else (module, at)
    true, left = getattr(owner, name), [0]

    def dying(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        return true(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)
    crashes = 0
    for number in range(1, 20):
        left[0] = number
        try:
            run(path, LearnedPool(), store="crashed.db")
        except Crash:
            crashes += 1
    left[0] = 10**9
    resumed = run(path, LearnedPool(), store="crashed.db")
    assert crashes >= 3
    assert trajectory(resumed) == trajectory(whole) and learned(resumed) == learned(whole)
    assert recipes(resumed) == recipes(whole)


def test_a_training_whose_file_is_gone_or_damaged_is_not_continued(write_learned):
    path = write_learned("columns")
    run(path, LearnedPool(), budget="2")
    (file,) = (path.parent / "learned").glob("training-*/*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StudyError, match=f"{file.name}.*damaged"):
        run(path, LearnedPool(), budget="3")
    file.unlink()
    with pytest.raises(StudyError, match=f"{file.name}.*gone"):
        run(path, LearnedPool(), budget="3")
    file.write_bytes(content)
    assert len(run(path, LearnedPool(), budget="3").trials()) == 3


def test_numbers_that_were_changed_are_not_exported(write_learned, tmp_path):
    last = recipes(run(write_learned("columns"), LearnedPool()))[-1]
    assert last.statistics is not None
    (file, _) = sorted(Path(last.statistics.path).glob("*.safetensors"))
    tensors = {name: tensor + 0.5 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=file.name):
        export(verify_sources(last), tmp_path / "out")


def test_weights_around_learned_numbers_can_be_searched_by_others(write_learned, write):
    """A candidate's folder is a folder of statistics like any other."""
    last = recipes(run(write_learned("columns"), LearnedPool()))[-1]
    assert last.statistics is not None
    space = {"method": "columns", "weights": {"granularity": "task", "range": [0.0, 2.0], "initial": 0.5}}
    path = write(name="again", folder="again", space=space, statistics=last.statistics.path, search={"budget": 4})
    found = recipes(run(path))
    assert found[0].statistics == last.statistics and found[0].hash == last.hash


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"space": {"method": "task_arithmetic"}}, r"space\.method: adarank"),
        ({"space": {"method": "columns"}}, r"columns needs statistics.*\(columns\)[\s\S]*the searcher that does"),
        ({"statistics": "stats"}, "learns the statistics"),
        ({"search": {"temperature": 0}}, "temperature"),
        ({"search": {"rank_share": 1.5}}, "rank_share"),
        ({"search": {"weights": "frozen"}}, "learned or fixed|fixed"),
        ({"search": {"every": 10}}, "every <= steps"),
        ({"space": {"method": "concrete"}}, r"concrete needs statistics.*\(entries\)[\s\S]*the searcher that does"),
    ],
    ids=str,
)
def test_refusals_name_what_is_wrong_before_a_model_is_loaded(write_learned, keys, words):
    class NoPool(LearnedPool):
        def start(self, spec):
            raise AssertionError("a worker was started")

    if "space" in keys:
        weights = {"granularity": "task", "range": [0.0, 2.0], "initial": 0.5}
        keys = {"space": {**keys["space"], "weights": weights}}
    with pytest.raises(UserError, match=words):
        run(write_learned("adarank", **keys), NoPool())


@pytest.mark.parametrize(
    ("method", "number", "worker"), [("concrete", 4, 5 * 4), ("columns", 8, 5 * 8), ("adarank", 8, 5 * 8)]
)
def test_more_numbers_than_memory_holds_are_refused_before_a_model_is_loaded(
    write_learned, monkeypatch, method, number, worker
):
    """As docs/architecture.md says it: 12 copies in the driver, 5 in each worker."""

    class NoPool(LearnedPool):
        def start(self, spec):
            raise AssertionError("a worker was started")

    path = write_learned(method, {"batch": 2}, workers={"count": 2})
    spec = load_spec(path)
    plan = build_plan(spec, Progress())
    layout = layout_of(KINDS[method], plan.sources, plan.space.decode(plan.space.initial()))
    needed = layout.size * (12 * number + 2 * worker)
    memory = psutil.virtual_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory._replace(available=needed - 1))
    with pytest.raises(
        ResourceError, match=rf"learns {layout.size:,} numbers[\s\S]*matrices: inner[\s\S]*columns"
    ) as told:
        run(path, NoPool())
    assert "search.method" in str(told.value)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory._replace(available=needed))
    assert build_plan(spec, Progress()).sources is not None


@pytest.mark.parametrize(
    ("search", "types"),
    [
        ({"mask": "hard", "rescale": False}, [torch.bool] * 4),
        ({"mask": "hard"}, [torch.bool] + [torch.float32] * 3),  # of ones at the start
        ({"rescale": False}, [torch.float32] * 4),
    ],
    ids=str,
)
def test_a_mask_is_one_file_for_all_experts_and_no_larger_than_it_must_be(write_learned, search, types):
    path = write_learned("concrete", {"lr": 0.5, **search})
    for recipe, dtype in zip(recipes(run(path, LearnedPool())), types, strict=True):
        assert recipe.statistics is not None
        folder = Path(recipe.statistics.path)
        assert sorted(p.name for p in folder.iterdir()) == ["entries.safetensors", "manifest.json"]
        tensors = load_file(folder / "entries.safetensors")
        assert dtype in {tensor.dtype for tensor in tensors.values()} <= {dtype, torch.bool}
        opened = open_collected(recipe.statistics, "entries", recipe)
        assert len(opened) == len(recipe.experts) and len({file.path for file in opened}) == 1
        other = replace(recipe, experts=tuple(reversed(recipe.experts)), groups=())
        assert len(open_collected(recipe.statistics, "entries", other)) == len(recipe.experts)


def test_columns_start_within_their_range(write_learned):
    with pytest.raises(UserError, match="low <= 1 <= high"):
        run(write_learned("columns", {"low": 1.5}), LearnedPool())


def test_other_searchers_say_who_learns_the_numbers(write):
    space = {"method": "adarank", "weights": {"granularity": "task", "range": [0.0, 2.0]}}
    with pytest.raises(UserError, match=r"search by the searcher that does \(adarank\)"):
        run(write(space=space))


# --- layouts and files --------------------------------------------------------------------------------------------


def test_a_layout_has_each_matrix_that_an_expert_changes(lora_family: Path, dense_family: Path):
    """LoRA experts of rank 4 on q, v, up and down; dense ones on all matrices of a layer."""
    for family, matrices in ((lora_family, "inner"), (dense_family, "inner"), (dense_family, "all")):
        for method, kind in KINDS.items():
            recipe = Recipe.from_dict(
                {
                    "base": str(family / "base"),
                    "experts": {n: str(family / n) for n in ("expert0", "expert1")},
                    "method": method,
                    "params": {"matrices": matrices},
                    "weights": 0.4,
                    "statistics": "nowhere",
                }
            )
            layout = layout_of(kind, open_sources(recipe), recipe)
            counts = layout.counts[-1]
            assert len(layout.counts) == (1 if method == "concrete" else 2)
            names = {name.split(".", 3)[-1] for name in counts if ".layers." in name}
            inner = {"self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
            q = "model.layers.2.self_attn.q_proj.weight"
            if family is lora_family:
                assert names == inner
                assert counts[q] == {"columns": 32, "adarank": 4, "concrete": 32 * 32}[method]
            else:
                inner |= {"self_attn.k_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight"}
                assert names == inner
                assert ("model.embed_tokens.weight" in counts) == (matrices == "all")
                assert counts[q] == (32 * 32 if method == "concrete" else 32)
            assert layout.size == sum(sum(c.values()) for c in layout.counts)
            numbers = np.arange(layout.size, dtype=float)
            parts = layout.split(numbers)
            assert np.array_equal(np.concatenate([v for part in parts for v in part.values()]), numbers)


def test_the_first_share_is_that_of_the_largest_components():
    layout = Layout("components", ({"a": 4, "b": 3}, {"a": 10}))
    expected = [1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert layout.first(0.5).tolist() == expected
    assert set(layout.first(1.0)) == {1.0} and set(layout.first(0.0)) == {0.0}
    assert layout.first(0.7).tolist()[-10:] == [1] * 7 + [0] * 3  # 0.7 * 10 is not rounded down to 6


def test_a_training_comes_back_bit_for_bit(tmp_path: Path):
    files = LearnedFiles(tmp_path, "one")
    arrays = {"x": np.array([0.1, -0.0, 1e-300]), "m": np.zeros((1, 2)), "v": np.array([1e-40, 3], dtype=np.float32)}
    first = files.keep_training(arrays)
    second = files.keep_training({"x": np.ones(2)})
    again = files.training_at(first)
    assert {k: (v.dtype, v.tobytes()) for k, v in again.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in arrays.items()
    }
    files.forget_trainings(second)
    with pytest.raises(StudyError, match="gone"):
        files.training_at(first)
    assert files.training_at(second)["x"].tolist() == [1.0, 1.0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "learned").write_text("a file")
    with pytest.raises(CheckpointError, match=r"learned.*cannot be written"):
        LearnedFiles(tmp_path, "one").keep_training({"x": np.ones(2)})
