"""Distributed checkpoints: saved by two processes in the middle of a cycle, continued by one, two or four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import rankdecay as rd
from tests.ranks import on_ranks

SAVED, STEPS = 6, 10  # every=4: the cycle is at 2 of 4 when it is saved


class Run:
    """A model, sharded or not, its optimizer and its decay, as a training script has them."""

    def __init__(self, sharded: bool) -> None:
        torch.manual_seed(0)
        # no biases: a key's has a gradient of rounding errors alone, of which Adam makes whole steps; float64 likewise
        sizes: dict[str, Any] = {"dim_feedforward": 10, "dropout": 0.0, "batch_first": True, "bias": False}
        self.model = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, **sizes) for _ in range(2))).double()
        if sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in self.model:
                fully_shard(layer)
            fully_shard(self.model)
        low_rank = rd.LowRank(1.0, every=4, lr_coupled=False, scale="absolute")
        groups = rd.param_groups(self.model, rd.Frobenius(0.1), query_key=rd.LowRank(1.0, every=4), mlp=low_rank)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.attachment = rd.attach(self.optimizer)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Any]:
        """As arrays, which go from process to process by value."""
        return {name: _whole(p.detach()).numpy() for name, p in self.model.named_parameters()}

    def decays(self) -> dict[str, dict[str, Any]]:
        """What the groups say, apart from parameters: by the names of these."""
        return {
            " ".join(group["param_names"]): {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        }


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save(folder: Path) -> None:
    run = Run(sharded=True)
    run.train(0, SAVED)
    for flat in (False, True):
        model, optimizer = get_state_dict(run.model, run.optimizer, options=_options(flat))
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / str(flat))


def load_and_continue(folder: Path, sharded: bool, flat: bool) -> tuple[dict[str, Any], ...]:
    """In a fresh run: its groups as loaded, and the weights and groups that it ends with."""
    run = Run(sharded)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=_options(flat))
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / str(flat))
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=_options(flat))
    loaded = run.decays()
    run.train(SAVED, STEPS)
    return loaded, run.weights(), run.decays()


def _options(flat: bool) -> StateDictOptions:
    """The state of the optimizer by groups, or parameter by parameter, as pipelines need it."""
    return StateDictOptions(flatten_optimizer_state_dict=flat)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    on_ranks(2, save, folder)
    return folder


@pytest.mark.parametrize(("world", "flat"), [(1, False), (2, False), (2, True), (4, False)])
def test_a_run_continues_on_any_number_of_processes(world: int, flat: bool, folder: Path) -> None:
    uninterrupted = Run(sharded=False)
    uninterrupted.train(0, SAVED)
    halfway = uninterrupted.decays()
    uninterrupted.train(SAVED, STEPS)
    for loaded, weights, decays in on_ranks(world, load_and_continue, folder, world > 1, flat):
        assert loaded == halfway
        assert decays == uninterrupted.decays()
        for name, expected in uninterrupted.weights().items():
            np.testing.assert_allclose(weights[name], expected, rtol=1e-7, atol=1e-9, err_msg=name)


def test_asking_a_fresh_optimizer_for_its_state_is_no_step() -> None:
    """PyTorch makes one, with gradients and a learning rate of zero, so that there are moments to load into."""
    run = Run(sharded=False)
    weights, decays = run.weights(), run.decays()
    before = {name: value.copy() for name, value in weights.items()}
    get_state_dict(run.model, run.optimizer)
    assert run.decays() == decays
    assert all((weights[name] == value).all() for name, value in before.items())
