"""A function in a forked child that is ended after a time, or when it takes too much memory.

The child shares what its parent has imported, so that a case costs milliseconds. PyTorch computes with one thread in
the parent: a pool of threads does not outlive a fork.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import IO, NamedTuple

SECONDS = 20.0
MEMORY = 2**30
#: Exit code of a child whose function raised: none of the product's own.
RAISED = 97


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        how: ``"exit"``, ``"raised"``, ``"timeout"``, ``"memory"`` or ``"signal"``.
        code: the exit code; of a signal its number.
        out: what it wrote to standard output.
        err: what it wrote to standard error, a traceback among it.
        seconds: how long it took.
        grown: bytes that it had resident at its peak, beyond its parent at the fork.
    """

    how: str
    code: int
    out: bytes
    err: bytes
    seconds: float
    grown: int


def forked(act: Callable[[], int], seconds: float = SECONDS, memory: int = MEMORY) -> Ended:
    """Run a function in a child and return how it ended.

    Args:
        act: returns an exit code; ``SystemExit`` counts as one.
        seconds: after which the child is ended.
        memory: bytes beyond those of the parent at which it is ended.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = _resident(os.getpid())
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        child = os.fork()
        if not child:
            _child(act, out, err)
        before = min(before, _resident(child) or before)  # what a fork does not map, it has not grown by
        how, status, used = _watched(child, start + seconds, before + memory, seconds)
        spent = time.monotonic() - start
        grown = max(0, used.ru_maxrss * 1024 - before)
        if how == "exit" and grown > memory:
            how = "memory"  # it was freed again before anyone looked
        for file in (out, err):
            file.seek(0)
        said = (out.read(), err.read())
    if how == "exit" and os.WIFSIGNALED(status):
        return Ended("signal", os.WTERMSIG(status), *said, spent, grown)
    code = os.waitstatus_to_exitcode(status)
    return Ended("raised" if how == "exit" and code == RAISED else how, code, *said, spent, grown)


def _child(act: Callable[[], int], out: IO[bytes], err: IO[bytes]) -> None:
    """Run the function with its output in files, and end without the parent's own ways of ending."""
    code = RAISED
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the rest of the child's life
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            code = act()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except Exception:  # what was printed cannot be written as text
            code = RAISED
    finally:
        os._exit(code)


def _watched(child: int, end: float, most: int, seconds: float) -> tuple[str, int, resource.struct_rusage]:
    pause = 0.0005
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return "exit", status, used
        late = time.monotonic() > end and not (time.monotonic() < end + 9 * seconds and _is_starved(child, seconds))
        why = "timeout" if late else "memory" if _resident(child) > most else ""
        if why:
            os.kill(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            return why, status, used
        time.sleep(pause)
        pause = min(0.01, 1.5 * pause)


def _is_starved(pid: int, seconds: float) -> bool:
    """Whether a process wants to compute and has not been let, on a machine that others use: it has to wait, not we."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] == "R" and (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") < seconds


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
