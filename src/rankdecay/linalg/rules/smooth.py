"""Soft threshold without its jump, σ → σ - τ σ/√(σ² + ε²) with ε = max(τ, smoothing·‖W‖_F): never crosses zero.

It differs from the prox by at most 0.293 τ in any direction when ε = τ. Directions below ε decay exponentially instead
of reaching zero in finite time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankdecay.linalg.matmul import few_products, smooth_by_products
from rankdecay.linalg.stack import Prepared, frobenius, nonzero
from rankdecay.linalg.threshold import smooth
from rankdecay.rules import Options, Rule


def _share(sigma: Tensor, null: Tensor, tau: Tensor, options: Options) -> Tensor:
    F = torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
    return smooth(sigma, tau, torch.maximum(tau, options.smoothing * F))


def _width(norm: Tensor, tau: Tensor, options: Options) -> Tensor:
    """Return ε (..., 1, 1); 1 for a zero matrix without τ, of which nothing can be taken."""
    return nonzero(torch.maximum(tau, options.smoothing * norm))


def _taken(prepared: Prepared, tau: Tensor, options: Options) -> Tensor:
    X = prepared.X
    norm = frobenius(X).double()
    eps = _width(norm, tau, options)
    # Far above ‖W‖_F a direction keeps less than a rounding, (σ/τ)²/2: all is taken.
    all_taken = tau > norm * (2.0**14 if X.dtype == torch.float32 else 2.0**28)
    share = torch.where(all_taken, 0.0, tau / eps).to(X.dtype)
    taken = smooth_by_products(X, eps, share, norm, options.smoothing or None)
    return torch.where(all_taken, X, taken)


#: Smallest side of a matrix for whose step a CPU takes products. Below it there is little to gain, and the step of a
#: matrix depends on nothing but the matrix, to the last digit: members of an ensemble, shards and one process agree.
_LEAST_SIDE = 256


def _products_pay(prepared: Prepared, tau: Tensor, options: Options) -> Tensor:
    norm = frobenius(prepared.X).double()
    if prepared.X.shape[-1] < _LEAST_SIDE:
        return torch.zeros(norm.shape[:-2], dtype=torch.bool, device=norm.device)
    return few_products(prepared.X, _width(norm, tau, options), norm)[..., 0, 0]


RULE = Rule(
    "smooth",
    "W (WᵀW + ε²)^(−1/2), never crosses zero",
    _share,
    _taken,
    _products_pay,
    smoothing=True,
    keep=True,
    homogeneous=True,
)
