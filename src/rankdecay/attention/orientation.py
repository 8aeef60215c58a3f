"""Orientation of a module's weight, (out, in) or (in, out), and whether the module is a plain linear map.

By its class, or by running it once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from rankdecay.dtensor import is_sharded

ROWS = 4  # vectors that are multiplied
ALIKE = 0.9  # cosine from which an output is a product
SAME = 0.999  # and from which it is that of the stored numbers: rounding to 8 bits is within it


def is_transposed(module: nn.Module) -> bool | None:
    """Return whether a module stores its weight as (in, out), as ``x @ W`` takes it; None where nothing tells.

    The shape of a weight says nothing of it in a class of one's own, so that a copy of the module, with random numbers
    for its weight and without its hooks, is given random vectors. A module that is more than its own parameters, or
    cannot be run on vectors alone, is left at None.

    Args:
        module: that holds the parameter ``weight``.
    """
    if isinstance(module, _ConvTransposeNd) or type(module).__name__ == "Conv1D":
        return True
    stored = _weight_of_unknown(module)
    if stored is None:
        return None
    weight = _numbers(*stored.shape, like=stored)
    alone = _copy_with(module, weight)
    as_stored, transposed = (abs(_likeness(alone, matrix) or 0.0) for matrix in (weight, weight.mT))
    return transposed > as_stored if max(as_stored, transposed) > ALIKE and transposed != as_stored else None


def is_not_plain_linear(module: nn.Module, transposed: bool) -> bool:
    """Whether a module is more than a linear map by its weight: it masks, normalises or gates, for example.

    A scalar factor does not count.

    Args:
        module: that holds the parameter ``weight``.
        transposed: whether it is stored as (in, out).
    """
    weight = None if type(module).__name__ == "Conv1D" else _weight_of_unknown(module)
    if weight is None:
        return False
    # of one vector: of several the output may be in another order, as (heads, vectors, head_dim)
    alone = _copy_with(module, weight)
    if isinstance(bias := alone._parameters.get("bias"), nn.Parameter):  # a large one leaves few digits of the product
        alone._parameters["bias"] = nn.Parameter(torch.zeros_like(bias))
    likeness = _likeness(alone, weight.mT if transposed else weight, rows=1)
    return likeness is not None and abs(likeness) < SAME


def _weight_of_unknown(module: nn.Module) -> Tensor | None:
    """Return the weight of a module whose class says nothing of it, if it can be multiplied by; or None."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    known = isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Linear.forward
    if known or weight is None or any(module.children()):
        return None
    codes = not weight.is_floating_point() or weight.dtype.itemsize == 1
    return None if weight.ndim != 2 or weight.is_meta or is_sharded(weight) or codes else weight


def _copy_with(module: nn.Module, weight: Tensor) -> nn.Module:
    """Return a copy of a module in evaluation, without hooks, with another weight and buffers of its own."""
    alone = copy.copy(module)
    vars(alone).update({name: OrderedDict() for name in vars(module) if name.endswith("_hooks")})
    alone._parameters = module._parameters | {"weight": nn.Parameter(weight.detach())}
    alone._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    alone.training = False
    return alone


def _numbers(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


class _Alone(TorchDispatchMode):
    """Refuse what waits for other processes: they may not be here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(f"{func} waits for other processes")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _likeness(module: nn.Module, weight: Tensor, rows: int = ROWS) -> float | None:
    """Return the cosine between what a module makes of vectors and ``x @ weight.T``; None where there is none."""
    vectors = _numbers(rows, weight.shape[1], like=weight)
    try:
        with _Alone():
            out = module(vectors) - module(torch.zeros_like(vectors))
        made, product = out.double().flatten(), (vectors @ weight.mT).double().flatten()
        return torch.cosine_similarity(made, product, dim=0).item() if product.any() else None
    except Exception:  # whatever unknown code raises when given vectors: it says nothing of the weight
        return None
