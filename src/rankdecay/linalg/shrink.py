r"""Shrinkage of singular values: every decay rule of the library, once.

A decay step of size τ takes the singular values of a weight matrix down:

=================  ====================================================  ==================================
rule               singular value σ becomes                              near zero
=================  ====================================================  ==================================
``prox``           max(σ - τ, 0)                                         exact zeros, no overshoot
``smooth``         σ - τ σ/√(σ² + ε²), ε = max(τ, smoothing·‖W‖_F)       decays exponentially below ε
``polar``          σ - τ                                                 chatters: |σ - τ| about τ/2 for ever
``newton_schulz``  σ - τ p_k(σ/‖W‖_F), p(x) = x (3 - x²)/2               multiplicative; unstable for small W
=================  ====================================================  ==================================

* **prox** is the proximal map of τ‖·‖_* (singular value thresholding; Cai, Candès & Shen 2010). It composes,
  :math:`S_a \circ S_b = S_{a+b}`, is non-expansive, and is the complement of clipping,
  :math:`S_\tau(W) = W - \mathrm{clip}_\tau(W)` (Moreau).
* **smooth** differs from the prox by at most 0.293 τ in any direction when ε = τ. Directions below ε decay
  exponentially instead of reaching zero in finite time.
* **polar** subtracts τ times the subgradient U Vᵀ of the nuclear norm, with null directions contributing
  zero. Nothing below τ is special-cased: a direction smaller than τ overshoots and then chatters, which is
  what this rule does and why it is not the default.
* **newton_schulz** subtracts τ times k cubic Newton-Schulz steps from W/‖W‖_F, as published prototypes of
  low-rank decay do (arXiv 2606.04405). The slope of p_k at zero is 1.5^k (7.6 at k = 5), so small directions
  are decayed multiplicatively, and once ‖W‖_F < τ 1.5^k / 2 they grow. For replication.

**The soft threshold by products.** With the polar factor O, the symmetric :math:`H = O^T W` and the spectral
projector :math:`N = (I - \mathrm{sign}(H - \tau I))/2` on the directions below τ, the usual form
(W - τO)(I - N) carries a rounding of the size of ‖W‖ times the error of the sign iteration. We clip instead,
and subtract:

.. math::

    \mathrm{clip}_\tau(W) = \tau O (I - N^2) + (I - O (I - N) O^T) \, W N , \qquad
    S_\tau(W) = W - \mathrm{clip}_\tau(W).

Projecting from both sides squares the error of N where it would meet a large singular value, and a direction
with σ = τ, where the sign is undecided, comes out as τ for any value of N. What remains is the relative error
of O times τ, and a few roundings of W.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from rankdecay.checks import check_name
from rankdecay.linalg.backend import float64_on_cpu, full_precision, note_backend
from rankdecay.linalg.exact import apply_exact, inverse
from rankdecay.linalg.matmul import iterate, normalised
from rankdecay.linalg.minimax import SCHEDULES
from rankdecay.linalg.polar import polar_prepared, smooth_prepared
from rankdecay.linalg.stack import (
    Prepared,
    check_matrix,
    finish,
    mark_bad,
    per_matrix,
    prepare,
    resolve,
    scaled_down,
    working_dtype,
)
from rankdecay.rules import Rule


@float64_on_cpu
@torch.no_grad()
def soft_threshold(W: Tensor, tau: float | Tensor, backend: str = "auto") -> Tensor:
    """Returns the soft threshold of each matrix: every singular value becomes max(σ - τ, 0).

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype. Not modified.
        tau: Threshold τ ≥ 0 in the units of the singular values; a number, or a tensor that broadcasts to
            ``W.shape[:-2]``. A tensor is not checked (that would synchronise); an entry that is negative or
            not finite gives NaN in its own slice. Where τ = 0 the result is W bit for bit.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"`` (:func:`rankdecay.linalg.choose_backend`).

    Returns:
        A tensor of the shape and dtype of ``W``, detached from autograd. A matrix with a non-finite entry
        gives NaN in its own slice only. Spectral-norm error: at most 1e-6 τ plus the rounding of the dtype
        with "exact", and exactly zero when τ > σ_max; at most 2e-5 min(τ, ‖W‖) + 1e-6 ‖W‖ with "matmul" in
        float32, which leaves dead directions at that level.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If ``W`` has fewer than two dimensions, ``tau`` is a negative or non-finite number or a
            tensor of the wrong shape, or ``backend`` is unknown.

    Example:
        >>> soft_threshold(torch.tensor([[3.0, 0.0], [0.0, -1.0]]), 2.0)
        tensor([[1., 0.],
                [0., 0.]])
    """
    backend = resolve(W, backend)
    threshold = per_matrix("tau", tau, W)
    if W.numel() == 0 or _is_zero(tau):
        return W.clone()

    out = _clip(W, threshold, backend, complement=True)
    return torch.where(threshold == 0, W, out)


@float64_on_cpu
@torch.no_grad()
def spectral_clip(W: Tensor, beta: float | Tensor, backend: str = "auto") -> Tensor:
    """Returns the projection on the spectral ball of radius β: every singular value becomes min(σ, β).

    The complement of the soft threshold: ``soft_threshold(W, t) + spectral_clip(W, t)`` is W (Moreau).

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype. Not modified.
        beta: Radius β ≥ 0 in the units of the singular values; a number or one per matrix, as ``tau`` in
            :func:`soft_threshold`.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"``.

    Returns:
        A tensor of the shape and dtype of ``W``, with the accuracy of :func:`soft_threshold`.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: As for :func:`soft_threshold`.
    """
    backend = resolve(W, backend)
    radius = per_matrix("beta", beta, W)
    if W.numel() == 0:
        return W.clone()

    return _clip(W, radius, backend, complement=False)


@float64_on_cpu
@torch.no_grad()
def newton_schulz(W: Tensor, steps: int = 5) -> Tensor:
    """Returns ``steps`` cubic Newton-Schulz steps X ← X (3I - XᵀX)/2 from X = W/‖W‖_F.

    What published prototypes of low-rank decay use in place of the polar factor. It is *not* the polar
    factor: a singular value responds by half only from 0.071 ‖W‖_F on at five steps. Float32 (float64 for
    float64 input).

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype. Not modified.
        steps: Number of steps, at least 1.

    Returns:
        A tensor of the shape and dtype of ``W``; zero for a zero matrix.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If ``W`` has fewer than two dimensions or ``steps`` is not a positive integer.
    """
    check_matrix(W)
    _check_steps(steps)
    if W.numel() == 0:
        return W.clone()
    with full_precision(W.device):
        prepared = prepare(W, working_dtype(W, "matmul"))
        return finish(_newton_schulz(prepared, steps), prepared, W.dtype)


@float64_on_cpu
@torch.no_grad()
def shrink(
    W: Tensor,
    tau: float | Tensor,
    rule: Rule = "prox",
    *,
    smoothing: float = 0.0,
    steps: int = 5,
    backend: str = "auto",
) -> Tensor:
    """Returns the weight after one decay step of size τ: the one implementation of every decay rule.

    Args:
        W: Weight or stack of weights, shape (..., m, n), any real float dtype. Not modified.
        tau: Step τ ≥ 0 in the units of the singular values; a number, or a tensor that broadcasts to
            ``W.shape[:-2]``. A tensor is not checked (that would synchronise); an entry that is negative or
            not finite gives NaN in its own slice. Where τ = 0 the result is W bit for bit.
        rule: ``"prox"``, ``"smooth"``, ``"polar"`` or ``"newton_schulz"`` (module docstring).
        smoothing: For "smooth": ε = max(τ, smoothing·‖W‖_F) per matrix.
        steps: For "newton_schulz": number of cubic steps.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"``; "newton_schulz" is always products.

    Returns:
        A tensor of the shape and dtype of ``W``, detached from autograd; a matrix with a non-finite entry
        gives NaN in its own slice only. Computed in float32 or better and rounded once.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If an argument is outside its range or a name is unknown.

    Example:
        >>> shrink(torch.tensor([[3.0, 0.0], [0.0, -1.0]]), 0.5, "polar")
        tensor([[ 2.5000,  0.0000],
                [ 0.0000, -0.5000]])
    """
    check_name("rule", rule, get_args(Rule))
    if not (math.isfinite(smoothing) and smoothing >= 0):
        raise ValueError(f"smoothing={smoothing!r} must be a non-negative finite number, a fraction of ‖W‖_F.")
    _check_steps(steps)
    if rule == "prox":
        return soft_threshold(W, tau, backend)
    backend = resolve(W, backend)
    step = per_matrix("tau", tau, W)
    if W.numel() == 0 or _is_zero(tau):
        return W.clone()
    dtype = working_dtype(W, "matmul" if rule == "newton_schulz" else backend)
    with full_precision(W.device):
        prepared = mark_bad(prepare(W, dtype), step)
        if rule == "newton_schulz":
            D = _newton_schulz(prepared, steps)
        elif rule == "polar":
            D = polar_prepared(prepared, backend, W.dtype)
        else:
            F = torch.linalg.vector_norm(prepared.X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
            eps = torch.maximum(scaled_down(step, prepared), smoothing * F)
            eps = torch.where(eps > 0, eps, 1.0)  # τ = 0 without smoothing: the result is W, whatever ε
            D = smooth_prepared(prepared, eps, backend, W.dtype, smoothing or None)
        out = (W.to(dtype) - step.to(dtype) * finish(D, prepared, dtype)).to(W.dtype)
    return torch.where(step == 0, W, out)


def taken(sigma: Tensor, null: Tensor, tau: Tensor, rule: Rule, *, smoothing: float = 0.0, steps: int = 5) -> Tensor:
    """Returns the share c of each singular direction that a step takes: σ becomes σ - c σ. Zero where τ = 0.

    Args:
        sigma: all singular values of each matrix, (..., n).
        null: those not above it count as zero, (..., 1).
        tau: τ, (..., 1).
        rule: as for :func:`shrink`.
        smoothing: as there.
        steps: as there.
    """
    if rule == "prox":
        return torch.where(tau == 0, 0.0, _clipped(sigma, tau))
    if rule == "polar":
        return tau * inverse(sigma, null)
    F = torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
    if rule == "smooth":
        return tau * inverse(torch.hypot(sigma, torch.maximum(tau, smoothing * F)), null)
    p = sigma / torch.where(F == 0, 1.0, F)
    for _ in range(steps):
        p = p * (3 - p * p) / 2
    return tau * inverse(sigma, torch.zeros_like(null)) * p


# ---- how -------------------------------------------------------------------------------------------------


def _clip(W: Tensor, level: Tensor, backend: str, *, complement: bool) -> Tensor:
    """Returns clip_τ(W), or W - clip_τ(W), for a level τ (..., 1, 1) in the units of W.

    Subtracting the clipped matrix instead of multiplying by max(0, 1 - τ/σ) leaves W untouched to its last digit
    as τ goes to 0.
    """
    with full_precision(W.device):
        prepared = mark_bad(prepare(W, working_dtype(W, backend)), level)
        tau = scaled_down(level, prepared)
        if backend == "exact":
            beside_sigma = tau[..., 0]  # (..., 1)
            out = apply_exact(prepared, lambda sigma, _: _clipped(sigma, beside_sigma), W.dtype, complement=complement)
        else:
            out = _clip_by_products(prepared, tau)
            out = prepared.X - out if complement else out
        return finish(out.mul_(prepared.scale), prepared, W.dtype)


def _clipped(sigma: Tensor, tau: Tensor) -> Tensor:
    """Returns min(σ, τ)/σ, and 1 at σ = 0: the part of X that a soft threshold takes away."""
    return (tau / sigma.clamp_min(2.0**-1022)).clamp_max(1)


def _clip_by_products(prepared: Prepared, tau: Tensor) -> Tensor:
    """Returns clip_τ(X) by products only (module docstring); ``tau`` (..., 1, 1) in the units of X."""
    X = prepared.X
    F = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    tau = torch.minimum(tau, 2 * F.double()).to(X.dtype)  # above F nothing is clipped, however far above
    polar_factor = polar_prepared(prepared, "matmul", X.dtype)
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    H = polar_factor.mT @ X
    sign = iterate(normalised((H + H.mT) / 2 - tau * identity)[0], SCHEDULES[1e-6])
    below = (identity - sign) / 2
    clipped = X @ below
    inside = polar_factor.mT @ clipped
    clipped -= polar_factor @ (inside - below @ inside)
    return clipped.add_(tau * (polar_factor @ (identity - below @ below)))


def _newton_schulz(prepared: Prepared, steps: int) -> Tensor:
    note_backend("matmul")
    X = normalised(prepared.X)[0]
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    for _ in range(steps):
        X = torch.baddbmm(X, X, X.mT @ X, beta=1.5, alpha=-0.5)
    return X.reshape(shape)


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a positive integer; five is what published prototypes use.")
