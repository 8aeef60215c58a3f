"""A stack of matrices made ready for a matrix function: checked, tall, finite, scaled by a power of two."""

from __future__ import annotations

import contextvars
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from rankdecay.checks import check_name, check_number
from rankdecay.linalg.backend import Backend, choose_backend

T = TypeVar("T")
U = TypeVar("U")


def check_matrix(W: object, *, result: bool = True) -> None:
    """Raise unless ``W`` is a real floating-point tensor with at least two dimensions.

    Args:
        W: to check.
        result: whether a result has the dtype of ``W``, which then needs 16 bits at least.
    """
    if not isinstance(W, Tensor):
        raise TypeError(f"W must be a torch.Tensor, got {type(W).__name__}; convert it with torch.as_tensor(W).")
    if W.layout is not torch.strided:
        raise TypeError(f"W is a tensor of layout {W.layout}; pass W.to_dense().")
    if not W.dtype.is_floating_point:
        raise TypeError(
            f"W has dtype {W.dtype}; expected a real floating-point tensor. "
            + ("Complex matrices are not supported." if W.dtype.is_complex else "Convert it with W.float().")
        )
    if result and W.dtype.itemsize < 2:
        raise TypeError(f"W has dtype {W.dtype}, too coarse for a result; pass W.float().")
    if W.ndim < 2:
        raise ValueError(
            f"W has shape {tuple(W.shape)}; expected (..., m, n). "
            "A vector has no spectrum: pass W[None] for one row, or leave the parameter out."
        )


def per_matrix(name: str, value: float | Tensor, W: Tensor, *, positive: bool = False) -> Tensor:
    """Return ``value`` as a float64 tensor of shape ``(..., 1, 1)``, one entry per matrix of ``W``.

    A Python number is checked here. A tensor is not, because reading it would synchronise with the device:
    its inadmissible entries become NaN, and spoil only their own matrix.

    Raises:
        ValueError: If a Python number is negative, zero where ``positive``, or not finite, or if a tensor
            does not broadcast to ``W.shape[:-2]``.
    """
    if not isinstance(value, Tensor):
        least, above = (None, 0) if positive else (0, None)
        check_number(name, value, at_least=least, above=above, remedy="it is in the units of W's singular values")
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


class Prepared(NamedTuple):
    """A stack ready for a matrix function: tall, scaled by a power of two, finite."""

    X: Tensor  # (..., m, n), m >= n, entries at most 1 (4 at the very end of the range)
    scale: Tensor  # (..., 1, 1), W = scale * X, a power of two
    bad: Tensor  # (..., 1, 1), True where W was not finite; X is 0 there
    wide: bool  # X is the transpose of W


def prepare(W: Tensor, dtype: torch.dtype) -> Prepared:
    """Return ``W`` transposed to tall, divided by a power of two near its largest entry, in ``dtype``."""
    wide = W.shape[-2] < W.shape[-1]
    largest = torch.maximum(W.amax((-2, -1), keepdim=True), -W.amin((-2, -1), keepdim=True))  # NaN and inf propagate
    bad = ~largest.isfinite()
    exponent = exponent_of(largest.to(dtype), bad)
    X = torch.mul(W.mT if wide else W, power_of_two(-exponent, dtype))
    if W.device.type != "cpu" or bool(bad.any()):  # reading is free there, and a pass less
        X.masked_fill_(bad, 0)
    return Prepared(X, power_of_two(exponent, dtype), bad, wide)


def exponent_of(largest: Tensor, bad: Tensor) -> Tensor:
    """Return the exponent k of the power of two near ``largest``, so that both 2^k and 2^-k are normal; 0 where bad."""
    reach = 1022 if largest.dtype == torch.float64 else 126
    return torch.frexp(largest).exponent.masked_fill(bad, 0).clamp(-reach, reach)


