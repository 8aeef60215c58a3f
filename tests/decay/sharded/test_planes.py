"""Rotary planes of sharded weights against those of the same weights in one process, on real processes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.decay.planes import decay_planes, plane_norms
from tests.decay.models import zero_gradients
from tests.decay.test_planes import make, members_of
from tests.ranks import on_ranks


def apart(one: Tensor, other: Tensor) -> float:
    size = other.abs().max().clamp_min(1e-30)  # whose square may be out of range
    return float((one / size - other / size).norm() / (other / size).norm().clamp_min(1e-30))


def every_placement(world: int) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kinds = (Shard(0), Shard(1), Replicate())
    meshes = [((world,), (kind,)) for kind in kinds]
    if world == 4:
        meshes = [((2, 2), pair) for pair in itertools.product(kinds, kinds)]
    found: dict[str, float] = {}
    for (kind, dtype), (shape, placements) in itertools.product(
        [("Qwen2", torch.float32), ("GPTNeoX", torch.float64)], meshes
    ):
        mesh = init_device_mesh("cpu", shape)
        alone = make(kind).to(dtype)
        if dtype == torch.float64:  # whose squares are out of range
            for parameter in alone.parameters():
                parameter.data.mul_(2.0**600)
        members = members_of(alone, 0.3)
        before = [member.parameter.clone() for member in members]

        def placed(value: Tensor, placements: Any = placements, mesh: Any = mesh) -> Any:
            its = [Shard(0) if isinstance(p, Shard) and value.ndim == 1 else p for p in placements]
            if sum(isinstance(p, Shard) for p in its) == 2 and value.ndim == 1:
                its[1] = Replicate()
            return distribute_tensor(value, mesh, its)

        mine = [member._replace(parameter=placed(start)) for member, start in zip(members, before, strict=True)]
        for scope in ("group", "model"):
            decay_planes(members, scope, "relative", keep=1)
            decay_planes(mine, scope, "relative", keep=1)
            norms = zip(plane_norms(mine, scope).values(), plane_norms(members, scope).values(), strict=True)
            found[f"{kind} {placements} {scope} norms"] = max(apart(one, other) for one, other in norms)
            for number, (got, wanted) in enumerate(zip(mine, members, strict=True)):
                whole: Any = got.parameter
                name = f"{kind} {placements} {scope} {number}"
                found[name] = apart(whole.full_tensor(), wanted.parameter)
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_planes_of_every_placement_are_those_of_one_process(world: int):
    for found in on_ranks(world, every_placement, world):
        assert {name: value for name, value in found.items() if not value < 1e-6} == {}
        assert len(found) > 50


def trained(model: nn.Module, how: Any) -> rd.Attachment:
    optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.0), query_key=how), lr=0.1)
    attachment = rd.attach(optimizer)
    for _ in range(3):
        zero_gradients(model)
        optimizer.step()
    vars(model)["optimizer"] = optimizer
    return attachment


def under_fsdp2() -> tuple[dict[str, float], list[str], str]:
    from torch.distributed.fsdp import fully_shard

    alone = make("Qwen2")
    sharded: Any = copy.deepcopy(alone)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    how = rd.Planes(3.0, keep=1, scale="absolute")
    trained(alone, how)
    attachment = trained(sharded, how)
    found = {
        name: apart(p.full_tensor(), q.detach())
        for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True)
    }
    table = attachment.describe(ranks=True)
    attachment.detach()
    [message] = refused(sharded, half=False)
    return found, [line for line in table.splitlines() if "planes of query_key" in line], message


def refused(model: Any, half: bool) -> list[str]:
    """Attach planes of all layers where each process has its own, as a stage of a pipeline, or another decay."""
    rank = dist.get_rank()
    how = rd.Planes(1.0, keep=1 if half or rank == 0 else 2)
    try:
        optimizer = torch.optim.SGD(rd.param_groups(model, query_key=how), lr=0.1)
        rd.attach(optimizer)
    except ValueError as error:
        return [str(error)]
    return ["attached"]


def stages() -> list[str]:
    model: Any = make("Llama")
    rank = dist.get_rank()
    model.model.layers = nn.ModuleDict({str(rank): model.model.layers[rank]})
    message = refused(model, half=True)
    optimizer = torch.optim.SGD(rd.param_groups(model, query_key=rd.Planes(1.0, scope="layer")), lr=0.1)
    rd.attach(optimizer).detach()  # for which a layer is enough
    return message


def both() -> tuple[Any, list[str]]:
    return under_fsdp2(), stages()


def test_under_fsdp2_and_in_stages_of_a_pipeline():
    for (found, lines, message), stage in on_ranks(2, both):
        assert {name: value for name, value in found.items() if not value < 1e-6} == {}
        assert len(lines) == 1
        assert "query_key_keep is 1 on rank 0 and 2 on rank 1" in message
        assert "as pipeline stages do: rank 0 has 1, model.layers.0.self_attn" in stage[0]
        assert "use scope='layer'" in stage[0]
