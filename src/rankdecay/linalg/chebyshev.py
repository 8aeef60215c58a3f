r"""The inverse square root of a shifted Gram matrix by few products: Chebyshev polynomials of least relative error.

With :math:`y \in [0, 1]` and :math:`\delta > 0` the function :math:`(y + \delta)^{-1/2}` has its only singularity at
:math:`-\delta`, so polynomials converge like :math:`(1 + 2\sqrt\delta)^{-d}`: their degree d follows from δ alone. Here
it is the least one with relative error :data:`TOLERANCE`, or what costs no more products, lowered by its error, so that
p is never above the function.
A polynomial of degree s·r costs s + r - 2 products (Paterson & Stockmeyer 1973), here on Chebyshev polynomials, whose
coefficients stay small:

.. math:: p = \sum_{j \le r} q_j(T_1, \dots, T_{s-1}) \, T_j(T_s) .

======  ======  ========  ======================================
δ       degree  products  ε/σ₁ as the singular values go
======  ======  ========  ======================================
4       2       1         2
1       4       2         1
0.25    8       4         0.5
0.0625  15      6         0.25
0.0169  27      9         0.13: the bound σ₁ = ‖W‖_F met
0.004   54      13        0.063
======  ======  ========  ======================================
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rankdecay.linalg.tiers import Product

#: Relative error of a polynomial to either side before it is lowered; afterwards it is at most twice this, below.
TOLERANCE = 2e-4

#: δ goes in steps of 2^(1/4); these are the exponents, from δ = 8 to δ = 0.0039.
FIRST, LAST = -12, 32


class Polynomial(NamedTuple):
    """Chebyshev coefficients on [0, 1]."""

    degree: int
    coefficients: tuple[float, ...]


def index_of(delta: Tensor) -> Tensor:
    """Return the number of the largest tabulated δ that is not above ``delta``; above :data:`LAST` there is none."""
    return torch.ceil(-4 * delta.log2()).clamp(FIRST, LAST + 1).to(torch.int64)


def delta_of(index: Tensor) -> Tensor:
    """Return δ = 2^(-index/4), float64."""
    return torch.exp2(index.double() / -4)


@cache
def polynomial(index: int) -> Polynomial:
    r"""Return p of least degree with √δ (y + δ)^(-1/2) (1 - 2·TOLERANCE) ≤ p ≤ √δ (y + δ)^(-1/2) on [0, 1]."""
    delta = 2 ** (-index / 4)
    # The degree grows as the logarithm over √δ; the search starts a little below.
    degree = max(1, int(2.6 / math.sqrt(delta)) - 2)
    while _fit(delta, degree)[0] > TOLERANCE:
        degree += 1
    degree = math.prod(shape_of(degree))
    error, coefficients = _fit(delta, degree)
    return Polynomial(degree, tuple((coefficients * (math.sqrt(delta) * (1 - 1.001 * error - 1e-7))).tolist()))


def _fit(delta: float, degree: int) -> tuple[float, Tensor]:
    """Return the largest relative error and the coefficients; near the least error, by Lawson's reweighting."""
    count = 12 * degree + 50
    theta = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    root = ((theta.cos() + 1) / 2 + delta).sqrt()
    basis = torch.cos(theta[:, None] * torch.arange(degree + 1)) * root[:, None]
    weight = torch.full((count,), 1 / count, dtype=torch.float64)
    best, found = math.inf, basis[0]
    for _ in range(15):
        half = weight.sqrt()[:, None]
        fitted = torch.linalg.lstsq(basis * half, half).solution[:, 0]
        error = (basis @ fitted - 1).abs()
        if float(error.max()) < best:
            best, found = float(error.max()), fitted
        weight = weight * error
        weight /= weight.sum()
    return best, found


@cache
def shape_of(degree: int) -> tuple[int, int]:
    """Return s ≥ 2 and r ≥ 1 with s·r ≥ degree and the fewest products, s + r - 2."""
    pairs = ((s, max(1, -(-degree // s))) for s in range(2, degree + 3))
    return min(pairs, key=lambda pair: (sum(pair), pair[0]))


@cache
def blocks(index: int, s: int, r: int) -> tuple[tuple[float, ...], ...]:
    """Return q of the module's formula, r + 1 rows of s; of the last only the first is not zero."""
    c = list(polynomial(index).coefficients)
    c += [0.0] * (s * r + 1 - len(c))
    q = [[0.0] * s for _ in range(r + 1)]
    for j in range(r, 0, -1):
        for i in range(s - 1, 0, -1):
            if j < r:  # T_{js+i} = 2 T_{js} T_i - T_{js-i}
                q[j][i] = 2 * c[j * s + i]
                c[j * s - i] -= c[j * s + i]
        q[j][0] = c[j * s]
    q[0] = c[:s]
    return tuple(map(tuple, q))


def evaluate(
    G: Tensor, square: Tensor | None, beta: Tensor, indices: list[int], product: Product | None = None
) -> Tensor:
    """Return p(G/β) of each matrix, with its own polynomial.

    Args:
        G: symmetric (b, n, n), eigenvalues in [0, β].
        square: G², if it is there.
        beta: (b, 1, 1).
        indices: the polynomial of each, or one for all.
        product: of stacks of matrices; torch's if None.
    """

    def product_and_sum(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float) -> Tensor:
        if product is None:
            return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
        return product(A, B).mul_(alpha).add_(C, alpha=beta)

    b, n = G.shape[:2]
    s, r = shape_of(max(polynomial(index).degree for index in indices))
    q = torch.tensor([blocks(index, s, r) for index in indices], dtype=G.dtype).to(G.device, non_blocking=True)
    q = q.expand(b, r + 1, s)
    basis = G.new_empty(b, s, n, n)
    basis[:, 0] = torch.eye(n, dtype=G.dtype, device=G.device)
    first = basis[:, 1]
    torch.mul(G, 2 / beta, out=first).diagonal(dim1=-2, dim2=-1).sub_(1)
    if square is None:
        second = first @ first if product is None else product(first, first)
        second.mul_(2)
    else:  # T_2 = 8 y² - 8 y + 1
        second = (square * (8 / beta.square())).addcmul_(G, -8 / beta)
    second.diagonal(dim1=-2, dim2=-1).add_(1 if square is not None else -1)
    last = second
    for i in range(3, s + 1):
        basis[:, i - 1] = last
        last = product_and_sum(basis[:, i - 2], first, basis[:, i - 1], -1, 2)
    part = torch.bmm(q[:, :r], basis.flatten(2)).view(b, r, n, n)  # q_j, all in one pass over the basis
    top = q[:, r, :1, None]
    if r == 1:
        return part[:, 0].addcmul_(last, top)
    later, now = None, part[:, r - 1].addcmul_(last, 2 * top)
    for j in range(r - 2, -1, -1):
        rest = part[:, j]
        if later is None:
            rest.diagonal(dim1=-2, dim2=-1).sub_(q[:, r, :1])
        else:
            rest -= later
        later, now = now, product_and_sum(rest, last, now, 1, 2 if j else 1)
    return now
