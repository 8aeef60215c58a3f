"""Which way round a module stores its weight, (out, in) or (in, out): by its class, or by multiplying once."""

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
    held = dict(module.named_parameters(recurse=False)).get("weight")
    known = isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Linear.forward
    if known or held is None or any(module.children()):
        return None
    codes = not held.is_floating_point() or held.dtype.itemsize == 1
    if held.ndim != 2 or held.is_meta or is_sharded(held) or codes:
        return None
    weight = _numbers(*held.shape, like=held)
    if weight.shape[0] == weight.shape[1]:
        weight = weight - weight.mT  # its transpose is its negative, as unlike it as can be
    alone = copy.copy(module)
    vars(alone).update({name: OrderedDict() for name in vars(module) if name.endswith("_hooks")})
    alone._parameters = module._parameters | {"weight": nn.Parameter(weight)}
    alone._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    alone.training = False
    if _likeness(alone, weight.mT) > ALIKE:
        return True
    return False if _likeness(alone, weight) > ALIKE else None


def _numbers(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


class _Alone(TorchDispatchMode):
    """Refuse what waits for other processes: they may not be here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(f"{func} waits for other processes")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _likeness(module: nn.Module, weight: Tensor) -> float:
    """Return the cosine between what a module makes of vectors and ``x @ weight.T``; 0 where it does not take them."""
    vectors = _numbers(ROWS, weight.shape[1], like=weight)
    try:
        with _Alone():
            out = module(vectors) - module(torch.zeros_like(vectors))
        return torch.cosine_similarity(out.double().flatten(), (vectors @ weight.mT).double().flatten(), dim=0).item()
    except Exception:  # whatever a stranger's forward pass raises when given vectors: it says nothing of its weight
        return 0.0
