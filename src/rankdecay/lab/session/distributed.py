"""The processes of ``torchrun``: joining them, and telling the others what the first one knows."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rankdecay.lab.errors import SettingError

#: The first process evaluates alone where each has the whole model, and the others wait for it: on a slow CPU for long.
#: There a process that ends is noticed at once, because its connection closes; on a GPU only by waiting in vain.
PATIENCE = {"cpu": timedelta(hours=2), "cuda": timedelta(minutes=10)}


@contextlib.contextmanager
def joined(device: str, patience: timedelta | None = None) -> Iterator[tuple[str, bool]]:
    """Joins the group that ``torchrun`` started, if it did, and leaves it at the end.

    Args:
        device: ``"cpu"`` or a CUDA device; in a group each process takes the GPU of its local rank.
        patience: how long a process waits for another before it takes it for lost; `PATIENCE` by default.

    Yields:
        The device of this process, and whether it is the one that writes.

    Raises:
        SettingError: in the block, if another process is lost.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device, True
        return
    cuda = device.startswith("cuda")
    patience = patience or PATIENCE["cuda" if cuda else "cpu"]
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    try:
        yield device, rank() == 0
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        reason = str(error).partition(". ")[0]  # what follows is advice for those who know torch's sources
        raise SettingError(
            f"process {rank()} of {processes()} has lost another, which ended or said nothing for "
            f"{patience.total_seconds():g} s: its own message says why; the same command again goes on from the last "
            f"checkpoint ({reason})"
        ) from error
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
