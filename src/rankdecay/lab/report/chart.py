"""One description of a chart, two renderers: `assets/chart.js` draws it on the page, :mod:`figure` for a paper.

A chart is a list of lines. A reader's choices (a measure, a layer, a data set) show some of them: each line says under
which choices it is drawn. Importing this module imports no plotting library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.report.words import is_number

NUMBERS = 400_000  # of the lines of one page, about 2.5 MB beside plotly's 5; what does not fit is thinned evenly
FEWEST = 8  # points of a line, however many lines there are
Numbers = Sequence[Any]  # None, or anything that is not finite, is a gap


@dataclass(frozen=True)
class Axis:
    """Quantity and scale of an axis.

    Attributes:
        title: in words.
        scale: ``"symlog"`` is one of decades, with a place for 0 left of the least positive value.
        limits: the ends; by default as wide as the lines.
        percent: whether numbers are shares.
        from_zero: whether it begins at 0.
    """

    title: str
    scale: Literal["linear", "log", "symlog"] = "linear"
    limits: tuple[float, float] | None = None
    percent: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Line:
    """One line, or a set of points.

    Attributes:
        label: what it is called.
        x: its places.
        y: its values, as many.
        arm: whose colour and dash it has, and whose name in the legend hides it; grey, or `shade`, without.
        low: lower ends of a band, or of error bars where the mark has points.
        high: upper ends.
        mark: how it is drawn; ``"thin"``, ``"dashed"`` and ``"dotted"`` are for what belongs to another line.
        where: the choices under which it is drawn, by name; others do not matter to it.
        shade: from 0, cold, to 1, warm: for lines of one arm in an order.
        words: what is said of each point, in place of its value.
        tags: text beside each point.
    """

    label: str
    x: Numbers
    y: Numbers
    arm: str | None = None
    low: Numbers | None = None
    high: Numbers | None = None
    mark: Literal["line", "thin", "dashed", "dotted", "points", "line+points"] = "line"
    where: Mapping[str, str] = field(default_factory=dict)
    shade: float | None = None
    words: Sequence[str] | None = None
    tags: Sequence[str] | None = None


@dataclass(frozen=True)
class Choice:
    """Choice of a reader: a name, how it is called, the options with their labels, and the first one shown."""

    name: str
    label: str
    options: Mapping[str, str]
    chosen: str | None = None

    @property
    def first(self) -> str:
        """The option that is shown first."""
        return self.chosen if self.chosen is not None and self.chosen in self.options else next(iter(self.options), "")


@dataclass(frozen=True)
class Chart:
    """Lines on two axes.

    Attributes:
        name: unique on its page; letters, digits and hyphens.
        title: in words.
        x: the horizontal axis; a mapping has one for each option of the choice `x_by`.
        y: the vertical axis, likewise of `y_by`.
        lines: of all choices together.
        choices: in the order they are shown; charts that share a name follow one choice.
        y_by: the choice that decides the vertical axis.
        x_by: the choice that decides the horizontal axis.
        empty: what is said where no line is drawn.
    """

    name: str
    title: str
    x: Axis | Mapping[str, Axis]
    y: Axis | Mapping[str, Axis]
    lines: Sequence[Line]
    choices: Sequence[Choice] = ()
    y_by: str | None = None
    x_by: str | None = None
    empty: str = "There is nothing to show here."

    @property
    def offered(self) -> list[Choice]:
        """The choices between more than one option."""
        return [choice for choice in self.choices if len(choice.options) > 1]

    def at_first(self) -> tuple[list[Line], Axis]:
        """The lines and the vertical axis before a reader has chosen anything."""
        state = {choice.name: choice.first for choice in self.choices}
        lines = [line for line in self.lines if all(state.get(name, at) == at for name, at in line.where.items())]
        return lines, self._first_axis(self.y, self.y_by)

    @property
    def first_x(self) -> Axis:
        """The horizontal axis before a reader has chosen anything."""
        return self._first_axis(self.x, self.x_by)

    def _first_axis(self, axis: Axis | Mapping[str, Axis], by: str | None) -> Axis:
        if isinstance(axis, Axis):
            return axis
        return axis[next(choice.first for choice in self.choices if choice.name == by)]


def embedded_charts(charts: Sequence[Chart], styles: Mapping[str, ArmStyle]) -> tuple[dict[str, Any], list[str]]:
    """Data of `assets/chart.js`, and notices of what had to be left out. Places that lines share stand once.

    Args:
        charts: of one page.
        styles: of the arms.
    """
    lines = [line for chart in charts for line in chart.lines]
    each = [3 if line.low is not None else 1 for line in lines]
    longest = max((len(line.x) for line in lines), default=0)
    points = max(FEWEST, NUMBERS // max(1, sum(each)))
    if sum(count * len(line.x) for count, line in zip(each, lines, strict=True)) <= NUMBERS:
        points = max(points, longest)
    places: dict[tuple[Any, ...], int] = {}
    arms = list(styles)
    drawn = [
        {
            "id": chart.name,
            "x": _embedded_axis(chart.x),
            "y": _embedded_axis(chart.y),
            "x_by": chart.x_by,
            "y_by": chart.y_by,
            "choices": [choice.name for choice in chart.choices],
            "fixed": {choice.name: choice.first for choice in chart.choices if len(choice.options) < 2},
            "empty": chart.empty,
            "lines": [_embedded(line, arms, points, places) for line in chart.lines],
        }
        for chart in charts
    ]
    notices = []
    if longest > points:
        notices.append(f"Lines are drawn at {points} of up to {longest} places, evenly spaced.")
    looks = [{"name": name, **vars(style)} for name, style in styles.items()]
    return {"arms": looks, "charts": drawn, "places": list(places)}, notices


def _embedded_axis(axis: Axis | Mapping[str, Axis]) -> dict[str, Any]:
    return vars(axis) if isinstance(axis, Axis) else {at: vars(one) for at, one in axis.items()}


def _embedded(line: Line, arms: Sequence[str], points: int, places: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    kept = evenly_spaced_indices(len(line.x), points)

    def at(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[i] for i in kept]

    x = tuple(float(value) if is_number(value) else None for value in at(as_list(line.x)) or ())
    made = {"label": line.label, "x": places.setdefault(x, len(places)), "y": at(as_list(line.y)), "mark": line.mark}
    more = {
        "arm": arms.index(line.arm) if line.arm in arms else None,
        "low": at(as_list(line.low)),
        "high": at(as_list(line.high)),
        "where": dict(line.where) or None,
        "shade": line.shade,
        "words": at(line.words),
        "tags": at(line.tags),
    }
    return made | {name: value for name, value in more.items() if value is not None}


def as_list(values: Any) -> Any:
    """Numbers as a list, whether they came as one or as an array."""
    return values.tolist() if hasattr(values, "tolist") else values


def evenly_spaced_indices(count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` items, the first and the last among them."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def median_band(series: Iterable[tuple[Numbers, Numbers]]) -> tuple[list[Any], list[float], list[float], list[float]]:
    """Several lines over their common places as one: places, medians, least and largest values."""
    from statistics import median

    at: dict[Any, list[float]] = {}
    for x, y in series:
        for place, value in zip(x, y, strict=True):
            if is_number(value):
                at.setdefault(place, []).append(float(value))
    order = sorted(at)
    return order, [median(at[x]) for x in order], [min(at[x]) for x in order], [max(at[x]) for x in order]
