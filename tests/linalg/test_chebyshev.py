"""The inverse square root by few products: never above it, near it by the stated error, as many products as stated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import by_svd, conditioned, gaussian, orthonormal, relative_error

from rankdecay.linalg import choose_backend, record_backends, shrink
from rankdecay.linalg.chebyshev import FIRST, LAST, TOLERANCE, delta_of, evaluate, index_of, polynomial, shape_of


@given(delta=st.floats(2.0 ** (-LAST / 4), 1e6))
def test_the_tabulated_delta_is_the_next_below(delta):
    index = index_of(torch.tensor(delta, dtype=torch.float64))
    table = float(delta_of(index))
    assert table <= delta * (1 + 1e-12)
    assert table * 2**0.25 > delta * (1 - 1e-12) or int(index) == FIRST


@pytest.mark.parametrize("index", range(FIRST, LAST + 1, 4))
def test_the_polynomial_on_every_eigenvalue(index):
    delta, n = 2 ** (-index / 4), 12
    y = torch.linspace(0, 1, n, dtype=torch.float64)
    Q, beta = orthonormal(n, n, index + 20), torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    G = ((Q * y) @ Q.mT * 3.0)[None]
    for square in (None, G @ G):
        P = evaluate(G, square, beta, [index])[0]
        ratio = torch.diagonal(Q.mT @ P @ Q) / (delta / (y + delta)).sqrt()
        assert float(ratio.max()) <= 1 + 1e-12
        assert float(ratio.min()) >= 1 - 2 * TOLERANCE - 1e-9


def test_products_of_a_polynomial():
    for delta, degree, products in [
        (4, 2, 1),
        (1, 4, 2),
        (0.25, 8, 4),
        (2**-4, 15, 6),
        (2**-6, 30, 9),
        (2**-8, 60, 14),
    ]:
        found = polynomial(round(-4 * math.log2(delta)))
        assert found.degree <= degree
        assert sum(shape_of(found.degree)) - 2 <= products


def test_a_stack_takes_to_each_matrix_its_own_polynomial():
    W = torch.stack([conditioned((40, 24), kappa, torch.float32) for kappa in (1.0, 1e2, 1e5)])
    both = shrink(W, 0.1, "smooth", smoothing=0.1)
    for got, one in zip(both, W, strict=True):
        torch.testing.assert_close(got, shrink(one, 0.1, "smooth", smoothing=0.1), rtol=0, atol=2e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.02, 0.07, 0.13, 0.5, 3.0])
@pytest.mark.parametrize("spectrum", ["flat", "decades", "one"])
def test_the_step_is_within_a_thousandth(spectrum, smoothing):
    W = gaussian(70, 60) if spectrum == "flat" else conditioned((60, 70), 1e5, torch.float32)
    W = W + 300 * gaussian(*W.shape[:1], 1, seed=5) @ gaussian(1, W.shape[1]) if spectrum == "one" else W
    tau = 0.3 * float(torch.linalg.matrix_norm(W, ord=2))
    eps = max(tau, smoothing * float(W.double().norm()))
    step = by_svd(W, lambda s: tau * s / torch.hypot(s, torch.tensor(eps).double()))
    for backend in ("auto", "matmul"):
        assert relative_error(W - shrink(W, tau, "smooth", smoothing=smoothing, backend=backend), step) < 5e-4


def test_a_cpu_multiplies_where_that_is_cheaper_and_decomposes_where_epsilon_is_small():
    W = torch.stack([gaussian(256, 256), conditioned((256, 256), 1e30, torch.float32)])
    assert choose_backend(W.shape, W.device, W.dtype) == "exact"
    for smoothing, ran_by in ((0.0, ["exact"]), (0.13, ["matmul"]), (0.02, ["matmul", "exact"])):
        with record_backends() as ran:
            shrink(W, 1e-6, "smooth", smoothing=smoothing)
        assert ran == ran_by
    for options in ({"keep": 1}, {"preserve_norm": True}):
        with record_backends() as ran:
            shrink(W, 1e-6, "smooth", smoothing=0.13, **options)
        assert ran == ["exact"]
    with record_backends() as ran:
        shrink(W[0].double(), 1e-6, "smooth", smoothing=0.13)
    assert ran == ["exact"]
