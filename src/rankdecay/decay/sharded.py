r"""The same decay where a parameter is a DTensor: FSDP2, HSDP, tensor parallelism and their combinations.

A low-rank decay has to know the whole spectrum of a matrix of which each process holds a piece. There are three ways,
chosen for each parameter from its shape and placements alone, so that all processes choose alike:

* **whole**: every matrix is whole in some process: experts, heads that fall inside one shard, replicated parameters.
  Nothing is communicated.
* **sum**: one side is cut, and it is by far the longer one. The Gram matrix of the other side is the sum of those of
  the pieces, and the step multiplies each piece by a matrix C that depends on the Gram matrix alone
  (:mod:`rankdecay.linalg.gram`). Gram matrices of one size travel together: a reduce-scatter gives each process its
  share of the sums to decompose, an all-gather hands round the C, which moves the bytes of one all-reduce.
* **deal**: otherwise each matrix, or head, goes to one owner, which decays it as if it were alone; owners are chosen so
  that all have as much to do. One all-to-all there and one back for many matrices.

A process sends 16 n² bytes for a sum and about 8 mn/P for a deal of float32 among P processes, so that square matrices
are dealt and a sum is for m ≥ 2nP. Mesh dimensions that replicate, as in HSDP, take no part in either: each
replica does the same. L2 is elementwise and always local.
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

# The first names are those of torch 2.13; a build without torch.distributed has neither.
_sum_scattered: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


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


def _lines(layout: Layout, dim: int, coordinate: Sequence[int]) -> Tensor:
    """The places along a tensor dimension that the process at a coordinate of the mesh holds."""
    lines = torch.arange(layout.shape[dim])
    for mesh_dim in layout.cuts(dim):
        pieces = lines.chunk(layout.mesh.size(mesh_dim))  # chunk: the last ones are smaller, or missing
        own = coordinate[mesh_dim]
        lines = pieces[own] if own < len(pieces) else lines[:0]
    return lines


def _in_window(layout: Layout, window: Window, coordinate: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which of a process's lines are in a window: their places in the piece, and in the window."""
    lines = _lines(layout, _line_dim(window), coordinate)
    place = lines % window.size
    inside = ((place >= window.start) & (place < window.stop)).nonzero()[:, 0]
    within = lines[inside] // window.size * (window.stop - window.start) + place[inside] - window.start
    return inside, within


def _line_dim(window: Window) -> int:
    return 0 if (window.lines == "rows") != window.transposed else 1


@lru_cache(maxsize=4096)
def _own_places(layout: Layout, window: Window, device: torch.device) -> Tensor:
    return _in_window(layout, window, layout.mesh.get_coordinate())[0].to(device)


@lru_cache(maxsize=4096)
def _heads_are_whole(layout: Layout, window: Window) -> bool:
    for coordinate in itertools.product(*(range(size) for size in layout.mesh.shape)):
        heads = _in_window(layout, window, coordinate)[1] // window.head_dim
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
        along = _line_dim(window)
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


