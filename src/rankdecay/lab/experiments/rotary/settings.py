"""The settings of `rankdecay rotary`."""

from __future__ import annotations

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

ARMS = ("rotary", "convex", "unturned")


@dataclass(frozen=True)
class Rotary(Settings):
    """What is L2 on W_Q and W_K under rotary positions? The matrix experiment.

    Fits the scores of a head, or of several that share their keys, by rotary planes with L2 on W_Q and W_K, many
    problems at once, and holds the planes that are left and the ranks against a convex problem whose optimum a dual
    certifies. Leaves config.json, metrics.jsonl, summary.json and report.html in --out; it takes a minute or two, so an
    interrupted run begins again.
    """

    arms: tuple[str, ...] = ARMS
    """rotary: gradient descent on W_Q and W_K; convex: the convex problem; unturned: the same without positions."""
    strengths: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    """λ, the strengths of L2."""
    planes: int = 8
    """Rotary planes of a head, half its size."""
    width: int = 16
    """Width of the model, columns of W_Q and W_K."""
    heads: int = 1
    """Query heads that share their keys."""
    target: Literal["planes", "shared", "full"] = "planes"
    """The scores to fit: of W_Q and W_K whose planes have directions of their own; of ones in which all planes share
    one (rank two); or of full rank in every plane, which no W_Q and W_K have. Planes have sizes 1/planes, …, 1."""
    frequencies: Literal["geometric", "fourier"] = "geometric"
    """θ^(-j/planes), as models have them; or multiples of 2π/offsets, of which planes do not see each other."""
    theta: float = 100.0
    """θ of the geometric frequencies."""
    offsets: int = 32
    """Distances between query and key, 0, 1, …, at which scores are fitted."""
    steps: int = 4000
    """Training steps."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.98
    """Of gradient descent: planes of nearly one frequency take tens of thousands of steps without."""
    scale: float = 0.3
    """Norm of a plane's initial rows of W_Q, and of W_K."""
    seeds: int = 20
    """Problems per arm and strength, each with a target and initial weights of its own."""
    evaluate_every: int = 100
    """Steps between evaluations."""
    out: Path = Path("runs/rotary")
    """Where results go; a complete run there is shown again."""


PRESETS = {
    "default": Rotary(seeds=10),
    "standard": Rotary(preset="standard", seeds=50, out=Path("runs/rotary-standard")),
}
EXAMPLES = {
    "rankdecay rotary --seeds 3 --frequencies fourier --out runs/fourier": "planes that do not see each other: seconds",
    "rankdecay rotary --heads 2 --target shared --out runs/shared": "two query heads on one key, a target of rank two",
}


def check(settings: Rotary) -> Rotary:
    """Return the settings.

    Raises:
        SettingError: For settings that cannot work.
    """
    check_arms(settings.arms, ARMS)
    check_seeds(settings)
    check_counts(settings, "planes", "width", "heads", "offsets", "steps", "seeds", "evaluate_every")
    check_numbers(settings, "lr", "scale", "theta")
    if not 0 <= settings.momentum < 1:
        raise SettingError(f"--momentum {settings.momentum:g} is outside [0, 1): give 0 for none, or for example 0.98")
    check_strengths(settings)
    if settings.frequencies == "fourier" and 2 * settings.planes >= settings.offsets:
        raise SettingError(
            f"--offsets {settings.offsets} cannot tell {settings.planes} planes apart: give at least "
            f"{2 * settings.planes + 1}"
        )
    if settings.frequencies == "geometric" and settings.theta <= 1:
        raise SettingError(f"--theta {settings.theta:g} must be above 1: models have 10000 and more")
    check_effect(settings, "theta", settings.frequencies == "geometric", f"on --frequencies {settings.frequencies}")
    return settings
