"""Choice of the backend, exact or matmul, its precision, and the devices it runs on."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Concatenate, Literal, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

Backend = Literal["auto", "exact", "matmul"]

#: Largest smaller side for which ``backend="auto"`` decomposes. On a CPU the products of the soft threshold and of the
#: polar factor take four to six times the time of `eigh` at every size measured, 768 to 4096 (`benchmarks/step.py`); a
#: rule of fewer says so itself (:attr:`rankdecay.rules.Rule.products_pay`). On CUDA `eigh` is latency-bound, and
#: products win early.
EXACT_UP_TO = {"cpu": math.inf, "cuda": 512}


def choose_backend(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the backend that ``backend="auto"`` takes: ``"exact"`` or ``"matmul"``.

    Exact on a CPU, and elsewhere while the smaller side is at most 512; float64 input is always exact: its
    digits are wanted.

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
    """Collect the backends that actually ran inside the block, in order.

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


@contextlib.contextmanager
def noted_once() -> Iterator[None]:
    """Record what runs inside the block as one call, each backend once."""
    outer = _recorders.get()
    ran: list[str] = []
    token = _recorders.set((ran,))
    try:
        yield
    finally:
        _recorders.reset(token)
        for name in dict.fromkeys(ran):
            for recorder in outer:
                recorder.append(name)


def note_backend(name: str) -> None:
    """Record in the open :func:`record_backends` blocks that ``name`` ran."""
    for recorder in _recorders.get():
        recorder.append(name)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run float32 products in float32: no autocast, no TF32 on CUDA, no bfloat16 in oneDNN.

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


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64."""
    return device.type != "mps"


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64: where it is, or on the CPU if its device has no float64."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def float64_on_cpu(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Decorate a matrix function to run on the CPU for a matrix on a device without float64; the result goes back."""

    @functools.wraps(function)
    def call(W: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not isinstance(W, Tensor) or has_float64(W.device):
            return function(W, *args, **kwargs)
        moved = [value.cpu() if isinstance(value, Tensor) else value for value in args]
        named = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return function(W.cpu(), *moved, **named).to(W.device)  # pyright: ignore[reportCallIssue]

    return call  # pyright: ignore[reportReturnType] - W may be named
