"""Sharded parameters (DTensors), processes, and the names and the optimizer inside a wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def is_distributed() -> bool:
    """Whether this process is one of a run that torch.distributed has started."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first_process() -> bool:
    """Whether this process is the only one, or of rank 0."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; does not import torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 keeps a parameter in a vector of many, of which a process may hold any part."""
    return getattr(tensor, "_fsdp_flattened", False) or type(tensor).__name__ == "FlatParameter"


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor in one piece and detached; any other tensor as it is.

    A collective of the DTensor's mesh: all of its processes have to call it, and all get the same.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    return sharded.to(sharded.device_mesh.device_type).full_tensor()  # offloaded parts cannot be sent from the CPU


def local(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this process holds, detached; any other tensor whole."""
    detached: Any = tensor.detach()
    return detached.to_local() if is_sharded(tensor) else detached


def bare_name(name: str, *, in_parallel: bool = True) -> str:
    """Return the name that a parameter or module has before its model is compiled or wrapped by DDP.

    Args:
        name: in the wrapped model.
        in_parallel: whether a first ``module`` may be that of DDP, and not the model's own.
    """
    name = f"{name}.".replace("_orig_mod.", "")
    return (name.removeprefix("module.") if in_parallel else name).removesuffix(".")


#: Where wrappers keep the optimizer that they step, if not as an attribute of another name: Accelerate, Lightning and
#: Lookahead; timm; SAM; heavyball's SAM; Opacus.
_INSIDE = ("optimizer", "_base_optimizer", "base_optimizer", "optim", "wrapped_optimizer", "original_optimizer")
#: What the hooks of a step are in, where ``Optimizer.__init__`` was called.
_HOOKS = "_optimizer_step_post_hooks"


def wrappers_of(optimizer: object) -> list[object]:
    """Return the wrappers around an optimizer, from the outside inwards."""
    found: list[object] = []
    inside = optimizer
    while (inner := _inner(inside)) is not None and all(inner is not each for each in found):
        found.append(inside)
        inside = inner
    return found


def _inner(optimizer: object) -> object | None:
    stepped = _optimizers_in(optimizer)
    if len(stepped) > 1:
        return None
    candidates = [*(getattr(optimizer, name, None) for name in _INSIDE), *stepped.values()]
    inner = (each for each in candidates if each is not None and each is not optimizer)
    return next((each for each in inner if not isinstance(each, (str, type))), None)


def _optimizers_in(optimizer: object) -> dict[str, Optimizer]:
    """Return the optimizers, by their names in an optimizer, that step its parameters for it."""
    if not isinstance(optimizer, Optimizer):
        return {}
    inner = {name: each for name, each in vars(optimizer).items() if isinstance(each, Optimizer)}
    ours = _ids_of(optimizer) if inner else set()
    by_id = {id(each): (name, each) for name, each in inner.items() if each is not optimizer and ours & _ids_of(each)}
    return dict(by_id.values())


def _ids_of(optimizer: Optimizer) -> set[int]:
    groups = getattr(optimizer, "param_groups", ())  # of a wrapper whose own __init__ makes none
    return {id(p) for group in groups for p in group["params"]}


def shares_out(wrapper: object) -> bool:
    """Whether each process steps a part of a wrapper's parameters, and is sent the rest."""
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(wrapper).__mro__)


def unwrapped(optimizer: object) -> Optimizer:
    """Return the optimizer inside wrappers, whose own hooks never run, or whose groups are not those that are stepped.

    Raises:
        TypeError: If there is no ``torch.optim.Optimizer`` inside.
    """
    wrappers = wrappers_of(optimizer)
    inside = _inner(wrappers[-1]) if wrappers else optimizer
    if not isinstance(inside, Optimizer):
        if isinstance(inside, (list, tuple)):
            remedy = ": attach to each of several optimizers, with the roles that it has."
        elif hasattr(inside, "param_groups") and not hasattr(inside, "register_step_post_hook"):
            remedy = (
                ", which has param_groups but no step hooks: subclass torch.optim.Optimizer, or attach to the "
                "optimizer that it steps."
            )
        else:
            engine = "An engine that owns its optimizer, such as DeepSpeed's, flattens parameters"
            remedy = f". {engine}; shard with FSDP2 instead."
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(inside).__name__}{remedy}")
    if not hasattr(inside, _HOOKS):
        raise TypeError(
            f"{type(inside).__name__} has no step hooks: its __init__ does not call Optimizer.__init__; call it, or "
            "attach to the optimizer it steps."
        )
    for names, several in _several(inside):
        kinds = ", ".join(type(each).__name__ for each in several)
        raise TypeError(
            f"{type(inside).__name__} steps {len(several)} optimizers, {kinds}: attach to each of its {names} that has "
            "the roles you name."
        )
    return inside


def _several(optimizer: Optimizer) -> Iterator[tuple[str, list[Optimizer]]]:
    """Yield the lists of optimizers that an optimizer steps, with where it keeps them."""
    for name, value in vars(optimizer).items():
        items = [*value.values()] if isinstance(value, dict) else value
        if isinstance(items, (list, tuple)) and items and all(isinstance(each, Optimizer) for each in items):
            yield f".{name}", [*items]
    stepped = _optimizers_in(optimizer)
    if len(stepped) > 1:
        yield ", ".join(f".{name}" for name in stepped), [*stepped.values()]
