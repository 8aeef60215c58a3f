"""One decay step by a rule's name, and the functions of a matrix that the rules are made of.

The rules themselves are a file each in :mod:`rankdecay.linalg.rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankdecay.checks import check_number
from rankdecay.linalg import threshold
from rankdecay.linalg.backend import (
    choose_backend,
    float64_on_cpu,
    full_precision,
    note_backend,
    noted_once,
)
from rankdecay.linalg.exact import apply_exact, lost_directions
from rankdecay.linalg.matmul import cubic_newton_schulz
from rankdecay.linalg.stack import (
    Prepared,
    at_once,
    check_and_choose_backend,
    check_matrix,
    chunks,
    finish,
    finite,
    frobenius,
    mark_bad,
    nonzero,
    per_matrix,
    prepare,
    scaled_down,
    side_by_side,
    working_dtype,
)
from rankdecay.rules import Options, Rule, check_keep, get_rule


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
            none is always exact. "auto" on a CPU takes products for "smooth" of float32 weights and narrower where ε is
            at least some 0.06 σ₁, without ``keep`` and ``preserve_norm``; that is within 5e-4 of the step. A GPU from
            capability 8.0 on then multiplies in TF32 or in three products of bfloat16, whichever is quicker and within
            1e-3 of the step (:mod:`rankdecay.linalg.tiers`).

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
    options = check_options(rule, Options(smoothing, steps, relative, keep, preserve_norm))
    check_and_choose_backend(W, backend)
    step = per_matrix("tau", tau, W)
    if W.numel() == 0 or (not isinstance(tau, Tensor) and tau == 0):
        return W.clone()
    return _Step(get_rule(rule), options).run(W, step, backend)


@torch.no_grad()
def shrink_directions(R: Tensor, tau: Tensor, rule: str, options: Options, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Return V and t such that W loses the share t of its directions V by :func:`shrink`, for every W = QR.

    Args:
        R: float64 (k, n, n), such that QᵀQ = 1.
        tau: τ ≥ 0 of each, (k).
        rule: as for :func:`shrink`, not "newton_schulz".
        options: of the step, checked.
        rank: the smaller side of W, (k), for a relative τ.

    Returns:
        V (k, n, n) and t (k, n), NaN where R or τ is not finite.
    """
    if options.relative:
        tau = tau * (R.shape[-1] / rank.to(R.device, torch.float64)).sqrt()
    tau = tau[..., None, None]
    prepared = mark_bad(prepare(R, torch.float64), tau)
    V, share = lost_directions(prepared, _Step(get_rule(rule), options).share_of(prepared, tau), torch.float64)
    return V, share.masked_fill(prepared.bad[..., 0], math.nan)


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
        with "exact"; at most 2e-5 min(τ, ‖W‖₂) + 4e-6 ‖W‖₂ + 3e-7 ‖W‖_F with "matmul" in float32. With both a zero
        matrix where τ ≥ σ_max, and otherwise at most two units in the last place of σ_max in the directions below τ.

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
    check_and_choose_backend(W, backend)
    radius = per_matrix("beta", beta, W)
    if W.numel() == 0:
        return W.clone()
    return _Step(get_rule("prox"), Options(), clip=True).run(W, radius, backend)


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


