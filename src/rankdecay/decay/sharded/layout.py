"""Which lines of a parameter each process of a DTensor's mesh has, and how that cuts the matrices in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankdecay.attention.layer import Window


class Layout(NamedTuple):
    """How a DTensor lies on its mesh."""

    mesh: Any  # DeviceMesh
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Any) -> Layout:
        """The layout of a DTensor."""
        return cls(parameter.device_mesh, tuple(parameter.placements), tuple(parameter.shape))

    def cuts(self, dim: int) -> list[int]:
        """The mesh dimensions that cut a tensor dimension, in the order in which they do.

        FSDP2 cuts what tensor parallelism has cut already, though its mesh dimension comes first: it says so by a
        strided placement.
        """
        cuts = [i for i, p in enumerate(self.placements) if _cut_by(p) == dim]
        strided = [i for i in cuts if _is_strided(self.placements[i])]
        return [i for i in cuts if i not in strided] + strided[::-1]

    @property
    def cut_dims(self) -> set[int]:
        """The tensor dimensions that are cut, by a mesh dimension of more than one process."""
        return {d for d in range(len(self.shape)) if any(self.mesh.size(i) > 1 for i in self.cuts(d))}

    @property
    def part(self) -> int:
        """A number that is the same in the processes that hold the same piece, and in no other."""
        number = 0
        for mesh_dim, placement in enumerate(self.placements):
            if _cut_by(placement) is not None:
                number = number * self.mesh.size(mesh_dim) + self.mesh.get_local_rank(mesh_dim)
        return number

    @property
    def cut_mesh_dims(self) -> tuple[int, ...]:
        """The mesh dimensions that cut anything."""
        return tuple(i for i, p in enumerate(self.placements) if _cut_by(p) is not None and self.mesh.size(i) > 1)


def _cut_by(placement: Any) -> int | None:
    """The tensor dimension that a placement cuts; None if it replicates."""
    return None if placement.is_replicate() else placement.dim


def _is_strided(placement: Any) -> bool:
    return hasattr(placement, "split_factor")


def check_placements(parameter: Any, name: str) -> None:
    """Raises a ``ValueError`` for a DTensor that is neither cut nor replicated, such as one that holds partial sums."""
    for placement in parameter.placements:
        if not placement.is_replicate() and not isinstance(getattr(placement, "dim", None), int):
            raise ValueError(
                f"{name} has the placement {placement}, of which no decay is defined; redistribute it to Shard(0), "
                "Shard(1) or Replicate() before the optimizer is built."
            )


# ---- where the lines of a parameter are --------------------------------------------------------------------


def lines_of(layout: Layout, dim: int, coordinate: Sequence[int]) -> Tensor:
    """The places along a tensor dimension that the process at a coordinate of the mesh holds."""
    lines = torch.arange(layout.shape[dim])
    for mesh_dim in layout.cuts(dim):
        pieces = lines.chunk(layout.mesh.size(mesh_dim))  # chunk: the last ones are smaller, or missing
        own = coordinate[mesh_dim]
        lines = pieces[own] if own < len(pieces) else lines[:0]
    return lines


def in_window(layout: Layout, window: Window, coordinate: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which of a process's lines are in a window: their places in the piece, and in the window."""
    lines = lines_of(layout, line_dim(window), coordinate)
    place = lines % window.size
    inside = ((place >= window.start) & (place < window.stop)).nonzero()[:, 0]
    within = lines[inside] // window.size * (window.stop - window.start) + place[inside] - window.start
    return inside, within


def line_dim(window: Window) -> int:
    return 0 if (window.lines == "rows") != window.transposed else 1


@lru_cache(maxsize=4096)
def _own_places(layout: Layout, window: Window, device: torch.device) -> Tensor:
    return in_window(layout, window, layout.mesh.get_coordinate())[0].to(device)


@lru_cache(maxsize=4096)
def _heads_are_whole(layout: Layout, window: Window) -> bool:
    for coordinate in itertools.product(*(range(size) for size in layout.mesh.shape)):
        heads = in_window(layout, window, coordinate)[1] // window.head_dim
        if len(heads) and bool((heads.unique(return_counts=True)[1] != window.head_dim).any()):
            return False
    return True


# ---- what a process holds of a matrix ------------------------------------------------------------------------


