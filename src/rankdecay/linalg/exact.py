"""Functions of singular values by a float64 eigendecomposition of the Gram matrix, verified, or by SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rankdecay.linalg.backend import note_backend
from rankdecay.linalg.stack import Prepared, decomposed, gram
from rankdecay.linalg.threshold import leave_directions

#: What the singular values of a float64 matrix are known to, in roundings of the largest: where a step leaves no more
#: of a direction, nothing stays. Eight times the most that was seen up to side 400.
_ROUNDINGS = 16

#: Relative size of a null singular value for input of float32 and below (see :mod:`rankdecay.linalg.polar`).
NULL_TOLERANCE = 2.0**-21


def apply_exact(
    prepared: Prepared,
    f: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    *,
    complement: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """Return X V diag(f(σ)) Vᵀ in float64, or what is left of X when each direction loses the share f(σ).

    Args:
        prepared: Float64 stack from :func:`prepare`, X of shape (..., m, n).
        f: Maps σ of shape (..., n), in no particular order, and the null tolerance of shape (..., 1) to the
            multipliers.
        dtype: Dtype of the original input, which decides how many digits count.
        complement: Subtract the result from X; exactly zero where every multiplier is 1.
        overwrite: Whether the complement may take the place of X.
    """
    X = prepared.X
    if complement:
        V, share = lost_directions(prepared, f, dtype)
        return leave_directions(X, V, share, coarse=dtype != torch.float64, overwrite=overwrite)
    sigma, V = _right_singular(X, dtype)
    return X @ ((V * f(sigma, _null(sigma, X, dtype))[..., None, :]) @ V.mT)


def lost_directions(
    prepared: Prepared, f: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return V (..., n, n) and the share that each direction loses (..., n); arguments as :func:`apply_exact`."""
    sigma, V = _right_singular(prepared.X, dtype)
    share = f(sigma, _null(sigma, prepared.X, dtype))
    if dtype == torch.float64:  # what σ cannot tell from nothing is nothing
        nothing = ((1 - share) * sigma).abs() <= _ROUNDINGS * 2.0**-52 * sigma.amax(-1, keepdim=True)
        share = share.masked_fill(nothing & (share > 0.5), 1.0)
    return V, share


def _null(sigma: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the σ (..., 1) that count as zero."""
    tolerance = NULL_TOLERANCE if dtype != torch.float64 else max(X.shape[-2:]) * 2.0**-52
    return tolerance * sigma.amax(-1, keepdim=True)


def _right_singular(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return σ (..., n) and V (..., n, n) of the tall float64 stack ``X``, by eigh of XᵀX or by SVD."""
    note_backend("exact")
    lam, V, good = eigenvectors(gram(X))
    if dtype == torch.float64:
        # Relative error of σ² from the Gram: 2^-52 κ². Beyond κ = 1e4 that is too much for float64 input.
        good &= lam[..., 0] >= 1e-8 * lam[..., -1]
    sigma = lam.clamp_min(0).sqrt()
    if dtype == torch.float64:  # λ is known to a rounding of λ₁ only, ‖X v‖ to one of σ₁
        sigma = torch.linalg.vector_norm(X @ V, dim=-2)
    by_svd_where_bad(X, sigma, V, good)
    return sigma, V


def by_svd_where_bad(X: Tensor, values: Tensor, V: Tensor, good: Tensor) -> None:
    """Replace the values (..., n) and vectors V (..., n, n) of tall matrices that are not good, by SVD of X."""
    if not bool(good.all()):
        note_backend("svd")
        _, s, Vh = decomposed(partial(torch.linalg.svd, full_matrices=False), X[~good])
        values[~good], V[~good] = s, Vh.mT


def eigenvectors(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return λ (..., n) rising, eigenvectors (..., n, n), and whether they can be trusted (...): by eigh."""
    try:
        lam, V = decomposed(torch.linalg.eigh, G)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # One matrix that does not converge fails the whole stack.
        never = torch.zeros(G.shape[:-2], dtype=torch.bool, device=G.device)
        return G.new_zeros(G.shape[:-1]), torch.zeros_like(G), never
    return lam, V, _verified(G, lam, V)


def _verified(G: Tensor, lam: Tensor, V: Tensor) -> Tensor:
    """Return, per matrix, whether V is orthogonal and G = V diag(λ) Vᵀ, on probe vectors: O(n²).

    A wrong decomposition (seen on CUDA: non-orthonormal eigenvectors without any error) misses almost every
    vector by much; four fixed probes see it at a thousandth of the price of ‖VᵀV − I‖.
    """
    n = G.shape[-1]
    grid = torch.arange(1, 4 * n + 1, dtype=G.dtype, device=G.device).reshape(n, 4)
    probe = torch.cos(grid * grid).mT.contiguous()  # irregular, entries of order 1; the same in every run
    y = probe @ V  # as rows, which is the way in which eigenvectors lie in memory
    off = torch.linalg.vector_norm(y @ V.mT - probe, dim=(-2, -1))
    residual = torch.linalg.vector_norm((y * lam[..., None, :]) @ V.mT - probe @ G, dim=(-2, -1))
    size = torch.linalg.vector_norm(probe)
    bound = 1e-14 * (10 + math.sqrt(n)) * size  # LAPACK stays a hundred times below
    return (off <= bound) & (residual <= bound * lam.abs().amax(-1))


def inverse(sigma: Tensor, null: Tensor) -> Tensor:
    """Return 1/σ, and 0 where σ is not above the null tolerance: with it X V f(σ) Vᵀ is the polar factor."""
    return torch.where(sigma > null, 1 / sigma.clamp_min(2.0**-1022), 0.0)
