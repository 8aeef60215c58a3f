"""Several processes of one gloo group on this machine: functions of a test, or what ``torchrun`` starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tests.waiting import HANG

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(  # imported once; names that cannot be are left out
    [
        "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.tensor.debug", "accelerate",
        "rankdecay.decay.attach", "rankdecay.audit", "pytest",
        "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
        "tests.frozen",  # the last: it leaves what the others have brought to all processes as it is
    ]
)  # fmt: skip


class RankFailed(AssertionError):
    """A function raised in some of its processes.

    Attributes:
        reasons: each rank's traceback, None where it returned.
    """

    def __init__(self, reasons: list[str | None]) -> None:
        said = "\n".join(f"--- rank {rank} ---\n{reason}" for rank, reason in enumerate(reasons) if reason)
        super().__init__(f"{sum(reason is not None for reason in reasons)} of {len(reasons)} ranks failed\n{said}")
        self.reasons = reasons


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function of a test module in `world` processes at once; returns what each rank returned.

    Collectives give up after half of `HANG`, so that a rank that waits in vain says where.

    Args:
        world: how many.
        function: importable from the root of the repository, so not a local one; `dist` is ready in it.
        arguments: what it is called with; anything that pickles.

    Raises:
        RankFailed: if it raised, or a process ended, in any of them.
    """
    return _on_ranks(world, function, arguments, None)


def on_ranks_of_torchrun(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`on_ranks` without a group: each process has in its environment what ``torchrun`` sets, and joins by itself."""
    return _on_ranks(world, function, arguments, free_port())


def _on_ranks(world: int, function: Callable[..., Any], arguments: tuple[Any, ...], port: int | None) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            mine, theirs = _server.Pipe(duplex=False)
            work = (theirs, function, arguments, rank, world, folder, port)
            process = _server.Process(target=_work, args=work, daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            outcomes = [_outcome(pipe, process) for pipe, process in zip(pipes, processes, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    if any(reason is not None for _, reason in outcomes):
        raise RankFailed([reason for _, reason in outcomes])
    return [value for value, _ in outcomes]


def _outcome(pipe: Connection, process: Any) -> tuple[Any, str | None]:
    if not wait([pipe], HANG):
        return None, f"nothing after {HANG:g} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return None, f"the process ended with {process.exitcode}"


def _work(
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world: int,
    folder: str,
    port: int | None,
) -> None:
    torch.set_num_threads(1)
    # what torchrun sets, and what frameworks read
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if port is None:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=HANG / 2))
        dist.barrier()  # or one that has nothing to do could leave before the other is connected to it
    else:
        os.environ["MASTER_PORT"] = str(port)
    try:
        # pickle: what a connection sends of a tensor is a handle, of no use when its process has ended
        pipe.send_bytes(pickle.dumps((function(*arguments), None)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
    else:
        if port is None:
            dist.destroy_process_group()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def torchrun(what: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes of ``torchrun``, which are killed with it at the end, although each has a session of its own.

    Args:
        what: a script, or ``-m`` and a module, with its arguments.
        log: where what they say goes.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("w") as file:
        group = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            yield group
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                agent = psutil.Process(group.pid)
                agent.suspend()  # or it would clean up after the first that is killed
                for process in [*agent.children(recursive=True), agent]:
                    process.kill()
            group.wait(HANG)
