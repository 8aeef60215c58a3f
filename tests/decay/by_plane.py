"""A step of rotary planes in ten lines, with which the quick one is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def reference(planes: Sequence[Tensor], amount: float, *, relative: bool = True, keep: int = 0) -> list[Tensor]:
    """Return the planes of one scope after a step, in float64: what the library's is compared with.

    Args:
        planes: X_j of each plane, (n_j, columns).
        amount: lr · strength.
        relative: whether τ is relative.
        keep: planes that lose nothing.
    """
    X = [plane.double() for plane in planes]
    norms = [float(plane.norm()) for plane in X]
    kept = sorted(range(len(X)), key=lambda j: -norms[j])[:keep]  # of equals the first
    after: list[Tensor] = []
    for j, plane in enumerate(X):
        n = len(plane)
        tau = amount * math.hypot(*norms) / math.sqrt(len(X) * n) if relative else amount
        lost = 0.0 if j in kept or not tau else tau * math.sqrt(n) / norms[j] if norms[j] else 1.0
        after.append(plane * max(0.0, 1 - lost))
    return after
