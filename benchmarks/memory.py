"""What a search and an export of a 1.1B-parameter Llama with 4 experts keep in memory, beside what is documented.

    python benchmarks/memory.py [--dense] [--compute-dtype bfloat16] [--folder DIR]

Writes a random model of TinyLlama's shape (2.2 GB in bfloat16, three shards) and four experts of it: LoRA adapters of
rank 16 on all linear layers, or with --dense whole checkpoints (2.2 GB each). Then it runs `evomerge run` with two
candidates and a tiny evaluation on one local worker, and `evomerge export`, and prints the most anonymous memory that
each process had, sampled every 20 ms. Anonymous memory is what a process needs; pages of mapped files, which the system
takes back when it wants to, are not counted. Everything is in a temporary folder (16 GB with --dense) that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from evomerge.checkpoints import open_checkpoint
from evomerge.safetensor_files import ShardWriter

LAYERS, HIDDEN, KEYS, INNER, TOKENS, EXPERTS, RANK = 22, 2048, 256, 5632, 32000, 4, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": INNER, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": LAYERS, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EVALUATOR = """
import torch


def items():
    return [{"task": "one", "id": str(i), "text": f"{i}"} for i in range(12)]


def score(model, tokenizer, items):
    ids = torch.tensor([[(97 * int(item["id"]) + 31 * j) % 32000 for j in range(32)] for item in items])
    with torch.no_grad():
        logits = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)
    return logits.gather(2, ids[:, 1:, None]).mean((1, 2)).tolist()
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, in the order of the layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TOKENS, HIDDEN)}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        found |= {f"model.layers.{layer}.{name}.weight": (HIDDEN,) for name in NORMS}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (TOKENS, HIDDEN)}


def write_checkpoint(folder: Path, seed: int, base: Path | None = None) -> None:
    """Three shards of random weights, or of ``base`` and a little noise. One tensor at a time is in memory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator, sources = torch.Generator().manual_seed(seed), base and open_checkpoint(base)
    tensors = shapes()
    names, weight_map = list(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = names[number * len(names) // 3 : (number + 1) * len(names) // 3]
        with ShardWriter(folder / file, {n: (torch.bfloat16, tensors[n]) for n in part}) as writer:
            for name in part:
                start = torch.ones(()) if len(tensors[name]) == 1 else torch.zeros(())
                noise = torch.randn(tensors[name], generator=generator) * (0.002 if sources else 0.02)
                writer.write(noise.add_(sources.tensor(name) if sources else start).bfloat16())
                weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(folder: Path, seed: int) -> None:
    """A float32 LoRA adapter on all linear layers, as PEFT saves it."""
    from safetensors.torch import save_file

    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, (out, inner) in LINEAR.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM",
        "target_modules": sorted(name.split(".")[1] for name in LINEAR),
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_experiment(folder: Path, *, dense: bool, compute_dtype: str) -> Path:
    write_checkpoint(folder / "base", 0)
    for t in range(EXPERTS):
        if dense:
            write_checkpoint(folder / f"expert{t}", t + 1, folder / "base")
        else:
            write_adapter(folder / f"expert{t}", t + 1)
    (folder / "my_eval.py").write_text(EVALUATOR)
    data = {
        "name": "memory",
        "base": "base",
        "experts": {f"expert{t}": f"expert{t}" for t in range(EXPERTS)},
        "space": {"method": "task_arithmetic", "weights": {"granularity": "task", "range": [0.0, 1.0]}},
        "search": {"method": "random", "budget": 2},
        "evaluate": {
            "with": "my_eval.py@score", "tasks": {"one": {}}, "split": {"search": 4, "select": 4, "test": 4},
            "batch_size": 4, "finish": {"top": 1, "sweep": [0.3]},
        },
        "compute_dtype": compute_dtype,
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(data, indent=2))
    return path


def anonymous(pid: int) -> int:
    """Bytes of memory that belong to no file, of one process; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(n) for n in re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+)", text, re.M))


def family(process: subprocess.Popen[str]) -> Iterator[int]:
    try:
        yield from (child.pid for child in psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return


def measured(*arguments: str | Path) -> tuple[str, float, float, float]:
    """(what it printed, seconds, peak of the command itself in bytes, peak of the largest of its children)."""
    began, own, child = time.monotonic(), 0, 0
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "evomerge.cli", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=os.environ)
        while process.poll() is None:
            own = max(own, anonymous(process.pid))
            child = max([child, *(anonymous(pid) for pid in family(process))])
            time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return text, time.monotonic() - began, own, child


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="whole checkpoints instead of LoRA adapters")
    parser.add_argument("--compute-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evomerge-memory-", dir=options.folder) as temporary:
        began = time.monotonic()
        path = write_experiment(Path(temporary), dense=options.dense, compute_dtype=options.compute_dtype)
        number = sum(Tensor.numel(torch.empty(shape, device="meta")) for shape in shapes().values())
        print(f"{number / 1e9:.2f}B parameters, {EXPERTS} {'dense' if options.dense else 'LoRA'} experts, ", end="")
        print(f"{options.compute_dtype}; written in {time.monotonic() - began:.0f} s", flush=True)
        text, _, _, _ = measured("run", path, "--dry-run")
        print("\n".join(line for line in text.splitlines() if line.startswith("memory")), flush=True)
        _, seconds, driver, worker = measured("run", path)
        print(f"run     {seconds:4.0f} s   driver {driver / 1e9:.2f} GB   worker {worker / 1e9:.2f} GB", flush=True)
        _, seconds, export, _ = measured("export", path, "--trial", "0", "--out", Path(temporary) / "out")
        print(f"export  {seconds:4.0f} s   {export / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
