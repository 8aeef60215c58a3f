"""The smoothed soft threshold: its ramp, and how near the prox it stays."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import (
    dimensions,
    gaussian,
    random_matrix,
    seeds,
    slow_is_fine,
)

from rankdecay.linalg import (
    shrink,
    smooth_polar,
)

BACKENDS = ["exact", "matmul"]


def test_smoothing_widens_the_ramp():
    W, tau = gaussian(2, 12, 8, dtype=torch.float64), 1e-3
    for i in range(2):
        eps = max(tau, 0.1 * float(W[i].norm()))
        expected = W[i] - tau * smooth_polar(W[i], eps)
        torch.testing.assert_close(shrink(W, tau, "smooth", smoothing=0.1)[i], expected, rtol=0, atol=1e-12)


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=st.floats(1e-3, 5), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_smooth_never_overshoots_and_stays_near_the_prox(m, n, tau, seed, backend):
    W = random_matrix(m, n, seed)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    response = torch.einsum("ik,ij,kj->k", U, shrink(W, tau, "smooth", backend=backend), Vh)
    prox = (sigma - tau).clamp_min(0)
    assert float(response.min()) >= -1e-6
    # ε = τ: at most (1 - 1/√2) τ = 0.293 τ away from the prox (docs/theory.md section 2.3).
    assert float((response - prox).abs().max()) <= 0.2930 * tau + 1e-6
