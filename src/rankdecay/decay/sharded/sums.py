"""Decay of matrices whose long side is cut, by the sum of the Gram matrices of their pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rankdecay.decay.policy import LowRank
from rankdecay.decay.sharded.layout import Piece
from rankdecay.linalg.gram import shrink_factor

# The first names are those of torch 2.13; a build without torch.distributed has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def decayed_pieces(pieces: Sequence[Piece], decay: LowRank, amount: float | Tensor, backend: str) -> list[Tensor]:
    """Return the pieces after the step, in float64: W - W C, or W - C W where their columns are cut.

    A collective. The Gram matrices of all pieces must have one size and add up over the same processes.

    Args:
        pieces: of matrices of which one side is cut.
        decay: of all of them.
        amount: Σ lr · strength since the last decay.
        backend: ``"exact"`` or ``"matmul"``.
    """
    first = pieces[0]
    n = first.cut.gram
    grams = [_gram(piece).reshape(-1, n, n) for piece in pieces]
    counts = [len(gram) for gram in grams]
    *outer, inner = (first.mesh.get_group(mesh_dim) for mesh_dim in first.cut.mesh_dims)
    world, number = dist.get_world_size(inner), sum(counts)
    share = -(-number // world)
    padding = share * world - number
    total = torch.cat([*grams, grams[0].new_zeros(padding, n, n)]).to(first.mesh.device_type)
    del grams
    for group in outer:
        dist.all_reduce(total, group=group)
    sums = total.new_empty(share, n, n)  # those that this process decomposes
    _reduce_scatter(sums, total, group=inner)
    ranks = [min(piece.cut.shape) for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
    start = dist.get_rank(inner) * share
    ranks = [*ranks, *[1] * padding][start : start + share]
    amount = torch.as_tensor(amount, dtype=torch.float64).to(sums.device, non_blocking=True).expand(share)
    rank = torch.tensor(ranks).to(sums.device, non_blocking=True)
    factors = shrink_factor(
        sums, amount, decay.rule, **decay.options, rank=rank, backend=backend, dtype=first.value.dtype
    )
    _all_gather(total, factors, group=inner)
    return [_after(piece, factor) for piece, factor in zip(pieces, total[:number].split(counts), strict=True)]


def _gram(piece: Piece) -> Tensor:
    value = piece.value.double()
    return value.mT @ value if piece.cut.side == -2 else value @ value.mT


def _after(piece: Piece, factor: Tensor) -> Tensor:
    value = piece.value.double()
    factor = factor.to(value.device).reshape(*value.shape[:-2], *factor.shape[-2:])
    return value - (value @ factor if piece.cut.side == -2 else factor @ value)
