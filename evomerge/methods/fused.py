"""Which arithmetic runs as compiled loops, and how tensors are handed to them.

The plain torch code is the reference, runs everywhere, and gives the same bits: a recipe does not depend on what is
installed. The loops (``kernels.py``) need numba (``pip install 'evomerge[fast]'``) and tensors on the CPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What is stored -> what the loops calculate in.
WIDENED = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
_loaded: list[ModuleType | None] = []  # once it has been looked for


def kernels() -> ModuleType | None:
    """The compiled loops, or None where the plain code is to run; looked for at the first call."""
    if not _loaded:
        _loaded.append(_find())
    return _loaded[-1]


def _find() -> ModuleType | None:
    # Without fused multiply-add in the processor torch rounds products before it sums them; the loops do not.
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        from numba.core import config

        if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
            return None
        return importlib.import_module("evomerge.methods.kernels")
    except ImportError:
        return None


@contextmanager
def plain() -> Iterator[None]:
    """Only the plain code inside: for tests and measurements."""
    _loaded.append(None)
    try:
        yield
    finally:
        _loaded.pop()


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The entries of a contiguous CPU tensor, flat and shared; bfloat16 as uint16."""
    flat = tensor.detach().reshape(-1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def alike(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous tensors of one type: their own, if all have it and the loops widen it to ``dtype``, or ``dtype``."""
    own = tensors[0].dtype
    common = own if all(tensor.dtype == own for tensor in tensors) and WIDENED.get(own) == dtype else dtype
    return [tensor.to(common).contiguous() for tensor in tensors]


def addresses(tensors: Sequence[Tensor | None]) -> np.ndarray[Any, Any]:
    """Where the tensors' entries lie; 0 for None. They must outlive what is done with it."""
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=np.int64)


def on_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def scalars(values: Sequence[float], out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers in the type of ``out``, rounded as torch rounds a number that meets a tensor."""
    with np.errstate(over="ignore"):
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64).astype(out.dtype)
