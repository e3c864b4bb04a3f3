"""How adapters are trained: against torch's own layers and optimiser, and what training must and must not do."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.descent import batch
from evomerge.surgery_training import distance, start, train

OPTIONS = {"rank": 4, "steps": 60, "lr": 0.01, "size": 8, "seed": 3, "task": "one"}


def features(seed: int, items: int = 24, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """(merged, expert): an expert whose features the merge has moved by a bias that depends on the item."""
    generator = torch.Generator().manual_seed(seed)
    merged = torch.randn(items, width, generator=generator)
    bias = torch.relu(merged @ torch.randn(width, 2, generator=generator)) @ torch.randn(2, width, generator=generator)
    return merged, merged - bias


def test_the_start_changes_nothing_and_is_as_torch_initialises_a_linear_layer():
    adapter = start(100, 64, seed=0, task="one")
    assert adapter.down.shape == (64, 100) and adapter.up.shape == (100, 64)
    assert not adapter.up.any()
    # uniform in +-1 / sqrt(width), which kaiming_uniform_ with a = sqrt(5) comes to: variance 1 / (3 width)
    assert adapter.down.abs().max() <= 0.1
    assert float(adapter.down.var()) == pytest.approx(1 / 300, rel=0.05)
    assert float(adapter.down.mean()) == pytest.approx(0, abs=0.005)
    assert torch.equal(start(100, 64, seed=0, task="one").down, adapter.down)
    assert not torch.equal(start(100, 64, seed=0, task="two").down, adapter.down)
    assert not torch.equal(start(100, 64, seed=1, task="one").down, adapter.down)


def test_training_is_that_of_torchs_layers_by_torchs_adam():
    merged, expert = features(0)
    first = start(6, 4, seed=3, task="one")
    down, up = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 6, bias=False)
    with torch.no_grad():
        down.weight.copy_(first.down)
        up.weight.zero_()
    adam = torch.optim.Adam([down.weight, up.weight], lr=0.01)
    for step in range(60):
        rows = list(batch(range(24), seed=3, task="surgery: one", turn=step, size=8))
        z = merged[rows]
        adam.zero_grad()
        torch.nn.L1Loss()(z - up(torch.relu(down(z))), expert[rows]).backward()
        adam.step()
    trained = train(merged, expert, **OPTIONS)
    torch.testing.assert_close(trained.down, down.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.up, up.weight.detach(), rtol=1e-4, atol=1e-5)
    assert trained.down.dtype == trained.up.dtype == torch.float32 and not trained.up.requires_grad


def test_the_first_step_by_hand():
    """With up at zero, down has no gradient, and Adam's first step moves each number of up by lr against its sign."""
    merged, expert = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    first = start(2, 3, seed=0, task="one")
    trained = train(merged, expert, rank=3, steps=1, lr=0.5, size=1, seed=0, task="one")
    assert torch.equal(trained.down, first.down)
    hidden = torch.relu(first.down @ merged[0])
    # Z' is above the expert in feature 0 (the slope by up is -hidden), below it in feature 1 (+hidden)
    expected = torch.stack([0.5 * hidden.sign(), -0.5 * hidden.sign()])
    torch.testing.assert_close(trained.up, expected, rtol=1e-4, atol=1e-6)
    assert hidden.any(), "nothing would have been tried"


@settings(max_examples=8)
@given(st.integers(0, 2**32))
def test_training_brings_the_items_nearer_to_the_expert(seed: int):
    merged, expert = features(seed)
    trained = train(merged, expert, **{**OPTIONS, "steps": 100})
    assert distance(trained(merged), expert) < distance(merged, expert)


def test_features_that_are_the_experts_stay_so():
    merged, _ = features(1)
    trained = train(merged, merged.clone(), **OPTIONS)
    assert not trained.up.any()


def test_it_is_a_function_of_its_arguments():
    merged, expert = features(2)
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(train(merged, expert, **OPTIONS))
    assert torch.equal(found[0].up, found[1].up) and torch.equal(found[0].down, found[1].down)
    other = train(merged, expert, **{**OPTIONS, "task": "two"})
    assert not torch.equal(other.up, found[0].up)


def test_fewer_items_than_a_step_wants_are_all_of_them():
    merged, expert = features(3, items=3)
    trained = train(merged, expert, **{**OPTIONS, "size": 100})
    assert distance(trained(merged), expert) < distance(merged, expert)
