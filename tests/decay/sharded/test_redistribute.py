"""Fragments and owners, without other processes; the exchange itself is in test_sharded.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from rankdecay.attention.layer import WHOLE, Window
from rankdecay.decay.sharded import redistribute as module
from rankdecay.decay.sharded.layout import Layout, lines_of, shape_in_parameter
from rankdecay.decay.sharded.redistribute import assign_owners
from tests.decay.sharded.test_layout import Mesh

CPU = torch.device("cpu")


@given(
    shapes=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=20),
    processes=st.integers(1, 6),
)
def test_every_matrix_has_one_owner_and_the_load_is_even(shapes, processes):
    owned = assign_owners(shapes, processes)
    assert sorted(itertools.chain(*owned)) == list(range(len(shapes)))
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    loads = [sum(costs[i] for i in matrices) for matrices in owned]
    # the costliest first, to the least loaded: nobody has more than another by more than one matrix
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1),), (Shard(0), Shard(1)), (Shard(1), Shard(1))])
@pytest.mark.parametrize(
    ("shape", "window", "by_head"),
    [
        ((7, 9), WHOLE, False),
        ((3, 5, 4), WHOLE, False),
        ((12, 5), Window("rows", 2, 4, 6, 1, groups=2), False),
        ((12, 5), Window("rows", 2, 4, 6, 2, groups=2), True),
        ((5, 12), Window("rows", 4, 8, 12, 2, transposed=True), True),
        ((5, 12), Window("columns", 0, 12, 12, 4), True),
    ],
)
def test_fragments_of_all_processes_are_the_matrices_and_go_back_to_their_places(placements, shape, window, by_head):
    where = Layout(Mesh(*([3, 2][: len(placements)])), placements, shape)
    parameter = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    if window is WHOLE:
        wanted = list(parameter) if len(shape) == 3 else [parameter]
    else:
        wanted = list(window.heads(parameter)) if by_head else [window.matrix(parameter)]
    matrices = [torch.zeros(shape_in_parameter(where, window, by_head)) for _ in wanted]
    for at in itertools.product(*map(range, where.mesh.shape)):
        local = parameter
        for dim in range(len(shape)):
            local = local.index_select(dim, lines_of(where, dim, at))
        back = local.clone().zero_()
        fragments = module._fragments(where, window, by_head, at, CPU)
        assert len(fragments) == len(matrices)
        for fragment, matrix in zip(fragments, matrices, strict=True):
            value = fragment.read(local).clone()
            assert value.numel() == fragment.size
            if fragment.size:
                assert not fragment.read_matrix(matrix).any()  # nobody else has sent it
                fragment.write_matrix(matrix, value)
                assert torch.equal(fragment.read_matrix(matrix), value)
            fragment.write(back, value)
        shown = back != 0
        assert torch.equal(back[shown], local[shown])
        assert int(shown.sum()) == sum(fragment.size for fragment in fragments)
    for matrix, expected in zip(matrices, wanted, strict=True):
        assert torch.equal(matrix, expected if matrix.shape == expected.shape else expected.mT)


def test_neighbours_are_a_slice_and_scattered_lines_an_index():
    assert module._index(torch.arange(3, 6), CPU) == slice(3, 6)
    assert module._index(torch.arange(0), CPU) == slice(0, 0)
    scattered = torch.tensor([1, 4])
    assert torch.equal(module._index(scattered, CPU), scattered)
    assert torch.equal(torch.eye(5)[module._pairs(scattered, scattered)], torch.eye(2))
