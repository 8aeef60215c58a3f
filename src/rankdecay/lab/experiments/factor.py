"""Is L2 on two factors the nuclear norm of their product, and how fast does it become that?

Fits a small matrix, given whole or in part, by one matrix, by two factors and by more, under every way to decay them,
from many seeds and at many strengths in one batch. The mathematics is in `lab.factorised`.

Importing this module does not import torch: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankdecay.lab.errors import SettingError, check_name

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from rankdecay.lab.factorised import Factors, Method, Training

Record = dict[str, Any]
ARMS = ("factors", "momentum", "adam", "decoupled", "low_rank", "merged", "deep")
NOT_IDENTITY = ("out", "device", "quiet", "json")  # settings that do not change what a run computes
DIVERGED = 1e6  # times the size of the target
CLOSE = 1e-3  # of the theory, in units of the target's largest singular value: counts as settled
ROUNDING = 1e-12  # of a gap, per unit of the factors' squared norm
RATE_WINDOW = (2.0, 12.0)  # times ηt between which the decay of the imbalance is measured: steps 20 to 120 at lr 0.1


@dataclass(frozen=True)
class Factor:
    """Is L2 on two factors the nuclear norm of their product? The matrix experiment.

    Fits a small matrix by one, two and more factors under every decay, thousands of problems at once, and holds
    singular values, balance and gap against the theory and a convex solver. Leaves config.json, metrics.jsonl,
    summary.json and report.html in --out; it takes seconds, so an interrupted run begins again.
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
    """Problems per arm and strength: seeds 0, 1, …, each with its own initial factors."""
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
    for name in ("steps", "seeds", "evaluate_every"):
        if getattr(settings, name) < 1:
            raise SettingError(f"--{name.replace('_', '-')} {getattr(settings, name)} is too small: give at least 1")
    if settings.depth < 2:
        raise SettingError(f"--depth {settings.depth} is no product: give at least 2 (the arm merged is one matrix)")
    for name in ("lr", "scale"):
        if not (math.isfinite(getattr(settings, name)) and getattr(settings, name) > 0):
            raise SettingError(f"--{name} {getattr(settings, name)} must be a finite number > 0: for example 0.1")
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


# --- the problems ---


@dataclass(frozen=True)
class Problems:
    """What all arms are trained on: for each strength, every seed; the seed changes fastest."""

    target: Tensor  # (problems, n, n)
    strength: Tensor  # (problems,)
    mask: Tensor | None  # (problems, n, n), or None where everything is observed
    values: Tensor  # singular values of the targets, (problems, n)


def make_problems(settings: Factor, device: str) -> Problems:
    """The targets, strengths and masks; a seed fixes its target and its mask at every strength."""
    import numpy as np
    import torch

    n, targets, masks = settings.size, [], []
    for seed in range(settings.seeds):
        rng = np.random.default_rng([1, seed])  # apart from that of the initial factors
        if settings.target == ("random",):
            drawn = rng.standard_normal((n, settings.target_rank)) @ rng.standard_normal((settings.target_rank, n))
            targets.append(drawn / np.linalg.norm(drawn, 2))
        else:
            targets.append(np.diag([float(value) for value in settings.target]))
        mask = np.zeros(n * n)
        mask[rng.permutation(n * n)[: max(1, round(settings.observed * n * n))]] = 1
        masks.append(mask.reshape(n, n))

    def every(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).repeat(len(settings.strengths), 1, 1).to(device)

    strength = torch.tensor(settings.strengths, dtype=torch.float64).repeat_interleave(settings.seeds)
    target = every(targets)
    mask = every(masks) if settings.observed < 1 else None
    return Problems(target, strength.to(device), mask, torch.linalg.svdvals(target))


def initial_factors(settings: Factor, depth: int, device: str) -> Factors:
    """Gaussian factors, the same at every strength: A and B are the first two draws of a seed, W begins as their ABᵀ.

    The scale of deeper products is chosen so that the loss begins as curved as that of two factors, which is what the
    learning rate has to suit.
    """
    import numpy as np
    import torch

    n = settings.size
    scale = settings.scale * math.sqrt(5 / n)
    norm = 2 * math.sqrt(n) * scale  # about the spectral norm of a factor
    if depth > 2:  # curvature is about L ‖F‖^(2L - 2)
        scale *= (2 * norm**2 / depth) ** (1 / (2 * depth - 2)) / norm
    draws = []
    for seed in range(settings.seeds):
        rng = np.random.default_rng(seed)
        factors = [scale * rng.standard_normal((n, n)) for _ in range(max(2, depth))]
        factors[-1] = factors[-1].T
        draws.append([factors[0] @ factors[1]] if depth == 1 else factors)
    stacked = [torch.from_numpy(np.stack(factor)) for factor in zip(*draws, strict=True)]
    return [factor.repeat(len(settings.strengths), 1, 1).to(device) for factor in stacked]


