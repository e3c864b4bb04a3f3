"""Opening bases and dense experts: what is read, what is refused and by which name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Sources, check_tokenizers, open_checkpoint, open_expert, tensor_kind
from evomerge.errors import CheckpointError
from evomerge.testing import tiny

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def family(dense_family: Path, tmp_path: Path) -> Path:
    """A copy of the dense family that may be spoiled."""
    return shutil.copytree(dense_family, tmp_path / "family")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, *words: str, base: Path | None = None) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder) if base is None else open_expert(folder, open_checkpoint(base))
    for word in words:
        assert word in str(raised.value)


def test_a_checkpoint_is_what_safetensors_reads(dense_family: Path):
    checkpoint = open_checkpoint(dense_family / "base")
    with safe_open(dense_family / "base" / "model.safetensors", "pt") as file:
        assert sorted(checkpoint.names) == sorted(file.keys())
        for name in checkpoint.names:
            expected = file.get_tensor(name)
            assert torch.equal(checkpoint.tensor(name), expected)
            assert checkpoint.tensor(name).dtype == checkpoint.dtype(name) == expected.dtype
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert checkpoint.numel(name) == expected.numel()
    assert checkpoint.num_layers == 4
    assert {file.name for file in checkpoint.files()} >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_shards_are_one_checkpoint(dense_family: Path, tmp_path: Path):
    whole = open_checkpoint(dense_family / "base")
    folder = tiny.save_model(tmp_path / "sharded", tiny.llama_config(), seed=0, max_shard_size="20KB")
    sharded = open_checkpoint(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert sorted(sharded.names) == sorted(whole.names)
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names)
    assert folder / "model.safetensors.index.json" in sharded.files()


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("model.layers.3.self_attn.q_proj.bias", "attention", 3),
        ("model.layers.11.mlp.down_proj.weight", "mlp", 11),
        ("model.layers.0.post_attention_layernorm.weight", "norm", 0),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "mlp", 0),
        ("model.norm.weight", "norm", None),
        ("lm_head.weight", "head", None),
        ("bert.encoder.layer.5.attention.output.dense.weight", "attention", 5),
        ("bert.encoder.layer.5.output.dense.weight", "mlp", 5),
        ("embeddings.LayerNorm.weight", "embedding", None),
        ("transformer.h.2.ln_1.weight", "norm", 2),
        ("transformer.h.2.attn.c_attn.weight", "attention", 2),
        ("transformer.wte.weight", "embedding", None),
    ],
)
def test_kinds_and_layers(name: str, kind: str, layer: int | None):
    assert tensor_kind(name) == (kind, layer)


def sparse_checkpoint(folder: Path, config: Path, gigabytes: int) -> Path:
    """A folder whose weight file announces, and is, that long, but has no data on the disk."""
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    rows = gigabytes * 2**30 // 2 // 1024
    entry = {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}
    text = json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * 2048)
    return folder


def test_opening_reads_no_tensor_data(dense_family: Path, tmp_path: Path):
    """A base and ten experts of 8 GB each open in a process whose memory does not grow."""
    config = dense_family / "base" / "config.json"
    for i in range(11):
        sparse_checkpoint(tmp_path / str(i), config, 8)
    script = (
        "import sys, time, psutil\n"
        "from pathlib import Path\n"
        "from evomerge.checkpoints import Sources, open_checkpoint, open_expert\n"
        "folder, process = Path(sys.argv[1]), psutil.Process()\n"
        "before, cpu, read = process.memory_info().rss, time.process_time(), process.io_counters().read_chars\n"
        "base = open_checkpoint(folder / '0')\n"
        "sources = Sources(base, [open_expert(folder / str(i), base) for i in range(1, 11)])\n"
        "sources.base.tensor(sources.names[0]), sources.info(sources.names[0])\n"
        "grown, read = process.memory_info().rss - before, process.io_counters().read_chars - read\n"
        "print(base.total_bytes, grown, read, time.process_time() - cpu)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    total, grown, read, seconds = map(float, done.stdout.split())
    assert total > 8e9
    assert grown < 16e6
    assert read < 2e6
    assert seconds < 2


def test_tensors_cannot_write_to_the_file(family: Path):
    before = (family / "base" / "model.safetensors").read_bytes()
    open_checkpoint(family / "base").tensor(NAME).fill_(0)
    assert (family / "base" / "model.safetensors").read_bytes() == before


def test_a_header_that_is_not_aligned(tmp_path: Path, family: Path):
    """Old writers did not pad the header: data may start at any byte."""
    file = family / "base" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    text += b" " * ((1 - len(text)) % 2)  # an odd length
    expected = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not mapped: the file changes
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    checkpoint = open_checkpoint(family / "base")
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


# --- refusals ------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere")
    refused(Path("someone/some-model"), "someone/some-model", "hf download")


def test_folder_without_config(tmp_path: Path):
    refused(tmp_path, "config.json")


def test_folder_without_weights(family: Path):
    (family / "base" / "model.safetensors").unlink()
    refused(family / "base", "model.safetensors")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights(family: Path, file: str):
    (family / "base" / "model.safetensors").rename(family / "base" / file)
    refused(family / "base", file, "pickle")


@pytest.mark.parametrize("left", [0, 5, 8, 200, 0.5, 0.9999], ids=str)
def test_truncated_file(family: Path, left: float):
    file = family / "base" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: left if isinstance(left, int) else int(len(content) * left)])
    refused(family / "base", "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}',
        b"\xff\xfe",
    ],
)
def test_nonsense_header(family: Path, header: bytes):
    file = family / "base" / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    refused(family / "base", "model.safetensors")


def test_types_that_cannot_be_merged(family: Path):
    edit(family / "base", lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.float8_e4m3fn)}))
    refused(family / "base", NAME, "F8_E4M3")


def test_quantised_weights(family: Path):
    edit_json(family / "base" / "config.json", quantization_config={"bits": 4})
    refused(family / "base", "quantised")


def test_code_of_the_models_own(family: Path):
    edit_json(family / "base" / "config.json", auto_map={"AutoModel": "x.py--X"}, model_type="homemade")
    refused(family / "base", "auto_map")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "sharded", tiny.llama_config(), seed=0, max_shard_size="20KB")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: text.replace("weight_map", "weight_mop"), "weight_map"),
        (lambda text: text.replace("model-00001-of", "../model-00001-of"), "../model-00001-of"),
        (lambda text: text.replace("model-00001-of", "/etc/model-00001-of"), "/etc/model-00001-of"),
        (lambda text: text.replace("model-00001-of", "model-99999-of"), "model-99999-of"),
        (lambda text: text.replace("model.norm.weight", "model.nosm.weight"), "model.nosm.weight"),
    ],
)
def test_corrupted_index(sharded: Path, change: Callable[[str], str], word: str):
    index = sharded / "model.safetensors.index.json"
    index.write_text(change(index.read_text()))
    refused(sharded, "index.json", word)


def test_index_that_forgets_a_tensor(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"][NAME]
    index.write_text(json.dumps(data))
    refused(sharded, NAME)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_link_that_leaves_the_folder(family: Path, tmp_path: Path, file: str):
    (family / "base" / file).rename(tmp_path / "outside")
    (family / "base" / file).symlink_to(tmp_path / "outside")
    refused(family / "base", file, "link")


def test_links_of_a_hugging_face_cache(dense_family: Path, tmp_path: Path):
    """There, files are links into the blobs of the same repository."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(dense_family / "base", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_checkpoint(snapshot).num_layers == 4


