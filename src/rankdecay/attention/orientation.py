"""What a module multiplies by: which way round its weight is, by its class or by multiplying once, and if it is all."""

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


def is_turned(module: nn.Module) -> bool | None:
    """Return whether a module stores its weight as (in, out), as ``x @ W`` takes it; None where nothing tells.

    The shape of a weight says nothing of it in a class of one's own, so that a copy of the module, with random numbers
    for its weight and without its hooks, is given random vectors. A module that is more than its own parameters, or
    cannot be run on vectors alone, is left at None.

    Args:
        module: that holds the parameter ``weight``.
    """
    if isinstance(module, _ConvTransposeNd) or type(module).__name__ == "Conv1D":
        return True
    held = _weight_of_unknown(module)
    if held is None:
        return None
    weight = _numbers(*held.shape, like=held)
    alone = _copy_with(module, weight)
    as_stored, turned = (abs(_likeness(alone, matrix) or 0.0) for matrix in (weight, weight.mT))
    return turned > as_stored if max(as_stored, turned) > ALIKE and turned != as_stored else None


def does_more(module: nn.Module, turned: bool) -> bool:
    """Whether a module does more to a vector than to multiply it by its weight, so that this says too little of it.

    As one that masks, normalises or gates. A factor of the whole is no more.

    Args:
        module: that holds the parameter ``weight``.
        turned: whether it is stored as (in, out).
    """
    held = None if type(module).__name__ == "Conv1D" else _weight_of_unknown(module)
    if held is None:
        return False
    # of one vector: of several the output may be in another order, as (heads, vectors, head_dim)
    likeness = _likeness(_copy_with(module, held), held.mT if turned else held, rows=1)
    return likeness is not None and abs(likeness) < SAME


def _weight_of_unknown(module: nn.Module) -> Tensor | None:
    """Return the weight of a module whose class says nothing of it, if it can be multiplied by; or None."""
    held = dict(module.named_parameters(recurse=False)).get("weight")
    known = isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Linear.forward
    if known or held is None or any(module.children()):
        return None
    codes = not held.is_floating_point() or held.dtype.itemsize == 1
    return None if held.ndim != 2 or held.is_meta or is_sharded(held) or codes else held


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
    except Exception:  # whatever a stranger's forward pass raises when given vectors: it says nothing of its weight
        return None
