"""From any point of the experiment's space to the margins that its merge would have, learned from recording.npz.

    python surrogate.py        how well it predicts merges that it has not seen

Kernel ridge regression (the mean of a Gaussian process), one output an item: a squared exponential kernel with a
length scale for each dimension, on top of a quadratic one. ``record.py pack`` fits scales and ridge once and keeps them
in the recording, so what is loaded is the same everywhere. An item counts as right if its margin is above 0, and a
score is the share of right items: it has the steps and the luck of a real one on as many items, and no noise beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECORDING = Path(__file__).resolve().parent / "recording.npz"
HIGH = 1.5  # of every weight; 0 is low
PARTS = ("search", "select", "held")
FAMILY = 6  # merges recorded one after the other that share layers: none is predicted from its own family

Array = np.ndarray


def kernel(a: Array, b: Array, scales: Array, bend: float) -> Array:
    """(n, m) between points a: (n, dimensions) and b: (m, dimensions), in shares of the range.

    ``scales``: (dimensions,), inverse length scales. ``bend`` weighs the quadratic part.
    """
    distances = ((a * scales) ** 2).sum(1)[:, None] + ((b * scales) ** 2).sum(1)[None] - 2 * (a * scales**2) @ b.T
    return np.exp(-0.5 * distances) + bend * (1 + (a - 0.5) @ (b - 0.5).T) ** 2


@dataclass(frozen=True)
class Surrogate:
    """The regression. ``points``: (merges, dimensions) in shares of the range; ``margins``: (merges, items).

    ``tasks`` and ``parts``: (items,), each item's task, and whether it is for search, select or held out. All tasks
    have as many items of a part, so the plain mean over items is the mean over tasks.
    """

    points: Array
    margins: Array
    tasks: Array
    parts: Array
    dimensions: tuple[str, ...]
    scales: Array
    bend: float
    ridge: float

    @classmethod
    def load(cls, path: Path = RECORDING) -> Surrogate:
        """Raises OSError or KeyError if ``path`` is no recording."""
        with np.load(path, allow_pickle=False) as file:
            return cls(
                file["points"].astype(np.float64) / HIGH, file["margins"].astype(np.float64), file["tasks"],
                file["parts"], tuple(map(str, file["dimensions"])), file["scales"].astype(np.float64),
                float(file["bend"]), float(file["ridge"]),
            )  # fmt: skip

    def __post_init__(self) -> None:
        gram = kernel(self.points, self.points, self.scales, self.bend)
        mean = self.margins.mean(axis=0)
        alpha = np.linalg.solve(gram + self.ridge * np.eye(len(gram)), self.margins - mean)
        object.__setattr__(self, "_mean", mean)
        object.__setattr__(self, "_alpha", alpha)  # (merges, items)

    def predict(self, shares: Array) -> Array:
        """(n, items) of points (n, dimensions) in shares of the range."""
        values: Array = kernel(shares, self.points, self.scales, self.bend) @ self._alpha + self._mean  # type: ignore
        return values

    def shares(self, point: Mapping[str, Any]) -> Array:
        """A point of a space, by layer groups or by expert, as (dimensions,) in shares of the range."""
        return np.array([point.get(name, point.get(name.partition("[")[0])) for name in self.dimensions], float) / HIGH

    def scores(self, shares: Array) -> dict[str, Array]:
        """Part -> the share of its items that are right: (n,), of points (n, dimensions)."""
        right = self.predict(shares) > 0
        return {part: right[:, self.parts == part].mean(axis=1) for part in PARTS}

    def score(self, point: Mapping[str, Any]) -> dict[str, float]:
        """``scores`` of one point of a space."""
        return {part: float(values[0]) for part, values in self.scores(self.shares(point)[None]).items()}

    def held_out(self) -> tuple[Array, Array]:
        """Predicted and true margins (merges, items), each merge predicted from the other families alone."""
        predicted = np.empty_like(self.margins)
        families = np.arange(len(self.points)) // FAMILY
        for family in range(families.max() + 1):
            out = families == family
            rest = Surrogate(
                self.points[~out], self.margins[~out], self.tasks, self.parts, self.dimensions, self.scales, self.bend,
                self.ridge,
            )  # fmt: skip
            predicted[out] = rest.predict(self.points[out])
        return predicted, self.margins


def make_space(dimensions: Sequence[str], granularity: str) -> Any:
    """The experiment's space (layer_groups), or the one with a weight an expert (task), without the models."""
    from evomerge.recipe import Group, Recipe, Source
    from evomerge.space import Space

    names = list(dict.fromkeys(name.partition("[")[0] for name in dimensions))
    layers = 1 + max(int(name.rpartition("-")[2].rstrip("]")) for name in dimensions)
    template = Recipe(
        base=Source("base", "base", "0"),
        experts=tuple(Source(n, n, n) for n in names),
        method="task_arithmetic",
        groups=(Group((0.0,) * len(names)),),
    )
    weights: dict[str, Any] = {"granularity": granularity, "range": [0.0, HIGH], "initial": 0.6}
    if granularity == "layer_groups":
        weights["groups"] = len(dimensions) // len(names)
    return Space.from_dict({"method": "task_arithmetic", "weights": weights}, template=template, num_layers=layers)


