"""Figures and tables as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float | None) -> str:
    """Return three digits of a value; × for None."""
    return "×" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: ``"48 s"``, ``"3:07 min"``, ``"2:05 h"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row of a table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
