"""Matrix functions for a device without float64: the same result, computed on the CPU."""

import contextlib
import importlib

import pytest
import torch
from matrices import gaussian

import rankdecay as rd
from rankdecay.linalg import backend, choose_backend, polar, record_backends, shrink
from rankdecay.linalg.backend import EXACT_UP_TO
from tests import needs


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


# ---- which backend, and in which precision ------------------------------------------------------------------------


def test_choose_backend():
    assert choose_backend((1024, 4096), "cpu", torch.float32) == "exact"
    assert choose_backend((3, 4096, 4096), "cpu", torch.float32) == "exact"
    assert choose_backend((512, 4096), "cuda", torch.bfloat16) == "exact"
    assert choose_backend((1024, 1024), "cuda", torch.float32) == "matmul"
    assert choose_backend((4096, 4096), torch.device("cuda", 1), torch.float64) == "exact"


def test_auto_runs_what_choose_backend_says(monkeypatch):
    W = gaussian(24, 16)
    with record_backends() as ran:
        polar(W)
    assert ran == ["exact"]
    monkeypatch.setitem(EXACT_UP_TO, "cpu", 8)
    assert choose_backend(W.shape, W.device, W.dtype) == "matmul"
    with record_backends() as ran:
        polar(W)
    assert ran == ["matmul"]


def test_records_nest_and_end():
    W = gaussian(4, 4)
    with record_backends() as outer:
        polar(W, "matmul")
        with record_backends() as inner:
            polar(W, "exact")
    polar(W)
    assert outer == ["matmul", "exact"]
    assert inner == ["exact"]


def matmul_settings():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_float32_matmul_precision()


def by_legacy_flag():
    torch.backends.cuda.matmul.allow_tf32 = True


def by_global_precision():
    torch.set_float32_matmul_precision("medium")


def by_new_flag():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@contextlib.contextmanager
def default_settings_afterwards():
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("change", [by_legacy_flag, by_global_precision, by_new_flag])
@pytest.mark.parametrize("fails", [False, True])
def test_reduced_precision_is_off_inside_and_restored(monkeypatch, change, fails):
    if change is by_new_flag and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip(needs.NEWER_TORCH)
    module = importlib.import_module("rankdecay.linalg.polar")
    seen = []
    real = module.polar_by_products

    def spy(*args):
        seen.append(matmul_settings())
        if fails:
            raise RuntimeError("on purpose")
        return real(*args)

    monkeypatch.setattr(module, "polar_by_products", spy)
    with default_settings_afterwards():
        change()
        before = matmul_settings()
        with contextlib.suppress(RuntimeError):
            polar(gaussian(8, 8), "matmul")
        assert matmul_settings() == before
    reduced = {"tf32", "bf16", "medium", "high"}
    assert len(seen) == 1
    assert not reduced & ({seen[0]} if isinstance(seen[0], str) else set(seen[0]))


def test_reduced_precision_does_not_change_the_result():
    W = gaussian(64, 64)
    expected = polar(W, "matmul")
    with default_settings_afterwards():
        by_global_precision()
        assert torch.equal(polar(W, "matmul"), expected)


def test_autocast_is_off_inside():
    W = gaussian(64, 64)
    expected = polar(W, "matmul")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar(W, "matmul"), expected)
        assert torch.is_autocast_enabled("cpu")