# --- training and measuring ---


def measure(training: Training) -> dict[str, Tensor]:
    """Everything that is recorded of every problem: shape (problems,), and its singular values (problems, n)."""
    import torch

    from rankdecay.lab import factorised as f

    factors = training.factors
    sigma = torch.linalg.svdvals(f.product(factors))
    found = {
        "singular_values": sigma,
        "objective": f.objective(factors, training.target, training.strength, training.mask),
        "imbalance": f.imbalance(factors),
        "gap": f.gap(factors, sigma),
    }
    if len(factors) == 2:
        found["gap_bound"] = f.gap_bound(factors)
    return found


@dataclass
class Bound:
    """Proposition B.4 along a run: how near the gap came to its bound, and how often it was above."""

    checks: int = 0
    violations: int = 0
    largest_ratio: float = 0.0

    def see(self, factors: Factors) -> None:
        """Holds the gaps of some problems at one step against their bounds."""
        from rankdecay.lab import factorised as f

        gap, bound = f.gap(factors), f.gap_bound(factors)
        rounding = ROUNDING * (f.squared_norm(factors[0]) + f.squared_norm(factors[1])).clamp(min=1)
        self.checks += gap.numel()
        self.violations += int((gap > bound + rounding).sum())
        # where both are rounding errors their ratio says nothing
        self.largest_ratio = max(self.largest_ratio, float((gap / bound).where(bound > 1e3 * rounding, 0.0).max()))


@dataclass
class Outcome:
    """What one arm came to."""

    steps: list[int]  # of the evaluations
    measured: list[dict[str, Tensor]]
    bound: Bound
    W: Tensor  # (problems, n, n)


class Diverged(SettingError):
    """A learning rate at which gradient descent leaves every bound."""


