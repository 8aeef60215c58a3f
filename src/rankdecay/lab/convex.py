"""Reference solutions of the convex problems behind the experiments, by an interior-point solver (cvxpy, Clarabel).

They share no code with what they check and are solved one at a time, so they are for small matrices.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import cvxpy

LARGEST = 20  # rows or columns up to which a nuclear norm is solved in about a second
TOLERANCE = 1e-10  # asked of the solver; objectives of the size of one agreed with closed forms to 1e-9
LARGEST_TOLERANCE = 1e-7  # asked where rounding keeps it from the first


@dataclass(frozen=True)
class Optimum:
    """A convex problem's solution."""

    W: np.ndarray  # (m, n)
    objective: float


def nuclear_fit(target: np.ndarray, strength: float, mask: np.ndarray | None = None) -> Optimum:
    """The minimum of ½‖M ⊙ (W - D)‖² + λ‖W‖_* over all matrices W.

    Args:
        target: D, shape (m, n).
        strength: λ ≥ 0.
        mask: M, shape (m, n), 1 where an entry is observed; everything is observed without one.

    Raises:
        RuntimeError: If the solver finds no solution.
    """
    import cvxpy

    W = cvxpy.Variable(target.shape)
    missed = W - target if mask is None else cvxpy.multiply(mask, W - target)
    objective = 0.5 * cvxpy.sum_squares(missed) + strength * cvxpy.normNuc(W)
    value = solve(cvxpy.Problem(cvxpy.Minimize(objective)))
    assert W.value is not None
    return Optimum(np.asarray(W.value), value)


def solve(problem: cvxpy.Problem) -> float:
    """Solve a problem to `TOLERANCE`, else to `LARGEST_TOLERANCE`, and return its objective.

    The variables hold the solution.

    Raises:
        RuntimeError: If the solver finds no solution, or one that may be further off.
    """
    import cvxpy

    for tolerance in (TOLERANCE, LARGEST_TOLERANCE):
        tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Solution may be inaccurate")  # which is then not taken
                problem.solve(solver=cvxpy.CLARABEL, **tolerances)
        except cvxpy.SolverError as error:
            raise RuntimeError(f"Clarabel failed ({error}).") from error
        if problem.status != cvxpy.OPTIMAL_INACCURATE:
            break
    if problem.status != cvxpy.OPTIMAL or problem.value is None:
        raise RuntimeError(f"Clarabel found no solution to {LARGEST_TOLERANCE:g}: the problem is {problem.status}.")
    return float(problem.value)  # pyright: ignore[reportArgumentType]
