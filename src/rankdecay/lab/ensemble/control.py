r"""Controls of a decay of W_Q and W_K: its parts, a held norm, and its schedule.

A decay step D on a weight W has a radial part along W, which a scale-invariant network cannot see in its function,
and a tangential part, which turns W:

.. math::  R = \frac{\langle D, W\rangle}{\|W\|_F^2} W , \qquad T = D - R .

``part`` applies one of them alone, or turns T round, so that the norm falls as before while the rank is raised.
``norm`` holds every matrix on a sphere, so that two arms have the same norm and angular step, and differ in rank alone;
the sphere may shrink, and ``yoked`` gives every matrix the norm that it had in a run of another seed: the schedule of
the norm without anything else of that run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rankdecay.decay.policy import OfMatrix
from rankdecay.lab.ensemble.outcome import MEMORISED, first_step
from rankdecay.linalg.threshold import radial, shrink_by
from rankdecay.spectrum import spectrum

Part = Literal["whole", "radial", "tangential", "reversed"]
Schedule = Literal["always", "after_memorising", "until_generalised"]
Fall = Literal["geometric", "linear"]
YOKED_SEED = 10_000  # added to a member's seed for the run whose norms it gets, which no arm is trained on


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
        norm_from: begin with this norm, from which the sphere shrinks (or grows) to ``norm``.
        norm_steps: the steps in which it does.
        norm_fall: by the same factor in every step, or by the same amount.
        yoked: at every step each matrix is given the norm that the same matrix had at that step of a run under this
            decay, with another seed; the member has no decay of its own.
        also: a second decay of queries and keys, after the first.
        sharpen: steps over which the scores of attention rise from 0, uniform attention, to what they are.
    """

    part: Part = "whole"
    norm: float | None = None
    query_key_lr: float = 1.0
    blocks: bool = False
    schedule: Schedule = "always"
    target_rank: float | None = None
    truncate_to: int | None = None
    norm_from: float | None = None
    norm_steps: int = 0
    norm_fall: Fall = "geometric"
    yoked: OfMatrix | None = None
    also: OfMatrix | None = None
    sharpen: int = 0

    def __post_init__(self) -> None:
        """Refuse a sphere that does not say where it begins and ends."""
        if (self.norm_from is None) != (self.norm_steps == 0) or (self.norm_from is not None and self.norm is None):
            raise ValueError(
                f"norm_from={self.norm_from!r}, norm_steps={self.norm_steps} and norm={self.norm!r} make no path of "
                "the norm: give all three, or norm alone"
            )
        if self.norm_fall not in get_args(Fall):
            raise ValueError(f"norm_fall={self.norm_fall!r} must be one of {get_args(Fall)}")
        if self.norm is not None and self.yoked is not None:
            raise ValueError("norm and yoked both say what the norm is: give one of them")

    @property
    def holds_norm(self) -> bool:
        """Whether it says what the norm of every matrix is."""
        return self.norm is not None or self.yoked is not None

    @property
    def switches(self) -> bool:
        """Whether it waits for something that may never happen."""
        return self.schedule != "always" or self.truncate_to is not None

    def radius(self, step: int) -> float | None:
        """The norm of every matrix after a step; None where it is free, or another run's."""
        if self.norm is None or self.norm_from is None:
            return self.norm
        done = min(step / self.norm_steps, 1.0)
        if self.norm_fall == "linear":
            return self.norm_from + done * (self.norm - self.norm_from)
        return self.norm_from * (self.norm / self.norm_from) ** done

    def sharpness(self, step: int) -> float:
        """Factor on the scores of attention at a step."""
        return min(step / self.sharpen, 1.0) if self.sharpen else 1.0


PLAIN = Control()


def memorised(records: Sequence[dict[str, Any]]) -> bool:
    """Whether a member has fitted its training set at any evaluation so far."""
    return first_step(records, "train_accuracy", above=MEMORISED) is not None


def decay_acts(schedule: Schedule, records: Sequence[dict[str, Any]], generalised: bool) -> bool:
    """Whether a schedule lets the decay act, given a member's evaluations so far; it changes at most once."""
    if schedule == "after_memorising":
        return memorised(records)
    return schedule == "always" or not generalised


def acted_at(control: Control, records: Sequence[dict[str, Any]], held: int | None) -> int | None:
    """The evaluated step at which a control that waits switched the decay, or truncated; None if it never did.

    Args:
        control: one that `Control.switches`.
        records: of the member's evaluations.
        held: the step from which it holds the accuracy that counts as generalised; it is known an evaluation later.
    """
    if control.schedule != "until_generalised":
        return first_step(records, "train_accuracy", above=MEMORISED)
    return None if held is None else next((r["step"] for r in records if r["step"] > held), None)


def part_of_step(weight: Tensor, decayed: Tensor, part: Part) -> Tensor:
    """The weight after one ``part`` of the step from ``weight`` to ``decayed``, both ``(..., m, n)``."""
    if part == "whole":
        return decayed
    after_radial = shrink_by(weight, radial(weight, decayed))
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
