"""What an experiment shows: the self-contained page of a run directory and, in `report.figure`, a static figure."""

from pathlib import Path

from rankdecay.lab.report.data import read_run

__all__ = ["read_run", "write_report"]


def write_report(directory: str | Path) -> Path:
    """Write `report.html` into a run directory, complete or not, and return its path.

    Args:
        directory: a run directory as described in `docs/run_directory.md`; only its files are needed.

    Returns:
        The path of the page, one file that needs no network.

    Raises:
        SettingError: when the directory is not a run or a file in it is damaged.
    """
    from rankdecay.lab.report.page import write_page  # plotly is loaded only when a page is made

    return write_page(read_run(directory), Path(directory) / "report.html")
