"""Layout of a DTensor: which lines of a parameter each process has, and how that cuts the matrices in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankdecay.attention.layer import Window


class Layout(NamedTuple):
    """Placement of a DTensor on its mesh."""

    mesh: Any  # DeviceMesh
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Any) -> Layout:
        """Return the layout of a DTensor."""
        return cls(parameter.device_mesh, tuple(parameter.placements), tuple(parameter.shape))

    def cuts(self, dim: int) -> list[int]:
        """Return the mesh dimensions that cut a tensor dimension, in the order in which they do.

        FSDP2 cuts what tensor parallelism has cut already, though its mesh dimension comes first: it says so by a
        strided placement.
        """
        cuts = [i for i, p in enumerate(self.placements) if _cut_by(p) == dim]
        strided = [i for i in cuts if hasattr(self.placements[i], "split_factor")]
        return [i for i in cuts if i not in strided] + strided[::-1]

    @property
    def cut_dims(self) -> set[int]:
        """Tensor dimensions that are cut, by a mesh dimension of more than one process."""
        return {d for d in range(len(self.shape)) if any(self.mesh.size(i) > 1 for i in self.cuts(d))}

    @property
    def part(self) -> int:
        """Number of the piece: the same in the processes that hold copies of it, and in no other."""
        number = 0
        for mesh_dim, placement in enumerate(self.placements):
            if _cut_by(placement) is not None:
                number = number * self.mesh.size(mesh_dim) + self.mesh.get_local_rank(mesh_dim)
        return number

    @property
    def cut_mesh_dims(self) -> tuple[int, ...]:
        """Mesh dimensions of more than one process that cut anything."""
        return tuple(i for i, p in enumerate(self.placements) if _cut_by(p) is not None and self.mesh.size(i) > 1)


def _cut_by(placement: Any) -> int | None:
    """Return the tensor dimension that a placement cuts; None if it replicates."""
    return None if placement.is_replicate() else placement.dim


def check_placements(parameter: Any, name: str) -> None:
    """Raise a ``ValueError`` for a DTensor that is neither cut nor replicated, such as one that holds partial sums."""
    for placement in parameter.placements:
        if not placement.is_replicate() and not isinstance(getattr(placement, "dim", None), int):
            raise ValueError(
                f"{name} has the placement {placement}, of which no decay is defined; redistribute it to Shard(0), "
                "Shard(1) or Replicate() before the optimizer is built."
            )


# ---- where the lines of a parameter are --------------------------------------------------------------------


def lines_of(layout: Layout, dim: int, coordinate: Sequence[int]) -> Tensor:
    """Return the places along a tensor dimension that the process at a coordinate of the mesh holds."""
    lines = torch.arange(layout.shape[dim])
    for mesh_dim in layout.cuts(dim):
        pieces = lines.chunk(layout.mesh.size(mesh_dim))  # chunk: the last ones are smaller, or missing
        piece = coordinate[mesh_dim]
        lines = pieces[piece] if piece < len(pieces) else lines[:0]
    return lines


def lines_in_window(layout: Layout, window: Window, coordinate: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which of a process's lines are in a window: their places in its piece, and in the matrix."""
    lines = lines_of(layout, window.line_dim(len(layout.shape)), coordinate)
    if not window.has_heads:
        return torch.arange(len(lines)), lines
    place = lines % window.size
    inside = ((place >= window.start) & (place < window.stop)).nonzero()[:, 0]
    return inside, lines[inside] // window.size * (window.stop - window.start) + place[inside] - window.start


@lru_cache(maxsize=4096)
def _lines_of_this_process(layout: Layout, window: Window, device: torch.device) -> Tensor:
    return lines_in_window(layout, window, layout.mesh.get_coordinate())[0].to(device)


@lru_cache(maxsize=4096)
def _heads_are_whole(layout: Layout, window: Window) -> bool:
    for coordinate in itertools.product(*(range(size) for size in layout.mesh.shape)):
        heads = lines_in_window(layout, window, coordinate)[1] // window.head_dim
        if len(heads) and bool((heads.unique(return_counts=True)[1] != window.head_dim).any()):
            return False
    return True


