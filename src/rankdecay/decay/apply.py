"""One decay of the matrices of one role, wherever they are: alone, in a stack of equals, or in many processes.

**16-bit weights** are rounded stochastically, because a decay is far below their last digit
(:mod:`rankdecay.linalg.rounding`). The random numbers come from a seed that depends on the step: they leave the global
generators untouched, and agree between replicas and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.decay.policy import Frobenius, LowRank, OfMatrix
from rankdecay.decay.sharded.layout import Piece, elementwise_pieces, local_piece
from rankdecay.decay.sharded.norms import NormPiece, decayed_by_norm, norm_pieces
from rankdecay.decay.sharded.redistribute import Place, Redistribution, entries_per_process, redistribution_key
from rankdecay.decay.sharded.sums import decayed_pieces
from rankdecay.dtensor import is_sharded
from rankdecay.linalg import Backend, power_step, shrink
from rankdecay.linalg.backend import has_float64
from rankdecay.linalg.rounding import NEXT_SEED, stochastic_round

T = TypeVar("T")

#: Most elements stacked in one call of ``shrink``: bounds the memory of a step, 134 MB of float32 on a CPU, 268 MB on a
#: GPU, and some copies. The same on every GPU, not a share of what is free: processes that share a matrix must agree.
_STACKED = {"cpu": 2**25, "cuda": 2**26}


class Step(NamedTuple):
    """Decay of the matrices of one role in one step.

    Attributes:
        parameters: of one group of the optimizer.
        windows: where in each of them the matrices are.
        decay: of these matrices.
        amount: Σ lr · strength since the last decay.
        seed: of the rounding; another for each step, group and role.
        role: of the matrices, for a message.
    """

    parameters: list[Tensor]
    windows: list[Window]
    decay: OfMatrix
    amount: float | Tensor
    seed: int
    role: str = ""

    def view(self, window: Window, parameter: Tensor) -> Tensor:
        """Return the matrix in a window, or one per head."""
        return (window.heads if self.by_head else window.matrix)(parameter)

    def matrices(self) -> list[Tensor]:
        """Return the matrices, or the stacks of heads, of the parameters, as rows of a vector where they are none."""
        found = [self.view(window, parameter) for parameter in self.parameters for window in self.windows]
        return [each if each.ndim > 1 else each.reshape(1, -1) for each in found]

    @property
    def is_collective(self) -> bool:
        """Whether other processes take part in it."""
        elementwise = isinstance(self.decay, Frobenius) and not self.decay.needs_norm
        return not elementwise and any(map(is_sharded, self.parameters))

    @property
    def by_head(self) -> bool:
        """Whether each head is a matrix of its own."""
        return self.decay.unit == "head" and all(window.has_heads for window in self.windows)


def apply(steps: Sequence[Step], backend: Backend) -> None:
    """Decay matrices in place; of sharded parameters in every process that holds parts.

    Matrices of one shape in one group are decayed together, and the norms of sharded ones found together.

    Args:
        steps: in the same order in every process.
        backend: as for :func:`rankdecay.attach`.
    """
    by_norm: list[NormPiece] = []
    for step in steps:
        _apply_whole(step, backend)
        sharded = [parameter for parameter in step.parameters if is_sharded(parameter)]
        if isinstance(step.decay, LowRank):
            _apply_low_rank(sharded, step, step.decay, backend)
        elif not step.decay.needs_norm:
            pieces = [_Matrix(*piece) for parameter in sharded for piece in elementwise_pieces(parameter, step.windows)]
            _shrink(pieces, step, backend, step.seed)
        else:
            for parameter in sharded:
                seed = step.seed + NEXT_SEED * (len(by_norm) + 1)
                by_norm += norm_pieces(parameter, step.windows, step.by_head, step.decay, step.amount, seed)
    for piece, value in zip(by_norm, decayed_by_norm(by_norm), strict=True):
        piece.write(rounded(value, piece.value.dtype, piece.seed))


def _apply_whole(step: Step, backend: Backend) -> None:
    """Decay the matrices of the parameters that this process has whole."""
    matrices: list[_Matrix] = []
    for parameter in step.parameters:
        if is_sharded(parameter):
            continue
        for window in step.windows:
            value = step.view(window, parameter)
            if isinstance(step.decay, Frobenius) and _decayed_in_place(parameter, value, step.decay, step.amount):
                continue
            matrices.append(_Matrix(value, partial(window.write, parameter)))
    _shrink(matrices, step, backend, step.seed)


def _decayed_in_place(parameter: Tensor, value: Tensor, decay: Frobenius, amount: float | Tensor) -> bool:
    """Decay a view of a parameter's numbers where they are, if that is possible: no copy, so two passes over them."""
    here = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    if not here or value.dtype.itemsize < 4 or value.device.type != "cpu" or not value.numel():
        return False
    matrix = value if value.ndim > 1 else value.view(1, -1)
    power_step(matrix, amount, decay.power, decay.cap or 1.0, out=matrix)
    return True


def _apply_low_rank(sharded: list[Tensor], step: Step, decay: LowRank, backend: Backend) -> None:
    redistributed: list[Place] = []
    whole: list[_Matrix] = []
    cut: list[Piece] = []
    for parameter in sharded:
        for window in step.windows:
            piece = local_piece(parameter, window, step.by_head)
            if piece is None:
                redistributed.append((parameter, window))
            elif piece.cut.side is None:
                whole.append(_Matrix(piece.value, piece.write, piece.part))
            else:
                cut.append(piece)
    _shrink(whole, step, backend, step.seed)
    _decay_by_sums(cut, decay, step.amount, backend, step.seed)
    _decay_by_owners(redistributed, step, backend, step.seed)


