"""Where tensors lie in a model: in its parameters where that is possible, by transformers' operations elsewhere."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import ResourceError
from evomerge.merging import Merger, open_sources
from evomerge.placement import Placement, owners, parameter_names, part_of, place, refuse_offloaded
from evomerge.recipe import Group, Recipe, Source
from evomerge.testing import tiny


def test_fused_experts_are_reached_in_place(moe_family: Path):
    """Each of the file's w1, w2, w3 is a part of a stacked parameter: what is written there is what was loaded."""
    tensors = load_file(moe_family / "base" / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(moe_family / "base")
    placement = place(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert placement.conversions == []
    assert placement.unused == []
    assert placement.views.keys() == tensors.keys()
    assert all(torch.equal(view, tensors[name]) for name, view in placement.views.items())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {view.untyped_storage().data_ptr() for view in placement.views.values()} == storages


def test_parts_of_what_is_known_of_a_parameter():
    """By views into it, whatever the strides and offsets of the parameter and of the values are."""
    memory = torch.arange(40.0)
    parameter = torch.nn.Parameter(memory[4:34].view(5, 6))
    other = torch.nn.Parameter(torch.zeros(3))
    views = {"rows": parameter.detach()[1:3], "column": parameter.detach()[:, 4], "buffer": torch.zeros(2)}
    held = owners(Placement(views=views), [parameter, other])
    assert held.keys() == {"rows", "column"} and all(p is parameter for p in held.values())
    numbers = torch.arange(100.0, 130.0).view(5, 6)
    inside = torch.zeros(50)[7:37].view(5, 6).copy_(numbers)
    for values in (numbers, numbers.t().contiguous().t(), inside, numbers[:1].expand(5, 6)):
        assert torch.equal(part_of(values, parameter, views["rows"]), values[1:3])
        assert torch.equal(part_of(values, parameter, views["column"]), values[:, 4])


def test_split_tensors_go_through_transformers():
    """One file tensor, three parameters: the conversion is transformers' own, run on numbers that tell rows apart."""
    config = transformers.NomicBertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.AutoModel.from_config(config)
    name = "encoder.layers.0.attn.Wqkv.weight"
    placement = place(model, {name: (96, 32)})
    (conversion,) = placement.conversions
    tensor = torch.arange(96.0 * 32).view(96, 32)
    converted = conversion.run(lambda asked: {name: tensor}[asked], model)
    assert sorted(converted) == [
        n for n in sorted(model.state_dict()) if "self_attn." in n and n.split(".")[-2][0] in "qkv"
    ]
    for rows, key in enumerate("qkv"):
        found = next(value for target, value in converted.items() if f".{key}_proj." in target)
        assert torch.equal(found, tensor[32 * rows : 32 * rows + 32])


def test_heads_that_a_model_class_leaves_out(dense_family: Path, tmp_path: Path):
    folder = tiny.save_model(tmp_path / "base", tiny.llama_config(tie_word_embeddings=False), seed=0)
    tensors = load_file(folder / "model.safetensors")
    model = transformers.AutoModel.from_pretrained(folder)  # names there have no "model." in front
    placement = place(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert placement.unused == ["lm_head.weight"]
    assert all(torch.equal(view, tensors[name]) for name, view in placement.views.items())


def test_names_of_parameters(moe_family: Path):
    """Found without loading a weight: only parameters that are one whole tensor of the file."""
    names = parameter_names(open_checkpoint(moe_family / "base"))
    assert names["model.layers.1.mlp.gate.weight"] == "model.layers.1.block_sparse_moe.gate.weight"
    assert names["lm_head.weight"] == "lm_head.weight"
    assert not any("experts" in name for name in names)


def load(base: Path, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how)


def offloaded(base: Path, scratch: Path, how: str):
    """The model with its weights kept elsewhere, by accelerate's own means."""
    if how == "cpu_offload":
        return accelerate.cpu_offload(load(base), execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(load(base), str(scratch), execution_device=torch.device("cpu"))
    if how == "cpu_offload_with_hook":
        model, _ = accelerate.cpu_offload_with_hook(load(base), execution_device=torch.device("cpu"))
        return model
    layers = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return load(base, device_map=layers | {"model.layers": "disk"}, offload_folder=str(scratch))


WAYS = ["cpu_offload", "disk_offload", "cpu_offload_with_hook", "device_map"]


@pytest.mark.parametrize("how", WAYS)
def test_an_offloaded_model_is_refused(lora_family: Path, tmp_path: Path, how: str):
    """It works by itself, so nothing but a refusal would tell that merging into it changes nothing."""
    model = offloaded(lora_family / "base", tmp_path, how)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(lora_family / "base")(tokens).logits)
    recipe = Recipe(
        base=Source("base", str(lora_family / "base")),
        experts=(Source("skill", str(lora_family / "expert0")),),
        method="task_arithmetic",
        groups=(Group((0.5,)),),
    )
    with pytest.raises(ResourceError, match="is offloaded to RAM or disk"):
        Merger(open_sources(recipe)).into(model, recipe)


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny.llama_config())
    with pytest.raises(ResourceError, match=r"without memory \(meta\)"):
        refuse_offloaded(model)


def test_device_maps_that_leave_weights_where_they_are_pass(lora_family: Path):
    refuse_offloaded(load(lora_family / "base", device_map={"": "cpu"}))
    refuse_offloaded(accelerate.dispatch_model(load(lora_family / "base"), {"": "cpu"}, force_hooks=True))
