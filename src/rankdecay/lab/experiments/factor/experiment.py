"""Is L2 on two factors the nuclear norm of their product, and how fast does it become that?

Fits a small matrix, given whole or in part, by one matrix, by two factors and by more, under every way to decay them,
from many seeds and at many strengths in one batch. The mathematics is in `lab.factorised`.

Importing this module does not import torch: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.experiment import (
    Preset,
    Record,
    check_counts,
    check_numbers,
    check_seeds,
    configuration,
    identity,
    in_one_piece,
    seeds,
)

if TYPE_CHECKING:
    import numpy as np

    from rankdecay.lab.progress import ArmBar

MINUTES = 1  # that the default may take on the slowest machine that counts
ARMS = ("factors", "momentum", "adam", "decoupled", "low_rank", "merged", "deep")


@dataclass(frozen=True)
class Factor:
    """Is L2 on two factors the nuclear norm of their product? The matrix experiment.

    Fits a small matrix by one, two and more factors under every decay, thousands of problems at once, and holds
    singular values, balance and gap against the theory and a convex solver. Leaves config.json, metrics.jsonl,
    summary.json and report.html in --out; it takes seconds, a minute at
    most, so an interrupted run begins again.
    """

    preset: Preset = "default"
    """'standard' computes more than the default: for a fast machine, or for longer."""
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
    """Of the arms factors, merged and deep; decoupled is AdamW, or with momentum its plain counterpart."""
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
    first_seed: int = 0
    """Number of the first seed: tune on seeds that are not reported, from 100 up say."""
    evaluate_every: int = 20
    """Steps between evaluations of every problem."""
    out: Path = Path("runs/factor")
    """Where results go; a complete run there is shown again."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    quiet: bool = False
    """No progress and no table."""
    json: bool = False
    """Print the summary as JSON on standard output; progress goes to standard error."""


PRESETS = {
    "default": Factor(),
    "standard": Factor(preset="standard", out=Path("runs/factor-standard")),  # the default is no less: it takes seconds
}


@dataclass(frozen=True)
class Arm:
    """One way to parametrise the matrix and to decay it."""

    name: str
    description: str
    depth: int = 2
    optimizer: Literal["gd", "momentum", "adam"] = "gd"
    decay: Literal["loss", "decoupled", "prox"] = "loss"

    @property
    def penalty(self) -> int | None:
        """L of the quasi-norm Σ σ^(2/L) that its decay amounts to; None where the theory names none."""
        if self.decay == "decoupled" and self.optimizer == "adam":
            return None
        return 2 if self.decay == "prox" else self.depth


def make_arms(settings: Factor) -> list[Arm]:
    """The arms asked for, in the order of `ARMS`."""
    optimizer = settings.optimizer
    named = {"gd": "gradient descent", "momentum": "momentum 0.9", "adam": "Adam"}
    plain = optimizer == "momentum"
    every = [
        Arm("factors", f"W = ABᵀ, L2 on A and B in the loss, {named[optimizer]}.", 2, optimizer),
        Arm("momentum", "W = ABᵀ, L2 on A and B in the loss, damped momentum 0.9.", 2, "momentum"),
        Arm("adam", "W = ABᵀ, L2 on A and B in the loss, Adam.", 2, "adam"),
        Arm(
            "decoupled",
            f"W = ABᵀ, L2 on A and B beside the gradient step: {'damped momentum 0.9' if plain else 'AdamW'}.",
            2,
            "momentum" if plain else "adam",
            "decoupled",
        ),
        Arm(
            "low_rank", "One W, every singular value soft-thresholded by ηλ after each gradient step.", 1, "gd", "prox"
        ),
        Arm("merged", f"One W, L2 on it in the loss, {named[optimizer]}.", 1, optimizer),
        Arm(
            "deep",
            f"W a product of {settings.depth} factors, L2 on each in the loss, {named[optimizer]}.",
            settings.depth,
            optimizer,
        ),
    ]
    return [arm for arm in every if arm.name in settings.arms]


