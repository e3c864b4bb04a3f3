"""The experiment vit_images: its pictures, the training, the experiment file."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evomerge.evaluation import EvaluatorContext, Target, TaskSpec, load_evaluator
from evomerge.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "vit_images"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import images  # noqa: E402
import vit  # noqa: E402
from building import Training, save_head  # noqa: E402

NAMES = ["mnist", "digits", "shapes", "stripes"]
SMALL = Training(steps=40, batch=16, learning_rate=2e-3)


def installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


needs_mnist = pytest.mark.skipif(not installed(images.MNIST), reason=f"{images.MNIST} is not installed")
ALL = [pytest.param("mnist", marks=needs_mnist), *NAMES[1:]]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(images, "EVALUATION", 20)
    monkeypatch.setattr(images, "TRAIN", 40)
    monkeypatch.setattr(images, "DRAWN", 60)


def made(sources: list[int]) -> images.Task:
    """A task whose item n was made from ``sources[n]``, and looks like nothing else."""

    def make(_: np.random.Generator) -> images.Pictures:
        pixels = np.arange(len(sources), dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)
        return images.Pictures(pixels, np.array(sources) % 2, tuple(bytes([s]) for s in sources))

    return images.Task("made", make, ("even", "odd"))


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_no_picture_stands_twice_and_all_classes_are_there(name):
    task = images.TASKS[name]
    pools = images.deal(task, 0)
    assert len(pools["eval"].labels) == 650
    assert len(pools["train"].labels) >= 1000
    sources = [key for pool in pools.values() for key in pool.keys]
    assert len(sources) == len(set(sources)), "what the pictures were made from"
    looks = {image.tobytes() for pool in pools.values() for image in pool.images}
    assert len(looks) == len(sources), "what they look like"
    for pictures in pools.values():
        assert pictures.images.shape[1:] == (3, 32, 32)
        assert pictures.images.dtype == np.uint8
        counts = np.bincount(pictures.labels, minlength=len(task.classes))
        assert len(counts) == len(task.classes)
        assert counts.min() > 0.5 * counts.mean()
        assert counts.max() < 1.5 * counts.mean()


@needs_mnist
def test_mnist_is_framed_in_black():
    pictures = images.mnist(np.random.default_rng(0))
    assert pictures.images.shape == (5000, 3, 32, 32)
    assert np.bincount(pictures.labels).tolist() == [500] * 10
    frame = pictures.images.copy()
    frame[:, :, 2:-2, 2:-2] = 0
    assert frame.max() == 0 < pictures.images.max()


def test_drawn_shapes_have_the_areas_of_their_formulas():
    """Shares of the square from -1 to 1 that lie inside, against areas from school geometry."""
    v, u = (np.mgrid[:800, :800] + 0.5) / 400 - 1
    regular = {name: n / 2 * np.sin(2 * np.pi / n) for name, n in {"triangle": 3, "square": 4, "pentagon": 5}.items()}
    areas = regular | {
        "disc": np.pi,
        "half disc": np.pi / 2,
        "ring": np.pi * (1 - 0.5**2),
        "cross": 2 * 0.6 * 1.9 - 0.6**2,
        "star": np.pi * (1 - 0.4**3) / (3 * 0.6),  # the integral of r^2 / 2 over angles, r even from 0.4 to 1
    }
    assert set(areas) == set(images.SHAPES)
    for name, inside in images.SHAPES.items():
        assert 4 * inside(u, v).mean() == pytest.approx(areas[name], abs=0.01), name


def test_stripes_run_as_their_class_says(few):
    """The strongest wave of a picture's Fourier transform stands across its stripes."""
    pictures = images.stripes(np.random.default_rng(3))
    strength = np.abs(np.fft.fft2(pictures.images.astype(float))).sum(1)
    strength[:, 0, 0] = 0
    frequency = np.fft.fftfreq(32) * 32
    peaks = [np.unravel_index(one.argmax(), one.shape) for one in strength]
    found = np.array([np.degrees(np.arctan2(frequency[row], frequency[column])) % 180 for row, column in peaks])
    wrong = np.abs((found - 15 * pictures.labels + 90) % 180 - 90)
    assert np.median(wrong) < 7.5, "nearer to its own direction than to the next"
    assert wrong.max() < 30


