"""Concrete masks: one mask over single entries of all task vectors, learned by gradient with noise in its steps.

Tang et al. 2023, "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion"
(arXiv:2312.06173): the mask is drawn from the binary Concrete distribution (Maddison et al. 2017, arXiv:1611.00712,
appendix B; Jang et al. 2017, arXiv:1611.01144): m = sigmoid((x + log u - log(1 - u)) / temperature), u uniform. What is
not said there is as in the authors' code (github.com/tanganke/subspace_fusion, src/concrete_mask.py, and
github.com/tanganke/fusion_bench, method/concrete_subspace): logits start at 0, the temperature is 0.5, Adam's step
0.001, and in each tensor the mask is divided by its mean.

Theirs is a problem on two levels: before each step of the mask the weights take one of their own, of size 1, from where
they began; in the end they are learned anew, under the mask that was found. Here one gradient moves both, as AdaRank's
does: a step costs half of the passes, and what is scored is the pair that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from evomerge import descent
from evomerge.params import Param
from evomerge.searchers.base import keyed_generator
from evomerge.searchers.learned import LearnedSearcher

if TYPE_CHECKING:
    from evomerge.learned import Layout

LEAST = 2.0**-24  # of a uniform number: the distance of 1 and the largest float32 below it


@dataclass(frozen=True)
class ConcreteMask:
    """Masks (``descent.Constraint``): sigmoid((x + noise) / temperature), divided by its mean in each tensor or not.

    Attributes:
        counts: how many numbers each tensor has, one tensor after the other.
        rescale: divide by the mean. A mask that is 0 throughout stays so.
        noise: (size,) what is added to the logits, if anything.
        hard: 1 where x is 0 or above, else 0; the gradient is still the sigmoid's (straight through). Without noise.
    """

    counts: tuple[int, ...]
    temperature: float
    rescale: bool
    noise: np.ndarray | None = None
    hard: bool = False

    def values(self, x: np.ndarray) -> np.ndarray:
        mask = self._mask(x, self._soft(x))
        for part in self._tensors() if self.rescale else ():
            mask[part] /= _mean(mask[part])
        return mask

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        """Logits whose masks are proportional to ``values`` in each tensor; 1/2 is the largest, if it is rescaled."""
        x = np.empty_like(values)
        for part in self._tensors():
            most = 2 * float(values[part].max(initial=0)) if self.rescale else 1.0
            mask = values[part] / most if most else values[part]
            with np.errstate(divide="ignore"):
                x[part] = self.temperature * (np.log(mask) - np.log1p(-mask))
        return x if self.noise is None else x - self.noise

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """dm/dx = m (1 - m) / temperature; and with r = m / mean(m) of n numbers, where g is the gradient by r,
        dL/dm_i = (g_i - <g, r> / n) / mean(m)."""
        soft = self._soft(x)
        back = np.empty_like(x)
        for part in self._tensors():
            slope = soft[part] * (1 - soft[part]) / self.temperature
            of_mask = gradient[part]
            if self.rescale:
                mask = self._mask(x[part], soft[part])
                mean = _mean(mask)
                along = np.multiply(of_mask, mask, dtype=np.float64).sum() / mean / len(mask)
                of_mask = (of_mask - x.dtype.type(along)) / mean
            back[part] = of_mask * slope
        return back

    def project(self, x: np.ndarray) -> np.ndarray:
        return x

    def _soft(self, x: np.ndarray) -> np.ndarray:
        """In the type of ``x``, in fresh memory, and with none of its size beside it."""
        found = x.copy() if self.noise is None else np.add(x, self.noise, dtype=x.dtype)
        found /= -self.temperature
        with np.errstate(over="ignore"):  # infinity, whose inverse is the 0 that is wanted
            np.exp(found, out=found)
        found += 1
        return np.reciprocal(found, out=found)

    def _mask(self, x: np.ndarray, soft: np.ndarray) -> np.ndarray:
        return (x >= 0).astype(x.dtype) if self.hard else soft

    def _tensors(self) -> Iterator[slice]:
        first = 0
        for count in self.counts:
            yield slice(first, first + count)
            first += count


def _mean(mask: np.ndarray) -> float:
    """What a tensor's mask is divided by: 1 for one that is 0 throughout."""
    return float(mask.mean(dtype=np.float64)) or 1.0


def logistic(size: int, *, seed: int, step: int) -> np.ndarray:
    """(size,) log u - log(1 - u), float32, of uniform numbers that belong to one step of a training."""
    u = keyed_generator(seed, descent.NOISE, step).random(size, dtype=np.float32)
    np.maximum(u, LEAST, out=u)
    rest = 1 - u  # exact: both are multiples of LEAST
    np.log(rest, out=rest)
    np.log(u, out=u)
    u -= rest
    return u


class ConcreteSearcher(LearnedSearcher):
    """Learns one mask over single entries, for all experts, and the space's weights along with it.

    All its numbers are float32: there are as many as parameters. Steps of the training have noise, candidates none.
    """

    name = "concrete"
    summary = "one mask over single entries (method concrete) by gradient descent, with the weights; as adamerging"
    learns = "entries"
    number_bytes = 4
    params: ClassVar[Mapping[str, Param]] = {
        **LearnedSearcher.params,
        "temperature": Param(
            float,
            0.5,
            "divides logits and noise before their sigmoid: the lower, the closer to 0 and 1",
            0,
            low_open=True,
        ),
        "start": Param(float, 0.0, "the logit that all entries start at"),
        "noise": Param(bool, True, "draw the mask anew in each step, from the Concrete distribution of its logits"),
        "mask": Param(
            str,
            "soft",
            "of candidates: soft: the sigmoid, without noise; hard: 1 where its logit is 0 or above, else 0",
            choices=("soft", "hard"),
        ),
        "rescale": Param(bool, True, "divide the mask by its mean, in each tensor"),
    }

    def begin_numbers(self, layout: Layout) -> tuple[np.ndarray, descent.Constraint]:
        self._masks = ConcreteMask(
            tuple(count for counts in layout.counts for count in counts.values()),
            self.options["temperature"],
            self.options["rescale"],
            hard=self.options["mask"] == "hard",
        )
        return np.full(layout.size, self.options["start"], dtype=np.float32), self._masks

    def in_training(self, step: int) -> descent.Constraint:
        """Soft masks, drawn for this step."""
        drawn = logistic(len(self._state_inside.x), seed=self.seed, step=step) if self.options["noise"] else None
        return replace(self._masks, noise=drawn, hard=False)
