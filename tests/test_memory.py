"""The documented memory of a worker, by hand for a small family."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.checkpoints import Sources, open_checkpoint, open_expert
from evomerge.memory import PROCESS_BYTES, worker_bytes

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
            assert worker_bytes(sources, dtype, masks=True) == expected + 2 * PARAMETERS // 8
