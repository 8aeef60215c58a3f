"""One decay step by a rule's name, and the functions of a matrix that the rules are made of.

The rules themselves are a file each in :mod:`rankdecay.linalg.rules`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankdecay.checks import check_number
from rankdecay.linalg import threshold
from rankdecay.linalg.backend import float64_on_cpu, full_precision, has_float64, note_backend
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
    relative: bool = False,
    keep: int = 0,
    preserve_norm: bool = False,
    smoothing: float = 0.0,
    steps: int = 5,
    backend: str = "auto",
) -> Tensor:
    """Return the weight after one decay step of size τ: the one implementation of every decay rule.

    Args:
        W: Weight or stack of weights, shape (..., m, n), any real float dtype. Not modified.
        tau: Step τ ≥ 0 in the units of the singular values; a number, or a tensor that broadcasts to
            ``W.shape[:-2]``. A tensor is not checked (that would synchronise); an entry that is negative or
            not finite gives NaN in its own slice. Where τ = 0 the result is W bit for bit. However large, it gives
            finite weights, at most zeros.
        relative: Whether τ is in units of rms(σ) = ‖W‖_F/√min(m, n). Then the result for 2^k W is 2^k times that for W,
            bit for bit, over the whole range of the dtype.
        keep: Number of largest singular values that are left alone, of equal ones the same in every call; all where it
            is min(m, n) or more. For "prox" and "smooth". It needs a decomposition, so it is exact on every backend.
        preserve_norm: Rescale the result to the Frobenius norm of W. A matrix of which nothing would be left stays as
            it is.
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
    options = check_options(rule, smoothing, steps, relative, keep, preserve_norm)
    backend = resolve(W, backend)
    step = per_matrix("tau", tau, W)
    if W.numel() == 0 or (not isinstance(tau, Tensor) and tau == 0):
        return W.clone()
    left = _step(W, step, get_rule(rule), options, backend, complement=True)
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


@torch.no_grad()
def power_step(W: Tensor, amount: float | Tensor, power: float = 1.0, cap: float = 1.0) -> Tensor:
    """Return each matrix after it lost the share min(amount · ‖W‖_F^(power - 1), cap) of itself.

    The gradient step of amount · ‖W‖_F^(power + 1)/(power + 1), without a decomposition. The exponent of the norm is
    kept apart, so that the whole range of the dtype is legal, also where ‖W‖_F is beyond it.

    Args:
        W: Matrix or stack, shape (..., m, n), float32 or float64 (16-bit weights come as float32). Not modified.
        amount: lr · strength ≥ 0, a number or one per matrix, (...). A tensor is not checked; an entry that is negative
            or not finite gives NaN in its own slice.
        power: 1 for L2, 0 for a constant amount of the norm per step, ≥ 0.
        cap: Largest share of one step, in (0, 1].

    Returns:
        A tensor of the shape and dtype of ``W``. A zero matrix stays zero; a matrix with a non-finite entry gives NaN
        in its own slice only.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If an argument is outside its range.

    Example:
        >>> power_step(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1.0, power=0)
        tensor([[2.4000, 0.0000],
                [0.0000, 3.2000]])
    """
    check_matrix(W)
    check_number("power", power, at_least=0, remedy="1 is L2, 0 takes the same amount of the norm in every step")
    check_number("cap", cap, above=0, at_most=1, remedy="1 is no cap")
    step = per_matrix("amount", amount, W)
    if W.numel() == 0 or (not isinstance(amount, Tensor) and amount == 0):
        return W.clone()
    share = threshold.power(log_norm(W), step, power, cap).to(W.dtype)
    return threshold.leave(W, share)


