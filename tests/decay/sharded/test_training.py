"""Training under DDP, FSDP2, tensor parallelism and both, against the same training in one process."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rankdecay as rd
from rankdecay.lab.session.gpt import GPT, GPTConfig
from tests.ranks import RankFailed, on_ranks

STEPS, BATCH, LENGTH, TOKENS = 20, 8, 6, 18


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocabulary=TOKENS, context=LENGTH, width=24, depth=4, heads=4, mlp_width=20)).double()


def llama() -> nn.Module:
    """Grouped keys: each of two has its two queries, and W_K is wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, attn_implementation="eager")).double()


MODELS = {"gpt": gpt, "llama": llama}
PLAN = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
PLAN |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}


def cut(model: nn.Module, how: str) -> nn.Module:
    """The model as this process has it."""
    world = dist.get_world_size() if how != "one" else 1
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how in ("tp", "fsdp2_tp"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        for block in model.model.layers:  # pyright: ignore
            parallelize_module(block, mesh["tensor"], PLAN)
    if how in ("fsdp2", "hsdp", "fsdp2_tp"):
        if how == "fsdp2":
            mesh = init_device_mesh("cpu", (world,))
        elif how == "hsdp":
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "shards"))
        for block in model.model.layers:  # pyright: ignore
            fully_shard(block, mesh=mesh["data"] if how == "fsdp2_tp" else mesh)
        fully_shard(model, mesh=mesh["data"] if how == "fsdp2_tp" else mesh)
    return model


def trained(kind: str, how: str, unit: Any, steps: int = STEPS, at: Any = None) -> dict[str, Tensor]:
    """The weights after some steps of AdamW on random tokens, whole."""
    model = cut(MODELS[kind](), how)
    decays = {"query_key": rd.LowRank(3.0, unit=unit, every=3), "value_output": rd.LowRank(2.0, rule="smooth")}
    optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.1), **decays), lr=3e-3)
    rd.attach(optimizer)
    share, shares = 0, 1
    if how in ("ddp", "fsdp2", "hsdp"):
        share, shares = dist.get_rank(), dist.get_world_size()
    elif how == "fsdp2_tp":
        share, shares = dist.get_rank() // 2, dist.get_world_size() // 2
    for step in range(steps):
        batch = torch.randint(TOKENS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        batch = batch.chunk(shares)[share]
        logits = model(batch[:, :-1])
        logits = getattr(logits, "logits", logits)
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        if at is not None:
            at(step)
        optimizer.step()
        optimizer.zero_grad()
    named = dict(model.module.named_parameters() if how == "ddp" else model.named_parameters())  # pyright: ignore
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named.items()}


def apart(
    kind: str, hows: list[str], unit: str, before: dict[str, Tensor], alone: dict[str, Tensor]
) -> dict[str, float]:
    """How far each way of sharing ends from one process, as a share of what training changed."""
    found = {}
    for how in hows:
        together = trained(kind, how, unit)
        assert together.keys() == alone.keys()
        for name, wanted in alone.items():
            found[f"{how} {name}"] = float((together[name] - wanted).norm() / (wanted - before[name]).norm())
    return found


@pytest.mark.parametrize(
    ("kind", "world", "hows", "unit"),
    [
        ("gpt", 2, ["ddp", "fsdp2", "tp"], "matrix"),
        ("llama", 2, ["ddp", "fsdp2", "tp"], "head"),
        ("gpt", 4, ["fsdp2", "hsdp"], "head"),
        ("llama", 4, ["fsdp2_tp"], "matrix"),
    ],
)
def test_twenty_steps_end_where_one_process_does(kind, world, hows, unit):
    before = {name: p.detach().clone() for name, p in MODELS[kind]().named_parameters()}
    alone = trained(kind, "one", unit)  # here, and not in every process again
    for found in on_ranks(world, apart, kind, hows, unit, before, alone):
        assert {name: value for name, value in found.items() if not value < 1e-5} == {}
        assert len(found) == len(hows) * len(before)


# ---- a process that dies -----------------------------------------------------------------------------------------


def dies(when: str) -> None:
    """The second process is killed in the sixth step, whose decay is due: before it, or inside."""
    from rankdecay.decay.sharded.redistribute import Redistribution

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at(step: int) -> None:
        if step == 5 and dist.get_rank() == 1:
            if when == "in the decay":
                Redistribution.close = kill
            else:
                kill()

    trained("gpt", "fsdp2", "matrix", at=at)


@pytest.mark.parametrize("when", ["before the step", "in the decay"])
def test_a_killed_process_makes_the_others_fail_with_a_message_and_not_at_a_time_out(when):
    with pytest.raises(RankFailed) as caught:
        on_ranks(2, dies, when)
    first, second = caught.value.reasons
    assert second == "the process ended with -9"
    assert "Connection closed by peer" in first or "Connection reset" in first
    if when == "in the decay":
        assert re.search("the decay of (query_key|query_key, value_output) needs every process", first)
