"""C of a Gram matrix against what `shrink` makes of the matrix itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankdecay.linalg import record_backends, shrink
from rankdecay.linalg.gram import shrink_factor

RULES = ("prox", "smooth", "polar", "newton_schulz")
#: Largest error of W - W C, as a share of ‖W‖_F + τ. A Gram matrix has 2⁻⁵² of relative error, and the smallest σ/σ_max
#: drawn here is 1e-10 in it: 2e-6 in that direction, and a small factor.
EXACT, PRODUCTS = 5e-6, 5e-5


def draw(seed, rows, columns, condition, rank, dtype):
    rng = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(3, rows, columns, generator=rng, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(3, columns, columns, generator=rng, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)
    sigma[rank:] = 0
    return ((left * sigma) @ right.mT).to(dtype)


@pytest.mark.parametrize("rule", RULES)
@given(
    seed=st.integers(0, 10**6),
    columns=st.integers(1, 24),
    more=st.integers(0, 30),
    condition=st.sampled_from([1.0, 1e2, 1e5]),
    lost=st.integers(0, 4),
    share=st.sampled_from([1e-3, 0.05, 0.5, 3.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_against_the_matrix_itself(rule, seed, columns, more, condition, lost, share, scale):
    W = scale * draw(seed, columns + more, columns, condition, max(1, columns - lost), torch.float32)
    norm = W.double().norm(dim=(-2, -1))
    tau = share * norm * torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    G = W.double().mT @ W.double()
    wanted = shrink(W, tau.float(), rule, smoothing=0.1, backend="exact").double()
    for backend, bound in (("exact", EXACT), ("matmul", PRODUCTS)):
        C = shrink_factor(G, tau, rule, smoothing=0.1, backend=backend)
        got = W.double() - W.double() @ C
        error = (got - wanted).norm(dim=(-2, -1)) / (norm + tau)
        assert error.max() < bound + 5e-7  # the reference rounds too
        assert not C[2].any()


def test_not_finite_spoils_its_own_matrix_only():
    W = torch.randn(4, 9, 5, dtype=torch.float64)
    G = W.mT @ W
    G[1, 2, 3] = G[1, 3, 2] = torch.nan
    G[2, 0, 0] = torch.inf
    tau = torch.tensor([0.1, 0.1, 0.1, torch.inf])
    for backend in ("exact", "matmul"):
        C = shrink_factor(G, tau, backend=backend)
        assert [bool(c.isnan().all()) for c in C] == [False, True, True, True]
        torch.testing.assert_close(W[0] - W[0] @ C[0], shrink(W[0], 0.1), rtol=1e-9, atol=1e-9)


def test_nothing_is_left_of_what_is_all_taken():
    W = torch.randn(2, 9, 5, dtype=torch.float64)
    C = shrink_factor(W.mT @ W, torch.tensor([100.0, 0.1]))
    assert not (W[0] - W[0] @ C[0]).any()
    assert (W[1] - W[1] @ C[1]).any()


def test_a_zero_matrix_and_none_at_all():
    for backend in ("exact", "matmul"):
        assert shrink_factor(torch.zeros(2, 3, 3, dtype=torch.float64), torch.ones(2), backend=backend).isfinite().all()
        assert shrink_factor(torch.zeros(0, 3, 3, dtype=torch.float64), torch.ones(0), backend=backend).shape[0] == 0


def test_eigenvectors_that_do_not_come_are_replaced(monkeypatch):
    W = torch.randn(2, 6, 4, dtype=torch.float64)

    def fail(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with record_backends() as ran:
        C = shrink_factor(W.mT @ W, torch.full((2,), 0.3))
    assert ran == ["exact", "svd"]
    monkeypatch.undo()
    torch.testing.assert_close(W - W @ C, shrink(W, 0.3), rtol=1e-8, atol=1e-8)


def test_unknown_names():
    G = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rule='proxy' is unknown.*'prox'"):
        shrink_factor(G, torch.tensor(0.1), "proxy")
    with pytest.raises(ValueError, match="backend='auto' is unknown"):
        shrink_factor(G, torch.tensor(0.1), backend="auto")
