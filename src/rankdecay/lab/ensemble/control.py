r"""Controls of a decay of W_Q and W_K: its parts, a held norm, and its schedule.

A decay step D on a weight W has a radial part along W, which a scale-invariant network cannot see in its function,
and a tangential part, which turns W:

.. math::  R = \frac{\langle D, W\rangle}{\|W\|_F^2} W , \qquad T = D - R .

``part`` applies one of them alone, or turns T round, so that the norm falls as before while the rank is raised.
``norm`` holds every matrix on a sphere, so that two arms have the same norm and angular step, and differ in rank alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rankdecay.lab.ensemble.outcome import MEMORISED, first_step
from rankdecay.linalg.threshold import leave, radial
from rankdecay.spectrum import spectrum

Part = Literal["whole", "radial", "tangential", "reversed"]
Schedule = Literal["always", "after_memorising", "until_generalised"]


@dataclass(frozen=True)
class Control:
    """Changes to how a member applies its decay; the defaults change nothing.

    Attributes:
        part: of each decay step that is applied (module docstring).
        norm: hold the Frobenius norm of every query and key matrix here, from the first step on.
        query_key_lr: multiplies the learning rate of W_Q and W_K, and with it their decay.
        blocks: the low-rank decay takes in W_V, W_O and the MLP as well, in place of their L2.
        schedule: when the decay acts.
        target_rank: a matrix (a head, with ``unit="head"``) is left alone while its stable rank is not above this.
        truncate_to: keep this many singular values of every query and key matrix, once, on memorising.
    """

    part: Part = "whole"
    norm: float | None = None
    query_key_lr: float = 1.0
    blocks: bool = False
    schedule: Schedule = "always"
    target_rank: float | None = None
    truncate_to: int | None = None


PLAIN = Control()


def memorised(records: Sequence[dict[str, Any]]) -> bool:
    """Whether a member has fitted its training set at any evaluation so far."""
    return first_step(records, "train_accuracy", above=MEMORISED) is not None


def decay_acts(schedule: Schedule, records: Sequence[dict[str, Any]], generalised: bool) -> bool:
    """Whether a schedule lets the decay act, given a member's evaluations so far; it changes at most once."""
    if schedule == "after_memorising":
        return memorised(records)
    return schedule == "always" or not generalised


def part_of_step(weight: Tensor, decayed: Tensor, part: Part) -> Tensor:
    """The weight after one ``part`` of the step from ``weight`` to ``decayed``, both ``(..., m, n)``."""
    if part == "whole":
        return decayed
    after_radial = leave(weight, radial(weight, decayed))
    if part == "radial":
        return after_radial
    return decayed + weight - after_radial if part == "tangential" else 2 * after_radial - decayed


def above_rank(weight: Tensor, target: float | Tensor) -> Tensor:
    """Whether the stable rank of each ``(..., m, n)`` matrix is above its target."""
    return spectrum(weight).stable_rank > target


def truncated(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of rank ``rank`` of each ``(..., m, n)`` matrix."""
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    return (left[..., :rank] * sigma[..., None, :rank]) @ right[..., :rank, :]
