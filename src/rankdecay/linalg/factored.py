"""Singular values of A Bᵀ from its factors, never forming the product.

With A = Q₁R₁ and B = Q₂R₂ the singular values of A Bᵀ are those of the small core R₁R₂ᵀ, because Q₁ and Q₂ have
orthonormal columns. For an attention head, W_Q,hᵀ W_K,h is d × d of rank at most head_dim; its core is
head_dim × head_dim.
"""

import torch
from torch import Tensor

from rankdecay.linalg.stack import decomposed, triangular


def factored_singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of ``a @ b.mT``.

    Args:
        a: ``(..., m, k)`` with ``m >= k``.
        b: ``(..., n, k)`` with ``n >= k``, the same leading dimensions.

    Returns:
        ``(..., k)``, descending, in float64; NaN for a product with a non-finite entry.

    Raises:
        ValueError: if the inner dimensions differ or exceed the outer ones.
    """
    if a.shape[-1] != b.shape[-1] or a.shape[-1] > min(a.shape[-2], b.shape[-2]):
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} must be (..., m, k) and (..., n, k) with m, n >= k: "
            "pass the factors with the shared (head) dimension last"
        )
    r1, r2 = (decomposed(triangular, x.double()) for x in (a, b))
    core = r1 @ r2.mT
    finite = core.isfinite().all(-1).all(-1)[..., None]  # torch refuses the whole stack for one bad matrix
    return decomposed(torch.linalg.svdvals, torch.where(finite[..., None], core, 0.0)).masked_fill(~finite, torch.nan)
