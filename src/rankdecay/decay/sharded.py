r"""The same decay where a parameter is a DTensor: FSDP2, HSDP, tensor parallelism and their combinations.

A low-rank decay has to know the whole spectrum of a matrix of which each process holds a piece. There are three cases,
chosen per parameter from its shape and placements alone, so that all processes choose alike:

* **Every matrix is whole in some process**: experts, heads that fall inside one shard, replicated parameters. Nothing
  is communicated.
* **One side is cut, and it is the long one.** The Gram matrix of the other side is the sum of those of the pieces, and
  the step multiplies each piece by a matrix C that depends on the Gram matrix alone (:mod:`rankdecay.linalg.gram`).
  Gram matrices of one size travel together: a reduce-scatter gives each process its share of the sums to decompose,
  an all-gather hands round the C. That moves the bytes of one all-reduce, and no decomposition is made twice.
* **Otherwise** the short side is cut, both are, or heads are: the parameter is redistributed so that one of the first
  two cases holds, and back afterwards.

Mesh dimensions that replicate, as in HSDP, take no part in a sum. L2 is elementwise and always local.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.decay.policy import LowRank
from rankdecay.linalg.gram import shrink_factor

#: How much cheaper the decompositions must become for a parameter to be redistributed.
_WORTH_MOVING = 2

_sum_scattered: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
    def is_strided(self) -> bool:
        """Whether a placement is not a plain Shard or Replicate, which DTensor cannot redistribute to."""
        return any(_is_strided(p) for p in self.placements)


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


def _lines(layout: Layout, dim: int, coordinate: Sequence[int]) -> Tensor:
    """The places along a tensor dimension that the process at a coordinate of the mesh holds."""
    lines = torch.arange(layout.shape[dim])
    for mesh_dim in layout.cuts(dim):
        pieces = lines.chunk(layout.mesh.size(mesh_dim))  # chunk: the last ones are smaller, or missing
        own = coordinate[mesh_dim]
        lines = pieces[own] if own < len(pieces) else lines[:0]
    return lines


def _in_window(layout: Layout, window: Window, coordinate: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which of a process's lines are in a window: their places in the piece, and the head of each."""
    lines = _lines(layout, _line_dim(window), coordinate)
    place = lines % window.size
    inside = ((place >= window.start) & (place < window.stop)).nonzero()[:, 0]
    within = lines[inside] // window.size * (window.stop - window.start) + place[inside] - window.start
    return inside, within // window.head_dim


def _line_dim(window: Window) -> int:
    return 0 if (window.lines == "rows") != window.transposed else 1


@lru_cache(maxsize=4096)
def _own_places(layout: Layout, window: Window, device: torch.device) -> Tensor:
    return _in_window(layout, window, layout.mesh.get_coordinate())[0].to(device)


@lru_cache(maxsize=4096)
def _heads_are_whole(layout: Layout, window: Window) -> bool:
    for coordinate in itertools.product(*(range(size) for size in layout.mesh.shape)):
        heads = _in_window(layout, window, coordinate)[1]
        if len(heads) and bool((heads.unique(return_counts=True)[1] != window.head_dim).any()):
            return False
    return True


# ---- what a process holds of a matrix ------------------------------------------------------------------------


class Cut(NamedTuple):
    """How the matrices of a parameter, or of a window on it, are cut."""

    side: int | None  # -2 rows, -1 columns; None: every matrix is whole somewhere
    mesh_dims: tuple[int, ...]  # over which Gram matrices add up
    gram: int  # their size
    rank: int  # the least side of the whole matrix
    matrices: int  # over all processes
    cost: float  # of their decompositions

    @property
    def elements(self) -> int:
        """Entries of the Gram matrices."""
        return self.matrices * self.gram**2


def _cut(layout: Layout, window: Window | None, by_head: bool) -> Cut | None:
    """How the matrices are cut; None if no process could do anything with its piece."""
    cut = layout.cut_dims
    if window is None:
        rows, columns = len(layout.shape) - 2, len(layout.shape) - 1
        count = math.prod(layout.shape[:-2])
        shape = layout.shape[-2:]
        sides = {side: dim for side, dim in ((-2, rows), (-1, columns)) if dim in cut}
    else:
        along = _line_dim(window)
        line_side, other_side = (-2, -1) if window.lines == "rows" else (-1, -2)
        across = layout.shape[1 - along]
        extent = window.head_dim if by_head else window.num_heads * window.head_dim
        count = window.num_heads if by_head else 1
        shape = (extent, across) if line_side == -2 else (across, extent)
        sides = {side: dim for side, dim in ((line_side, along), (other_side, 1 - along)) if dim in cut}
        if by_head and along in cut:
            if not _heads_are_whole(layout, window):
                return None
            del sides[line_side]
    if len(sides) == 2:
        return None
    rank = min(shape)
    if not sides:
        return Cut(None, (), 0, rank, count, count * float(rank) ** 3)
    [(side, dim)] = sides.items()
    gram = shape[-3 - side]
    mesh_dims = tuple(i for i in layout.cuts(dim) if layout.mesh.size(i) > 1)
    return Cut(side, mesh_dims, gram, rank, count, count * float(gram) ** 3)


