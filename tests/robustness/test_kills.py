"""Every command that writes, killed once; more with ``python -m tests.robustness.kills --kills 200``."""

from __future__ import annotations

import subprocess
import sys

from tests import needs
from tests.robustness.kills import COMMANDS
from tests.waiting import HANG


@needs.fork
def test_a_command_that_was_killed_ends_as_one_that_was_not() -> None:
    """In a process of its own, whose children inherit no threads."""
    command = [sys.executable, "-m", "tests.robustness.kills", "--kills", str(len(COMMANDS)), "--start", "1200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(COMMANDS)} resumed to equal results, 0 did not" in done.stdout