def log_norm(W: Tensor) -> Tensor:
    """Return log ‖W‖_F of each matrix, (..., 1, 1), float64: -∞ for zeros, NaN where an entry is not finite."""
    if W.dtype != torch.float64 and has_float64(W.device):
        norm = torch.linalg.vector_norm(W, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        return torch.where(norm.isfinite(), norm.log(), math.nan)
    prepared = prepare(W, W.dtype)
    norm = torch.linalg.vector_norm(prepared.X, dim=(-2, -1), keepdim=True)
    log = norm.log() + prepared.scale.log()
    return log.masked_fill(prepared.bad, math.nan).to(torch.float64 if has_float64(W.device) else W.dtype)


def check_options(rule: str, smoothing: float, steps: int, relative: bool, keep: int, preserve_norm: bool) -> Options:
    """Return the options of a step.

    Raises:
        ValueError: If one is outside its range, or the rule does not have it.
    """
    chosen = get_rule(rule)
    check_number("smoothing", smoothing, at_least=0, remedy="it is a fraction of ‖W‖_F")
    _check_steps(steps)
    check_number("keep", keep, at_least=0, whole=True, remedy="it counts the singular values that are left alone")
    if keep and not chosen.keep:
        able = " or ".join(repr(name) for name in ("prox", "smooth"))
        raise ValueError(f"keep={keep} is not possible with rule={rule!r}; use rule={able}, or keep=0")
    return Options(smoothing, steps, relative, keep, preserve_norm)


def by_decomposition(rule: Rule, options: Options, backend: str) -> bool:
    """Return whether a step decomposes, whatever backend was asked for."""
    return rule.taken_by_products is None or options.keep > 0 or (backend == "exact" and not rule.always_products)


def shares(sigma: Tensor, null: Tensor, tau: Tensor, unit: Tensor, rule: Rule, options: Options) -> Tensor:
    """Return the share t of each singular direction, after ``keep`` and ``preserve_norm``.

    Args:
        sigma: (..., n), in the units that ``unit`` (..., 1) gives in those of W.
        null: (..., 1), the σ that count as zero.
        tau: (..., 1), in the units of ``sigma``.
        unit: (..., 1).
        rule: of the step.
        options: of the step.
    """
    if rule.homogeneous:
        share = rule.fraction(sigma, null, tau, options)
    else:
        share = rule.fraction(sigma * unit, null * unit, finite(tau * unit), options)
    if options.keep:
        share = threshold.spare_largest(share, sigma, options.keep)
    return threshold.hold_norm(share, sigma) if options.preserve_norm else share


def _step(W: Tensor, step: Tensor, rule: Rule, options: Options, backend: str, *, complement: bool) -> Tensor:
    """Return what a step of size (..., 1, 1) takes from W by a rule, or its complement, what it leaves."""
    decompose = by_decomposition(rule, options, backend)
    with full_precision(W.device):
        prepared = mark_bad(prepare(W, working_dtype(W, "exact" if decompose else "matmul")), step)
        X = prepared.X
        if options.relative:
            F = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
            tau = finite(step * F / min(X.shape[-2:]) ** 0.5)
        else:
            tau = scaled_down(step, prepared)
        if decompose:

            def share(sigma: Tensor, null: Tensor) -> Tensor:
                return shares(sigma, null, tau[..., 0], prepared.scale[..., 0], rule, options)

            out = apply_exact(prepared, share, W.dtype, complement=complement)
        else:
            assert rule.taken_by_products is not None
            note_backend("matmul")
            out = rule.taken_by_products(prepared, tau.clamp_max(torch.finfo(X.dtype).max), options)
            out = X - out if complement else out
            if options.preserve_norm:
                before, after = (torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True) for Y in (X, out))
                out = torch.where(after > 0, out * (before / torch.where(after > 0, after, 1.0)), X)
        return finish(_within_range(out.mul_(prepared.scale), W.dtype), prepared, W.dtype)


def _within_range(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros for a matrix that left the range of a dtype: of a step beyond all bounds nothing is left.

    ``out`` is overwritten.
    """
    beyond = ~(out.abs().amax((-2, -1), keepdim=True) <= torch.finfo(dtype).max)
    return out.masked_fill_(beyond, 0)


def _check_steps(steps: int) -> None:
    check_number("steps", steps, at_least=1, whole=True, remedy="published prototypes use five")
