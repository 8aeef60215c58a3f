"""Every optimizer of this torch, with its variants, against one optimizer a parameter and the definitions in a loop."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from tests import needs

LR, LOW_RANK, L2, OWN, STEPS = 0.05, 0.7, 0.3, 0.2, 4
DECOUPLED = ("AdamW", "Adafactor", "Muon")  # whatever the options
KINDS = (
    *("Adam", "AdamW", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"),
    *("Adafactor", pytest.param("Muon", marks=needs.muon)),
)
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"foreach": True},
    {"fused": True},
    {"maximize": True, "foreach": False},
    {"amsgrad": True},
    {"momentum": 0.9},
    {"decoupled_weight_decay": True},
    {"lr": torch.tensor(LR, dtype=torch.float64)},
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, bias=False)
        self.linear = nn.Linear(6, 8, bias=False)  # left to the optimizer
        self.double()


def _gradients(model: Model, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def _takes(kind: type, name: str) -> bool:
    return name in inspect.signature(kind).parameters


def _shrunk(matrix: Tensor, rate: float) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    tau = rate * LOW_RANK * matrix.norm() / len(matrix) ** 0.5
    return u @ torch.diag((s - tau).clamp(min=0)) @ vh


def _by_definition(kind: Any, how: dict[str, Any], own: dict[str, float], embedding: float) -> Model:
    """A loop with an optimizer for each parameter, none of which has an L2 that is not decoupled where one is named."""
    model = Model()
    plain = {name: value for name, value in how.items() if name not in ("foreach", "fused", "lr")} | {"lr": LR}
    plain |= {"foreach": False} if _takes(kind, "foreach") else {}
    no_l2 = {"weight_decay": 0.0} if _takes(kind, "weight_decay") else {}
    by_itself = kind.__name__ in DECOUPLED or _takes(kind, "decoupled_weight_decay")
    keyed = {"decoupled_weight_decay": True} if _takes(kind, "decoupled_weight_decay") else {}
    optimizers = []
    for name, parameter in model.named_parameters():
        l2 = {"embedding.weight": embedding, "attention.out_proj.weight": L2}.get(name)
        given = own if name == "linear.weight" else no_l2
        given = {"weight_decay": l2, **keyed} if l2 is not None and by_itself else given
        optimizers.append((kind([parameter], **{**plain, **given}), parameter, 0.0 if by_itself else l2 or 0.0))
    fused = model.attention.in_proj_weight
    for step in range(STEPS):
        rate = LR / (1 + 1e-4 * LR * step) ** 0.75 if kind is torch.optim.ASGD else LR  # by its lambd and its alpha
        for (optimizer, parameter, left), gradient in zip(optimizers, _gradients(model, step), strict=True):
            parameter.grad = gradient
            optimizer.step()
            with torch.no_grad():
                parameter.mul_(1 - rate * left)
        with torch.no_grad():
            query, key, value = fused.chunk(3)
            fused.copy_(torch.cat([_shrunk(query, rate), _shrunk(key, rate), value * (1 - rate * L2)]))
    return model


@pytest.mark.parametrize("by", ["roles", "groups"])
@pytest.mark.parametrize("name", KINDS)
def test_every_variant_is_the_loop_of_the_definition(name: str, by: str) -> None:
    kind = getattr(torch.optim, name)
    owns = (
        [{}] if name in ("ASGD", "Rprop") else [{}, {"weight_decay": OWN}]
    )  # of which one is not divided, one has none
    ran = 0
    for how in VARIANTS:
        if not all(_takes(kind, option) for option in how):
            continue
        if isinstance(how.get("lr"), Tensor) and name == "Muon":
            continue  # takes a number alone
        for own in owns:
            for embedding in (OWN, L2):  # as strong as the group's own, and not
                model = Model()
                roles = {"query_key": rd.LowRank(LOW_RANK), "value_output": rd.Frobenius(L2)}
                roles["embedding"] = rd.Frobenius(embedding)
                groups = model.parameters() if by == "roles" else rd.param_groups(model, **roles)
                lr = how["lr"].clone() if "lr" in how else LR
                optimizer = kind(groups, **{**how, **own, "lr": lr})
                attachment = rd.attach(optimizer, model, **roles) if by == "roles" else rd.attach(optimizer)
                for step in range(STEPS):
                    for parameter, gradient in zip(model.parameters(), _gradients(model, step), strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                attachment.detach()
                wanted = _by_definition(kind, how, own, embedding)
                for (of, got), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
                    away = float((got - expected).detach().abs().max())
                    assert away < 1e-7, f"{of} under {how}, {own}, {embedding}"  # ASGD counts its rate in float32
                ran += 1
    assert ran >= 2 * len(owns)
