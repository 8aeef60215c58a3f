"""The convex solver against closed forms, and the factorised optimum against the solver."""

import cvxpy
import numpy as np
import pytest
import torch

from rankdecay.lab.convex import nuclear_fit, solve
from rankdecay.lab.experiments.factor.factorised import Method, Training, duality_gap, product


def soft(target: np.ndarray, strength: float) -> np.ndarray:
    U, S, Vh = np.linalg.svd(target, full_matrices=False)
    return (U * np.maximum(S - strength, 0)) @ Vh


@pytest.mark.parametrize("shape", [(5, 5), (3, 6)])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.5, 50.0])
def test_with_everything_observed_it_is_the_soft_threshold(shape, strength):
    target = np.random.default_rng(0).standard_normal(shape)
    optimum = nuclear_fit(target, strength)
    expected = soft(target, strength)
    objective = 0.5 * ((expected - target) ** 2).sum() + strength * np.linalg.norm(expected, "nuc")
    assert optimum.objective == pytest.approx(objective, rel=1e-8, abs=1e-8)
    np.testing.assert_allclose(optimum.W, expected, atol=1e-5)


@pytest.mark.parametrize("strength", [0.02, 0.1])
def test_completion_by_factors_is_the_nuclear_norm_optimum(strength):
    """The optimum of the two factors is the solver's, to 1e-9 in the objective: about the precision of the solver."""
    rng = np.random.default_rng(4)
    target = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 6))
    target /= np.linalg.norm(target, 2)
    mask = (rng.random((6, 6)) < 0.7).astype(float)
    D, M, strengths = (torch.from_numpy(x)[None] for x in (target, mask, np.array(strength)))
    factors = [0.4 * torch.from_numpy(rng.standard_normal((1, 6, 6))) for _ in range(2)]
    by_factors = Training(factors, D, strengths, Method(0.03, "adam"), M)
    by_prox = Training([torch.zeros_like(D)], D, strengths, Method(1.0, decay="prox"), M)
    for _ in range(2000):  # where this problem has settled; Adam's steps become erratic long after
        by_factors.step()
    for _ in range(500):
        by_prox.step()
    optimum = nuclear_fit(target, strength, mask)
    for training in (by_factors, by_prox):
        W = product(training.factors)
        assert duality_gap(W, D, strengths, M).item() < 1e-7
        ended = W[0].numpy()
        objective = 0.5 * ((mask * (ended - target)) ** 2).sum() + strength * np.linalg.norm(ended, "nuc")
        assert objective == pytest.approx(optimum.objective, abs=1e-9)
        np.testing.assert_allclose(ended, optimum.W, atol=1e-4)


def test_a_problem_without_a_solution_is_said_to_be_so():
    x = cvxpy.Variable()
    with pytest.raises(RuntimeError, match="infeasible"):
        solve(cvxpy.Problem(cvxpy.Minimize(x), [x >= 1, x <= 0]))
    with pytest.raises(RuntimeError, match="unbounded"):
        solve(cvxpy.Problem(cvxpy.Minimize(x)))
