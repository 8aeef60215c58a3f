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


class Part(NamedTuple):
    """This process's part of a matrix and what it loses; made by :func:`parts_of`."""

    value: Tensor
    write: Callable[[Tensor], object]
    layout: Layout
    group_of_line: Tensor  # which matrix, or head, each line along `axis` belongs to
    groups: int
    axis: int
    decay: Frobenius
    amount: float | Tensor
    seed: int


def parts_of(
    parameter: Any, windows: Sequence[Window], by_head: bool, decay: Frobenius, amount: float | Tensor, seed: int
) -> list[Part]:
    """Return this process's parts of the matrices of a DTensor.

    Args:
        parameter: the DTensor.
        windows: where in it the matrices are.
        by_head: whether each head has a norm of its own.
        decay: of the matrices.
        amount: Σ lr · strength of the step.
        seed: of the rounding of 16-bit weights; pieces of different numbers add theirs.
    """
    layout = Layout.of(parameter)
    pieces = elementwise_pieces(parameter, windows)
    return [
        Part(value, write, layout, *_groups(layout, window, by_head, value), decay, amount, seed + number)
        for (value, write, number), window in zip(pieces, windows, strict=True)
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


def decayed_by_norm(parts: Sequence[Part]) -> list[Tensor]:
    """Return the parts after the step, in float32 or better: a collective, one all-reduce per set of processes.

    Args:
        parts: of any matrices, in the same order in every process that holds some of them.
    """
    together: dict[object, list[int]] = {}
    for number, part in enumerate(parts):
        together.setdefault((part.layout.mesh, part.layout.cut_mesh_dims), []).append(number)
    after: list[Tensor | None] = [None] * len(parts)
    for numbers in together.values():
        members = [parts[number] for number in numbers]
        for number, log_norm in zip(numbers, _log_norms(members), strict=True):
            after[number] = _after(parts[number], log_norm)
    return [value for value in after if value is not None]


def _log_norms(parts: Sequence[Part]) -> list[Tensor]:
    """Return the log of the norm of every group of each part, over all processes that hold parts of it."""
    layout = parts[0].layout
    sums = None if not layout.cut_mesh_dims else process_group_of(layout)[0]
    device = layout.mesh.device_type
    counts = [part.groups for part in parts]
    exponents: list[Tensor | None] = [None] * len(parts)
    if any(part.value.dtype == torch.float64 for part in parts):  # whose squares may be out of range
        largest = torch.cat([_per_group(part, part.value.double().abs(), "amax").to(device) for part in parts])
        if sums is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=sums)
        exponents = list(torch.frexp(largest).exponent.clamp(-1022, 1022).split(counts))
    squares = [
        _per_group(part, _scaled(part, exponent).square(), "sum").to(device)
        for part, exponent in zip(parts, exponents, strict=True)
    ]
    total = torch.cat(squares)
    if sums is not None:
        dist.all_reduce(total, group=sums)
    logs = [square.log() / 2 for square in total.split(counts)]
    logs = [
        log if exponent is None else log + exponent.to(log) * math.log(2)
        for log, exponent in zip(logs, exponents, strict=True)
    ]
    return [log.to(part.value.device) for log, part in zip(logs, parts, strict=True)]


def _scaled(part: Part, exponent: Tensor | None) -> Tensor:
    """Return the part in float64, its groups divided by a power of two."""
    value = part.value.double()
    if exponent is None:
        return value
    return value * _per_line(part, power_of_two(-exponent, torch.float64).to(value.device))


def _per_group(part: Part, values: Tensor, reduce: Literal["sum", "amax"]) -> Tensor:
    groups = values.new_zeros(part.groups)
    if not values.numel():
        return groups
    lines = values.movedim(part.axis, 0).flatten(1) if values.ndim > 1 else values[:, None]
    if reduce == "sum":
        return groups.index_add_(0, part.group_of_line, lines.sum(1))
    return groups.index_reduce_(0, part.group_of_line, lines.amax(1), "amax")


def _per_line(part: Part, values: Tensor) -> Tensor:
    """Return one value per group as one per line, broadcastable to the part."""
    shape = [1] * part.value.ndim
    shape[part.axis] = -1
    return values[part.group_of_line].view(shape)


def _after(part: Part, log_norm: Tensor) -> Tensor:
    decay = part.decay
    amount = torch.as_tensor(part.amount, dtype=torch.float64, device=log_norm.device)
    share = power(log_norm, amount, decay.power, 1.0 if decay.cap is None else decay.cap)
    value = part.value if part.value.dtype == torch.float64 else part.value.float()
    return shrink_by(value, _per_line(part, share).to(value.dtype))
