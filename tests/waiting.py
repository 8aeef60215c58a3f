"""Waits for events. The one limit guards against hanging and measures no speed: the slowest machine stays far below."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

#: Seconds after which something that still has not happened never will.
HANG = 600.0

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    process: subprocess.Popen | None = None,
    output: Callable[[], str] | None = None,
) -> T:
    """Polls a condition until it holds, and returns what it gave.

    Args:
        condition: holds when its result is true.
        process: fails as soon as this has ended and the condition still does not hold.
        output: reads what the process wrote, for the failure; by default from its pipes.

    Raises:
        AssertionError: if the process has ended, or nothing happened for `HANG` seconds.
    """
    end = time.monotonic() + HANG
    while True:
        ended = process is not None and process.poll() is not None  # asked first: its last act may fulfil the condition
        if answer := condition():
            return answer
        if ended and process is not None:
            said = output() if output else " ".join(str(text) for text in process.communicate() if text)
            raise AssertionError(f"the process ended with {process.returncode}: {said}")
        if time.monotonic() > end:
            raise AssertionError(f"still waiting after {HANG:g} s" + (f": {output()}" if output else ""))
        time.sleep(0.01)


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Raises TimeoutError in the block, wherever it is, when that has not ended after `HANG` seconds."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"still there after {HANG:g} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
