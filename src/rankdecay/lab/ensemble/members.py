"""Members of an ensemble: what each run is, what all of them share, and the state from which one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from rankdecay.decay.policy import Frobenius, LowRank, OfMatrix
from rankdecay.lab.ensemble.accelerators import Accelerator, CautiousDecay
from rankdecay.lab.ensemble.control import PLAIN, Control
from rankdecay.lab.precision import check_resolved

Precision = Literal["float32", "mixed", "float64"]
STATE = ("weights", "mean", "square")  # the tensors of a `State`


@dataclass(frozen=True)
class Member:
    """One training run.

    Attributes:
        arm, seed: its name; the seed decides initial weights and batches.
        decay: of queries and keys; ``None`` for none.
        rest_decay: decoupled L2 on every other parameter (AdamW's ``weight_decay``).
        lr: learning rate.
        initial_scale: multiplies the initial matrices.
        uniform_attention: queries and keys start at zero, where their gradient is exactly zero: they stay there.
        control: how it departs from plainly applying its decay.
        accelerator: acts beside AdamW in every step; None for AdamW alone.

    Raises:
        ValueError: For an accelerator that its decay or its control would bypass.
    """

    arm: str
    seed: int
    decay: OfMatrix | None
    rest_decay: float
    lr: float = 1e-3
    initial_scale: float = 1.0
    uniform_attention: bool = False
    control: Control = PLAIN
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        """Refuse an accelerator that would not do what its name says."""
        if isinstance(self.accelerator, CautiousDecay):
            for decay in self.decays:
                if not (isinstance(decay, Frobenius) and decay.is_l2):
                    raise ValueError(
                        f"{self.arm}: cautious decay is a way to take constant L2, and not {decay.describe()}: give "
                        "W_Q and W_K constant L2, or leave the accelerator out"
                    )
        has_own_rate = self.accelerator and (
            self.accelerator.steps("query") or self.accelerator.rate("query") is not None
        )
        if has_own_rate and self.control.query_key_lr != 1:
            raise ValueError(
                f"{self.arm}: {type(self.accelerator).__name__} has a learning rate of its own for W_Q and W_K, which "
                f"query_key_lr={self.control.query_key_lr:g} would not change: give one of the two"
            )

    @property
    def low_rank(self) -> LowRank | None:
        """Low-rank decay of the member, None if it has another one or no strength."""
        return self.decay if isinstance(self.decay, LowRank) and self.decay.strength else None

    @property
    def decays(self) -> tuple[OfMatrix, ...]:
        """Decays of W_Q and W_K that have a strength, in the order in which they are applied."""
        return tuple(decay for decay in (self.decay, self.control.also) if decay is not None and decay.strength)

    @property
    def constant_l2(self) -> float:
        """Strength of AdamW's own decay of W_Q and W_K, taken before its step as the optimizer does; else 0."""
        return sum(decay.strength for decay in self.decays if isinstance(decay, Frobenius) and decay.is_l2)


@dataclass(frozen=True)
class State:
    """State of one member: everything its training needs to continue."""

    step: int
    weights: Tensor  # (parameters,)
    mean: Tensor
    square: Tensor
    memory: Tensor | None = None  # of an accelerator that has one: (rows, parameters)

    def named(self, number: int) -> dict[str, Tensor]:
        """Its tensors under their names in a checkpoint of several members, of which it is the ``number``-th."""
        named = {f"{number}.{name}": getattr(self, name) for name in STATE}
        return named if self.memory is None else named | {f"{number}.memory": self.memory}

    @classmethod
    def of(cls, step: int, tensors: Mapping[str, Tensor], number: int) -> State:
        """The state of a member from such a checkpoint."""
        weights, mean, square = (tensors[f"{number}.{name}"] for name in STATE)
        return cls(step, weights, mean, square, tensors.get(f"{number}.memory"))


@dataclass(frozen=True)
class Training:
    """Training settings that all members of an ensemble share."""

    batch_size: int = 512
    precision: Precision = "float32"
    device: str = "cpu"
    compile: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse a precision that was not resolved, which would silently train in float32."""
        check_resolved(self.precision, get_args(Precision))
