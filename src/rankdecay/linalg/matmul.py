"""Polar factors by matrix products only: compositions of minimax polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankdecay.linalg import chebyshev
from rankdecay.linalg.minimax import LIMIT, SAFETY, SCHEDULES, SQUASH, Triple
from rankdecay.linalg.stack import frobenius, nonzero, times
from rankdecay.linalg.tiers import Product, available, product_of


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
    F = nonzero(frobenius(X))
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


def smooth_by_products(X: Tensor, eps: Tensor, share: Tensor, norm: Tensor, ratio: float | None) -> Tensor:
    """Return share · ε X (XᵀX + ε²I)^(-1/2), the part that a smooth step takes.

    Where ε is not much below σ₁, and X is float32, by the polynomial of :mod:`rankdecay.linalg.chebyshev` that ε/σ₁
    needs, with an error of at most 5e-4 of what is taken; otherwise by :func:`smooth_polar_by_products`. A CPU reads
    a bound of σ₁ for each matrix; other devices know ``ratio``, so that they need not wait.

    Args:
        X: Tall stack (b, m, n).
        eps: ε > 0, (b, 1, 1), float64.
        share: (b, 1, 1), in the dtype of X.
        norm: ‖X‖_F, (b, 1, 1), float64.
        ratio: A lower bound of ε/‖X‖_F that the caller knows without reading the device, or None.
    """
    if X.dtype == torch.float32 and X.device.type == "cpu":
        few, bounded = _few_products(X, eps, norm)
        few = few[:, 0, 0]
        if bool(few.all()):
            G, square, bound = bounded or _bounded(X)
            return times(X, _inverse_root(G, square, eps, chebyshev.index_of(eps.square() / bound)).mul_(share))
        if bool(few.any()):  # which way a matrix goes does not depend on its neighbours
            taken = torch.empty_like(X)
            for some in (few, ~few):
                taken[some] = smooth_by_products(X[some], eps[some], share[some], norm[some], ratio)
            return taken
    elif X.dtype == torch.float32 and ratio is not None and ratio**2 * (1 - 1e-5) >= _LEAST_DELTA:
        product = product_of(choose_tier(ratio, available(X.device)))
        return smooth_by_few_products(X, eps, share, ratio, product)
    return (share * eps.to(X.dtype)) * smooth_polar_by_products(X, eps, ratio)


#: The least ε/‖W‖_F from which the step by a tier is within 9e-4 of float64's (`benchmarks/tiers.py`), the quickest
#: first. At 0.13 TF32 would be 4e-3 off, and plain bfloat16 3e-2; that is never within 1e-3.
LEAST_RATIO = {"tf32": 0.35, "bfloat16x3": 0.0, "float32": 0.0}


def choose_tier(ratio: float, tiers: Sequence[str]) -> str:
    """Return the quickest of a device's tiers that leaves a smooth step within 1e-3, for ε of at least ratio·‖W‖_F."""
    return next(tier for tier in tiers if ratio >= LEAST_RATIO[tier])


def smooth_by_few_products(X: Tensor, eps: Tensor, share: Tensor, ratio: float, product: Product | None) -> Tensor:
    """Return :func:`smooth_by_products` where ε is at least ``ratio``, some 0.0625, of ‖X‖_F, by a given product.

    Largest error of the step found, over spectra and shapes (`python benchmarks/tiers.py`):

    ===========  =======  ============  =======  ===================
    ε/‖X‖_F      TF32     bfloat16 × 3  float32  (bfloat16)
    ===========  =======  ============  =======  ===================
    0.0626       3.0e-2   4.8e-4        2.1e-4   2.7e-1
    0.08         5.9e-3   3.7e-4        3.6e-4   4.9e-2
    0.13         3.8e-3   1.9e-4        1.9e-4   3.5e-2
    0.2          1.4e-3   1.5e-4        1.5e-4   1.4e-2
    0.3          9.9e-4   3.5e-4        3.5e-4   7.9e-3
    0.35         8.1e-4   1.7e-4        1.7e-4   6.7e-3
    0.5          5.6e-4   1.7e-4        1.7e-4   4.8e-3
    1            4.3e-4   2.3e-4        2.3e-4   2.9e-3
    ===========  =======  ============  =======  ===================
    """
    index = chebyshev.index_of(torch.full((1, 1, 1), ratio**2 * (1 - 1e-5), dtype=torch.float64))
    G = product(X.mT, X) if product else X.mT @ X
    root = _inverse_root(G, None, eps, index, product).mul_(share)
    return product(X, root) if product else times(X, root)


