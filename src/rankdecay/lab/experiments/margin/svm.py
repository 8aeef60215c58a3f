"""The max-margin problems that the flow is held against, by an interior-point solver.

``min ‖W‖  s.t.  ⟨A_a, W⟩ ≥ 1`` over all constraints a, with ``A = (x_s - x_l) zᵀ``: the nuclear or Frobenius norm of a
matrix, the ℓ1 or ℓ2 norm of a diagonal one. The rank constraint of Sheen et al. (``rank W ≤ d_e``) is left out; the
rank of the solution says whether it would have bound.

Components of W outside the span of the tokens' differences and of the queries change no margin and add to the norm, so
the problem is solved in that span. A linear programme says first whether the constraints can be met at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rankdecay.lab.convex import solve

Norm = Literal["nuclear", "frobenius"]
ZERO = 1e-5  # of the largest singular value: the solver leaves about 1e-7


@dataclass(frozen=True)
class Solution:
    """The solution of one max-margin problem."""

    W: np.ndarray  # (d, d)
    norm: float
    rank: int


def separable(constraints: np.ndarray) -> bool:
    """Whether some W has every margin positive: by a linear programme.

    Args:
        constraints: A, shape (constraints, d, d), or (constraints, d) for diagonal W.
    """
    from scipy.optimize import linprog

    A = constraints.reshape(len(constraints), -1)
    A = A / np.linalg.norm(A, axis=1, keepdims=True).clip(min=1e-300)
    A = A @ np.linalg.qr(A.T)[0] if A.shape[1] > A.shape[0] else A
    # the largest common margin with entries of at most 1: zero if there is none
    width = A.shape[1]
    found = linprog(
        np.r_[np.zeros(width), -1.0],
        A_ub=np.c_[-A, np.ones(len(A))],
        b_ub=np.zeros(len(A)),
        bounds=[(-1, 1)] * width + [(0, None)],
    )
    return found.status == 0 and -found.fun > 1e-9


def max_margin(constraints: np.ndarray, norm: Norm) -> Solution | None:
    """The W of least norm with every margin at least 1, or None where no W has.

    Args:
        constraints: A, shape (constraints, d, d), or (constraints, d) for diagonal W, of which the nuclear norm is ℓ1.
        norm: the norm that is minimised.

    Raises:
        RuntimeError: If the solver finds no solution though there is one.
    """
    import cvxpy

    if not separable(constraints):
        return None
    if constraints.ndim == 2:
        w = cvxpy.Variable(constraints.shape[1])
        objective = cvxpy.norm1(w) if norm == "nuclear" else cvxpy.sum_squares(w)
        value = solve(cvxpy.Problem(cvxpy.Minimize(objective), [constraints @ w >= 1]))
        assert w.value is not None
        W = np.diag(w.value)
    else:
        left = _span(constraints.transpose(0, 2, 1).reshape(-1, constraints.shape[1]))
        right = _span(constraints.reshape(-1, constraints.shape[2]))
        A = left.T @ constraints @ right  # (constraints, r, c)
        core = cvxpy.Variable(A.shape[1:])
        objective = cvxpy.normNuc(core) if norm == "nuclear" else cvxpy.sum_squares(core)
        margins = A.reshape(len(A), -1) @ cvxpy.vec(core, order="C")
        value = solve(cvxpy.Problem(cvxpy.Minimize(objective), [margins >= 1]))
        assert core.value is not None
        W = left @ core.value @ right.T
    sigma = np.linalg.svd(W, compute_uv=False)
    size = value if norm == "nuclear" else float(np.sqrt(value))
    return Solution(W, size, int((sigma > ZERO * sigma[0]).sum()))


def _span(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the span of some rows, shape (d, r)."""
    _, sigma, Vh = np.linalg.svd(rows, full_matrices=False)
    return Vh[sigma > 1e-10 * sigma[0]].T
