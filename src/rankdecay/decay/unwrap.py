"""The optimizer inside a wrapper, where hooks run."""

from torch.optim import Optimizer


def unwrapped(optimizer: object) -> Optimizer:
    """Returns the optimizer inside the wrappers of Accelerate, Lightning and timm, whose own hooks never run.

    Raises:
        TypeError: If there is no ``torch.optim.Optimizer`` inside.
    """
    seen = optimizer
    while True:
        inner = getattr(seen, "optimizer", None) or getattr(seen, "_base_optimizer", None)
        if inner is None or inner is seen:
            break
        seen = inner
    if not isinstance(seen, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(seen).__name__}. An engine that owns its optimizer, "
            "such as DeepSpeed's, flattens parameters; shard with FSDP2 instead."
        )
    return seen
