"""Vocabularies side by side, against plain dictionaries of token -> row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evomerge.alignment import FillRows, Layout, Own, Rows, lay_out, union
from evomerge.methods import METHODS, TensorInfo

WIDTH = 3


def aligned(layout: Layout, raws: Sequence[Tensor]) -> list[Rows]:
    fills = FillRows(layout, [lambda raw=raw: raw for raw in raws], [raw.dtype for raw in raws])
    return [
        Rows(lambda raw=raw: raw, raw.dtype, tuple(raw.shape), index, fills)
        for raw, index in zip(raws, layout.index, strict=True)
    ]


def rows_of(ids: Mapping[str, int], raw: Tensor) -> dict[str, Tensor]:
    return {token: raw[i] for token, i in ids.items()}


def test_union_keeps_the_hosts_ids_and_adds_by_source_then_by_id():
    host = {"b": 1, "a": 0}
    assert union(host, [host, {"a": 3, "y": 7, "x": 2}, {"z": 0, "x": 1}], ["n", "m", "a"]) == {
        "a": 0, "b": 1, "x": 2, "y": 3, "z": 4, "m": 5, "n": 6,
    }  # fmt: skip
    assert list(union({}, [{"q": 4}])) == ["q"]


def test_a_small_case_by_hand():
    """The base lacks x (one expert has it) and y (two have it); expert 1 lacks b and numbers otherwise."""
    base, first, second = {"a": 0, "b": 1}, {"a": 0, "b": 1, "y": 2}, {"y": 0, "a": 1, "x": 2}
    raws = [
        torch.tensor([[1.0], [2.0], [3.0]]),  # the last row is nobody's
        torch.tensor([[10.0], [20.0], [30.0]]),
        torch.tensor([[100.0], [200.0], [300.0], [400.0]]),
    ]
    owns = [Own(ids, len(raw)) for ids, raw in zip((base, first, second), raws, strict=True)]
    ids = union(base, [first, second])
    assert ids == {"a": 0, "b": 1, "y": 2, "x": 3}
    layout = lay_out(owns, ids, 6, host=0, base=0)
    of_base, of_first, of_second = (rows.whole().flatten().tolist() for rows in aligned(layout, raws))
    y, pad = (30.0 + 100.0) / 2, (1.0 + 2.0) / 2
    assert of_base == [1.0, 2.0, y, 300.0, pad, pad]
    assert of_first == [10.0, 20.0, 30.0, 300.0, pad, pad]
    assert of_second == [200.0, 2.0, 100.0, 300.0, pad, pad]


def test_rows_that_are_nobodys_stay_where_the_host_has_them():
    """An embedding with more rows than tokens, of which an expert has used one for a token."""
    base, plain, used = {"a": 0}, {"a": 0}, {"a": 0, "new": 1}
    raws = [torch.arange(3.0)[:, None] + 10 * s for s in range(3)]
    layout = lay_out([Own(ids, 3) for ids in (base, plain, used)], base, 3, host=0, base=0)
    assert [rows.whole().flatten().tolist() for rows in aligned(layout, raws)] == [[0, 1, 2], [10, 11, 12], [20, 1, 22]]


def test_chosen_and_forced_rows():
    ids = [{"a": 0, "b": 1}, {"a": 0, "b": 1, "x": 2}, {"a": 0, "b": 1, "x": 2}]
    raws = [torch.arange(2.0)[:, None], 10 + torch.arange(3.0)[:, None], 20 + torch.arange(3.0)[:, None]]
    owns = [Own(v, len(raw)) for v, raw in zip(ids, raws, strict=True)]
    merged = union(ids[0], ids[1:], ["n", "z"])
    chosen = {"x": ((2, 2),), "a": ((1, 0),), "n": ((1, 1),), "z": ()}
    layout = lay_out(owns, merged, 5, host=0, base=0, chosen=chosen, forced=["a"])
    assert [rows.whole().flatten().tolist() for rows in aligned(layout, raws)] == [
        [10, 1, 22, 11, 0],
        [10, 11, 12, 11, 0],
        [10, 21, 22, 11, 0],
    ]


def test_equal_vocabularies_are_the_identity():
    own = Own({"a": 0, "b": 1}, 4)
    layout = lay_out([own, own], own.ids, 4, host=0, base=0)
    assert layout.is_identity([own, own])
    assert not layout.fills
    assert not lay_out([own, own], own.ids, 8, host=0, base=0).is_identity([own, own])
    raw = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    (first, _) = aligned(layout, [raw, raw])
    assert first.whole().data_ptr() == raw.data_ptr()  # a view: nothing is copied


@pytest.mark.parametrize(("fill", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
def test_rows_keep_their_type_unless_a_mean_needs_a_wider_one(fill: int, dtype: torch.dtype):
    ids = [{"a": 0}, *({"a": 0, "x": 1} for _ in range(fill))]
    raws = [torch.randn(len(v), WIDTH).bfloat16() for v in ids]
    layout = lay_out([Own(v, len(v)) for v in ids], union(ids[0], ids), 2, host=0, base=0)
    base, *experts = aligned(layout, raws)
    assert base.dtype == base.whole().dtype == dtype
    assert all(rows.dtype == torch.bfloat16 for rows in experts)
    assert torch.equal(base.whole()[0], raws[0][0].to(dtype))


@st.composite
def families(draw: st.DrawFn) -> tuple[list[dict[str, int]], list[Tensor], bool]:
    """(vocabularies, tensors, is the first one the base?): tokens in any order, with more rows than tokens."""
    alphabet = [chr(ord("a") + i) for i in range(8)]
    ids, raws = [], []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for _ in range(draw(st.integers(2, 4))):
        tokens = draw(st.lists(st.sampled_from(alphabet), unique=True, min_size=1))
        rows = len(tokens) + draw(st.integers(0, 3))
        places = draw(st.permutations(range(rows)))[: len(tokens)]
        ids.append(dict(zip(tokens, places, strict=True)))
        raws.append(torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64))
    return ids, raws, draw(st.booleans())


def expected_row(token: str, source: int, ids: list[dict[str, int]], raws: list[Tensor], has_base: bool) -> Tensor:
    """The rule, said again: its own; the base's; the mean of those there are."""
    if token in ids[source]:
        return raws[source][ids[source][token]]
    if has_base and token in ids[0]:
        return raws[0][ids[0][token]]
    return torch.stack([raw[v[token]] for v, raw in zip(ids, raws, strict=True) if token in v]).mean(0)


