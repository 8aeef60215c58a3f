r"""What every decay does: a group of a weight loses a share of itself.

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

:func:`spare_largest` and :func:`hold_norm` change shares that were found; :func:`leave` applies them. The exceptions to
t ≥ 0 are :func:`hold_norm`, which lets a group grow, and an experiment's control that turns a step round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def leave(X: Tensor, share: Tensor | float) -> Tensor:
    """Return (1 - t) X, to the last digit X where t = 0.

    Args:
        X: groups, any shape.
        share: t, broadcastable to ``X``.
    """
    return X - share * X


def leave_(X: Tensor, share: Tensor) -> None:
    """Make X (1 - t) X in place, in one pass over its memory; as :func:`leave`, and exactly zero where t = 1."""
    X.addcmul_(X, share.to(X.dtype), value=-1)


def leave_directions(X: Tensor, V: Tensor, share: Tensor) -> Tensor:
    """Return what is left of X when each right singular direction loses its share: :func:`leave` in their basis.

    Args:
        X: matrices (..., m, n).
        V: their right singular vectors (..., n, n).
        share: t of each, (..., n).
    """
    taken = X @ taken_by_directions(V, share)
    return torch.sub(X, taken, out=taken)


def taken_by_directions(V: Tensor, share: Tensor) -> Tensor:
    """Return V diag(t) Vᵀ, the part of X that is taken from its right; exactly I where t = 1 in every direction."""
    # A share of 1 - 1e-13 is one of a threshold at σ₁, up to the rounding of σ₁ itself.
    all_taken = ((share - 1).abs() <= 2.0**-50 * (8 + share.shape[-1])).all(-1)[..., None, None]
    identity = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    return torch.where(all_taken, identity, (V * share[..., None, :]) @ V.mT)


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
    return torch.where(after > 0, 1 - (1 - share) * (before / torch.where(after > 0, after, 1.0)), 0.0)


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
    return torch.where(square > 0, along / torch.where(square > 0, square, 1.0), 0.0)


def towards(norm: Tensor, target: Tensor | float) -> Tensor:
    """Return the share after which a group has a given norm, < 0 where it grows; 0 for a group that is zero."""
    return torch.where(norm > 0, 1 - target / torch.where(norm > 0, norm, 1.0), 0.0)


def reference(W: Sequence[Sequence[float]], tau: float, *, keep: int = 0, preserve_norm: bool = False) -> Tensor:
    """Return the soft threshold of singular directions, by an SVD in float64: what the fast paths are compared with."""
    U, sigma, Vh = torch.linalg.svd(torch.as_tensor(W, dtype=torch.float64), full_matrices=False)
    left = torch.where(torch.arange(len(sigma)) < keep, sigma, (sigma - tau).clamp_min(0))
    if preserve_norm and left.any():
        left = left * (sigma.norm() / left.norm())
    return U * left @ Vh
