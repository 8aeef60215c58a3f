"""Stacks made ready for a matrix function: tall, scaled by a power of two, finite, checked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian

from rankdecay.linalg.stack import (
    decomposed,
    finish,
    finite,
    mark_bad,
    per_matrix,
    power_of_two,
    prepare,
    scaled_down,
    triangular,
)


@given(m=st.integers(1, 5), n=st.integers(1, 5), exponent=st.integers(-120, 120), seed=st.integers(0, 1000))
def test_preparing_is_exact_and_is_undone(m, n, exponent, seed):
    W = gaussian(2, m, n, seed=seed, dtype=torch.float64) * 2.0**exponent
    prepared = prepare(W, torch.float64)
    assert prepared.X.shape == (2, max(m, n), min(m, n))
    assert prepared.wide == (m < n)
    assert float(prepared.X.abs().max()) <= 1
    assert math.frexp(float(prepared.scale[0]))[0] == 0.5  # a power of two
    assert torch.equal(finish(prepared.X * prepared.scale, prepared, torch.float64), W)


def test_a_matrix_that_is_not_finite_is_marked_and_comes_back_as_nan():
    W = gaussian(3, 4, 2)
    W[1, 0, 0] = torch.inf
    prepared = mark_bad(prepare(W, torch.float32), torch.tensor([1.0, 1.0, torch.nan])[:, None, None])
    assert prepared.bad.flatten().tolist() == [False, True, True]
    assert prepared.X.isfinite().all()
    out = finish(prepared.X.clone(), prepared, torch.float32)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_are_exact(dtype):
    exponents = torch.arange(-120, 121)
    assert power_of_two(exponents, dtype).tolist() == [2.0**k for k in range(-120, 121)]


def test_a_level_is_one_number_per_matrix_in_the_units_of_the_stack():
    W = 8 * gaussian(2, 3, 4, 5)
    level = per_matrix("tau", torch.tensor([1.0, -1.0, torch.inf]), W)
    assert level.shape == (1, 3, 1, 1)
    assert level.isnan().flatten().tolist() == [False, True, True]
    assert per_matrix("tau", 3, W).shape == (1, 1, 1, 1)
    prepared = prepare(W, torch.float32)
    torch.testing.assert_close(scaled_down(level, prepared)[0, 0] * prepared.scale[0, 0], level[0, 0].float().double(),
                               check_dtype=False)  # fmt: skip
    assert finite(torch.tensor([torch.nan, torch.inf, 2.0], dtype=torch.float64)).tolist() == [1.0, 2.0**500, 2.0]
    with pytest.raises(ValueError, match=r"tau has shape \(4,\), which does not broadcast"):
        per_matrix("tau", torch.ones(4), W)


@pytest.mark.parametrize(
    "shape", [(7, 40, 40), (40, 80, 80), (2, 10, 120, 100), (2, 300, 260), (3, 60, 400), (1, 300, 300), (90, 90)]
)
@pytest.mark.parametrize("function", [torch.linalg.svd, torch.linalg.svdvals, torch.linalg.qr, triangular])
def test_in_parts_a_decomposition_is_that_of_the_stack(shape, function):
    X = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = function(X)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = decomposed(function, X)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for got, right in zip(
        *((each,) if isinstance(each, torch.Tensor) else each for each in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10)
    assert decomposed(torch.linalg.svdvals, X.requires_grad_()).requires_grad
