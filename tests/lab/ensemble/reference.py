"""The same transformer as one ordinary PyTorch module: no member axis, every position in every layer, no tables."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


class RMSNorm(nn.Module):
    def __init__(self, width: int, gain: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        return x if self.gain is None else self.gain * x


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, qk_norm: str, gains: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm, self.sharpness = heads, qk_norm, 1.0
        self.norm_attention, self.norm_mlp = RMSNorm(width, gains), RMSNorm(width, gains)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(width, mlp_width, bias=False), nn.Linear(mlp_width, width, bias=False)
        if qk_norm != "none":
            normed = width if qk_norm == "width" else width // heads
            self.norm_query, self.norm_key = RMSNorm(normed, gains), RMSNorm(normed, gains)

    def heads_first(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return x.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        query, key, value = self.query(normed), self.key(normed), self.heads_first(self.value(normed))
        if self.qk_norm == "width":
            query, key = self.norm_query(query), self.norm_key(key)
        query, key = self.heads_first(query), self.heads_first(key)
        if self.qk_norm == "head":
            query, key = self.norm_query(query), self.norm_key(key)
        mixed = F.scaled_dot_product_attention(self.sharpness * query, key, value)  # (batch, heads, length, head_dim)
        x = x + self.output(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.mlp_out(F.silu(self.mlp_in(self.norm_mlp(x))))


class ReferenceTransformer(nn.Module):
    """Built from the fields of a `TransformerConfig`; reads the answer at the last position."""

    def __init__(self, config) -> None:
        super().__init__()
        c = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.position = nn.Parameter(torch.zeros(c.length, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_width, c.qk_norm, c.gains) for _ in range(c.depth))
        self.norm_final = RMSNorm(c.width, c.gains)
        self.unembedding = nn.Linear(c.width, c.outputs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.unembedding(self.norm_final(x)[:, -1])

    def parameter_named(self, name: str) -> nn.Parameter:
        """The parameter that the lab calls ``name``: ``"query.0"``, ``"norm_key.1"``, ``"embedding"``, …"""
        role, _, layer = name.partition(".")
        if name == "position":
            return self.position
        owner = getattr(self.blocks[int(layer)] if layer else self, role)
        return owner.gain if role.startswith("norm") else owner.weight

    @classmethod
    def with_parameters(cls, config, parameters: dict[str, Tensor]) -> "ReferenceTransformer":
        """A float64 network holding one member's parameters; every parameter must be used and known."""
        network = cls(config).double()
        own = {network.parameter_named(name) for name in parameters}
        assert own == set(network.parameters())
        with torch.no_grad():
            for name, value in parameters.items():
                network.parameter_named(name).copy_(value)
        return network