def _inverse_root(
    G: Tensor, square: Tensor | None, eps: Tensor, index: Tensor, product: Product | None = None
) -> Tensor:
    """Return ε (G + ε²I)^(-1/2) by the polynomials of an index (b or 1, 1, 1), on the host."""
    beta = (eps.square() / chebyshev.delta_of(index).to(eps.device, non_blocking=True)).clamp_max(2.0**100).to(G.dtype)
    return chebyshev.evaluate(G, square, beta, index.flatten().tolist(), product)


def few_products(X: Tensor, eps: Tensor, norm: Tensor) -> Tensor:
    """Return whether a polynomial serves each matrix of a float32 stack, (b, 1, 1)."""
    return _few_products(X, eps, norm)[0]


def _few_products(X: Tensor, eps: Tensor, norm: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Return the same, and what :func:`_bounded` gave, if norms alone did not decide it."""
    least, most = _least_delta(eps, norm, 1), _least_delta(eps, norm, X.shape[-1])
    few = least >= _LEAST_DELTA
    open_ = ~few & (most >= _LEAST_DELTA)
    if not bool(open_.any()):
        return few, None
    bounded = _bounded(X)
    return few | (open_ & (chebyshev.index_of(eps.square() / bounded[2]) <= chebyshev.LAST)), bounded


_LEAST_DELTA = 2.0 ** (-chebyshev.LAST / 4)


def _least_delta(eps: Tensor, norm: Tensor, directions: int) -> Tensor:
    """Return ε²/σ₁² if ‖X‖_F is that of equal directions; without rounding, since ‖X‖_F has some."""
    return directions * (1 - 1e-5) * (eps / norm.clamp_min(1e-300)).square()


def _bounded(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return G = XᵀX, G², and an upper bound of σ₁², (Σ σ⁸)^(1/4), (..., 1, 1), float64."""
    G = X.mT @ X
    square = G @ G
    bound = frobenius(square).double().sqrt()
    return G, square, (bound * (1 + 1e-5)).clamp_min(1e-300)


#: The least ℓ, a lower bound of σ_min after scaling, from which :func:`smooth_polar_by_products` computes in float32.
FLOAT32_FROM = 3e-3


def smooth_polar_by_products(X: Tensor, eps: Tensor, ratio: float | None = None) -> Tensor:
    r"""Return X (XᵀX + ε²I)^(-1/2) by products of n × n matrices.

    Augment :math:`X_e = [X; \epsilon I]`. The top block of its polar factor is the wanted matrix, and
    :math:`\sigma_{min}(X_e) \ge \epsilon`, so after division by
    :math:`\varphi = s \sqrt{F^2 + n \epsilon^2}` the spectrum lies in :math:`[\ell, 1]` with
    :math:`\ell = \epsilon/\varphi` known: each matrix takes the frozen schedule certified for its own ℓ,
    by look-up on the device. Only the Gram matrix :math:`R = X_e^T X_e` and the accumulated factor Q are
    iterated:

    .. math:: Z = bR + cR^2, \quad Q \leftarrow aQ + QZ, \quad Y = aR + RZ, \quad R \leftarrow aY + YZ .

    A Gram matrix keeps σ only down to the square root of its precision. Float32 is used where ℓ is known on the host
    to be at least :data:`FLOAT32_FROM`, float64 otherwise.

    Args:
        X: Tall stack (..., m, n).
        eps: ε > 0 of shape (..., 1, 1).
        ratio: A lower bound of ε/F known to the caller without reading the device, or None.
    """
    input_dtype = X.dtype
    n = X.shape[-1]
    F = frobenius(X, torch.float64)
    phi = SAFETY * torch.hypot(F, math.sqrt(n) * eps.double())  # hypot: ε may be far above F
    ell = eps / phi
    if X.device.type == "cpu":
        floor = float(ell.amin())
    else:
        floor = 0.0 if ratio is None else ratio / (SAFETY * math.sqrt(1 + n * ratio * ratio))
    dtype = X.dtype if floor >= FLOAT32_FROM else torch.float64
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
    return times(X, Q).to(input_dtype)
