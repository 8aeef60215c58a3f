"""One decay step by a rule's name, and the functions of a matrix that the rules are made of.

The rules themselves are a file each in :mod:`rankdecay.linalg.rules`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankdecay.checks import check_number
from rankdecay.linalg.backend import float64_on_cpu, full_precision, note_backend
from rankdecay.linalg.exact import apply_exact
from rankdecay.linalg.matmul import cubic_newton_schulz
from rankdecay.linalg.stack import (
    check_matrix,
    finish,
    finite,
    mark_bad,
    per_matrix,
    prepare,
    resolve,
    scaled_down,
    working_dtype,
)
from rankdecay.rules import Options, Rule, get_rule


@float64_on_cpu
@torch.no_grad()
def shrink(
    W: Tensor,
    tau: float | Tensor,
    rule: str = "prox",
    *,
    smoothing: float = 0.0,
    steps: int = 5,
    backend: str = "auto",
) -> Tensor:
    """Return the weight after one decay step of size τ: the one implementation of every decay rule.

    Args:
        W: Weight or stack of weights, shape (..., m, n), any real float dtype. Not modified.
        tau: Step τ ≥ 0 in the units of the singular values; a number, or a tensor that broadcasts to
            ``W.shape[:-2]``. A tensor is not checked (that would synchronise); an entry that is negative or
            not finite gives NaN in its own slice. Where τ = 0 the result is W bit for bit.
        rule: ``"prox"``, ``"smooth"``, ``"polar"``, ``"newton_schulz"`` (:mod:`rankdecay.linalg.rules`), or another
            that is registered.
        smoothing: For "smooth": ε = max(τ, smoothing·‖W‖_F) per matrix.
        steps: For "newton_schulz": number of cubic steps.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"``. "newton_schulz" is always products, and a rule that has
            none is always exact.

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
    chosen = get_rule(rule)
    check_number("smoothing", smoothing, at_least=0, remedy="it is a fraction of ‖W‖_F")
    _check_steps(steps)
    backend = resolve(W, backend)
    step = per_matrix("tau", tau, W)
    if W.numel() == 0 or (not isinstance(tau, Tensor) and tau == 0):
        return W.clone()
    left = _step(W, step, chosen, Options(smoothing, steps), backend, complement=True)
    return torch.where(step == 0, W, left)


def soft_threshold(W: Tensor, tau: float | Tensor, backend: str = "auto") -> Tensor:
    """Return the soft threshold of each matrix: every singular value becomes max(σ - τ, 0).

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
    return shrink(W, tau, "prox", backend=backend)


@float64_on_cpu
@torch.no_grad()
def spectral_clip(W: Tensor, beta: float | Tensor, backend: str = "auto") -> Tensor:
    """Return the projection on the spectral ball of radius β: every singular value becomes min(σ, β).

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
    return _step(W, radius, get_rule("prox"), Options(), backend, complement=False)


@float64_on_cpu
@torch.no_grad()
def newton_schulz(W: Tensor, steps: int = 5) -> Tensor:
    """Return ``steps`` cubic Newton-Schulz steps X ← X (3I - XᵀX)/2 from X = W/‖W‖_F.

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
    note_backend("matmul")
    with full_precision(W.device):
        prepared = prepare(W, working_dtype(W, "matmul"))
        return finish(cubic_newton_schulz(prepared.X, steps), prepared, W.dtype)


def _step(W: Tensor, step: Tensor, rule: Rule, options: Options, backend: str, *, complement: bool) -> Tensor:
    """Return what a step of size (..., 1, 1) takes from W by a rule, or its complement, what it leaves."""
    if rule.taken_by_products is None:
        backend = "exact"
    elif rule.always_products:
        backend = "matmul"
    with full_precision(W.device):
        prepared = mark_bad(prepare(W, working_dtype(W, backend)), step)
        if backend == "exact" or rule.taken_by_products is None:
            unit, tau = prepared.scale[..., 0], finite(step[..., 0])  # (..., 1), beside σ

            def fraction(sigma: Tensor, null: Tensor) -> Tensor:
                return rule.fraction(sigma * unit, null * unit, tau, options)

            out = apply_exact(prepared, fraction, W.dtype, complement=complement)
        else:
            note_backend("matmul")
            tau = scaled_down(step, prepared).clamp_max(torch.finfo(prepared.X.dtype).max)
            out = rule.taken_by_products(prepared, tau, options)
            out = prepared.X - out if complement else out
        return finish(out.mul_(prepared.scale), prepared, W.dtype)


def _check_steps(steps: int) -> None:
    check_number("steps", steps, at_least=1, whole=True, remedy="published prototypes use five")