def test_another_architecture(family: Path, moe_family: Path):
    refused(moe_family / "expert0", "expert0", "mixtral", "llama", base=family / "base")


def test_another_vocabulary_size(family: Path, tmp_path: Path):
    other = tiny.save_model(tmp_path / "other", tiny.llama_config(vocab_size=120), seed=0)
    refused(other, "other", "vocabulary", "120", base=family / "base")


def test_missing_tensor(family: Path):
    edit(family / "expert0", lambda tensors: tensors.pop(NAME))
    refused(family / "expert0", "expert0", NAME, base=family / "base")


def test_extra_tensor(family: Path):
    edit(family / "expert0", lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    refused(family / "expert0", "expert0", "model.layers.0.extra.weight", base=family / "base")


def test_another_shape(family: Path):
    edit(family / "expert0", lambda tensors: tensors.update({NAME: tensors[NAME][:16].clone()}))
    refused(family / "expert0", NAME, "(16, 32)", "(32, 32)", base=family / "base")


def test_computed_buffers_do_not_matter(family: Path):
    """inv_freq stands in some old Llama files, and in no newer ones."""
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(family / "expert0", lambda tensors: tensors.update({buffer: torch.ones(4)}))
    base = open_checkpoint(family / "base")
    assert buffer not in Sources(base, [open_expert(family / "expert0", base)]).names


# --- tied embeddings -----------------------------------------------------------------------------------------------


def test_tied_copy_is_left_out(family: Path):
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(family / "expert0", add_head)
    expert = open_expert(family / "expert0", open_checkpoint(family / "base"))
    assert "lm_head.weight" not in expert.names


def test_tied_copy_that_differs(family: Path):
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit(family / "base", add_head)
    refused(family / "base", "lm_head.weight", "tie_word_embeddings")


def test_untied_head_is_a_tensor_of_its_own(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "untied", tiny.llama_config(tie_word_embeddings=False), seed=0)
    assert "lm_head.weight" in open_checkpoint(folder).names


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_same_tokenizer(dense_family: Path, lora_family: Path):
    base = open_checkpoint(dense_family / "base")
    check_tokenizers(base, [open_expert(dense_family / f"expert{t}", base) for t in range(2)])
    check_tokenizers(base, [open_expert(lora_family / "expert0", base)])  # it has no tokenizer files


def test_tokenizer_written_differently(family: Path):
    """Another order and layout of the same vocabulary is no difference."""
    file = family / "expert0" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    file.write_text(json.dumps(data))
    base = open_checkpoint(family / "base")
    check_tokenizers(base, [open_expert(family / "expert0", base)])


def test_tokens_with_other_numbers(family: Path):
    file = family / "expert0" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(data))
    base = open_checkpoint(family / "base")
    with pytest.raises(CheckpointError, match=r"2 tokens differ.*vocabulary: 'b' has the id 3, in the base 4"):
        check_tokenizers(base, [open_expert(family / "expert0", base)])