def test_light_is_lighter_than_dark_in_every_channel():
    light = np.zeros((200, 4, 4))
    light[:, :2] = 1
    pictures = images.coloured(light, np.random.default_rng(0), noise=0.0).astype(int)
    assert pictures.shape == (200, 3, 4, 4)
    assert (pictures[:, :, 0, 0] - pictures[:, :, 3, 3]).min() >= 0.1 * 255 - 1
    assert len(np.unique(pictures[:, :, 0, 0], axis=0)) > 190, "each has colours of its own"


def test_pools_have_their_sizes_share_no_source_and_depend_on_the_seed_alone(few):
    twice = made([*range(70), *range(70)])
    one, again, other = (images.deal(twice, seed) for seed in (1, 1, 2))
    assert {pool: len(p.labels) for pool, p in one.items()} == {"eval": 20, "train": 40}
    assert len({key for pool in one.values() for key in pool.keys}) == 60
    for pool, pictures in one.items():
        assert np.array_equal(pictures.images, again[pool].images)
        assert not np.array_equal(pictures.images, other[pool].images)
        assert [key[0] % 2 for key in pictures.keys] == pictures.labels.tolist()


def test_too_few_pictures_are_refused(few):
    with pytest.raises(SystemExit, match="29 different pictures, but 30"):
        images.deal(made([*range(29), *range(29)]), 0)


