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
from rankdecay.linalg.stack import power_of_two

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
    *outer, inner = (first.mesh.get_group(mesh_dim) for mesh_dim in first.cut.mesh_dims)
    exponents = _exponents(pieces, [*outer, inner])
    grams = [_gram(piece, exponent).reshape(-1, n, n) for piece, exponent in zip(pieces, exponents, strict=True)]
    counts = [len(gram) for gram in grams]
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
    exponent = torch.cat([*(each.flatten() for each in exponents), exponents[0].new_zeros(padding)])
    factors = shrink_factor(
        sums,
        amount,
        decay.rule,
        **decay.options,
        rank=rank,
        exponent=exponent[start : start + share].to(sums.device, non_blocking=True),
        backend=backend,
        dtype=first.value.dtype,
    )
    _all_gather(total, factors, group=inner)
    return [_after(piece, factor) for piece, factor in zip(pieces, total[:number].split(counts), strict=True)]


def _exponents(pieces: Sequence[Piece], groups: Sequence[Any]) -> list[Tensor]:
    """Return the power of two by which each matrix is divided: of float64 alone, whose squares may be out of range."""
    shapes = [piece.value.shape[:-2] for piece in pieces]
    if pieces[0].value.dtype != torch.float64:
        return [torch.zeros(shape, dtype=torch.int32) for shape in shapes]
    flat = [piece.value.reshape(*piece.value.shape[:-2], -1) for piece in pieces]
    each = [f.abs().amax(-1) if f.shape[-1] else f.new_zeros(f.shape[:-1]) for f in flat]
    largest = torch.cat([each_one.reshape(-1) for each_one in each]).to(pieces[0].mesh.device_type)
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    exponent = torch.frexp(largest).exponent.clamp(-1022, 1022)
    return [part.view(shape) for part, shape in zip(exponent.split([s.numel() for s in shapes]), shapes, strict=True)]


def _gram(piece: Piece, exponent: Tensor) -> Tensor:
    value = piece.value.double()
    value = (
        value * power_of_two(-exponent, torch.float64).to(value.device)[..., None, None] if exponent.any() else value
    )
    return value.mT @ value if piece.cut.side == -2 else value @ value.mT


def _after(piece: Piece, factor: Tensor) -> Tensor:
    value = piece.value.double()
    factor = factor.to(value.device).reshape(*value.shape[:-2], *factor.shape[-2:])
    return value - (value @ factor if piece.cut.side == -2 else factor @ value)
