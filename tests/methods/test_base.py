"""What Method.merge checks around a method's own arithmetic."""

from __future__ import annotations

import pytest
import torch

from evomerge.errors import MethodError
from evomerge.methods.base import InputsChanged, LowRank, Method, TensorInfo


class Probe(Method):
    """Does what it is told to."""

    name, summary, reference = "probe", "for tests", "none"
    factors = True

    def __init__(self, combine):
        self.wanted = combine

    def combine(self, base, experts, **options):
        return self.wanted(base, experts, options)


BASE, EXPERT = torch.zeros(4, 6), torch.ones(4, 6)
INFO = TensorInfo("w", shape=(4, 6))


def merge(combine, *, info=INFO, base=BASE, experts=(EXPERT,), **options):
    experts = [expert.clone() if isinstance(expert, torch.Tensor) else expert for expert in experts]
    return Probe(combine).merge(base.clone(), experts, weights=[0.5] * len(experts), info=info, **options)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda base, experts, _: base.add_(experts[0]),
        lambda base, experts, _: experts[0].sub_(base),
        lambda base, experts, _: experts[0].mul_(2).clone(),
        lambda base, experts, _: base.view(-1)[3:5].fill_(1) is None or base.clone(),
    ],
    ids=["base", "expert", "expert, and a copy is given", "a view of the base"],
)
def test_inputs_that_were_written_to_are_noticed(spoil):
    with pytest.raises(InputsChanged, match="method probe wrote into the base or an expert at w"):
        merge(spoil)


def test_factors_that_were_written_to_are_noticed():
    low_rank = LowRank(torch.ones(4, 1), torch.ones(1, 6), 1.0)
    with pytest.raises(InputsChanged):
        merge(lambda base, experts, _: base + experts[0].B.mul_(2) @ experts[0].A, experts=[low_rank])


@pytest.mark.parametrize(
    "result", [torch.zeros(24), torch.zeros(4, 5), torch.zeros(4, 6, dtype=torch.float64)], ids=lambda t: str(t.shape)
)
def test_a_result_of_another_shape_or_dtype_is_refused(result: torch.Tensor):
    with pytest.raises(MethodError, match=r"method probe gave .* for w, which is \(4, 6\) and merged in torch.float32"):
        merge(lambda *_: result)


def test_combine_gets_what_was_checked_and_the_arithmetic_dtype():
    seen = {}

    def combine(base, experts, options):
        seen.update(options)
        return torch.zeros(4, 6)

    merge(combine, base=BASE.bfloat16(), experts=[EXPERT.bfloat16()], seed=3)
    assert seen == {"weights": [0.5], "dtype": torch.float32, "info": INFO, "state": None, "seed": 3}


def test_a_slice_comes_only_where_the_method_takes_slices():
    part = {"base": BASE[:2], "experts": [EXPERT[:2]]}
    assert merge(lambda base, *_: base.clone(), **part).shape == (2, 6)
    whole = Probe(lambda base, *_: base.clone())
    whole.chunked = False
    with pytest.raises(MethodError, match="got a slice of w"):
        whole.merge(BASE[:2], [EXPERT[:2]], weights=[1.0], info=INFO)
    assert whole.merge(BASE, [EXPERT], weights=[1.0], info=INFO).shape == (4, 6)


def test_inference_tensors_have_no_version_and_are_taken():
    with torch.inference_mode():
        base, expert = torch.zeros(4, 6), torch.ones(4, 6)
        assert torch.equal(
            Probe(lambda b, e, _: b + e[0]).merge(base, [expert], weights=[1.0], info=INFO), torch.ones(4, 6)
        )