def test_data_are_replaced_as_a_whole_and_read_back(few, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").write_text("x")
    assert images.write(made(list(range(70))), tmp_path, 0) == {"eval": 20, "train": 40}
    assert [f.name for f in sorted(tmp_path.rglob("*"))] == ["made", "eval.npz", "train.npz"]
    expected = images.deal(made(list(range(70))), 0)["eval"]
    pixels, labels = images.read(tmp_path, "made", "eval")
    assert np.array_equal(pixels, expected.images)
    assert np.array_equal(labels, expected.labels)


# --- training ---------------------------------------------------------------------------------------------------------


def bright_or_dark(count: int, seed: int) -> vit.Pool:
    """Pictures of noise whose class says which half is brighter, the left or the right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=count)
    pixels = generator.integers(100, size=(count, 3, 32, 32))
    for half in (0, 1):
        pixels[labels == half, :, :, 16 * half : 16 * half + 16] += 100
    return pixels.astype(np.uint8), labels


@pytest.fixture
def tiny(monkeypatch):
    """The smallest ViT in place of the experiment's."""
    from transformers import ViTConfig, ViTModel

    def new(seed: int):
        torch.manual_seed(seed)
        config = ViTConfig(
            image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        return ViTModel(config, add_pooling_layer=False).eval()

    monkeypatch.setattr(vit, "new", new)
    return new


def test_the_real_architecture_has_its_size():
    model = vit.new(0)
    assert sum(p.numel() for p in model.parameters()) == (
        96 + 17 * 96 + 3 * 64 * 96 + 96  # class token, positions, patches and their bias
        + 4 * (4 * (96 * 96 + 96) + 2 * 96 * 384 + 384 + 96 + 4 * 96)  # attention, MLP, two norms
        + 2 * 96  # last norm
    )  # fmt: skip


def test_training_learns_is_repeatable_and_leaves_heads_alone(tiny, tmp_path):
    pools = {"one": bright_or_dark(80, 0), "other": bright_or_dark(60, 1)}
    classes = {"one": 2, "other": 2}
    lines: list[str] = []
    model, heads = vit.train_base(pools, classes, SMALL, lines.append)
    twin, same = vit.train_base(pools, classes, SMALL, lambda line: None)
    assert float(lines[-1].split()[3]) < 0.9 * float(lines[0].split()[3])
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, head in heads.items():
        assert all(torch.equal(tensor, same[name][key]) and not tensor.requires_grad for key, tensor in head.items())
    vit.save(model, tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in heads["one"].items()}
    swapped = pools["one"][0], 1 - pools["one"][1]  # what the base knows, the other way round
    experts = [vit.train_expert(tmp_path / "base", heads["one"], swapped, SMALL, lambda line: None) for _ in range(2)]
    base_right, expert_right = (sum(vit.right(m, heads["one"], swapped)) for m in (model, experts[0]))
    assert expert_right > base_right + 20
    assert all(torch.equal(tensor, before[key]) for key, tensor in heads["one"].items())
    start = dict(model.named_parameters())
    for (name, one), other in zip(experts[0].named_parameters(), experts[1].parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start[name]), f"{name} should have moved"


def test_the_evaluator_sees_what_the_training_saw(tiny, tmp_path):
    """evaluators/classification.py with the experiment's options, against plain transformers, one picture at a time."""
    model, pool = tiny(0), bright_or_dark(30, 0)
    head = {"weight": torch.randn(2, 16), "bias": torch.tensor([0.5, -0.5])}
    save_head(head, ("left", "right"), tmp_path / "head.safetensors")
    np.savez(tmp_path / "eval.npz", images=pool[0], labels=pool[1])
    options = load_spec_in(tmp_path).evaluate.tasks["mnist"].options
    options = {**options, "file": "eval.npz", "head": "head.safetensors"}
    context = EvaluatorContext(tmp_path, {"made": TaskSpec("made", options=options)}, batch_size=4)
    evaluator = load_evaluator(str(ROOT / "evaluators" / "classification.py"), context)
    items = evaluator.load()
    evaluator.prepare(Target(model, None), items)
    outcomes = evaluator.evaluate(Target(model, None), [item.id for item in items])
    answers = vit.right(model, head, pool, batch=7)
    for image, label, outcome, answer in zip(*pool, outcomes, answers, strict=True):
        pixels = (torch.tensor(image[None] / 255, dtype=torch.float32) - 0.5) / 0.25
        with torch.no_grad():
            logits = head["weight"] @ model(pixel_values=pixels).last_hidden_state[0, 0] + head["bias"]
        margin = float(logits[label] - logits[1 - label])
        assert outcome.values["margin"] == pytest.approx(margin, abs=1e-4)
        assert answer == (outcome.values["acc"] == 1) == (margin > 0)


# --- the experiment ---------------------------------------------------------------------------------------------------


def load_spec_in(folder: Path):
    shutil.copy(FOLDER / "experiment.yaml", folder)
    for name in ("base", *(f"experts/{name}" for name in NAMES)):
        (folder / "cache" / name).mkdir(parents=True)
    return load_spec(folder / "experiment.yaml")


def test_the_experiment_file_is_valid_and_holds_enough_items(tmp_path):
    spec = load_spec_in(tmp_path)
    assert list(spec.experts) == list(spec.evaluate.tasks) == list(images.TASKS) == NAMES
    assert sum(spec.evaluate.split.values()) <= images.EVALUATION
    assert spec.evaluate.split["test"] >= 300
    for name, task in spec.evaluate.tasks.items():
        assert task.options["file"] == f"cache/data/{name}/eval.npz"
        assert task.options["head"] == f"cache/heads/{name}.safetensors"
        assert (task.options["mean"], task.options["std"]) == ([vit.MEAN] * 3, [vit.STD] * 3)


def copied(folder: Path) -> Path:
    """The experiment's programs in an empty folder, which is returned, with what they share beside it."""
    (folder / FOLDER.name).mkdir()
    for file in FOLDER.glob("*.py"):
        shutil.copy(file, folder / FOLDER.name)
    shutil.copy(FOLDER.parent / "building.py", folder)
    return folder / FOLDER.name


def test_the_command_says_what_its_steps_do_and_which_is_missing(tmp_path):
    command = [sys.executable, str(copied(tmp_path) / "build.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for step in ("data", "base", "experts", "measure"):
        assert step in shown
    missing = subprocess.run([*command, "base"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "build.py data" in missing.stderr


@pytest.mark.slow
@needs_mnist
def test_the_whole_way_with_few_steps(tmp_path):
    """Data, base, heads and an expert in an empty folder, twice; the expert beats the base on its task."""
    folder = copied(tmp_path)
    program = folder / "vit.py"
    program.write_text(program.read_text().replace("steps=200", "steps=60").replace("steps=150", "steps=60"))
    for expected in ("written", "is there"):
        for step in ("data", "base", "experts"):
            command = [sys.executable, str(folder / "build.py"), step, "--tasks", "mnist"]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            assert expected in run.stdout
    command = [sys.executable, str(folder / "build.py"), "measure", "--tasks", "mnist", "--coefficients", "0.5"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    titles = [line.split("|")[1].strip() for line in run.stdout.splitlines()]
    assert titles == ["model", "---", "base", "expert mnist", "uniform 1", "uniform 0.5"]
    cache = folder / "cache"
    head = load_file(cache / "heads" / "mnist.safetensors")
    pool = images.read(cache / "data", "mnist", "eval")
    base, expert = (sum(vit.right(vit.load(cache / m), head, pool)) / 650 for m in ("base", "experts/mnist"))
    assert expert > base + 0.1
