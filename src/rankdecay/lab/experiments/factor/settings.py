"""The settings of `rankdecay factor`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.settings import (
    Settings,
    check_arms,
    check_counts,
    check_effect,
    check_numbers,
    check_seeds,
    check_strengths,
)

ARMS = ("factors", "momentum", "adam", "decoupled", "low_rank", "merged", "deep")


@dataclass(frozen=True)
class Factor(Settings):
    """Is L2 on two factors the nuclear norm of their product? The matrix experiment.

    Fits a small matrix by one, two and more factors under every decay, thousands of problems at once, and holds
    singular values, balance and gap against the theory and a convex solver. Leaves config.json, metrics.jsonl,
    summary.json and report.html in --out; it takes seconds, a minute at
    most, so an interrupted run begins again.
    """

    arms: tuple[str, ...] = ARMS
    """Which parametrisations and decays to compare."""
    strengths: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    """λ, the strengths of the decay."""
    target: tuple[str, ...] = ()
    """The diagonal of the matrix to fit, or 'random', another for each seed; by default 1/size, 2/size, …, 1."""
    target_rank: int = 0
    """Rank of a random target; by default full."""
    size: int = 0
    """Rows and columns; by default as many as the target has values, or 5."""
    observed: float = 1.0
    """Share of the entries that are given, drawn for each seed; below 1 the rest is to be completed."""
    optimizer: Literal["gd", "momentum", "adam"] = "gd"
    """Optimizer of the arms factors, merged and deep; decoupled is AdamW, or with momentum its plain counterpart."""
    depth: int = 3
    """Number of factors of the arm deep."""
    steps: int = 1000
    """Training steps."""
    lr: float = 0.1
    """Learning rate η of every arm."""
    scale: float = 0.5
    """Standard deviation of the initial entries of two factors at size 5; it falls as 1/√size, and with depth."""
    seeds: int = 50
    """Problems per arm and strength, each with its own initial factors."""
    evaluate_every: int = 20
    """Steps between evaluations of every problem."""
    out: Path = Path("runs/factor")
    """Where results go; a complete run there is shown again."""


PRESETS = {
    "default": Factor(),
    "standard": Factor(preset="standard", out=Path("runs/factor-standard")),  # the default is no less: it takes seconds
}
EXAMPLES = {
    "rankdecay factor --seeds 10 --strengths 0 0.1 0.4": "a few problems: seconds",
    "rankdecay factor --target random --observed 0.5 --out runs/completion": "half of the entries: matrix completion",
}


def check(settings: Factor) -> Factor:
    """Return the settings with what depends on others filled in.

    Raises:
        SettingError: For settings that cannot work.
    """
    check_arms(settings.arms, ARMS)
    check_seeds(settings)
    check_counts(settings, "steps", "seeds", "evaluate_every")
    if settings.depth < 2:
        raise SettingError(f"--depth {settings.depth} must be at least 2: the arm merged is one matrix")
    check_effect(settings, "depth", "deep" in settings.arms, "without the arm deep")
    check_numbers(settings, "lr", "scale")
    check_strengths(settings)
    for strength in settings.strengths:
        if settings.lr * strength >= 1:
            raise SettingError(
                f"--strengths {strength:g} at --lr {settings.lr:g} would flip the sign of the weights: "
                f"stay below {1 / settings.lr:g}, or lower --lr"
            )
    if not 0 < settings.observed <= 1:
        raise SettingError(
            f"--observed {settings.observed:g} must be a share of the entries in (0, 1]: 1 gives the whole matrix"
        )
    return filled(settings)


def filled(settings: Factor) -> Factor:
    """The settings with the size, the target and its rank filled in.

    Raises:
        SettingError: For a target that is no diagonal and not 'random', or not of the size.
    """
    given = settings.target
    size = settings.size or (len(given) if len(given) > 1 else 5)
    if size < 2:
        raise SettingError(f"--size {size} is too small: a spectrum needs at least 2 rows")
    if given == ("random",):
        if not 0 <= settings.target_rank <= size:
            raise SettingError(f"--target-rank {settings.target_rank} must be between 1 and --size {size}")
        return dataclasses.replace(settings, size=size, target_rank=settings.target_rank or size)
    if settings.target_rank:
        raise SettingError(f"--target-rank {settings.target_rank} has an effect on --target random alone: leave it out")
    try:
        values = [float(value) for value in given] or [(i + 1) / size for i in range(size)]
    except ValueError:
        raise SettingError(f"--target {' '.join(given)} is not a diagonal: give numbers, or 'random' alone") from None
    if len(values) != size:
        raise SettingError(
            f"--target has {len(values)} values for --size {size}: give {size} values, or leave out --size"
        )
    if not all(math.isfinite(value) and value >= 0 for value in values) or max(values) == 0:
        raise SettingError(f"--target {' '.join(given)} must be singular values: finite, at least 0, not all 0")
    return dataclasses.replace(settings, size=size, target=tuple(f"{value:g}" for value in values))