@float64_on_cpu
@torch.no_grad()
def power_step(
    W: Tensor, amount: float | Tensor, power: float = 1.0, cap: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return each matrix after it lost the share min(amount · ‖W‖_F^(power - 1), cap) of itself.

    The gradient step of amount · ‖W‖_F^(power + 1)/(power + 1), without a decomposition. The exponent of the norm is
    kept apart, so that the whole range of the dtype is legal, also where ‖W‖_F is beyond it.

    Args:
        W: Matrix or stack, shape (..., m, n), float32 or float64 (16-bit weights come as float32). Not modified
            unless it is ``out``.
        amount: lr · strength ≥ 0, a number or one per matrix, (...). A tensor is not checked; an entry that is negative
            or not finite gives NaN in its own slice.
        power: 1 for L2, 0 for a constant amount of the norm per step, ≥ 0.
        cap: Largest share of one step, in (0, 1].
        out: Where to put the result; ``W`` itself is the quickest, one pass for the norm and one for the step.

    Returns:
        A tensor of the shape and dtype of ``W``. A zero matrix stays zero; a matrix with a non-finite entry gives NaN
        in its own slice only (with power 1 in that entry only).

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
        return W.clone() if out is None else out.copy_(W)
    log = torch.zeros_like(step) if power == 1 else log_norm(W)  # the share does not depend on it
    share = threshold.power(log, step, power, cap).to(W.dtype)
    return threshold.shrink_by(W, share, out)


def log_norm(W: Tensor) -> Tensor:
    """Return log ‖W‖_F of each matrix, (..., 1, 1), float64: -∞ for zeros, NaN where an entry is not finite."""
    on_cpu = W.device.type == "cpu"
    if not on_cpu and W.dtype == torch.float64:
        return _log_norm_of_any(W)
    # A sum in the dtype of W is the quicker one on a CPU, where it can be read whether it was in range.
    norm = frobenius(W, None if on_cpu else torch.float64).double()
    log = torch.where(norm.isfinite(), norm.log(), math.nan)
    if on_cpu:
        low, high = (1e-140, 1e150) if W.dtype == torch.float64 else (1e-12, 1e18)
        odd = ~((norm > low) & (norm < high))[..., 0, 0]
        if bool(odd.any()):
            log[odd] = _log_norm_of_any(W[odd])
    return log


def _log_norm_of_any(W: Tensor) -> Tensor:
    prepared = prepare(W, torch.float64)
    norm = frobenius(prepared.X)
    return (norm.log() + prepared.scale.log()).masked_fill(prepared.bad, math.nan)


def check_options(rule: str, options: Options) -> Options:
    """Return the options of a step by a rule.

    Raises:
        ValueError: If one is outside its range, or the rule does not have it.
    """
    get_rule(rule)
    check_number("smoothing", options.smoothing, at_least=0, remedy="it is a fraction of ‖W‖_F")
    _check_steps(options.steps)
    remedy = "it counts the singular values that are left alone"
    check_number("keep", options.keep, at_least=0, whole=True, remedy=remedy)
    check_keep(rule, options.keep)
    return options


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


#: Entries in the units of the prepared matrix, which are at most 1, that no step should reach: a rule that overshoots
#: has then taken 2⁶⁴ times the matrix.
_BEYOND = 2.0**64


@dataclass(frozen=True)
class _Step:
    """One step by a rule on stacks (b, m, n), with τ (b, 1, 1); each writes into ``out``."""

    rule: Rule
    options: Options
    clip: bool = False  # what is taken is the result, not what is left

    def run(self, W: Tensor, tau: Tensor, backend: str) -> Tensor:
        """Return the result for W (..., m, n) and τ (..., 1, 1): a few matrices at a time, to bound the workspace."""
        result = torch.empty_like(W, memory_format=torch.contiguous_format)
        tau = tau.expand(*W.shape[:-2], 1, 1).reshape(-1, 1, 1)
        stack, out = W.reshape(-1, *W.shape[-2:]), result.view(-1, *W.shape[-2:])
        with full_precision(W.device), noted_once():
            for part in [slice(None)] if at_once(stack) > 1 and self._decomposes(W, backend) else chunks(stack):
                self._choose(stack[part], tau[part], out[part], backend)
        return result

    def _decomposes(self, W: Tensor, backend: str) -> bool:
        """Return whether every matrix is decomposed, whatever is in it."""
        options = self.options
        if backend == "auto":
            open_ = self.rule.products_pay and W.dtype != torch.float64 and not (options.keep or options.preserve_norm)
            return not open_ and by_decomposition(self.rule, options, choose_backend(W.shape, W.device, W.dtype))
        return by_decomposition(self.rule, options, backend)

    def _choose(self, W: Tensor, tau: Tensor, out: Tensor, backend: str) -> None:
        options, pays = self.options, self.rule.products_pay
        if self._decomposes(W, backend):
            return self._decompose(W, tau, out)
        chosen = choose_backend(W.shape, W.device, W.dtype) if backend == "auto" else backend
        if pays is not None and by_decomposition(self.rule, options, chosen):
            prepared = mark_bad(prepare(W, torch.float32), tau)
            quick = pays(prepared, self._threshold(prepared, tau), options)
            if not bool(quick.any()):
                return self._decompose(W, tau, out)
            if not bool(quick.all()):  # of which kind a matrix is does not depend on its neighbours
                for some, kind in ((quick, "matmul"), (~quick, "exact")):
                    out[some] = self.run(W[some], tau[some], kind)
                return None
        else:
            prepared = mark_bad(prepare(W, working_dtype(W, "matmul")), tau)
        return self._multiply(prepared, W, tau, out)

    def _threshold(self, prepared: Prepared, tau: Tensor) -> Tensor:
        """Return τ in the units of ``prepared.X``, float64 and finite."""
        if not self.options.relative:
            return scaled_down(tau, prepared)
        norm = frobenius(prepared.X).double()
        return finite(threshold.absolute_threshold(tau, norm, min(prepared.X.shape[-2:])))

    def share_of(self, prepared: Prepared, tau: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the share of each direction as a function of σ and of the σ that count as zero."""
        threshold, unit = self._threshold(prepared, tau)[..., 0], prepared.scale[..., 0]
        return lambda sigma, null: shares(sigma, null, threshold, unit, self.rule, self.options)

    def _decompose(self, W: Tensor, tau: Tensor, out: Tensor) -> None:
        if at_once(W) > 1:

            def each(i: int) -> None:
                self._decompose(W[i : i + 1], tau[i : i + 1], out[i : i + 1])

            side_by_side(each, range(len(W)))
            return
        prepared = mark_bad(prepare(W, torch.float64), tau)
        share, undefined = self.share_of(prepared, tau), torch.zeros_like(prepared.bad)

        def noted(sigma: Tensor, null: Tensor) -> Tensor:  # a rule's NaN is NaN, and not a step beyond all bounds
            lost = share(sigma, null)
            undefined.logical_or_(lost.isnan().any(-1)[..., None, None])
            return lost

        after = apply_exact(prepared, noted, W.dtype, complement=True, overwrite=not self.clip)
        prepared = prepared._replace(bad=prepared.bad | undefined)
        self._write(prepared.X - after if self.clip else after, prepared, W, tau, out)

    def _multiply(self, prepared: Prepared, W: Tensor, tau: Tensor, out: Tensor) -> None:
        assert self.rule.taken_by_products is not None
        note_backend("matmul")
        X = prepared.X
        threshold = self._threshold(prepared, tau).clamp_max(torch.finfo(X.dtype).max)
        after = self.rule.taken_by_products(prepared, threshold, self.options)
        if not self.clip:
            after = torch.sub(X, after, out=after)
        if self.options.preserve_norm:
            before, left = frobenius(X), frobenius(after)
            after = torch.where(left > 0, after * (before / nonzero(left)), X)
        self._write(after, prepared, W, tau, out)

    def _write(self, after: Tensor, prepared: Prepared, W: Tensor, tau: Tensor, out: Tensor) -> None:
        """Put what a step gave in its place, in the units and the orientation of W; ``after`` is overwritten."""
        if not self.rule.keep:  # it may overshoot: of a step beyond all bounds nothing is left
            limit = (torch.finfo(W.dtype).max / prepared.scale.double()).clamp_max(_BEYOND)
            after.masked_fill_(~(after.abs().amax((-2, -1), keepdim=True) <= limit), 0)
        after.mul_(prepared.scale).masked_fill_(prepared.bad, math.nan)
        if self.options.preserve_norm:  # an entry may grow
            after.clamp_(-torch.finfo(W.dtype).max, torch.finfo(W.dtype).max)
        out.copy_(after.mT if prepared.wide else after)
        if not self.clip and (W.device.type != "cpu" or bool((tau == 0).any())):
            torch.where(tau == 0, W, out, out=out)


def _check_steps(steps: int) -> None:
    check_number("steps", steps, at_least=1, whole=True, remedy="published prototypes use five")
