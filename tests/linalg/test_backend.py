"""Matrix functions for a device without float64: the same result, computed on the CPU."""

import pytest
import torch

import rankdecay as rd
from rankdecay.linalg import backend, shrink


def test_only_mps_lacks_float64():
    assert not backend.has_float64(torch.device("mps"))
    assert backend.has_float64(torch.device("cpu"))
    assert backend.has_float64(torch.device("cuda", 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda W: rd.polar(W),
        lambda W: rd.polar(W=W, backend="exact"),
        lambda W: rd.soft_threshold(W, torch.tensor([0.5, 1.0])),
        lambda W: shrink(W, tau=torch.tensor([0.5, 1.0]), rule="smooth", smoothing=0.1),
    ],
)
def test_a_matrix_of_such_a_device_goes_to_the_cpu_and_back(monkeypatch, call):
    W = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    expected = call(W)
    moves = []
    monkeypatch.setattr(backend, "has_float64", lambda device: False)
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moves.append(self.shape) or real(self))
    found = call(W)
    assert torch.equal(found, expected)
    assert found.device == W.device
    assert W.shape in moves, "the matrix was brought to the CPU"


def test_double_stays_where_float64_is(monkeypatch):
    x = torch.ones(2, dtype=torch.bfloat16)
    assert backend.double(x).dtype == torch.float64
    monkeypatch.setattr(backend, "has_float64", lambda device: False)
    assert backend.double(x).dtype == torch.float64
