r"""Decay of the factors of a matrix, and what it does to the matrix: thousands of small problems at once.

A problem fits :math:`W = F_1 F_2 \cdots F_L` to a target D, on the observed entries M:

.. math::

    \mathcal L(F) = \tfrac12 \lVert M \odot (F_1 \cdots F_L - D) \rVert^2
        + \tfrac\lambda2 \sum_l \lVert F_l \rVert^2 .

With two factors, A = F₁ and B = F₂ᵀ, that is the nuclear-norm problem ``½‖M ⊙ (W - D)‖² + λ‖W‖_*`` (Kobayashi, Akram &
von Oswald, arXiv 2410.23819; Srebro & Shraibman 2005), because ``‖ABᵀ‖_* ≤ ½(‖A‖² + ‖B‖²)`` with equality where
AᵀA = BᵀB, which holds at every stationary point (Lemma 3.2). With L factors it is a Schatten quasi-norm,
``(λL/2) Σ σ^(2/L)``; with one it is ridge regression.

**What is known on the way** (Appendix B there), tested in ``tests/lab/experiments/factor/test_factorised.py``:

* Lemma B.1: under gradient flow AᵀA - BᵀB decays exactly as e^(-2λt), so by 2ηλ per step of gradient descent. A step
  multiplies it by (1 - ηλ)², but for a term of order η²: the rate of descent is -2 ln(1 - ηλ), a little faster.
* Proposition B.4 (Powers-Størmer): the gap ``½(‖A‖² + ‖B‖²) - ‖ABᵀ‖_*`` is at most
  ``√‖AᵀA - BᵀB‖_* (‖A‖_* + ‖B‖_*)/2``.
* Proposition B.2: with momentum, noise and decoupled decay the same exponential, and beside it an integral of the
  momentum's products with A and B, which leaves a floor (`Diffusion`).
* With everything observed each singular value obeys a scalar equation of its own (`shrunk`), for L = 2 the soft
  threshold max(s - λ, 0); one at the threshold itself decays like 1/(2ηt) (`borderline`).

Problems are on the leading axis of every tensor; each is trained as it would be alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rankdecay.linalg import soft_threshold
from rankdecay.linalg.threshold import shrink_by

Factors = list[Tensor]  # F_1 (problems, m, r), F_2 … (problems, r, r), F_L (problems, r, n)
Optimizer = Literal["gd", "momentum", "adam"]
Decay = Literal["loss", "decoupled", "prox"]


# --- the objective and its gradients ---


def product(factors: Factors) -> Tensor:
    """The matrices W = F_1 ⋯ F_L, shape (problems, m, n)."""
    return reduce(torch.matmul, factors)


def residual(W: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The gradient of the fit with respect to W: M ⊙ (W - D), shape (problems, m, n).

    Args:
        W: shape (problems, m, n).
        target: D, of a shape that broadcasts to W's.
        mask: M, 1 where an entry is observed and 0 elsewhere; everything is observed without one.
    """
    return W - target if mask is None else (W - target).mul_(mask)


