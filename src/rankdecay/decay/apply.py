"""One decay of the matrices of one role, wherever they are: alone, in a stack of like ones, or in many processes.

**16-bit weights** are rounded stochastically, because a decay is far below their last digit
(:mod:`rankdecay.linalg.rounding`). The random numbers come from a seed that says the step: they leave the global
generators untouched, and agree between replicas and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.attention.modules import is_sharded
from rankdecay.decay import sharded
from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.linalg import Backend, shrink
from rankdecay.linalg.rounding import stochastic_round

#: Most elements stacked in one call of ``shrink``: bounds the memory of a step, 134 MB of float32 and some copies.
_STACKED = {"cpu": 2**25, "cuda": 2**28}


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
            if sharded.way(sharded.Layout.of(parameter), window, by_head, parameter.element_size()) == "deal":
                dealt.append((parameter, window))
            else:
                pieces.append(sharded.opened(parameter, window, by_head))
    local = [_Matrix(piece.value, piece.write, piece.part) for piece in pieces if piece.cut.side is None]
    _shrink(local, decay, due, backend, seed)
    _decay_sums([piece for piece in pieces if piece.cut.side is not None], decay, due, backend, seed)
    _decay_dealt(dealt, by_head, decay, due, backend, seed)


def _decay_sums(pieces: list[sharded.Piece], decay: LowRank, due: float | Tensor, backend: Backend, seed: int) -> None:
    """Decays matrices whose Gram matrices add up; every process that holds parts of them has to."""
    together: dict[object, list[sharded.Piece]] = {}
    for piece in pieces:
        alike = (piece.cut.gram, piece.mesh, piece.cut.mesh_dims, piece.value.dtype)
        together.setdefault(alike, []).append(piece)
    for members in together.values():
        at_once = max(1, _STACKED[_kind(members[0].value)] // 2 // members[0].cut.gram ** 2)
        for i in range(0, len(members), at_once):
            some = members[i : i + at_once]
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
    for some in sharded.rounds(places, _STACKED[_kind(places[0][0])] // 2 if places else 1):
        deal = sharded.Deal(some, by_head)
        seed += 1_000_000_007
        owned = [_Matrix(matrix, matrix.copy_, deal.owner) for matrix in deal.owned]
        _shrink(owned, decay, due, backend, seed)
        deal.close()


class _Matrix(NamedTuple):
    """A matrix, or one per head, and what puts a new value in its place."""

    value: Tensor
    write: Callable[[Tensor], object]
    part: int = 0  # of a sharded parameter; pieces differ in the random numbers of their rounding, copies do not


def _shrink(
    matrices: list[_Matrix], decay: LowRank | Frobenius, due: float | Tensor, backend: Backend, seed: int
) -> None:
    """Replaces matrices by what the decay makes of them, those of one shape, dtype and device together."""
    alike: dict[object, list[_Matrix]] = {}
    for one in matrices:
        if one.value.numel():
            alike.setdefault((one.value.shape, one.value.dtype, one.value.device, one.part), []).append(one)
    for members in alike.values():
        at_once = max(1, _STACKED[_kind(members[0].value)] // members[0].value.numel())
        for i in range(0, len(members), at_once):
            seed += 1_000_000_007
            _shrink_together(members[i : i + at_once], decay, due, backend, seed + members[0].part)


def _shrink_together(
    members: list[_Matrix], decay: LowRank | Frobenius, due: float | Tensor, backend: Backend, seed: int
) -> None:
    stack = torch.stack([member.value for member in members])  # (matrices, [heads,] m, n)
    dtype = stack.dtype
    stack = stack if dtype == torch.float64 else stack.float()
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


def _kind(values: Tensor) -> str:
    return "cpu" if values.device.type == "cpu" else "cuda"