# --- sources -------------------------------------------------------------------------------------------------------


def test_sources_side_by_side(dense_family: Path):
    base = open_checkpoint(dense_family / "base")
    experts = [open_expert(dense_family / f"expert{t}", base) for t in range(2)]
    sources = Sources(base, experts)
    assert sources.names == base.names
    for _ in range(2):  # they can be read again and again
        for name, (info, theta_0, thetas) in zip(sources.names, sources, strict=True):
            assert info.name == name
            assert torch.equal(theta_0, base.tensor(name))
            assert [torch.equal(a, b.tensor(name)) for a, b in zip(thetas, experts, strict=True)] == [True, True]


def test_chunks_are_the_whole_tensor(tmp_path: Path):
    """LoRA, dense and untouched tensors, cut at the grid, are the whole ones in float32, bit for bit."""
    config = tiny.llama_config(hidden_size=200, intermediate_size=700, vocab_size=1000, num_attention_heads=4)
    base_folder = tiny.save_model(tmp_path / "base", config, seed=0)
    tiny.save_dense_expert(base_folder, tmp_path / "dense", seed=1)
    tiny.save_lora_expert(base_folder, tmp_path / "lora", seed=2)
    base = open_checkpoint(base_folder)
    sources = Sources(base, [open_expert(tmp_path / "dense", base), open_expert(tmp_path / "lora", base)])
    for name in sources.names:
        _, theta_0, thetas = sources.load(name)
        pieces = [(i.start, b.clone(), [e.clone() for e in experts]) for i, b, experts in sources.chunks(name)]
        assert torch.equal(torch.cat([b for _, b, _ in pieces]), theta_0.float().reshape(-1))
        for t in range(2):
            assert torch.equal(torch.cat([experts[t] for *_, experts in pieces]), thetas[t].float().reshape(-1))
        assert [start for start, *_ in pieces] == list(range(0, theta_0.numel(), 131072))
        stored = [(i.start, b.clone(), e[0].clone()) for i, b, e in sources.chunks(name, widen=False)]
        assert [start for start, *_ in stored] == list(range(0, theta_0.numel(), 4 * 131072))
        assert torch.equal(torch.cat([b for _, b, _ in stored]), theta_0.reshape(-1))
        assert torch.equal(torch.cat([e for *_, e in stored]), thetas[0].reshape(-1))
        untouched = name not in sources.experts[1]
        assert (thetas[1] is theta_0) == untouched
        assert all((e[1] is b) == untouched for _, b, e in sources.chunks(name))
        assert sources.touched(name)  # the dense expert
        assert Sources(base, sources.experts[1:]).touched(name) != untouched
