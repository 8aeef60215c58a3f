r"""The polar factor and its smoothed form, by an exact and by a matmul-only backend.

For a matrix with singular value decomposition :math:`W = U \Sigma V^T` the polar factor is :math:`U V^T`,
and every function here is one scalar function of the singular values,

.. math:: W \mapsto W \, V \, \mathrm{diag}(f(\sigma)) \, V^T ,

so one decomposition of the smaller Gram matrix, :math:`W^T W` or :math:`W W^T`, serves them all.

==============  =======================================  ==========================================
function        :math:`f(\sigma)`                        singular values become
==============  =======================================  ==========================================
polar           1/σ above the rounding of W, else 0      1 or 0 (the canonical partial isometry)
smooth polar    :math:`1/\sqrt{\sigma^2+\epsilon^2}`      :math:`\sigma/\sqrt{\sigma^2+\epsilon^2}`
==============  =======================================  ==========================================

**Null directions** have no polar factor: the subgradients of the nuclear norm there are a whole ball, whose
element of least norm is 0. They are set to 0, never to the arbitrary orthonormal completion an SVD returns.
*Null* means σ ≤ tol·σ_max with tol = 2^-21 (four roundings of float32, and the floor of a float64 Gram
matrix), or max(m, n)·2^-52 for float64 input.

**Backend "exact"**: float64 Gram matrix and ``eigh``, verified after the fact; a matrix that fails goes to a
float64 SVD. Squaring halves the digits, which is why a float64 matrix worse conditioned than 1e4 goes to the
SVD as well, while for float32 and below the float64 Gram keeps all that the input holds. ``eigh`` and the
verification synchronise with the device.

**Backend "matmul"**: compositions of minimax polynomials (:mod:`rankdecay.linalg.minimax`) in float32
(float64 for float64 input), products only, no synchronisation on CUDA. The smoothed form iterates on the
Gram matrix of :math:`[W; \epsilon I]`, whose smallest singular value is at least ε, so that the number of
steps is *known*.

Everything is computed on :math:`W / 2^k` with :math:`2^k` near the largest entry: dividing by a power of two
is exact, so the polar factors of W and of :math:`2^j W` are equal bit for bit.

Sources: Higham, *Functions of Matrices*, chapter 8 (polar factor); Amsel et al., arXiv 2505.16932
(polynomials); the regularised Gram iteration is derived at :func:`~rankdecay.linalg.matmul.smooth_polar_by_products`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankdecay.linalg.backend import float64_on_cpu, full_precision, note_backend
from rankdecay.linalg.exact import apply_exact, inverse
from rankdecay.linalg.matmul import polar_by_products, smooth_polar_by_products
from rankdecay.linalg.stack import (
    check_and_choose_backend,
    finish,
    mark_bad,
    per_matrix,
    prepare,
    scaled_down,
    working_dtype,
)


@float64_on_cpu
@torch.no_grad()
def polar(W: Tensor, backend: str = "auto") -> Tensor:
    """Return the polar factor U Vᵀ of each matrix; null directions map to zero.

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype. Not modified.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"`` (:func:`choose_backend`).

    Returns:
        A tensor of the shape and dtype of ``W``, detached from autograd. A matrix with a non-finite entry
        gives NaN in its own slice only. Equal bit for bit for W and 2^k W.

        Relative Frobenius error against a float64 SVD, before rounding to the dtype of W, for condition
        numbers up to 1e4: below 1e-6 with "exact" (measured 3e-8), below 1e-3 with "matmul" in float32
        (measured 6e-5). At 1e6 up to 2e-4 with "exact". "exact" sets directions below 2^-21 σ_max to zero (float64
        input: max(m, n) 2^-52 σ_max), "matmul" those below about 2e-7 ‖W‖_F; each is 1/√rank of the result.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If ``W`` has fewer than two dimensions or ``backend`` is unknown.

    Example:
        >>> polar(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    backend = check_and_choose_backend(W, backend)
    if W.numel() == 0:
        return W.clone()
    with full_precision(W.device):
        prepared = prepare(W, working_dtype(W, backend))
        if backend == "exact":
            out = apply_exact(prepared, inverse, W.dtype)
        else:
            note_backend("matmul")
            out = polar_by_products(prepared.X)
        return finish(out, prepared, W.dtype)


@float64_on_cpu
@torch.no_grad()
def smooth_polar(W: Tensor, eps: float | Tensor, backend: str = "auto") -> Tensor:
    """Return W (WᵀW + ε²I)^(-1/2): each singular value becomes σ/√(σ² + ε²).

    The polar factor with its jump at 0 replaced by a ramp of width ε: directions below ε are no longer
    pushed at full speed, so a decay along it with a step of at most ε never crosses zero. The same function
    as the update clipping H_c of SPECTRA (arXiv 2603.14315), H_ε(W)/ε.

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype. Not modified.
        eps: Width ε > 0 in the units of the singular values; a number, or a tensor that broadcasts to
            ``W.shape[:-2]``. A tensor is not checked (that would synchronise); an entry that is not positive
            and finite gives NaN in its own slice.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"`` (:func:`choose_backend`).

    Returns:
        A tensor of the shape and dtype of ``W``, detached from autograd. Spectral-norm error before
        rounding to the dtype of W: below 1e-6 with "exact" for ε ≥ 1e-5 σ_max; below 3e-4 with "matmul" (measured
        4e-7 at ε = ‖W‖_F, 8e-6 at 0.03 ‖W‖_F, 2e-4 at 0.005 ‖W‖_F, and 2e-6 below that, in float64).

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If ``W`` has fewer than two dimensions, ``eps`` is a number that is not positive and
            finite or a tensor of the wrong shape, or ``backend`` is unknown.
    """
    backend = check_and_choose_backend(W, backend)
    width = per_matrix("eps", eps, W, positive=True)
    if W.numel() == 0:
        return W.clone()
    with full_precision(W.device):
        prepared = mark_bad(prepare(W, working_dtype(W, backend)), width)
        width = scaled_down(width, prepared)
        if backend == "exact":
            # Below the rounding of W there is no telling σ from 0; then ε does not matter either.
            out = apply_exact(prepared, lambda sigma, null: inverse(torch.hypot(sigma, width[..., 0]), null), W.dtype)
        else:
            note_backend("matmul")
            out = smooth_polar_by_products(prepared.X, width)
        return finish(out, prepared, W.dtype)
