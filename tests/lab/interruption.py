"""An experiment that a person interrupts, so that a test can continue it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rankdecay import cli
from rankdecay.lab.store import RunDirectory


def interrupt(command: Sequence[str], out: Path, checkpoints: int = 1) -> None:
    """Run a command into a directory until it has written a number of checkpoints."""
    real, count = RunDirectory.save_checkpoint, 0

    def save(self: RunDirectory, *arguments: Any) -> None:
        nonlocal count
        real(self, *arguments)
        count += 1
        if count == checkpoints:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)  # a checkpoint at each evaluation
        patch.setattr(RunDirectory, "save_checkpoint", save)
        assert cli.main([*command, "--out", str(out)]) == 130
    assert list(out.glob("*.safetensors"))
    assert not (out / "summary.json").exists()
