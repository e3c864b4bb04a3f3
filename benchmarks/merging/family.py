"""Random checkpoints with the shapes of known models: a base, and experts that lie close to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BASE_SPREAD, TUNED_SPREAD = 0.05, 0.002  # standard deviations of the base's weights and of the task vectors


@dataclass(frozen=True)
class Shapes:
    """A Llama's numbers, under the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> shape."""
        h, m = self.hidden_size, self.intermediate_size
        kv = h // self.num_attention_heads * self.num_key_value_heads
        layer = {
            "input_layernorm": (h,),
            "mlp.down_proj": (h, m),
            "mlp.gate_proj": (m, h),
            "mlp.up_proj": (m, h),
            "post_attention_layernorm": (h,),
            "self_attn.k_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "self_attn.q_proj": (h, h),
            "self_attn.v_proj": (kv, h),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for n in range(self.num_hidden_layers):
            found |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
        found["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            found["lm_head.weight"] = (self.vocab_size, h)
        return found

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.tensors().values())

    def config(self, dtype: str) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": dtype,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            **vars(self),
        }


SIZES = {
    "134M": Shapes(576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "1.1B": Shapes(2048, 5632, 22, 32, 4, 32000, False),  # TinyLlama
    "tiny": Shapes(32, 64, 2, 4, 2, 64, True),
}


def make_tensors(shapes: Shapes, which: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base (``which`` 0) or an expert (from 1 on)."""
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(which)
    tensors = {}
    for name, shape in shapes.tensors().items():
        tensor = torch.randn(shape, generator=base).mul_(BASE_SPREAD)
        if which:
            tensor += torch.randn(shape, generator=own).mul_(TUNED_SPREAD)
        tensors[name] = tensor.to(dtype)
    return tensors


def write_family(folder: Path, size: str, *, num_experts: int, dtype: str) -> list[Path]:
    """[base, expert, ...] as Hugging Face folders, written unless they are there."""
    shapes = SIZES[size]
    paths = [folder / f"{size}-{dtype}-{which}" for which in range(num_experts + 1)]
    for which, path in enumerate(paths):
        done = path / "config.json"  # written last
        if done.exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors = make_tensors(shapes, which, getattr(torch, dtype))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        done.write_text(json.dumps(shapes.config(dtype), indent=1))
    return paths


def write_many(folder: Path, count: int, *, num_experts: int) -> list[Path]:
    """[base, expert, ...] with ``count`` tensors of 8 x 8, under a Llama's configuration."""
    paths = [folder / f"many-{count}-{which}" for which in range(num_experts + 1)]
    shapes = SIZES["tiny"]
    for which, path in enumerate(paths):
        done = path / "config.json"
        if done.exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(which)
        tensors = torch.randn(count, 8, 8, generator=base).mul_(BASE_SPREAD)
        if which:
            tensors += torch.randn(count, 8, 8, generator=own).mul_(TUNED_SPREAD)
        named = {
            f"model.layers.{n // 100}.mlp.part.{n % 100}.weight": t.clone() for n, t in enumerate(tensors.bfloat16())
        }
        save_file(named, path / "model.safetensors", metadata={"format": "pt"})
        layers = {"num_hidden_layers": -(-count // 100)}
        done.write_text(json.dumps(shapes.config("bfloat16") | layers, indent=1))
    return paths
