"""Decays of DTensors against those of the same weights in one process, on real processes."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from tests.ranks import on_ranks
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.layer import Window
from rankdecay.decay.groups import hook_keys

SHAPES = [(40, 12), (12, 40), (24, 24), (33, 20), (20, 33), (3, 2), (2, 3), (1, 5), (64, 8)]
DECAYS = [
    rd.LowRank(0.8),
    rd.LowRank(0.5, scale="absolute"),
    rd.LowRank(0.8, rule="smooth", smoothing=0.1),
    rd.LowRank(0.3, rule="polar"),
    rd.LowRank(0.3, rule="newton_schulz", lr_coupled=False, scale="absolute"),
    rd.Frobenius(0.7),
]


def decayed(weights: list[Any], decay: Any, windows: Any = (), backend: Any = "auto", steps: int = 1) -> list[Any]:
    """The weights after steps of SGD without any gradient."""
    parameters = [nn.Parameter(weight) for weight in weights]
    keys = hook_keys("mlp", decay, windows)
    optimizer = torch.optim.SGD([{"params": parameters, "role": "mlp", **keys}], lr=0.1)
    attachment = rd.attach(optimizer, backend=backend)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    attachment.detach()
    return [parameter.detach() for parameter in parameters]


def distance(got: Tensor, wanted: Tensor, before: Tensor) -> float:
    """Between two steps, as a share of the wanted one."""
    step = (wanted - before).double().norm()
    return float((got - wanted).double().norm() / step) if step > 0 else float((got - wanted).norm())


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- every placement and shape -------------------------------------------------------------------------------


def placements_of(world: int) -> list[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """Meshes and placements for a number of processes."""
    from torch.distributed.tensor import Replicate, Shard

    found: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [((world,), (Shard(0),)), ((world,), (Shard(1),))]
    found.append(((world,), (Replicate(),)))
    if world == 4:
        kinds = (Shard(0), Shard(1), Replicate())
        found += [((2, 2), pair) for pair in itertools.product(kinds, kinds) if pair != (Replicate(), Replicate())]
    return found


def every_placement(world: int) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    worst: dict[str, float] = {}
    for mesh_shape, placements in placements_of(world):
        mesh = init_device_mesh("cpu", mesh_shape)
        before = [draw(shape, seed) for seed, shape in enumerate(SHAPES)]
        for decay, backend in [*((decay, "auto") for decay in DECAYS), (DECAYS[0], "matmul"), (DECAYS[2], "matmul")]:
            wanted = decayed([weight.clone() for weight in before], decay, steps=2)
            mine = [distribute_tensor(weight.clone(), mesh, placements) for weight in before]
            found = decayed(mine, decay, backend=backend, steps=2)
            for shape, new, right, old in zip(SHAPES, found, wanted, before, strict=True):
                assert new.placements == placements
                worst[f"{mesh_shape} {placements} {shape} {decay} {backend}"] = distance(new.full_tensor(), right, old)
    return worst


@pytest.mark.parametrize("world", [2, 4])
def test_every_placement_and_shape_decays_as_in_one_process(world):
    for worst in on_ranks(world, every_placement, world):
        assert {name: value for name, value in worst.items() if not value < 1e-5} == {}
        assert len(worst) > 100
