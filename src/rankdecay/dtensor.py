"""Sharded parameters (DTensors), and the optimizer inside a wrapper."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; does not import torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor in one piece and detached; any other tensor as it is.

    A collective of the DTensor's mesh: all of its processes have to call it, and all get the same.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    return sharded.to(sharded.device_mesh.device_type).full_tensor()  # offloaded parts cannot be sent from the CPU


def unwrapped(optimizer: object) -> Optimizer:
    """Return the optimizer inside the wrappers of Accelerate, Lightning and timm, whose own hooks never run.

    Raises:
        TypeError: If there is no ``torch.optim.Optimizer`` inside.
    """
    inside = optimizer
    while True:
        inner = getattr(inside, "optimizer", None) or getattr(inside, "_base_optimizer", None)
        if inner is None or inner is inside:
            break
        inside = inner
    if not isinstance(inside, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(inside).__name__}. An engine that owns its "
            "optimizer, such as DeepSpeed's, flattens parameters; shard with FSDP2 instead."
        )
    return inside
