"""Loggers for a :class:`rankdecay.Monitor`: TensorBoard, W&B, trackio and the terminal, with pictures of spectra.

Each is given to ``Monitor(model, log=...)``. It receives the ranks as any callable does, and the singular values of
each layer too: as a histogram, in the terminal as a line of blocks. The packages are their user's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from torch import Tensor

from rankdecay.inspection import mean_spectrum
from rankdecay.text import bars, in_encoding, number, visible

BINS = 64  # of a histogram


class TensorBoard:
    """Scalars of ranks and, for each layer, the distribution of its singular values.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar`` and ``add_histogram``.

    Example::

        monitor = rd.Monitor(model, every=100, log=TensorBoard(SummaryWriter("runs")))
    """

    takes_spectra = True

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, values: Mapping[str, float], spectra: Mapping[str, Tensor]) -> None:
        """Log one measurement: its values, and the singular values (heads, k) by ``<layer>/<part>``."""
        step = int(values["step"])
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        for name, sigma in spectra.items():
            if sigma.isfinite().all():  # a histogram of NaN is refused; the scalars say NaN
                self.writer.add_histogram(f"spectrum/{name}", sigma.flatten().numpy(), step)


class WandB:
    """Scalars of ranks and, for each layer, a histogram of its singular values, in one row of a W&B run.

    Args:
        run: what ``wandb.init`` returned.
    """

    takes_spectra = True

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, values: Mapping[str, float], spectra: Mapping[str, Tensor]) -> None:
        """Log one measurement, as :class:`TensorBoard` does; the number of the step is in the row as ``step``."""
        import wandb  # pyright: ignore[reportMissingImports]

        self.run.log(dict(values) | _histograms(wandb.Histogram, spectra))


class Trackio:
    """Scalars of ranks and, for each layer, a histogram of its singular values, in the present trackio run.

    Args:
        log: ``trackio.log``, or the ``log`` of a run.
    """

    takes_spectra = True

    def __init__(self, log: Any) -> None:
        if not callable(log):
            raise TypeError(
                f"log must be trackio.log or the log of a run, got {type(log).__name__}: Trackio(trackio.log)."
            )
        self.log = log

    def __call__(self, values: Mapping[str, float], spectra: Mapping[str, Tensor]) -> None:
        """Log one measurement under its step, as :class:`TensorBoard` does."""
        import trackio  # pyright: ignore[reportMissingImports]

        scalars = {name: value for name, value in values.items() if name != "step"}
        self.log(scalars | _histograms(trackio.Histogram, spectra), step=int(values["step"]))


class Terminal:
    """A line per layer and product: its mean spectrum in blocks, and its effective rank where that is measured.

    Levels are drawn in ASCII where the encoding of the stream has no blocks. There is no colour.

    Args:
        file: where to; standard output by default.
        width: characters of a spectrum at most.
    """

    takes_spectra = True

    def __init__(self, file: TextIO | None = None, width: int = 48) -> None:
        self.file, self.width = file, width

    def __call__(self, values: Mapping[str, float], spectra: Mapping[str, Tensor]) -> None:
        """Print one measurement."""
        file = self.file or sys.stdout
        longest = max(map(len, spectra), default=0)
        for name, sigma in spectra.items():
            rank = values.get(f"rank/{name}/effective_rank")
            rank_text = "" if rank is None else f"  effective rank {number(rank)}"
            picture = bars(mean_spectrum(sigma.tolist()), self.width)
            line = f"step {values['step']:>6}  {visible(name):<{longest}}  {picture}{rank_text}"
            print(in_encoding(line, getattr(file, "encoding", None) or "utf-8"), file=file)


def _histograms(kind: Any, spectra: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the histogram of each spectrum that is finite, in the class of a package."""
    return {
        f"spectrum/{name}": kind(np_histogram=np.histogram(sigma.flatten().numpy(), bins=BINS))
        for name, sigma in spectra.items()
        if sigma.isfinite().all()
    }
