r"""Shrinkage by shares, which every decay is: a group of a weight loses a share of itself.

.. math:: X_g \leftarrow (1 - t_g) \, X_g , \qquad 0 \le t_g \le 1 .

A group is a singular direction (:class:`rankdecay.LowRank`), a rotary plane (:class:`rankdecay.Planes`), a head or the
whole matrix (:class:`rankdecay.Frobenius`). Decays differ in the share alone:

==================  =================================================  =========================================
share               :math:`t_g`                                        read as
==================  =================================================  =========================================
:func:`soft`        min(1, τ / ‖X_g‖)                                  a group loses τ of its norm, then is zero
:func:`smooth`      τ / √(‖X_g‖² + ε²)                                 the same far above ε, exponential below it
:func:`power`       min(amount · ‖X_g‖^(p − 1), cap)                   L2 for p = 1, τ of the norm for p = 0
==================  =================================================  =========================================

:func:`spare_largest` and :func:`hold_norm` change shares that were found; :func:`shrink_by` applies them. The
exceptions to t ≥ 0 are :func:`hold_norm`, which lets a group grow, and an experiment's control that turns a step round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankdecay.linalg.stack import gram, nonzero, times, times_in_pieces


def absolute_threshold(amount: float | Tensor, norm: Tensor, rank: int) -> Tensor:
    """Return the τ of a step that is relative to rms(σ) = ‖W‖_F/√rank.

    Args:
        amount: Σ lr · strength of the step.
        norm: ‖W‖_F.
        rank: the smaller side of W.
    """
    return amount * norm / rank**0.5


def shrink_by(X: Tensor, share: Tensor, out: Tensor | None = None) -> Tensor:
    """Return X - t X, to the last digit X where t = 0. The rounding of 1 - t would be a decay of its own.

    Args:
        X: groups, any shape.
        share: t, broadcastable to ``X``.
        out: where to put it, ``X`` too: memory that was never used costs a CPU ten times the step.
    """
    return torch.addcmul(X, X, share, value=-1, out=out)


def leave_directions(X: Tensor, V: Tensor, share: Tensor, *, coarse: bool = False, overwrite: bool = False) -> Tensor:
    """Return what is left of X when each right singular direction loses its share: :func:`shrink_by` in their basis.

    Args:
        X: matrices (..., m, n), float64.
        V: their right singular vectors (..., n, n).
        share: t of each, (..., n).
        coarse: whether only the digits of float32 are wanted; a large matrix alone on a CPU then costs less.
        overwrite: whether ``X`` may be the result: memory that was never used costs a CPU more than the passes over it.
    """
    if X.device.type == "cpu" and X.ndim == 3 and X.shape[-1] >= _LARGE:
        X = X if overwrite else X.clone()
        for each in zip(X, V, share, strict=True):
            _leave_one(*each, coarse)
        left = X
    else:
        taken = times(X, taken_by_directions(V, share))
        left = torch.sub(X, taken, out=taken)
    if not coarse and bool((share == 1).any()):  # what a product of float64 leaves of nothing is some ten roundings
        gone = V * (share == 1)[..., None, :]
        left -= times(times_in_pieces(left, gone), gone.mT)
    return left


def taken_by_directions(V: Tensor, share: Tensor) -> Tensor:
    """Return V diag(t) Vᵀ, the part of X that is taken from its right; exactly I where t = 1 in every direction."""
    identity = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    return torch.where(all_taken(share)[..., None, None], identity, (V * share[..., None, :]) @ V.mT)


def all_taken(share: Tensor) -> Tensor:
    """Return whether nothing is left, (...): t = 1 everywhere, up to the rounding of σ₁ where it meets τ."""
    return ((share - 1).abs() <= 2.0**-50 * (8 + share.shape[-1])).all(-1)


#: Smaller side from which it pays to look for what need not be multiplied.
_LARGE = 128

#: A share from which float32 is enough: a product's error, some 4e-6 of what is taken, is below the rounding of W.
_SMALL = 2.0**-6


def _leave_one(X: Tensor, V: Tensor, share: Tensor, coarse: bool) -> Tensor:
    """Return X - X V diag(t) Vᵀ of one matrix (m, n), in its place: by the directions that are left, if they are few.

    Else, of rising σ, those that lose much in float64 and the others in float32.
    """
    n = len(share)
    if bool(all_taken(share)):
        return X.zero_()
    alive = share < 1
    left = int(alive.sum())
    small = int((share.abs() <= _SMALL).sum()) if coarse else 0
    large = n - small
    falling = bool((share[large:].abs() <= _SMALL).all())  # those that lose much come first
    if 2 * left <= 2 * large + small:
        small_V = V[:, alive]
        return X.copy_(times(times(X, small_V).mul_(1 - share[alive]), small_V.mT))
    if not falling:
        large = n
    taken: list[Tensor] = []
    if large:
        taken.append(times(times(X, V[:, :large]).mul_(share[:large]), V[:, :large].mT))
    if large < n:
        small_V, small_share = V[:, large:].float(), share[large:].float()
        if bool((small_share >= 0).all()):  # V diag(t) Vᵀ is a Gram matrix, of which half is computed
            taken.append(times(X.float(), gram(small_V.mul_(small_share.sqrt()).mT)))
        else:
            taken.append(times(times(X.float(), small_V).mul_(small_share), small_V.mT))
    for each in taken:
        X -= each
    return X


def soft(norm: Tensor, tau: Tensor) -> Tensor:
    """Return min(1, τ/‖X_g‖); 1 for a group that is zero, unless τ = 0."""
    return (tau / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)


def smooth(norm: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    """Return τ/√(‖X_g‖² + ε²), for ε ≥ τ; 0 where τ = 0."""
    return tau / torch.hypot(norm, eps).clamp_min(torch.finfo(norm.dtype).tiny)


def power(log_norm: Tensor, amount: Tensor, p: float, cap: float = 1.0) -> Tensor:
    """Return min(amount · ‖X_g‖^(p - 1), cap); 0 for a group that is zero.

    Args:
        log_norm: log ‖X_g‖, -∞ for zero: a norm itself may be beyond the range of its dtype.
        amount: lr · strength, ≥ 0.
        p: of the penalty strength · ‖X_g‖^(p + 1)/(p + 1), whose gradient step this is.
        cap: the largest share, in (0, 1].
    """
    share = amount.expand_as(log_norm) if p == 1 else torch.exp(torch.log(amount) + (p - 1) * log_norm)
    return torch.where((log_norm == -math.inf) | (amount == 0), 0.0, share.clamp_max(cap))


def spare_largest(share: Tensor, norm: Tensor, keep: int) -> Tensor:
    """Return the shares with zero for the ``keep`` largest groups along the last dimension; of equals, the first."""
    largest = norm.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return share.scatter(-1, largest, 0.0)


def hold_norm(share: Tensor, norm: Tensor) -> Tensor:
    """Return the shares after which the norm over all groups (last dimension) is what it was; 0 where none is left."""
    before = torch.linalg.vector_norm(norm, dim=-1, keepdim=True)
    after = torch.linalg.vector_norm((1 - share) * norm, dim=-1, keepdim=True)
    return torch.where(after > 0, 1 - (1 - share) * (before / nonzero(after)), 0.0)


def radial(X: Tensor, decayed: Tensor) -> Tensor:
    """Return the share of a whole matrix that a step takes along it: ⟨X - X', X⟩/‖X‖²; 0 for a zero matrix.

    Args:
        X: before the step, (..., m, n).
        decayed: X', after it.

    Returns:
        (..., 1, 1).
    """
    square = X.square().sum((-2, -1), keepdim=True)
    along = ((X - decayed) * X).sum((-2, -1), keepdim=True)
    return torch.where(square > 0, along / nonzero(square), 0.0)


def towards(norm: Tensor, target: Tensor | float) -> Tensor:
    """Return the share after which a group has a given norm, < 0 where it grows; 0 for a group that is zero."""
    return torch.where(norm > 0, 1 - target / nonzero(norm), 0.0)
