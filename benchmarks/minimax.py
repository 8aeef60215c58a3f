"""The generator of the frozen schedules in rankdecay.linalg.minimax.

    python benchmarks/minimax.py         # prints them all

Remez exchange for one quintic, and the greedy composition of them, in float64; rankdecay.linalg.minimax says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankdecay.linalg.minimax import CUSHION, LIMIT, SAFETY, SCHEDULES, Triple


def quintic(lower: float, upper: float) -> Triple:
    """Return (a, b, c) of the odd quintic nearest to 1 on ``[lower, upper]`` in the maximum norm.

    The error of the best fit takes its extreme value, with alternating signs, at four points (Chebyshev):
    both ends and the two stationary points of p. Remez exchange: solve for (a, b, c, error) at four points,
    move the inner two to the stationary points, repeat.

    Args:
        lower: Left end of the interval, ``0 < lower``.
        upper: Right end, ``lower <= upper``.

    Returns:
        The coefficients of x, x^3 and x^5.

    Raises:
        ValueError: If the interval is empty or touches zero.
    """
    if not 0 < lower <= upper:
        raise ValueError(f"quintic needs 0 < lower <= upper, got lower={lower!r}, upper={upper!r}.")
    if lower / upper > 1 - 5e-6:  # the interval is a point as far as float64 can tell: use the limit
        a, b, c = LIMIT
        return a / upper, b / upper**3, c / upper**5
    inner = np.array([0.75 * lower + 0.25 * upper, 0.25 * lower + 0.75 * upper])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    a = b = c = 0.0
    error = np.inf
    for _ in range(100):
        x = np.array([lower, inner[0], inner[1], upper])
        a, b, c, new_error = np.linalg.solve(np.stack([x, x**3, x**5, signs], axis=1), np.ones(4))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        # p'(x) = a + 3 b x^2 + 5 c x^4 = 0
        root = np.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sqrt(np.array([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
    return float(a), float(b), float(c)


def evaluate(triples: Sequence[Triple], x: np.ndarray | float) -> np.ndarray:
    """Return the composition of the quintics ``triples``, first one first, at the points ``x`` (float64)."""
    value = np.asarray(x, dtype=np.float64)
    for a, b, c in triples:
        square = value * value
        value = value * (a + square * (b + square * c))
    return value


def schedule(ell: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0) -> tuple[Triple, ...]:
    """Return ``steps`` quintics whose composition takes ``[ell, 1]`` to 1 (module docstring).

    Args:
        ell: Smallest singular value to be taken to 1, relative to the normalisation; ``0 < ell <= 1``.
        steps: Number of quintics.
        cushion: Fraction q of the interval's upper end below which a step does not fit.
        safety: Factor s >= 1 by which every step but the last contracts.

    Returns:
        One (a, b, c) per step, first step first.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not 0 < ell <= 1:
        raise ValueError(f"ell={ell!r} is outside (0, 1]: it is a singular value relative to the norm.")
    if steps < 1:
        raise ValueError(f"steps={steps!r} must be at least 1.")
    if not 0 <= cushion < 1:
        raise ValueError(f"cushion={cushion!r} is outside [0, 1).")
    if safety < 1:
        raise ValueError(f"safety={safety!r} must be at least 1: below that the iteration can leave its interval.")
    lower, upper = ell, 1.0
    triples: list[Triple] = []
    for step in range(steps):
        a, b, c = quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            ends = evaluate([(a, b, c)], np.array([lower, upper]))
            scale = 2.0 / float(ends.sum())
            a, b, c = a * scale, b * scale, c * scale
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        triples.append((a, b, c))
        lower = float(evaluate([(a, b, c)], lower))
        upper = 2.0 - lower
    return tuple(triples)


if __name__ == "__main__":
    for ell, frozen in SCHEDULES.items():
        print(f"{ell:.0e}:")
        for triple in schedule(ell, len(frozen), cushion=CUSHION, safety=SAFETY):
            print(f"    {triple},")
