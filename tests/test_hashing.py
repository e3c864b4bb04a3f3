"""The hash pass: what content is, what NaN costs, and when a file is read again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import content_hash
from evomerge.errors import CheckpointError
from evomerge.hashing import PIECE, HashCache

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def base(dense_family: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(dense_family / "base", tmp_path / "base")
    age(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes.json"


def age(folder: Path, seconds: float = 60) -> None:
    """Files that have not been touched for a while: only those are worth remembering."""
    for file in folder.iterdir():
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - seconds))


def test_the_hash_is_over_names_and_contents(base: Path, cache: Path):
    """Written out from its description: each file's own SHA-256, by name, hashed again."""
    (base / "README.md").write_text("not content")
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    lines = [f"{hashlib.sha256((base / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert content_hash(base, cache=cache) == expected
    assert content_hash(base, cache=cache) == expected  # from the cache


def test_another_place_is_the_same_content(base: Path, cache: Path, tmp_path: Path):
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    assert content_hash(copy, cache=cache) == content_hash(base, cache=cache)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_any_change_changes_the_hash(base: Path, cache: Path, file: str):
    before = content_hash(base, cache=cache)
    if file == "model.safetensors":
        tensors = {k: v.clone() for k, v in load_file(base / file).items()}
        tensors[NAME][0, 0] += 1
        save_file(tensors, base / file, metadata={"format": "pt"})
    else:
        (base / file).write_text((base / file).read_text() + "\n")
    assert content_hash(base, cache=cache) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_not_finite(base: Path, cache: Path, value: float, dtype: torch.dtype):
    tensors = {k: v.to(dtype) for k, v in load_file(base / "model.safetensors").items()}
    tensors[NAME][3, 4] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):  # a refusal is not remembered as a hash
        with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {NAME} .*index {3 * 32 + 4}"):
            content_hash(base, cache=cache)
        age(base)


def test_large_finite_numbers_are_fine(base: Path, cache: Path):
    """Their sum overflows; they do not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = {
            k: torch.full_like(v, torch.finfo(dtype).max, dtype=dtype)
            for k, v in load_file(base / "model.safetensors").items()
        }
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        content_hash(base, cache=cache)


def test_nan_in_a_late_piece_of_a_large_tensor(base: Path, cache: Path):
    numel = PIECE // 2 * 2 + 1000
    tensors = {k: v.clone() for k, v in load_file(base / "model.safetensors").items()}
    tensors["model.layers.0.extra.weight"] = torch.zeros(numel, dtype=torch.bfloat16)
    tensors["model.layers.0.extra.weight"][numel - 7] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"extra.weight .*index {numel - 7}"):
        content_hash(base, cache=cache)


def test_an_adapter_has_a_hash(lora_family: Path, cache: Path):
    first, second = (content_hash(lora_family / f"expert{t}", cache=cache) for t in range(2))
    assert first != second


def test_nan_in_an_adapter(lora_family: Path, cache: Path, tmp_path: Path):
    folder = shutil.copytree(lora_family / "expert0", tmp_path / "expert")
    tensors = {k: v.clone() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        content_hash(folder, cache=cache)


def test_progress_ends_at_the_whole(base: Path, cache: Path):
    seen: list[tuple[int, int]] = []
    content_hash(base, cache=cache, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > (base / "model.safetensors").stat().st_size
    again: list[tuple[int, int]] = []
    content_hash(base, cache=cache, progress=lambda done, total: again.append((done, total)))
    assert again[-1] == seen[-1]


def test_an_unchanged_file_is_not_read_again(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    import evomerge.hashing

    expected = content_hash(base, cache=cache)
    read: list[str] = []
    whole = evomerge.hashing._hash_and_scan
    monkeypatch.setattr(
        evomerge.hashing, "_hash_and_scan", lambda file, report: read.append(file.name) or whole(file, report)
    )
    assert content_hash(base, cache=cache) == expected
    assert read == []
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    content_hash(base, cache=cache)
    assert read == ["config.json"]


def test_a_fresh_file_is_not_remembered(base: Path, cache: Path):
    """Within the clock's grain it may change again and look the same."""
    (base / "config.json").touch()
    content_hash(base, cache=cache)
    assert HashCache(cache).get(base / "model.safetensors") is not None
    assert HashCache(cache).get(base / "config.json") is None


@pytest.mark.parametrize("damage", ["", "[1]", "{", '{"a": 3}'])
def test_a_damaged_cache_is_empty(base: Path, cache: Path, damage: str):
    expected = content_hash(base, cache=cache)
    cache.write_text(damage)
    assert content_hash(base, cache=cache) == expected
    assert expected and json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written(base: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert content_hash(base, cache=tmp_path / "file" / "hashes.json") == content_hash(base, cache=tmp_path / "b.json")


def test_the_default_cache_follows_the_environment(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "mine"))
    content_hash(base)
    assert (tmp_path / "mine" / "hashes.json").is_file()