def leave_one_out(gram: Any, values: Any) -> Any:
    """Residuals (n, items) of kernel ridge regression, each from the others: (K^-1 y)_i / (K^-1)_ii.

    Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), section 5.4.2. ``gram``: (n, n) with the
    ridge on its diagonal; ``values``: (n, items); tensors.
    """
    import torch

    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return (inverse @ values) / inverse.diagonal()[:, None]


def fit(points: Array, margins: Array, steps: int = 150) -> tuple[Array, float, float]:
    """Scales, bend and ridge with the least leave-one-out error, by gradient steps on all of them at once.

    ``points``: (merges, dimensions) in shares of the range; ``margins``: (merges, items).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, y = torch.tensor(points, dtype=torch.float64), torch.tensor(margins, dtype=torch.float64)
    y = y - y.mean(0)
    logs = torch.tensor([-0.3] * x.shape[1] + [-2.0, -6.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logs], lr=0.05)
    for _ in range(steps):
        scales, bend, ridge = logs[:-2].exp(), logs[-2].exp(), logs[-1].exp()
        scaled = x * scales
        squares = scaled.square().sum(1)
        gram = torch.exp(-0.5 * (squares[:, None] + squares[None] - 2 * scaled @ scaled.T))
        gram = gram + bend * (1 + (x - 0.5) @ (x - 0.5).T) ** 2 + ridge * torch.eye(len(x), dtype=torch.float64)
        error = leave_one_out(gram, y).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    values = logs.detach().exp().numpy()
    return values[:-2], float(values[-2]), float(values[-1])


def report(surrogate: Surrogate) -> str:
    """How far predictions of unseen merges are off, in margins and in scores."""
    predicted, true = surrogate.held_out()
    explained = 1 - ((predicted - true) ** 2).sum() / ((true - true.mean(axis=0)) ** 2).sum()
    signs = ((predicted > 0) == (true > 0)).mean()
    lines = [
        f"{len(true)} merges, {true.shape[1]} items; each merge predicted from the other families alone:",
        f"  margins: {explained:.1%} of the variance between merges; sign right for {signs:.1%}",
    ]
    for part in PARTS:
        guess, score = ((m[:, surrogate.parts == part] > 0).mean(axis=1) for m in (predicted, true))
        off, top = guess - score, np.argsort(-score)[: max(2, len(score) // 4)]
        lines.append(
            f"  {part}: accuracy from {score.min():.3f} to {score.max():.3f}; error (root mean square) "
            f"{np.sqrt((off**2).mean()):.4f}, in the best quarter {np.sqrt((off[top] ** 2).mean()):.4f} with a bias of "
            f"{off[top].mean():+.4f}; rank correlation {rank_correlation(guess, score):.3f}"
        )
    return "\n".join(lines)


def rank_correlation(a: Array, b: Array) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)  # type: ignore[union-attr]


if __name__ == "__main__":
    print(report(Surrogate.load()))
