"""GP: the contract."""

from __future__ import annotations

import torch

from evomerge.searchers.gp import GPSearcher
from evomerge.testing.searchers import SearcherContract, make_space


class TestGP(SearcherContract):
    searcher = GPSearcher
    ranks = False
    improves_within = 25
    budget = 16
    kill_budget = 14


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        GPSearcher(make_space()).ask(0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
