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
(polynomials); the regularised Gram iteration is derived at :func:`_regularised_gram`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rankdecay.checks import check_name
from rankdecay.linalg.backend import float64_on_cpu
from rankdecay.linalg.minimax import LIMIT, SAFETY, SCHEDULES, SQUASH, Triple

Backend = Literal["auto", "exact", "matmul"]

#: Largest smaller side for which ``backend="auto"`` decomposes. On a CPU the products of a decay step take four to six
#: times the time of `eigh` at every size measured, 768 to 4096 (`benchmarks/step.py`); on CUDA `eigh` is latency-bound,
#: and products win early.
EXACT_UP_TO = {"cpu": math.inf, "cuda": 512}

#: Relative size of a null singular value for input of float32 and below (module docstring).
NULL_TOLERANCE = 2.0**-21


# ---- which backend ----------------------------------------------------------------------------------------


def choose_backend(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> str:
    """Returns the backend that ``backend="auto"`` takes: ``"exact"`` or ``"matmul"``.

    Exact on a CPU, and elsewhere while the smaller side is at most 512; float64 input is always exact, since
    who keeps weights in float64 asks for its digits.

    Args:
        shape: Shape of the matrix or stack, ``(..., m, n)``.
        device: Where it lives.
        dtype: Its dtype.
    """
    smaller = min(shape[-2:])
    limit = EXACT_UP_TO["cpu" if torch.device(device).type == "cpu" else "cuda"]
    return "exact" if smaller <= limit or dtype == torch.float64 else "matmul"


_recorders: ContextVar[tuple[list[str], ...]] = ContextVar("_recorders", default=())


@contextlib.contextmanager
def record_backends() -> Iterator[list[str]]:
    """Collects the backends that actually ran inside the block, in order.

    Each call of a matrix function appends ``"exact"`` or ``"matmul"``, and ``"svd"`` after ``"exact"`` when
    at least one matrix fell back to the SVD. Calls that have nothing to compute (no entries, zero threshold)
    append nothing.

    Example:
        >>> with record_backends() as ran:
        ...     _ = polar(torch.eye(3))
        >>> ran
        ['exact']
    """
    ran: list[str] = []
    token = _recorders.set((*_recorders.get(), ran))
    try:
        yield ran
    finally:
        _recorders.reset(token)


def note_backend(name: str) -> None:
    """Tells the open :func:`record_backends` blocks that ``name`` ran."""
    for recorder in _recorders.get():
        recorder.append(name)


# ---- checks -----------------------------------------------------------------------------------------------


def check_matrix(W: object) -> None:
    """Raises unless ``W`` is a real floating-point tensor with at least two dimensions."""
    if not isinstance(W, Tensor):
        raise TypeError(f"W must be a torch.Tensor, got {type(W).__name__}; convert it with torch.as_tensor(W).")
    if not W.dtype.is_floating_point:
        raise TypeError(
            f"W has dtype {W.dtype}; expected a real floating-point tensor. "
            + ("Complex matrices are not supported." if W.dtype.is_complex else "Convert it with W.float().")
        )
    if W.ndim < 2:
        raise ValueError(
            f"W has shape {tuple(W.shape)}; expected (..., m, n). "
            "A vector has no spectrum: pass W[None] for one row, or leave the parameter out."
        )


def per_matrix(name: str, value: float | Tensor, W: Tensor, *, positive: bool = False) -> Tensor:
    """Returns ``value`` as a float64 tensor of shape ``(..., 1, 1)``, one entry per matrix of ``W``.

    A Python number is checked here. A tensor is not, because reading it would synchronise with the device:
    its inadmissible entries become NaN, and spoil only their own matrix.

    Raises:
        ValueError: If a Python number is negative, zero where ``positive``, or not finite, or if a tensor
            does not broadcast to ``W.shape[:-2]``.
    """
    bound = "a positive" if positive else "a non-negative"
    if not isinstance(value, Tensor):
        value = float(value)
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError(f"{name}={value!r} must be {bound} finite number, in the units of W's singular values.")
        return torch.full((1,) * W.ndim, value, dtype=torch.float64, device=W.device)
    sizes = zip(reversed(value.shape), reversed(W.shape[:-2]), strict=False)
    if value.ndim > W.ndim - 2 or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to the leading shape "
            f"{tuple(W.shape[:-2])} of W; pass one number per matrix."
        )
    value = value.detach().to(W.device, torch.float64)
    legal = ((value > 0) if positive else (value >= 0)) & value.isfinite()
    value = torch.where(legal, value, math.nan)
    return value.reshape((1,) * (W.ndim - 2 - value.ndim) + value.shape + (1, 1))


