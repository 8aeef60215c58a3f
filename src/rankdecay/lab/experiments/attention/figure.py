"""The static figure of an experiment, for a paper: ranks and quality against the decay of attention, all arms.

One row, or with QK-norm both on and off one for each. Where the MLPs had several decays it shows that of
`data.main_mlp_decay`. The same run gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.read import main_mlp_decay, read_grid, series
from rankdecay.lab.experiments.attention.summary import of
from rankdecay.lab.experiments.attention.verdict import error_of
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.report.figure import DASHES, drawing, literal
from rankdecay.lab.report.style import ArmStyle, arm_styles

Cell = Mapping[str, Any]
ZERO_GAP = 0.7  # of decades: how far left of the weakest decay the place of 0 is
ROW = 2.5  # height of a row of panels in inches
LEGEND = 0.3
PRODUCTS = {"query_key": "$W_K^\\top W_Q$", "value_output": "$W_O W_V$"}


def figure(directory: Path, path: Path) -> Path:
    """Draw the figure of a run directory, complete or not.

    Args:
        directory: with at least one run that ended.
        path: where to write; the suffix chooses the format (`.png`, `.svg`, `.pdf`).

    Returns:
        The path written.

    Raises:
        SettingError: when the directory is not such a run, is damaged, or has nothing to draw.
        ValueError: when the suffix is not a format matplotlib writes.
    """
    grid = read_grid(directory)
    main = main_mlp_decay(grid.cells)
    rows = {norm: series(grid.cells, qk_norm=norm, mlp_decay=main) for norm in (False, True)}
    rows = {norm: arms for norm, arms in rows.items() if arms}
    if not rows:
        raise SettingError(f"{directory} has no run that ended with a finite loss yet: there is nothing to draw")
    styles = arm_styles(grid.arms)
    with drawing(path, (9.2, ROW * len(rows) + LEGEND), layout="constrained") as picture:
        panels = picture.subplots(len(rows), 3, squeeze=False)
        for line, (norm, arms) in zip(panels, rows.items(), strict=True):
            suffix = "" if len(rows) == 1 else ", QK-norm" if norm else ", no QK-norm"
            for axes, part in zip(line, PRODUCTS, strict=False):
                _rank(axes, arms, part, styles, suffix)
            _quality(line[2], arms, styles, suffix)
        for axes in panels[-1]:
            axes.set_xlabel("decay of attention")
        _legend(picture, [axes for line in panels for axes in line])
    return path


class _Places:
    """Where decays are on an axis of decades; 0 has a place of its own."""

    def __init__(self, arms: Mapping[str, Sequence[Cell]]) -> None:
        self.strengths = sorted({cell["strength"] for cells in arms.values() for cell in cells})
        positive = [strength for strength in self.strengths if strength > 0]
        self._zero = math.log10(positive[0]) - ZERO_GAP if positive else 0.0
        self._has_break = bool(positive) and self.strengths[0] == 0

    def of(self, strength: float) -> float:
        return math.log10(strength) if strength > 0 else self._zero

    def label(self, axes: Axes) -> None:
        axes.set_xticks([self.of(s) for s in self.strengths], [f"{s:g}" for s in self.strengths])
        axes.grid(visible=False, axis="x")
        if self._has_break:
            axes.axvline(self._zero + ZERO_GAP / 2, color="#a4a9b2", linewidth=0.7, linestyle=":")


def _rank(
    axes: Axes, arms: Mapping[str, Sequence[Cell]], part: str, styles: Mapping[str, ArmStyle], suffix: str
) -> None:
    places = _Places(arms)
    untrained = []
    for name, cells in arms.items():
        known = [(places.of(c["strength"]), of(c.get("mean") or {}, part, "pseudo_rank")) for c in cells]
        known = [(x, y) for x, y in known if is_number(y)]
        if known:
            _line(axes, *zip(*known, strict=True), styles[name])
        untrained += [of(c.get("untrained_mean") or {}, part, "pseudo_rank") for c in cells]
    starts = [value for value in untrained if is_number(value)]
    if starts:
        axes.axhline(sum(starts) / len(starts), color="#767b84", linewidth=1, linestyle="--", label="untrained")
    cells = [cell for own in arms.values() for cell in own]
    has_product = any(part in (cell.get("mean") or {}) for cell in cells)
    name = PRODUCTS[part] if has_product else "$W_Q$, $W_K$"
    axes.set(title=f"Pseudo rank of {name}{suffix}", ylim=(0, 1.02))
    places.label(axes)


def _quality(axes: Axes, arms: Mapping[str, Sequence[Cell]], styles: Mapping[str, ArmStyle], suffix: str) -> None:
    places = _Places(arms)
    for name, cells in arms.items():
        x, y = [places.of(cell["strength"]) for cell in cells], [cell["loss"] for cell in cells]
        _line(axes, x, y, styles[name])
        errors = [error_of(cell) or 0.0 for cell in cells]
        axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=styles[name].light, elinewidth=1, capsize=2)
    axes.set(title=f"Loss{suffix}")
    places.label(axes)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], look: ArmStyle) -> None:
    axes.plot(x, y, color=look.light, linestyle=DASHES[look.dash], marker="o", markersize=3, label=literal(look.label))


def _legend(picture: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, below them, with as many columns as fit."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = max(1, min(len(found), 130 // (max(map(len, found)) + 8)))
    picture.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, handlelength=2.6)