def fit(W: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """½‖M ⊙ (W - D)‖², shape (problems,); arguments as in `residual`."""
    return 0.5 * squared_norm(residual(W, target, mask))


def gradients(factors: Factors, slope: Tensor) -> Factors:
    """The gradients with respect to every factor, from that with respect to the product.

    Args:
        factors: F_1, …, F_L.
        slope: the gradient with respect to W, shape (problems, m, n).
    """
    found: Factors = []
    for factor, after in zip(factors[:-1], _suffixes(factors), strict=True):
        found.append(slope @ after.mT)
        slope = factor.mT @ slope  # what is left for the factors behind this one
    return [*found, slope]


def _suffixes(factors: Factors) -> Factors:
    """For each factor but the last, the product of those behind it."""
    found = list(factors[-1:])
    for factor in reversed(factors[1:-1]):
        found.append(factor @ found[-1])
    return found[::-1][: len(factors) - 1]


def squared_norm(W: Tensor) -> Tensor:
    """‖W‖² per problem, shape (problems,)."""
    return W.square().sum((-2, -1))


def objective(factors: Factors, target: Tensor, strength: Tensor, mask: Tensor | None = None) -> Tensor:
    """The decayed loss of the factors, shape (problems,); ``strength`` has that shape too."""
    return fit(product(factors), target, mask) + strength / 2 * _sum_of_squares(factors)


def _sum_of_squares(factors: Factors) -> Tensor:
    return torch.stack([squared_norm(factor) for factor in factors]).sum(0)


# --- how far the factors are from balanced ---


def quasi_norm(singular_values: Tensor, depth: int) -> Tensor:
    """Σ σ^(2/L): the Schatten-2/L quasi-norm to the power 2/L, for L = 2 the nuclear norm; over the last axis."""
    return singular_values.clamp(min=0).pow(2 / depth).sum(-1)


def gap(factors: Factors, singular_values: Tensor | None = None) -> Tensor:
    """(1/L) Σ ‖F_l‖² - Σ σ^(2/L) per problem: never negative, and zero only where the factors are balanced.

    Args:
        factors: F_1, …, F_L.
        singular_values: of their product, if they are known; shape (problems, min(m, n)).
    """
    sigma = torch.linalg.svdvals(product(factors)) if singular_values is None else singular_values
    return _sum_of_squares(factors) / len(factors) - quasi_norm(sigma, len(factors))


def differences(factors: Factors) -> Factors:
    """F_lᵀF_l - F_{l+1}F_{l+1}ᵀ of each neighbouring pair, shape (problems, r, r); for two factors AᵀA - BᵀB."""
    return [left.mT @ left - right @ right.mT for left, right in pairwise(factors)]


def imbalance(factors: Factors) -> Tensor:
    """‖AᵀA - BᵀB‖ per problem, the largest over neighbouring pairs; 0 for a single matrix."""
    norms = [squared_norm(difference).sqrt() for difference in differences(factors)]
    return torch.stack(norms).amax(0) if norms else torch.zeros_like(factors[0][..., 0, 0])


def gap_bound(factors: Factors) -> Tensor:
    """The bound of Proposition B.4 on the gap of two factors: √‖AᵀA - BᵀB‖_* (‖A‖_* + ‖B‖_*)/2, per problem."""
    (difference,) = differences(factors)
    nuclear = torch.linalg.eigvalsh(difference).abs().sum(-1)
    return nuclear.sqrt() * torch.stack([torch.linalg.svdvals(f).sum(-1) for f in factors]).mean(0)


def balanced(W: Tensor, depth: int) -> Factors:
    """Factors of W that attain the quasi-norm: U S^(1/L), S^(1/L), …, S^(1/L) Vᵀ (Proposition 3.1).

    Args:
        W: shape (problems, m, n).
        depth: L, the number of factors.
    """
    if depth == 1:
        return [W]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S.pow(1 / depth)
    middle = [torch.diag_embed(root) for _ in range(depth - 2)]
    return [U * root[..., None, :], *middle, root[..., :, None] * Vh]


# --- where training should end ---


def shrunk(values: Tensor, strength: Tensor, depth: int) -> Tensor:
    """The singular values of a fully observed problem at its stationary point of highest rank.

    Each solves w + λ w^(2/L - 1) = s: for L = 2 the soft threshold max(s - λ, 0), for L = 1 s/(1 + λ). For L > 2 the
    equation has no solution, and the value is 0, below a threshold at which it jumps; the larger of two solutions is
    the local minimum. There zero is a local minimum as well, so training may end there instead.

    Args:
        values: s, the singular values of the target.
        strength: λ, of a shape that broadcasts to that of ``values``.
        depth: L.
    """
    values, strength = torch.broadcast_tensors(values, strength)
    if depth == 1:
        return values / (1 + strength)
    if depth == 2:
        return (values - strength).clamp(min=0)
    power = 2 / depth - 1
    low = (-power * strength).pow(1 / (1 - power))  # where w + λ w^power is least
    exists = (low + strength * low.pow(power) <= values) | (strength == 0)
    high = values.clone()
    for _ in range(80):  # bisection: the left side grows from `low` on
        middle = (low + high) / 2
        below = middle + strength * middle.pow(power) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(exists & (values > 0), (low + high) / 2, torch.zeros_like(values))


def borderline(lr: float, steps: float) -> float:
    """Bound on what is left of a singular value at the threshold after some steps of gradient descent on two factors.

    Balanced, it obeys dσ/dt = -2σ², so σ → 1/(2ηt) from any start above: the bound returned.
    """
    return 1 / (2 * lr * steps)


def duality_gap(W: Tensor, target: Tensor, strength: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far ½‖M ⊙ (W - D)‖² + λ‖W‖_* can be above its minimum over all matrices, per problem.

    For every Y supported on M with ‖Y‖₂ ≤ λ the minimum is at least ⟨Y, D⟩ - ½‖Y‖² (Fenchel duality); Y here is the
    residual at W, scaled down into that ball. It certifies an optimum without a solver.

    Args:
        W: shape (problems, m, n).
        target: D, of a shape that broadcasts to W's.
        strength: λ, shape (problems,).
        mask: as in `residual`.
    """
    Y = -residual(W, target, mask)
    norm = torch.linalg.matrix_norm(Y, 2)
    Y = Y * (strength / norm.clamp(min=1e-300)).clamp(max=1)[..., None, None]
    primal = fit(W, target, mask) + strength * torch.linalg.svdvals(W).sum(-1)
    return primal - (Y * target).sum((-2, -1)) + 0.5 * squared_norm(Y)


def curvature(factors: Factors) -> Tensor:
    """An upper estimate of the largest curvature of the fit, Σ_l Π_{k≠l} ‖F_k‖₂², per problem.

    Gradient descent needs a learning rate below 2 over it.
    """
    norms = torch.stack([torch.linalg.matrix_norm(factor, 2).square() for factor in factors])
    others = [norms[[k for k in range(len(factors)) if k != index]].prod(0) for index in range(len(factors))]
    return torch.stack(others).sum(0)


# --- training ---


@dataclass(frozen=True)
class Method:
    """How factors are trained.

    Attributes:
        lr: η.
        optimizer: ``gd``; ``momentum``, damped, H ← μH + (1 - μ)g, so that η means the same; or ``adam``.
        decay: ``loss`` adds λF to the gradient; ``decoupled`` multiplies by 1 - ηλ beside the step, as AdamW does;
            ``prox`` soft-thresholds the singular values by ηλ after the step.
        momentum: μ, also the β₁ of adam.
        beta2: of adam.
        epsilon: of adam.
    """

    lr: float
    optimizer: Optimizer = "gd"
    decay: Decay = "loss"
    momentum: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


class Training:
    """Many problems under way.

    Args:
        factors: where they begin; F_l has shape (problems, rows, columns). Not modified.
        target: D, of a shape that broadcasts to (problems, m, n).
        strength: λ of each problem, shape (problems,).
        method: how they are trained.
        mask: as in `residual`.
    """

    def __init__(
        self, factors: Factors, target: Tensor, strength: Tensor, method: Method, mask: Tensor | None = None
    ) -> None:
        self.factors = [factor.clone() for factor in factors]
        self.target, self.strength, self.method, self.mask = target, strength, method, mask
        self.count = 0
        self._lambda = strength[:, None, None]
        self._first = [torch.zeros_like(factor) for factor in factors] if method.optimizer != "gd" else []
        self._second = [torch.zeros_like(factor) for factor in factors] if method.optimizer == "adam" else []

    @torch.no_grad()
    def step(self) -> None:
        """One step of every problem."""
        method = self.method
        self.count += 1
        found = gradients(self.factors, residual(product(self.factors), self.target, self.mask))
        for number, (factor, gradient) in enumerate(zip(self.factors, found, strict=True)):
            if method.decay == "loss":
                gradient.addcmul_(self._lambda, factor)
            elif method.decay == "decoupled":
                shrink_by(factor, method.lr * self._lambda, out=factor)
            factor.sub_(self._direction(number, gradient), alpha=method.lr)
            if method.decay == "prox":
                factor.copy_(soft_threshold(factor, method.lr * self.strength))

    def _direction(self, number: int, gradient: Tensor) -> Tensor:
        method = self.method
        if method.optimizer == "gd":
            return gradient
        first = self._first[number].lerp_(gradient, 1 - method.momentum)
        if method.optimizer == "momentum":
            return first
        second = self._second[number].mul_(method.beta2).addcmul_(gradient, gradient, value=1 - method.beta2)
        unbiased = first / (1 - method.momentum**self.count)
        return unbiased / (second / (1 - method.beta2**self.count)).sqrt_().add_(method.epsilon)


# --- momentum and noise in continuous time ---


@dataclass(frozen=True)
class Dynamics:
    """Constants of a `Diffusion`.

    Attributes:
        rate: η.
        momentum: μ, the rate at which H follows the gradient.
        noise: σ.
        length: dt.
    """

    rate: float
    momentum: float
    noise: float
    length: float


class Diffusion:
    """Two factors under momentum, noise and decoupled decay in continuous time, by Euler-Maruyama (Proposition B.2).

    ``dH = μ(g dt + σ dW - H dt)`` for each factor F with gradient g, and ``dF = -η(H + λF) dt``, from H = 0. Beside the
    path the right side of the proposition is summed up, `predicted`, which the imbalance has to agree with but for the
    step's length.

    Args:
        factors: A and Bᵀ where they begin, as in `Training`; not modified.
        target: D.
        strength: λ of each problem, shape (problems,).
        dynamics: rates, noise and dt.
        seed: of the noise.
    """

    def __init__(
        self, factors: Factors, target: Tensor, strength: Tensor, dynamics: Dynamics, *, seed: int = 0
    ) -> None:
        self.factors = [factor.clone() for factor in factors]
        self.target, self._lambda = target, strength[:, None, None]
        self.dynamics = dynamics
        self._H = [torch.zeros_like(factor) for factor in factors]
        self._rng = torch.Generator().manual_seed(seed)
        (self.predicted,) = differences(self.factors)
        self.largest_gradient = torch.zeros_like(strength)  # ‖G‖₂ so far
        self.largest_factor = torch.zeros_like(strength)  # of ‖A‖₂ and ‖B‖₂

    def step(self) -> None:
        """Move every problem by dt."""
        (A, Bt), (H_A, H_B) = self.factors, self._H
        rate, dt = self.dynamics.rate, self.dynamics.length
        G = residual(A @ Bt, self.target)
        of_A, of_B = H_A.mT @ A, H_B @ Bt.mT  # H_BᵀB with both transposed
        self.predicted = (-2 * rate * self._lambda * dt).exp() * self.predicted - rate * dt * (
            of_A + of_A.mT - of_B - of_B.mT
        )
        self.largest_gradient = self.largest_gradient.maximum(torch.linalg.matrix_norm(G, 2))
        for factor in self.factors:
            self.largest_factor = self.largest_factor.maximum(torch.linalg.matrix_norm(factor, 2))
        moved = []
        for factor, H, gradient in zip(self.factors, self._H, gradients(self.factors, G), strict=True):
            moved.append(factor - rate * dt * (H + self._lambda * factor))
            drawn = torch.randn(H.shape, generator=self._rng, dtype=H.dtype) * self.dynamics.noise * dt**0.5
            H.add_(self.dynamics.momentum * ((gradient - H) * dt + drawn))
        self.factors = moved
