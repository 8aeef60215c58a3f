"""The static figure of a sweep, for a paper: a phase map per arm, below them each arm's boundary and interval.

Arranged in inches rather than by matplotlib, so that a cell has the same size in every map. All of it is vectors.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import NullLocator

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.boundary import arms as known
from rankdecay.lab.experiments.boundary.maps import DataAxis, PhaseMap, by_boundary, data_axis, phase_maps
from rankdecay.lab.report.figure import drawing, literal
from rankdecay.lab.report.style import ArmStyle, arm_styles
from rankdecay.lab.stored import StoredRun

COLOURS = LinearSegmentedColormap.from_list("share", ["#f4f2ec", "#7fa3c7", "#0b2d5c"])
LINE = "#d9480f"
HATCH = "#a8a499"
WIDTH = 9.2  # of the figure, in inches as all below
CELL, ROW = 0.31, 0.21  # width and height of a cell
LEFT, GAP = 0.62, 0.3  # for the labels of the data, and between maps
TITLE, BELOW = 0.14, 0.42  # above the cells of a map, per line of its title, and below them
KEY = 0.45  # height of the line that explains the marks
ARM = 0.2  # height of an arm in the panel of boundaries
MOST_TICKS = 12  # on the data axis of the panel of boundaries
FEWEST_COLUMNS = 3  # a map is at least this wide, for its title


def figure(sweep: StoredRun, path: Path) -> Path:
    """Draw the figure of a sweep; the same runs give the same bytes.

    Args:
        sweep: with at least one finished run.
        path: where to write; the suffix chooses the format.

    Returns:
        The path written.

    Raises:
        SettingError: When no run is finished.
        ValueError: When the suffix is not a format matplotlib writes.
    """
    if sweep.summary is None:
        raise SettingError(f"{sweep.directory} has no finished run yet: there is nothing to draw")
    axis = data_axis(sweep.summary)
    maps = phase_maps(sweep.summary, axis)
    styles = arm_styles(sweep.arms, known.styles(sweep.settings))
    lines = _lines(maps)
    arms = by_boundary(sweep.summary)
    titles = max(_title(item, styles, _several(maps)).count("\n") + 1 for item in maps)
    map_height = TITLE * (titles + 0.6) + ROW * len(axis.fractions) + BELOW
    panel_height = 0.5 + ARM * len(arms) + KEY
    height = len(lines) * map_height + panel_height
    with drawing(path, (WIDTH, height)) as picture:
        for number, line in enumerate(lines):
            left = LEFT
            for i, item in enumerate(line):
                bottom = height - (number + 1) * map_height + BELOW
                size = CELL * len(item.strengths), ROW * len(axis.fractions)
                _map(_axes(picture, left, bottom, *size), item, axis, styles, labelled=i == 0, several=_several(maps))
                left += _width(item)
        _key(picture, panel_height - KEY + 0.05)
        label = max(len(styles[arm["name"]].label) for arm in arms) * 0.065 + 0.2
        _boundaries(_axes(picture, label, 0.45, WIDTH - label - 0.2, ARM * len(arms)), arms, axis, styles)
    return path


def _several(maps: list[PhaseMap]) -> bool:
    return len({item.rest for item in maps}) > 1


def _width(item: PhaseMap) -> float:
    return CELL * max(len(item.strengths), FEWEST_COLUMNS) + GAP


def _lines(maps: list[PhaseMap]) -> list[list[PhaseMap]]:
    """Maps side by side, as many in a line as fit."""
    lines: list[list[PhaseMap]] = []
    room = 0.0
    for item in maps:
        if _width(item) > room:
            lines.append([])
            room = WIDTH - LEFT
        lines[-1].append(item)
        room -= _width(item)
    return lines


def _axes(picture: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    whole_width, whole_height = picture.get_size_inches()
    return picture.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def _map(
    axes: Axes, item: PhaseMap, axis: DataAxis, styles: dict[str, ArmStyle], labelled: bool, several: bool
) -> None:
    rows, columns = len(axis.fractions), len(item.strengths)
    for (column, row), cell in item.cells.items():
        box: dict[str, Any] = {"xy": (column - 0.46, row - 0.44), "width": 0.92, "height": 0.88, "linewidth": 0}
        axes.add_patch(Rectangle(**box, facecolor=COLOURS(cell["generalised"] / cell["seeds"])))
        if cell.get("steps_to_generalise") is None:
            axes.add_patch(Rectangle(**box, facecolor="none", edgecolor=HATCH, hatch="/////"))
        if cell.get("diverged"):
            axes.plot(column + 0.27, row + 0.2, marker="x", color=LINE, markersize=3, markeredgewidth=0.9)
    _fitted(axes, item, rows)
    lines = _title(item, styles, several).split("\n")  # each literal: a line feed in a name would be spelled
    axes.set_title("\n".join(map(literal, lines)), fontsize=7.5, pad=3)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5))
    axes.grid(visible=False)
    axes.tick_params(length=0, labelsize=7, pad=2)
    axes.set_xticks(range(columns), [f"{strength:g}" if item.has_strengths else "" for strength in item.strengths])
    if columns > 1 and max(len(f"{strength:g}") for strength in item.strengths) > 4:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_yticks(range(rows), axis.ticks if labelled else [""] * rows)
    if item.has_strengths:
        axes.set_xlabel("strength", fontsize=7, labelpad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _title(item: PhaseMap, styles: dict[str, ArmStyle], several: bool) -> str:
    """The name of an arm on at most two lines, and the decay of the rest where there are several."""
    rest = f"\nrest decay: {item.rest}" if several else ""
    return _wrapped(styles[item.arm].label, 6 * max(len(item.strengths), FEWEST_COLUMNS)) + rest


def _wrapped(label: str, room: int) -> str:
    if len(label) <= room or " " not in label:
        return label
    spaces = [i for i, character in enumerate(label) if character == " "]
    at = min(spaces, key=lambda i: abs(i - len(label) / 2))
    return f"{label[:at]}\n{label[at + 1 :]}"


def _fitted(axes: Axes, item: PhaseMap, rows: int) -> None:
    """The boundary with its band; where it lies beyond the grid a triangle points to it."""
    fits = {fit.column: fit for fit in item.fits}
    for columns in item.neighbours():
        ends = [columns[0] - 0.5, *columns, columns[-1] + 0.5]
        edges = [columns[0], *columns, columns[-1]]
        low = [(x, fits[column].low) for x, column in zip(ends, edges, strict=True)]
        high = [(x, fits[column].high) for x, column in zip(ends, edges, strict=True)]
        axes.add_patch(Polygon([*low, *reversed(high)], facecolor=LINE, alpha=0.05, linewidth=0))
        for edge in (low, high):
            axes.plot(*zip(*edge, strict=True), color=LINE, linewidth=0.6, dashes=(3, 2), alpha=0.8)
    for segment in item.segments():
        xs = [segment[0][0] - 0.5, *(column for column, _ in segment), segment[-1][0] + 0.5]
        ys = [segment[0][1], *(at for _, at in segment), segment[-1][1]]
        axes.plot(xs, ys, color="white", linewidth=3, alpha=0.85, solid_capstyle="butt")
        axes.plot(xs, ys, color=LINE, linewidth=1.5, solid_capstyle="butt")
    for fit in item.fits:
        if fit.at is None:
            y, marker = (rows - 0.72, "^") if fit.censored == "above" else (-0.28, "v")
            axes.plot(
                fit.column, y, marker=marker, color=LINE, markersize=4.5, markeredgecolor="white", markeredgewidth=0.6
            )


def _key(picture: Figure, bottom: float) -> None:
    """Key to colours and marks, in one line."""
    boxes: list[Any] = [Rectangle((0, 0), 1, 1, facecolor=COLOURS(share), linewidth=0) for share in (0.0, 0.5, 1.0)]
    boxes.append(Rectangle((0, 0), 1, 1, facecolor=COLOURS(0.0), edgecolor=HATCH, hatch="/////", linewidth=0))
    line = Line2D([], [], color=LINE, linewidth=1.5)
    beyond = Line2D([], [], color=LINE, marker="^", linestyle="none", markersize=4.5)
    diverged = Line2D([], [], color=LINE, marker="x", linestyle="none", markersize=3.5)
    words = ["no seed generalised", "half", "all", "fewer than half by the budget", "fitted boundary, 95 % band"]
    words += ["beyond the grid", "a run diverged"]
    picture.legend(
        [*boxes, line, beyond, diverged], words, loc="lower center", ncols=len(words), fontsize=7, handlelength=1.6,
        columnspacing=1.2, bbox_to_anchor=(0.5, bottom / picture.get_size_inches()[1]),
    )  # fmt: skip


def _boundaries(axes: Axes, arms: list[dict[str, Any]], axis: DataAxis, styles: dict[str, ArmStyle]) -> None:
    """A point and an interval per arm at its best strength; triangles are bounds, open ends run to the edge."""
    bounds = [arm["boundary"] for arm in arms]
    values = [axis.value(b[key]) for b in bounds for key in ("train_fraction", "low", "high") if b.get(key)]
    least, most = min(values) / 1.12, max(values) * 1.12
    for y, (arm, bound) in enumerate(zip(arms, bounds, strict=True)):
        colour = styles[arm["name"]].light
        low = axis.value(bound["low"]) if bound.get("low") else least
        high = axis.value(bound["high"]) if bound.get("high") else most
        axes.plot([low, high], [y, y], color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt")
        marker = {"below": "<", "above": ">"}.get(str(bound.get("censored")), "o")
        axes.plot(axis.value(bound["train_fraction"]), y, marker=marker, color=colour, markersize=5)
    axes.set(xscale="log", xlim=(least, most), ylim=(len(arms) - 0.5, -0.5))
    axes.set_xlabel(f"{axis.title} at which half of the runs generalise (best strength, 95 % interval)", fontsize=8)
    axes.set_yticks(range(len(arms)), [literal(styles[arm["name"]].label) for arm in arms])
    axes.tick_params(axis="y", length=0)
    every = -(-len(axis.fractions) // MOST_TICKS)
    axes.set_xticks([axis.value(fraction) for fraction in axis.fractions[::every]], axis.ticks[::every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
