"""Whole matrices for the length of a step: each goes to one owner, which decays it, and comes back."""

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
from rankdecay.decay.sharded.layout import Layout, lines_in_window, lines_of, shape_in_parameter

Index = slice | Tensor


class Fragment(NamedTuple):
    """One process's part of one matrix: lines of its piece of the parameter, and their places in the matrix."""

    batch: int | None  # which matrix of the piece, if a parameter is a stack of them
    rows: Index
    columns: Index
    matrix_rows: Index
    matrix_columns: Index
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    def read(self, local: Tensor) -> Tensor:
        """Return the lines in the piece of the parameter; a view, or a copy of scattered ones."""
        return self._stack_entry(local)[_pairs(self.rows, self.columns)] if self.size else local.new_empty(0)

    def write(self, local: Tensor, value: Tensor) -> None:
        """Write the lines in the piece of the parameter."""
        if self.size:
            self._stack_entry(local)[_pairs(self.rows, self.columns)] = value.view(self.shape)

    def read_matrix(self, matrix: Tensor) -> Tensor:
        """Return the same lines of the whole matrix."""
        return matrix[_pairs(self.matrix_rows, self.matrix_columns)]

    def write_matrix(self, matrix: Tensor, value: Tensor) -> None:
        """Write the same lines of the whole matrix."""
        matrix[_pairs(self.matrix_rows, self.matrix_columns)] = value.view(self.shape)

    def _stack_entry(self, local: Tensor) -> Tensor:
        return local if self.batch is None else local[self.batch]


def _pairs(rows: Index, columns: Index) -> tuple[Index, Index]:
    """Return an index of all pairs of rows and columns."""
    return (rows[:, None] if isinstance(rows, Tensor) and isinstance(columns, Tensor) else rows), columns


def _index(places: Tensor, device: torch.device) -> Index:
    """Return places as an index; a slice where they are neighbours, which is nearly always."""
    first = int(places[0]) if len(places) else 0
    if torch.equal(places, torch.arange(first, first + len(places))):
        return slice(first, first + len(places))
    return places.to(device)


@lru_cache(maxsize=65536)
def _fragments(
    layout: Layout, window: Window, by_head: bool, coordinate: tuple[int, ...], device: torch.device
) -> list[Fragment]:
    """Return the fragments of all matrices at a coordinate of the mesh, in one order everywhere; empty ones too."""
    ndim = len(layout.shape)
    side_lines = [lines_of(layout, dim, coordinate) for dim in (ndim - 2, ndim - 1)]  # places in the parameter
    along = window.line_dim(ndim) - (ndim - 2)

    def fragment(inside: Tensor, in_matrix: Tensor, batch: int | None = None) -> Fragment:
        local, matrix = [torch.arange(len(lines)) for lines in side_lines], list(side_lines)
        local[along], matrix[along] = inside, in_matrix
        rows, columns, matrix_rows, matrix_columns = (_index(places, device) for places in (*local, *matrix))
        return Fragment(batch, rows, columns, matrix_rows, matrix_columns, (len(local[0]), len(local[1])))

    inside, in_matrix = lines_in_window(layout, window, coordinate)
    if ndim == 3:
        stack = {int(matrix): place for place, matrix in enumerate(lines_of(layout, 0, coordinate))}
        none = inside[:0]
        return [
            fragment(inside, in_matrix, stack[matrix]) if matrix in stack else fragment(none, none)
            for matrix in range(layout.shape[0])
        ]
    if not by_head:
        return [fragment(inside, in_matrix)]
    heads = in_matrix // window.head_dim
    return [
        fragment(inside[heads == head], in_matrix[heads == head] - head * window.head_dim)
        for head in range(window.num_heads)
    ]


Place = tuple[Any, Window]  # a DTensor, and where its matrices are in it


def redistribution_key(place: Place) -> tuple[Any, ...]:
    """Return the key by which places are redistributed together: the processes that share them, and the dtype."""
    layout = Layout.of(place[0])
    return layout.mesh, layout.cut_mesh_dims, place[0].dtype


def entries_per_process(place: Place) -> int:
    """Return about how many entries a process sends, and owns, of a place."""
    layout = Layout.of(place[0])
    return math.prod(layout.shape) // math.prod(layout.mesh.size(i) for i in layout.cut_mesh_dims)


