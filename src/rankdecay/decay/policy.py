"""Decays as plain data: how strong, by which rule, of which unit. Importing this module does not import torch.

A decay is *decoupled*: it acts on the weight after the optimizer's step and never enters the loss. It takes a share of
each group of a weight (:mod:`rankdecay.linalg.threshold`):

=====================  ===============================  ================================================================
decay                  a group is                       what a step takes from it
=====================  ===============================  ================================================================
:class:`Frobenius`     the matrix, or a head            lr · strength · ‖W‖_F^(power - 1) of itself
:class:`LowRank`       a singular direction             τ of its singular value
:class:`Planes`        a rotary plane of W_Q and W_K    τ · √n of the norm of its n rows
=====================  ===============================  ================================================================

The threshold τ of the last two has one of two scales, and with it a law by which the norm falls:

==========  ==========================  ================================================================================
scale       τ (``lr_coupled``)          reading
==========  ==========================  ================================================================================
relative    lr · strength · rms(σ)      the step has Frobenius norm at most lr·strength·‖W‖_F: the norm falls as under
                                        L2, by a share of itself, and is never used up
absolute    lr · strength               the same amount whatever the size of the weight: the norm falls by a nearly
                                        constant amount, to zero in finite time
==========  ==========================  ================================================================================

Without ``lr_coupled`` the factor lr is left out, as in the published prototypes. rms(σ) = ‖W‖_F / √min(m, n); of P
planes it is ‖X‖_F / √(P·n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from operator import index
from typing import TYPE_CHECKING, Any, Literal, get_args

from rankdecay.checks import check_name, check_number
from rankdecay.rules import check_keep, get_rule, rule_names

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["relative", "absolute"]
Unit = Literal["matrix", "head"]
Scope = Literal["head", "group", "layer", "model"]

_OFF = "0 switches it off"
#: Where a user gives no ``every``: one step in min(side / 48, 16), rounded up. A decomposition costs the side of the
#: matrix to the third power and a training step its square, so that their ratio grows with the side; the divisor makes
#: it 1 % for GPT-2 on a CPU (`benchmarks/step.py`).
_SIDE_PER_STEP, _RAREST = 48, 16


def _check_truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def _make_plain(decay: Any) -> None:
    """Turn the numbers of a decay that are not Python's, as those of numpy, into such: a state holds nothing else."""
    for field in fields(decay):
        value = getattr(decay, field.name)
        if type(value) not in (int, float, bool, str, type(None)):
            plain = index(value) if field.type in ("int", "int | None") else float(value)
            object.__setattr__(decay, field.name, plain)


class _Paced:
    """Base of every decay: a strength, per unit of learning rate or per step, that may rise from 0."""

    strength: float
    warmup: int
    lr_coupled: bool

    def ramp(self, step: int) -> float:
        """Return the part of the strength that acts at a step, the first of which is 1."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def _check_pace(self) -> None:
        check_number("strength", self.strength, at_least=0, remedy=_OFF)
        check_number("warmup", self.warmup, at_least=0, whole=True, remedy="it counts steps; 0 for none")
        _check_truth("lr_coupled", self.lr_coupled)


@dataclass(frozen=True)
class Frobenius(_Paced):
    """Decay of the norm: W ← W (1 - min(lr·strength·‖W‖_F^(power - 1), cap)). No rank is lowered.

    It is the decoupled gradient step of strength·‖W‖_F^(power + 1)/(power + 1), without an SVD.

    ========  ===============================================================================================
    power     the norm falls by
    ========  ===============================================================================================
    1         a constant share of itself: decoupled L2, as in AdamW, which the optimizer itself applies
    0         a constant amount, as under an absolute low-rank decay; ``cap`` keeps it from reaching zero at once
    2         more than its share while it is large
    ========  ===============================================================================================

    Attributes:
        strength: decay per unit of learning rate (or per step, without ``lr_coupled``), ≥ 0.
        power: see the table, ≥ 0.
        cap: the largest share of the norm that one step takes, in (0, 1]; None for 1, and for no bound where the
            optimizer itself applies it (a power of 1), so that lr·strength is to be below 1.
        warmup: steps over which the strength rises from 0.
        unit: ``"matrix"`` for one norm per matrix, ``"head"`` for one per attention head.
        lr_coupled: whether it is multiplied by the learning rate.
    """

    strength: float
    power: float = 1.0
    cap: float | None = None
    warmup: int = 0
    unit: Unit = "matrix"
    lr_coupled: bool = True

    def __post_init__(self) -> None:
        self._check_pace()
        if isinstance(self.power, bool):
            raise TypeError(
                f"power={self.power!r} must be a number: 1 for L2; lr_coupled is a keyword, lr_coupled={self.power!r}."
            )
        check_number("power", self.power, at_least=0, remedy="1 is L2, 0 a constant amount per step")
        if self.cap is not None:
            check_number("cap", self.cap, above=0, at_most=1, remedy="the largest share of the norm that a step takes")
        check_name("unit", self.unit, get_args(Unit))
        _make_plain(self)

    @property
    def is_l2(self) -> bool:
        """Whether it is AdamW's own decay, which an optimizer may apply."""
        return self.power == 1 and self.cap is None and not self.warmup and self.lr_coupled

    @property
    def needs_norm(self) -> bool:
        """Whether a step depends on the norm; otherwise every entry can be decayed by itself."""
        return self.power != 1

    def describe(self) -> str:
        """Return the decay in a few words."""
        words = [f"L2 {self.strength:g}" if self.power == 1 else f"norm^{self.power:g} {self.strength:g}"]
        words += [] if self.lr_coupled else ["per step"]
        words += [] if self.cap is None else [f"at most {self.cap:g} of the norm"]
        words += ["per head"] if self.unit == "head" and self.needs_norm else []
        words += [f"warm-up {self.warmup} steps"] if self.warmup else []
        return ", ".join(words) if len(words) > 2 else " ".join(words)


