"""Thousands of matrix fits at once: problems, training, measuring.

A problem is a target, a strength and a seed; all of one arm are a batch. What they are trained by is in
:mod:`factorised`, the settings in :mod:`settings`, the arms in :mod:`experiment`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from rankdecay.lab.convex import nuclear_fit
from rankdecay.lab.ensemble.outcome import Record
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.factor import factorised
from rankdecay.lab.experiments.factor.factorised import Factors, Method, Training
from rankdecay.lab.settings import seeds

if TYPE_CHECKING:
    from rankdecay.lab.experiment import Arm
    from rankdecay.lab.experiments.factor.settings import Factor

DIVERGED = 1e6  # times the size of the target
CLOSE = 1e-3  # of the theory, in units of the target's largest singular value: counts as settled
ROUNDING = 1e-12  # of a gap, per unit of the factors' squared norm
RATE_WINDOW = (2.0, 12.0)  # times ηt between which the decay of the imbalance is measured: steps 20 to 120 at lr 0.1


@dataclass(frozen=True)
class FactorTreatment:
    """Parametrisation and decay of the matrix by an arm.

    Attributes:
        depth: number of factors.
        optimizer: what takes the steps.
        decay: in the loss, beside the step, or as a soft threshold after it.
        penalty: L of the quasi-norm Σ σ^(2/L) that the decay amounts to; None where the theory names none.
    """

    depth: int = 2
    optimizer: Literal["gd", "momentum", "adam"] = "gd"
    decay: Literal["loss", "decoupled", "prox"] = "loss"
    penalty: int | None = field(init=False)

    def __post_init__(self) -> None:
        none = self.decay == "decoupled" and self.optimizer == "adam"
        object.__setattr__(self, "penalty", None if none else 2 if self.decay == "prox" else self.depth)


# --- the problems ---


@dataclass(frozen=True)
class Problems:
    """Problems that all arms are trained on: for each strength, every seed; the seed changes fastest."""

    target: Tensor  # (problems, n, n)
    strength: Tensor  # (problems,)
    mask: Tensor | None  # (problems, n, n), or None where everything is observed
    values: Tensor  # singular values of the targets, (problems, n)


def make_problems(settings: Factor, device: str) -> Problems:
    """The targets, strengths and masks; a seed fixes its target and its mask at every strength."""
    n, targets, masks = settings.size, [], []
    for seed in seeds(settings):
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
    n = settings.size
    scale = settings.scale * math.sqrt(5 / n)
    norm = 2 * math.sqrt(n) * scale  # about the spectral norm of a factor
    if depth > 2:  # curvature is about L ‖F‖^(2L - 2)
        scale *= (2 * norm**2 / depth) ** (1 / (2 * depth - 2)) / norm
    draws = []
    for seed in seeds(settings):
        rng = np.random.default_rng(seed)
        factors = [scale * rng.standard_normal((n, n)) for _ in range(max(2, depth))]
        factors[-1] = factors[-1].T
        draws.append([factors[0] @ factors[1]] if depth == 1 else factors)
    stacked = [torch.from_numpy(np.stack(factor)) for factor in zip(*draws, strict=True)]
    return [factor.repeat(len(settings.strengths), 1, 1).to(device) for factor in stacked]


# --- training and measuring ---


def measure(training: Training) -> dict[str, Tensor]:
    """Everything that is recorded of every problem: shape (problems,), and its singular values (problems, n)."""
    factors = training.factors
    sigma = torch.linalg.svdvals(factorised.product(factors))
    found = {
        "singular_values": sigma,
        "objective": factorised.objective(factors, training.target, training.strength, training.mask),
        "imbalance": factorised.imbalance(factors),
        "gap": factorised.gap(factors, sigma),
    }
    if len(factors) == 2:
        found["gap_bound"] = factorised.gap_bound(factors)
    return found


@dataclass
class Bound:
    """Proposition B.4 along a run: how near the gap came to its bound, and how often it was above."""

    checks: int = 0
    violations: int = 0
    largest_ratio: float = 0.0

    def see(self, factors: Factors) -> None:
        """Hold the gaps of some problems at one step against their bounds."""
        gaps, bounds = factorised.gap(factors), factorised.gap_bound(factors)
        rounding = ROUNDING * (factorised.squared_norm(factors[0]) + factorised.squared_norm(factors[1])).clamp(min=1)
        self.checks += gaps.numel()
        self.violations += int((gaps > bounds + rounding).sum())
        # where both are rounding errors their ratio says nothing
        self.largest_ratio = max(self.largest_ratio, float((gaps / bounds).where(bounds > 1e3 * rounding, 0.0).max()))


@dataclass
class Outcome:
    """Result of training one arm."""

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
    """Train every problem of an arm.

    The first seed of every strength is held against Proposition B.4 after every step, all seeds at every evaluation. A
    single matrix ends early, once it moves no more.

    Args:
        arm: optimizer, decay and depth.
        problems: the targets and strengths.
        factors: initial factors.
        settings: number of steps and learning rate.
        evaluated: told the step after every evaluation.

    Raises:
        Diverged: If the learning rate is too large.
    """
    method = Method(settings.lr, arm.how.optimizer, arm.how.decay)
    training = Training(factors, problems.target, problems.strength, method, problems.mask)
    outcome = Outcome([0], [measure(training)], Bound(), factorised.product(factors).clone())
    for step in range(1, settings.steps + 1):
        training.step()
        evaluate = step % settings.evaluate_every == 0 or step == settings.steps
        if not (evaluate or arm.how.depth == 2):
            continue
        W = factorised.product(training.factors).clone()
        _refuse_divergence(W, arm, step, factors, problems, method)
        if arm.how.depth == 2:
            outcome.bound.see([factor[:: 1 if evaluate else settings.seeds] for factor in training.factors])
        if not evaluate:
            continue
        outcome.steps.append(step)
        outcome.measured.append(measure(training))
        evaluated(step)
        moved = float((W - outcome.W).abs().max())
        outcome.W = W
        # a product can rest at a saddle for long, a matrix cannot
        if arm.how.depth == 1 and moved <= 1e-14 * float(problems.values.max()):
            break
    return outcome


def _refuse_divergence(W: Tensor, arm: Arm, step: int, begun: Factors, problems: Problems, method: Method) -> None:
    largest = DIVERGED * problems.values.amax(-1)
    lost = ~(W.abs().amax((-2, -1)) < largest)  # NaN is not below anything
    if lost.any():
        safe = 1 / float((factorised.curvature(begun) + problems.strength).max())
        digit = 10 ** math.floor(math.log10(safe))
        raise Diverged(
            f"--lr {method.lr:g} is too large: {int(lost.sum())} of {len(lost)} problems of the arm {arm.name} left "
            f"every bound by step {step}; at their beginning --lr {math.floor(safe / digit) * digit:g} is safe"
        )


# --- results ---


def _spread(name: str, values: Tensor | None) -> Record:
    """A figure's median, least and largest value, under its name; None where it is not known."""
    found = (None,) * 3 if values is None else (float(values.quantile(0.5)), float(values.min()), float(values.max()))
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def records(arm: Arm, outcome: Outcome, settings: Factor) -> list[Record]:
    """The lines of ``metrics.jsonl`` of one arm: one per strength and evaluation."""
    lines = []
    for step, measured in zip(outcome.steps, outcome.measured, strict=True):
        for number, strength in enumerate(settings.strengths):
            rows = slice(number * settings.seeds, (number + 1) * settings.seeds)
            line: Record = {"step": step, "arm": arm.name, "strength": strength, "seeds": settings.seeds}
            for name in ("imbalance", "gap", "gap_bound", "objective"):
                if name in measured:
                    line |= _spread(name, measured[name][rows])
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
    penalty = arm.how.penalty
    assert penalty is not None
    expected = factorised.shrunk(values, torch.tensor(strength, dtype=values.dtype, device=values.device), penalty)
    at_threshold = (values - strength).abs() < 1e-6 if penalty == 2 and strength else torch.zeros_like(values).bool()
    if penalty > 2:
        places = torch.cat([expected, torch.zeros_like(expected[:, :1])], 1)  # (seeds, n + 1)
        distance = (sigma[:, :, None] - places[:, None, :]).abs().amin(-1)
    else:
        distance = (sigma - expected).abs()
    return expected, distance.masked_fill(at_threshold, 0).amax(-1), at_threshold


