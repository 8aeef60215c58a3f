"""Draws the charts of a run for a paper: one row of panels on white, and a file whose bytes depend on the run alone."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rankdecay.files import write
from rankdecay.lab.report.chart import Chart, Line, as_list
from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.report.words import is_number
from rankdecay.text import visible

WIDTH, ROW, LEGEND = 9.2, 2.6, 0.4  # inches
PANELS = 3  # in a row
LEGEND_CHARACTERS = 130  # that fit in a line of the legend
FEWEST_TICKS, FEW_DECADES = 3, 1000  # times the least value, between which a logarithmic axis has ticks at 1, 2, 5
ZERO_GAP = 0.7  # of decades: how far left of the least positive value the place of 0 is
GREY = "#767b84"
DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (4, 2)),
    "dot": (0, (1, 1.5)),
    "dashdot": (0, (4, 1.5, 1, 1.5)),
    "longdash": (0, (8, 2)),
    "longdashdot": (0, (8, 1.5, 1, 1.5)),
}
_LOOK: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6e4de",
    "grid.linewidth": 0.6,
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "rankdecay",
    "pdf.fonttype": 42,
}


@contextmanager
def drawing(path: Path, size: tuple[float, float], layout: Any = None) -> Iterator[Figure]:
    """A figure in the shared look, written on leaving.

    Args:
        path: where to write; the suffix chooses the format (`.png`, `.svg`, `.pdf`).
        size: width and height in inches.
        layout: of matplotlib, for one that it should arrange.
    """
    with matplotlib.rc_context(_LOOK):
        picture = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(picture)
        yield picture
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        drawn = io.BytesIO()
        kind = path.suffix.lower().removeprefix(".")
        picture.savefig(drawn, format=kind, dpi=200, metadata=metadata, facecolor="white")
        write(path, drawn.getvalue())


def literal(text: str) -> str:
    """A name as matplotlib shows it as it is: a dollar sign would begin mathematics."""
    return visible(text).replace("$", r"\$")


def draw(charts: Sequence[Chart], styles: Mapping[str, ArmStyle], path: Path) -> Path:
    """Draw charts side by side, each as it is before a reader has chosen anything, with one legend below them.

    Args:
        charts: one panel each.
        styles: of the arms.
        path: where to write; the suffix chooses the format (`.png`, `.svg`, `.pdf`).
    """
    rows = math.ceil(len(charts) / PANELS)
    with drawing(path, (WIDTH, ROW * rows + LEGEND), layout="constrained") as picture:
        panels = picture.subplots(rows, min(PANELS, len(charts)), squeeze=False).ravel()
        for axes, chart in zip(panels, charts, strict=False):
            _panel(axes, chart, styles)
        for axes in panels[len(charts) :]:
            axes.set_axis_off()
        _legend(picture, list(panels[: len(charts)]))
    return path


def _panel(axes: Axes, chart: Chart, styles: Mapping[str, ArmStyle]) -> None:
    lines, y = chart.at_first()
    x = chart.first_x
    lines = [line for line in lines if any(map(is_number, as_list(line.y)))]
    place = _decades(axes, lines) if x.scale == "symlog" else lambda value: value
    for line in lines:
        _line(axes, line, place, styles)
    axes.set(title=literal(chart.title), xlabel=literal(x.title))
    if y.title != chart.title:
        axes.set_ylabel(literal(y.title))
    for axis, scale, limits in ((x, axes.set_xscale, axes.set_xlim), (y, axes.set_yscale, axes.set_ylim)):
        if axis.scale == "log":
            scale("log")
        if axis.limits:
            limits(*axis.limits)
        elif axis.from_zero:
            limits(0, None)
    if y.scale == "log":
        _few_decades(axes.yaxis)
    if y.percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))


def _few_decades(axis: Axis) -> None:
    """Ticks of a logarithmic axis that are numbers, 1, 2, 5, where powers of ten would be too few."""
    low, high = axis.get_view_interval()
    if FEWEST_TICKS * low < high < FEW_DECADES * low:
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_major_formatter("{x:g}")


def _line(axes: Axes, line: Line, place: Any, styles: Mapping[str, ArmStyle]) -> None:
    style = styles.get(line.arm or "")
    colour = style.light if style else GREY
    x = [place(value) if is_number(value) else math.nan for value in as_list(line.x)]
    y, low, high = (_numbers(values) for values in (line.y, line.low, line.high))
    points = "points" in line.mark
    dash = {"dashed": DASHES["dash"], "dotted": DASHES["dot"]}.get(line.mark, DASHES[style.dash] if style else "-")
    if line.shade is not None:
        colour, dash = matplotlib.colormaps["coolwarm"](line.shade), "-"
    look: dict[str, Any] = {"color": colour, "linestyle": "" if line.mark == "points" else dash}
    if line.mark in ("thin", "dashed", "dotted"):
        look |= {"linewidth": 0.8, "alpha": 0.6}
    if points:
        look |= {"marker": "o", "markersize": 3}
    axes.plot(x, y, **look, label="_" if line.mark in ("thin", "dashed", "dotted") else literal(line.label))
    for place_x, value, tag in zip(x, y, line.tags or (), strict=False):
        axes.annotate(literal(tag), (place_x, value), (3, 3), textcoords="offset points", fontsize=7)
    if line.low is None:
        return
    if points:
        errors = np.nan_to_num([y - low, high - y]).clip(0)
        axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _decades(axes: Axes, lines: Sequence[Line]) -> Any:
    """Places on an axis of decades that has one for 0, with its ticks."""
    values = sorted({value for line in lines for value in as_list(line.x) if is_number(value)})
    positive = [value for value in values if value > 0]
    zero = math.log10(positive[0]) - ZERO_GAP if positive else 0.0

    def place(value: float) -> float:
        return math.log10(value) if value > 0 else zero

    axes.set_xticks([place(value) for value in values], [f"{value:g}" for value in values])
    axes.grid(visible=False, axis="x")
    if positive and values[0] == 0:
        axes.axvline(zero + ZERO_GAP / 2, color="#a4a9b2", linewidth=0.7, linestyle=":")
    return place


def _numbers(values: Any) -> np.ndarray:
    return np.array([value if is_number(value) else math.nan for value in as_list(values) or ()], dtype=float)


def _legend(picture: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, below them, in one row where the names fit."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        widths = [len(label) + 8 for label in found]  # in characters, with the line and the gap
        columns = len(found) if sum(widths) <= LEGEND_CHARACTERS else max(1, LEGEND_CHARACTERS // max(widths))
        picture.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, handlelength=2.6)
