"""Models whose attention is stored in every way, and what the tests of decays do with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rankdecay as rd

STRENGTH = 0.7


class Attention(nn.Module):
    """Separate projections with grouped keys: 4 query heads, 2 key heads of size 3."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj = nn.Linear(10, 12)
        self.k_proj = nn.Linear(10, 6)
        self.v_proj = nn.Linear(10, 6)
        self.o_proj = nn.Linear(12, 10)


class Fused(nn.Module):
    """The same in one parameter, interleaved by key head, beside a separate output."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.model_type = 4, "falcon"  # which says how the parameter is cut
        self.query_key_value = nn.Linear(10, 24)
        self.dense = nn.Linear(12, 10)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 10)
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": kind()}) for kind in (Attention, Attention, Fused)])
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 9)

    def forward(self, ids: Tensor) -> Tensor:
        """Not attention, but every parameter has a gradient."""
        x = self.embedding(ids)
        for layer in self.layers:
            a = layer["attention"]
            if isinstance(a, Attention):
                q, k, v = a.q_proj(x), a.k_proj(x), a.v_proj(x)
                x = x + a.o_proj(q * torch.cat([k, v], -1).tanh())
            else:
                q, k = a.query_key_value(x).chunk(2, -1)
                x = x + a.dense(q * k.tanh())
        return self.head(self.norm(x))


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def groups_of(model: nn.Module, strength: float = STRENGTH, **how) -> list[dict]:
    return rd.param_groups(model, rd.Frobenius(0.0), query_key=rd.LowRank(strength, **how))


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def backward(model: nn.Module, seed: int = 0) -> None:
    ids = torch.randint(9, (8,), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(ids), ids).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A step for each seed."""
    for seed in steps:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def query_key(model: Model, by_head: bool = False) -> list[Tensor]:
    views = [view for layer in rd.find_attention(model) for view in (layer.query, layer.key)]
    return [(view.heads() if by_head else view.tensor()).clone().double() for view in views]


class NanoBlock(nn.Module):
    """A pre-norm block in the style of nanoGPT: fused, contiguous."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.n_head = heads
        self.attn.c_attn = nn.Linear(width, 3 * width)
        self.attn.c_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Nano(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 16))
        self.h = nn.ModuleList([NanoBlock(), NanoBlock()])
        self.scale = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.probe = nn.Linear(16, 3)
        if tied:
            self.lm_head.weight = self.wte.weight
