"""The losses against formulas in numpy and scipy, closed forms of their gradients, and finite differences."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor

from evomerge.errors import CandidateError, SpecError
from evomerge.evaluation import Predictions
from evomerge.losses import LOSSES, Loss, find

SHARES = [1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1.0]  # of the rows of 4 items, with 1, 2, 4 and 1 rows
FIRST = [0, 1, 3, 7, 8]
NUM_ITEMS = 4


def predictions(logits: np.ndarray, right: list[int] | None = None, hidden: np.ndarray | None = None) -> Predictions:
    """Of as many items of one row as there are rows."""
    shares = torch.ones(len(logits), dtype=torch.float64)
    return Predictions(
        torch.tensor(logits),
        shares,
        None if right is None else torch.tensor(right),
        None if hidden is None else torch.tensor(hidden),
        None if hidden is None else torch.ones(len(hidden), dtype=torch.float64),
    )


def logits_of(rows: int, classes: int, *, least: float = -30, most: float = 30) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.float64, (rows, classes), elements=st.floats(least, most))


matrices = st.tuples(st.integers(1, 5), st.integers(2, 6)).flatmap(lambda shape: logits_of(*shape))
pairs = st.tuples(st.integers(1, 5), st.integers(2, 6)).flatmap(lambda s: st.tuples(logits_of(*s), logits_of(*s)))


@given(matrices)
def test_entropy_is_scipys(z: np.ndarray):
    expected = entropy(softmax(z, axis=1), axis=1).mean()
    assert LOSSES["entropy"].of(predictions(z), None).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(matrices, st.data())
def test_cross_entropy_is_the_mean_negative_log_probability(z: np.ndarray, data: st.DataObject):
    right = [data.draw(st.integers(0, z.shape[1] - 1)) for _ in z]
    expected = -np.mean([log_softmax(row)[k] for row, k in zip(z, right, strict=True)])
    found = LOSSES["cross_entropy"].of(predictions(z, right), None).item()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs)
def test_the_distance_to_the_expert_is_its_relative_entropy(both: tuple[np.ndarray, np.ndarray]):
    mine, theirs = both
    expected = entropy(softmax(theirs, axis=1), softmax(mine, axis=1), axis=1).mean()  # KL(first || second)
    found = LOSSES["kl_to_expert"].of(predictions(mine), predictions(theirs)).item()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found >= -1e-12
    assert LOSSES["kl_to_expert"].of(predictions(theirs), predictions(theirs)).item() == 0


def test_the_distance_is_from_the_expert_and_not_to_it():
    """By hand: certain of class 0, against evens."""
    even, sure = np.array([[0.0, 0.0]]), np.array([[0.0, -np.inf]])
    kl = LOSSES["kl_to_expert"]
    assert kl.of(predictions(even), predictions(sure)).item() == pytest.approx(math.log(2))
    assert kl.of(predictions(sure), predictions(even)).item() == math.inf


@given(pairs)
def test_hidden_mse_is_the_mean_square_over_items_and_width(both: tuple[np.ndarray, np.ndarray]):
    mine, theirs = both
    z = np.zeros((len(mine), 2))
    found = LOSSES["hidden_mse"].of(predictions(z, hidden=mine), predictions(z, hidden=theirs)).item()
    assert found == pytest.approx(np.square(mine - theirs).mean(), rel=1e-9)


def of_several_rows(seed: int, dtype: torch.dtype = torch.float64) -> Predictions:
    """Four items with 1, 2, 4 and 1 rows of 5 classes, and as many hidden states of width 3."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(SHARES, dtype=dtype)
    return Predictions(
        torch.randn(8, 5, generator=generator, dtype=torch.float64).mul(3).to(dtype),
        weights,
        torch.randint(5, (8,), generator=generator),
        torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype),
        weights,
    )


def item(p: Predictions, n: int) -> Predictions:
    rows = slice(FIRST[n], FIRST[n + 1])
    assert p.right is not None and p.hidden is not None and p.hidden_weights is not None
    return Predictions(p.logits[rows], p.weights[rows], p.right[rows], p.hidden[rows], p.hidden_weights[rows])


@pytest.mark.parametrize("name", LOSSES)
def test_items_weigh_the_same_however_many_rows_they_have(name: str):
    loss, mine, expert = LOSSES[name], of_several_rows(0), of_several_rows(1)
    each = [loss.of(item(mine, n), item(expert, n)).item() for n in range(NUM_ITEMS)]
    assert loss.of(mine, expert).item() == pytest.approx(np.mean(each), rel=1e-12)
    assert len({round(value, 6) for value in each}) == NUM_ITEMS