class Redistribution:
    """Matrices of several DTensors, each whole with one owner. Making and closing it are collectives.

    Attributes:
        owned: the matrices this process owns, to be changed in place.
        owner: number of this process among those that share the matrices.
    """

    def __init__(self, places: Sequence[Place], by_head: bool) -> None:
        """Send every matrix to its owner.

        Args:
            places: of one `redistribution_key`.
            by_head: whether each head is a matrix.
        """
        layouts = [Layout.of(parameter) for parameter, _ in places]
        self._group, coordinates = process_group_of(layouts[0])
        self.owner = dist.get_rank(self._group)
        self._device = layouts[0].mesh.device_type
        locals_ = [parameter.detach().to_local() for parameter, _ in places]

        def fragments(place: int, rank: int) -> list[Fragment]:
            return _fragments(layouts[place], places[place][1], by_head, coordinates[rank], locals_[place].device)

        matrices = [(k, number) for k in range(len(places)) for number in range(len(fragments(k, self.owner)))]
        shapes = [shape_in_parameter(layouts[k], places[k][1], by_head) for k, _ in matrices]
        owned = assign_owners(shapes, len(coordinates))
        # send[r]: my fragments of rank r's matrices; recv[r]: rank r's fragments of mine; in the order they are sent in
        self._send = [
            [(locals_[k], fragments(k, self.owner)[number]) for k, number in (matrices[i] for i in indices)]
            for indices in owned
        ]
        owned_here = [matrices[i] for i in owned[self.owner]]
        recv = [[fragments(k, rank)[number] for k, number in owned_here] for rank in range(len(owned))]
        self._dtype = locals_[0].dtype
        self.owned = [torch.empty(shapes[i], dtype=self._dtype, device=self._device) for i in owned[self.owner]]
        self._recv = [list(zip(self.owned, fragments, strict=True)) for fragments in recv]
        values = [fragment.read(local) for local, fragment in _flat(self._send)]
        for value, (matrix, fragment) in self._exchange(values, self._send, self._recv):
            fragment.write_matrix(matrix, value)

    def close(self) -> None:
        """Send every process its fragments of the changed matrices."""
        values = [fragment.read_matrix(matrix) for matrix, fragment in _flat(self._recv)]
        for value, (local, fragment) in self._exchange(values, self._recv, self._send):
            fragment.write(local, value)

    def _exchange(
        self, values: list[Tensor], outgoing: list[list[Target]], incoming: list[list[Target]]
    ) -> Iterator[tuple[Tensor, Target]]:
        """Send every process its values; yield what arrives with the fragments it fills."""
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        # parts that are offloaded to the CPU cannot be sent from there
        packed = torch.cat([nothing, *(value.reshape(-1).to(self._device) for value in values)])
        sizes, sent_sizes = ([sum(part.size for _, part in rank) for rank in ranks] for ranks in (incoming, outgoing))
        arrived = packed.new_empty(sum(sizes))
        dist.all_to_all_single(arrived, packed, sizes, sent_sizes, group=self._group)
        targets = _flat(incoming)
        return zip(arrived.split([fragment.size for _, fragment in targets]), targets, strict=True)


Target = tuple[Tensor, Fragment]  # a piece of a parameter or a whole matrix, and the fragment in it


def _flat(ranks: list[list[Target]]) -> list[Target]:
    return list(itertools.chain.from_iterable(ranks))


def process_group_of(layout: Layout) -> tuple[Any, list[tuple[int, ...]]]:
    """Return the group of the processes among which a parameter is cut, and their coordinates in its order."""
    here = layout.mesh.get_coordinate()
    cut = layout.cut_mesh_dims
    sizes = [range(layout.mesh.size(i)) if i in cut else (here[i],) for i in range(layout.mesh.ndim)]
    by_rank = {int(layout.mesh.mesh[each]): each for each in itertools.product(*sizes)}
    group = layout.mesh.get_group(cut[0]) if len(cut) == 1 else _joint_group(tuple(by_rank))
    return group, [by_rank[rank] for rank in dist.get_process_group_ranks(group)]


@lru_cache(maxsize=64)
def _joint_group(ranks: tuple[int, ...]) -> Any:
    """Return a group over several dimensions of a mesh, which has one for each alone."""
    return dist.new_group(list(ranks), use_local_synchronization=True)


def assign_owners(shapes: Sequence[tuple[int, int]], processes: int) -> list[list[int]]:
    """Return the matrices that each process owns: the costliest first, to the process with the least to do."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    load = [0] * processes
    owned: list[list[int]] = [[] for _ in range(processes)]
    for matrix in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owner = load.index(min(load))
        load[owner] += costs[matrix]
        owned[owner].append(matrix)
    return owned
