"""Tensors that are in one piece, tensors that are not, and optimizers inside wrappers."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rankdecay.dtensor import is_sharded, unwrapped, whole
from tests.ranks import on_ranks


def test_a_tensor_in_one_piece_is_returned_as_it_is():
    tensor = torch.ones(2, requires_grad=True)
    assert not is_sharded(tensor)
    assert whole(tensor) is tensor


def _gathered() -> tuple[bool, list[float], bool]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.arange(3.0), mesh, [Shard(0)]))
    return is_sharded(parameter), whole(parameter).tolist(), whole(parameter).requires_grad


def test_a_sharded_parameter_is_gathered_in_every_process():
    assert on_ranks(2, _gathered) == [(True, [0, 1, 2], False)] * 2


class _Wrapper:
    def __init__(self, **inside: Any) -> None:
        self.__dict__.update(inside)


def test_wrappers_are_taken_off_one_by_one():
    sgd = torch.optim.SGD([torch.zeros(1)])
    assert unwrapped(sgd) is sgd
    assert unwrapped(_Wrapper(optimizer=_Wrapper(_base_optimizer=sgd))) is sgd
    itself = _Wrapper()
    itself.optimizer = itself
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got _Wrapper"):
        unwrapped(itself)