def with_parts(p: Predictions, logits: Tensor, hidden: Tensor) -> Predictions:
    return Predictions(logits, p.weights, p.right, hidden, p.hidden_weights)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str):
    loss, p, expert = LOSSES[name], of_several_rows(2), of_several_rows(3)
    assert p.hidden is not None
    logits, hidden = p.logits.clone().requires_grad_(True), p.hidden.clone().requires_grad_(True)
    of_hidden = name == "hidden_mse"
    (gradient,) = torch.autograd.grad(loss.of(with_parts(p, logits, hidden), expert), hidden if of_hidden else logits)
    step = 1e-5
    with torch.no_grad():
        moving = hidden if of_hidden else logits
        for index in np.ndindex(*moving.shape):
            values = []
            for sign in (1, -1):
                moving[index] += sign * step
                values.append(loss.of(with_parts(p, logits, hidden), expert).item())
                moving[index] -= sign * step
            assert float(gradient[index]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)


def closed_form(name: str, z: Tensor, expert: Tensor, right: Tensor) -> Tensor:
    """The gradient of a row's loss by its logits, in closed form, in float64."""
    logs = z.double().log_softmax(1)
    p = logs.exp()
    if name == "entropy":  # -p_j (log p_j + H)
        plogp = torch.where(p > 0, p * logs, 0.0)
        return -(plogp - p * plogp.sum(1, keepdim=True))
    if name == "cross_entropy":
        return p - torch.nn.functional.one_hot(right, z.shape[1])
    return p - expert.double().softmax(1)


EXTREME = torch.tensor(
    [
        [1e4, -1e4, 0.0, 3.0],
        [-1e4, -1e4, -1e4, -1e4],
        [1e4, 1e4, -1e4, -torch.inf],
        [0.5, -torch.inf, 0.25, -torch.inf],
        [-torch.inf, 7.0, -torch.inf, -torch.inf],
        [-1e4, 1e4, 1e4 - 1, 1e4 - 2],
        [0.0, -90.0, -104.0, -120.0],
    ]
)


