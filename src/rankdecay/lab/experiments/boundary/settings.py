"""The settings of `rankdecay boundary`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankdecay.lab.ensemble.settings import EnsembleSettings, check_shared, validated
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.settings import Record, check_evaluations, check_numbers, identity

ARMS = ("none", "l2", "smooth", "uniform_attention")
STANDARD_ARMS = ("none", "l2", "prox", "smooth", "prototype", "uniform_attention")
ALIASES = {"low_rank": "prox"}  # what sweeps of earlier versions called an arm, and a user still may


@dataclass(frozen=True)
class Boundary(EnsembleSettings):
    """At which data fraction and decay strength does a transformer generalise, and under which decay?

    Trains every arm over a grid of training-set sizes, strengths and seeds, shows the phase map as it fills, and
    leaves config.json, metrics.jsonl (one line per run), summary.json and report.html in --out. Interrupted, or run
    again with a larger grid, it computes only what is missing. The default takes at most a quarter of an hour on two
    slow cores.
    """

    preset: Literal["default", "standard", "paper", "prototype"] = "default"  # pyright: ignore[reportIncompatibleVariableOverride]
    """'standard': more arms, sizes and strengths; 'paper': the published grid; 'prototype': the public prototype's 6×6,
    on its ordered split."""
    task: str = "add"
    """add, subtract, multiply, divide, quadratic (x²+xy+y²), s5, selection or recall."""
    arms: tuple[str, ...] = ARMS
    """Which decays and controls of W_Q and W_K to compare; 'all' is every one there is.
    low_rank, an older name, is prox."""
    fractions: tuple[float, ...] = ()
    """Shares of all examples used for training; by default those of the preset."""
    train_examples: tuple[int, ...] = ()
    """Numbers of training examples, for selection and recall."""
    strengths: tuple[str, ...] = ("l2=3,10,30,100", "smooth=2.5,5,10")
    """Strengths of an arm, ARM=1,3,10; an arm that is not named has its own. Arms without one take none."""
    rest_decays: tuple[float, ...] = ()
    """L2 on everything but W_Q and W_K, shared by all arms; several are an axis of the grid."""
    steps: int = 0
    """Training steps after which a run that has not generalised ends; by default the preset's."""
    widen: int = 0
    """How often to add a strength where an arm's best is the edge of its grid."""
    modulus: int = 0
    """p of the arithmetic; by default the preset's; ignored by s5."""
    values: int = 4
    """Values to select from, or pairs to recall from."""
    named: int = 2
    """Positions the last token of selection names."""
    rule: str = "smooth"
    """Rule of the controls that take a low-rank decay apart, and of its schedules: newton_schulz, polar, prox,
    smooth, or one that is registered."""
    strength: float = 5.0
    """Strength of the low-rank decay in the arms whose axis is something else: a norm, a target rank."""
    warmup: int = 200
    """Steps of the schedules: in which the strength of l2_ramp rises from 0, and the norm of sphere_falling falls."""
    l2_strength: float = 30.0
    """Strength of the L2 beside low-rank decay, in elastic and ramp_low_rank."""
    qk_norm: Literal["head", "width"] = "head"
    """RMSNorm of queries and keys, per head or over the full width; the arm no_qk_norm has none."""
    places: int = 0
    """Runs trained together by one ensemble; by default 4 on a CPU, 64 on a GPU."""
    ray: str | None = None
    """Run over a Ray cluster: its address, or 'local' to start one on this machine."""
    gpu_share: float = 1.0
    """Share of a GPU that each Ray task takes."""
    out: Path = Path("runs/boundary")
    """Where results go; an interrupted or smaller sweep there is continued."""


PAPER_FRACTIONS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
PRESETS = {
    "default": Boundary(),
    "standard": Boundary(
        preset="standard", arms=STANDARD_ARMS, strengths=(), widen=1, out=Path("runs/boundary-standard")
    ),
    "paper": Boundary(
        preset="paper",
        validation=0,
        strengths=(),
        arms=("none", "l2_all", "paper_a1", "paper_s5", "paper_s6", "uniform_attention"),
        batch_size=512,
        width=128,
        mlp_width=512,
        every=1,
        evaluate_every=100,
        lr=1e-3,
        widen=0,
        out=Path("runs/boundary-paper"),
    ),
    "prototype": Boundary(
        preset="prototype",
        arms=("l2_all", "prototype"),
        validation=0,
        strengths=("l2_all=0.001,0.005,0.01,0.05,0.1,0.5",),
        split="ordered",
        batch_size=512,
        width=128,
        mlp_width=512,
        qk_norm="width",
        gains=True,
        position_scale=0.02,
        lr=1e-3,
        threshold=0.99,
        evaluate_every=100,
        widen=0,
        seeds=1,
        out=Path("runs/boundary-prototype"),
    ),
}
RENAMED_PRESETS = {"small": "standard"}
EXAMPLES = {
    "rankdecay boundary --seeds 1 --fractions 0.5 0.8": "a coarse phase map",
    "rankdecay boundary --arms l2 smooth --strengths l2=3,30 smooth=2.5,5": "two decays, at strengths of your own",
    "rankdecay boundary --seeds 4": "more seeds: only what is missing is computed",
}


