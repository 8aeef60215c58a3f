"""Polar factors by matrix products only: compositions of minimax polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankdecay.linalg.minimax import LIMIT, SAFETY, SCHEDULES, SQUASH, Triple


def iterate(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Return the composition of odd quintics applied to the tall stack ``X``, by products only.

    X ← X (a I + b XᵀX + c (XᵀX)²) per step: three products. ``X`` is not modified.
    """
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    for a, b, c in triples:
        A = X.mT @ X
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a)
    return X.reshape(shape)


def normalised(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return X/F and F = ‖X‖_F of shape (..., 1, 1); a zero matrix gives zeros and F = 1."""
    F = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    F = torch.where(F == 0, 1.0, F)
    return X / F, F


#: Polar factor by products. The first twelve take σ/F in [1e-6, 1] to 1. Rounding puts noise of about 1e-7 F
#: into null directions and the steep start amplifies it to some tenths; the squashing steps take that back
#: to zero.
POLAR_STEPS: tuple[Triple, ...] = (*SCHEDULES[1e-6], SQUASH, SQUASH, SQUASH)


def polar_by_products(X: Tensor) -> Tensor:
    """Return the polar factor of each matrix of a tall stack."""
    return iterate(normalised(X)[0], POLAR_STEPS)


def cubic_newton_schulz(X: Tensor, steps: int) -> Tensor:
    """Return ``steps`` cubic steps X ← X (3I - XᵀX)/2 from X/‖X‖_F of a tall stack."""
    X = normalised(X)[0]
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    for _ in range(steps):
        X = torch.baddbmm(X, X, X.mT @ X, beta=1.5, alpha=-0.5)
    return X.reshape(shape)


def smooth_polar_by_products(X: Tensor, eps: Tensor, ratio: float | None = None) -> Tensor:
    r"""Return X (XᵀX + ε²I)^(-1/2) by products of n × n matrices.

    Augment :math:`X_e = [X; \epsilon I]`. The top block of its polar factor is the wanted matrix, and
    :math:`\sigma_{min}(X_e) \ge \epsilon`, so after division by
    :math:`\varphi = s \sqrt{F^2 + n \epsilon^2}` the spectrum lies in :math:`[\ell, 1]` with
    :math:`\ell = \epsilon/\varphi` known: each matrix takes the frozen schedule certified for its own ℓ,
    by look-up on the device. Only the Gram matrix :math:`R = X_e^T X_e` and the accumulated factor Q are
    iterated:

    .. math:: Z = bR + cR^2, \quad Q \leftarrow aQ + QZ, \quad Y = aR + RZ, \quad R \leftarrow aY + YZ .

    A Gram matrix keeps σ only down to the square root of its precision. Float32 is used where ℓ ≥ 1e-3 is
    known on the host, float64 otherwise.

    Args:
        X: Tall stack (..., m, n).
        eps: ε > 0 of shape (..., 1, 1).
        ratio: A lower bound of ε/F known to the caller without reading the device, or None.
    """
    input_dtype = X.dtype
    n = X.shape[-1]
    F = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    phi = SAFETY * torch.hypot(F, math.sqrt(n) * eps.double())  # hypot: ε may be far above F
    ell = eps / phi
    if X.device.type == "cpu":
        floor = float(ell.amin())
    else:
        floor = 0.0 if ratio is None else ratio / (SAFETY * math.sqrt(1 + n * ratio * ratio))
    dtype = X.dtype if floor >= 3e-3 else torch.float64
    ells = sorted(SCHEDULES, reverse=True)  # from the shortest schedule to the longest
    longest = next((table for table in ells if table <= floor), ells[-1])
    length = len(SCHEDULES[longest])
    # Every matrix runs `length` steps; its own schedule, if shorter, is padded with the quintic that keeps 1.
    table = torch.tensor([[*SCHEDULES[e], *[LIMIT] * length][:length] for e in ells], dtype=dtype)
    table = table.to(X.device, non_blocking=True)  # (schedules, length, 3)
    # The first schedule whose ℓ is not above that of the matrix: (..., 1)
    index = torch.stack([ell[..., 0] < e for e in ells[:-1]]).sum(0)
    coefficients = table[index].movedim(-2, 0)  # (length, ..., 1, 3)

    X = (X / phi).to(dtype)
    identity = torch.eye(n, dtype=dtype, device=X.device)
    R = X.mT @ X + torch.square(ell).to(dtype) * identity
    Q = identity
    for step in range(length):
        a, b, c = coefficients[step].unsqueeze(-2).unbind(-1)  # each (..., 1, 1)
        Z = (R @ R).mul_(c).addcmul_(R, b)
        Q = a * identity + Z if step == 0 else (Q @ Z).addcmul_(Q, a)
        if step < length - 1:
            Y = (R @ Z).addcmul_(R, a)
            R = (Y @ Z).addcmul_(Y, a)
    return (X @ Q).to(input_dtype)