@given(families(), st.integers(0, 3), st.integers(0, 5))
def test_every_source_has_each_tokens_row(family, host: int, more: int):
    ids, raws, has_base = family
    host %= len(ids)
    owns = [Own(v, len(raw)) for v, raw in zip(ids, raws, strict=True)]
    merged = union(ids[host], ids)
    rows = max(len(raws[host]), 1 + max(merged.values())) + more
    layout = lay_out(owns, merged, rows, host=host, base=0 if has_base else None)
    assert {token: merged[token] for token in ids[host]} == ids[host]
    assert sorted(merged) == sorted({t for v in ids for t in v})
    assert len({*merged.values()}) == len(merged)
    for source, one in enumerate(aligned(layout, raws)):
        whole = one.whole()
        assert whole.shape == (rows, WIDTH) == one.shape
        for token, row in merged.items():
            assert torch.allclose(whole[row], expected_row(token, source, ids, raws, has_base), rtol=0, atol=1e-15)
        for start in range(0, rows * WIDTH, 4):  # slices that begin and end within rows
            stop = min(start + 4, rows * WIDTH)
            assert torch.equal(one.flat(start, stop), whole.flatten()[start:stop])


@given(families(), st.sampled_from(["task_arithmetic", "linear", "ties"]))
def test_a_merged_row_is_the_method_on_the_sources_rows(family, name: str):
    ids, raws, _ = family
    owns = [Own(v, len(raw)) for v, raw in zip(ids, raws, strict=True)]
    merged = union(ids[0], ids)
    layout = lay_out(owns, merged, max(len(raws[0]), 1 + max(merged.values())), host=0, base=0)
    base, *experts = (rows.whole() for rows in aligned(layout, raws))
    weights = [0.5 + 0.25 * t for t in range(len(experts))]
    method, params = METHODS[name], {"density": 1.0} if name == "ties" else {}

    def merge(of: Sequence[Tensor]) -> Tensor:
        info = TensorInfo("embed", "embedding", shape=tuple(of[0].shape))
        return method.merge(of[0], of[1:], weights=weights, info=info, **params)

    whole = merge([base, *experts])
    for token, row in merged.items():
        alone = merge([expected_row(token, s, ids, raws, True) for s in range(len(ids))])
        assert torch.allclose(whole[row], alone, rtol=0, atol=1e-12)
