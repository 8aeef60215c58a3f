"""The charts of `rankdecay margin`: direction, norms and singular values against the margin, of one data set or of all.

Two data sets have different margins at one step, so means over them are taken at equal margins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rankdecay.lab.experiment import Axis, Chart, Choice, Line, Section
from rankdecay.lab.experiments.margin.measures import climb
from rankdecay.lab.experiments.margin.pictures import pictures
from rankdecay.lab.report.style import ArmStyle, arm_styles
from rankdecay.lab.report.words import counted, figure_text, is_number
from rankdecay.lab.settings import Record
from rankdecay.lab.stored import StoredRun, snapshots

MEASURES = {
    "cosine_nuclear": "Cosine to the nuclear SVM",
    "cosine_frobenius": "Cosine to the Frobenius SVM",
    "nuclear_excess": "Nuclear norm ‖W‖_* above the least",
    "frobenius_excess": "Frobenius norm ‖W‖_F above the least",
}
MARGIN = Axis("margin", "log")
SIGMA = "σ per unit of margin"
SVMS = {"nuclear": "nuclear SVM", "frobenius": "Frobenius SVM"}
SMALLEST = 0.1  # margin from which curves are drawn: below it the softmax selects little and a norm over it says less
GRID = 80  # margins of a mean
CHOICES = 50  # data sets that can be looked at one by one
ROUNDING = 1e-12  # below it a singular value per unit of margin is drawn no more
RANK = 1e-5  # of a solution's largest singular value: smaller ones are the solver's zero
STYLES = {
    "merged": ArmStyle("one matrix", "#767b84", "#8d939d"),
    "separate": ArmStyle("K and Q apart", "#1d63b8", "#6cb2ff"),
    "diagonal": ArmStyle("diagonal K and Q", "#0d7a5f", "#4fd1ab"),
    "separate_l2": ArmStyle("K and Q apart, L2", "#3f5fd0", "#9db4ff", "dash"),
    "merged_l2": ArmStyle("one matrix, L2", "#45586e", "#a9bfd6", "dash"),
    "low_rank": ArmStyle("one matrix, soft threshold", "#c2410c", "#ff8f5c"),
    "recipe": ArmStyle("published recipe", "#8b3a8f", "#dd8fe0", "dashdot"),
    "recipe_bare": ArmStyle("published recipe without L2", "#b08500", "#e8c34a", "dot"),
    "descent": ArmStyle("gradient descent", "#0f6d86", "#5cc3df", "dash"),
    "normalised": ArmStyle("normalised descent", "#5b7a12", "#a9cf52", "dashdot"),
    "adam": ArmStyle("Adam", "#b0307a", "#ff86bf", "dot"),
    "trained_head": ArmStyle("value head trained too", "#9a4a12", "#f0a36a", "dash"),
}


def sections(stored: StoredRun) -> list[Section]:
    """The pictures of a run in two dimensions, and the charts of every run that is complete."""
    if stored.summary is None:
        return []
    rows: list[Record] = stored.summary["arms"]
    arrays = {name: array for _, every in snapshots(stored) for name, array in every.items()}
    labels = {name: style.label for name, style in arm_styles([str(row["name"]) for row in rows], STYLES).items()}
    sets = sorted({which for row in rows for which in row["datasets"]})[:CHOICES]
    if stored.summary["datasets"] > CHOICES:
        stored.notices.append(
            f"The first {CHOICES} of {stored.summary['datasets']} data sets can be chosen; means are over all."
        )
    chosen = Choice("set", "Data set", {"mean": "all: mean and range"} | {str(which): str(which) for which in sets})
    measured = [(own, row) for row in rows if (own := [line for line in stored.rows if line["arm"] == row["name"]])]

    def against_margin(name: str) -> Chart:
        y = Axis("cosine") if name.startswith("cosine") else Axis("above the least", "log")
        lines = [line for own, row in measured for line in _curves(own, row, name, labels[row["name"]])]
        empty = "No arm shown has a margin in this data set."
        return Chart(name.replace("_", "-"), MEASURES[name], MARGIN, y, lines, [chosen], empty=empty)

    scales = {"log": Axis(SIGMA, "log"), "linear": Axis(SIGMA, from_zero=True)}
    singular_values = [line for own, row in measured for line in _spectra(own, row, arrays)]
    choices = [
        chosen,
        Choice("spectrum", "Arm", labels, "separate"),
        Choice("svm", "Dashed", SVMS),
        Choice("axis", "Axis", {"log": "logarithmic", "linear": "linear"}),
    ]
    title, empty = "Singular values against margin", "This arm has no margin in this data set."
    spectra = Chart("spectra", title, MARGIN, scales, singular_values, choices, y_by="axis", empty=empty)
    return [
        pictures(stored, arrays, labels),
        Section(
            "Direction against margin",
            "The cosine of W to the solutions of both SVMs, on the way to larger margins. Of all data sets: the mean "
            "at equal margins, from where half have come to where the first one ended, and shaded the whole range. A "
            "dot is the end of all, at their median margin; where a decay stops the flow, the direction goes on "
            "turning at one margin. Of diagonal weights the norms are ℓ1 and ℓ2.",
            [against_margin("cosine_nuclear"), against_margin("cosine_frobenius")],
            "direction",
        ),
        Section(
            "Norms above the least",
            "How far the norm of W, per unit of margin, is above the least that any matrix with these margins has. At "
            "0 it solves that SVM.",
            [against_margin("nuclear_excess"), against_margin("frobenius_excess")],
            "norms",
        ),
        Section(
            "Singular values",
            "Of W per unit of margin, from the largest down. Dashed: those of an SVM's solution, without what is zero.",
            [spectra],
            "spectra",
        ),
    ]


# --- curves against the margin ---


def at_equal_margins(margin: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Figures of data sets at equal margins, from where half have come to where the first of them ended.

    Beyond that a mean would jump with every data set that leaves it.

    Args:
        margin: shape (evaluations, sets).
        values: in the same shape; data sets of which they are not known are left out.

    Returns:
        The margins, and the values there, shape (sets, margins), NaN where a data set has not begun.
    """
    known = np.isfinite(values) | ~(margin >= SMALLEST)
    paths = [(climb(margin[:, number], SMALLEST), number) for number in np.flatnonzero(known.all(0))]
    logs = [np.maximum.accumulate(np.log10(margin[path, number])) for path, number in paths if path.size]
    begun = float(np.median([log[0] for log in logs])) if logs else 0.0
    ended = min((log[-1] for log in logs), default=-1.0)
    if begun > ended:
        return np.empty(0), np.empty((0, 0))
    grid = np.linspace(begun, ended, GRID)
    climbed = zip(logs, [values[path, number] for path, number in paths if path.size], strict=True)
    return 10**grid, np.array([np.interp(grid, log, value, left=np.nan, right=np.nan) for log, value in climbed])


