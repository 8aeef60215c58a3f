"""Whether to compile an ensemble: where that pays, by the time of a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.machine import compiler_available

#: Seconds of training from which `torch.compile` pays on any CPU: it takes up to two minutes on a slow one, and saves
#: an eighth of the time in float32, a third in mixed precision (`benchmarks/grok.py`).
COMPILE_FROM = 900.0
PROBED = 2  # steps that are timed for it


def worth_compiling(wanted: str, device: str, make: Callable[[], Ensemble], steps: float) -> bool:
    """Return whether to compile ensembles.

    Args:
        wanted: ``on``, ``off`` or ``auto``: on a GPU, and on a CPU where the run would take long enough.
        device: on which they train.
        make: makes one of them, not compiled, to time a few steps of.
        steps: that will be trained one after another.
    """
    if wanted == "off" or not compiler_available(device):
        return False
    if wanted == "on" or device.startswith("cuda"):
        return True
    if steps <= 10 * PROBED:
        return False
    ensemble = make()
    ensemble.train(1)
    start = time.perf_counter()
    ensemble.train(PROBED)
    return (time.perf_counter() - start) / PROBED * steps >= COMPILE_FROM