class Cut(NamedTuple):
    """How the matrices of a parameter, or of a window on it, are cut."""

    side: int | None  # -2 rows, -1 columns; None: every matrix is whole somewhere
    mesh_dims: tuple[int, ...]  # over which Gram matrices add up
    gram: int  # their size
    shape: tuple[int, int]  # of a whole matrix


def _cut(layout: Layout, window: Window | None, by_head: bool) -> Cut | None:
    """How the matrices are cut; None if no process could do anything with its piece."""
    cut = layout.cut_dims
    if window is None:
        rows, columns = len(layout.shape) - 2, len(layout.shape) - 1
        shape = (layout.shape[rows], layout.shape[columns])
        sides = {side: dim for side, dim in ((-2, rows), (-1, columns)) if dim in cut}
    else:
        along = line_dim(window)
        line_side, other_side = (-2, -1) if window.lines == "rows" else (-1, -2)
        across = layout.shape[1 - along]
        extent = window.head_dim if by_head else window.num_heads * window.head_dim
        shape = (extent, across) if line_side == -2 else (across, extent)
        sides = {side: dim for side, dim in ((line_side, along), (other_side, 1 - along)) if dim in cut}
        if by_head and along in cut:
            if not _heads_are_whole(layout, window):
                return None
            del sides[line_side]
    if len(sides) == 2:
        return None
    if not sides:
        return Cut(None, (), 0, shape)
    [(side, dim)] = sides.items()
    mesh_dims = tuple(i for i in layout.cuts(dim) if layout.mesh.size(i) > 1)
    return Cut(side, mesh_dims, shape[-3 - side], shape)


@lru_cache(maxsize=4096)
def _where_it_lies(layout: Layout, window: Window | None, by_head: bool, itemsize: int) -> Cut | None:
    """How the matrices are cut, if they are decayed where they lie; None if dealing them sends less, or only it can."""
    cut = _cut(layout, window, by_head)
    if cut is None or cut.side is None:
        return cut
    processes = math.prod(layout.mesh.size(i) for i in layout.cut_mesh_dims)
    return cut if 8 * cut.gram**2 <= itemsize * math.prod(cut.shape) / processes else None


class Piece(NamedTuple):
    """What this process holds of the matrices of a parameter."""

    value: Tensor  # (..., m, n): matrices, or pieces of them
    write: Callable[[Tensor], object]  # puts new values in their place
    cut: Cut
    mesh: Any
    part: int  # which piece; the same in processes that hold copies


def _open(local: Tensor, layout: Layout, window: Window | None, by_head: bool) -> tuple[Tensor, Callable[..., object]]:
    """A process's own part of a window, as matrices or heads, and what writes it back."""
    if window is None:
        return local, local.copy_
    along = line_dim(window)
    if along not in layout.cut_dims:
        value = (window.heads if by_head else window.matrix)(local)
        return value, lambda new: window.write(local, new)
    places = _own_places(layout, window, local.device)
    lines = local if along == 0 else local.mT
    own = lines[places]
    if by_head:
        own = own.unflatten(0, (len(places) // window.head_dim, window.head_dim))
    upright = window.lines == "rows"

    def write(new: Tensor) -> None:
        new = (new if upright else new.mT).reshape(len(places), lines.shape[1])
        lines.index_copy_(0, places, new.to(lines.dtype))

    return own if upright else own.mT, write


def opened(parameter: Any, window: Window | None, by_head: bool) -> Piece | None:
    """Returns what this process holds of the matrices of a DTensor; None if they are to be dealt.

    Args:
        parameter: the DTensor.
        window: where its matrices are; None for all of it.
        by_head: whether each head is a matrix.
    """
    layout = Layout.of(parameter)
    cut = _where_it_lies(layout, window, by_head, parameter.element_size())
    if cut is None:
        return None
    value, write = _open(parameter.detach().to_local(), layout, window, by_head)
    return Piece(value, write, cut, layout.mesh, layout.part)


def shares(parameter: Any, windows: Sequence[Window | None]) -> Iterator[tuple[Tensor, Callable[..., object], int]]:
    """Yields this process's part of each window as it lies, what writes it back, and which part it is.

    For an elementwise decay, which needs nothing of the other processes.
    """
    layout, local = Layout.of(parameter), parameter.detach().to_local()
    for window in windows:
        yield *_open(local, layout, window, False), layout.part
