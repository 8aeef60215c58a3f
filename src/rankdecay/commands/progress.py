"""Lines of progress on standard error."""

import contextlib
import sys
import time

from rankdecay.text import duration, time_left, visible

#: Seconds of work before the first line of progress, and between two of them.
PATIENCE = 5.0


class Progress:
    """Line on standard error now and then while work takes longer than one waits without a word."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._last = self._start = time.monotonic()
        self._due = self._start + PATIENCE

    def __call__(self, what: str, done: int, count: int, unit: str = "") -> None:
        """Say how much of what is done, unless it was said a moment ago or all of it is."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._due = what, self._last, self._last + PATIENCE
        self._last = now
        if now < self._due or done == count:
            return
        self._due = now + PATIENCE
        seconds = now - self._start
        left = ", ".join(filter(None, [duration(seconds), time_left(seconds, done, count - done)]))
        with contextlib.suppress(OSError):  # that nobody reads it must not end the work
            print(visible(f"{what}: {done} of {count}{unit}, {left}"), file=sys.stderr, flush=True)
