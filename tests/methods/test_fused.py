"""The compiled loops against the plain torch code: the same bits, for every type, layout, weight and number."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods import METHODS, fused
from evomerge.methods.arithmetic import sum_experts, sum_task_vectors
from evomerge.methods.base import TensorInfo, check_params
from evomerge.methods.chunks import merge_chunks
from evomerge.methods.masks import Mask, Masks, draw_mask
from evomerge.methods.random import BLOCK, uniform
from evomerge.methods.selection import order_statistics
from evomerge.methods.thinning import Election, Thinned, merge_thinned

pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="numba is not installed, or no fused multiply-add")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, 1.0]
WEIGHTS = st.one_of(st.sampled_from([1.0, -1.0, 0.3, 1e-30, 1e30]), st.floats(-2, 2).filter(lambda w: w != 0))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit; any NaN equals any other."""
    integer = torch.int64 if one.dtype == torch.float64 else torch.int32
    equal = (one.contiguous().view(integer) == other.contiguous().view(integer)) | (one.isnan() & other.isnan())
    return one.dtype == other.dtype and one.shape == other.shape and bool(equal.all())


@st.composite
def tensors(draw: st.DrawFn, count: int) -> list[Tensor]:
    """``count`` tensors of one shape, of types, layouts and with numbers that may be anything."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    one_type = draw(st.sampled_from([*DTYPES, None]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    found = []
    for k in range(count):
        tensor = base + 0.1 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) * (k > 0)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
            tensor[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = value
        tensor = tensor.to(one_type or draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()):
            tensor = tensor.t().contiguous().t()
        if draw(st.booleans()):
            tensor = torch.cat([tensor[:1], tensor])[1:]  # not where memory begins
        found.append(tensor)
    return found


@given(st.data())
@settings(max_examples=150)
def test_merge_thinned(data: st.DataObject):
    count = data.draw(st.integers(1, 6))
    base, *experts = data.draw(tensors(count + 1))
    wide = any(t.dtype == torch.float64 for t in (base, *experts)) or data.draw(st.booleans())  # of one left out
    dtype = torch.float64 if wide else torch.float32
    parts = []
    for t, expert in enumerate(experts):
        mask, low, high = None, 0.0, math.inf
        if data.draw(st.booleans()):
            mask = draw_mask(5, "w", t, 0, base.numel(), 0.5)
        else:
            sizes = (expert.to(dtype) - base.to(dtype)).abs().reshape(-1).sort().values
            low = float(sizes[data.draw(st.integers(0, len(sizes) - 1))]) if data.draw(st.booleans()) else 0.0
            high = float(sizes[data.draw(st.integers(0, len(sizes) - 1))]) if data.draw(st.booleans()) else math.inf
        factor = data.draw(st.sampled_from([1.0, 2.0, 1 / 0.3]))
        parts.append(Thinned(expert, data.draw(WEIGHTS), mask, low, high, factor))
    election = data.draw(st.sampled_from([None, *(Election(m, n) for m in ("mean", "sum") for n in (False, True))]))
    options: dict[str, Any] = {"dtype": dtype, "election": election, "scale": data.draw(WEIGHTS)}
    with fused.plain():
        expected = merge_thinned(base, parts, **options)
    assert same_bits(merge_thinned(base, parts, **options), expected)


@given(st.data())
@settings(max_examples=100)
def test_sums(data: st.DataObject):
    count = data.draw(st.integers(1, 6))
    base, *experts = data.draw(tensors(count + 1))
    wide = any(t.dtype == torch.float64 for t in (base, *experts)) or data.draw(st.booleans())  # of one left out
    dtype = torch.float64 if wide else torch.float32
    weights = [data.draw(WEIGHTS) for _ in experts]
    some = [data.draw(st.sampled_from([0.0, weight])) for weight in weights]
    with fused.plain():
        expected = [sum_experts(experts, weights, dtype), sum_task_vectors(base, experts, some, dtype)]
    assert same_bits(sum_experts(experts, weights, dtype), expected[0])
    assert same_bits(sum_task_vectors(base, experts, some, dtype), expected[1])


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.statistics is None and not m.needs_factors))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_method_gives_the_same_bits(name: str, dtype: torch.dtype):
    method = METHODS[name]
    generator = torch.Generator().manual_seed(3)
    shape = (3, BLOCK) if method.chunked else (37, 61)
    base = torch.randn(shape, generator=generator)
    count = method.num_experts[1] or 4
    experts = [(base + 0.01 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    base, info = base.to(dtype), TensorInfo("w", kind="mlp", shape=shape)
    weights = [0.4, 0.0, -0.3, 0.7][:count] if method.weight.low is None else [0.4, 0.0, 0.3, 0.7][:count]
    params = check_params(name, method, {})

    def merge() -> Tensor:
        pieces = merge_chunks(method, base, experts, weights=weights, info=info, seed=1, params=params)
        return torch.cat([piece for _, piece in pieces])

    with fused.plain():
        expected = merge()
    assert same_bits(merge(), expected)


@given(st.data())
@settings(max_examples=60)
def test_order_statistics(data: st.DataObject):
    signed, dtype = data.draw(st.booleans()), data.draw(st.sampled_from([torch.float32, torch.float64]))
    n = data.draw(st.integers(1, 300))
    values = torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    for value in data.draw(st.lists(st.sampled_from(SPECIAL), max_size=5)):
        values[data.draw(st.integers(0, n - 1))] = value
    values = values if signed else values.abs()
    ranks = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3))

    def found() -> list[list[float]]:
        return order_statistics(lambda: [(0, values[:7]), (0, values[7:])], 1, lambda _: ranks, signed=signed)

    with fused.plain():
        expected = found()
    np.testing.assert_array_equal(found(), expected)


@given(
    start=st.sampled_from([0, 1, 31, 32, 1000, BLOCK - 32, BLOCK, 3 * BLOCK + 64]),
    count=st.sampled_from([0, 1, 31, 32, 33, 1000, 1025, BLOCK, 2 * BLOCK + 5]),
)
@settings(max_examples=60)
def test_draws(start: int, count: int):
    with fused.plain():
        numbers = uniform(9, "w", 2, start, count)
    assert same_bits(uniform(9, "w", 2, start, count), numbers)


def test_masks_are_kept_and_change_nothing():
    masks = Masks(4, 0.5)
    first = masks.draw("w", 0, 0, 1000)
    assert masks.draw("w", 0, 0, 1000) is first
    assert torch.equal(first.words, draw_mask(4, "w", 0, 0, 1000, 0.5).words)
    assert not torch.equal(first.words, masks.draw("w", 1, 0, 1000).words)


def test_masks_beyond_their_room_are_drawn_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evomerge.methods.masks.MOST_BYTES", 300)
    masks = Masks(4, 0.5)
    kept, beyond = masks.draw("w", 0, 0, 2048), masks.draw("v", 0, 0, 2048)
    assert masks.draw("w", 0, 0, 2048) is kept
    again = masks.draw("v", 0, 0, 2048)
    assert again is not beyond
    assert torch.equal(again.words, beyond.words)


@given(st.lists(st.booleans(), max_size=100))
def test_a_mask_is_what_it_was_made_of(keep: list[bool]):
    wanted = torch.tensor(keep, dtype=torch.bool)
    assert torch.equal(Mask.of(wanted).values(torch.empty(len(keep))).bool(), wanted)


def test_without_numba_the_plain_code_runs():
    code = "import sys; sys.modules['numba'] = None; from evomerge.methods import fused; print(fused.kernels())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


FIRST_CALL = """
import resource
import numpy as np
from evomerge.methods import fused
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, resource.RLIM_INFINITY))
out = np.zeros(3, np.float32)
loops = fused.kernels()
loops.draw_uniform(np.full(4, 2**63 + 2**41, np.uint64), out)
print(out.any(), loops.draw_uniform.stats.cache_path)
"""


def first_call(cache: Path, largest: int | None = None) -> list[str]:
    """[were numbers drawn, the folder of the machine code] of a new process that can write files of so many bytes."""
    code = FIRST_CALL.format(largest="resource.RLIM_INFINITY" if largest is None else largest)
    env = {**os.environ, "EVOMERGE_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.split()


def test_machine_code_is_kept_by_the_source_of_all_loops(tmp_path: Path):
    """A change in one file changes what another calls: all are compiled anew."""
    drawn, folder = first_call(tmp_path)
    files = sorted(Path(fused.__file__).parent.glob("*kernels.py"))
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    assert drawn == "True" and len(files) == 4
    assert Path(folder).parent == tmp_path / "loops" / source
    assert list(Path(folder).glob("*.nbc"))


def test_where_no_folder_can_be_written_they_are_compiled_once_a_process():
    drawn, folder = first_call(Path("/dev/null/cache"))
    assert (drawn, folder) == ("True", "None")


@pytest.mark.parametrize("largest", [0, 2000], ids=["nothing fits", "the index fits"])
def test_on_a_full_disk_they_are_compiled_once_a_process(tmp_path: Path, largest: int):
    """What is written is cut off by a limit to files' sizes, which is an OSError at the same place."""
    drawn, folder = first_call(tmp_path, largest)
    assert drawn == "True"
    files = list(Path(folder).iterdir())
    assert not [file for file in files if file.suffix == ".nbc" or ".tmp" in file.name]
    assert bool(files) == bool(largest)
    assert first_call(tmp_path) == [drawn, folder]  # with room again they are kept
    assert list(Path(folder).glob("*.nbc"))


def test_importing_the_methods_does_not_import_numba():
    code = "import sys, evomerge.methods; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
