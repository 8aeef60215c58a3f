"""100 damaged checkpoints and run directories; more with ``python -m tests.robustness.fuzz --cases 10000``."""

from __future__ import annotations

import subprocess
import sys

from tests import needs
from tests.waiting import HANG


@needs.fork
def test_damage_is_a_result_or_one_clear_line() -> None:
    """In a process of its own: a child shares the memory of its parent, which should be small and without threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.fuzz", "--cases", "100", "--start", "30000"],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 cases" in done.stdout
