"""A command in a terminal of its own, and what it wrote there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def in_a_terminal(*arguments: str, cwd: Path, environment: Mapping[str, str], columns: int = 100) -> str:
    """Run rankdecay in a pseudo-terminal and return all it wrote, escape sequences included."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    settings = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "rankdecay.cli", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=settings | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # Linux's end of file of a terminal whose other side is closed
        while piece := os.read(ours, 65536):
            written += piece
    os.close(ours)
    process.wait()
    return written.decode(errors="replace")
