"""A decoder-only transformer of today's kind, or GPT-2's: a plain module.

With rotary positions its blocks are those of Llama (RMSNorm, gated SiLU), and of Qwen 3 with QK-norm, down to the names
of the parameters; with learned positions those of GPT-2 with RMSNorm for LayerNorm. No biases, tied embeddings. An
``mlp_width`` of 0 leaves attention alone. :mod:`export` writes a checkpoint that transformers loads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankdecay.lab.errors import SettingError

Positions = Literal["rotary", "learned"]
Scores = Literal["learned", "positions", "frozen", "frozen_large", "uniform"]
UNTRAINED: tuple[Scores, ...] = ("frozen", "frozen_large", "uniform")  # W_Q and W_K stay as they start
EPSILON = 1e-6  # of every RMSNorm
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a network.

    Attributes:
        vocabulary: number of tokens, in and out.
        context: longest sequence, in tokens.
        width: of the residual stream.
        depth: number of blocks.
        heads: per block; each ``width / heads`` wide.
        mlp_width: hidden width of the feed-forward part; 0 leaves it out.
        positions: ``"rotary"`` or ``"learned"``.
        qk_norm: RMSNorm with a gain on the queries and keys of each head.
        initial: standard deviation of every matrix at first; the usual 0.02 is meant for a width of some thousand.
        scores: what attention scores come from. ``"learned"``: W_Q and W_K of the stream, trained. The others are
            controls: ``"positions"``: W_Q and W_K, trained, of the position alone (its embedding, or with rotary
            positions a vector of ones, which is then turned); ``"frozen"``: W_Q and W_K as they are drawn;
            ``"frozen_large"``: drawn with a standard deviation of 1/√width, at which scores have one of about 1;
            ``"uniform"``: W_Q and W_K are zero, so that every token sees the mean of those before it.
    """

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    positions: Positions = "rotary"
    qk_norm: bool = False
    initial: float = 0.02
    scores: Scores = "learned"

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.positions == "rotary" and self.head_dim % 2):
            raise SettingError(
                f"`width` {self.width} cannot be split into {self.heads} heads of an even size: "
                f"give for example `width` {self.heads * 32}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def control_scores(matrices: Iterable[nn.Parameter], scores: Scores, width: int, initial: float) -> None:
    """Keep W_Q and W_K from training at the values of a control, see `GPTConfig.scores`; others stay as they are.

    Args:
        matrices: every W_Q and W_K of a network, as drawn.
        scores: of the network.
        width: of its residual stream.
        initial: standard deviation of the matrices.
    """
    if scores not in UNTRAINED:
        return
    scale = {"uniform": 0.0, "frozen_large": width**-0.5 / initial}.get(scores, 1.0)
    with torch.no_grad():
        for matrix in matrices:
            matrix.requires_grad_(False).mul_(scale)


class Attention(nn.Module):
    """Causal attention; `rankdecay.find_attention` reads ``num_heads``, ``rotary_emb`` and ``rope_interleaved``."""

    rope_interleaved = False  # the two coordinates of a plane are half a head apart

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, EPSILON) for _ in range(2))
        self.qk_norm = config.qk_norm
        self.rotary_emb = Rotary(config) if config.positions == "rotary" else None

    def forward(self, x: Tensor, scored: Tensor | None = None) -> Tensor:
        """Maps (batch, tokens, width) to the same shape; queries and keys are of ``scored``, where it is given."""
        scored = x if scored is None else scored
        inputs = (self.q_proj, scored), (self.k_proj, scored), (self.v_proj, x)
        query, key, value = (  # (batch, tokens, heads, head_dim); under tensor parallelism some of the heads
            project(given).unflatten(-1, (-1, self.head_dim)) for project, given in inputs
        )
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (batch, heads, tokens, head_dim)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(query), self.rotary_emb(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Rotary(nn.Module):
    """Rotates coordinates i and i + head_dim/2 of position t by the angle t · base^(−2i/head_dim)."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.context, dtype=torch.float32), ROTARY_BASE**-half)
        angles = torch.cat([angles, angles], -1)  # (context, head_dim)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, heads, tokens, head_dim) to the same shape."""
        tokens = x.shape[-2]
        first, second = x.chunk(2, -1)
        turned = x * self.cosine[:tokens] + torch.cat([-second, first], -1) * self.sine[:tokens]
        return turned.to(x.dtype)


class MLP(nn.Module):
    """Feed-forward part: down(silu(gate x) · up x) with rotary positions as in Llama, else down(gelu(up x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.positions == "rotary"
        if self.gated:
            self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, width) to the same shape."""
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up if self.gated else F.gelu(up))


class Block(nn.Module):
    """Attention, then the feed-forward part, each on the normalised stream and added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, EPSILON)
        self.self_attn = Attention(config)
        self.has_mlp = config.mlp_width > 0
        if self.has_mlp:
            self.post_attention_layernorm = nn.RMSNorm(config.width, EPSILON)
            self.mlp = MLP(config)

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """Maps (batch, tokens, width) to the same shape; queries and keys are of ``place``, where it is given."""
        scored = None if place is None else self.input_layernorm(place)
        x = x + self.self_attn(self.input_layernorm(x), scored)
        return x + self.mlp(self.post_attention_layernorm(x)) if self.has_mlp else x


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.has_positions = config.positions == "learned"
        self.by_position = config.scores == "positions"
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, EPSILON)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (batch, tokens) to (batch, tokens, width)."""
        x = self.embed_tokens(tokens)
        place = x.new_ones(x.shape) if self.by_position else None
        if self.has_positions:
            positions = self.embed_positions.weight[: tokens.shape[1]]
            place = positions.expand_as(x) if self.by_position else None
            x = x + positions
        for layer in self.layers:
            x = layer(x, place)
        return self.norm(x)


class GPT(nn.Module):
    """The network; its logits are over the next token.

    Args:
        config: its shape.
        seed: of the initial weights, which depend on nothing else.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initial, generator=generator)
        scoring = ("q_proj.weight", "k_proj.weight")
        matrices = [parameter for name, parameter in self.named_parameters() if name.endswith(scoring)]
        control_scores(matrices, config.scores, config.width, config.initial)

    def get_output_embeddings(self) -> nn.Linear:
        """The output embedding, under the name by which transformers' models give theirs."""
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (batch, tokens) to logits (batch, tokens, vocabulary).

        Raises:
            SettingError: For a sequence longer than the context.
        """
        if tokens.shape[1] > self.config.context:
            raise SettingError(f"a sequence of {tokens.shape[1]} tokens is longer than `context` {self.config.context}")
        return self.lm_head(self.model(tokens))