def shape_in_parameter(layout: Layout, window: Window, by_head: bool) -> tuple[int, int]:
    """Return the shape of a matrix, or head, as it lies in the parameter: perhaps transposed."""
    sides = [len(layout.shape) - 2, len(layout.shape) - 1]
    along = window.line_dim(len(layout.shape))
    rows, columns = (
        layout.shape[side] if side != along else window.head_dim if by_head else window.extent(layout.shape[side])
        for side in sides
    )
    return rows, columns


# ---- the part of a matrix in one process ----------------------------------------------------------------------


class Cut(NamedTuple):
    """Cut of the matrices of a window."""

    side: int | None  # -2 rows, -1 columns; None: every matrix is whole in some process
    mesh_dims: tuple[int, ...]  # over which Gram matrices add up
    gram: int  # their size
    shape: tuple[int, int]  # of a whole matrix


def _cut(layout: Layout, window: Window, by_head: bool) -> Cut | None:
    """Return how the matrices are cut; None if no process could do anything with its piece."""
    rows, columns = len(layout.shape) - 2, len(layout.shape) - 1
    shape = shape_in_parameter(layout, window, by_head)
    dims = {-2: rows, -1: columns}
    if window.transposed:
        shape, dims = (shape[1], shape[0]), {-2: columns, -1: rows}
    sides = {side: dim for side, dim in dims.items() if dim in layout.cut_dims}
    if by_head and window.line_dim(len(layout.shape)) in layout.cut_dims:
        if not _heads_are_whole(layout, window):
            return None
        del sides[-2 if window.lines == "rows" else -1]
    if len(sides) == 2:
        return None
    if not sides:
        return Cut(None, (), 0, shape)
    [(side, dim)] = sides.items()
    mesh_dims = tuple(i for i in layout.cuts(dim) if layout.mesh.size(i) > 1)
    return Cut(side, mesh_dims, shape[-3 - side], shape)


@lru_cache(maxsize=4096)
def _cut_in_place(layout: Layout, window: Window, by_head: bool, itemsize: int) -> Cut | None:
    """Return how the matrices are cut, if they are decayed in place; None where redistributing sends less, or must."""
    cut = _cut(layout, window, by_head)
    if cut is None or cut.side is None:
        return cut
    processes = math.prod(layout.mesh.size(i) for i in layout.cut_mesh_dims)
    return cut if 8 * cut.gram**2 <= itemsize * math.prod(cut.shape) / processes else None


class Piece(NamedTuple):
    """This process's part of the matrices of a window."""

    value: Tensor  # (..., m, n): matrices, or pieces of them
    write: Callable[[Tensor], object]  # puts new values in their place
    cut: Cut
    mesh: Any
    part: int  # which piece; the same in processes that hold copies


def _open(local: Tensor, layout: Layout, window: Window, by_head: bool) -> tuple[Tensor, Callable[..., object]]:
    """Return a process's part of a window, as matrices or heads, and the function that writes it back."""
    along = window.line_dim(len(layout.shape))
    if not window.has_heads or along not in layout.cut_dims:
        return (window.heads if by_head else window.matrix)(local), partial(window.write, local)
    places = _lines_of_this_process(layout, window, local.device)
    lines = local if along == 0 else local.mT
    value = lines[places]
    if by_head:
        value = value.unflatten(0, (len(places) // window.head_dim, window.head_dim))
    upright = window.lines == "rows"

    def write(new: Tensor) -> None:
        new = (new if upright else new.mT).reshape(len(places), lines.shape[1])
        lines.index_copy_(0, places, new.to(lines.dtype))

    return value if upright else value.mT, write


def local_piece(parameter: Any, window: Window, by_head: bool) -> Piece | None:
    """Return this process's part of the matrices of a DTensor; None if they are to be redistributed.

    Args:
        parameter: the DTensor.
        window: where its matrices are.
        by_head: whether each head is a matrix.
    """
    layout = Layout.of(parameter)
    cut = _cut_in_place(layout, window, by_head, parameter.element_size())
    if cut is None:
        return None
    value, write = _open(parameter.detach().to_local(), layout, window, by_head)
    return Piece(value, write, cut, layout.mesh, layout.part)


def elementwise_pieces(
    parameter: Any, windows: Sequence[Window]
) -> Iterator[tuple[Tensor, Callable[..., object], int]]:
    """Yield this process's part of each window in place, the function that writes it back, and the part's number.

    An elementwise decay needs nothing of the other processes.
    """
    layout, local = Layout.of(parameter), parameter.detach().to_local()
    for window in windows:
        yield *_open(local, layout, window, False), layout.part
