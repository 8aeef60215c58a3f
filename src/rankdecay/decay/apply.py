"""One decay of the matrices of one role, wherever they are: alone, in a stack of like ones, or in many processes.

**16-bit weights** are rounded stochastically, because a decay is far below their last digit
(:mod:`rankdecay.linalg.rounding`). The random numbers come from a seed that says the step: they leave the global
generators untouched, and agree between replicas and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.decay import sharded
from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.dtensor import is_sharded
from rankdecay.linalg import Backend, shrink
from rankdecay.linalg.backend import has_float64
from rankdecay.linalg.rounding import stochastic_round

T = TypeVar("T")

#: Most elements stacked in one call of ``shrink``: bounds the memory of a step, 134 MB of float32 on a CPU, 268 MB on a
#: GPU, and some copies. The same on every GPU, not a share of what is free: processes that share a matrix must agree.
_STACKED = {"cpu": 2**25, "cuda": 2**26}


def apply(
    parameters: list[Tensor],
    windows: list[Window],
    decay: LowRank | Frobenius,
    due: float | Tensor,
    backend: Backend,
    seed: int,
) -> None:
    """Decays matrices in place, those of one shape together; of sharded parameters in every process that holds parts.

    Args:
        parameters: of one group.
        windows: where in each of them the matrices are; none for all of it.
        decay: theirs.
        due: Σ lr · strength.
        backend: as for :func:`rankdecay.attach`.
        seed: of the rounding; another for each step, group and role.
    """
    by_head = isinstance(decay, LowRank) and decay.unit == "head"
    places = windows or [None]
    held: list[Tensor] = []
    whole: list[_Matrix] = []
    for parameter in parameters:
        if is_sharded(parameter):
            held.append(parameter)
        for window in [] if is_sharded(parameter) else places:
            value = parameter if window is None else (window.heads if by_head else window.matrix)(parameter)
            write = parameter.copy_ if window is None else partial(window.write, parameter)
            whole.append(_Matrix(value, write))
    _shrink(whole, decay, due, backend, seed)
    if not held:
        return
    if isinstance(decay, Frobenius):
        shares = [_Matrix(*share) for parameter in held for share in sharded.shares(parameter, places)]
        _shrink(shares, decay, due, backend, seed)
        return
    dealt: list[sharded.Place] = []
    pieces: list[sharded.Piece] = []
    for parameter in held:
        for window in places:
            piece = sharded.opened(parameter, window, by_head)
            if piece is None:
                dealt.append((parameter, window))
            else:
                pieces.append(piece)
    local = [_Matrix(piece.value, piece.write, piece.part) for piece in pieces if piece.cut.side is None]
    _shrink(local, decay, due, backend, seed)
    _decay_sums([piece for piece in pieces if piece.cut.side is not None], decay, due, backend, seed)
    _decay_dealt(dealt, by_head, decay, due, backend, seed)


def _decay_sums(pieces: list[sharded.Piece], decay: LowRank, due: float | Tensor, backend: Backend, seed: int) -> None:
    """Decays matrices whose Gram matrices add up; every process that holds parts of them has to."""

    def alike(piece: sharded.Piece) -> object:
        return piece.cut.gram, piece.mesh, piece.cut.mesh_dims, piece.value.dtype

    def entries(piece: sharded.Piece) -> int:  # of its Gram matrices, float64
        return 2 * piece.cut.gram**2 * math.prod(piece.value.shape[:-2])

    for some in _batches(pieces, alike, entries, lambda piece: _most(piece.value)):
        values = sharded.decayed(some, decay, due, _backend_on(some[0].value, backend))
        for piece, value in zip(some, values, strict=True):
            seed += 1_000_000_007
            piece.write(_rounded(value, piece.value.dtype, seed + piece.part))


def _decay_dealt(
    places: list[sharded.Place],
    by_head: bool,
    decay: LowRank,
    due: float | Tensor,
    backend: Backend,
    seed: int,
) -> None:
    """Decays matrices that each process owns some of; every process that holds parts of them has to."""

    def entries(place: sharded.Place) -> int:  # sent, and owned
        return 2 * sharded.share_of(place)

    for some in _batches(places, sharded.dealt_together, entries, lambda place: _most(place[0])):
        deal = sharded.Deal(some, by_head)
        seed += 1_000_000_007
        owned = [_Matrix(matrix, matrix.copy_, deal.owner) for matrix in deal.owned]
        _shrink(owned, decay, due, backend, seed)
        deal.close()


def _batches(
    items: Iterable[T], alike: Callable[[T], object], size: Callable[[T], int], most: Callable[[T], int]
) -> Iterator[list[T]]:
    """Yields items that are alike, in their order, in lists of no more than so much, or of one item.

    Args:
        items: of any kinds.
        alike: what the items of a list have in common.
        size: of an item; the same in every process that takes part in a list.
        most: size of a list with this item.
    """
    kinds: dict[object, list[T]] = {}
    for item in items:
        kinds.setdefault(alike(item), []).append(item)
    for members in kinds.values():
        some: list[T] = []
        total = 0
        for item in members:
            if some and total + size(item) > most(item):
                yield some
                some, total = [], 0
            some.append(item)
            total += size(item)
        yield some


class _Matrix(NamedTuple):
    """A matrix, or one per head, and what puts a new value in its place."""

    value: Tensor
    write: Callable[[Tensor], object]
    part: int = 0  # of a sharded parameter; pieces differ in the random numbers of their rounding, copies do not


def _shrink(
    matrices: list[_Matrix], decay: LowRank | Frobenius, due: float | Tensor, backend: Backend, seed: int
) -> None:
    """Replaces matrices by what the decay makes of them, those of one shape, dtype and device together."""

    def alike(matrix: _Matrix) -> object:
        return matrix.value.shape, matrix.value.dtype, matrix.value.device, matrix.part

    there = (matrix for matrix in matrices if matrix.value.numel())
    for some in _batches(there, alike, lambda matrix: matrix.value.numel(), lambda matrix: _most(matrix.value)):
        seed += 1_000_000_007
        _shrink_together(some, decay, due, backend, seed + some[0].part)


def _shrink_together(
    members: list[_Matrix], decay: LowRank | Frobenius, due: float | Tensor, backend: Backend, seed: int
) -> None:
    stack = torch.stack([member.value for member in members])  # (matrices, [heads,] m, n)
    dtype = stack.dtype
    stack = stack if dtype == torch.float64 else stack.float()
    stack = stack if has_float64(stack.device) else stack.cpu()
    due = due.to(stack.device, non_blocking=True) if isinstance(due, Tensor) else due
    if isinstance(decay, Frobenius):
        stack = stack - due * stack
    else:
        tau = replace(decay, lr_coupled=True).threshold(stack, lr=due, strength=1.0)  # `due` holds both factors
        stack = shrink(stack, tau, decay.rule, smoothing=decay.smoothing, backend=_backend_on(stack, backend))
    for member, value in zip(members, _rounded(stack, dtype, seed), strict=True):
        member.write(value)


def _rounded(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """To the dtype of the weights: 16 bits stochastically, 32 to the nearest."""
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    return stochastic_round(values.float(), dtype, torch.Generator(values.device).manual_seed(seed))


def _backend_on(values: Tensor, backend: Backend) -> Backend:
    """A decomposition on a GPU would wait for the device."""
    if backend != "auto":
        return backend
    return "exact" if values.device.type == "cpu" else "matmul"


def _most(values: Tensor) -> int:
    """Entries that are worked on at once on a device: bounds the memory of a step."""
    return _STACKED["cpu" if values.device.type == "cpu" else "cuda"]
