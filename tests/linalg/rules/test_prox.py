"""The soft threshold against a float64 SVD, and its algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import (
    DTYPES,
    by_svd,
    conditioned,
    dimensions,
    levels,
    random_matrix,
    rounding,
    seeds,
    slow_is_fine,
    spectral_error,
    thresholded,
)

from rankdecay.linalg import (
    polar,
    soft_threshold,
    spectral_clip,
)

BACKENDS = ["exact", "matmul"]
TAUS = [1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 0.5, 0.999, 1.5, 1e3]


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold_accuracy(dtype, kappa, tau):
    for shape in [(33, 65), (40, 40), (1, 7), (127, 20)]:
        W = conditioned(shape, kappa, dtype)
        # S_τ(W) = W - clip_τ(W): putting σ - τ together again would add the SVD's own rounding to the reference.
        expected = W.double() - by_svd(W, lambda s: s.clamp_max(tau))
        error = spectral_error(soft_threshold(W, tau, "exact"), expected)
        assert error <= 1e-6 * tau + rounding(W), shape


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6])
def test_soft_threshold_accuracy_by_products(kappa, tau):
    # What this backend reaches in float32, as its docstring says: not the 1e-6 τ of the exact one.
    for shape in [(33, 65), (40, 40), (1, 7), (127, 20)]:
        W = conditioned(shape, kappa, torch.float32)
        got = soft_threshold(W, tau, "matmul")
        error = spectral_error(got, by_svd(W, thresholded(tau)))
        assert error <= 2e-5 * min(tau, 1) + 1e-6 + 3e-7 * float(W.norm()), shape


@slow_is_fine
@given(m=dimensions, n=dimensions, a=levels, b=levels, seed=seeds)
def test_soft_threshold_composes(m, n, a, b, seed):
    W = random_matrix(m, n, seed)
    twice = soft_threshold(soft_threshold(W, b), a)
    torch.testing.assert_close(twice, soft_threshold(W, a + b), rtol=0, atol=1e-10)


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds, distance=st.floats(1e-6, 10))
def test_soft_threshold_is_non_expansive(m, n, tau, seed, distance):
    A = random_matrix(m, n, seed)
    B = A + distance * random_matrix(m, n, seed + 1)
    apart = float((soft_threshold(A, tau) - soft_threshold(B, tau)).norm())
    assert apart <= float((A - B).norm()) * (1 + 1e-9) + 1e-12


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds, backend=st.sampled_from(BACKENDS))
def test_moreau_identity(m, n, tau, seed, backend):
    W = random_matrix(m, n, seed)
    clipped = spectral_clip(W, tau, backend)
    total = soft_threshold(W, tau, backend) + clipped
    torch.testing.assert_close(total, W, rtol=0, atol=1e-10)
    if backend == "exact":
        assert float(torch.linalg.matrix_norm(clipped, ord=2)) <= tau * (1 + 1e-9) + 1e-12


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds)
def test_soft_threshold_is_the_proximal_map(m, n, tau, seed):
    # W - S is τ times a subgradient at S: <W - S, S> = τ ‖S‖_* and ‖W - S‖₂ <= τ.
    W = random_matrix(m, n, seed)
    S = soft_threshold(W, tau)
    nuclear = float(torch.linalg.matrix_norm(S, ord="nuc"))
    assert float(((W - S) * S).sum()) == pytest.approx(tau * nuclear, abs=1e-9)
    assert float(torch.linalg.matrix_norm(W - S, ord=2)) <= tau + 1e-10


@slow_is_fine
@given(m=dimensions, n=dimensions, c=st.floats(1e-6, 1e6), seed=seeds)
def test_homogeneity(m, n, c, seed):
    W = random_matrix(m, n, seed)
    torch.testing.assert_close(soft_threshold(c * W, c * 0.5) / c, soft_threshold(W, 0.5), rtol=0, atol=1e-10)
    torch.testing.assert_close(polar(c * W), polar(W), rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 1e-6, 1e-2, 0.5, 10.0])
def test_spectral_clip_accuracy(beta, backend):
    W = conditioned((40, 64), 1e4, torch.float32)
    expected = by_svd(W, lambda s: s.clamp_max(beta))
    assert spectral_error(spectral_clip(W, beta, backend), expected) <= (3e-7 if backend == "exact" else 4e-6)
