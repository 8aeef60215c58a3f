"""The arms of a sweep: every decay of W_Q and W_K that can be compared, and the controls that take it apart.

An arm is a function from a *strength*, its axis in the phase diagram, to a treatment. What the strength is differs: L2
and low-rank strengths are per unit of learning rate, the prototype's is taken per step, a held norm is a norm. To add
an arm, add an entry to one of the functions of `ARMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rankdecay.decay.policy import Frobenius, LowRank, OfMatrix
from rankdecay.lab.ensemble.accelerators import (
    Accelerator,
    CautiousDecay,
    GrokfastEMA,
    GrokfastMA,
    HiddenRate,
    Muon,
    OrthoGrad,
    StableMax,
)
from rankdecay.lab.ensemble.control import PLAIN, Control
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.experiment import Arm
from rankdecay.lab.experiments.boundary.settings import PRESETS, Boundary
from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.settings import given_strengths
from rankdecay.rules import get_rule


@dataclass(frozen=True)
class BoundaryTreatment:
    """Treatment of a run: an arm at one strength.

    Attributes:
        decay: of queries and keys.
        control: how a member departs from plainly applying it.
        uniform_attention: queries and keys held at zero.
        qk_norm: whether queries and keys are normalised.
        rest_decay: L2 on everything else, where the arm sets it itself.
        stays: train to the end of the budget even after generalising.
        lr: learning rate, where the arm sets it itself.
        accelerator: acts beside AdamW in every step.
    """

    decay: OfMatrix | None = None
    control: Control = PLAIN
    uniform_attention: bool = False
    qk_norm: bool = True
    rest_decay: float | None = None
    stays: bool = False
    lr: float | None = None
    accelerator: Accelerator | None = None


class Axis(NamedTuple):
    """Meaning of the strengths of an arm.

    Attributes:
        treat: from a strength to a treatment.
        limit: the largest strength that makes sense.
        whole: strengths are whole numbers.
    """

    treat: Callable[[float], BoundaryTreatment]
    limit: float = float("inf")
    whole: bool = False


L2 = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LOW_RANK = (1.25, 2.5, 5.0, 10.0)
CONTROL = (2.5, 5.0, 10.0)
PROTOTYPE = (0.0025, 0.005, 0.01, 0.02)
PUBLISHED = ("paper_a1", "paper_s5", "paper_s6")  # the forms the paper writes its step in, for its own grid
PAPER = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2)
NORMS = (0.1, 0.2, 0.4, 0.8)
AMOUNTS = (10.0, 20.0, 40.0, 80.0)  # of the norm: low-rank decay at 5 takes some 5 √width of it
CAP = 0.1  # the largest share of a norm that one step of `radial` and `power_2` takes
RANKS = (1.0, 2.0, 4.0, 8.0)
RATES = (0.001, 0.002, 0.004, 0.008)  # of AdamW


@dataclass(frozen=True)
class _Treatments:
    """Treatments that several arms are made of, under the settings of one sweep."""

    settings: Boundary

    @property
    def l2_limit(self) -> float:
        """Strength of L2 at which a step would leave nothing."""
        return 1 / self.settings.lr

    @property
    def lr_limit(self) -> float:
        """Learning rate at which the decay of the rest would leave nothing in a step."""
        largest = max(self.settings.rest_decays, default=0.0)
        return 1 / largest if largest else float("inf")

    def low_rank(self, strength: float, rule: str | None = None, **options: object) -> LowRank:
        """Low-rank decay with the smoothing and interval of the settings, by their rule or another."""
        rule = rule or self.settings.rule
        smoothing = self.settings.smoothing if get_rule(rule).smoothing else 0.0
        every = self.settings.every
        return LowRank(strength, rule, "absolute", every=every, smoothing=smoothing, **options)  # type: ignore

    def controlled(self, **options: object) -> Callable[[float], BoundaryTreatment]:
        """Low-rank decay under a `Control` with these options."""
        return lambda strength: BoundaryTreatment(self.low_rank(strength), Control(**options))  # type: ignore[arg-type]

    def target(self, unit: str) -> Callable[[float], BoundaryTreatment]:
        """Low-rank decay while the stable rank of a matrix or head is above the one given."""
        settings = self.settings
        return lambda rank: BoundaryTreatment(self.low_rank(settings.strength, unit=unit), Control(target_rank=rank))

    def falling(self, norm: float) -> BoundaryTreatment:
        """No decay; norms that fall from that at initialisation to the one given."""
        start = (self.settings.width / 3) ** 0.5  # of a matrix at initialisation
        return BoundaryTreatment(control=Control(norm=norm, norm_from=start, norm_steps=self.settings.warmup))


def _accelerated(accelerator: Accelerator) -> BoundaryTreatment:
    return BoundaryTreatment(accelerator=accelerator)


def _prototype(strength: float) -> LowRank:
    return LowRank(strength, "newton_schulz", "absolute", every=1, lr_coupled=False)


def _l2(strength: float) -> BoundaryTreatment:
    return BoundaryTreatment(Frobenius(strength))


def _law_of_norm(power: float) -> Callable[[float], BoundaryTreatment]:
    return lambda strength: BoundaryTreatment(Frobenius(strength, power=power, cap=CAP))


def _norm_arms(make: _Treatments) -> list[Arm]:
    """Decays of the norm alone, and none."""
    settings = make.settings
    return [
        Arm(
            "none",
            "No decay of W_Q and W_K.",
            Axis(lambda _: BoundaryTreatment()),
            (),
            "the rest of the model's decay alone",
        ),
        Arm("l2", "L2 on W_Q and W_K alone.", Axis(_l2, make.l2_limit), L2, "decay of any kind"),
        Arm(
            "l2_ramp",
            f"L2 on W_Q and W_K alone, whose strength rises from 0 over {settings.warmup} steps.",
            Axis(lambda s: BoundaryTreatment(Frobenius(s, warmup=settings.warmup)), make.l2_limit),
            L2,
            "the schedule of the norm, by L2 alone",
        ),
        Arm(
            "radial",
            f"A constant amount of each norm, lr × strength per step, at most {CAP:g} of it; nothing is turned.",
            Axis(_law_of_norm(0)),
            AMOUNTS,
            "the law by which the norm falls, without low-rank decay",
        ),
        Arm(
            "power_2",
            f"A share of each norm that grows with it, lr × strength × ‖W‖ per step, at most {CAP:g}.",
            Axis(_law_of_norm(2)),
            L2,
            "the law by which the norm falls",
        ),
    ]


def _low_rank_arms(make: _Treatments) -> list[Arm]:
    """Low-rank decays by every rule, and L2 of every matrix, which the paper compares with."""
    settings = make.settings
    ramp = Frobenius(settings.l2_strength, warmup=settings.warmup)
    return [
        Arm(
            "relative",
            f"{settings.rule.capitalize()} at L2's law of the norm: lr × strength × rms(σ) from each singular value.",
            Axis(lambda s: BoundaryTreatment(replace(make.low_rank(s), scale="relative"))),
            L2,
            "low rank at the law of the norm that L2 has",
        ),
        Arm(
            "elastic",
            f"{settings.rule.capitalize()}, and L2 of {settings.l2_strength:g} beside it: the paper's LRD Elastic.",
            Axis(lambda s: BoundaryTreatment(make.low_rank(s), Control(also=Frobenius(settings.l2_strength)))),
            (0.6, *LOW_RANK),
        ),
        Arm(
            "ramp_low_rank",
            f"L2 of {settings.l2_strength:g}, warmed up over {settings.warmup} steps; {settings.rule} at a norm held.",
            Axis(lambda s: BoundaryTreatment(replace(make.low_rank(s), preserve_norm=True), Control(also=ramp))),
            (0.6, *LOW_RANK),
            "rank beside l2_ramp, at its norms",
        ),
        Arm(
            "l2_all",
            "L2 of one strength on every matrix, as the paper and the prototype compare with.",
            Axis(lambda s: BoundaryTreatment(Frobenius(s), rest_decay=s), make.l2_limit),
            PAPER if settings.preset == "paper" else (0.3, 1.0, 3.0, 5.0),
            "decay of any kind, everywhere",
        ),
        Arm(
            "prox",
            "The exact soft threshold of the singular values, lr × strength per step.",
            Axis(lambda s: BoundaryTreatment(make.low_rank(s, "prox"))),
            LOW_RANK,
        ),
        Arm(
            "smooth",
            f"Smoothed low-rank decay (ε = {settings.smoothing:g}·‖W‖_F), lr × strength per step.",
            Axis(lambda s: BoundaryTreatment(make.low_rank(s, "smooth"))),
            LOW_RANK,
        ),
        Arm(
            "prototype",
            "The published prototype: five cubic Newton–Schulz steps, the strength itself taken per step.",
            Axis(lambda s: BoundaryTreatment(_prototype(s))),
            PAPER if settings.preset == "prototype" else PROTOTYPE,
        ),
    ]


def _paper_arms(_: _Treatments) -> list[Arm]:
    """The forms in which the paper writes its step."""
    return [
        Arm(
            "paper_a1",
            "The paper's Algorithm 1 on attention and MLP matrices: λ·NS(W) per step.",
            Axis(lambda s: BoundaryTreatment(_prototype(s), Control(blocks=True))),
            PAPER,
        ),
        Arm(
            "paper_s5",
            "The paper's section 5 on attention and MLP matrices: ηλ·‖W‖/‖polar‖·polar(W).",
            Axis(lambda s: BoundaryTreatment(LowRank(s, "polar", "relative", every=1), Control(blocks=True))),
            PAPER,
        ),
        Arm(
            "paper_s6",
            "The paper's section 6.3 on attention and MLP matrices: ηλ·polar(W).",
            Axis(lambda s: BoundaryTreatment(LowRank(s, "polar", "absolute", every=1), Control(blocks=True))),
            PAPER,
        ),
    ]


def _part_arms(make: _Treatments) -> list[Arm]:
    """Controls that take a network or a low-rank step apart: attention, QK-norm, directions, matrices."""
    rule = f"the {make.settings.rule} rule"
    return [
        Arm(
            "uniform_attention",
            "W_Q and W_K held at zero: every position attends equally to all.",
            Axis(lambda _: BoundaryTreatment(uniform_attention=True)),
            (),
            "attention being switched off",
        ),
        Arm(
            "no_qk_norm",
            "L2 on W_Q and W_K of a network without QK-norm, where L2 in the loss is a nuclear norm of their product.",
            Axis(lambda s: BoundaryTreatment(Frobenius(s), qk_norm=False), make.l2_limit),
            (1.0, 3.0, 10.0, 30.0),
            "QK-norm, without which L2 lowers rank by itself",
        ),
        Arm(
            "radial_only",
            f"Only the part of {rule}'s step along W: the norm falls as under low-rank decay, nothing is turned.",
            Axis(make.controlled(part="radial")),
            (*CONTROL, 20.0),
            "the falling norm, and the angular step that grows with it",
        ),
        Arm(
            "radial_no_qk_norm",
            "The arm radial_only in a network without QK-norm.",
            Axis(lambda s: BoundaryTreatment(make.low_rank(s), Control(part="radial"), qk_norm=False)),
            (*CONTROL, 20.0),
            "QK-norm, without which the norm is seen by the loss",
        ),
        Arm(
            "tangential_only",
            f"Only the part of {rule}'s step across W: rank is lost, the norm is not decayed.",
            Axis(make.controlled(part="tangential")),
            (*CONTROL, 20.0),
            "losing rank without losing norm",
        ),
        Arm(
            "raise_rank",
            f"{rule.capitalize()}'s step with its tangential part turned round: the norm falls, the rank rises.",
            Axis(make.controlled(part="reversed")),
            CONTROL,
            "the direction of the change of rank",
        ),
        Arm(
            "low_rank_all",
            f"{rule.capitalize()} on W_V, W_O and the MLP too, in place of their L2.",
            Axis(make.controlled(blocks=True)),
            (0.6, 1.25, 2.5),
            "which matrices lose rank",
        ),
    ]


def _norm_control_arms(make: _Treatments) -> list[Arm]:
    """Controls without decay or at a held norm: norms, scores, rates and ranks that something else sets."""
    settings = make.settings
    rule = f"the {settings.rule} rule"
    return [
        Arm(
            "sphere",
            "No decay; every query and key matrix held at the Frobenius norm on the axis.",
            Axis(lambda norm: BoundaryTreatment(control=Control(norm=norm))),
            NORMS,
            "a small norm and the large angular step it brings, without loss of rank",
        ),
        Arm(
            "sphere_falling",
            f"No decay; every norm falls from its first to that on the axis within {settings.warmup} steps, and stays.",
            Axis(make.falling),
            NORMS,
            "a schedule of the norm, without any decay",
        ),
        Arm(
            "yoked",
            f"No decay; every norm as in a run under {rule} with another seed, at each step.",
            Axis(lambda s: BoundaryTreatment(control=Control(yoked=make.low_rank(s)))),
            CONTROL,
            "the norms of low-rank decay, without its rank",
        ),
        Arm(
            "sharpen",
            "No decay; the scores of attention rise from 0 to what they are in as many steps as the axis says.",
            Axis(lambda steps: BoundaryTreatment(control=Control(sharpen=int(steps))), whole=True),
            (100.0, 200.0, 400.0),
            "attention that is uniform at first, without decay",
        ),
        Arm(
            "sphere_low_rank",
            f"The same norms held, and {rule} at {settings.strength:g}.",
            Axis(lambda norm: BoundaryTreatment(make.low_rank(settings.strength), Control(norm=norm))),
            NORMS,
            "rank at equal norm, though not at an equal angular step",
        ),
        Arm(
            "fast_query_key",
            "No decay; a larger learning rate for W_Q and W_K, by the factor on the axis.",
            Axis(lambda factor: BoundaryTreatment(control=Control(query_key_lr=factor))),
            (3.0, 10.0, 30.0),
            "a larger learning rate of W_Q and W_K",
        ),
        Arm(
            "truncate",
            "No decay; once the training set is memorised, W_Q and W_K are cut to the rank on the axis.",
            Axis(lambda rank: BoundaryTreatment(control=Control(truncate_to=int(rank))), settings.width, whole=True),
            RANKS,
            "low rank reached at once instead of by decay",
        ),
    ]


def _schedule_arms(make: _Treatments) -> list[Arm]:
    """Controls of when, and down to which rank, low-rank decay acts."""
    settings = make.settings
    rule = f"the {settings.rule} rule"
    return [
        Arm(
            "after_memorising",
            f"{rule.capitalize()}, switched on once the training set is memorised.",
            Axis(make.controlled(schedule="after_memorising")),
            CONTROL,
            "decay during memorisation",
        ),
        Arm(
            "kept_on",
            f"{rule.capitalize()} to the end of the budget, also after generalising.",
            Axis(lambda s: BoundaryTreatment(make.low_rank(s), stays=True)),
            CONTROL,
            "what decay does after generalising",
        ),
        Arm(
            "until_generalised",
            f"{rule.capitalize()}, switched off on generalising, trained on to the end of the budget.",
            Axis(lambda s: BoundaryTreatment(make.low_rank(s), Control(schedule="until_generalised"), stays=True)),
            CONTROL,
            "decay after generalising",
        ),
        Arm(
            "target_rank",
            f"{rule.capitalize()} at {settings.strength:g}, on a matrix only while its stable rank is above the axis.",
            Axis(make.target("matrix")),
            (1.5, 3.0, 6.0, 12.0),
            "more rank lost than the task can spare",
        ),
        Arm(
            "target_rank_head",
            f"{rule.capitalize()} per head at {settings.strength:g}, only while its stable rank is above the axis.",
            Axis(make.target("head")),
            (1.5, 3.0, 6.0),
            "the same per head",
        ),
    ]


def _accelerator_arms(make: _Treatments) -> list[Arm]:
    """Published rules that are said to make a network generalise sooner, and the rate they are compared with."""
    return [
        Arm(
            "learning_rate",
            "No decay of W_Q and W_K; AdamW at the learning rate on the axis.",
            Axis(lambda lr: BoundaryTreatment(lr=lr), make.lr_limit),
            RATES,
            "a larger step, which is what several accelerators come to",
        ),
        Arm(
            "grokfast_ema",
            "Grokfast: the average of the gradients (α 0.98), times the strength, is added to the gradient.",
            Axis(lambda factor: _accelerated(GrokfastEMA(factor))),
            (0.5, 1.0, 2.0, 4.0),
        ),
        Arm(
            "grokfast_ma",
            "Grokfast-MA: the mean of the last 100 gradients, times the strength, is added to the gradient.",
            Axis(lambda factor: _accelerated(GrokfastMA(factor))),
            (1.25, 2.5, 5.0, 10.0),
        ),
        Arm(
            "orthograd",
            "Orthogonal gradient (⊥Grad): its part across the weights, at its length; the learning rate on the axis.",
            Axis(lambda lr: BoundaryTreatment(lr=lr, accelerator=OrthoGrad()), make.lr_limit),
            RATES,
        ),
        Arm(
            "stablemax",
            "StableMax in place of the softmax of the loss; no decay of W_Q and W_K.",
            Axis(lambda _: _accelerated(StableMax())),
            (),
        ),
        Arm(
            "muon",
            "Muon, at the learning rate on the axis, for attention and MLP matrices; AdamW for all else.",
            Axis(lambda lr: _accelerated(Muon(lr))),
            (0.005, 0.01, 0.02, 0.04),
        ),
        Arm(
            "momentum",
            "Muon's steps without orthogonalising: as long, along the momentum itself.",
            Axis(lambda lr: _accelerated(Muon(lr, orthogonal=False))),
            (0.005, 0.01, 0.02, 0.04),
            "that Muon's steps are of equal length in all directions",
        ),
        Arm(
            "hidden_rate",
            "AdamW, at the learning rate on the axis for attention and MLP matrices; at the usual one for all else.",
            Axis(lambda lr: _accelerated(HiddenRate(lr))),
            RATES,
            "a larger step of the matrices that Muon steps",
        ),
        Arm(
            "cautious",
            "L2 of one strength on every matrix, of those weights alone that the update moves towards zero.",
            Axis(lambda s: BoundaryTreatment(Frobenius(s), rest_decay=s, accelerator=CautiousDecay()), make.l2_limit),
            (0.3, 1.0, 3.0, 5.0),
        ),
    ]


ARMS = (
    _norm_arms,
    _low_rank_arms,
    _paper_arms,
    _part_arms,
    _norm_control_arms,
    _schedule_arms,
    _accelerator_arms,
)  # in the order of tables and pages


def every_arm(settings: Boundary) -> dict[str, Arm]:
    """Every arm there is, by name.

    Args:
        settings: name the rule, smoothing and interval of the low-rank decays, and the strength where it is no axis.
    """
    make = _Treatments(settings)
    return {arm.name: arm for arms in ARMS for arm in arms(make)}


def make_arms(settings: Boundary) -> list[Arm]:
    """The arms asked for, with the strengths asked for.

    Raises:
        SettingError: For an unknown arm or strengths it cannot take.
    """
    known = every_arm(settings)
    names = list(dict.fromkeys(settings.arms))
    if "all" in names:
        names = [name for name in known if name not in PUBLISHED or settings.preset == "paper"]
        names = [name for name in names if settings.steps >= _idle(known[name])]
    if not names:
        raise SettingError(f"--arms is empty: choose from {', '.join(known)}")
    chosen = {check_name("--arms", name, known): known[name] for name in names}
    preset = PRESETS[settings.preset].strengths
    for name, strengths in given_strengths(settings.strengths, chosen, "1,3,10", preset).items():
        arm = chosen[name]
        given = f"--strengths {name}={','.join(f'{strength:g}' for strength in strengths)}"
        if not arm.strengths:
            raise SettingError(f"{given}: the arm {name} has no strength")
        for strength in strengths:
            if not 0 < strength < arm.how.limit:
                raise SettingError(f"{given}: {strength:g} is not above 0 and below {arm.how.limit:g}, as {name} needs")
            if arm.how.whole and strength != int(strength):
                raise SettingError(f"{given}: {strength:g} must be a whole number, as {name} needs: give {name}=2,4")
        chosen[name] = replace(arm, strengths=strengths)
    for arm in chosen.values():
        if settings.steps < _idle(arm):
            raise SettingError(
                f"--steps {settings.steps}: {arm.name} does nothing before step {_idle(arm)}: give more steps, or "
                "leave it out of --arms"
            )
    return list(chosen.values())


def _idle(arm: Arm) -> int:
    """Steps before an arm does what it is named for."""
    accelerator = arm.how.treat((arm.strengths or (0.0,))[0]).accelerator
    return 0 if accelerator is None else accelerator.needs


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
    following = float(round(following) if arm.how.whole else f"{following:.3g}")
    return following if 0 < following < arm.how.limit and following not in tried else None


def styles(settings: Mapping[str, Any]) -> dict[str, ArmStyle]:
    """How the arms of this experiment alone are drawn and called: relatives in neighbouring colours, other dashes.

    Args:
        settings: name the rule of the controls.
    """
    rule = f"{settings.get('rule', 'smooth')} low-rank"
    return {
        "power_2": ArmStyle("square law of the norm", "#7a3aa8", "#cf9bff", "dashdot"),
        "relative": ArmStyle(f"relative {rule}", "#b8602a", "#ffb98a", "dashdot"),
        "elastic": ArmStyle(f"L2 and {rule}", "#8c4a2f", "#e8a98c", "longdashdot"),
        "ramp_low_rank": ArmStyle(f"L2 warm-up and {rule}", "#6b4fa0", "#bda6ee", "longdash"),
        "sphere_falling": ArmStyle("falling norm, no decay", "#3f6f8f", "#93c5e0", "dashdot"),
        "yoked": ArmStyle("norms of another seed", "#2c7f86", "#7ed3da", "longdashdot"),
        "sharpen": ArmStyle("attention sharpened slowly", "#6f7420", "#c5ca6d", "dot"),
        "radial_no_qk_norm": ArmStyle("radial part, no QK-norm", "#207a4f", "#6fd8a8", "longdashdot"),
        "prox": ArmStyle("soft threshold (prox)", "#c2410c", "#ff8f5c"),
        "no_qk_norm": ArmStyle("no QK-norm", "#0d7a5f", "#4fd1ab"),
        "radial_only": ArmStyle("radial part only", "#b0307a", "#ff86bf", "longdashdot"),
        "tangential_only": ArmStyle("tangential part only", "#5b7f13", "#b2d65e", "dash"),
        "smooth": ArmStyle("smooth low-rank decay", "#a34a2a", "#ffb199", "dot"),
        "low_rank_all": ArmStyle(f"{rule} decay of all", "#9a2f0a", "#ff7a6b", "dash"),
        "l2_all": ArmStyle("L2 of all", "#3f5fd0", "#9db4ff", "dashdot"),
        "truncate": ArmStyle("truncated once", "#7a5c00", "#d8b861", "longdash"),
        "raise_rank": ArmStyle("rank raised", "#00738c", "#5fd0e8", "dash"),
        "sphere": ArmStyle("fixed norm", "#45586e", "#a9bfd6", "longdash"),
        "sphere_low_rank": ArmStyle(f"{rule} decay at fixed norm", "#b5480f", "#ffab73", "longdash"),
        "learning_rate": ArmStyle("tuned learning rate", "#5a5f6b", "#b9bfcc", "longdash"),
        "grokfast_ema": ArmStyle("Grokfast", "#1c6fa8", "#7cc0ee", "dash"),
        "grokfast_ma": ArmStyle("Grokfast-MA", "#2a5d8a", "#8fb8dd", "dashdot"),
        "orthograd": ArmStyle("⊥Grad", "#8a2f6f", "#e39ccb", "dot"),
        "stablemax": ArmStyle("StableMax", "#6d5a1f", "#d4bf7a", "dot"),
        "muon": ArmStyle("Muon", "#a02c2c", "#f19a9a", "longdash"),
        "momentum": ArmStyle("Muon without orthogonalising", "#7a4a4a", "#d9b3b3", "dashdot"),
        "hidden_rate": ArmStyle("rate of hidden matrices", "#4f6f5a", "#b0d4bd", "longdash"),
        "cautious": ArmStyle("cautious L2 of all", "#35568f", "#a3bdf0", "longdashdot"),
        "fast_query_key": ArmStyle("faster queries and keys", "#6a3fb5", "#b99bff"),
        "after_memorising": ArmStyle("low rank after memorising", "#c0392b", "#ff9a8a", "dashdot"),
        "kept_on": ArmStyle("low rank kept on", "#c2410c", "#ff8f5c", "longdash"),
        "until_generalised": ArmStyle("low rank until generalised", "#a05a12", "#f0b06a", "dot"),
        "target_rank": ArmStyle("target rank", "#2f7a2f", "#7fd67f", "dash"),
        "target_rank_head": ArmStyle("target rank per head", "#1f6f5c", "#6fdcc0", "dot"),
        "paper_a1": ArmStyle("published A1", "#b08500", "#e8c34a", "dash"),
        "paper_s5": ArmStyle("published S5", "#8a6a3a", "#d9bd8e", "dashdot"),
        "paper_s6": ArmStyle("published S6", "#7d4f6d", "#d3a3c2", "longdash"),
    }
