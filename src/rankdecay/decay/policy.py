"""Decays as plain data: how strong, by which rule, of which unit. Importing this module does not import torch.

A decay is *decoupled*: it acts on the weight after the optimizer's step and never enters the loss. Its size is the
threshold τ, how much a rule may take from each singular value in one step:

==========  ==========================  =====================================================================
scale       τ (``lr_coupled``)          reading
==========  ==========================  =====================================================================
relative    lr · strength · rms(σ)      the step has Frobenius norm at most lr·strength·‖W‖_F, that of L2
absolute    lr · strength               the same amount whatever the size of the weight
==========  ==========================  =====================================================================

Without ``lr_coupled`` the factor lr is left out, as in the published prototypes. rms(σ) = ‖W‖_F / √min(m, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from rankdecay.checks import check_name, check_number
from rankdecay.rules import get_rule, rule_names

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["relative", "absolute"]
Unit = Literal["matrix", "head"]


_OFF = "0 switches it off"


def _check_truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


@dataclass(frozen=True)
class Frobenius:
    """Decoupled L2 decay, as in AdamW: W ← (1 − lr·strength) W. Multiplies every singular value by the same number.

    Attributes:
        strength: decay per unit of learning rate (or per step, without ``lr_coupled``), ≥ 0.
        lr_coupled: whether it is multiplied by the learning rate.
    """

    strength: float
    lr_coupled: bool = True

    def __post_init__(self) -> None:
        check_number("strength", self.strength, at_least=0, remedy=_OFF)
        _check_truth("lr_coupled", self.lr_coupled)

    def describe(self) -> str:
        """Return the decay in a few words."""
        return f"L2 {self.strength:g}" + ("" if self.lr_coupled else " per step")


@dataclass(frozen=True)
class LowRank:
    """Decoupled low-rank decay: takes the same amount from every singular value, so that small ones vanish.

    Attributes:
        strength: decay per unit of learning rate (or per step, without ``lr_coupled``), ≥ 0.
        rule: ``"prox"`` soft threshold, exact zeros; ``"smooth"`` W (WᵀW + ε²)^(−1/2), never crosses zero;
            ``"polar"`` the subgradient UVᵀ; ``"newton_schulz"`` the published prototypes' five cubic steps; or any
            other that is registered (:mod:`rankdecay.rules`).
        scale: ``"relative"`` or ``"absolute"``: see the module's table.
        unit: ``"matrix"`` for one spectrum per matrix, ``"head"`` for one per attention head.
        every: apply k·τ every k steps; exact for ``"prox"`` between gradient steps, first order for the others.
        lr_coupled: whether τ is multiplied by the learning rate.
        smoothing: for ``"smooth"``: ε = max(τ, smoothing·‖W‖_F).
    """

    strength: float
    rule: str = "prox"
    scale: Scale = "relative"
    unit: Unit = "matrix"
    every: int = 1
    lr_coupled: bool = True
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("strength", self.strength, at_least=0, remedy=_OFF)
        _check_truth("lr_coupled", self.lr_coupled)
        check_number("smoothing", self.smoothing, at_least=0, remedy=_OFF)
        check_name("rule", self.rule, rule_names())
        check_name("scale", self.scale, get_args(Scale))
        check_name("unit", self.unit, get_args(Unit))
        check_number("every", self.every, at_least=1, whole=True, remedy="it counts steps")

    def tau(self, amount: Tensor | float, norm: Tensor, rank: Tensor | int) -> Tensor:
        """Return τ, what the rule may take from each singular value: the one place where it is defined.

        Args:
            amount: Σ lr · strength of the steps to decay for (without ``lr_coupled`` Σ strength); broadcastable.
            norm: ‖W‖_F of each matrix, (...).
            rank: min(m, n).

        Returns:
            ``(...)``, in the dtype of ``norm``.
        """
        amount = norm.new_ones(norm.shape) * amount
        return amount if self.scale == "absolute" else amount * norm / rank**0.5

    def threshold(self, weight: Tensor, lr: Tensor | float, strength: Tensor | float | None = None) -> Tensor:
        """Return τ of one step for each matrix of ``weight``.

        Args:
            weight: ``(..., m, n)``.
            lr: learning rate, broadcastable to the leading dimensions.
            strength: overrides ``self.strength``, broadcastable to the leading dimensions: one call then serves
                ensemble members that differ in strength alone.

        Returns:
            ``(...)``, in the dtype of ``weight``.
        """
        amount = (self.strength if strength is None else strength) * (lr if self.lr_coupled else 1.0)
        return self.tau(amount, weight.norm(dim=(-2, -1)), min(weight.shape[-2:]))

    def describe(self) -> str:
        """Return the decay in a few words."""
        words = [self.rule.replace("_", "-"), f"{self.strength:g}", self.scale]
        words += [] if self.lr_coupled else ["per step"]
        words += [f"ε = {self.smoothing:g}·‖W‖_F"] if self.smoothing and get_rule(self.rule).smoothing else []
        words += ["per head"] if self.unit == "head" else []
        words += [f"every {self.every} steps"] if self.every > 1 else []
        return "low-rank " + ", ".join(words)


Decay = Frobenius | LowRank
