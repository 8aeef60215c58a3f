"""What a device can compute in: Apple's ``mps`` has no float64, which matrix functions and spectra need."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


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
