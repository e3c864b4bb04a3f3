"""Greedy soup: experts averaged, added one by one in the order of their own scores while the score does not get worse.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time" (arXiv:2203.05482), section 2, recipe 1.
"""

from __future__ import annotations

from typing import Any

from evomerge.errors import SpecError
from evomerge.searchers.base import Point, Searcher, Told
from evomerge.space import METHOD, Moving, Space


class SoupSearcher(Searcher):
    """Each expert alone, then the soup so far with the next one: 2T - 1 proposals for T ingredients, then it is over.

    The experts of a soup of k have the weight 1/k and all others 0, in every part of the model. With linear and
    task_arithmetic that is the paper's mean of the members' weights; the other methods merge the members in their own
    way. Tied experts are one ingredient. An expert is kept when the score is at least that of the soup before. One that
    failed alone is tried last; a soup whose evaluation failed is not kept.

    Points given as starts are proposed before and are no ingredients.

    Raises:
        SpecError: the space has a dimension that is no weight, a fixed weight, one ingredient only, bounds that exclude
            0 or a 1/k, or a method for a set number of experts.
    """

    name = "soup"
    summary = "greedy soup: experts join the average, best first, while it does not get worse; 2T - 1 candidates"
    asynchronous = False  # every step is decided by the last

    def __init__(self, space: Any, *, seed: int = 0, starts: Any = (), **options: Any):
        super().__init__(space, seed=seed, starts=starts, **options)
        self._before = [dict(point) for point in starts]
        self._ingredients = ingredients(space)
        self._alone: list[Told] = []
        self._order: list[int] = []  # of the ingredients, the best alone first; empty until all are known
        self._soup: list[int] = []
        self._best: Told | None = None  # the trial that the soup so far was scored in

    @property
    def size(self) -> int:
        return len(self._before) + 2 * len(self._ingredients) - 1

    def needs(self, n: int) -> int:
        """The single experts wait for nothing, each soup for all before it."""
        return 0 if n < len(self._before) + len(self._ingredients) else n

    def ask(self, n: int) -> Point:
        """Raises ValueError beyond ``size``."""
        place = n - len(self._before)
        if place < 0:
            return dict(self._before[n])
        if place < len(self._ingredients):
            return self._mix([place])
        if n >= self.size:
            raise ValueError(f"the soup is done after {self.size} proposals")
        return self._mix([*self._soup, self._next(n)])

    def tell(self, trial: Told) -> None:
        if trial.n < len(self._before):
            return
        if len(self._alone) < len(self._ingredients):
            self._alone.append(trial)
            if len(self._alone) == len(self._ingredients):
                self._order = sorted(range(len(self._alone)), key=lambda i: self._alone[i].merit, reverse=True)
                self._soup, self._best = self._order[:1], self._alone[self._order[0]]
        elif trial.usable and (self._best is None or trial.merit >= self._best.merit):
            self._soup, self._best = [*self._soup, self._next(trial.n)], trial

    def _next(self, n: int) -> int:
        """The ingredient that proposal ``n`` adds."""
        return self._order[n - len(self._before) - len(self._ingredients) + 1]

    def _mix(self, members: list[int]) -> Point:
        chosen = [self._ingredients[i] for i in members]
        weight = 1.0 / sum(count for _, count in chosen)
        inside = {name for names, _ in chosen for name in names}
        return {d.name: weight if d.name in inside else 0.0 for d in self.space.dimensions}


def ingredients(space: Space) -> list[tuple[frozenset[str], int]]:
    """(names of its weights, how many experts) of each ingredient, in the order of the experts.

    Raises:
        SpecError: the space does not decide by its weights alone which experts are in; says why and who can search it.
    """
    from evomerge.methods import METHODS

    weights = {w.dimension for region in space.regions for w in region.weights if isinstance(w, Moving)}
    others = [d.name for d in space.dimensions if d.name not in weights]
    if others:
        kind = "the method is a dimension" if METHOD in others else f"{', '.join(others)} would have to move as well"
        raise _refusal(f"only decides which experts are in, but {kind}", "give it one value in the space")
    for method in space.all_methods:
        most = METHODS[method].num_experts[1] if method in METHODS else None
        if most is not None:
            raise _refusal(f"needs a method for any number of experts, but {method} takes {most}", "choose linear")
    experts = [source.name for source in space.template.experts]
    whole = [r for r in space.regions if not r.word]  # without what no expert changes, or a word settles
    for t, expert in enumerate(experts):
        fixed = [r.weights[t] for r in whole if not isinstance(r.weights[t], Moving) and r.weights[t] != 0]
        if fixed:
            raise _refusal(f"gives all members one weight, but that of {expert} is fixed at {fixed[0]}", "free it")
    found: dict[frozenset[str], int] = {}
    for t in range(len(experts)):
        names = frozenset(w.dimension for r in whole if isinstance(w := r.weights[t], Moving))
        if names:
            found[names] = found.get(names, 0) + 1
    if len(found) < 2:
        raise _refusal("chooses among experts, but they all share their weights", "set weights.granularity: task")
    total = sum(found.values())
    for d in space.dimensions:
        illegal = next((w for w in (0.0, *(1.0 / k for k in range(1, total + 1))) if not d.holds(w)), None)
        if illegal is not None:
            raise _refusal(
                f"gives members of a soup of k the weight 1/k and the others 0, but {d.name} must lie in "
                f"[{d.low:g}, {d.high:g}], which excludes {illegal:g}",
                "set weights.range: [0, 1]",
            )
    return list(found.items())


def _refusal(problem: str, remedy: str) -> SpecError:
    return SpecError(
        f"searcher soup {problem}", remedy=f"{remedy[0].upper()}{remedy[1:]}, or use search.method coordinate or tpe."
    )