def summarise_arm(arm: Arm, outcome: Outcome, problems: Problems, settings: Factor) -> list[Record]:
    """The figures of one arm, one object per strength."""
    found = []
    imbalances = torch.stack([measured["imbalance"] for measured in outcome.measured])  # (evaluations, problems)
    certificate = factorised.duality_gap(outcome.W, problems.target, problems.strength, problems.mask)
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
            **dict.fromkeys(("expected", "deviation", "deviation_largest", "settled", "collapsed", "borderline")),
        }
        if arm.how.penalty is not None and problems.mask is None:
            expected, distance, at_threshold = deviations(arm, sigma, values, strength)
            row["expected"] = expected.quantile(0.5, dim=0).tolist()
            row |= {"deviation": float(distance.quantile(0.5)), "deviation_largest": float(distance.max())}
            row["settled"] = int((distance < CLOSE * values[:, 0]).sum())
            if arm.how.penalty > 2:
                gone = (expected > 0).sum(1) - (sigma > 0.01 * values[:, :1]).sum(1)
                row["collapsed"] = float(gone.double().mean())
            if at_threshold.any() and arm.how.depth == 2:
                row["borderline"] = {
                    "largest": float(sigma[at_threshold].max()),
                    "predicted": factorised.borderline(settings.lr, outcome.steps[-1]),
                }
        if arm.how.penalty == 2:
            gaps = certificate[rows]
            row |= {"optimality_gap": float(gaps.quantile(0.5)), "optimality_gap_largest": float(gaps.max())}
        if arm.how.depth > 1:
            row |= _balance(arm, outcome, imbalances[:, rows], last["gap"][rows], strength, settings)
        found.append(row)
    return found