# ---- preparation ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Runs float32 products in float32: no autocast, no TF32 on CUDA, no bfloat16 in oneDNN.

    The caller's settings are put back at the end, also after an error. A setting that already means full
    precision is not touched.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
            mkldnn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
            for settings in (torch.backends.cuda.matmul, mkldnn):
                before = settings.fp32_precision
                if before not in ("ieee", "none"):
                    settings.fp32_precision = "ieee"
                    stack.callback(setattr, settings, "fp32_precision", before)
        else:
            before = torch.get_float32_matmul_precision()
            if before != "highest":
                torch.set_float32_matmul_precision("highest")
                stack.callback(torch.set_float32_matmul_precision, before)
        yield


class Prepared(NamedTuple):
    """A stack ready for a matrix function: tall, scaled by a power of two, finite."""

    X: Tensor  # (..., m, n), m >= n, entries at most 1 (4 at the very end of the range)
    scale: Tensor  # (..., 1, 1), W = scale * X, a power of two
    bad: Tensor  # (..., 1, 1), True where W was not finite; X is 0 there
    wide: bool  # X is the transpose of W


def prepare(W: Tensor, dtype: torch.dtype) -> Prepared:
    """Returns ``W`` transposed to tall, divided by a power of two near its largest entry, in ``dtype``."""
    wide = W.shape[-2] < W.shape[-1]
    X = W.mT if wide else W
    largest = X.abs().amax((-2, -1), keepdim=True)  # NaN and inf propagate
    bad = ~largest.isfinite()
    # Twice clamped range: both 2^k and 2^-k must be normal numbers of `dtype`.
    reach = 1022 if dtype == torch.float64 else 126
    exponent = torch.frexp(largest.to(dtype)).exponent.masked_fill(bad, 0).clamp(-reach, reach)
    X = (X.to(dtype) * power_of_two(-exponent, dtype)).masked_fill_(bad, 0)
    return Prepared(X, power_of_two(exponent, dtype), bad, wide)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 2^exponent exactly, from its bits (``exp2`` and ``ldexp`` go through an inexact ``pow``)."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def working_dtype(W: Tensor, backend: str) -> torch.dtype:
    """Returns the dtype to compute in: float64 for "exact", float32 or better for "matmul"."""
    return torch.float64 if backend == "exact" or W.dtype == torch.float64 else torch.float32


