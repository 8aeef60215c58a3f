r"""Soft threshold of the singular values, σ → max(σ - τ, 0): the proximal map of τ‖·‖_*.

It is singular value thresholding (Cai, Candès & Shen 2010): it composes, :math:`S_a \circ S_b = S_{a+b}`, is
non-expansive, and is the complement of clipping, :math:`S_\tau(W) = W - \mathrm{clip}_\tau(W)` (Moreau).

**By products.** With the polar factor O, the symmetric :math:`H = O^T W` and the spectral projector
:math:`N = (I - \mathrm{sign}(H - \tau I))/2` on the directions below τ, the usual form (W - τO)(I - N) carries a
rounding of the size of ‖W‖ times the error of the sign iteration. We clip instead, and subtract:

.. math::

    \mathrm{clip}_\tau(W) = \tau O (I - N^2) + (I - O (I - N) O^T) \, W N , \qquad
    S_\tau(W) = W - \mathrm{clip}_\tau(W).

Projecting from both sides squares the error of N where it would meet a large singular value, and a direction
with σ = τ, where the sign is undecided, comes out as τ for any value of N. What remains is the relative error
of O times τ, and a few roundings of W; in the directions below τ that would be 1e-5 of σ₁ instead of nothing. So N, of
a threshold above τ by :data:`_MARGIN`, is made a projector in float64 (N ← 3N² - 2N³, McWeeny), and what it spans
is taken out of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankdecay.linalg.matmul import iterate, polar_by_products
from rankdecay.linalg.minimax import SAFETY, SCHEDULES
from rankdecay.linalg.stack import Prepared, frobenius, nonzero, times_in_pieces
from rankdecay.linalg.threshold import soft
from rankdecay.rules import Options, Rule


def _share(sigma: Tensor, null: Tensor, tau: Tensor, options: Options) -> Tensor:
    return soft(sigma, tau)


#: Directions this far above τ, in ‖W‖_F, count as below it: more than the sign iteration can tell apart in float32.
_MARGIN = 3e-7


def _clip(prepared: Prepared, tau: Tensor, options: Options) -> Tensor:
    """Return clip_τ(X) by products (module docstring)."""
    X = prepared.X
    F = frobenius(X)
    all_taken = tau >= F * (1 - 1e-6)
    tau = torch.minimum(tau, F.double()).to(X.dtype)
    polar_factor = polar_by_products(X)
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    H = polar_factor.mT @ X
    H = (H + H.mT) / 2
    # The eigenvalues of H - τI lie in [-F, F], as τ does; their own norm may be much larger.
    reach = SAFETY * nonzero(F)
    below = (identity - _sign((H - tau * identity) / reach)) / 2
    clipped = X @ below
    inside = polar_factor.mT @ clipped
    clipped -= polar_factor @ (inside - below @ inside)
    clipped.add_(tau * (polar_factor @ (identity - below @ below)))
    dead = (identity - _sign((H - (tau + _MARGIN * F) * identity) / reach)).double() / 2
    for _ in range(3 if X.dtype == torch.float32 else 8):
        square = dead @ dead
        dead = torch.baddbmm(square, square, dead, beta=3, alpha=-2)
    # Of the directions above, their number is the trace of the rest; without one the matrix becomes zero.
    all_taken |= (X.shape[-1] - dead.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None, None] < 0.5
    left = X.double() - clipped
    for _ in range(1 if X.dtype == torch.float32 else 2):
        left -= left @ dead if X.dtype == torch.float32 else times_in_pieces(left, dead)
    left = left.to(X.dtype)
    return torch.where(all_taken, X, X - left)


def _sign(S: Tensor) -> Tensor:
    return iterate(S, SCHEDULES[1e-6])


RULE = Rule("prox", "soft threshold, exact zeros", _share, _clip, keep=True, homogeneous=True)