def _balance(arm: Arm, outcome: Outcome, imbalances: Tensor, gaps: Tensor, strength: float, settings: Factor) -> Record:
    """How balanced the factors of one arm and strength are, and how fast they became so."""
    descent = arm.how.optimizer == "gd"
    return {
        "imbalance_initial": float(imbalances[0].quantile(0.5)),
        **_spread("imbalance", imbalances[-1]),
        **_spread("gap", gaps),
        **_spread("imbalance_rate", imbalance_rates(outcome.steps, imbalances, settings.lr)),
        "predicted_rate": 2 * settings.lr * strength if descent else None,  # of the flow
        "predicted_rate_of_steps": -2 * math.log1p(-settings.lr * strength) if descent else None,
    }


def compare_with_solver(arm_rows: Sequence[Record], W: Tensor, problems: Problems, settings: Factor) -> None:
    """Add what a convex solver says of the first seed at every strength, to arms whose penalty is the nuclear norm.

    Args:
        arm_rows: of `summarise_arm`, one per strength; changed.
        W: where the arm ended, shape (problems, n, n).
        problems: what it was trained on.
        settings: of the run.
    """
    for number, row in enumerate(arm_rows):
        index = number * settings.seeds
        target = problems.target[index].cpu().numpy()
        mask = None if problems.mask is None else problems.mask[index].cpu().numpy()
        optimum = nuclear_fit(target, row["strength"], mask)
        ended = W[index].cpu().numpy()
        missed = (ended - target) * (1.0 if mask is None else mask)
        value = 0.5 * (missed**2).sum() + row["strength"] * np.linalg.svd(ended, compute_uv=False).sum()
        row["solver"] = {
            "objective": optimum.objective,
            "excess": float(value - optimum.objective),
            "singular_values": np.linalg.svd(optimum.W, compute_uv=False).tolist(),
            # one strength of 0 leaves unobserved entries free, and the optimum is not unique
            "distance": float(np.abs(ended - optimum.W).max()) if row["strength"] or mask is None else None,
        }
