"""Stochastic rounding: a change far below the last digit of a weight still happens on average.

A bfloat16 weight has eight significant bits. A decay of 1e-5 of its size, rounded to nearest, is lost.
Rounded up or down at random, with the probability that makes the expectation exact, it is (Croci et al., *Stochastic
rounding: implementation, error analysis and applications*, Royal Society Open Science 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Distance between the seeds of what one step rounds one after another: a prime, further than :func:`step_seed` goes
#: within 999 steps.
NEXT_SEED = 1_000_000_007
#: The same of two steps, of two groups of an optimizer, and of targets of one role within a group.
_PER_STEP, _PER_GROUP, _PER_TARGET = 1_000_003, 1_009, 1_000_000_009


def step_seed(step: int, group: int, role: int = 0, target: int = 0) -> int:
    """Return the seed for the first rounding of a step: another for each step, group and role, the same after a resume.

    Args:
        step: its number.
        group: index of the group of parameters.
        role: number of the role.
        target: number of the target among those of the role, where a group has several.
    """
    return step * _PER_STEP + group * _PER_GROUP + role + target * _PER_TARGET


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Return ``x`` in a narrower dtype, rounded to one of its two neighbours with expectation exactly ``x``.

    Args:
        x: float32 values, any shape. A value that ``dtype`` can hold comes back as it is.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: source of the random numbers, on the device of ``x``.

    Returns:
        A tensor of the shape of ``x`` in ``dtype``. Values beyond its range become infinite, as with ``.to``.
    """
    near = x.to(dtype)
    error = x - near.to(x.dtype)  # exact: the two are within half a last digit of each other
    beyond = _next(near, upwards=error > 0)
    chance = error / (beyond.to(x.dtype) - near.to(x.dtype))  # 0 … 1/2
    draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.where(draw < chance, beyond, near)


def _next(value: Tensor, upwards: Tensor) -> Tensor:
    """Return the neighbour of each 16-bit float, by its bits: they count magnitudes in order, with the sign on top."""
    bits = value.view(torch.int16)
    away_from_zero = upwards == (value > 0)
    stepped = (bits + torch.where(away_from_zero, 1, -1).to(torch.int16)).view(value.dtype)
    smallest = torch.ones_like(bits).view(value.dtype)
    return torch.where(value == 0, torch.where(upwards, smallest, -smallest), stepped)
