"""Name a weight that is not finite any more: its decay makes all of the matrix NaN, and spoils no other.

On a GPU a step never waits for the device, so what one step finds is read in a later one, when it has arrived.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankdecay.dtensor import local


class FiniteCheck:
    """Look at decayed weights, and warn once of each that is not finite."""

    def __init__(self) -> None:
        self._named: set[str] = set()
        self._arriving: list[tuple[list[str], Tensor, Any]] = []  # names, whether each is finite, CUDA event

    def look(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Look at weights after their decay.

        Args:
            weights: with their names; of a DTensor the part that this process has.
        """
        here = [(name, local(weight.detach())) for name, weight in weights if name not in self._named]
        here = [(name, weight) for name, weight in here if weight.numel()]
        for device in {weight.device for _, weight in here}:
            members = [(name, weight) for name, weight in here if weight.device == device]
            names = [name for name, _ in members]
            # Extremes and no sum, which may overflow where every entry is finite; NaN goes through.
            finite = torch.stack([w.amax().isfinite() & w.amin().isfinite() for _, w in members])
            if device.type != "cuda":
                self._name(names, finite)
                continue
            arriving = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
            arriving.copy_(finite, non_blocking=True)
            self._arriving.append((names, arriving, torch.cuda.current_stream(device).record_event()))
        while self._arriving and self._arriving[0][2].query():
            names, finite, _ = self._arriving.pop(0)
            self._name(names, finite)

    def _name(self, names: list[str], finite: Tensor) -> None:
        bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good and name not in self._named]
        if bad:
            self._named.update(bad)
            warnings.warn(
                f"{', '.join(bad)} {'has' if len(bad) == 1 else 'have'} entries that are not finite; a decay "
                "of rank or norm spreads them over that matrix only. Training has diverged: go back to an earlier "
                "checkpoint, and lower the learning rate, clip the gradients, or lower the strength if "
                "attachment.describe() shows that a step takes nearly all of a weight.",
                stacklevel=7,
            )