def finish(out: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """Returns ``out`` in the orientation and dtype of the input, NaN where the input was not finite.

    ``out`` is overwritten.
    """
    out = out.masked_fill_(prepared.bad, math.nan).to(dtype)
    return out.mT.contiguous() if prepared.wide else out


# ---- the exact backend ------------------------------------------------------------------------------------


def apply_exact(
    prepared: Prepared, f: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, *, complement: bool = False
) -> Tensor:
    """Returns Y = X V diag(f(σ)) Vᵀ in float64, or its complement X - Y.

    Args:
        prepared: Float64 stack from :func:`prepare`, X of shape (..., m, n).
        f: Maps σ of shape (..., n), in no particular order, and the null tolerance of shape (..., 1) to the
            multipliers.
        dtype: Dtype of the original input, which says how many of its digits are meant.
        complement: Subtract the result from X; exactly zero where every multiplier is 1.
    """
    X = prepared.X
    sigma, V = _right_singular(X, dtype)
    tol = NULL_TOLERANCE if dtype != torch.float64 else max(X.shape[-2:]) * 2.0**-52
    multipliers = f(sigma, tol * sigma.amax(-1, keepdim=True))
    Y = X @ ((V * multipliers[..., None, :]) @ V.mT)
    if not complement:
        return Y
    nothing_left = (multipliers == 1).all(-1)[..., None, None]
    return torch.sub(X, Y, out=Y).masked_fill_(nothing_left, 0)


def _right_singular(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns σ (..., n) and V (..., n, n) of the tall float64 stack ``X``, by eigh of XᵀX or by SVD."""
    note_backend("exact")
    lam, V, good = eigenvectors(X.mT @ X)
    if dtype == torch.float64:
        # Relative error of σ² from the Gram: 2^-52 κ². Beyond κ = 1e4 that is more than float64 input
        # deserves.
        good &= lam[..., 0] >= 1e-8 * lam[..., -1]
    sigma = lam.clamp_min(0).sqrt()
    if not bool(good.all()):
        note_backend("svd")
        _, s, Vh = torch.linalg.svd(X[~good], full_matrices=False)
        sigma[~good], V[~good] = s, Vh.mT
    return sigma, V


def eigenvectors(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns λ (..., n) rising, eigenvectors (..., n, n), and whether they can be trusted (...): by eigh."""
    try:
        lam, V = torch.linalg.eigh(G)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # One matrix that does not converge fails the whole stack.
        never = torch.zeros(G.shape[:-2], dtype=torch.bool, device=G.device)
        return G.new_zeros(G.shape[:-1]), torch.zeros_like(G), never
    return lam, V, _verified(G, lam, V)


def _verified(G: Tensor, lam: Tensor, V: Tensor) -> Tensor:
    """Returns, per matrix, whether V is orthogonal and G = V diag(λ) Vᵀ, on probe vectors: O(n²).

    A wrong decomposition (seen on CUDA: non-orthonormal eigenvectors without any error) misses almost every
    vector by much; four fixed probes see it at a thousandth of the price of ‖VᵀV − I‖.
    """
    n = G.shape[-1]
    grid = torch.arange(1, 4 * n + 1, dtype=G.dtype, device=G.device).reshape(n, 4)
    probe = torch.cos(grid * grid)  # irregular, entries of order 1; the same in every run
    y = V.mT @ probe
    off = torch.linalg.vector_norm(V @ y - probe, dim=(-2, -1))
    residual = torch.linalg.vector_norm(V @ (lam[..., None] * y) - G @ probe, dim=(-2, -1))
    size = torch.linalg.vector_norm(probe)
    bound = 1e-14 * (10 + math.sqrt(n)) * size  # LAPACK stays a hundred times below
    return (off <= bound) & (residual <= bound * lam.abs().amax(-1))


# ---- the matmul-only backend ------------------------------------------------------------------------------


def iterate(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Returns the composition of odd quintics applied to the tall stack ``X``, by products only.

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
    """Returns X/F and F = ‖X‖_F of shape (..., 1, 1); a zero matrix gives zeros and F = 1."""
    F = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    F = torch.where(F == 0, 1.0, F)
    return X / F, F


#: Polar factor by products. The first twelve take σ/F in [1e-6, 1] to 1. Rounding puts noise of about 1e-7 F
#: into null directions and the steep start amplifies it to some tenths; the squashing steps take that back
#: to zero.
POLAR_STEPS: tuple[Triple, ...] = (*SCHEDULES[1e-6], SQUASH, SQUASH, SQUASH)


def _regularised_gram(X: Tensor, eps: Tensor, ratio: float | None) -> Tensor:
    r"""Returns X (XᵀX + ε²I)^(-1/2) by products of n × n matrices.

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
    return X @ Q


# ---- public functions -------------------------------------------------------------------------------------


def resolve(W: Tensor, backend: str) -> str:
    """Checks ``W`` and ``backend`` and returns "exact" or "matmul"."""
    check_matrix(W)
    check_name("backend", backend, get_args(Backend))
    return choose_backend(W.shape, W.device, W.dtype) if backend == "auto" else backend


def mark_bad(prepared: Prepared, value: Tensor) -> Prepared:
    """Returns ``prepared`` with the matrices marked whose parameter ``value`` (..., 1, 1) is NaN."""
    return prepared._replace(bad=prepared.bad | value.isnan())


def scaled_down(value: Tensor, prepared: Prepared) -> Tensor:
    """Returns ``value`` (..., 1, 1) in the units of ``prepared.X``, in float64 and finite."""
    return (value / prepared.scale.double()).nan_to_num(nan=1.0).clamp_max(2.0**500)


def inverse(sigma: Tensor, null: Tensor) -> Tensor:
    """Returns 1/σ, and 0 where σ is not above the null tolerance: what makes X V f(σ) Vᵀ the polar factor."""
    return torch.where(sigma > null, 1 / sigma.clamp_min(2.0**-1022), 0.0)


def polar_prepared(prepared: Prepared, backend: str, dtype: torch.dtype) -> Tensor:
    """Returns the polar factor of a prepared stack, in its working dtype and orientation."""
    if backend == "exact":
        return apply_exact(prepared, inverse, dtype)
    note_backend("matmul")
    return iterate(normalised(prepared.X)[0], POLAR_STEPS)


def smooth_prepared(
    prepared: Prepared, eps: Tensor, backend: str, dtype: torch.dtype, ratio: float | None = None
) -> Tensor:
    """Returns X (XᵀX + ε²I)^(-1/2) of a prepared stack; ``eps`` (..., 1, 1) in the units of X."""
    if backend == "exact":
        eps = eps[..., 0]  # (..., 1), beside σ
        # Below the rounding of W there is no telling σ from 0; then ε does not matter either.
        return apply_exact(prepared, lambda sigma, null: inverse(torch.hypot(sigma, eps), null), dtype)
    note_backend("matmul")
    return _regularised_gram(prepared.X, eps, ratio).to(prepared.X.dtype)


@float64_on_cpu
@torch.no_grad()
def polar(W: Tensor, backend: str = "auto") -> Tensor:
    """Returns the polar factor U Vᵀ of each matrix; null directions map to zero.

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype. Not modified.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"`` (:func:`choose_backend`).

    Returns:
        A tensor of the shape and dtype of ``W``, detached from autograd. A matrix with a non-finite entry
        gives NaN in its own slice only. Equal bit for bit for W and 2^k W.

        Relative Frobenius error against a float64 SVD, before rounding to the dtype of W, for condition
        numbers up to 1e4: below 1e-6 with "exact" (measured 3e-8), below 1e-3 with "matmul" in float32
        (measured 6e-5). At 1e6: 3e-6 and 4e-3. "exact" sets directions below 2^-21 σ_max to zero (float64
        input: max(m, n) 2^-52 σ_max), "matmul" those below about 2e-7 ‖W‖_F.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If ``W`` has fewer than two dimensions or ``backend`` is unknown.

    Example:
        >>> polar(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    backend = resolve(W, backend)
    if W.numel() == 0:
        return W.clone()
    with full_precision(W.device):
        prepared = prepare(W, working_dtype(W, backend))
        return finish(polar_prepared(prepared, backend, W.dtype), prepared, W.dtype)


@float64_on_cpu
@torch.no_grad()
def smooth_polar(W: Tensor, eps: float | Tensor, backend: str = "auto") -> Tensor:
    """Returns W (WᵀW + ε²I)^(-1/2): each singular value becomes σ/√(σ² + ε²).

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
    backend = resolve(W, backend)
    width = per_matrix("eps", eps, W, positive=True)
    if W.numel() == 0:
        return W.clone()
    with full_precision(W.device):
        prepared = mark_bad(prepare(W, working_dtype(W, backend)), width)
        D = smooth_prepared(prepared, scaled_down(width, prepared), backend, W.dtype)
        return finish(D, prepared, W.dtype)
