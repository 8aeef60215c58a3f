"""Distributed checkpoints: saved by two processes in the middle of a cycle, continued by one, two or four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import rankdecay as rd
from tests.ranks import on_ranks

# what dcp says where there is one process
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

SAVED, STEPS = 6, 10  # every=4: the cycle is at 2 of 4 when it is saved


class Run:
    """A model, sharded or not, its optimizer and its decay, as a training script has them.

    Args:
        sharded: whether FSDP2 shards the model.
        by: where the decays are said: in the optimizer's "groups", or by "roles" of the model; or "nothing".
        every: period of the decays.
        **how: other arguments of attach.
    """

    def __init__(self, sharded: bool, by: str, every: int = 4, **how: Any) -> None:
        torch.manual_seed(0)
        # no biases: a key's has a gradient of rounding errors alone, of which Adam makes whole steps; float64 likewise
        sizes: dict[str, Any] = {"dim_feedforward": 10, "dropout": 0.0, "batch_first": True, "bias": False}
        self.model = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, **sizes) for _ in range(2))).double()
        if sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in self.model:
                fully_shard(layer)
            fully_shard(self.model)
        query_key = rd.LowRank(1.0, every=every, warmup=5 if every > 1 else 0)  # either has counts
        decays: dict[str, Any] = {"default": rd.Frobenius(0.1), "query_key": query_key}
        decays["mlp"] = rd.LowRank(1.0, every=every, lr_coupled=False, scale="absolute")
        self.by_groups = by == "groups"
        groups = rd.param_groups(self.model, **decays) if self.by_groups else self.model.parameters()
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
        if self.by_groups:
            self.attachment = rd.attach(self.optimizer)
        elif by == "roles":
            self.attachment = rd.attach(self.optimizer, self.model, **decays, **how)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Any]:
        """As arrays, which go from process to process by value."""
        return {name: _whole(p.detach()).numpy() for name, p in self.model.named_parameters()}

    def decays(self) -> Any:
        """What is saved of the decays: by names of parameters, or the counts alone."""
        if not self.by_groups:
            return self.attachment.state_dict()
        return {
            " ".join(group["param_names"]): {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        }


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save(folder: Path) -> None:
    for by in ("groups", "roles", "nothing"):
        run = Run(sharded=True, by=by)
        run.train(0, SAVED)
        for flat in (False, True):
            model, optimizer = get_state_dict(run.model, run.optimizer, options=_options(flat))
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / by / str(flat))


def load(run: Run, path: Path, flat: bool, **others: Any) -> None:
    """Load a checkpoint into a fresh run, with whatever else that is to be loaded."""
    model, optimizer = get_state_dict(run.model, run.optimizer, options=_options(flat))
    state = {"model": model, "optimizer": optimizer, **others}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=_options(flat))


def load_and_continue(folder: Path, sharded: bool, by: str, flat: bool) -> tuple[Any, ...]:
    """In a fresh run: its decays as loaded, and the weights and decays that it ends with."""
    run = Run(sharded, by)
    load(run, folder / by / str(flat), flat)
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


def _check_continued(outcomes: list[tuple[Any, ...]], by: str) -> None:
    uninterrupted = Run(sharded=False, by=by)
    uninterrupted.train(0, SAVED)
    halfway = uninterrupted.decays()
    uninterrupted.train(SAVED, STEPS)
    for loaded, weights, decays in outcomes:
        assert loaded == halfway
        assert decays == uninterrupted.decays()
        for name, expected in uninterrupted.weights().items():
            np.testing.assert_allclose(weights[name], expected, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("by", ["groups", "roles"])
@pytest.mark.parametrize(("world", "flat"), [(1, False), (2, False), (2, True), (4, False)])
def test_a_run_continues_on_any_number_of_processes(world: int, flat: bool, by: str, folder: Path) -> None:
    _check_continued(on_ranks(world, load_and_continue, folder, world > 1, by, flat), by)


def load_full_and_continue(path: Path, from_rank_0: bool) -> list[tuple[Any, ...]]:
    """The state in one piece, in an ordinary file, which rank 0 alone reads where the others are sent it."""
    run = Run(sharded=True, by="roles")
    run.train(0, SAVED)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"model": model, "optimizer": optimizer}, path)
    dist.barrier()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
    run = Run(sharded=True, by="roles")
    reads = dist.get_rank() == 0 or not from_rank_0
    saved = torch.load(path, weights_only=True) if reads else {"model": {}, "optimizer": {}}
    set_model_state_dict(run.model, saved["model"], options=options)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=options)
    loaded = run.decays()
    run.train(SAVED, STEPS)
    return [(loaded, run.weights(), run.decays())]


@pytest.mark.parametrize("from_rank_0", [False, True])
def test_a_run_continues_from_a_state_in_one_piece(from_rank_0: bool, tmp_path: Path) -> None:
    for outcomes in on_ranks(2, load_full_and_continue, tmp_path / "saved.pt", from_rank_0):
        _check_continued(outcomes, "roles")


# ---- with the checkpoint of a run without decay, and the other way round -----------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_a_checkpoint_without_decay_has_every_key_where_there_are_no_cycles(flat: bool, folder: Path) -> None:
    run = Run(sharded=False, by="roles", every=1)
    load(run, folder / "nothing" / str(flat), flat)
    before = run.weights()["0.self_attn.in_proj_weight"].copy()
    run.train(SAVED, STEPS)
    plain = Run(sharded=False, by="nothing")
    load(plain, folder / "nothing" / str(flat), flat)
    np.testing.assert_array_equal(plain.weights()["0.self_attn.in_proj_weight"], before)
    plain.train(SAVED, STEPS)
    decayed, same = run.weights(), plain.weights()
    assert np.linalg.norm(decayed["0.linear1.weight"]) < 0.9 * np.linalg.norm(same["0.linear1.weight"])


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_without_decay_ignores_the_counts_of_a_checkpoint(flat: bool, folder: Path) -> None:
    run = Run(sharded=False, by="nothing")
    load(run, folder / "roles" / str(flat), flat)
    assert {key for state in run.optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("flat", [False, True])
def test_counts_that_a_checkpoint_has_not_are_an_error_with_two_ways_out(flat: bool, folder: Path) -> None:
    path = folder / "nothing" / str(flat)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*rankdecay.query_key_steps"):
        load(Run(sharded=False, by="roles"), path, flat)

    aside = Run(sharded=False, by="roles", counts="attachment")
    load(aside, path, flat)

    partial = Run(sharded=False, by="roles")
    model, optimizer = get_state_dict(partial.model, partial.optimizer, options=_options(flat))
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(
        partial.model, partial.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=_options(flat)
    )
    for run in (aside, partial):
        assert set(run.decays().values()) == {0}
        run.train(SAVED, STEPS)
    for name, weight in aside.weights().items():
        np.testing.assert_array_equal(weight, partial.weights()[name])


def test_the_counts_of_an_attachment_are_a_part_of_a_checkpoint_of_their_own(tmp_path: Path) -> None:
    """A Stateful: dcp asks it for its state, and gives it what it has loaded."""
    run = Run(sharded=False, by="roles", counts="attachment")
    run.train(0, SAVED)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer, "decay": run.attachment}
    dcp.save(state, checkpoint_id=tmp_path)
    resumed = Run(sharded=False, by="roles", counts="attachment")
    load(resumed, tmp_path, False, decay=resumed.attachment)
    assert resumed.decays() == run.decays()
    assert set(run.decays().values()) > {SAVED}
    for each in (run, resumed):
        each.train(SAVED, STEPS)
    for name, weight in run.weights().items():
        np.testing.assert_array_equal(resumed.weights()[name], weight)


# ---- a step that makes the state to load into --------------------------------------------------------------


@pytest.mark.parametrize("by", ["groups", "roles"])
def test_asking_a_fresh_optimizer_for_its_state_is_no_step(by: str) -> None:
    """PyTorch makes one, with gradients and a learning rate of zero, so that there are moments to load into."""
    run = Run(sharded=False, by=by)
    weights, decays = run.weights(), run.decays()
    before = {name: value.copy() for name, value in weights.items()}
    get_state_dict(run.model, run.optimizer)
    assert run.decays() == decays
    assert all((weights[name] == value).all() for name, value in before.items())


def test_asking_an_optimizer_without_state_is_no_step_whenever_it_is_asked() -> None:
    """One that has no state when it has stepped, either: PyTorch makes the step each time."""
    run = Run(sharded=False, by="nothing")
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    once = rd.LowRank(0.5, lr_coupled=False)
    attachment = rd.attach(optimizer, run.model, query_key=once, mlp=rd.LowRank(0.5, every=3, lr_coupled=False))
    run.optimizer = optimizer
    for step in range(4):
        run.train(step, step + 1)
        optimizer.zero_grad()
        counts, weights = attachment.state_dict(), {name: w.copy() for name, w in run.weights().items()}
        get_optimizer_state_dict(run.model, optimizer)
        assert attachment.state_dict() == counts
        assert {n for n, count in counts.items() if n.endswith("_steps") and count != step + 1} == set()
        assert all((run.weights()[name] == weight).all() for name, weight in weights.items())


@pytest.mark.parametrize("maker", [torch.optim.SGD, torch.optim.AdamW])
def test_the_first_step_of_a_warm_up_is_a_step(maker: Any) -> None:
    """Its learning rate is zero too, but it has gradients."""
    run = Run(sharded=False, by="nothing")
    run.optimizer = maker(run.model.parameters(), lr=0.0)
    attachment = rd.attach(run.optimizer, run.model, query_key=rd.LowRank(0.5, every=2, lr_coupled=False))
    run.train(0, 1)
    counts = attachment.state_dict()
    assert {value for name, value in counts.items() if ".query_key" in name} == {1, 0.5}


def test_what_a_step_for_the_state_has_done_at_a_real_rate_is_overwritten(tmp_path: Path) -> None:
    """As Megatron makes it: zero gradients, the learning rate there is, then everything is loaded."""
    run = Run(sharded=False, by="roles")
    run.train(0, SAVED)
    saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    resumed = Run(sharded=False, by="roles")
    for parameter in resumed.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    resumed.optimizer.step()
    resumed.optimizer.zero_grad()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert resumed.decays() == run.decays()
    for each in (run, resumed):
        each.train(SAVED, STEPS)
    for name, weight in run.weights().items():
        np.testing.assert_array_equal(resumed.weights()[name], weight)
