"""Layouts, on meshes of processes that do not exist."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from rankdecay.attention.layer import WHOLE, Window
from rankdecay.decay.sharded import layout as module
from rankdecay.decay.sharded.layout import Layout, lines_in_window, lines_of, shape_in_parameter


class Mesh:
    """As much of a DeviceMesh as a layout asks for, seen from one of its processes."""

    def __init__(self, *shape: int, here: tuple[int, ...] | None = None) -> None:
        self.shape, self.ndim = shape, len(shape)
        self._here = here or (0,) * len(shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def get_coordinate(self) -> tuple[int, ...]:
        return self._here

    def get_local_rank(self, dim: int) -> int:
        return self._here[dim]


def layout(shape: tuple[int, ...], *placements: Any, mesh: tuple[int, ...] = (2,)) -> Layout:
    return Layout(Mesh(*mesh), placements, shape)


KEY = Window("rows", 4, 8, 12, 2, groups=2)  # lines 4 to 8 and 16 to 20 of 24, four heads of 2
OUTPUT = Window("columns", 0, 12, 12, 4, transposed=True)


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
@pytest.mark.parametrize(
    ("placements", "mesh"),
    [((Shard(0),), (4,)), ((Shard(0), Shard(0)), (2, 3)), ((Shard(1), Shard(0)), (2, 2)), ((Replicate(),), (3,))],
)
def test_every_line_is_somewhere_and_only_copies_hold_it_twice(rows, placements, mesh):
    where = layout((rows, 5), *placements, mesh=mesh)
    held = [lines_of(where, 0, at).tolist() for at in itertools.product(*map(range, mesh))]
    copies = [lines for lines in held if lines] if where.cuts(0) else held
    total = sum(len(lines) for lines in copies)
    assert sorted(set(itertools.chain(*held))) == list(range(rows))
    repeats = {Shard(0): 1, Replicate(): mesh[0], Shard(1): mesh[0]}[placements[0]]
    assert total == rows * repeats


@pytest.mark.parametrize("window", [KEY, WHOLE])
def test_lines_in_a_window_are_those_that_it_shows(window):
    where = layout((24, 3), Shard(0), mesh=(5,))
    parameter = torch.arange(24.0)[:, None].expand(24, 3)
    matrix = window.matrix(parameter)
    found = []
    for process in range(5):
        lines = lines_of(where, 0, (process,))
        inside, places = lines_in_window(where, window, (process,))
        assert torch.equal(parameter[lines][inside], matrix[places])
        found += places.tolist()
    assert sorted(found) == list(range(len(matrix)))


@pytest.mark.parametrize(
    ("window", "shape", "by_head", "expected"),
    [
        (WHOLE, (5, 7), False, (5, 7)),
        (WHOLE, (3, 5, 7), False, (5, 7)),
        (KEY, (24, 7), False, (8, 7)),
        (KEY, (24, 7), True, (2, 7)),
        (OUTPUT, (12, 7), False, (12, 7)),  # transposed: its columns are the rows of the parameter
        (OUTPUT, (12, 7), True, (4, 7)),
    ],
)
def test_a_matrix_has_the_shape_that_it_has_in_the_parameter(window, shape, by_head, expected):
    assert shape_in_parameter(layout(shape, Replicate()), window, by_head) == expected
    [shown] = ((window.heads if by_head else window.matrix)(torch.empty(shape)).shape[-2:],)
    assert sorted(shown) == sorted(expected)


LONG, SQUARE = (64, 8), (24, 24)


@pytest.mark.parametrize(
    ("shape", "placements", "window", "by_head", "side"),
    [
        (SQUARE, (Replicate(),), WHOLE, False, "whole"),
        (LONG, (Shard(0),), WHOLE, False, -2),
        (LONG[::-1], (Shard(1),), WHOLE, False, -1),
        (LONG, (Shard(1),), WHOLE, False, "redistribute"),  # the short side is cut
        (SQUARE, (Shard(0),), WHOLE, False, "redistribute"),
        ((4, 24, 24), (Shard(0),), WHOLE, False, "whole"),  # experts
        ((4, 64, 8), (Shard(1),), WHOLE, False, -2),
        ((24, 24), (Shard(0),), KEY, True, "whole"),
        ((12, 64), (Shard(0),), OUTPUT, True, "redistribute"),  # three heads on two processes
        ((12, 512), (Shard(1),), OUTPUT, False, -2),
    ],
)
def test_what_is_sent_is_chosen_by_shape_and_placement(shape, placements, window, by_head, side):
    cut = module._cut_in_place(layout(shape, *placements), window, by_head, 4)
    assert ("redistribute" if cut is None else "whole" if cut.side is None else cut.side) == side
    if cut is not None and cut.side is not None:
        assert cut.gram == min(cut.shape)
        assert cut.mesh_dims == (0,)


def test_pieces_are_numbered_and_copies_have_one_number():
    placements = (Replicate(), Shard(0))
    parts = {
        here: Layout(Mesh(2, 3, here=here), placements, (9, 2)).part for here in itertools.product((0, 1), range(3))
    }
    assert {parts[copy, shard] for copy in (0, 1) for shard in range(3)} == {0, 1, 2}
    assert all(parts[0, shard] == parts[1, shard] for shard in range(3))