# ---- sums -------------------------------------------------------------------------------------


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
    ranks = [min(piece.cut.shape) for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
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


# ---- deals ---------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What one process holds of one matrix: lines of its piece of the parameter, and where they are in the matrix."""

    batch: int | None  # which matrix of the piece, if a parameter is a stack of them
    rows: slice | Tensor
    columns: slice | Tensor
    to_rows: slice | Tensor
    to_columns: slice | Tensor
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    def of(self, local: Tensor) -> Tensor:
        """The lines in the piece of the parameter; a view, or a copy of scattered ones."""
        return self._in(local)[_at(self.rows, self.columns)] if self.size else local.new_empty(0)

    def put(self, local: Tensor, value: Tensor) -> None:
        """Writes them there."""
        if self.size:
            self._in(local)[_at(self.rows, self.columns)] = value.view(self.shape)

    def of_matrix(self, matrix: Tensor) -> Tensor:
        """The same lines in the whole matrix."""
        return matrix[_at(self.to_rows, self.to_columns)]

    def put_in_matrix(self, matrix: Tensor, value: Tensor) -> None:
        """Writes them there."""
        matrix[_at(self.to_rows, self.to_columns)] = value.view(self.shape)

    def _in(self, local: Tensor) -> Tensor:
        return local if self.batch is None else local[self.batch]


def _at(rows: slice | Tensor, columns: slice | Tensor) -> tuple[slice | Tensor, slice | Tensor]:
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        return rows[:, None], columns  # of all pairs
    return rows, columns


def _places(places: Tensor, device: torch.device) -> slice | Tensor:
    """An index; a slice where the places are neighbours, which is nearly always."""
    first = int(places[0]) if len(places) else 0
    if torch.equal(places, torch.arange(first, first + len(places))):
        return slice(first, first + len(places))
    return places.to(device)


@lru_cache(maxsize=65536)
def _parts(
    layout: Layout, window: Window | None, by_head: bool, coordinate: tuple[int, ...], device: torch.device
) -> list[Part]:
    """What the process at a coordinate of the mesh holds of each matrix, in one order everywhere; empty parts too."""
    sides = len(layout.shape) - 2, len(layout.shape) - 1
    there = [_lines(layout, dim, coordinate) for dim in sides]  # in the parameter

    def part(along: int, inside: Tensor, to: Tensor, batch: int | None = None) -> Part:
        own, across = [torch.arange(len(lines)) for lines in there], list(there)
        own[along], across[along] = inside, to
        rows, columns, to_rows, to_columns = (_places(places, device) for places in (*own, *across))
        return Part(batch, rows, columns, to_rows, to_columns, (len(own[0]), len(own[1])))

    if window is None:
        every = torch.arange(len(there[0]))
        if len(layout.shape) == 2:
            return [part(0, every, there[0])]
        held = {int(matrix): place for place, matrix in enumerate(_lines(layout, 0, coordinate))}
        none = every[:0]
        return [
            part(0, every, there[0], held[matrix]) if matrix in held else part(0, none, none)
            for matrix in range(layout.shape[0])
        ]
    along = _line_dim(window)
    inside, within = _in_window(layout, window, coordinate)
    if not by_head:
        return [part(along, inside, within)]
    heads = within // window.head_dim
    return [
        part(along, inside[heads == head], within[heads == head] - head * window.head_dim)
        for head in range(window.num_heads)
    ]


def _matrix_shape(layout: Layout, window: Window | None, by_head: bool) -> tuple[int, int]:
    """Of a whole matrix, as it lies in the parameter: perhaps transposed, which changes no singular value."""
    if window is None:
        return layout.shape[-2], layout.shape[-1]
    extent = window.head_dim if by_head else window.num_heads * window.head_dim
    return (extent, layout.shape[1]) if _line_dim(window) == 0 else (layout.shape[0], extent)


Place = tuple[Any, Window | None]  # a DTensor, and where its matrices are in it


def dealt_together(place: Place) -> tuple[Any, ...]:
    """What the places of one deal have in common: the processes among which they are cut, and the dtype."""
    layout = Layout.of(place[0])
    return layout.mesh, layout.cut_mesh_dims, place[0].dtype


def share_of(place: Place) -> int:
    """The entries that a process sends and owns of a place, about."""
    layout = Layout.of(place[0])
    return math.prod(layout.shape) // math.prod(layout.mesh.size(i) for i in layout.cut_mesh_dims)


class Deal:
    """Matrices of several DTensors, each whole with one owner. Making and closing it are collectives.

    Attributes:
        owned: the matrices this process owns, to be changed in place.
        owner: number of this process among those that share the matrices.
    """

    def __init__(self, places: Sequence[Place], by_head: bool) -> None:
        """Sends every matrix to its owner.

        Args:
            places: that are alike in `dealt_together`.
            by_head: whether each head is a matrix.
        """
        layouts = [Layout.of(parameter) for parameter, _ in places]
        self._group, coordinates = _party(layouts[0])
        self.owner = dist.get_rank(self._group)
        self._device = layouts[0].mesh.device_type
        locals_ = [parameter.detach().to_local() for parameter, _ in places]

        def parts(place: int, process: int) -> list[Part]:
            return _parts(layouts[place], places[place][1], by_head, coordinates[process], locals_[place].device)

        matrices = [(place, number) for place in range(len(places)) for number in range(len(parts(place, self.owner)))]
        shapes = [_matrix_shape(layouts[place], places[place][1], by_head) for place, _ in matrices]
        owned = [[matrices[i] for i in theirs] for theirs in _share_out(shapes, len(coordinates))]
        #: To each owner my parts of its matrices; of each process its parts of mine: in the order they are sent in.
        self._mine = [[(locals_[k], parts(k, self.owner)[number]) for k, number in theirs] for theirs in owned]
        self._theirs = [[parts(k, process)[number] for k, number in owned[self.owner]] for process in range(len(owned))]
        shape_of = dict(zip(matrices, shapes, strict=True))
        self._dtype = locals_[0].dtype
        self.owned = [torch.empty(shape_of[one], dtype=self._dtype, device=self._device) for one in owned[self.owner]]
        sent = [part.of(local) for theirs in self._mine for local, part in theirs]
        for stretch, (matrix, part) in self._exchange(sent, self._sizes_of_theirs, self._sizes_of_mine, self._places):
            part.put_in_matrix(matrix, stretch)

    def close(self) -> None:
        """Sends every process its parts of what has become of the matrices."""
        sent = [part.of_matrix(matrix) for matrix, part in self._places]
        mine = [one for theirs in self._mine for one in theirs]
        for stretch, (local, part) in self._exchange(sent, self._sizes_of_mine, self._sizes_of_theirs, mine):
            part.put(local, stretch)

    @property
    def _places(self) -> list[tuple[Tensor, Part]]:
        """My matrices, again for every process, and its parts of them."""
        return [(matrix, part) for parts in self._theirs for matrix, part in zip(self.owned, parts, strict=True)]

    @property
    def _sizes_of_mine(self) -> list[int]:
        return [sum(part.size for _, part in theirs) for theirs in self._mine]

    @property
    def _sizes_of_theirs(self) -> list[int]:
        return [sum(part.size for part in parts) for parts in self._theirs]

    def _exchange(
        self, sent: list[Tensor], sizes: list[int], sent_sizes: list[int], places: list[tuple[Tensor, Part]]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Part]]]:
        """Sends every process its stretch; yields what arrives with the places it is for."""
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        # parts that are offloaded to the CPU cannot be sent from there
        values = torch.cat([nothing, *(value.reshape(-1).to(self._device) for value in sent)])
        arrived = values.new_empty(sum(sizes))
        dist.all_to_all_single(arrived, values, sizes, sent_sizes, group=self._group)
        return zip(arrived.split([part.size for _, part in places]), places, strict=True)


def _party(layout: Layout) -> tuple[Any, list[tuple[int, ...]]]:
    """The group of the processes among which a parameter is cut, and their coordinates in its order."""
    here = layout.mesh.get_coordinate()
    cut = layout.cut_mesh_dims
    sizes = [range(layout.mesh.size(i)) if i in cut else (here[i],) for i in range(layout.mesh.ndim)]
    by_rank = {int(layout.mesh.mesh[each]): each for each in itertools.product(*sizes)}
    group = layout.mesh.get_group(cut[0]) if len(cut) == 1 else _joint_group(tuple(by_rank))
    return group, [by_rank[rank] for rank in dist.get_process_group_ranks(group)]


@lru_cache(maxsize=64)
def _joint_group(ranks: tuple[int, ...]) -> Any:
    """A group over several dimensions of a mesh, which has one for each alone."""
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _share_out(shapes: Sequence[tuple[int, int]], processes: int) -> list[list[int]]:
    """The matrices that each process owns: the costliest first, to whoever has least to do."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    load = [0] * processes
    owned: list[list[int]] = [[] for _ in range(processes)]
    for matrix in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owner = load.index(min(load))
        load[owner] += costs[matrix]
        owned[owner].append(matrix)
    return owned
