"""The static figure of a run, for a README or a paper: accuracy, rank and final spectra per arm.

Drawn for a white background with the page's colours. Lines are medians over seeds, bands go from the lowest
seed to the highest. The format follows the suffix of the path (`.png`, `.svg`, `.pdf`); the same run gives
the same bytes.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from rankdecay.lab.experiments.grok.read import Run, across_seeds, final_spectrum, read_run
from rankdecay.lab.report.figure import DASHES, drawing, literal
from rankdecay.lab.report.style import ArmStyle, arm_styles

FLOOR = 1e-6  # of σ₁: float32 resolves little below it


def figure(directory: str | Path, path: str | Path) -> Path:
    """Draw the figure of a run directory.

    Args:
        directory: a run directory, complete or not.
        path: where to write; the suffix chooses the format.

    Returns:
        The path written.

    Raises:
        SettingError: when the directory is not a run or a file in it is damaged.
        ValueError: when the suffix is not a format matplotlib writes.
    """
    run, path = read_run(directory), Path(path)
    styles = arm_styles(run.arms)
    with drawing(path, (9.2, 3.1), layout="constrained") as picture:
        accuracy, rank, spectra = picture.subplots(1, 3)
        _over_steps(accuracy, run, styles, "test_accuracy")
        accuracy.set(title="Test accuracy", xlabel="step", ylim=(-0.02, 1.02))
        _over_steps(rank, run, styles, "stable_rank")
        rank.set(title="Stable rank of $W_Q$, $W_K$", xlabel="step", yscale="log")
        rank.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        rank.yaxis.set_minor_locator(NullLocator())
        rank.yaxis.set_major_formatter("{x:g}")
        _final_spectra(spectra, run, styles)
        _legend(picture, accuracy)
    return path


def _legend(picture: Figure, axes: Axes) -> None:
    """One legend for all panels, below them, in one row where the names fit."""
    handles, labels = axes.get_legend_handles_labels()
    widths = [len(label) + 8 for label in labels]  # in characters, with the line and the gap
    row = 130
    columns = len(labels) if sum(widths) <= row else max(1, row // max(widths))
    if handles:
        picture.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)


def _over_steps(axes: Axes, run: Run, styles: dict[str, ArmStyle], metric: str) -> None:
    for arm, look in styles.items():
        rows = np.array(across_seeds(run, arm, metric)).reshape(-1, 4)
        if len(rows):
            step, middle, low, high = rows.T
            axes.plot(step, middle, color=look.light, linestyle=DASHES[look.dash], label=literal(look.label))
            axes.fill_between(step, low, high, color=look.light, alpha=0.13, linewidth=0)


def _final_spectra(axes: Axes, run: Run, styles: dict[str, ArmStyle]) -> None:
    for arm, look in styles.items():
        values = final_spectrum(run, arm)
        if values is not None and values[0] > 0:  # a matrix held at zero has no normalised spectrum
            index = np.arange(1, len(values) + 1)
            axes.plot(index, np.maximum(values, FLOOR), color=look.light, linestyle=DASHES[look.dash])
    axes.set(title="Singular values at the end, $\\sigma_i/\\sigma_1$", xlabel="index $i$", yscale="log")
    axes.set_ylim(FLOOR, 1.6)