@dataclass(frozen=True)
class Scale:
    """Settings of a preset that depend on the task: modulus, budget, sizes of the training set."""

    modulus: int
    steps: int
    sizes: tuple[float, ...]  # fractions, or numbers of examples for the tasks whose examples are drawn
    rest_decay: float


STANDARD = {
    "selection": Scale(13, 800, (700, 850, 1000, 1250), 2.0),
    "recall": Scale(8, 1200, (700, 1000, 1400, 2000), 1.0),
    "s5": Scale(0, 1600, (0.3, 0.5, 0.7), 1.0),
}
STANDARD_MODULAR = Scale(31, 1200, (0.5, 0.6, 0.7, 0.8), 3.0)
DEFAULT_MODULAR = Scale(31, 1200, (0.5, 0.65, 0.8), 3.0)
PAPER = Scale(97, 3000, PAPER_FRACTIONS, 0.1)
PROTOTYPE = Scale(113, 2500, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 0.1)
GRID = (  # axes that may grow
    "arms",
    "fractions",
    "train_examples",
    "strengths",
    "rest_decays",
    "seeds",
    "first_seed",
    "widen",
)
PLACEMENT = ("places", "ray", "gpu_share")  # where a run is computed, which does not change what its row says


def check(settings: Boundary) -> Boundary:
    """Return the settings with everything the preset decides filled in, and arms under today's names.

    Raises:
        SettingError: For settings that cannot work.
    """
    from rankdecay.lab.tasks.base import check_fraction

    settings = filled(settings)
    for fraction in settings.fractions:
        check_fraction(fraction)
    check_shared(settings, width=64)
    for name in ("places", "widen"):
        if getattr(settings, name) < 0:
            raise SettingError(f"--{name} {getattr(settings, name)} is negative: give 0 or more")
    check_evaluations(settings)
    check_numbers(settings, "strength", "smoothing", "lr", "l2_strength")
    if settings.lr * settings.l2_strength >= 1:
        raise SettingError(f"--l2-strength {settings.l2_strength:g} must be below {1 / settings.lr:g}, 1 / --lr")
    for decay in settings.rest_decays:
        if not 0 <= settings.lr * decay < 1:
            raise SettingError(f"--rest-decays {decay:g} must be at least 0 and below {1 / settings.lr:g}, 1 / --lr")
    if not 0 < settings.gpu_share <= 1:
        raise SettingError(f"--gpu-share {settings.gpu_share} must be in (0, 1]: 0.5 lets two tasks share a GPU")
    return validated(settings, "boundary")


def filled(settings: Boundary) -> Boundary:
    """The settings with everything the preset decides filled in.

    Raises:
        SettingError: For settings that cannot work.
    """
    from rankdecay.lab.tasks import SAMPLED, TASKS

    check_name("--task", settings.task, TASKS)
    sampled = settings.task in SAMPLED
    if settings.preset in ("default", "standard"):
        scale = STANDARD.get(settings.task, DEFAULT_MODULAR if settings.preset == "default" else STANDARD_MODULAR)
    else:
        if sampled:
            raise SettingError(
                f"--preset {settings.preset} has no grid for --task {settings.task}: use --preset standard"
            )
        scale = PAPER if settings.preset == "paper" else PROTOTYPE
    if sampled and settings.fractions:
        raise SettingError(f"--fractions has no meaning for --task {settings.task}: use --train-examples")
    if not sampled and settings.train_examples:
        raise SettingError(f"--train-examples has no meaning for --task {settings.task}: use --fractions")
    return dataclasses.replace(
        settings,
        arms=tuple(ALIASES.get(name, name) for name in settings.arms),
        strengths=tuple(_renamed(text) for text in settings.strengths),
        modulus=settings.modulus or scale.modulus,
        steps=settings.steps or scale.steps,
        fractions=() if sampled else tuple(sorted(settings.fractions or scale.sizes)),
        train_examples=tuple(sorted(settings.train_examples or map(int, scale.sizes))) if sampled else (),
        rest_decays=settings.rest_decays or (scale.rest_decay,),
    )


def _renamed(text: str) -> str:
    """An entry of ``--strengths`` with the name that its arm has today."""
    name, equals, values = text.partition("=")
    return ALIASES.get(name, name) + equals + values


def fixed(settings: Boundary) -> Record:
    """The settings that every row of one directory shares."""
    return identity(settings, without=(*GRID, *PLACEMENT))
