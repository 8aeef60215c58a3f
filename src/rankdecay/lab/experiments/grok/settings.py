"""The settings of `rankdecay grok`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankdecay.decay.policy import Scale
from rankdecay.lab.ensemble.settings import EnsembleSettings, check_shared, validated
from rankdecay.lab.errors import SettingError, check_name, option
from rankdecay.lab.settings import check_arms, check_numbers
from rankdecay.rules import rule_names

ARMS = ("none", "l2", "l2_tuned", "low_rank", "prototype", "uniform_attention")
MORE_ARMS = ("l2_ramp", "radial", "relative")  # that can be asked for
TUNED = {"l2_tuned", "l2_ramp", "relative"}  # whose strength is --tuned-strength


@dataclass(frozen=True)
class Grok(EnsembleSettings):
    """Does low-rank decay make a scale-invariant transformer generalise where L2 does not, and why?

    Trains every arm from the same seeds, shows their accuracy and rank as they go, and leaves config.json,
    metrics.jsonl, summary.json and report.html in --out. Interrupted, the same command continues. The default takes at
    most three minutes on two slow cores, under one on two fast ones.
    """

    preset: Literal["default", "standard", "prototype"] = "default"  # pyright: ignore[reportIncompatibleVariableOverride]
    """'standard' is a larger network, for a fast machine; 'prototype' the public set-up: addition mod 113, ordered
    split, full-width QK-norm, rate 0.01."""
    arms: tuple[str, ...] = ARMS
    """Which decays of W_Q and W_K to compare; the name of a rule, such as prox, is low-rank decay by that rule.
    Beside those of the default: l2_ramp, radial, relative."""
    task: str = "selection"
    """selection, recall, add, subtract, multiply, divide, quadratic (x²+xy+y²) or s5."""
    modulus: int = 13
    """p of the arithmetic; ignored by s5."""
    train_fraction: float = 0.5
    """Share of all examples used for training; for every task but selection and recall."""
    train_examples: int = 1100
    """Number of training examples, for selection and recall."""
    values: int = 4
    """Number of values to select from, for selection; of pairs, for recall."""
    steps: int = 600
    """Training steps."""
    rule: str = "smooth"
    """Rule of the low_rank arm: newton_schulz, polar, prox, smooth, or one that is registered."""
    scale: Scale = "absolute"
    """Scale of the low_rank arm: a step takes lr × strength from each singular value; 'relative': times their rms."""
    strength: float = 4.0
    """Strength of the low_rank arm."""
    tuned_strength: float = 30.0
    """Strength of the l2_tuned arm: the best the committed sweep found (docs/log.md)."""
    weight_decay: float = 1.5
    """L2 on everything but W_Q and W_K, shared by all arms; the l2 arm applies it to W_Q and W_K too."""
    warmup: int = 200
    """Steps in which the strength of l2_ramp, otherwise that of l2_tuned, rises from 0."""
    amount: float = 30.0
    """Strength of the radial arm: lr × amount of each norm per step, at most a tenth of it."""
    qk_norm: Literal["head", "width", "none"] = "head"
    """RMSNorm of queries and keys: per head, over the full width, or none."""
    stop_when_generalised: bool = False
    """Let a member leave once two evaluations in a row reach the threshold."""
    out: Path = Path("runs/grok")
    """Where results go; an interrupted run there is continued."""


PRESETS = {
    "default": Grok(),
    "standard": Grok(
        preset="standard",
        modulus=31,
        train_examples=3000,
        steps=640,
        strength=10.0,
        tuned_strength=100.0,
        weight_decay=3.0,
        lr=1e-3,
        batch_size=256,
        width=128,
        mlp_width=512,
        out=Path("runs/grok-standard"),
    ),
    "prototype": Grok(
        preset="prototype",
        strength=10.0,
        tuned_strength=100.0,
        lr=1e-3,
        width=128,
        arms=("none", "l2", "prototype", "uniform_attention"),
        task="add",
        modulus=113,
        split="ordered",
        validation=0,
        steps=2500,
        weight_decay=0.1,
        batch_size=512,
        mlp_width=512,
        precision="float32",
        qk_norm="width",
        gains=True,
        position_scale=0.02,
        threshold=0.99,
        stop_when_generalised=True,
        evaluate_every=200,
        out=Path("runs/grok-prototype"),
    ),
}
UNUSED = {
    "selection": ("train_fraction",),
    "recall": ("train_fraction",),
    "s5": ("modulus", "train_examples", "values"),
}
EXAMPLES = {
    "rankdecay grok --seeds 2 --arms none l2_tuned low_rank": "three arms, two seeds: a fraction of the default's time",
    "rankdecay grok --preset standard --open": "a larger network; its page opens at the end",
    "rankdecay grok --task add --modulus 31 --out runs/add": "another task, beside the first run",
}


def check(settings: Grok) -> Grok:
    """Return the settings with every arm under the name it is reported by.

    Raises:
        SettingError: For settings that cannot work.
    """
    from rankdecay.lab.tasks import TASKS
    from rankdecay.lab.tasks.base import check_fraction

    check_name("--task", settings.task, TASKS)
    check_fraction(settings.train_fraction)
    for name in UNUSED.get(settings.task, ("train_examples", "values")):
        if getattr(settings, name) != getattr(PRESETS[settings.preset], name):
            use = "--train-examples" if name == "train_fraction" else "--train-fraction"
            remedy = f"use {use}" if name.startswith("train") else "leave it out"
            value = getattr(settings, name)
            raise SettingError(f"{option(name)} {value} has no effect on --task {settings.task}: {remedy}")
    check_shared(settings, width=128)
    check_arms(settings.arms, (*ARMS, *MORE_ARMS, *rule_names()))
    if taken := sorted({*ARMS, *MORE_ARMS} & set(rule_names()) & {*settings.arms, settings.rule}):
        raise SettingError(f"the decay rule {taken[0]!r} has the name of an arm: register it under another name")
    check_numbers(settings, "strength", "smoothing", "tuned_strength", "weight_decay", "amount", "lr", zero=True)
    for name in ("tuned_strength", "weight_decay"):
        if name == "tuned_strength" and not TUNED & set(settings.arms):
            continue
        if settings.lr * getattr(settings, name) >= 1:
            raise SettingError(
                f"{option(name)} {getattr(settings, name):g} at --lr {settings.lr:g} would flip the sign of the "
                f"weights: stay below {1 / settings.lr:g}"
            )
    return dataclasses.replace(validated(settings, "grok"), arms=named_arms(settings))


def named_arms(settings: Grok) -> tuple[str, ...]:
    """The arms asked for; where rules are compared, ``low_rank`` is the arm of its rule."""
    if "low_rank" not in settings.arms or not set(settings.arms) & set(rule_names()):
        return settings.arms
    return tuple(dict.fromkeys(settings.rule if name == "low_rank" else name for name in settings.arms))
