"""The parts of a model: each parameter once, biases with their matrix, exact answers."""

import pytest
import torch
from torch import nn

from rankdecay.audit import audit

from .models import language_model, row


def test_biases():
    report = audit(*language_model("gpt2"), confirm=True)
    attention = "transformer.h.0.attn"
    assert row(report, f"{attention}.c_attn.bias", "query").kind == "pair"
    key = row(report, f"{attention}.c_attn.bias", "key")  # softmax does not see what it adds to all keys
    assert key.kind == "unknown"
    assert "without effect" in key.words
    assert row(report, f"{attention}.c_proj.bias", "output").kind == "neither"
    opt = audit(*language_model("opt"), confirm=True)  # ReLU: each hidden unit is a pair, with its bias
    assert row(opt, "model.decoder.layers.0.fc1.weight").confirmed
    assert row(opt, "model.decoder.layers.0.fc1.bias").kind == "pair"
    assert row(opt, "model.decoder.layers.0.fc2.bias").kind == "neither"


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "opt"])
def test_every_parameter_has_a_row(name):
    model, loss = language_model(name)
    assert {found.name for found in audit(model, loss).rows} == {name for name, _ in model.named_parameters()}


class Known(nn.Module):
    """W is invariant; a and b are a pair with ⟨∇a, a⟩ = ⟨∇b, b⟩ = 6; c is neither, with a gradient along itself."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
        self.up = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.down = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.c = nn.Parameter(torch.tensor([[2.0, 0.0]], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.zero = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        with torch.no_grad():
            self.up.weight.fill_(2.0)
            self.down.weight.fill_(3.0)

    def loss(self):
        direction = (self.W / self.W.norm())[0, 1] + (self.W / self.W.norm())[1, 0]
        return direction + (self.up.weight * self.down.weight).sum() + self.c.square().sum() + self.zero.sum()


@pytest.mark.parametrize("confirm", [False, True])
def test_exact_answers_without_attention(confirm):
    model = Known()
    with torch.no_grad():
        model.W[0, 1] = 1.0
    report = audit(model, model.loss, confirm=confirm)
    W = row(report, "W")
    assert W.kind == "scale_invariant"
    assert W.radial == pytest.approx(0, abs=1e-15)
    assert W.gradient == pytest.approx((0, 1))
    s = torch.linalg.svdvals(model.W.detach())
    assert W.low_rank.radial == pytest.approx(float(s.sum() ** 2 / (2 * s.square().sum())))
    assert sum(W.low_rank) == pytest.approx(1)
    assert W.l2 == (1, 0)
    up = row(report, "up.weight")
    assert (up.kind, up.partner, up.balance, up.radial) == ("pair", "down.weight", 0, 1)
    c = row(report, "c")
    assert (c.kind, c.radial, c.gradient, c.euler) == ("neither", 1, (1, 0), 1)
    assert c.low_rank == pytest.approx((1, 0))  # of rank 1: U Vᵀ is W itself, up to its length
    for name, why in (("frozen", "frozen"), ("unused", "unused"), ("zero", "zero")):
        assert row(report, name).kind == "unknown"
        assert row(report, name).words.startswith(why)
