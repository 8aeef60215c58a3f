"""The monitor of a model whose parameters lie in several processes: all measure, the first logs and warns."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankdecay.monitor import Monitor, RankCollapseWarning
from tests.ranks import on_ranks

CLOSE = {"rel": 1e-5}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim_feedforward": 10, "dropout": 0.0, "batch_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, **sizes) for _ in range(2)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def monitored_run(sharded: bool) -> dict[str, Any]:
    """Four steps, a measurement at every second; every process has the same batches."""
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    if sharded:
        fully_shard([model[0]])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logged: list[dict[str, float]] = []
    monitor = Monitor(model, every=2, log=logged.append, collapse=1e3, detail="head", measures="stable_rank")
    monitor.attach(optimizer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RankCollapseWarning)
        train(model, optimizer, steps=4)
    random = torch.get_rng_state()
    before = [_local(parameter).clone() for parameter in model.parameters()]
    measured = monitor.measure()
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, before, map(_local, model.parameters())))
    with torch.no_grad():
        model(torch.zeros(1, 3, 6))  # FSDP2 leaves the root's own parameters whole until the next backward pass
    assert monitor.measure() == measured
    collapses = sum(issubclass(warning.category, RankCollapseWarning) for warning in said)
    return {"logged": logged, "collapses": collapses, "measured": measured, "returned": monitor.step(10) is not None}


def _local(parameter: Any) -> Tensor:
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()


@pytest.mark.parametrize("world", [2, 4])
def test_every_process_measures_and_the_first_logs(world: int) -> None:
    first, *others = on_ranks(world, monitored_run, True)
    alone = monitored_run(sharded=False)
    assert [values["step"] for values in first["logged"]] == [2, 4, 10]
    for values, expected in zip(first["logged"], alone["logged"], strict=False):
        assert values == pytest.approx(expected, **CLOSE)
    assert first["measured"] == pytest.approx(alone["measured"], **CLOSE)
    assert first["collapses"] == alone["collapses"] == 1
    assert first["returned"]
    for other in others:
        assert other["measured"] == first["measured"]
        assert (other["logged"], other["collapses"], other["returned"]) == ([], 0, False)


# ---- one at a time ---------------------------------------------------------------------------------------


def most_matrices_whole_at_once() -> int:
    """Of all that a measurement gathers."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = make_model()
    fully_shard(model)
    gather: Any = DTensor.full_tensor
    gathered: list[weakref.ref[Tensor]] = []
    most = 0

    def counted(self: DTensor, **how: Any) -> Tensor:
        nonlocal most
        it = gather(self, **how)
        if it.ndim == 2:
            gathered.append(weakref.ref(it))
            most = max(most, sum(matrix() is not None for matrix in gathered))
        return it

    DTensor.full_tensor = counted
    Monitor(model).measure()
    assert len(gathered) == 2 * 4
    return most


def test_one_matrix_is_whole_at_a_time() -> None:
    assert on_ranks(2, most_matrices_whole_at_once) == [1, 1]