@pytest.mark.parametrize("name", ["entropy", "cross_entropy", "kl_to_expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_values_and_gradients(name: str, dtype: torch.dtype):
    """Certain predictions, and classes that an item lacks; the expert is as extreme, but lacks no other classes."""
    z = EXTREME.to(dtype).requires_grad_(True)
    expert = torch.where(torch.isinf(EXTREME), EXTREME, EXTREME.flip(1).clamp(min=-1e4)).to(dtype)
    right = torch.tensor([1, 2, 0, 2, 1, 0, 3])
    shares = torch.ones(len(z))
    value = LOSSES[name].of(Predictions(z, shares, right), Predictions(expert, shares, right))
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    expected = closed_form(name, z.detach(), expert, right) / len(z)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_certain_prediction_has_no_entropy_and_an_even_one_all_of_it():
    z = np.array([[0.0, -np.inf, -np.inf, -np.inf], [1e4, -1e4, 0, 0]])
    assert LOSSES["entropy"].of(predictions(z), None).item() == 0
    even = np.array([[1e4, 1e4, 1e4, -np.inf]])
    assert LOSSES["entropy"].of(predictions(even), None).item() == pytest.approx(math.log(3))


@given(logits_of(3, 4, least=-1e4, most=1e4), st.floats(-1e4, 1e4))
def test_a_constant_in_each_row_is_no_matter(z: np.ndarray, constant: float):
    for name in ("entropy", "cross_entropy", "kl_to_expert"):
        values = [
            LOSSES[name].of(predictions(z + c, [0, 3, 1]), predictions(z[::-1] - c)).item() for c in (0.0, constant)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_or_wider(name: str, dtype: torch.dtype):
    mine, expert = of_several_rows(4, dtype), of_several_rows(5, dtype)
    found = LOSSES[name].of(mine, expert)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mine.hidden is not None and expert.hidden is not None
    exact = [with_parts(of_several_rows(6), p.logits.double(), p.hidden.double()) for p in (mine, expert)]  # type: ignore[union-attr]
    exact = [Predictions(p.logits, p.weights, mine.right, p.hidden, p.hidden_weights) for p in exact]
    assert found.item() == pytest.approx(LOSSES[name].of(exact[0], exact[1]).item(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.teacher])
def test_nothing_flows_back_into_the_expert(name: str):
    mine, expert = of_several_rows(7), of_several_rows(8)
    assert mine.hidden is not None and expert.hidden is not None
    theirs = [expert.logits.requires_grad_(True), expert.hidden.requires_grad_(True)]
    mine = with_parts(mine, mine.logits.requires_grad_(True), mine.hidden.requires_grad_(True))
    value = LOSSES[name].of(mine, expert)
    assert torch.autograd.grad(value, theirs, allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_says_it_needs_is_all_that_it_needs(name: str):
    loss: Loss = LOSSES[name]
    mine, expert = of_several_rows(9), of_several_rows(10)
    assert loss.name == name
    assert loss.summary and loss.reference
    assert loss.needs("tokens") - {"labels", "hidden"} == {"tokens"}
    assert loss.needs("answers") == {"answers"} | ({"labels"} if loss.labels else set()) | (
        {"hidden"} if loss.hidden else set()
    )
    bare = Predictions(
        mine.logits,
        mine.weights,
        mine.right if loss.labels else None,
        mine.hidden if loss.hidden else None,
        mine.hidden_weights if loss.hidden else None,
    )
    assert loss.of(bare, expert if loss.teacher else None).item() == loss.of(mine, expert).item()
    if loss.labels or loss.hidden:
        with pytest.raises(ValueError, match=f"loss {name} needs"):
            loss.of(Predictions(mine.logits, mine.weights), expert)
    if loss.teacher:
        with pytest.raises(ValueError, match=f"loss {name} needs the expert"):
            loss.of(mine, None)
        with pytest.raises(ValueError, match=r"one shape.*\(8, .\).*\(1, .\)"):
            loss.of(mine, item(expert, 0))


def test_the_table_is_by_name():
    assert list(LOSSES) == ["entropy", "cross_entropy", "kl_to_expert", "hidden_mse"]


BRIER = """
from evomerge import Loss


class Brier(Loss):
    name = "brier"
    labels = True

    def of(self, mine, expert):
        p = mine.logits.softmax(1)
        miss = p.square().sum(1) - 2 * p.gather(1, mine.right[:, None])[:, 0] + 1
        return (miss * mine.weights).sum() / mine.weights.sum()
"""


@pytest.fixture
def brier(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(BRIER)
    return tmp_path


@pytest.mark.parametrize("name", ["mine.py@Brier", "mine.py@brier", "mine.py"])
def test_a_file_s_loss_is_a_loss(brier: Path, name: str):
    found = find(name, brier)
    assert found.code is not None and len(found.code.sha256) == 64
    assert (found.loss.name, found.loss.labels, found.loss.teacher) == ("brier", True, False)
    assert found.loss.needs("answers") == {"answers", "labels"}
    value = found.loss.of(predictions(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), [0, 2]), None)
    by_hand = ((0.5**2 + 0.25**2 + 0.25**2) + (0.1**2 + 0.8**2 + 0.9**2)) / 2
    assert value.item() == pytest.approx(by_hand)
    (brier / "mine.py").write_text(BRIER + "\n")
    other = find(name, brier).code
    assert other is not None and other.sha256 != found.code.sha256


def test_evomerge_s_own_are_found_by_name(tmp_path: Path):
    assert all(find(name, tmp_path).loss is loss and find(name, tmp_path).code is None for name, loss in LOSSES.items())
    with pytest.raises(SpecError, match=r"no loss 'entrpy'[\s\S]*Did you mean 'entropy'"):
        find("entrpy", tmp_path)
    with pytest.raises(SpecError, match=r"no file 'none.py'"):
        find("none.py@x", tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("class Brier(Loss)", "class Brier", "must define exactly one loss, but defines 0"),
        ("def of", "def value", "must define exactly one loss, but defines 0"),
        ("from evomerge import", "import nothing_like_it; from evomerge import", "line 2: ModuleNotFoundError"),
        ("labels = True", "labels = 'yes'", "labels must be True or False, but is 'yes'"),
    ],
)
def test_broken_code_is_refused_with_its_file(brier: Path, before: str, after: str, problem: str):
    assert before in BRIER
    (brier / "mine.py").write_text(BRIER.replace(before, after))
    with pytest.raises(SpecError, match=problem) as refused:
        find("mine.py", brier)
    assert refused.value.where == str(brier / "mine.py")


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (".softmax(1)", ".softmax(7)", r"mine.py, line 10: IndexError"),
        ("return (miss * mine.weights).sum() / mine.weights.sum()", "return miss", "must give a scalar tensor"),
        ("return (miss * mine.weights).sum() / mine.weights.sum()", "return 1.0", "scalar tensor, but gave 1.0"),
    ],
)
def test_what_goes_wrong_while_it_runs_is_the_candidates(brier: Path, before: str, after: str, problem: str):
    assert before in BRIER
    (brier / "mine.py").write_text(BRIER.replace(before, after))
    with pytest.raises(CandidateError, match=problem) as failed:
        find("mine.py", brier).loss.of(predictions(np.zeros((2, 3)), [0, 2]), None)
    assert failed.value.kind == "error"
