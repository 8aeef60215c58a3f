"""The polar factor against a float64 SVD: accuracy, null directions, scale, dtypes, backends, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    CONDITIONS,
    DTYPES,
    SHAPES,
    by_svd,
    conditioned,
    gaussian,
    low_rank,
    relative_error,
    spectral_error,
    with_spectrum,
)

from rankdecay.linalg import polar, smooth_polar
from tests import needs

BACKENDS = ["exact", "matmul"]


def ones(sigma):
    return torch.ones_like(sigma)


@pytest.mark.parametrize("kappa", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_float32(shape, kappa):
    W = conditioned(shape, kappa, torch.float32)
    expected = by_svd(W, ones)
    assert relative_error(polar(W, "exact"), expected) <= (1e-6 if kappa <= 1e4 else 1e-5)
    assert relative_error(polar(W, "matmul"), expected) <= (1e-3 if kappa <= 1e4 else 1e-2)


@pytest.mark.parametrize("kappa", [1.0, 1e4, 1e6, 1e10])
@pytest.mark.parametrize("shape", [(16, 16), (33, 65), (127, 40)])
def test_accuracy_float64(shape, kappa):
    W = conditioned(shape, kappa, torch.float64)
    expected = by_svd(W, ones)
    assert relative_error(polar(W, "exact"), expected) <= 1e-6
    if kappa <= 1e4:
        assert relative_error(polar(W, "matmul"), expected) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(256, 256), (128, 512)])
def test_accuracy_larger(shape, backend):
    for W in (gaussian(*shape), conditioned(shape, 1e4, torch.float32)):
        assert relative_error(polar(W, backend), by_svd(W, ones)) <= (1e-6 if backend == "exact" else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype, backend):
    W = gaussian(3, 24, 40, dtype=dtype)
    before = W.clone()
    got = polar(W, backend)
    assert got.dtype == dtype
    assert got.shape == W.shape
    assert torch.equal(W, before)
    bound = (1e-6 if backend == "exact" else 1e-4) + torch.finfo(dtype).eps
    assert relative_error(got, by_svd(W, ones)) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4), (3, 0, 4), (2, 3, 4, 0)])
def test_zero_size(shape, backend):
    assert polar(torch.zeros(shape), backend).shape == shape
    assert smooth_polar(torch.zeros(shape), 0.1, backend).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_equals_one_by_one(backend):
    W = gaussian(2, 3, 20, 12)
    W[1, 1] *= 1e-6
    got = polar(W, backend)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], polar(W[i, j], backend), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposes(backend):
    W = gaussian(40, 24)
    torch.testing.assert_close(polar(W.mT, backend), polar(W, backend).mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_invariance_is_exact_for_powers_of_two(dtype, backend):
    W = gaussian(24, 40, dtype=dtype)
    expected = polar(W, backend)
    for power in (-100, -66, -1, 3, 66, 120):
        assert torch.equal(polar(W * 2.0**power, backend), expected), power


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e-37, 1e37])
def test_scale_invariance(scale, backend):
    W = conditioned((24, 40), 10, torch.float32)  # 1e±20 W rounds, and κ amplifies that rounding
    torch.testing.assert_close(polar(W * scale, backend), polar(W, backend), rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ends_of_the_range(backend):
    for dtype, tiny, huge in [(torch.float32, 1e-44, 1e38), (torch.float64, 1e-320, 1e307)]:
        sign = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype))
        for scale in (tiny, huge):
            torch.testing.assert_close(polar(sign * scale, backend), sign, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank"), [(64, 64, 5), (30, 90, 1), (200, 48, 20), (8, 8, 7)])
def test_null_directions_stay_null(m, n, rank, dtype, backend):
    W = low_rank(m, n, rank, dtype=dtype)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    expected = U[:, :rank] @ Vh[:rank]
    assert spectral_error(polar(W, backend), expected) <= (1e-5 if backend == "exact" else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_null_directions(dtype, backend):
    W = gaussian(20, 12, dtype=dtype)
    W[:, 3] = 0
    W[:, 7] = W[:, 5]
    sigma = torch.linalg.svdvals(polar(W, backend).double())
    assert int((sigma > 0.9).sum()) == 10
    assert float(sigma[10:].max()) < 2 * torch.finfo(dtype).eps + 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_matrix(backend):
    W = torch.zeros(3, 6, 4)
    W[1] = gaussian(6, 4)
    got = polar(W, backend)
    assert not got[0].any()
    assert not got[2].any()
    assert relative_error(got[1], by_svd(W[1], ones)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_spoils_only_its_slice(poison, backend):
    W = gaussian(4, 10, 6)
    clean = polar(W, backend)
    W[2, 3, 4] = poison
    got = polar(W, backend)
    assert got[2].isnan().all()
    torch.testing.assert_close(got[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sign_of_every_direction(backend):
    # Nobody tests this: the response to each singular direction is positive, also at small σ.
    W = conditioned((48, 48), 1e4, torch.float32)
    U, _, Vh = torch.linalg.svd(W.double())
    response = torch.einsum("ik,ij,kj->k", U, polar(W, backend).double(), Vh)
    assert float(response.min()) > 0.99
    assert float(response.max()) < 1.01


def test_result_is_detached():
    W = gaussian(4, 4).requires_grad_()
    assert not polar(W).requires_grad


# ---- smoothed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e6])
def test_smooth_accuracy(kappa, eps, backend):
    for shape in [(64, 64), (40, 100)]:
        W = conditioned(shape, kappa, torch.float32)
        expected = by_svd(W, lambda s: s / torch.hypot(s, torch.tensor(eps)))
        assert spectral_error(smooth_polar(W, eps, backend), expected) <= (1e-6 if backend == "exact" else 3e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smooth_takes_one_width_per_matrix(backend):
    W = gaussian(3, 20, 12)
    eps = torch.tensor([1e-3, 1.0, 1e3])
    got = smooth_polar(W, eps, backend)
    for i in range(3):
        torch.testing.assert_close(got[i], smooth_polar(W[i], float(eps[i]), backend), rtol=1e-5, atol=2e-6)
    assert smooth_polar(W, torch.tensor([1.0, 0.0, -1.0]), backend).isnan().flatten(1).all(1).tolist() == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_smooth_extremes(backend):
    W = gaussian(12, 12)
    torch.testing.assert_close(smooth_polar(W, 1e12, backend) * 1e12, W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        smooth_polar(W * 2.0**-80, 0.5 * 2.0**-80, backend), smooth_polar(W, 0.5, backend), rtol=0, atol=0
    )
    assert not smooth_polar(torch.zeros(4, 5), 1e-3, backend).any()


def test_smooth_equals_polar_of_the_augmented_matrix():
    W = gaussian(20, 8, dtype=torch.float64)
    augmented = torch.cat([W, 0.3 * torch.eye(8, dtype=torch.float64)])
    torch.testing.assert_close(smooth_polar(W, 0.3), polar(augmented)[:20], rtol=0, atol=1e-12)


# ---- backends ---------------------------------------------------------------------------------------------


# ---- precision settings -----------------------------------------------------------------------------------


@needs.cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_equals_cpu(backend):
    W = conditioned((64, 48), 1e4, torch.float32)
    assert relative_error(polar(W.cuda(), backend).cpu(), by_svd(W, ones)) <= (1e-6 if backend == "exact" else 1e-3)


@needs.cuda
def test_matmul_backend_does_not_synchronise():
    W = gaussian(2, 64, 48).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        polar(W, "matmul")
        smooth_polar(W, 0.1, "matmul")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- properties -------------------------------------------------------------------------------------------

spectra = st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(sigma=spectra, rows=st.integers(0, 6), seed=st.integers(0, 1000), backend=st.sampled_from(BACKENDS))
def test_polar_is_a_partial_isometry_along_W(sigma, rows, seed, backend):
    k = len(sigma)
    W = with_spectrum((k + rows, k), torch.tensor(sigma, dtype=torch.float64), seed)
    polar_factor = polar(W, backend)
    torch.testing.assert_close(polar_factor.mT @ polar_factor, torch.eye(k).double(), rtol=0, atol=1e-6)
    nuclear = float(sum(sigma))
    assert float((polar_factor * W).sum()) == pytest.approx(nuclear, rel=1e-6)  # <U Vᵀ, W> = ‖W‖_*


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [polar, lambda W: smooth_polar(W, 0.1)])
@pytest.mark.parametrize(
    ("W", "error", "message"),
    [
        (torch.ones(3), ValueError, r"W has shape \(3,\).*W\[None\]"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, r"torch\.int64.*W\.float\(\)"),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError, "complex64.*not supported"),
        ([[1.0]], TypeError, "list.*as_tensor"),
        (torch.eye(3).to_sparse(), TypeError, r"layout torch\.sparse_coo; pass W\.to_dense\(\)"),
        (torch.eye(3).to(torch.float8_e4m3fn), TypeError, r"float8_e4m3fn, too coarse.*W\.float\(\)"),
    ],
)
def test_refuses_what_is_no_matrix(function, W, error, message):
    with pytest.raises(error, match=message):
        function(W)


def test_unknown_backend_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"backend='exakt'.*did you mean 'exact'.*auto, exact, matmul"):
        polar(torch.eye(2), "exakt")


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_smooth_refuses_a_width_that_is_none(eps):
    with pytest.raises(ValueError, match=r"eps=.*finite number > 0"):
        smooth_polar(torch.eye(2), eps)
