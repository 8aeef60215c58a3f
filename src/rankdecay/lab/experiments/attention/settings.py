"""The settings that `recall`, `language` and `vision` share, and their arms."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.experiment import Arm
from rankdecay.lab.settings import (
    Preset,
    Settings,
    check_arms,
    check_counts,
    check_evaluations,
    check_numbers,
    check_seeds,
    given_strengths,
    option,
)

QKNorm = Literal["off", "on", "both"]
NOT_IDENTITY = ("save", "skip_diverged", "parallel")  # beside those of every experiment: no change of what is computed
GRID = ("arms", "strengths", "mlp_decays", "seeds", "first_seed")  # axes that may grow


@dataclass(frozen=True)
class AttentionDecay(Settings):
    """The settings that the experiments share; each sets its own defaults, and only some of the words anew."""

    further: ClassVar[tuple[str, ...]] = ()  # arms of `FURTHER` that can be asked for

    preset: Preset = "default"
    """'standard' trains more and larger: for a fast machine, or an hour."""
    arms: tuple[str, ...] = ("l2", "low_rank")
    """Which decays of attention to compare."""
    strengths: tuple[str, ...] = ()
    """Strengths of an arm, for example l2=0,0.1,1 low_rank=0.3,3; an arm that is not named has its own."""
    mlp_decays: tuple[float, ...] = (0.1,)
    """L2 of the matrices of the MLPs; several are a second axis of the grid."""
    rest_decay: float = 0.1
    """L2 of every other matrix, embeddings among them, and of W_V, W_O where an arm decays W_Q, W_K alone."""
    qk_norm: QKNorm = "off"
    """RMSNorm on the queries and keys of each head."""
    seeds: int = 1
    """Runs per cell of the grid, each from a seed of its own."""
    steps: int = 500
    """Training steps of each run."""
    lr: float = 1e-3
    """Peak learning rate: a linear rise, then a cosine down to a tenth."""
    warmup: int = 50
    """Steps of the rise."""
    batch_size: int = 16
    """Examples per step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts a batch is cut into, one after another."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    evaluate_every: int = 50
    """Steps between evaluations."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products, by autocast: 'auto' is bfloat16 on a GPU that has it, float32 elsewhere."""
    every: int = 4
    """Steps that a low-rank decay gathers before it acts."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on a GPU."""
    skip_diverged: bool = False
    """Note a run whose loss is no longer finite and go on with the next; otherwise stop there."""
    save: Literal["first", "all", "none"] = "first"
    """Trained models to keep in --out/models: those of the first seed, all, or none."""
    out: Path = Path("runs/attention")
    """Where results go; a run that was interrupted continues there."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, …"""


# --- the arms ---


@dataclass(frozen=True)
class AttentionTreatment:
    """Treatment of attention by an arm.

    Attributes:
        of: roles of the matrices it decays; the others of attention get the decay of the rest.
        scale: of a low-rank decay; None is L2.
        in_loss: whether L2 is part of the loss, and its gradient goes through Adam's moments.
        planes: whether it is `Planes` of each head.
        scores: what attention scores come from; all but "learned" are controls.
    """

    of: tuple[str, ...]
    scale: Literal["relative", "absolute"] | None = None
    in_loss: bool = False
    planes: bool = False
    scores: Literal["learned", "positions", "frozen", "frozen_large", "uniform"] = "learned"

    def decays(self, strength: float, settings: AttentionDecay) -> dict[str, Decay]:
        """The decays of all attention matrices that are trained, by role."""
        decay: Decay = Frobenius(strength)
        if self.planes:
            decay = Planes(strength, scope="head")
        elif self.scale is not None:
            decay = LowRank(strength, scale=self.scale, unit="head", every=settings.every)
        trained = BOTH if self.scores in ("learned", "positions") else VALUE_OUTPUT
        return {role: decay if role in self.of else Frobenius(settings.rest_decay) for role in trained}

    def of_a_run(self) -> dict[str, Any]:
        """Arguments of a `Run` besides its decays."""
        return {
            "in_loss": self.of if self.in_loss else (),
            "model": {} if self.scores == "learned" else {"scores": self.scores},
        }


