"""Matrix functions by products, against a float64 SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import by_svd, conditioned, gaussian, spectral_error, with_spectrum
from minimax import evaluate

from rankdecay.linalg.matmul import (
    cubic_newton_schulz,
    iterate,
    normalised,
    polar_by_products,
    smooth_polar_by_products,
)
from rankdecay.linalg.minimax import SCHEDULES


@given(
    sigma=st.lists(st.floats(1e-4, 1), min_size=1, max_size=6),
    ell=st.sampled_from([1e-1, 1e-3, 1e-6]),
    seed=st.integers(0, 1000),
)
def test_products_evaluate_the_polynomials_on_every_singular_value(sigma, ell, seed):
    values = torch.tensor(sigma, dtype=torch.float64)
    X = with_spectrum((len(sigma) + 2, len(sigma)), values, seed)
    expected = by_svd(X, lambda s: torch.from_numpy(evaluate(SCHEDULES[ell], s.numpy())))
    before = X.clone()
    assert spectral_error(iterate(X, SCHEDULES[ell]), expected) < 1e-7
    assert torch.equal(X, before)


def test_normalising_keeps_zero():
    X = torch.zeros(2, 4, 3, dtype=torch.float64)
    X[1] = gaussian(4, 3, dtype=torch.float64)
    unit, F = normalised(X)
    assert F.flatten().tolist() == pytest.approx([1, float(X[1].norm())])
    assert unit.norm(dim=(-2, -1)).tolist() == pytest.approx([0, 1])


def test_polar_factor_of_a_stack():
    X = torch.stack([conditioned((20, 12), kappa, torch.float64) for kappa in (1.0, 1e3)])
    for got, one in zip(polar_by_products(X), X, strict=True):
        assert spectral_error(got, by_svd(one, torch.ones_like)) < 1e-6


@pytest.mark.parametrize("ratio", [None, 1e-3])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
def test_smoothed_polar_factor_has_the_dtype_of_its_input(eps, ratio):
    X = conditioned((20, 12), 1e3, torch.float32)
    F = float(X.double().norm())
    got = smooth_polar_by_products(X, torch.full((1, 1), eps, dtype=torch.float64), ratio if eps >= 1e-3 * F else None)
    assert got.dtype == torch.float32
    assert spectral_error(got, by_svd(X, lambda s: s / torch.hypot(s, torch.tensor(eps).double()))) < 3e-4


@given(steps=st.integers(1, 12), seed=st.integers(0, 1000))
def test_cubic_steps_are_the_published_cubic(steps, seed):
    X = gaussian(7, 4, seed=seed, dtype=torch.float64)

    def cubic(s):
        s = s / s.norm()
        for _ in range(steps):
            s = s * (3 - s * s) / 2
        return s

    assert spectral_error(cubic_newton_schulz(X, steps), by_svd(X, cubic)) < 1e-9
