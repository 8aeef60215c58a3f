"""Rows that one call steps or decays: parameters that AdamW steps alike, members whose decays differ in strength."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankdecay.decay.policy import LowRank, OfMatrix
from rankdecay.lab.ensemble.control import Part, part_of_step
from rankdecay.linalg import power_step, shrink


@dataclass(frozen=True)
class Rows:
    """Parameters that AdamW steps alike: one list entry per member and name, each contiguous."""

    lr: float
    weight_decay: float
    places: list[tuple[int, str]]  # index of the member, name of the parameter
    weights: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]  # scalars in float32, of their member: steps made

    def step(self, grads: dict[str, Tensor], betas: tuple[float, float], eps: float) -> None:
        """One AdamW step with its decay, in one pass over memory; ``grads`` are ``(members, ...)`` by name."""
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage] - what AdamW(fused=True) calls
            self.weights,
            [grads[name][member] for member, name in self.places],
            self.means,
            self.squares,
            [],
            self.steps,
            lr=self.lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=self.weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


@dataclass(frozen=True)
class Group:
    """Members whose decays differ in strength alone: one call of `shrink` serves them."""

    policy: OfMatrix
    part: Part
    blocks: bool
    rows: list[int]
    strength: Tensor  # (rows, 1)

    def every(self, side: int) -> int:
        """After how many steps matrices, or heads, of a smaller side are decayed."""
        return self.policy.interval(side) if isinstance(self.policy, LowRank) else 1

    def decayed(self, weight: Tensor, amount: Tensor) -> Tensor:
        """``weight`` (rows, ..., m, n) after a decay of Σ lr · strength = ``amount`` (rows, ...)."""
        policy = self.policy
        if isinstance(policy, LowRank):
            after = shrink(weight, amount, policy.rule, **policy.options)
        else:
            after = power_step(weight, amount, policy.power, policy.cap or 1.0)
        return part_of_step(weight, after, self.part)
