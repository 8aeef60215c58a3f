r"""Scores under rotary positions as a function of planes, and what L2 on W_Q and W_K is for them.

Plane j of frequency f_j is two rows of W_Q and of W_K, written as complex vectors a_j and b_j; query heads that share
their keys have their a_j one below the other. At distance Δ the scores are

.. math::  S_\Delta = \sum_j \mathrm{Re}(e^{i f_j \Delta} H_j), \qquad H_j = \bar a_j b_j^\top,

linear in the :math:`H_j`, so that ½ Σ_Δ ‖S_Δ - S*_Δ‖², divided by half the number of offsets, is
``½⟨H - H*, M (H - H*)⟩`` with a matrix M that couples the planes (`coupling`; the identity for Fourier frequencies).

**What L2 is.** ``½(‖a_j‖² + ‖b_j‖²) ≥ ‖a_j‖‖b_j‖ = ‖H_j‖_*``, with equality once a_j and b_j have one norm, which every
stationary point has; nothing else of a plane is free. So L2 of λ on W_Q and W_K has the minima of

.. math::  \tfrac12\langle H - H^*, M(H - H^*)\rangle + \lambda \sum_j \lVert H_j \rVert_*,
    \qquad \mathrm{rank}_{\mathbb C} H_j \le 1,

a group penalty over planes. It is *not* a convex problem, because of the ranks. Without them it is, and its minimum
is a lower bound; where that has no plane of higher rank both minima are one. `duality_gap` bounds from one candidate
how far it is above the convex minimum, and so above its own: where it is small, the candidate is a global minimum of
both. Where it is not, the gap may be the ranks' or the candidate's, and nothing is proven. For Fourier frequencies M
is the identity, and each plane is by itself the largest singular value of H*_j, soft-thresholded (Eckart and Young).

Without positions (one offset, 0) S = Σ_j Re H_j = W_QᵀW_K, and the same formulas give ‖S‖_*, a nuclear norm over all
planes together.

Problems are on the leading axis; H has shape (problems, planes, heads · width, width), complex.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores to be fitted.

    Attributes:
        coupling: M, shape (2 · planes, 2 · planes): of the real parts of all planes, then of the imaginary ones.
        target: H*.
        strength: λ, shape (problems,).
    """

    coupling: Tensor
    target: Tensor
    strength: Tensor

    def slope(self, difference: Tensor) -> Tensor:
        """M applied to H - H*: the gradient of the fit by H, of the shape of H."""
        parts = torch.cat([difference.real, difference.imag], 1)
        mixed = torch.einsum("pq,bqlr->bplr", self.coupling, parts)
        return torch.complex(*mixed.chunk(2, 1))

    def fit(self, H: Tensor) -> Tensor:
        """½⟨H - H*, M (H - H*)⟩, shape (problems,)."""
        difference = H - self.target
        return 0.5 * inner(difference, self.slope(difference))


def inner(left: Tensor, right: Tensor) -> Tensor:
    """The real inner product of two stacks of complex matrices, per problem."""
    return (left.conj() * right).real.sum((1, 2, 3))


def coupling(frequencies: Tensor, offsets: Tensor) -> Tensor:
    """M of the scores at some offsets.

    Args:
        frequencies: f, shape (planes,).
        offsets: Δ, shape (offsets,); the single 0 for no positions.
    """
    angles = offsets[:, None] * frequencies
    basis = torch.cat([angles.cos(), -angles.sin()], 1)
    return basis.mT @ basis * (2 / len(offsets) if len(offsets) > 1 else 1.0)


def products(a: Tensor, b: Tensor) -> Tensor:
    """H_j = conj(a_j) b_jᵀ of a (problems, planes, heads · width) and b (problems, planes, width)."""
    return a.conj()[..., :, None] * b[..., None, :]


def rows(plane: Tensor) -> Tensor:
    """The rows of W_Q or W_K: real parts of all planes, then imaginary ones, (problems, 2 · planes, columns)."""
    return torch.cat([plane.real, plane.imag], 1)


def objective(scores: Scores, a: Tensor, b: Tensor) -> Tensor:
    """The loss with λ/2 (‖W_Q‖² + ‖W_K‖²), per problem."""
    squares = a.abs().square().sum((1, 2)) + b.abs().square().sum((1, 2))
    return scores.fit(products(a, b)) + scores.strength / 2 * squares


def gradients(scores: Scores, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `objective` by the rows of W_Q and of W_K, written as a and b are."""
    G = scores.slope(products(a, b) - scores.target)
    weight = scores.strength[:, None, None]
    return (G.conj() @ b[..., None])[..., 0] + weight * a, (G.mT @ a[..., None])[..., 0] + weight * b


def nuclear(H: Tensor) -> Tensor:
    """Σ_j ‖H_j‖_*, per problem."""
    return torch.linalg.svdvals(H).sum((1, 2))


def solve(scores: Scores, iterations: int) -> Tensor:
    """The convex problem, by accelerated proximal gradient steps from 0: soft thresholds of every plane.

    Args:
        scores: the problem.
        iterations: at most; it ends where every `duality_gap` is below 1e-12, without decay aside.
    """
    size = 1 / float(torch.linalg.eigvalsh(scores.coupling)[-1])
    H = momentum = torch.zeros_like(scores.target)
    t = 1.0
    for number in range(iterations):
        U, S, Vh = torch.linalg.svd(momentum - size * scores.slope(momentum - scores.target), full_matrices=False)
        S = (S - size * scores.strength[:, None, None]).clamp(min=0)
        new = (U * S[..., None, :]) @ Vh
        # momentum is dropped where it points uphill (O'Donoghue and Candès)
        uphill = inner(momentum - new, new - H) > 0
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        share = torch.where(uphill, 0.0, (t - 1) / t_new)[:, None, None, None]
        H, momentum, t = new, new + share * (new - H), t_new
        if number % 20 == 19:
            value = scores.fit(H) + scores.strength * nuclear(H)
            if bool(((duality_gap(scores, H, value) < 1e-12) | (scores.strength == 0)).all()):
                break
    return H


def duality_gap(scores: Scores, H: Tensor, value: Tensor) -> Tensor:
    """How far an objective can be above the minimum of the convex problem, per problem.

    For every Y with ‖(M Y)_j‖₂ ≤ λ in every plane the minimum is at least ⟨Y, M H*⟩ - ½⟨Y, M Y⟩ (Fenchel duality); Y
    here is H* - H, scaled down into that set. It certifies an optimum without a solver.

    Args:
        scores: the problem.
        H: a candidate.
        value: its objective, shape (problems,).
    """
    Y = scores.target - H
    seen = scores.slope(Y)
    largest = torch.linalg.matrix_norm(seen, 2).amax(1)
    along, square = inner(seen, scores.target), inner(Y, seen)
    best = along / square.clamp(min=1e-300)
    scale = torch.minimum(best, scores.strength / largest.clamp(min=1e-300)).clamp(min=0)
    return value - scale * along + 0.5 * scale.square() * square