@dataclass(frozen=True)
class LowRank(_Paced):
    """Decoupled low-rank decay: takes the same amount from every singular value, so that small ones vanish.

    Attributes:
        strength: decay per unit of learning rate (or per step, without ``lr_coupled``), ≥ 0.
        rule: ``"prox"`` soft threshold, exact zeros; ``"smooth"`` W (WᵀW + ε²)^(−1/2), never crosses zero;
            ``"polar"`` the subgradient UVᵀ; ``"newton_schulz"`` the published prototypes' five cubic steps; or any
            other that is registered (:mod:`rankdecay.rules`).
        scale: ``"relative"`` or ``"absolute"``: see the module's table.
        unit: ``"matrix"`` for one spectrum per matrix, ``"head"`` for one per attention head. On untrained weights a
            step per head is nearly radial: the singular values of a head are then much alike.
        every: apply k·τ every k steps: equal to k steps for ``"prox"`` with an absolute scale, while no gradient comes
            between; first order for the others. None for a number that follows from the shapes, :meth:`interval`.
        lr_coupled: whether τ is multiplied by the learning rate.
        smoothing: for ``"smooth"``: ε = max(τ, smoothing·‖W‖_F).
        keep: the k largest singular values of each matrix lose nothing: rank k without shrinking what stays. For
            ``"prox"`` and ``"smooth"``; it needs a decomposition, for which a GPU waits.
        preserve_norm: rescale every matrix to the Frobenius norm it had, so that the spectrum alone changes.
        warmup: steps over which the strength rises from 0.
    """

    strength: float
    rule: str = "prox"
    scale: Scale = "relative"
    unit: Unit = "matrix"
    every: int | None = None
    lr_coupled: bool = True
    smoothing: float = 0.0
    keep: int = 0
    preserve_norm: bool = False
    warmup: int = 0

    def __post_init__(self) -> None:
        self._check_pace()
        check_number("smoothing", self.smoothing, at_least=0, remedy=_OFF)
        check_name("rule", self.rule, rule_names())
        check_name("scale", self.scale, get_args(Scale))
        check_name("unit", self.unit, get_args(Unit))
        if self.every is not None:
            check_number("every", self.every, at_least=1, whole=True, remedy="it counts steps; None chooses by shape")
        check_number("keep", self.keep, at_least=0, whole=True, remedy="it counts singular values; 0 spares none")
        check_keep(self.rule, self.keep)
        _check_truth("preserve_norm", self.preserve_norm)
        _make_plain(self)

    def interval(self, side: int) -> int:
        """Return after how many steps a decay is applied: ``every``, or what keeps its cost near 1 % of a step.

        Args:
            side: the smaller side of the matrix, or of a head with ``unit="head"``.
        """
        return min(_RAREST, math.ceil(side / _SIDE_PER_STEP)) if self.every is None else self.every

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`rankdecay.linalg.shrink`, whose ``tau`` is then Σ lr · strength."""
        return {
            "relative": self.scale == "relative",
            "smoothing": self.smoothing,
            "keep": self.keep,
            "preserve_norm": self.preserve_norm,
        }

    def threshold(self, weight: Tensor, lr: Tensor | float) -> Tensor:
        """Return τ of one step for each matrix of ``weight``, after the warm-up.

        Args:
            weight: ``(..., m, n)``.
            lr: learning rate, broadcastable to the leading dimensions.

        Returns:
            ``(...)``, in the dtype of ``weight``.
        """
        return self.tau(weight, self.strength * (lr if self.lr_coupled else 1.0))

    def tau(self, weight: Tensor, amount: Tensor | float) -> Tensor:
        """Return τ for each matrix of ``weight``, given Σ lr · strength of the steps to decay for."""
        from rankdecay.linalg.threshold import absolute_threshold  # imports torch

        norm = (weight if weight.dtype.itemsize > 2 else weight.float()).norm(dim=(-2, -1))  # 16 bits overflow
        amount = norm.new_ones(norm.shape) * amount
        if self.scale == "relative":
            amount = absolute_threshold(amount, norm, min(weight.shape[-2:]))
        return amount.to(weight.dtype)

    def describe(self) -> str:
        """Return the decay in a few words."""
        words = [self.rule.replace("_", "-"), f"{self.strength:g}", self.scale]
        words += [] if self.lr_coupled else ["per step"]
        words += [f"ε = {self.smoothing:g}·‖W‖_F"] if self.smoothing and get_rule(self.rule).smoothing else []
        words += ["per head"] if self.unit == "head" else []
        words += [f"{self.keep} largest kept"] if self.keep else []
        words += ["norm preserved"] if self.preserve_norm else []
        words += [f"every {self.every} steps"] if (self.every or 1) > 1 else []
        words += [f"warm-up {self.warmup} steps"] if self.warmup else []
        return "low-rank " + ", ".join(words)


@dataclass(frozen=True)
class Planes(_Paced):
    """Decoupled decay of rotary planes, a group lasso: planes vanish, and an ordinary checkpoint can leave them out.

    Positions turn two coordinates of a head by one angle, rows j and j + d/2 of its W_Q and W_K (2j and 2j + 1 where
    planes are interleaved). All rows of plane j in a scope, those of the biases of queries and keys with them, lose the
    same share: X_j ← X_j · max(0, 1 - τ√n / ‖X_j‖_F), with n the number of rows, an entry of a bias being one. Rows
    that positions do not turn, of heads that are turned in part, have no decay. It is for ``query_key``.

    Under QK-norm a plane can be left out only if it is zero in queries and keys alike, which is what this makes of it;
    the norms' gains stay as they are. (A LayerNorm in that place subtracts a mean that a plane of zeros changes, so
    there nothing can be left out.)

    Attributes:
        strength: decay per unit of learning rate (or per step, without ``lr_coupled``), ≥ 0. A parameter's own learning
            rate counts where groups have several.
        keep: this many planes of each scope, the largest, lose nothing; of equals the first. None for 0.
        scope: what a plane belongs to. ``"model"``: all layers that share a rotary configuration, so that the same
            planes vanish everywhere, as the one ``head_dim`` of an ordinary checkpoint needs it; ``"layer"``;
            ``"group"``: a key head with the query heads it serves; ``"head"``: a query head with its key head, or where
            a key head serves several, each by itself.
        scale: ``"relative"`` or ``"absolute"``: see the module's table.
        warmup: steps over which the strength rises from 0.
        lr_coupled: whether τ is multiplied by the learning rate.
    """

    strength: float
    keep: int | None = None
    scope: Scope = "model"
    scale: Scale = "relative"
    warmup: int = 0
    lr_coupled: bool = True

    def __post_init__(self) -> None:
        self._check_pace()
        if self.keep is not None:
            check_number("keep", self.keep, at_least=0, whole=True, remedy="it counts planes; None spares none")
        check_name("scope", self.scope, get_args(Scope))
        check_name("scale", self.scale, get_args(Scale))
        _make_plain(self)

    def describe(self) -> str:
        """Return the decay in a few words."""
        scopes = {"head": "per head", "group": "per key head", "layer": "per layer", "model": "the same in all layers"}
        words = [f"{self.strength:g}", self.scale]
        words += [] if self.lr_coupled else ["per step"]
        words += [scopes[self.scope]]
        words += [f"{self.keep} largest kept"] if self.keep else []
        words += [f"warm-up {self.warmup} steps"] if self.warmup else []
        return "planes " + ", ".join(words)


#: Decays that act on one matrix, or head, by itself.
OfMatrix = Frobenius | LowRank
Decay = Frobenius | LowRank | Planes


def unit_of(decay: Decay | None) -> str:
    """Return what Σ lr · strength is counted in: amounts of different units do not add.

    Returns:
        "" where a step takes a share of the weight, "absolute" where it takes the same whatever the weight is, else
        the power of the norm that it grows with.
    """
    relative = decay is None or (not isinstance(decay, Frobenius) and decay.scale == "relative")
    power = decay.power if isinstance(decay, Frobenius) else float(relative)
    return {1.0: "", 0.0: "absolute"}.get(power, f"power_{power:g}")


def takes_a_share(decay: Decay) -> bool:
    """Return whether lr · strength is a share of what a weight is, of which nothing is left at 1."""
    if isinstance(decay, Frobenius):
        return not decay.needs_norm and not decay.cap
    kept = isinstance(decay, LowRank) and decay.preserve_norm
    return decay.scale == "relative" and not decay.keep and not kept