def filled(settings: Factor) -> Factor:
    """The settings with the size, the target and its rank filled in.

    Raises:
        SettingError: for a target that is no diagonal and not 'random', or not of the size.
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


def check(settings: Factor) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
    if not settings.arms:
        raise SettingError(f"--arms is empty: choose from {', '.join(ARMS)}")
    for name in settings.arms:
        check_name("--arms", name, ARMS)
    check_seeds(settings)
    check_counts(settings, "steps", "seeds", "evaluate_every")
    if settings.depth < 2:
        raise SettingError(f"--depth {settings.depth} is no product: give at least 2 (the arm merged is one matrix)")
    check_numbers(settings, "lr", "scale")
    if not settings.strengths:
        raise SettingError("--strengths is empty: give for example 0 0.1 0.4")
    for strength in settings.strengths:
        if not (math.isfinite(strength) and strength >= 0):
            raise SettingError(f"--strengths {strength:g} is negative or not finite: a decay is 0 (none) or more")
        if settings.lr * strength >= 1:
            raise SettingError(
                f"--strengths {strength:g} at --lr {settings.lr:g} would flip the sign of the weights: "
                f"stay below {1 / settings.lr:g}, or lower --lr"
            )
    if len(set(settings.strengths)) < len(settings.strengths):
        raise SettingError(f"--strengths {' '.join(f'{s:g}' for s in settings.strengths)} names a strength twice")
    if not 0 < settings.observed <= 1:
        raise SettingError(
            f"--observed {settings.observed:g} must be a share of the entries in (0, 1]: 1 gives the whole matrix"
        )


def run(settings: Factor, command: str) -> Record:
    """Runs the experiment and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings or the output directory cannot work.
    """
    check(settings)
    settings = filled(settings)
    from rankdecay.lab.machine import one_thread, resolve_device
    from rankdecay.lab.progress import ArmBar, Promise

    device = resolve_device(settings.device)
    arms = make_arms(settings)
    described = [dataclasses.asdict(arm) | {"penalty": arm.penalty} for arm in arms]
    config = configuration("factor", identity(settings), described, device, command)
    count = len(arms) * len(settings.strengths) * settings.seeds
    title = f"factor · {count:,} problems of {settings.size}×{settings.size} · {settings.steps} steps · {device}"
    promise = Promise(MINUTES, "fewer --seeds or --steps")
    progress = ArmBar(title, len(arms) * settings.steps, quiet=settings.quiet, to_stderr=settings.json, promise=promise)

    def compute() -> tuple[list[Record], Record, int, dict[str, np.ndarray]]:
        with progress, one_thread():
            lines, found, arrays = _compute(settings, arms, device, progress)
        return lines, found, settings.steps, arrays

    return in_one_piece(settings, config, progress.notice, compute)


def _compute(
    settings: Factor, arms: Sequence[Arm], device: str, progress: ArmBar
) -> tuple[list[Record], Record, dict[str, np.ndarray]]:
    """The lines of ``metrics.jsonl``, the arms and bounds of the summary, and the arrays of the last step."""
    import numpy as np

    from rankdecay.lab.convex import LARGEST
    from rankdecay.lab.experiments.factor import fits

    problems = fits.make_problems(settings, device)
    lines, rows, bounds = [], [], {}
    last: dict[str, list[np.ndarray]] = {"singular_values": [], "imbalance": [], "gap": []}
    for arm in arms:
        factors = fits.initial_factors(settings, arm.depth, device)
        outcome = fits.train(arm, problems, factors, settings, functools.partial(progress.at, arm.name))
        progress.ended(arm.name, outcome.steps[-1], settings.steps)
        lines += fits.records(arm, outcome, settings)
        found = fits.summarise_arm(arm, outcome, problems, settings)
        if arm.penalty == 2 and settings.size <= LARGEST and arm.name in ("factors", "low_rank"):
            fits.compare_with_solver(found, outcome.W, problems, settings)
        rows += found
        if arm.depth == 2:
            bounds[arm.name] = dataclasses.asdict(outcome.bound)
        for name, parts in last.items():
            parts.append(outcome.measured[-1][name].cpu().numpy())
    if settings.size > LARGEST and {"factors", "low_rank"} & {arm.name for arm in arms}:
        progress.notice(f"the convex solver is for sizes up to {LARGEST}: optima are certified by duality alone")
    count = len(settings.strengths) * settings.seeds
    arrays = {
        "arms": np.repeat([arm.name for arm in arms], count),
        "strengths": np.tile(np.repeat(settings.strengths, settings.seeds), len(arms)),
        "seeds": np.tile(seeds(settings), len(arms) * len(settings.strengths)),
        "target": np.tile(problems.values.cpu().numpy(), (len(arms), 1)),
    }
    arrays |= {name: np.concatenate(parts) for name, parts in last.items()}
    return lines, {"arms": rows, "bound": bounds}, arrays


def print_summary(summary: Record) -> None:
    """The table of a finished run, one line per arm, and what may be said of it."""
    from rich.console import Console
    from rich.table import Table

    from rankdecay.lab.experiments.factor.verdict import verdict

    table = Table(box=None, pad_edge=False)
    table.add_column("arm")
    headings = ("rank at each λ", "off the\ntheory", "settled", "\nimbalance", "\ngap", "above the\noptimum")
    for heading in headings:
        justify = "left" if heading.startswith("rank") else "right"
        table.add_column(heading, justify=justify, vertical="bottom", no_wrap=True)
    by_arm: dict[str, list[Record]] = {}
    for row in summary["arms"]:
        by_arm.setdefault(row["name"], []).append(row)
    for name, rows in by_arm.items():
        decayed = [row for row in rows if row["strength"]] or rows
        table.add_row(
            name,
            " ".join(f"{row['rank']:g}" for row in rows),
            _number(_most(decayed, "deviation")),
            _share(decayed),
            _number(_most(decayed, "imbalance")),
            _number(_most(decayed, "gap")),
            _number(_most(decayed, "optimality_gap")),
        )
    console = Console(highlight=False)
    strengths = " ".join(f"{row['strength']:g}" for row in next(iter(by_arm.values())))
    console.print(table)
    seeds = summary["arms"][0]["seeds"]
    console.print(f"\nλ = {strengths}; medians over {seeds} seeds, from the third column on at the worst λ > 0\n")
    console.print(str(verdict(summary)), markup=False)


def _most(rows: Sequence[Record], key: str) -> float | None:
    return max((row[key] for row in rows if row.get(key) is not None), default=None)


def _share(rows: Sequence[Record]) -> str:
    known = [row for row in rows if row["settled"] is not None]
    return f"{sum(row['settled'] for row in known) / sum(row['seeds'] for row in known):.1%}" if known else "—"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.1e}"
