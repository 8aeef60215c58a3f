r"""Decay steps from a Gram matrix alone, for weights of which no process holds all rows.

Every decay rule multiplies W on one side by a matrix that depends on W through its Gram matrix G = WᵀW only:

.. math:: \mathrm{shrink}(W) = W - W C(G), \qquad C = V c(\sigma) V^T .

So where W is cut into rows, its Gram matrices add up to G, C is the same everywhere, and the rest is local.

* **exact**: the rule's :attr:`~rankdecay.rules.Rule.fraction` of σ, on the eigenvectors of G.
* **matmul**: a triangular R with RᵀR = G has the singular values of W, so :func:`~rankdecay.linalg.shrink` of R says
  what it takes from W: :math:`C = R^{-1}(R - \mathrm{shrink}(R))`. Cholesky's, of G a little above singular.

Both work in float64, since squaring halves the digits: σ below 1e-8 of the largest is lost. That is below the rounding
of float32 weights; of float64 ones only the rules that are always products are taken this way
(:mod:`rankdecay.decay.sharded.sums`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankdecay.checks import check_name
from rankdecay.linalg.backend import full_precision, note_backend
from rankdecay.linalg.exact import NULL_TOLERANCE, by_svd_where_bad, eigenvectors
from rankdecay.linalg.shrink import by_decomposition, check_options, shares, shrink
from rankdecay.linalg.stack import finite, power_of_two
from rankdecay.linalg.threshold import taken_by_directions
from rankdecay.rules import Options, Rule, get_rule


@torch.no_grad()
def shrink_factor(
    G: Tensor,
    tau: float | Tensor,
    rule: str = "prox",
    *,
    backend: str = "exact",
    rank: int | Tensor | None = None,
    exponent: int | Tensor = 0,
    **step: Any,
) -> Tensor:
    """Return C such that W - W C is :func:`~rankdecay.linalg.shrink` of every W with WᵀW = G.

    Args:
        G: Gram matrices (..., n, n), float64.
        tau: τ ≥ 0 of each, a number or (...), in the units of the singular values of W.
        rule: as for :func:`~rankdecay.linalg.shrink`.
        backend: ``"exact"`` or ``"matmul"``.
        rank: the smaller side of W, a number or (...): for ``relative``. None: n, of a W that is not wide.
        exponent: a number or (...): G is the Gram matrix of W/2^exponent. The squares of float64 weights overflow from
            1e154 and underflow below 1e-154; those of any narrower dtype do neither.
        **step: the other options of the step, :class:`~rankdecay.rules.Options`; τ may be ``relative`` to
            rms(σ) = ‖W‖_F/√rank.

    Returns:
        (..., n, n), float64; NaN where G or τ is not finite. Zero where τ = 0.

    Raises:
        ValueError: If ``rule`` or ``backend`` is unknown, or the rule has no ``keep``.
    """
    chosen, options = get_rule(rule), check_options(rule, Options(**step))
    check_name("backend", backend, ("exact", "matmul"))
    tau = torch.as_tensor(tau, dtype=torch.float64, device=G.device)[..., None]  # beside σ
    if not isinstance(exponent, int) or exponent != 0:
        scale = power_of_two(torch.as_tensor(exponent, device=G.device).clamp(-1022, 1022), torch.float64)[..., None]
    else:
        scale = tau.new_ones(())
    rank = G.shape[-1] if rank is None else rank
    root = rank.to(G.device, torch.float64)[..., None].sqrt() if isinstance(rank, Tensor) else rank**0.5
    F = G.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).sqrt()
    bad = ~(G.isfinite().all(-1).all(-1, keepdim=True) & tau.isfinite())
    unit = torch.where(bad | (F == 0), 1.0, F)
    G = (G / unit[..., None].square()).masked_fill(bad[..., None], 0)
    tau = finite(tau * torch.where(F == 0, 0.0, 1 / root) if options.relative else tau / (unit * scale))
    options = options._replace(relative=False)
    with full_precision(G.device):
        if by_decomposition(chosen, options, backend):
            C = _by_eigenvalues(G, unit * scale, tau, chosen, options)
        else:
            C = _by_products(G, tau, rule, options)
    return C.masked_fill(bad[..., None], torch.nan)


def _by_eigenvalues(G: Tensor, unit: Tensor, tau: Tensor, rule: Rule, options: Options) -> Tensor:
    note_backend("exact")
    sigma, V = _eigenvectors(G)
    null = NULL_TOLERANCE * sigma.amax(-1, keepdim=True)
    return taken_by_directions(V, shares(sigma, null, tau, unit, rule, options))


def _eigenvectors(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ = √λ (..., n) and the eigenvectors (..., n, n); by SVD where eigh does not converge or is wrong."""
    lam, V, good = eigenvectors(G)
    by_svd_where_bad(G, lam, V, good)
    return lam.clamp_min(0).sqrt(), V


def _by_products(G: Tensor, tau: Tensor, rule: str, options: Options) -> Tensor:
    n = G.shape[-1]
    identity = torch.eye(n, dtype=G.dtype, device=G.device)
    R = torch.linalg.cholesky_ex(G + n * 2.0**-52 * identity).L.mT
    difference = R - shrink(R, tau[..., 0], rule, **options._asdict(), backend="matmul")
    return torch.linalg.solve_triangular(R, difference, upper=True)
