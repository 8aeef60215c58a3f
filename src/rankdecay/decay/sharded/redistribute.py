"""Whole matrices for the length of a step: each goes to one owner, which decays it, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.decay.sharded.layout import Layout, in_window, line_dim, lines_of


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
    there = [lines_of(layout, dim, coordinate) for dim in sides]  # in the parameter

    def part(along: int, inside: Tensor, to: Tensor, batch: int | None = None) -> Part:
        own, across = [torch.arange(len(lines)) for lines in there], list(there)
        own[along], across[along] = inside, to
        rows, columns, to_rows, to_columns = (_places(places, device) for places in (*own, *across))
        return Part(batch, rows, columns, to_rows, to_columns, (len(own[0]), len(own[1])))

    if window is None:
        every = torch.arange(len(there[0]))
        if len(layout.shape) == 2:
            return [part(0, every, there[0])]
        held = {int(matrix): place for place, matrix in enumerate(lines_of(layout, 0, coordinate))}
        none = every[:0]
        return [
            part(0, every, there[0], held[matrix]) if matrix in held else part(0, none, none)
            for matrix in range(layout.shape[0])
        ]
    along = line_dim(window)
    inside, within = in_window(layout, window, coordinate)
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
    return (extent, layout.shape[1]) if line_dim(window) == 0 else (layout.shape[0], extent)


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