def _decay_by_sums(pieces: list[Piece], decay: LowRank, amount: float | Tensor, backend: Backend, seed: int) -> None:
    """Decay matrices whose Gram matrices add up: a collective of the processes that hold parts of them."""

    def batch_key(piece: Piece) -> object:
        return piece.cut.gram, piece.mesh, piece.cut.mesh_dims, piece.value.dtype

    def entries(piece: Piece) -> int:  # of its Gram matrices, float64
        return 2 * piece.cut.gram**2 * math.prod(piece.value.shape[:-2])

    for batch in _batches(pieces, batch_key, entries, lambda piece: _limit(piece.value)):
        chosen = backend_on(batch[0].value, backend)
        values = decayed_pieces(batch, decay, amount, "exact" if chosen == "auto" else chosen)
        for piece, value in zip(batch, values, strict=True):
            seed += NEXT_SEED
            piece.write(rounded(value, piece.value.dtype, seed + piece.part))


def _decay_by_owners(places: list[Place], step: Step, backend: Backend, seed: int) -> None:
    """Decay matrices each of which one process owns: a collective of the processes that hold parts of them."""

    def entries(place: Place) -> int:  # sent, and owned
        return 2 * entries_per_process(place)

    for batch in _batches(places, redistribution_key, entries, lambda place: _limit(place[0])):
        redistribution = Redistribution(batch, step.by_head)
        seed += NEXT_SEED
        owned = [_Matrix(matrix, matrix.copy_, redistribution.owner) for matrix in redistribution.owned]
        _shrink(owned, step, backend, seed)
        redistribution.close()


def _batches(
    items: Iterable[T], key: Callable[[T], object], size: Callable[[T], int], limit: Callable[[T], int]
) -> Iterator[list[T]]:
    """Yield items of one key, in their order, in lists of no more than the limit, or of one item.

    Args:
        items: of any keys.
        key: what the items of a list have in common.
        size: of an item; the same in every process that takes part in a list.
        limit: size of a list with this item.
    """
    by_key: dict[object, list[T]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    for members in by_key.values():
        batch: list[T] = []
        total = 0
        for item in members:
            if batch and total + size(item) > limit(item):
                yield batch
                batch, total = [], 0
            batch.append(item)
            total += size(item)
        yield batch


class _Matrix(NamedTuple):
    """Matrix, or one per head, and the function that puts a new value in its place."""

    value: Tensor
    write: Callable[[Tensor], object]
    part: int = 0  # of a sharded parameter; pieces differ in the random numbers of their rounding, copies do not


def _shrink(matrices: list[_Matrix], step: Step, backend: Backend, seed: int) -> None:
    """Decay matrices and write them back, those of one shape, dtype and device together."""

    def batch_key(matrix: _Matrix) -> object:
        return matrix.value.shape, matrix.value.dtype, matrix.value.device, matrix.part

    matrices = [matrix for matrix in matrices if matrix.value.numel()]
    for batch in _batches(matrices, batch_key, lambda m: m.value.numel(), lambda m: _limit(m.value)):
        seed += NEXT_SEED
        _shrink_batch(batch, step.decay, step.amount, backend, seed + batch[0].part)


def _shrink_batch(batch: list[_Matrix], decay: OfMatrix, amount: float | Tensor, backend: Backend, seed: int) -> None:
    stack = torch.stack([matrix.value for matrix in batch])  # (matrices, [heads,] m, n)
    dtype = stack.dtype
    stack = stack if dtype == torch.float64 else stack.float()
    stack = stack if has_float64(stack.device) else stack.cpu()
    amount = amount.to(stack.device, non_blocking=True) if isinstance(amount, Tensor) else amount
    if isinstance(decay, Frobenius):
        matrices = stack if stack.ndim > 2 else stack.reshape(len(stack), 1, -1)  # a vector is one row
        stack = power_step(matrices, amount, decay.power, decay.cap or 1.0).view(stack.shape)
    else:
        stack = shrink(stack, amount, decay.rule, **decay.options, backend=backend_on(stack, backend))
    for matrix, value in zip(batch, rounded(stack, dtype, seed), strict=True):
        matrix.write(value)


def rounded(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Round to the dtype of the weights: 16 bits stochastically, 32 to the nearest; what was finite stays so.

    A step may let an entry grow (``preserve_norm``, a rule that overshoots), beyond float16 if not beyond float32.
    """
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    largest = torch.finfo(dtype).max
    values = torch.where(values.isfinite(), values.clamp(-largest, largest), values)
    return stochastic_round(values.float(), dtype, torch.Generator(values.device).manual_seed(seed))


def backend_on(values: Tensor, backend: Backend) -> Backend:
    """Return the backend of a device: a decomposition on a GPU would wait for it; a CPU takes what costs less."""
    return "matmul" if backend == "auto" and values.device.type != "cpu" else backend


def _limit(values: Tensor) -> int:
    """Return the most entries to work on at once on a device: bounds the memory of a step."""
    return _STACKED["cpu" if values.device.type == "cpu" else "cuda"]
