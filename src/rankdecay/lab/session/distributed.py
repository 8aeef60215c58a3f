"""The process group of ``torchrun``: joining it, and broadcasting from rank 0."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from rankdecay.lab.errors import SettingError

#: Rank 0 evaluates a replicated model while the others wait, on a slow CPU for long. There gloo notices at once that a
#: process has ended, because its connection closes; on a GPU only the timeout tells.
COLLECTIVE_TIMEOUT = {"cpu": timedelta(hours=2), "cuda": timedelta(minutes=10)}


def started_by_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def exit_now(code: int) -> NoReturn:
    """End a process of ``torchrun`` with this exit code, without shutting the interpreter down.

    DTensor's caches keep the group alive after ``destroy_process_group``, and with it gloo's threads. One that releases
    the tensor of its last collective while the interpreter shuts down aborts the process, which ``torchrun`` then takes
    for a failed run (pytorch issue 190489).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody may be reading any more
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def process_group(device: str, patience: timedelta | None = None) -> Iterator[tuple[str, bool]]:
    """Join the process group that ``torchrun`` started, if it did, and leave it at the end.

    Args:
        device: ``"cpu"`` or a CUDA device; in a group each process takes the GPU of its local rank.
        patience: the timeout of a collective; `COLLECTIVE_TIMEOUT` by default.

    Yields:
        The device of this process, and whether it is rank 0, which writes.

    Raises:
        SettingError: In the block, if another process is lost.
    """
    if not started_by_torchrun():
        yield device, True
        return
    cuda = device.startswith("cuda")
    patience = patience or COLLECTIVE_TIMEOUT["cuda" if cuda else "cpu"]
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    try:
        # Until all are connected nobody leaves: one that is refused at once would break the connecting of the others.
        dist.all_reduce(torch.zeros(1))
        yield device, is_rank_zero()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        reason = str(error).partition(". ")[0]  # the rest is about torch's internals
        raise SettingError(
            f"process {rank()} of {processes()} lost contact with another process (exited, or silent for "
            f"{patience.total_seconds():g} s): see that process's message; rerun the command to continue from the last "
            f"checkpoint ({reason})"
        ) from error
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank_zero() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def broadcast(value: Any) -> Any:
    """Broadcast a value from rank 0; a process alone keeps its own."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
