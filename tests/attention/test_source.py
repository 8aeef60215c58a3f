"""A live module or a checkpoint as a source of parameters and settings."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rankdecay as rd
from rankdecay.attention.source import ModuleSource, named_parameters, open_source
from tests import needs

from .computed import check_model
from .families import build, randomised, run


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_an_adapter_is_part_of_the_matrix() -> None:
    peft = needs.package("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = randomised(peft.get_peft_model(build("llama"), config))
    layers = rd.find_attention(model)
    assert layers[0].query.parameter_name.endswith("q_proj.base_layer.weight")
    check_model(model, layers, lambda: run("llama", model))
    adapted = layers[0].query.tensor()
    with model.disable_adapter():
        assert not torch.equal(layers[0].query.tensor(), adapted)


def test_an_adapter_in_a_transposed_layer() -> None:
    peft = needs.package("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = randomised(peft.get_peft_model(build("gpt2"), config))
    check_model(model, rd.find_attention(model), lambda: run("gpt2", model))


def test_the_nearest_setting_counts() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"attention": nn.Linear(2, 2)})})
    model.num_heads, model.depth = 2, 3
    model.block.config = type("Config", (), {"num_heads": 4, "n_head": 5})()
    source = ModuleSource(model)
    assert source.setting("block.attention", ("num_heads", "n_head")) == 4
    assert source.setting("block.attention", ("n_head", "num_heads")) == 5
    assert source.setting("block.attention", ("depth",)) == 3
    assert source.setting("", ("num_heads",)) == 2
    assert source.setting("block.attention", ("heads",)) is None


def test_a_submodule_or_a_method_is_no_setting() -> None:
    model = nn.ModuleDict({"num_heads": nn.Linear(2, 2)})
    model.rotary_emb = nn.Identity()
    source = ModuleSource(model)
    assert source.setting("", ("num_heads",)) is None
    assert source.setting("", ("forward",)) is None
    assert source.setting("", ("rotary_emb",)) is True  # the module that turns queries and keys


def test_a_reader_gives_the_present_value() -> None:
    model = nn.Linear(2, 2)
    read = open_source(model).reader("weight")
    model.weight.fill_(7)
    assert read().unique().tolist() == [7]


class Packed(nn.Module):
    """A layer of the kind of HQQ's, which holds codes and dequantises them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = {"shape": (8, 8)}
        self.register_buffer("W_q", torch.arange(64, dtype=torch.uint8))

    def dequantize(self) -> torch.Tensor:
        return self.get_buffer("W_q").float().view(8, 8)


def _attention(kind: str) -> nn.Module:
    mha = nn.MultiheadAttention(8, 2, kdim=8 if kind == "one" else 6)
    mha.in_proj_bias.normal_()
    if kind in ("one", "several"):
        return mha
    apart = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    if kind == "pruned":
        prune.l1_unstructured(apart["q_proj"], "weight", 0.5)
    else:
        apart["q_proj"] = Packed()
    apart.num_heads = 2  # pyright: ignore[reportAttributeAccessIssue]
    return apart


@pytest.mark.parametrize("again", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
@pytest.mark.parametrize("kind", ["one", "several", "pruned", "quantised"])
def test_a_copy_reads_the_copy_of_the_model(again: Callable[[Any], Any], kind: str) -> None:
    model = nn.ModuleDict({"attention": _attention(kind)})
    layers = rd.find_attention(model)
    before, bias = layers[0].query.tensor().clone(), layers[0].query.bias()
    copied, copies = again((model, layers))
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.copy_(tensor * 2)
    factor = 4 if kind == "pruned" else 2  # the mask is doubled too
    assert torch.equal(layers[0].query.tensor(), before)
    assert torch.equal(copies[0].query.tensor(), factor * before)
    assert bias is None or torch.equal(copies[0].query.bias(), 2 * bias)


def test_a_tied_parameter_has_all_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert list(named_parameters(model)) == ["a.weight", "a.bias", "b.weight"]


def test_a_model_and_its_checkpoint_are_the_same_source(tmp_path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    live, stored = open_source(model), open_source(str(tmp_path))
    assert (str(live), str(stored)) == ("GPT2LMHeadModel", str(tmp_path))
    for name, shape in stored.shapes.items():
        assert live.shapes[name] == shape
        assert torch.equal(live.reader(name)(), stored.reader(name)())
    for setting in ("n_head", "model_type", "initializer_range"):
        assert live.setting("transformer.h.0.attn", (setting,)) == stored.setting("transformer.h.0.attn", (setting,))


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module or a path to a checkpoint, got int"):
        open_source(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"torch.nn.Module, got str"):
        ModuleSource("gpt2")  # pyright: ignore[reportArgumentType]
