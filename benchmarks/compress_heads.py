"""The heads of a live model as views, and ways to leave a part of each out: the rivals of `benchmarks/compress.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankdecay.compress.reduction import Moments, truncated


def losses_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of each window, (windows,)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.mT.float(), windows[:, 1:], reduction="none").mean(1)


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


class Heads:
    """The matrices of one attention by key head, as views that write through.

    Attributes:
        query: (key heads, query heads of each, d, D).
        key: (key heads, d, D).
        value: the same.
        output: (key heads, query heads of each, d, D): W_O, a row for each coordinate.
    """

    def __init__(self, attention: Any, head_dim: int) -> None:
        def rows(weight: Tensor) -> Tensor:
            return weight.detach().unflatten(0, (-1, head_dim))

        self.key, self.value = rows(attention.k_proj.weight), rows(attention.v_proj.weight)
        groups = len(self.key)
        self.query = rows(attention.q_proj.weight).unflatten(0, (groups, -1))
        self.output = rows(attention.o_proj.weight.mT).unflatten(0, (groups, -1))

    def keep_rows(self, kept: Tensor) -> None:
        """Zero the rows of queries and keys that are not kept; kept is (key heads, d), of truth values."""
        self.key.mul_(kept[..., None])
        self.query.mul_(kept[:, None, :, None])

    def keep_planes(self, kept: Tensor) -> None:
        """The same of planes, (key heads, d/2) or (d/2). A norm over all d numbers then counts as the smaller one."""
        self.keep_rows(torch.cat([kept, kept], dim=-1).expand(len(self.key), -1))


def largest(scores: Tensor, count: int) -> Tensor:
    """Whether each is one of the largest of its row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)


@torch.no_grad()
def keys_by_svd(heads: Heads, rank: int) -> None:
    """W_K of each head of a lower rank: cached before positions and multiplied out when read, which needs a kernel."""
    left, values, right = torch.linalg.svd(heads.key, full_matrices=False)
    heads.key.copy_(left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :])


@torch.no_grad()
def scores_by_svd(heads: Heads, rank: int) -> None:
    """The best d' coordinates of each head's W_Qᵀ W_K, turned by the class's own frequencies."""
    d = heads.key.shape[-2]
    joined = heads.query.transpose(1, 2).flatten(2)  # (groups, d, m D)
    left, values, right = torch.linalg.svd(joined.mT @ heads.key, full_matrices=False)
    root = values[..., :rank].sqrt()
    new_query, new_key = (left[..., :rank] * root[..., None, :]).mT, root[..., None] * right[..., :rank, :]
    planes = torch.arange(rank // 2) * d // rank  # of the same frequencies as a head of d' has by itself
    rows = torch.cat([planes, planes + d // 2])
    heads.key.zero_()
    heads.query.zero_()
    heads.key[:, rows] = new_key
    heads.query[:, :, rows] = new_query.unflatten(-1, (heads.query.shape[1], -1)).transpose(1, 2)


@torch.no_grad()
def rows_by_magnitude(heads: Heads, count: int) -> None:
    """The rows of each head with the largest ‖q‖‖k‖; cached before positions, since a plane may lose one of two."""
    heads.keep_rows(largest(heads.query.square().sum((1, 3)).sqrt() * heads.key.norm(dim=-1), count))


@torch.no_grad()
def values_by_magnitude(heads: Heads, count: int) -> None:
    kept = largest(heads.output.square().sum((1, 3)).sqrt() * heads.value.norm(dim=-1), count)
    heads.value.mul_(kept[..., None])


def fisher(model: nn.Module, windows: Tensor, head_dim: int) -> list[Tensor]:
    """Σ (gradient · weight)² of each plane of each key head, gradients by window: (key heads, d/2) by layer."""
    sums: list[Tensor] = []
    for window in windows.split(1):
        model.zero_grad()
        losses_of(model, window).mean().backward()
        for number, attention in enumerate(attentions(model)):
            q, k = (
                (p.weight.grad * p.weight.detach()).square().sum(1)
                for p in (attention.q_proj, attention.k_proj)
            )  # fmt: skip
            rows = k.view(-1, head_dim)
            rows = rows + q.view(len(rows), -1, head_dim).sum(1)
            planes = rows.unflatten(1, (2, -1)).sum(1)
            if number == len(sums):
                sums.append(planes)
            else:
                sums[number] += planes
    model.zero_grad()
    return sums


@contextmanager
def changed(model: Any, head_dim: int) -> Iterator[list[Heads]]:
    """Matrices that may be changed, and are afterwards what they were."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield [Heads(attention, head_dim) for attention in attentions(model)]
    finally:
        model.load_state_dict(state)


def flat_gains(model: Any) -> None:
    """Give the norms of queries and keys one gain for all coordinates, since an SVD mixes them."""
    for attention in attentions(model):
        for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
            if norm is not None:
                norm.weight.data.fill_(float(norm.weight.data.mean()))


@torch.no_grad()
def put_values(layers: Sequence[Heads], small: Sequence[Heads]) -> None:
    """Give a model the values of a smaller head, beside zeros."""
    for heads, other in zip(layers, small, strict=True):
        rank = other.value.shape[-2]
        heads.value.zero_()
        heads.output.zero_()
        heads.value[:, :rank] = other.value
        heads.output[:, :, :rank] = other.output


@torch.no_grad()
def values_at(layers: Sequence[Heads], moments: Sequence[Moments | None], rank: int) -> None:
    """Values of a lower rank by key head, the best for the weights, or for the inputs whose moments are given."""
    for heads, inputs in zip(layers, moments, strict=True):
        stacked = heads.output.mT.flatten(1, 2).double()  # (groups, m · out, d)
        left, right = truncated(stacked, heads.value.double(), rank, inputs.root(with_one=False) if inputs else None)
        heads.value.zero_()
        heads.output.zero_()
        heads.value[:, :rank] = right.float()
        heads.output[:, :, :rank] = left.unflatten(1, (heads.output.shape[1], -1)).mT.float()
