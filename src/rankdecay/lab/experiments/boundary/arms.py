"""The arms of a sweep: every decay of W_Q and W_K that can be compared, and the controls that take it apart.

An arm is a function from a *strength*, its axis in the phase diagram, to a treatment. What the strength is differs: L2
and low-rank strengths are per unit of learning rate, the prototype's is taken per step, a held norm is a norm. To add
an arm, add an entry to `arms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankdecay.decay.policy import Decay, Frobenius, LowRank
from rankdecay.lab.ensemble.control import PLAIN, Control
from rankdecay.rules import get_rule

if TYPE_CHECKING:
    from rankdecay.lab.experiments.boundary.experiment import Boundary


@dataclass(frozen=True)
class Treatment:
    """What one arm does at one strength.

    Attributes:
        decay: of queries and keys.
        control: how a member departs from plainly applying it.
        uniform_attention: queries and keys held at zero.
        qk_norm: whether queries and keys are normalised.
        rest_decay: L2 on everything else, where the arm sets it itself.
        stays: train to the end of the budget even after generalising.
    """

    decay: Decay | None = None
    control: Control = PLAIN
    uniform_attention: bool = False
    qk_norm: bool = True
    rest_decay: float | None = None
    stays: bool = False


@dataclass(frozen=True)
class Arm:
    """One way to treat W_Q and W_K, over a range of strengths.

    Attributes:
        name: of the arm.
        description: what it does, in a sentence.
        treat: from a strength to a treatment.
        strengths: the default grid; empty for an arm without a strength.
        controls_for: what could explain a success of low-rank decay away and is held fixed or isolated here.
        limit: the largest strength that makes sense.
        whole: strengths are whole numbers.
    """

    name: str
    description: str
    treat: Callable[[float], Treatment]
    strengths: tuple[float, ...] = ()
    controls_for: str | None = None
    limit: float = float("inf")
    whole: bool = False


L2 = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LOW_RANK = (1.25, 2.5, 5.0, 10.0)
CONTROL = (2.5, 5.0, 10.0)
PROTOTYPE = (0.0025, 0.005, 0.01, 0.02)
PUBLISHED = ("paper_a1", "paper_s5", "paper_s6")  # the forms the paper writes its step in, for its own grid
PAPER = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2)
NORMS = (0.1, 0.2, 0.4, 0.8)
RANKS = (1.0, 2.0, 4.0, 8.0)


def arms(settings: Boundary) -> dict[str, Arm]:
    """Every arm there is, by name.

    Args:
        settings: name the rule, smoothing and interval of the low-rank decays, and the strength where it is no axis.
    """
    paper = settings.preset == "paper"
    l2_limit = 1 / settings.lr

    def low_rank(strength: float, rule: str = settings.rule, **options: object) -> LowRank:
        smoothing = settings.smoothing if get_rule(rule).smoothing else 0.0
        return LowRank(strength, rule, "absolute", every=settings.every, smoothing=smoothing, **options)  # type: ignore

    def prototype(strength: float) -> LowRank:
        return LowRank(strength, "newton_schulz", "absolute", lr_coupled=False)

    def controlled(**options: object) -> Callable[[float], Treatment]:
        return lambda strength: Treatment(low_rank(strength), Control(**options))  # type: ignore[arg-type]

    def target(unit: str) -> Callable[[float], Treatment]:
        return lambda rank: Treatment(low_rank(settings.strength, unit=unit), Control(target_rank=rank))

    rule = f"the {settings.rule} rule"
    every = [
        Arm("none", "No decay of W_Q and W_K.", lambda _: Treatment(), (), "the rest of the model's decay alone"),
        Arm("l2", "L2 on W_Q and W_K alone.", lambda s: Treatment(Frobenius(s)), L2, "decay of any kind", l2_limit),
        Arm(
            "l2_all",
            "L2 of one strength on every matrix, as the paper and the prototype compare with.",
            lambda s: Treatment(Frobenius(s), rest_decay=s),
            PAPER if paper else (0.3, 1.0, 3.0, 5.0),
            "decay of any kind, everywhere",
            l2_limit,
        ),
        Arm(
            "low_rank",
            "The exact soft threshold of the singular values, lr × strength per step.",
            lambda s: Treatment(low_rank(s, "prox")),
            LOW_RANK,
        ),
        Arm(
            "smooth",
            f"Smoothed low-rank decay (ε = {settings.smoothing:g}·‖W‖_F), lr × strength per step.",
            lambda s: Treatment(low_rank(s, "smooth")),
            LOW_RANK,
        ),
        Arm(
            "prototype",
            "The published prototype: five cubic Newton–Schulz steps, the strength itself taken per step.",
            lambda s: Treatment(prototype(s)),
            PAPER if settings.preset == "prototype" else PROTOTYPE,
        ),
        Arm(
            "paper_a1",
            "The paper's Algorithm 1 on attention and MLP matrices: λ·NS(W) per step.",
            lambda s: Treatment(prototype(s), Control(blocks=True)),
            PAPER,
        ),
        Arm(
            "paper_s5",
            "The paper's section 5 on attention and MLP matrices: ηλ·‖W‖/‖polar‖·polar(W).",
            lambda s: Treatment(LowRank(s, "polar", "relative"), Control(blocks=True)),
            PAPER,
        ),
        Arm(
            "paper_s6",
            "The paper's section 6.3 on attention and MLP matrices: ηλ·polar(W).",
            lambda s: Treatment(LowRank(s, "polar", "absolute"), Control(blocks=True)),
            PAPER,
        ),
        Arm(
            "uniform_attention",
            "W_Q and W_K held at zero: every position attends equally to all.",
            lambda _: Treatment(uniform_attention=True),
            (),
            "attention being switched off",
        ),
        Arm(
            "no_qk_norm",
            "L2 on W_Q and W_K of a network without QK-norm, where it is a nuclear norm of their product.",
            lambda s: Treatment(Frobenius(s), qk_norm=False),
            (1.0, 3.0, 10.0, 30.0),
            "QK-norm, without which L2 lowers rank by itself",
            l2_limit,
        ),
        Arm(
            "radial_only",
            f"Only the part of {rule}'s step along W: the norm falls as under low-rank decay, nothing is turned.",
            controlled(part="radial"),
            (*CONTROL, 20.0),
            "the falling norm, and the angular step that grows with it",
        ),
        Arm(
            "tangential_only",
            f"Only the part of {rule}'s step across W: rank is lost, the norm is not decayed.",
            controlled(part="tangential"),
            (*CONTROL, 20.0),
            "losing rank without losing norm",
        ),
        Arm(
            "raise_rank",
            f"{rule.capitalize()}'s step with its tangential part turned round: the norm falls, the rank rises.",
            controlled(part="reversed"),
            CONTROL,
            "the direction of the change of rank",
        ),
        Arm(
            "low_rank_all",
            f"{rule.capitalize()} on W_V, W_O and the MLP too, in place of their L2.",
            controlled(blocks=True),
            (0.6, 1.25, 2.5),
            "which matrices lose rank",
        ),
        Arm(
            "sphere",
            "No decay; every query and key matrix held at the Frobenius norm on the axis.",
            lambda norm: Treatment(control=Control(norm=norm)),
            NORMS,
            "a small norm and the large angular step it brings, without loss of rank",
        ),
        Arm(
            "sphere_low_rank",
            f"The same norms held, and {rule} at {settings.strength:g}: rank is all that differs from sphere.",
            lambda norm: Treatment(low_rank(settings.strength), Control(norm=norm)),
            NORMS,
            "rank at equal norm and equal angular step",
        ),
        Arm(
            "fast_query_key",
            "No decay; a larger learning rate for W_Q and W_K, by the factor on the axis.",
            lambda factor: Treatment(control=Control(query_key_lr=factor)),
            (3.0, 10.0, 30.0),
            "the angular step alone",
        ),
        Arm(
            "truncate",
            "No decay; once the training set is memorised, W_Q and W_K are cut to the rank on the axis.",
            lambda rank: Treatment(control=Control(truncate_to=int(rank))),
            RANKS,
            "low rank reached at once instead of by decay",
            settings.width,
            whole=True,
        ),
        Arm(
            "after_memorising",
            f"{rule.capitalize()}, switched on once the training set is memorised.",
            controlled(schedule="after_memorising"),
            CONTROL,
            "decay during memorisation",
        ),
        Arm(
            "kept_on",
            f"{rule.capitalize()} to the end of the budget, also after generalising.",
            lambda s: Treatment(low_rank(s), stays=True),
            CONTROL,
            "what decay does after generalising",
        ),
        Arm(
            "until_generalised",
            f"{rule.capitalize()}, switched off on generalising, trained on to the end of the budget.",
            lambda s: Treatment(low_rank(s), Control(schedule="until_generalised"), stays=True),
            CONTROL,
            "decay after generalising",
        ),
        Arm(
            "target_rank",
            f"{rule.capitalize()} at {settings.strength:g}, on a matrix only while its stable rank is above the axis.",
            target("matrix"),
            (1.5, 3.0, 6.0, 12.0),
            "more rank lost than the task can spare",
        ),
        Arm(
            "target_rank_head",
            f"{rule.capitalize()} per head at {settings.strength:g}, only while its stable rank is above the axis.",
            target("head"),
            (1.5, 3.0, 6.0),
            "the same per head",
        ),
    ]
    return {arm.name: arm for arm in every}


def wider(arm: Arm, strengths: Sequence[float], edge: str) -> float | None:
    """The next strength beyond an edge of a grid, in its own ratio; None where there is none to try.

    Args:
        arm: whose strengths they are.
        strengths: tried so far.
        edge: ``"lowest"`` or ``"highest"``.
    """
    tried = sorted(strengths)
    if edge == "highest":
        following = tried[-1] * (tried[-1] / tried[-2] if len(tried) > 1 else 2.0)
    else:
        following = tried[0] / (tried[1] / tried[0] if len(tried) > 1 else 2.0)
    following = float(round(following) if arm.whole else f"{following:.3g}")
    return following if 0 < following < arm.limit and following not in tried else None
