"""Decay by the norm of matrices, or heads, of which each process holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.decay.policy import Frobenius
from rankdecay.decay.sharded.layout import Layout, elementwise_pieces, lines_in_window, lines_of
from rankdecay.decay.sharded.redistribute import process_group_of
from rankdecay.linalg.stack import power_of_two
from rankdecay.linalg.threshold import power, shrink_by


class NormPiece(NamedTuple):
    """This process's piece of a matrix and what it loses; made by :func:`norm_pieces`."""

    value: Tensor
    write: Callable[[Tensor], object]
    layout: Layout
    group_of_line: Tensor  # which matrix, or head, each line along `axis` belongs to
    groups: int
    axis: int
    decay: Frobenius
    amount: float | Tensor
    seed: int


def norm_pieces(
    parameter: Any, windows: Sequence[Window], by_head: bool, decay: Frobenius, amount: float | Tensor, seed: int
) -> list[NormPiece]:
    """Return this process's pieces of the matrices of a DTensor.

    Args:
        parameter: the DTensor.
        windows: where in it the matrices are.
        by_head: whether each head has a norm of its own.
        decay: of the matrices.
        amount: Σ lr · strength of the step.
        seed: of the rounding of 16-bit weights; pieces of different numbers add theirs.
    """
    layout = Layout.of(parameter)
    located = elementwise_pieces(parameter, windows)
    return [
        NormPiece(value, write, layout, *_groups(layout, window, by_head, value), decay, amount, seed + number)
        for (value, write, number), window in zip(located, windows, strict=True)
    ]


def _groups(layout: Layout, window: Window, by_head: bool, value: Tensor) -> tuple[Tensor, int, int]:
    coordinate = layout.mesh.get_coordinate()
    if window.has_heads:
        lines = lines_in_window(layout, window, coordinate)[1]
        axis = value.ndim - (2 if window.lines == "rows" else 1)
        heads = lines // window.head_dim if by_head else torch.zeros_like(lines)
        return heads.to(value.device), window.num_heads if by_head else 1, axis
    if len(layout.shape) == 3:  # a stack of matrices
        return lines_of(layout, 0, coordinate).to(value.device), layout.shape[0], 0
    return torch.zeros(value.shape[0], dtype=torch.int64, device=value.device), 1, 0


def decayed_by_norm(pieces: Sequence[NormPiece]) -> list[Tensor]:
    """Return the pieces after the step, in float32 or better: a collective, one all-reduce per set of processes.

    Args:
        pieces: of any matrices, in the same order in every process that holds some of them.
    """
    together: dict[object, list[int]] = {}
    for number, piece in enumerate(pieces):
        together.setdefault((piece.layout.mesh, piece.layout.cut_mesh_dims), []).append(number)
    after: list[Tensor | None] = [None] * len(pieces)
    for numbers in together.values():
        members = [pieces[number] for number in numbers]
        for number, log_norm in zip(numbers, _log_norms(members), strict=True):
            after[number] = _after(pieces[number], log_norm)
    return [value for value in after if value is not None]


def _log_norms(pieces: Sequence[NormPiece]) -> list[Tensor]:
    """Return the log of the norm of every group of each piece, over all processes that hold pieces of it."""
    layout = pieces[0].layout
    sums = None if not layout.cut_mesh_dims else process_group_of(layout)[0]
    device = layout.mesh.device_type
    counts = [piece.groups for piece in pieces]
    exponents: list[Tensor | None] = [None] * len(pieces)
    if any(piece.value.dtype == torch.float64 for piece in pieces):  # whose squares may be out of range
        largest = torch.cat([_per_group(piece, piece.value.double().abs(), "amax").to(device) for piece in pieces])
        if sums is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=sums)
        exponents = list(torch.frexp(largest).exponent.clamp(-1022, 1022).split(counts))
    squares = [
        _per_group(piece, _scaled(piece, exponent).square(), "sum").to(device)
        for piece, exponent in zip(pieces, exponents, strict=True)
    ]
    total = torch.cat(squares)
    if sums is not None:
        dist.all_reduce(total, group=sums)
    logs = [square.log() / 2 for square in total.split(counts)]
    logs = [
        log if exponent is None else log + exponent.to(log) * math.log(2)
        for log, exponent in zip(logs, exponents, strict=True)
    ]
    return [log.to(piece.value.device) for log, piece in zip(logs, pieces, strict=True)]


def _scaled(piece: NormPiece, exponent: Tensor | None) -> Tensor:
    """Return the piece in float64, its groups divided by a power of two."""
    value = piece.value.double()
    if exponent is None:
        return value
    return value * _per_line(piece, power_of_two(-exponent, torch.float64).to(value.device))


def _per_group(piece: NormPiece, values: Tensor, reduce: Literal["sum", "amax"]) -> Tensor:
    groups = values.new_zeros(piece.groups)
    if not values.numel():
        return groups
    lines = values.movedim(piece.axis, 0).flatten(1) if values.ndim > 1 else values[:, None]
    if reduce == "sum":
        return groups.index_add_(0, piece.group_of_line, lines.sum(1))
    return groups.index_reduce_(0, piece.group_of_line, lines.amax(1), "amax")


def _per_line(piece: NormPiece, values: Tensor) -> Tensor:
    """Return one value per group as one per line, broadcastable to the piece."""
    shape = [1] * piece.value.ndim
    shape[piece.axis] = -1
    return values[piece.group_of_line].view(shape)


def _after(piece: NormPiece, log_norm: Tensor) -> Tensor:
    decay = piece.decay
    amount = torch.as_tensor(piece.amount, dtype=torch.float64, device=log_norm.device)
    share = power(log_norm, amount, decay.power, 1.0 if decay.cap is None else decay.cap)
    value = piece.value if piece.value.dtype == torch.float64 else piece.value.float()
    return shrink_by(value, _per_line(piece, share).to(value.dtype))