def frobenius(X: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ‖X‖_F of each matrix, (..., 1, 1), summed in ``dtype``."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=dtype)


def nonzero(divisor: Tensor) -> Tensor:
    """Return a divisor with 1 in place of 0."""
    return torch.where(divisor == 0, 1.0, divisor)


def times(X: Tensor, C: Tensor) -> Tensor:
    """Return X C in the memory layout of X: what is transposed stays so, and need not be copied back."""
    return X @ C if X.stride(-1) == 1 or X.shape[-2] == 1 else (C.mT @ X.mT).mT


def times_in_pieces(A: Tensor, B: Tensor) -> Tensor:
    """Return A B (..., m, k), its inner sums of n terms in pieces of 64: the roundings are those of √n terms, not n."""
    total = A[..., :64] @ B[..., :64, :]
    for start in range(64, A.shape[-1], 64):
        total += A[..., start : start + 64] @ B[..., start : start + 64, :]
    return total


def gram(X: Tensor) -> Tensor:
    """Return XᵀX of a stack (..., m, n); of large matrices on a CPU half of it is computed, and copied."""
    n = X.shape[-1]
    if X.device.type != "cpu" or n < 256:
        return X.mT @ X
    G = X.new_empty(*X.shape[:-2], n, n)
    pieces = 8 if n >= 512 else 4
    bounds = [n * i // pieces for i in range(pieces + 1)]
    for start, end in itertools.pairwise(bounds):
        G[..., start:end, start:] = X[..., start:end].mT @ X[..., start:]
        G[..., end:, start:end] = G[..., start:end, end:].mT
    return G


#: Entries that a step works on at once, at least one matrix: 4 MB of float64 on a CPU, in its cache.
WORKING = {"cpu": 2**19, "cuda": 2**25}


#: Most large matrices that are decomposed at the same time: each has a workspace.
_SIDE_BY_SIDE = 4

#: Smaller side from which a matrix is large.
_LARGE = 256


def at_once(W: Tensor) -> int:
    """Return how many large matrices of a stack (..., m, n) a CPU decomposes at once: one per thread, up to 4."""
    if W.device.type != "cpu" or W.ndim != 3 or not _LARGE <= min(W.shape[-2:]) <= 2048:
        return 1
    return min(torch.get_num_threads(), _SIDE_BY_SIDE, len(W))


def side_by_side(function: Callable[[T], U], items: Sequence[T], most: int = _SIDE_BY_SIDE) -> list[U]:
    """Return the function of each item, at most so many of them at once in threads that share torch's out among them.

    Half of the work of one decomposition is not parallel. An item that would be left to one thread alone has all. The
    threads live as long as the call, so that a process may fork afterwards; a thread that another part of the program
    starts meanwhile may be given as few of torch's.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    count = min(threads, most)
    last = items[len(items) - (len(items) % count == 1) :]

    def call(context: contextvars.Context, item: T) -> U:
        with torch.inference_mode(inference), torch.no_grad():  # a thread starts without what its parent has set
            return context.run(function, item)

    together = items[: len(items) - len(last)]
    contexts = [contextvars.copy_context() for _ in together]
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            found = list(pool.map(call, contexts, together))
    finally:
        torch.set_num_threads(threads)
    return found + [function(item) for item in last]


#: Multiplications of a decomposition, roughly, from which starting threads costs little: ten milliseconds of work.
_WORTH_A_THREAD = 2**24


def decomposed(function: Callable[[Tensor], Any], X: Tensor) -> Any:
    """Return a decomposition of a stack (..., m, n): ``torch.linalg.svd`` and the like, of parts of it side by side.

    In a call of torch's own all threads wait for each other within each matrix. Beside other work on the same machine
    that takes some three times as long (``benchmarks/decompositions.py``).

    Returns:
        What ``function`` returns of the whole stack, a tuple as a plain one, without gradients where it is in parts.
    """
    smaller = min(X.shape[-2:])
    if X.device.type != "cpu" or X.numel() * smaller < _WORTH_A_THREAD or X.requires_grad:
        return function(X)
    flat = X.reshape(-1, *X.shape[-2:])
    count = at_once(flat) if smaller >= _LARGE else min(torch.get_num_threads(), len(flat))
    if count == 1:
        return function(X)
    found = side_by_side(function, flat.tensor_split(count), count)

    def whole(parts: Sequence[Tensor]) -> Tensor:
        together = torch.cat(list(parts))
        return together.reshape(*X.shape[:-2], *together.shape[1:])

    return whole(found) if isinstance(found[0], Tensor) else tuple(whole(parts) for parts in zip(*found, strict=True))


def triangular(X: Tensor) -> Tensor:
    """Return R of X = QR, (..., n, n), with rows of zeros where X has fewer than columns."""
    missing = max(0, X.shape[-1] - X.shape[-2])
    return torch.nn.functional.pad(torch.linalg.qr(X, mode="r").R, (0, 0, 0, missing))


def chunks(W: Tensor) -> Iterator[slice]:
    """Yield the parts of a stack (b, m, n) that are worked on at once."""
    count = max(at_once(W), WORKING["cpu" if W.device.type == "cpu" else "cuda"] // max(1, W[0].numel()))
    for start in range(0, len(W), count):
        yield slice(start, start + count)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2^exponent exactly, from its bits (``exp2`` and ``ldexp`` go through an inexact ``pow``)."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def working_dtype(W: Tensor, backend: str) -> torch.dtype:
    """Return the dtype to compute in: float64 for "exact", float32 or better for "matmul"."""
    return torch.float64 if backend == "exact" or W.dtype == torch.float64 else torch.float32


def finish(out: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """Return ``out`` in the orientation and dtype of the input, NaN where the input was not finite.

    ``out`` is overwritten.
    """
    out = out.masked_fill_(prepared.bad, math.nan).to(dtype)
    return out.mT.contiguous() if prepared.wide else out


def check_and_choose_backend(W: Tensor, backend: str) -> str:
    """Check ``W`` and ``backend`` and return "exact" or "matmul"."""
    check_matrix(W)
    check_name("backend", backend, get_args(Backend))
    return choose_backend(W.shape, W.device, W.dtype) if backend == "auto" else backend


def mark_bad(prepared: Prepared, value: Tensor) -> Prepared:
    """Return ``prepared`` with the matrices marked whose parameter ``value`` (..., 1, 1) is NaN."""
    return prepared._replace(bad=prepared.bad | value.isnan())


def scaled_down(value: Tensor, prepared: Prepared) -> Tensor:
    """Return ``value`` (..., 1, 1) in the units of ``prepared.X``, in float64 and finite."""
    return finite(value / prepared.scale.double())


def finite(value: Tensor) -> Tensor:
    """Return ``value`` without NaN and so large at most that quotients by singular values are finite."""
    return value.nan_to_num(nan=1.0).clamp_max(2.0**500)
