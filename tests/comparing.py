"""Comparisons that several test files make: weights by name, files of a directory, rows of runs, sequences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankdecay.lab.store import read_metrics


def assert_equal_weights(
    got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, atol: float = 1e-9
) -> None:
    """Assert that both have the same names, and equal weights under each."""
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def contents(path: Path) -> dict[str, bytes]:
    """Return every file below a directory by its path in it."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


#: Names, or ends of them, of what another run of the same command may differ in: times, and the checksums of lines.
TIMES = ("second", "seconds", "wall", "crc", "loss_at_equal_time")


def timeless(value: Any) -> Any:
    """Return rows and summaries without what another run of the same command may differ in."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith(TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def sorted_rows(out: Path) -> list[Any]:
    """Return the rows of a run without times, in an order that does not depend on which thread was first."""
    return sorted(timeless(read_metrics(out)), key=lambda row: json.dumps(row, sort_keys=True))


def sequences(data: Any, side: str) -> list[tuple[int, ...]]:
    """Return the sequences of one side of a task's split: ``train`` or ``test``."""
    return [tuple(row) for row in getattr(data, f"{side}_tokens").tolist()]
