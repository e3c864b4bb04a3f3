"""The documented memory of a worker, by hand for a small family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.checkpoints import Sources, open_checkpoint, open_expert
from evomerge.memory import PROCESS_BYTES, worker_bytes
from evomerge.methods import METHODS

# vocabulary 99, hidden 32, mlp 48, 4 layers, keys 16, embeddings tied to the head
PARAMETERS = 99 * 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_worker(lora_family: Path, dense_family: Path, dtype: str, width: int):
    """Adapters change matrices of 48 x 32 at most, dense experts the embeddings, too."""
    for family, largest in ((lora_family, 48 * 32), (dense_family, 99 * 32)):
        base = open_checkpoint(family / "base")
        sources = Sources(base, [open_expert(family / f"expert{t}", base) for t in range(2)])
        expected = PARAMETERS * width + 8 * largest + PROCESS_BYTES
        assert worker_bytes(sources, dtype) == expected
        if family is dense_family:
            for kept_bits, kept in (([1], PARAMETERS // 4), ([16], 4 * PARAMETERS), ([0, 1, 16], 17 * PARAMETERS // 4)):
                assert worker_bytes(sources, dtype, kept_bits=kept_bits) == expected + kept


def test_what_methods_keep_has_a_limit_for_each(dense_family: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evomerge.memory.MOST_BYTES", 20_000)
    base = open_checkpoint(dense_family / "base")
    sources = Sources(base, [open_expert(dense_family / "expert0", base)])
    needed = [worker_bytes(sources, "float32", kept_bits=bits) for bits in ([], [1], [16], [1, 16])]
    assert [one - needed[0] for one in needed] == [0, PARAMETERS // 8, 20_000, 20_000 + PARAMETERS // 8]


def test_what_methods_keep():
    """As docs/architecture.md says it."""
    kept = {name: method.kept_bits for name, method in METHODS.items() if method.kept_bits}
    assert kept == {"dare_linear": 1, "dare_ties": 1, "della_linear": 16, "della": 16, "adarank": 64, "svd_linear": 64}


KEPT = """
import resource
from evomerge.memory import keep_freed_memory
if keep_freed_memory():
    pages = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [bytearray(4_000_000) for _ in range(20)]
        del parts
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(*pages)
"""


def test_freed_memory_is_used_again_and_does_not_come_anew_from_the_system():
    """80 MB are some 20,000 pages of 4 KiB. The setting is for a whole process: hence one of its own."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("the C library is not glibc")
    _, *later = map(int, done.stdout.split())
    assert sum(later) < 100
