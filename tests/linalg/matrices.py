"""The catalogue: matrices every backend must handle, and float64 SVD references to hold it against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 7), (16, 16), (33, 65), (64, 64), (127, 40), (40, 200)]
CONDITIONS = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator(seed)))[0]


def with_spectrum(shape: tuple[int, int], sigma: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix of ``shape`` with the singular values ``sigma`` and random singular vectors."""
    m, n = shape
    k = sigma.shape[-1]
    return (orthonormal(m, k, seed) * sigma) @ orthonormal(n, k, seed + 1).mT


def conditioned(shape: tuple[int, int], kappa: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Singular values log-spaced from 1 to 1/kappa."""
    k = min(shape)
    power = torch.arange(k, dtype=torch.float64) / max(k - 1, 1)
    return with_spectrum(shape, kappa**-power, seed).to(dtype)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def low_rank(m: int, n: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rank-deficient up to the rounding of a product computed in ``dtype``."""
    return gaussian(m, rank, seed=seed, dtype=dtype) @ gaussian(rank, n, seed=seed + 1, dtype=dtype)


def by_svd(W: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The reference: U diag(f(σ)) Vᵀ from a float64 SVD."""
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U * f(sigma)[..., None, :]) @ Vh


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def spectral_error(got: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(got.double() - expected, ord=2))


def rounding(W: Tensor) -> float:
    """Spectral norm that rounding W (or a matrix not larger) once to its dtype can have, as a safe bound."""
    return 2 * torch.finfo(W.dtype).eps * float(torch.linalg.matrix_norm(W.double(), ord="fro"))


def beside_the_largest(out: Tensor, count: int) -> float:
    """The next singular value after the ``count`` largest of a float64 matrix, without the roundings of LAPACK's.

    In the arithmetic of ``np.longdouble``: 80 bits on x86, where it tells a tenth of a rounding of float64.
    """
    sigma = torch.linalg.svdvals(out)
    known = min(count, int((sigma > 1e-6 * sigma[0]).sum()))
    if count >= len(sigma) or not known:
        return float(sigma[count]) if count < len(sigma) else 0.0
    exact = out.numpy().astype(np.longdouble)
    left = torch.linalg.svd(out, full_matrices=False)[0][:, :known].numpy().astype(np.longdouble)
    right = exact.T @ left  # one step of a subspace iteration, then orthonormal by Newton-Schulz
    left = exact @ (right @ np.linalg.inv((right.T @ right).astype(np.float64)).astype(np.longdouble))
    for _ in range(3):
        left = left @ (3 * np.eye(known) - left.T @ left) / 2
    rest = exact - left @ (left.T @ exact)
    return float(torch.linalg.svdvals(torch.from_numpy(rest.astype(np.float64)))[count - known])


# ---- what Hypothesis draws

dimensions = st.integers(1, 9)


levels = st.floats(0, 5)


seeds = st.integers(0, 10_000)


slow_is_fine = settings(max_examples=40, deadline=None)


def random_matrix(m, n, seed):
    return gaussian(m, n, seed=seed, dtype=torch.float64)


def thresholded(tau):
    return lambda s: (s - tau).clamp_min(0)


def soft_threshold_by_svd(
    W: Sequence[Sequence[float]], tau: float, *, keep: int = 0, preserve_norm: bool = False
) -> Tensor:
    """Return the soft threshold of singular directions, by an SVD in float64: what the fast paths are compared with."""
    U, sigma, Vh = torch.linalg.svd(torch.as_tensor(W, dtype=torch.float64), full_matrices=False)
    left = torch.where(torch.arange(len(sigma)) < keep, sigma, (sigma - tau).clamp_min(0))
    if preserve_norm and left.any():
        left = left * (sigma.norm() / left.norm())
    return U * left @ Vh
