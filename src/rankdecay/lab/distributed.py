"""The processes of ``torchrun``: joining them, and telling the others what the first one knows."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[str, bool]]:
    """Joins the group that ``torchrun`` started, if it did, and leaves it at the end.

    Args:
        device: ``"cpu"`` or a CUDA device; in a group each process takes the GPU of its local rank.

    Yields:
        The device of this process, and whether it is the one that writes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device, True
        return
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield device, rank() == 0
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(value: Any) -> Any:
    """What the first process gives, in every process; alone, the value itself."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
