"""Comparisons that several test files make: weights by name, files of a directory, sequences of a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


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


def sequences(data: Any, side: str) -> list[tuple[int, ...]]:
    """Return the sequences of one side of a task's split: ``train`` or ``test``."""
    return [tuple(row) for row in getattr(data, f"{side}_tokens").tolist()]
