"""Runs the command line and holds it in the middle of its run, where a test can kill it, however late that comes.

    python tests/held.py EVENT LINES FILE rankdecay's arguments ...

What is held is the real command, in front of one of its own file operations; a signal acts on it as on any other.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOREVER = 600.0  # seconds: nobody is left who would end this process


def held(*arguments: str, event: str = "open", lines: int = 0, file: str = ".lock") -> list[str]:
    """The command that runs rankdecay with these arguments until it is held (see `hold`)."""
    return [sys.executable, __file__, event, str(lines), file, *arguments]


def hold(directory: Path, event: str, lines: int, file: str) -> None:
    """Holds this process before the first write in a run directory where certain things have been written.

    Args:
        directory: of the run.
        event: ``open``, of a file to write, or ``os.rename``, where the new file is still called ``.partial``.
        lines: of ``metrics.jsonl`` that are there.
        file: in the run directory that is there.
    """

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name != event or (event == "open" and not set(str(arguments[1])) & set("wa")):
            return
        inside = not isinstance(arguments[0], int) and directory in Path(os.fsdecode(arguments[0])).parents
        if inside and (directory / file).exists() and count(directory) >= lines:
            end = time.monotonic() + FOREVER
            while time.monotonic() < end:
                time.sleep(0.02)
            os._exit(70)

    sys.addaudithook(hook)


def count(directory: Path) -> int:
    """Whole lines of ``metrics.jsonl``."""
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
    del sys.path[0]  # the folder of the tests, whose names are no modules of the command
    hold(Path(sys.argv[sys.argv.index("--out") + 1]), sys.argv[1], int(sys.argv[2]), sys.argv[3])
    from rankdecay.cli import console

    sys.argv[1:4] = []
    console()