@lru_cache(maxsize=4096)
def _working_placements(layout: Layout, windows: tuple[Window | None, ...], by_head: bool) -> tuple[Any, ...]:
    """The placements in which the decay of a parameter is best computed: its own, unless another is much cheaper."""
    from torch.distributed.tensor import Replicate, Shard

    def moved_to(dim: int) -> tuple[Any, ...]:
        keeps = [_cut_by(p) == dim and not _is_strided(p) for p in layout.placements]
        first = next(i for i, p in enumerate(layout.placements) if _cut_by(p) is not None)
        if not any(keeps):
            keeps[first] = True
        return tuple(Shard(dim) if kept else Replicate() for kept in keeps)

    def cost(placements: tuple[Any, ...]) -> float:
        cuts = [_cut(layout._replace(placements=placements), window, by_head) for window in windows]
        return sum(cut.cost if cut is not None else math.inf for cut in cuts)

    if not layout.cut_dims:
        return layout.placements
    dims = len(layout.shape)
    whole = tuple(Replicate() for _ in layout.placements)
    others = [moved_to(dims - 2), moved_to(dims - 1), whole]
    best = min(others, key=cost)
    return layout.placements if cost(layout.placements) <= _WORTH_MOVING * cost(best) else best


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
    along = _line_dim(window)
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


class Opened:
    """A DTensor in the placements its decay is computed in. Opening and closing it are collectives.

    Attributes:
        pieces: what this process holds of each matrix, empty pieces included.
    """

    def __init__(self, parameter: Any, windows: Sequence[Window | None], by_head: bool) -> None:
        """Redistributes the parameter if that is worth it.

        Args:
            parameter: the DTensor.
            windows: where its matrices are; ``[None]`` for all of it.
            by_head: whether each head is a matrix.
        """
        self._parameter = parameter.detach()
        placements = _working_placements(Layout.of(parameter), tuple(windows), by_head)
        self._away = placements != tuple(parameter.placements)
        self._tensor = self._parameter
        if self._away:  # on the mesh's device: parts that are offloaded to the CPU cannot be sent from there
            on_device = self._parameter.to(self._parameter.device_mesh.device_type)
            self._tensor = on_device.redistribute(placements=placements)
        layout, local = Layout.of(self._tensor), self._tensor.to_local()
        self.pieces: list[Piece] = []
        for window in windows:
            cut = _cut(layout, window, by_head)
            assert cut is not None, "the replicated parameter, at the latest, holds whole matrices"
            value, write = _open(local, layout, window, by_head)
            self.pieces.append(Piece(value, write, cut, layout.mesh, layout.part))

    def close(self) -> None:
        """Takes what was written to the pieces back to the parameter."""
        if not self._away:
            return
        own, layout = self._parameter.to_local(), Layout.of(self._parameter)
        if not layout.is_strided:
            own.copy_(self._tensor.redistribute(placements=layout.placements).to_local())
            return
        value = self._tensor.full_tensor()
        coordinate = layout.mesh.get_coordinate()
        for dim in layout.cut_dims:
            value = value.index_select(dim, _lines(layout, dim, coordinate).to(value.device))
        own.copy_(value)


def shares(parameter: Any, windows: Sequence[Window | None]) -> Iterator[tuple[Tensor, Callable[..., object], int]]:
    """Yields this process's part of each window as it lies, what writes it back, and which part it is.

    For an elementwise decay, which needs nothing of the other processes.
    """
    layout, local = Layout.of(parameter), parameter.detach().to_local()
    for window in windows:
        yield *_open(local, layout, window, False), layout.part


# ---- the decay of pieces -------------------------------------------------------------------------------------


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
    _sum_scattered(own, total, group=inner)
    ranks = [piece.cut.rank for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
    begin = dist.get_rank(inner) * share
    own_ranks = [*ranks, *[1] * (share * world - number)][begin : begin + share]
    norm = own.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    due = due.to(norm.device, non_blocking=True) if isinstance(due, Tensor) else due
    tau = decay.scaled(torch.ones_like(norm) * due, norm, torch.tensor(own_ranks).to(norm, non_blocking=True))
    factors = shrink_factor(own, tau, decay.rule, smoothing=decay.smoothing, backend=backend, dtype=first.value.dtype)
    _gather(total, factors, group=inner)
    return [_after(piece, factor) for piece, factor in zip(pieces, total[:number].split(counts), strict=True)]


def _gram(piece: Piece) -> Tensor:
    value = piece.value.double()
    return value.mT @ value if piece.cut.side == -2 else value @ value.mT


def _after(piece: Piece, factor: Tensor) -> Tensor:
    value = piece.value.double()
    factor = factor.to(value.device).reshape(*value.shape[:-2], *factor.shape[-2:])
    return value - (value @ factor if piece.cut.side == -2 else factor @ value)
