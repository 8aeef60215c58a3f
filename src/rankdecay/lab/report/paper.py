"""What the static figures share: their look on white paper, and a file whose bytes depend on the run alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    "axes.edgecolor": "#767b84",
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
        picture.savefig(path, dpi=200, metadata=metadata, facecolor="white")


def literal(text: str) -> str:
    """A name as matplotlib shows it as it is: a dollar sign would begin mathematics."""
    return text.replace("$", r"\$")