def _array(lines: Sequence[Record], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], dtype=float)  # None, what cannot be said, becomes NaN


def _over_margin(
    margin: np.ndarray, values: np.ndarray, sets: Sequence[int]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Margins and values, shape (sets, margins): of all data sets as ``mean``, then of every one that can be chosen."""
    grid, every = at_equal_margins(margin, values)
    if grid.size:
        yield "mean", grid, every
    for number, which in enumerate(sets[:CHOICES]):
        path = climb(margin[:, number], SMALLEST)
        if path.size:
            yield str(which), margin[path, number], values[path, number][None]


def _said(values: np.ndarray) -> list[str]:
    """Means over data sets in words, with their range and of how many, from an array (sets, margins)."""
    parts = (np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0), np.isfinite(values).sum(0))
    return [
        f"{mean:.3g}  ({low:.3g} to {high:.3g}, {counted(int(count), 'set')})"
        for mean, low, high, count in zip(*parts, strict=True)
    ]


def _curves(lines: Sequence[Record], row: Record, measure: str, label: str) -> Iterator[Line]:
    """A measure of one arm: the mean and range of all data sets, every data set, and a dot at each end."""
    name, end = str(row["name"]), (row["margin"], row[measure])
    ended = all(map(is_number, end)) and end[0] > 0
    mean = {"set": "mean"}
    for which, x, every in _over_margin(_array(lines, "margin"), _array(lines, measure), row["datasets"]):
        if which == "mean":
            y, low, high = (of(every, 0).tolist() for of in (np.nanmean, np.nanmin, np.nanmax))
            yield Line(label, x.tolist(), y, name, low, high, where=mean, words=_said(every))
            if ended:
                yield Line(label, [x[-1], end[0]], [y[-1], end[1]], name, mark="thin", where=mean)
        else:
            where, y = {"set": which}, every[0].tolist()
            yield Line(label, x.tolist(), y, name, where=where)
            yield Line(label, [x[-1]], y[-1:], name, mark="points", where=where)
    if ended:
        yield Line(label, [end[0]], [end[1]], name, mark="points", where=mean, words=[f"end: {figure_text(end[1])}"])


def _spectra(lines: Sequence[Record], row: Record, arrays: Mapping[str, np.ndarray]) -> Iterator[Line]:
    """The singular values of one arm, and dashed those of its solutions, of all data sets and of every one."""
    name, sets = str(row["name"]), row["datasets"]
    margin, sigma = _array(lines, "margin"), _array(lines, "singular_values")  # (evaluations, sets, d)
    ends: dict[str, list[float]] = {}
    for index in range(sigma.shape[-1]):
        shade = 1 - index / max(1, sigma.shape[-1] - 1)
        for which, x, every in _over_margin(margin, sigma[..., index], sets):
            ends[which] = [x[0], x[-1]]
            y, words = np.nanmean(every, 0), _said(every) if which == "mean" else None
            if (y > ROUNDING).any():
                drawn = np.where(y > ROUNDING, y, np.nan).tolist()
                where = {"set": which, "spectrum": name}
                yield Line(f"σ{index + 1}", x.tolist(), drawn, where=where, shade=shade, words=words)
    for norm, label in SVMS.items():
        for which, sizes in _solved(arrays.get(f"{name}_{norm}"), sets).items():
            where = {"set": which, "spectrum": name, "svm": norm}
            for size in sizes[sizes > RANK * sizes[0]] if which in ends else ():
                yield Line(label, ends[which], [size, size], mark="dashed", where=where)


def _solved(solutions: np.ndarray | None, sets: Sequence[int]) -> dict[str, np.ndarray]:
    """Singular values of the solutions: their mean over data sets, and of every data set that has one."""
    if solutions is None or len(solutions) != len(sets):
        return {}
    known = [number for number, solution in enumerate(solutions) if np.isfinite(solution).all()]
    if not known:
        return {}
    sigma = np.linalg.svd(solutions[known], compute_uv=False)
    return {"mean": sigma.mean(0)} | {str(sets[number]): one for number, one in zip(known, sigma, strict=True)}
