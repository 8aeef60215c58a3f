"""What an experiment shows: the self-contained page and the static figure of a run directory, or of several merged."""

from collections.abc import Sequence
from pathlib import Path

from rankdecay.lab import experiment
from rankdecay.lab.errors import SettingError
from rankdecay.lab.store import read_json

__all__ = ["draw_figure", "write_merged_report", "write_report"]

# plotly and matplotlib are loaded only when a page or a figure is made, hence the imports in the functions.


def write_report(directory: str | Path) -> Path:
    """Write `report.html` into a run directory, complete or not, and return its path.

    Args:
        directory: a run directory as described in `docs/run_directory.md`; only its files are needed.

    Returns:
        The path of the page, one file that needs no network.

    Raises:
        SettingError: when the directory is not a run or a file in it is damaged.
    """
    if is_sweep(directory):
        return write_merged_report([directory], Path(directory) / "report.html")
    return experiment.write_report(directory)


def write_merged_report(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page of several `boundary` directories, which may differ in the axes of their grid alone.

    Args:
        directories: run directories of `rankdecay boundary`; one is enough.
        path: the page to write.

    Returns:
        The path of the page.

    Raises:
        SettingError: when a directory is not a sweep, is damaged, or has other settings than the first.
    """
    from rankdecay.lab.experiments.boundary.page import write_page
    from rankdecay.lab.experiments.boundary.read import read_sweep

    return write_page(read_sweep(directories), Path(path))


def draw_figure(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the static figure of a run, or of `boundary` directories merged.

    Args:
        directories: one run directory, or several of `rankdecay boundary`.
        path: where to write; the suffix chooses the format (`.png`, `.svg`, `.pdf`).

    Returns:
        The path written.

    Raises:
        SettingError: when a directory is not a run, is damaged, or cannot be merged with the first.
        ValueError: when the suffix is not a format matplotlib writes.
    """
    if any(map(is_sweep, directories)):
        from rankdecay.lab.experiments.boundary import figure as of_sweep
        from rankdecay.lab.experiments.boundary.read import read_sweep

        return of_sweep.figure(read_sweep(directories), Path(path))
    if len(directories) != 1:
        raise SettingError(f"--figure {path} shows one run, {len(directories)} were given")
    return experiment.draw_figure(directories, path)


def is_sweep(directory: str | Path) -> bool:
    """Whether a directory holds runs of `rankdecay boundary`."""
    return _command(directory) == "boundary"


def _command(directory: str | Path) -> str | None:
    """The experiment that a directory holds a run of, if any."""
    return (read_json(Path(directory) / "config.json") or {}).get("command")
