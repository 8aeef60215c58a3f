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


def decayed(pieces: Sequence[Piece], decay: LowRank, due: float | Tensor, backend: str) -> list[Tensor]:
    """Returns the pieces after the step, in float64: W - W C, or W - C W where their columns are cut.

    A collective. The Gram matrices of all pieces must have one size and add up over the same processes.

    Args:
        pieces: of matrices of which one side is cut.
        decay: of all of them.
        due: Σ lr · strength.
        backend: ``"exact"`` or ``"matmul"``.
    """
    first = pieces[0]
    n = first.cut.gram
    grams = [_gram(piece).reshape(-1, n, n) for piece in pieces]
    counts = [len(gram) for gram in grams]
    *outer, inner = (first.mesh.get_group(mesh_dim) for mesh_dim in first.cut.mesh_dims)
    world, number = dist.get_world_size(inner), sum(counts)
    share = -(-number // world)
    total = torch.cat([*grams, grams[0].new_zeros(share * world - number, n, n)]).to(first.mesh.device_type)
    del grams
    for group in outer:
        dist.all_reduce(total, group=group)
    own = total.new_empty(share, n, n)
    _reduce_scatter(own, total, group=inner)
    ranks = [min(piece.cut.shape) for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
    begin = dist.get_rank(inner) * share
    own_ranks = [*ranks, *[1] * (share * world - number)][begin : begin + share]
    norm = own.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    due = due.to(norm.device, non_blocking=True) if isinstance(due, Tensor) else due
    tau = decay.scaled(torch.ones_like(norm) * due, norm, torch.tensor(own_ranks).to(norm, non_blocking=True))
    factors = shrink_factor(own, tau, decay.rule, smoothing=decay.smoothing, backend=backend, dtype=first.value.dtype)
    _all_gather(total, factors, group=inner)
    return [_after(piece, factor) for piece, factor in zip(pieces, total[:number].split(counts), strict=True)]


def _gram(piece: Piece) -> Tensor:
    value = piece.value.double()
    return value.mT @ value if piece.cut.side == -2 else value @ value.mT


def _after(piece: Piece, factor: Tensor) -> Tensor:
    value = piece.value.double()
    factor = factor.to(value.device).reshape(*value.shape[:-2], *factor.shape[-2:])
    return value - (value @ factor if piece.cut.side == -2 else factor @ value)
