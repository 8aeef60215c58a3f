"""Optimizers as timm's train.py makes them: groups by layer and by dimension stay as they are."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd

LR = 0.1
ARGUMENTS: dict[str, Any] = {
    "opt": "adamw",
    "opt_eps": None,
    "opt_betas": None,
    "lr": LR,
    "weight_decay": 0.3,
    "momentum": 0.9,
    "layer_decay": 0.5,
}


def _model(timm: ModuleType) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(**sizes, num_classes=5)


def _optimizer(model: nn.Module, **arguments: Any) -> Any:
    from timm.optim import create_optimizer_v2, optimizer_kwargs

    parsed = argparse.Namespace(**{**ARGUMENTS, **arguments})
    return create_optimizer_v2(model, **optimizer_kwargs(cfg=parsed))


def _gradients(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _matrices(model: nn.Module) -> list[torch.Tensor]:
    layers = rd.find_attention(model)
    return [view.tensor().detach().clone() for layer in layers for view in (layer.query, layer.key)]


@pytest.mark.parametrize("opt", ["adamw", "momentum", "lion", "nadamw"])
def test_groups_with_layer_decay_stay_and_each_layer_decays_at_its_rate(timm: ModuleType, opt: str) -> None:
    plain, decayed = _model(timm), _model(timm)
    optimizers = [_optimizer(model, opt=opt) for model in (plain, decayed)]
    for optimizer in optimizers:  # as timm's schedulers apply `lr_scale`
        for group in optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
    found = [{k: v for k, v in group.items() if k != "params"} for group in optimizers[1].param_groups]
    assert len({group["lr"] for group in found}) > 2
    attachment = rd.attach(optimizers[1], decayed, query_key=rd.LowRank(0.5), value_output=rd.Frobenius(0.3))
    before = _matrices(decayed)
    for parameter in decayed.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[1].step()
    rates = [LR * 0.5**2, LR * 0.5]  # of the blocks: the head has the whole rate, the embedding a quarter of that
    for index, (old, new) in enumerate(zip(before, _matrices(decayed), strict=True)):
        tau = rates[index // 2] * 0.5 * old.norm() / min(old.shape) ** 0.5
        expected = (torch.linalg.svdvals(old) - tau).clamp(min=0)
        torch.testing.assert_close(torch.linalg.svdvals(new), expected, rtol=1e-4, atol=1e-5)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizers[1].param_groups] == found
    assert "patch_embed" in attachment.describe()


def test_what_is_not_named_is_trained_as_if_nothing_were_attached(timm: ModuleType) -> None:
    models = [_model(timm), _model(timm)]
    optimizers = [_optimizer(model) for model in models]
    rd.attach(optimizers[1], models[1], query_key=rd.LowRank(0.5), value_output=rd.Frobenius(0.1))
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            _gradients(model)
            optimizer.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        attention = "attn.qkv.weight" in name or "attn.proj.weight" in name
        assert torch.equal(one, other) != attention, name


def test_lookahead_is_seen_through(timm: ModuleType) -> None:
    model = _model(timm)
    optimizer = _optimizer(model, opt="lookahead_adamw")
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.5))
    assert "Lookahead averages the weights" in attachment.describe()
    assert attachment.optimizer is optimizer._base_optimizer
    before = _matrices(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(new.norm() < old.norm() for old, new in zip(before, _matrices(model), strict=True))
