"""Phase maps: where on the grid each cell and the fitted boundary lie, for the page and the figure alike.

A column is a strength and a row an amount of training data, both evenly spaced whatever their values: a grid is chosen
so that its steps matter equally. Between two rows the boundary is placed on a logarithmic scale.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import log
from statistics import median
from typing import Any

from rankdecay.lab.report.words import is_number
from rankdecay.lab.tasks import SAMPLED


@dataclass(frozen=True)
class DataAxis:
    """The amounts of training data of a grid, and how to say one of them."""

    fractions: list[float]  # ascending
    examples_per_fraction: float | None = None  # for a sampled task: of the whole space

    @property
    def title(self) -> str:
        """Title of the axis."""
        return "training examples" if self.examples_per_fraction else "share of all examples trained on"

    @property
    def ticks(self) -> list[str]:
        """One label per row."""
        return [self.amount(fraction) for fraction in self.fractions]

    def amount(self, fraction: float, unit: bool = False) -> str:
        """An amount of data: `"24 %"`, or `"1,240"` examples."""
        if self.examples_per_fraction:
            return self._count(fraction) + (" examples" if unit else "")
        return f"{100 * fraction:.3g} %" + (" of the data" if unit else "")

    def span(self, low: Any, high: Any) -> str | None:
        """An interval of amounts: `"22–27 %"`; None where an end is not known."""
        if not (is_number(low) and is_number(high)):
            return None
        if self.examples_per_fraction:
            return f"{self._count(low)}–{self._count(high)}"
        return f"{100 * low:.3g}–{100 * high:.3g} %"

    def value(self, fraction: float) -> float:
        """The number an axis shows for a share: per cent, or examples."""
        return fraction * (self.examples_per_fraction or 100)

    def position(self, fraction: float) -> float:
        """Where a share lies between the rows, counted from 0; kept within half a row of the grid."""
        rows = self.fractions
        if len(rows) == 1:
            return 0.0 if fraction == rows[0] else 0.5 if fraction > rows[0] else -0.5
        if fraction <= 0:
            return -0.5
        lower = min(max(bisect_right(rows, fraction) - 1, 0), len(rows) - 2)
        step = log(fraction / rows[lower]) / log(rows[lower + 1] / rows[lower])
        return min(max(lower + step, -0.5), len(rows) - 0.5)

    def _count(self, fraction: float) -> str:
        """Examples: as many as a row of the grid has, to three digits between the rows."""
        count = fraction * (self.examples_per_fraction or 1)
        digits = 0 if fraction in self.fractions else min(0, 3 - len(str(round(count))))
        return f"{round(count, digits):,.0f}"


@dataclass(frozen=True)
class Fit:
    """The fitted boundary of one column: positions on the data axis."""

    column: int
    at: float | None  # None where the boundary lies outside the grid
    low: float
    high: float
    censored: str | None  # "below": under all rows; "above": over all


@dataclass(frozen=True)
class PhaseMap:
    """One arm at one decay of the rest: its columns, its cells by (column, row), and its boundary.

    An arm may set the decay of the rest itself, a different one at each strength (`l2_all` does): it has one map, whose
    `rest_decay` is None.
    """

    arm: str
    rest_decay: float | None
    strengths: list[float]
    cells: dict[tuple[int, int], dict[str, Any]]
    fits: list[Fit]

    @property
    def rest(self) -> str:
        """Its decay of the rest in words."""
        return "its own" if self.rest_decay is None else f"{self.rest_decay:g}"

    @cached_property
    def has_strengths(self) -> bool:
        """Whether the arm has a strength at all; one without has the single column 0."""
        return self.strengths != [0.0]

    def neighbours(self) -> list[list[int]]:
        """Columns with a fit, those side by side together: each group has one band."""
        return _adjacent([fit.column for fit in self.fits])

    def segments(self) -> list[list[tuple[int, float]]]:
        """Boundaries within the grid as (column, position), those side by side together: each group has one line."""
        inside = {fit.column: fit.at for fit in self.fits if fit.at is not None}
        return [[(column, inside[column]) for column in group] for group in _adjacent(list(inside))]


def data_axis(summary: Mapping[str, Any]) -> DataAxis:
    """The data axis of a sweep: a share of all examples, or a number of them where they are sampled."""
    cells = [cell for arm in summary["arms"] for cell in arm.get("cells", [])]
    fractions = sorted({float(cell["train_fraction"]) for cell in cells})
    if summary.get("settings", {}).get("task") not in SAMPLED:
        return DataAxis(fractions)
    ratios = [c["train_examples"] / c["train_fraction"] for c in cells if is_number(c.get("train_examples"))]
    return DataAxis(fractions, median(ratios) if ratios else None)


def phase_maps(summary: dict[str, Any], axis: DataAxis) -> list[PhaseMap]:
    """One map per arm and decay of the rest, in the order of the summary."""
    maps = []
    for arm in summary["arms"]:
        cells = arm.get("cells", [])
        columns = {(cell["strength"], cell["rest_decay"]) for cell in cells}
        rests: list[float | None] = [*sorted({float(rest) for _, rest in columns})]
        if len(rests) > 1 and len(columns) == len({strength for strength, _ in columns}):
            rests = [None]
        for rest in rests:
            shown = [cell for cell in cells if rest is None or cell["rest_decay"] == rest]
            strengths = sorted({float(cell["strength"]) for cell in shown})
            placed = {(strengths.index(c["strength"]), axis.fractions.index(c["train_fraction"])): c for c in shown}
            fits = [
                _fit(boundary, strengths.index(boundary["strength"]), axis)
                for boundary in arm.get("boundaries", [])
                if rest in (None, boundary["rest_decay"]) and boundary["strength"] in strengths
            ]
            maps.append(PhaseMap(arm["name"], rest, strengths, placed, sorted(fits, key=lambda fit: fit.column)))
    return maps


def by_boundary(summary: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The arms that have a boundary, from the one that needs least data to the one that needs most; bounds outside."""

    def order(arm: dict[str, Any]) -> tuple[int, float]:
        side = {"below": -1, "above": 1}.get(str(arm["boundary"].get("censored")), 0)
        return side, arm["boundary"]["train_fraction"]

    return sorted((arm for arm in (summary or {}).get("arms", []) if arm.get("boundary")), key=order)


def rest_decays(maps: Iterable[PhaseMap]) -> list[float]:
    """The decays of the rest that a sweep has maps for, beside those that arms set themselves."""
    return sorted({item.rest_decay for item in maps if item.rest_decay is not None})


def _fit(boundary: dict[str, Any], column: int, axis: DataAxis) -> Fit:
    bottom, top = -0.5, len(axis.fractions) - 0.5
    value, low, high = (boundary.get(name) for name in ("train_fraction", "low", "high"))
    return Fit(
        column,
        axis.position(value) if is_number(value) and not boundary.get("censored") else None,
        axis.position(low) if is_number(low) else bottom,
        axis.position(high) if is_number(high) else top,
        boundary.get("censored"),
    )


def _adjacent(columns: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for column in columns:
        if groups and groups[-1][-1] == column - 1:
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups
