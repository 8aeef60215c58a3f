"""Decay of matrices whose long side is cut: what is summed over the pieces says how each of them changes.

For weights of float32 and narrower that is the Gram matrix, whose float64 holds more digits than they have. Those of
float64 would lose half of theirs by squaring: the triangular factors of the pieces are stacked and factored again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankdecay.decay.policy import LowRank
from rankdecay.decay.sharded.layout import Piece
from rankdecay.linalg.gram import shrink_factor
from rankdecay.linalg.shrink import by_decomposition, shrink_directions
from rankdecay.linalg.stack import power_of_two, triangular
from rankdecay.linalg.threshold import leave_directions
from rankdecay.rules import Options, get_rule

# The first names are those of torch 2.13; a build without torch.distributed has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def decayed_pieces(pieces: Sequence[Piece], decay: LowRank, amount: float | Tensor, backend: str) -> list[Tensor]:
    """Return the pieces after the step, in float64.

    A collective. The other sides of all pieces must have one length, they must be cut over the same processes, and be
    all of float64 or none.

    Args:
        pieces: of matrices of which one side is cut.
        decay: of all of them.
        amount: Σ lr · strength since the last decay.
        backend: ``"exact"`` or ``"matmul"``; float64 is exact with both where the rule has a decomposition.
    """
    first = pieces[0]
    *outer, inner = (first.mesh.get_group(mesh_dim) for mesh_dim in first.cut.mesh_dims)
    share = _Share.of(pieces, inner)
    exponents = _exponents(pieces, [*outer, inner])
    values = [piece.value if piece.cut.side == -2 else piece.value.mT for piece in pieces]
    options = Options(**decay.options)
    dtype = first.value.dtype
    if dtype == torch.float64:
        values = [_in_powers(value, -exponent) for value, exponent in zip(values, exponents, strict=True)]
    precise = dtype == torch.float64 and by_decomposition(get_rule(decay.rule), options, "exact")
    amounts = torch.as_tensor(amount, dtype=torch.float64).to(first.mesh.device_type, non_blocking=True)
    amounts = amounts.expand(share.size)
    exponent = share.own(torch.cat([each.flatten() for each in exponents]), 0).to(amounts.device, non_blocking=True)
    rank = share.own(torch.tensor(share.ranks), 1).to(amounts.device, non_blocking=True)
    if precise:
        R = _stacked([_triangle(value) for value in values], share, outer, inner)
        scaled = amounts if options.relative else amounts * power_of_two(-exponent, torch.float64)
        V, t = shrink_directions(R, scaled, decay.rule, options, rank)
        factors = torch.cat([V, t[..., None, :]], -2)
    else:
        sums = _summed([_gram(value) for value in values], share, outer, inner)
        how = {**decay.options, "rank": rank, "exponent": exponent, "backend": backend}
        factors = shrink_factor(sums, amounts, decay.rule, **how)
    everyones = factors.new_empty(share.size * share.world, *factors.shape[1:])
    _all_gather(everyones, factors, group=inner)
    after = _left if precise else _multiplied
    factors_of_piece = everyones[: share.number].to(first.value.device).split(share.counts)
    left = [after(value, each) for value, each in zip(values, factors_of_piece, strict=True)]
    if dtype == torch.float64:
        left = [_in_powers(each, exponent) for each, exponent in zip(left, exponents, strict=True)]
    return [each if piece.cut.side == -2 else each.mT for piece, each in zip(pieces, left, strict=True)]


class _Share(NamedTuple):
    """Which of the matrices of all pieces a process decomposes."""

    counts: list[int]  # of matrices, per piece
    ranks: list[int]  # the smaller side of each
    world: int
    size: int  # of each process's share, the last ones filled up
    start: int

    @classmethod
    def of(cls, pieces: Sequence[Piece], group: Any) -> _Share:
        counts = [piece.value.shape[:-2].numel() for piece in pieces]
        ranks = [min(piece.cut.shape) for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
        world = dist.get_world_size(group)
        size = -(-len(ranks) // world)
        return cls(counts, ranks, world, size, dist.get_rank(group) * size)

    @property
    def number(self) -> int:
        return len(self.ranks)

    def filled(self, every: Tensor, value: int = 0) -> Tensor:
        """Return ``every`` (number, ...) filled up to what all processes take."""
        return torch.cat([every, every.new_full((self.size * self.world - self.number, *every.shape[1:]), value)])

    def own(self, every: Tensor, value: int) -> Tensor:
        return self.filled(every, value)[self.start : self.start + self.size]


def _in_powers(value: Tensor, exponent: Tensor) -> Tensor:
    """Return a stack of float64 times 2^exponent, one for each matrix."""
    return value * power_of_two(exponent, torch.float64)[..., None, None].to(value.device)


def _summed(grams: list[Tensor], share: _Share, outer: Sequence[Any], inner: Any) -> Tensor:
    """Return the sums of Gram matrices over all processes, (size, n, n), those of this process's share."""
    n = grams[0].shape[-1]
    total = share.filled(torch.cat([gram.reshape(-1, n, n) for gram in grams]))
    del grams
    for group in outer:
        dist.all_reduce(total, group=group)
    sums = total.new_empty(share.size, n, n)
    _reduce_scatter(sums, total, group=inner)
    return sums


def _stacked(factors: list[Tensor], share: _Share, outer: Sequence[Any], inner: Any) -> Tensor:
    """Return R of the whole matrices, (size, n, n), those of this process's share."""
    n = factors[0].shape[-1]
    R = share.filled(torch.cat([factor.reshape(-1, n, n) for factor in factors]))
    for group in (*outer, inner):
        world = dist.get_world_size(group)
        everyones = R.new_empty(world * len(R), n, n)
        _all_gather(everyones, R.contiguous(), group=group)
        of_matrix = everyones.view(world, -1, n, n)
        if group is inner:
            of_matrix = of_matrix[:, share.start : share.start + share.size]
        R = _triangle(of_matrix.transpose(0, 1).flatten(1, 2))
    return R


def _triangle(X: Tensor) -> Tensor:
    """Return R (..., n, n) with RᵀR = XᵀX; NaN where an entry of X is not finite."""
    bad = ~X.isfinite().all(-1).all(-1)[..., None, None]
    return triangular(X.masked_fill(bad, 0)).masked_fill(bad, torch.nan)


def _gram(value: Tensor) -> Tensor:
    value = value.double()
    return value.mT @ value


def _multiplied(value: Tensor, factors: Tensor) -> Tensor:
    value = value.double()  # a second time: all of a step at once would be in memory till its end
    return value - value @ factors.reshape(*value.shape[:-2], *factors.shape[-2:])


def _left(value: Tensor, factors: Tensor) -> Tensor:
    """Return what is left of a piece (..., m, n) by V and t below each other, (k, n + 1, n)."""
    V, t = factors[:, :-1], factors[:, -1]
    flat = value.reshape(-1, *value.shape[-2:])
    left = leave_directions(flat, V.nan_to_num(), t.nan_to_num())
    bad = t.isnan().any(-1)[:, None, None]
    unchanged = ~t.any(-1)[:, None, None]
    return torch.where(unchanged, flat, left).masked_fill(bad, torch.nan).view(value.shape)


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
