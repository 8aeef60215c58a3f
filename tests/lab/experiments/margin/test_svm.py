"""The max-margin problems: closed forms, certificates, and what cannot be separated."""

import cvxpy
import numpy as np
import pytest

from rankdecay.lab import convex
from rankdecay.lab.convex import solve
from rankdecay.lab.experiments.margin.data import differences, draw
from rankdecay.lab.experiments.margin.svm import max_margin, separable

NORMS = {"nuclear": lambda W: np.linalg.norm(W, "nuc"), "frobenius": np.linalg.norm}


def constraints(kind="generic", n=4, L=4, d=8, which=0):
    data = draw(kind, range(which + 1), n, L, d, 4.0)
    return data, differences(data, which, data.optimal[which])


@pytest.mark.parametrize("norm", NORMS)
def test_under_assumption_A4_both_have_the_closed_form(norm):
    """docs/theory.md section 7.4: d = 6, n = 3, L = 5; one W, of rank n, solves both."""
    data, A = constraints("aligned", 3, 5, 6)
    best, z = data.tokens[0, :, 0], data.queries[0]
    c = np.einsum("ik,ilk->il", best, data.tokens[0])[:, 1:].max(1)
    closed = np.einsum("i,ik,iq->kq", 1 / ((1 - c) * (z**2).sum(1)), best, z)
    found = max_margin(A, norm)
    np.testing.assert_allclose(found.W, closed, atol=1e-5)
    assert found.norm == pytest.approx(NORMS[norm](closed), rel=1e-6)
    assert found.rank == 3


def test_where_rounding_stops_the_solver_it_is_asked_for_less_and_no_worse_is_taken(monkeypatch):
    """On this data set the solver of cvxpy 1.9 does not get to 1e-10, and warns."""
    _, A = constraints(n=6, L=8, d=10, which=16)
    found = max_margin(A, "nuclear")
    assert (A * found.W).sum((1, 2)).min() > 1 - 1e-6
    assert found.norm == pytest.approx(np.linalg.norm(found.W, "nuc"), rel=1e-6)
    monkeypatch.setattr(convex, "TOLERANCE", 1e-30)
    monkeypatch.setattr(convex, "LARGEST_TOLERANCE", 1e-25)
    with pytest.raises(RuntimeError, match="no solution to 1e-25"):
        max_margin(A, "nuclear")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", [0, 1])
def test_the_solution_is_feasible_and_as_small_as_duality_allows(norm, which):
    """Any u ≥ 0 with ‖Σ u_a A_a‖ ≤ 1 in the dual norm bounds the norm from below by Σ u; the best u attains it."""
    _, A = constraints(which=which)
    found = max_margin(A, norm)
    assert (A * found.W).sum((1, 2)).min() > 1 - 1e-6
    assert found.norm == pytest.approx(NORMS[norm](found.W), rel=1e-6)
    u = cvxpy.Variable(len(A), nonneg=True)
    combined = cvxpy.sum([u[a] * A[a] for a in range(len(A))])
    dual = cvxpy.sigma_max(combined) if norm == "nuclear" else cvxpy.norm(combined, "fro")
    assert solve(cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(u)), [dual <= 1])) == pytest.approx(found.norm, rel=1e-6)


def test_each_norm_is_least_where_it_should_be():
    _, A = constraints()
    nuclear, frobenius = max_margin(A, "nuclear"), max_margin(A, "frobenius")
    assert NORMS["nuclear"](nuclear.W) < NORMS["nuclear"](frobenius.W) * 0.99
    assert NORMS["frobenius"](frobenius.W) < NORMS["frobenius"](nuclear.W) * 0.99
    assert nuclear.rank < frobenius.rank


def test_diagonal_weights_have_the_l1_and_the_l2_norm():
    from scipy.optimize import linprog

    _, A = constraints("equal", 4, 3, 20)
    B = np.diagonal(A, axis1=1, axis2=2)
    programme = linprog(np.ones(40), A_ub=np.c_[-B, B], b_ub=-np.ones(len(B)))  # an independent solver
    l1, l2 = max_margin(B, "nuclear"), max_margin(B, "frobenius")
    assert l1.norm == pytest.approx(programme.fun, rel=1e-6)
    assert l1.norm == pytest.approx(abs(np.diag(l1.W)).sum(), rel=1e-6)
    assert np.linalg.norm(l2.W) < np.linalg.norm(l1.W)
    assert l1.rank < l2.rank == 20
    assert (B @ np.diag(l2.W)).min() > 1 - 1e-6


def test_what_cannot_be_separated_has_no_solution():
    _, A = constraints()
    assert separable(A)
    against = np.concatenate([A, -A[:1]])
    assert not separable(against)
    assert max_margin(against, "nuclear") is None
    assert not separable(np.concatenate([A, np.zeros_like(A[:1])]))  # two equal tokens
    _, many = constraints(n=6, L=8, d=4)
    assert not separable(np.diagonal(many, axis1=1, axis2=2))  # 42 constraints on 4 numbers
