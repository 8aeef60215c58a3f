"""The hook for Emerging-Optimizers, under an optimizer that keeps to their contract.

Their package is in no registry and needs a newer Python than the oldest that is supported here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.integrations.emerging_optimizers import AfterDecay, WeightUpdateHook
from tests.decay.models import STRENGTH, make_model, query_key

RADIUS = 2.0


class Sphere:
    """Hold the norm of the weights, and note what the weights were when it was asked to."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> float:
        return RADIUS

    def post_weight_update_inplace(self, p: Tensor, pre_update_state: float) -> None:
        self.found.append(float(p.norm()))
        p.mul_(pre_update_state / p.norm())


class Contract(torch.optim.Optimizer):
    """Steps as theirs do: weight decay, the hook, the update, the hook."""

    def __init__(self, params: Any, weight_update_hook: WeightUpdateHook) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.3})
        self.hook = weight_update_hook

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    state = self.hook.pre_weight_update_inplace(p, p.grad)
                    p.add_(p.grad, alpha=-group["lr"])
                    self.hook.post_weight_update_inplace(p, state)


def _step(model: nn.Module, optimizer: Contract) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_norm_that_a_hook_holds_is_held_after_the_decay(wrapped: bool) -> None:
    model = make_model()
    sphere = Sphere()
    hook = AfterDecay(sphere)
    optimizer = Contract([p for p in model.parameters() if p.ndim == 2], hook if wrapped else sphere)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH), exclude="layers.2")
    if wrapped:
        hook.follow(attachment)
    before = query_key(model)
    for _ in range(2):
        _step(model, optimizer)
    for old, new in zip(before[:4], query_key(model)[:4], strict=True):
        assert (float(new.norm()) == pytest.approx(RADIUS)) == wrapped
        assert torch.linalg.svdvals(new)[-1] / new.norm() < torch.linalg.svdvals(old)[-1] / old.norm()
    assert float(model.head.weight.detach().norm()) == pytest.approx(RADIUS)


def test_a_hook_that_follows_nothing_acts_as_it_would_by_itself() -> None:
    models = [make_model(), make_model()]
    for model, hook in zip(models, (Sphere(), AfterDecay(Sphere())), strict=True):
        optimizer = Contract([p for p in model.parameters() if p.ndim == 2], hook)
        _step(model, optimizer)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_raised_leaves_nothing_behind() -> None:
    model = make_model()
    sphere = Sphere()
    hook = AfterDecay(sphere)
    parameter = model.head.weight
    optimizer = Contract([parameter, model.layers[0]["attention"].q_proj.weight], hook)
    hook.follow(rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH)))
    parameter.grad = torch.zeros_like(parameter)
    hook.post_weight_update_inplace(parameter, 5.0)  # of a step that ended there
    optimizer.step()
    assert len(sphere.found) == 1
    assert float(parameter.detach().norm()) == pytest.approx(RADIUS)
