"""Attention whose parameters lie in several processes: views, inspections and ranks are those of the model in one."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rankdecay as rd
from rankdecay.decay.table import Row, table
from tests import needs
from tests.ranks import on_ranks

needs.package("transformers")

SIZES = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
#: How a model is cut into the parts of so many processes.
SHARDINGS = {2: ["fsdp", "tensor", "part", "few"], 4: ["fsdp", "fsdp and tensor", "hybrid", "few"]}


def gpt2() -> nn.Module:
    """One parameter for W_Q, W_K and W_V, stored as (in, out); 15 rows divide by neither 2 nor 4."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=15, n_head=3, n_layer=2, n_positions=8, **SIZES))
    for block in model.transformer.h:
        nn.init.normal_(block.attn.c_attn.bias, std=0.2)
    return model


def llama() -> nn.Module:
    """Grouped queries; heads of 6, so that a part of 18 / 4 rows begins inside one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}
    sizes = {"hidden_size": 18, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **SIZES))


def small() -> nn.Module:
    """W_O with fewer rows than processes, so that some have none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.MultiheadAttention(2, 1), nn.MultiheadAttention(2, 2))


def shard(model: nn.Module, how: str) -> bool:
    """Cuts a model in place; returns whether this process has a part of it."""
    world = dist.get_world_size()
    blocks = [
        module for module in model.modules() if re.search("Block$|Layer$|MultiheadAttention", type(module).__name__)
    ]
    if how == "few":  # neither the first process nor all
        mesh = DeviceMesh("cpu", list(range(1, max(2, world - 1))))
        if mesh.get_coordinate() is None:
            return False
        fully_shard(model, mesh=mesh)
    elif how == "part":
        fully_shard(blocks[0])
    elif how == "hybrid":
        for module in (*blocks, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        names = {"fsdp": ("data",), "tensor": ("tensor",), "fsdp and tensor": ("data", "tensor")}[how]
        mesh = init_device_mesh("cpu", (world,) if len(names) == 1 else (2, world // 2), mesh_dim_names=names)
        if "tensor" in names:
            for module in blocks:
                _cut_matrices(module, mesh["tensor"])
        if "data" in names:
            for module in (*blocks, model):
                fully_shard(module, mesh=mesh["data"])
    return True


def _cut_matrices(block: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism: W_Q, W_K and W_V by rows, W_O by columns."""
    if not hasattr(block, "self_attn"):  # what parallelize_module does, for what is no nn.Linear
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                cut = Shard(parameter.ndim - 1 if type(module).__name__ == "Conv1D" else 0)
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [cut])))
        return
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    parallelize_module(block, mesh, plan | {"self_attn.o_proj": RowwiseParallel()})


def views_as_in_one_process(how: str) -> int:
    """Compares them for every model; returns how many sharded parameters it met."""
    met = 0
    for make in (gpt2, llama, small):
        plain = make()
        model = copy.deepcopy(plain)
        if not shard(model, how):
            continue
        expected, found = rd.find_attention(plain), rd.find_attention(model)
        assert [layer.name for layer in found] == [layer.name for layer in expected]
        for its, before in zip(found, expected, strict=True):
            assert (its.head_dim, its.num_heads, its.rotary) == (before.head_dim, before.num_heads, before.rotary)
            for view, old in zip(its.views, before.views, strict=True):
                assert (view.parameter_name, view.window, view.shape) == (old.parameter_name, old.window, old.shape)
                met += isinstance(model.get_parameter(view.parameter_name), DTensor)
                for mine, its_own in ((view.tensor(), old.tensor()), (view.heads(), old.heads())):
                    assert not isinstance(mine, DTensor)
                    assert not mine.requires_grad
                    assert torch.equal(mine, its_own)
                assert (view.bias() is None) == (old.bias() is None)
                assert view.bias() is None or torch.equal(view.bias(), old.bias())
        assert rd.inspect(model).rows == rd.inspect(plain).rows
        assert rd.Monitor(model, detail="head").measure() == rd.Monitor(plain, detail="head").measure()
        assert _ranks(model) == _ranks(plain)
    return met


def _ranks(model: nn.Module) -> str:
    """What ``describe(ranks=True)`` prints of the queries."""
    rows = [
        Row(view.parameter_name, model.get_parameter(view.parameter_name), "query_key", view.window, "", "", "", True)
        for view in (layer.query for layer in rd.find_attention(model))
    ]
    return table(rows, ranks=True, state="attached to AdamW")


@pytest.mark.parametrize("world", SHARDINGS)
def test_views_inspection_and_ranks_are_those_of_one_process(world: int) -> None:
    for met in on_ranks(world, _every_sharding, world):
        assert all(met[how] for how in SHARDINGS[world] if how != "few")
        assert met["part"] < met["fsdp"] if "part" in met else True


def _every_sharding(world: int) -> dict[str, int]:
    return {how: views_as_in_one_process(how) for how in SHARDINGS[world]}
