"""Muon as speed runs use it: one optimizer for matrices and the rest, which takes no key of groups but its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from tests import needs
from tests.decay.models import make_model, query_key
from tests.ranks import on_ranks

# Beside the environment, with other optimizers; and only while it is imported, as transformers uses some that it sees.
_FOLDER = str(Path(sys.prefix, "optimizers"))
sys.path.append(_FOLDER)
try:
    muon = needs.package("muon")
finally:
    sys.path.remove(_FOLDER)


def make_optimizer(model: nn.Module, kind: str) -> Any:
    """With the groups that the package's page shows, the matrices by their shapes: gloo gathers those of one shape."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
    shapes = dict.fromkeys(p.shape for p in hidden)
    by_shape = [[p for p in hidden if p.shape == shape] for shape in shapes]
    groups: list[dict[str, Any]] = [
        *({"params": alike, "use_muon": True, "lr": 0.02, "weight_decay": 0.1} for alike in by_shape),
        {"params": others, "use_muon": False, "lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.2},
    ]
    return getattr(muon, kind)(groups)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """With gradients that do not depend on the weights, so that one weight's decay is not in another's gradient."""
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def decayed(kind: str) -> list[dict[str, Tensor]]:
    """Return the weights of a run with a decay, and of one that was resumed in mid-cycle."""
    decays: dict[str, Any] = {"query_key": rd.LowRank(1.0, every=3, warmup=5), "value_output": rd.Frobenius(0.0)}
    decays["embedding"] = rd.Frobenius(0.5)
    model, resumed = make_model(), make_model()
    optimizer = make_optimizer(model, kind)
    found = [set(group) for group in optimizer.param_groups]
    attachment = rd.attach(optimizer, model, **decays)
    train(model, optimizer, range(4))
    attachment.detach()
    assert [set(group) for group in optimizer.param_groups] == found
    again = make_optimizer(resumed, kind)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), saved)
    resumed.load_state_dict(saved["model"])
    rd.attach(again, resumed, **decays)
    again.load_state_dict(saved["optimizer"])
    rd.attach(optimizer, model, **decays)
    for each, its in ((model, optimizer), (resumed, again)):
        train(each, its, range(4, 8))
    return [{name: p.detach() for name, p in each.named_parameters()} for each in (model, resumed)]


def test_groups_that_take_no_other_key() -> None:
    weights, resumed = decayed("SingleDeviceMuonWithAuxAdam")
    plain = make_model()
    train(plain, make_optimizer(plain, "SingleDeviceMuonWithAuxAdam"), range(8))
    named = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "query_key_value.weight")
    named = (*named, "dense.weight", "embedding.weight")
    for (name, weight), other in zip(weights.items(), plain.parameters(), strict=True):
        assert torch.equal(weight, resumed[name]), name
        assert torch.equal(weight, other) != name.endswith(named), name


def test_two_processes_that_share_out_the_steps_decay_alike() -> None:
    """Each steps a part of the matrices and sends it to the other; the decay comes after that, in both."""
    expected = decayed("SingleDeviceMuonWithAuxAdam")
    for outcome in on_ranks(2, decayed, "MuonWithAuxAdam"):
        for weights, its in zip(outcome, expected, strict=True):
            for name, weight in weights.items():
                assert torch.equal(weight, its[name]), name


def test_a_decay_follows_the_rate_of_its_group() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "SingleDeviceMuonWithAuxAdam")
    rd.attach(optimizer, model, query_key=rd.LowRank(1.0), embedding=rd.Frobenius(1.0), exclude="layers.2")
    table, before = model.embedding.weight.detach().clone(), query_key(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert float(model.embedding.weight.detach().norm() / table.norm()) == pytest.approx(1 - 3e-3, rel=1e-5)
    for old, new in zip(before[:4], query_key(model)[:4], strict=True):
        tau = 0.02 * old.norm() / min(old.shape) ** 0.5
        torch.testing.assert_close(
            torch.linalg.svdvals(new), (torch.linalg.svdvals(old) - tau).clamp(min=0), rtol=1e-4, atol=1e-5
        )