QUERY_KEY, VALUE_OUTPUT, BOTH = ("query_key",), ("value_output",), ("query_key", "value_output")
L2_STRENGTHS, RELATIVE, ABSOLUTE = (0.0, 0.1, 1.0, 10.0), (0.1, 1.0, 10.0), (0.01, 0.1, 1.0)
IN_LOSS = (1e-4, 1e-3, 1e-2)
_RELATIVE = "relative to their size"
_ABSOLUTE = "by the same amount whatever their size"
ARMS = {
    name: Arm(name, description, treatment, strengths)
    for name, description, treatment, strengths in (
        ("l2", "L2 on W_Q, W_K, W_V and W_O.", AttentionTreatment(BOTH), L2_STRENGTHS),
        ("l2_query_key", "L2 on W_Q and W_K.", AttentionTreatment(QUERY_KEY), L2_STRENGTHS),
        ("low_rank", f"Soft threshold of each head's W_Q and W_K, {_RELATIVE}.",
         AttentionTreatment(QUERY_KEY, "relative"), RELATIVE),
        ("low_rank_both", f"Soft threshold of each head's W_Q, W_K, W_V and W_O, {_RELATIVE}.",
         AttentionTreatment(BOTH, "relative"), RELATIVE),
        ("low_rank_absolute", f"Soft threshold of each head's W_Q and W_K, {_ABSOLUTE}.",
         AttentionTreatment(QUERY_KEY, "absolute"), ABSOLUTE),
        ("low_rank_both_absolute", f"Soft threshold of each head's W_Q, W_K, W_V and W_O, {_ABSOLUTE}.",
         AttentionTreatment(BOTH, "absolute"), ABSOLUTE),
    )
}  # fmt: skip
#: Arms that have to be named, `--arms all` leaves them out; for an experiment whose settings have them as `further`.
FURTHER = {
    name: Arm(name, description, treatment, strengths, control)
    for name, description, treatment, strengths, control in (
        ("l2_loss", "L2 on W_Q, W_K, W_V and W_O as part of the loss, through Adam's moments.",
         AttentionTreatment(BOTH, in_loss=True), IN_LOSS, ""),
        ("planes", "Decay of the rotary planes of each head's W_Q and W_K, relative to their size.",
         AttentionTreatment(QUERY_KEY, planes=True), RELATIVE, ""),
        ("positions", "Scores of positions alone; L2 on W_Q, W_K, W_V and W_O.",
         AttentionTreatment(BOTH, scores="positions"), (0.1,), "whether attention by content is needed"),
        ("frozen", "W_Q and W_K as they are drawn, never trained; L2 on W_V and W_O.",
         AttentionTreatment(VALUE_OUTPUT, scores="frozen"), (0.1,), "whether W_Q and W_K need training"),
        ("frozen_large", "W_Q and W_K drawn large enough for scores of 1, never trained; L2 on W_V and W_O.",
         AttentionTreatment(VALUE_OUTPUT, scores="frozen_large"), (0.1,), "whether random scores do as well"),
        ("uniform", "Uniform attention, W_Q and W_K are zero; L2 on W_V and W_O.",
         AttentionTreatment(VALUE_OUTPUT, scores="uniform"), (0.1,), "whether scores are needed at all"),
    )
}  # fmt: skip
SCORE_CONTROLS = ("frozen", "frozen_large", "uniform")  # of `FURTHER`: for any network whose W_Q and W_K can be set


def chosen_arms(settings: AttentionDecay) -> list[Arm]:
    """The arms asked for, with the strengths asked for.

    Raises:
        SettingError: For an unknown arm, or strengths that cannot be those of a decay.
    """
    names = tuple(ARMS) if "all" in settings.arms else settings.arms
    known = ARMS | {name: FURTHER[name] for name in settings.further}
    check_arms(names, known)
    chosen = {name: known[name] for name in names}
    for name, strengths in given_strengths(settings.strengths, chosen, "0,0.1,1", type(settings)().strengths).items():
        chosen[name] = dataclasses.replace(chosen[name], strengths=strengths)
    for arm in chosen.values():
        for strength in arm.strengths:
            given = f"--strengths {arm.name}={strength:g}"
            is_share = arm.how.scale != "absolute" and not arm.how.in_loss
            _check_decay(given, strength, settings.lr, limited=is_share)
    return list(chosen.values())


def _check_decay(given: str, strength: float, lr: float, *, limited: bool = True) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise SettingError(f"{given} is not a decay: give 0 for none, or more")
    if limited and lr * strength >= 1:
        raise SettingError(
            f"{given} at --lr {lr:g} would take more than all of a weight in one step: stay below {1 / lr:g}"
        )


def check_shared(settings: AttentionDecay) -> None:
    """Raise a `SettingError` for settings of `AttentionDecay` that cannot work."""
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal:
            check_name(option(name), getattr(settings, name), get_args(kind))
    check_seeds(settings)
    check_counts(settings, "seeds", "steps", "batch_size", "accumulate", "evaluate_every", "every")
    check_numbers(settings, "lr")
    check_numbers(settings, "clip", "warmup", zero=True)
    chosen_arms(settings)
    if settings.warmup >= settings.steps:
        raise SettingError(f"--warmup {settings.warmup} must be less than --steps {settings.steps}")
    check_evaluations(settings)
    if not settings.mlp_decays:
        raise SettingError("--mlp-decays is empty: give for example 0.1")
    for decay in settings.mlp_decays:
        _check_decay(f"--mlp-decays {decay:g}", decay, settings.lr)
    _check_decay(f"--rest-decay {settings.rest_decay:g}", settings.rest_decay, settings.lr)