def train(
    arm: Arm,
    problems: Problems,
    factors: Factors,
    settings: Factor,
    evaluated: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Trains every problem of an arm.

    The first seed of every strength is held against Proposition B.4 after every step, all seeds at every evaluation. A
    single matrix ends early, once it moves no more.

    Args:
        arm: how.
        problems: what.
        factors: where they begin.
        settings: for how long, at which rate.
        evaluated: told the step after every evaluation.

    Raises:
        Diverged: if the learning rate is too large.
    """
    from rankdecay.lab.factorised import Method, Training, product

    method = Method(settings.lr, arm.optimizer, arm.decay)
    training = Training(factors, problems.target, problems.strength, method, problems.mask)
    outcome = Outcome([0], [measure(training)], Bound(), product(factors).clone())
    for step in range(1, settings.steps + 1):
        training.step()
        evaluate = step % settings.evaluate_every == 0 or step == settings.steps
        if not (evaluate or arm.depth == 2):
            continue
        W = product(training.factors).clone()
        _refuse_divergence(W, arm, step, factors, problems, method)
        if arm.depth == 2:
            outcome.bound.see(training.factors if evaluate else [f[:: settings.seeds] for f in training.factors])
        if not evaluate:
            continue
        outcome.steps.append(step)
        outcome.measured.append(measure(training))
        evaluated(step)
        moved = float((W - outcome.W).abs().max())
        outcome.W = W
        # a product can rest at a saddle for long, a matrix cannot
        if arm.depth == 1 and moved <= 1e-14 * float(problems.values.max()):
            break
    return outcome


def _refuse_divergence(W: Tensor, arm: Arm, step: int, begun: Factors, problems: Problems, method: Method) -> None:
    from rankdecay.lab.factorised import curvature

    largest = DIVERGED * problems.values.amax(-1)
    lost = ~(W.abs().amax((-2, -1)) < largest)  # NaN is not below anything
    if lost.any():
        safe = 1 / float((curvature(begun) + problems.strength).max())
        digit = 10 ** math.floor(math.log10(safe))
        raise Diverged(
            f"--lr {method.lr:g} is too large: {int(lost.sum())} of {len(lost)} problems of the arm {arm.name} left "
            f"every bound by step {step}; at their beginning --lr {math.floor(safe / digit) * digit:g} is safe"
        )


# --- what it came to ---


def _spread(values: Tensor) -> tuple[float, float, float]:
    """Median, least and largest."""
    return float(values.quantile(0.5)), float(values.min()), float(values.max())


def records(arm: Arm, outcome: Outcome, settings: Factor) -> list[Record]:
    """The lines of ``metrics.jsonl`` of one arm: one per strength and evaluation."""
    lines = []
    for step, measured in zip(outcome.steps, outcome.measured, strict=True):
        for number, strength in enumerate(settings.strengths):
            rows = slice(number * settings.seeds, (number + 1) * settings.seeds)
            line: Record = {"step": step, "arm": arm.name, "strength": strength, "seeds": settings.seeds}
            for name in ("imbalance", "gap", "gap_bound", "objective"):
                if name in measured:
                    line[name], line[f"{name}_low"], line[f"{name}_high"] = _spread(measured[name][rows])
            line["singular_values"] = measured["singular_values"][rows].quantile(0.5, dim=0).tolist()
            lines.append(line)
    return lines


def imbalance_rates(steps: Sequence[int], imbalances: Tensor, lr: float) -> Tensor | None:
    """The rate per step at which each problem's imbalance decays, from a line through its logarithm.

    Args:
        steps: of the evaluations.
        imbalances: shape (evaluations, problems).
        lr: decides the steps that count, `RATE_WINDOW`.

    Returns:
        Shape (problems,), or None without two evaluations in the window at which it is more than rounding.
    """
    import torch

    clear = (imbalances > 1e-11 * imbalances[0].clamp(min=1)).all(1).tolist()
    low, high = RATE_WINDOW
    used = [i for i, step in enumerate(steps) if clear[i] and low - 1e-9 <= step * lr <= high + 1e-9]
    if len(used) < 2:
        return None
    time = torch.tensor([float(steps[i]) for i in used], dtype=torch.float64, device=imbalances.device)
    time = time - time.mean()
    return -(time[:, None] * imbalances[used].log()).sum(0) / time.square().sum()


def deviations(arm: Arm, sigma: Tensor, values: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """How far singular values are from where the theory has them.

    Args:
        arm: with a penalty.
        sigma: of the problems, shape (seeds, n).
        values: of their targets, shape (seeds, n).
        strength: λ.

    Returns:
        Where they should be, shape (seeds, n); the largest distance of each problem from it, shape (seeds,), values at
        the threshold left out; and which values are at the threshold, shape (seeds, n). With more than two factors a
        value may stay at zero instead, and then the order is no guide: the distance is to the nearest place there is.
    """
    import torch

    from rankdecay.lab.factorised import shrunk

    penalty = arm.penalty
    assert penalty is not None
    expected = shrunk(values, torch.tensor(strength, dtype=values.dtype, device=values.device), penalty)
    at_threshold = (values - strength).abs() < 1e-6 if penalty == 2 and strength else torch.zeros_like(values).bool()
    if penalty > 2:
        places = torch.cat([expected, torch.zeros_like(expected[:, :1])], 1)  # (seeds, n + 1)
        distance = (sigma[:, :, None] - places[:, None, :]).abs().amin(-1)
    else:
        distance = (sigma - expected).abs()
    return expected, distance.masked_fill(at_threshold, 0).amax(-1), at_threshold


def summarise_arm(arm: Arm, outcome: Outcome, problems: Problems, settings: Factor) -> list[Record]:
    """The figures of one arm, one object per strength."""
    import torch

    from rankdecay.lab.factorised import borderline, duality_gap

    found = []
    imbalances = torch.stack([measured["imbalance"] for measured in outcome.measured])  # (evaluations, problems)
    certificate = duality_gap(outcome.W, problems.target, problems.strength, problems.mask)
    last = outcome.measured[-1]
    for number, strength in enumerate(settings.strengths):
        rows = slice(number * settings.seeds, (number + 1) * settings.seeds)
        sigma, values = last["singular_values"][rows], problems.values[rows]
        row: Record = {
            "name": arm.name,
            "strength": strength,
            "seeds": settings.seeds,
            "target": values.quantile(0.5, dim=0).tolist(),
            "singular_values": sigma.quantile(0.5, dim=0).tolist(),
            "singular_values_low": sigma.amin(0).tolist(),
            "singular_values_high": sigma.amax(0).tolist(),
            "rank": float((sigma > 0.01 * values[:, :1]).sum(1).double().quantile(0.5)),
            "steps": outcome.steps[-1],
            "expected": None,
            "deviation": None,
            "deviation_largest": None,
            "settled": None,
            "collapsed": None,
            "borderline": None,
        }
        if arm.penalty is not None and problems.mask is None:
            expected, distance, at_threshold = deviations(arm, sigma, values, strength)
            row["expected"] = expected.quantile(0.5, dim=0).tolist()
            row["deviation"], _, row["deviation_largest"] = _spread(distance)
            row["settled"] = int((distance < CLOSE * values[:, 0]).sum())
            if arm.penalty > 2:
                gone = (expected > 0).sum(1) - (sigma > 0.01 * values[:, :1]).sum(1)
                row["collapsed"] = float(gone.double().mean())
            if at_threshold.any() and arm.depth == 2:
                row["borderline"] = {
                    "largest": float(sigma[at_threshold].max()),
                    "predicted": borderline(settings.lr, outcome.steps[-1]),
                }
        if arm.penalty == 2:
            row["optimality_gap"], _, row["optimality_gap_largest"] = _spread(certificate[rows])
        if arm.depth > 1:
            row |= _balance(arm, outcome, imbalances[:, rows], last["gap"][rows], strength, settings)
        found.append(row)
    return found


def _balance(arm: Arm, outcome: Outcome, imbalances: Tensor, gaps: Tensor, strength: float, settings: Factor) -> Record:
    """How balanced the factors of one arm and strength are, and how fast they became so."""
    row: Record = {"imbalance_initial": _spread(imbalances[0])[0]}
    row["imbalance"], row["imbalance_low"], row["imbalance_high"] = _spread(imbalances[-1])
    row["gap"], row["gap_low"], row["gap_high"] = _spread(gaps)
    rates = imbalance_rates(outcome.steps, imbalances, settings.lr)
    row |= {"imbalance_rate": None, "imbalance_rate_low": None, "imbalance_rate_high": None}
    if rates is not None:
        row["imbalance_rate"], row["imbalance_rate_low"], row["imbalance_rate_high"] = _spread(rates)
    descent = arm.optimizer == "gd"
    row["predicted_rate"] = 2 * settings.lr * strength if descent else None  # of the flow
    row["predicted_rate_of_steps"] = -2 * math.log1p(-settings.lr * strength) if descent else None
    return row


def compare_with_solver(arm_rows: Sequence[Record], W: Tensor, problems: Problems, settings: Factor) -> None:
    """Adds what a convex solver says of the first seed at every strength, to arms whose penalty is the nuclear norm.

    Args:
        arm_rows: of `summarise_arm`, one per strength; changed.
        W: where the arm ended, shape (problems, n, n).
        problems: what it was trained on.
        settings: of the run.
    """
    import numpy as np

    from rankdecay.lab.convex import nuclear_fit

    for number, row in enumerate(arm_rows):
        index = number * settings.seeds
        target = problems.target[index].cpu().numpy()
        mask = None if problems.mask is None else problems.mask[index].cpu().numpy()
        optimum = nuclear_fit(target, row["strength"], mask)
        ended = W[index].cpu().numpy()
        missed = ended - target if mask is None else mask * (ended - target)
        value = 0.5 * (missed**2).sum() + row["strength"] * np.linalg.svd(ended, compute_uv=False).sum()
        row["solver"] = {
            "objective": optimum.objective,
            "excess": float(value - optimum.objective),
            "singular_values": np.linalg.svd(optimum.W, compute_uv=False).tolist(),
            # one strength of 0 leaves unobserved entries free, and the optimum is not unique
            "distance": float(np.abs(ended - optimum.W).max()) if row["strength"] or mask is None else None,
        }


# --- the command ---


def identity(settings: Factor) -> Record:
    """The settings that decide what a run computes."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IDENTITY}


class _Live:
    """A bar while it works in a terminal, otherwise a line per arm."""

    def __init__(self, title: str, work: int, *, quiet: bool, to_stderr: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._quiet = quiet
        self._console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._title = title
        self._task = self.bar.add_task(title, total=work)
        self._done, self._begun = 0, time.monotonic()

    def notice(self, text: str) -> None:
        """A line the user should see even with ``quiet``: it goes to standard error then."""
        if self._quiet:
            print(text, file=sys.stderr)
        else:
            self._console.print(text, markup=False, soft_wrap=True)

    def at(self, arm: Arm, step: int) -> None:
        """An arm got to a step."""
        self.bar.update(self._task, description=f"{self._title}  {arm.name}, step {step}", completed=self._done + step)

    def ended(self, arm: Arm, steps: int, budget: int) -> None:
        """An arm is finished; ``budget`` are the steps it might have taken."""
        self._done += budget
        if self.bar.disable and not self._quiet:
            self.notice(f"{arm.name:<10} {steps:>6} steps  {time.monotonic() - self._begun:5.1f} s")


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
    from rankdecay.lab.machine import describe_machine, resolve_device, versions
    from rankdecay.lab.report import write_report
    from rankdecay.lab.store import RunDirectory

    device = resolve_device(settings.device)
    arms = make_arms(settings)
    config = {
        "command": "factor",
        "settings": identity(settings),
        "arms": [dataclasses.asdict(arm) | {"penalty": arm.penalty} for arm in arms],
        "versions": versions(),
        "machine": describe_machine(device),
        "reproduce": command,
    }
    count = len(arms) * len(settings.strengths) * settings.seeds
    title = f"factor · {count:,} problems of {settings.size}×{settings.size} · {settings.steps} steps · {device}"
    live = _Live(title, len(arms) * settings.steps, quiet=settings.quiet, to_stderr=settings.json)
    with RunDirectory.open(settings.out, config, live.notice) as directory:
        if directory.summary is not None:
            live.notice(f"{settings.out} is complete: showing its result; for a new run give another --out")
            if not (settings.out / "report.html").exists():  # a kill came between the summary and the page
                write_report(settings.out)
            return directory.summary
        if live.bar.disable and not settings.quiet:
            live.notice(title)
        begun = time.monotonic()
        try:
            with live.bar:
                lines, found, arrays = _compute(settings, arms, device, live)
        except Diverged:
            (settings.out / "config.json").unlink()  # nothing was found: another --lr may have the directory
            raise
        directory.resume()  # an interrupted run may have left lines
        directory.append(lines)
        directory.save_snapshot(settings.steps, arrays)
        summary = {
            "command": "factor",
            "settings": identity(settings),
            **found,
            "wall_seconds": time.monotonic() - begun,
        }
        directory.finish(summary)
        write_report(settings.out)
    return summary


def _compute(
    settings: Factor, arms: Sequence[Arm], device: str, live: _Live
) -> tuple[list[Record], Record, dict[str, np.ndarray]]:
    """The lines of ``metrics.jsonl``, the arms and bounds of the summary, and the arrays of the last step."""
    import numpy as np

    from rankdecay.lab.convex import LARGEST

    problems = make_problems(settings, device)
    lines, rows, bounds = [], [], {}
    last: dict[str, list[np.ndarray]] = {"singular_values": [], "imbalance": [], "gap": []}
    for arm in arms:
        factors = initial_factors(settings, arm.depth, device)
        outcome = train(arm, problems, factors, settings, lambda step, arm=arm: live.at(arm, step))
        live.ended(arm, outcome.steps[-1], settings.steps)
        lines += records(arm, outcome, settings)
        found = summarise_arm(arm, outcome, problems, settings)
        if arm.penalty == 2 and settings.size <= LARGEST and arm.name in ("factors", "low_rank"):
            compare_with_solver(found, outcome.W, problems, settings)
        rows += found
        if arm.depth == 2:
            bounds[arm.name] = dataclasses.asdict(outcome.bound)
        for name, parts in last.items():
            parts.append(outcome.measured[-1][name].cpu().numpy())
    if settings.size > LARGEST and {"factors", "low_rank"} & {arm.name for arm in arms}:
        live.notice(f"the convex solver is for sizes up to {LARGEST}: optima are certified by duality alone")
    count = len(settings.strengths) * settings.seeds
    arrays = {
        "arms": np.repeat([arm.name for arm in arms], count),
        "strengths": np.tile(np.repeat(settings.strengths, settings.seeds), len(arms)),
        "seeds": np.tile(np.arange(settings.seeds), len(arms) * len(settings.strengths)),
        "target": np.tile(problems.values.cpu().numpy(), (len(arms), 1)),
    }
    arrays |= {name: np.concatenate(parts) for name, parts in last.items()}
    return lines, {"arms": rows, "bound": bounds}, arrays


def print_summary(summary: Record) -> None:
    """The table of a finished run, one line per arm, and what may be said of it."""
    from rich.console import Console
    from rich.table import Table

    from rankdecay.lab.report.factor.verdict import verdict

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
    outcome = verdict(summary)
    console.print(outcome.headline, markup=False)
    for lead, text in outcome.points:
        console.print(f"{lead}: {text}", markup=False)


def _most(rows: Sequence[Record], key: str) -> float | None:
    return max((row[key] for row in rows if row.get(key) is not None), default=None)


def _share(rows: Sequence[Record]) -> str:
    known = [row for row in rows if row["settled"] is not None]
    return f"{sum(row['settled'] for row in known) / sum(row['seeds'] for row in known):.1%}" if known else "—"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.1e}"
