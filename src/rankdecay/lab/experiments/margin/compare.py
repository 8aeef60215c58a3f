"""One arm of `rankdecay margin`: the flow of many data sets, the SVMs of the tokens it selected, and the figures.

Which tokens are selected is known only at the end, so weights are kept along the way and measured afterwards. What
cannot be said of a data set is NaN here, None in files, counted, and left out of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from rankdecay.lab.experiments.margin import finite
from rankdecay.lab.experiments.margin.data import DataSets, differences
from rankdecay.lab.experiments.margin.flow import Course, Decay, Problem, Trajectory, follow, initial_weights
from rankdecay.lab.experiments.margin.measures import climb, margins, measure, selected_tokens
from rankdecay.lab.experiments.margin.recipe import descend
from rankdecay.lab.experiments.margin.svm import Norm, Solution, max_margin, separable
from rankdecay.lab.report.words import mean
from rankdecay.lab.settings import Record, subset

if TYPE_CHECKING:
    from torch import Tensor

    from rankdecay.lab.experiment import Arm
    from rankdecay.lab.experiments.margin.settings import Margin

FAMILIES = {"merged": "full", "separate": "full", "diagonal": "diagonal"}  # of matrices, by kind of weights
DIGITS = 6  # of what is recorded
SUPPORT = 1e-3  # above a score of one: what a solver leaves of an example that holds the max-margin head
AT = ("cosine_nuclear", "cosine_frobenius", "nuclear_excess", "frobenius_excess", "effective_rank", "alignment")
PAIRED = ("cosine_nuclear", "nuclear_excess")  # of which arms are compared data set by data set at equal margins
OF_HEADS = ("cosine_head", "head_norm", "supports")


class Solver:
    """The SVMs of some data sets, each solved once.

    Args:
        data: the data sets.
    """

    def __init__(self, data: DataSets) -> None:
        self._data = data
        self._found: dict[tuple[object, ...], Solution | None] = {}

    def constraints(self, family: str, which: int, selected: np.ndarray) -> np.ndarray:
        """Those of one data set with some tokens selected."""
        found = differences(self._data, which, selected)
        return np.diagonal(found, axis1=1, axis2=2) if family == "diagonal" else found

    def separable(self, family: str) -> list[int]:
        """The data sets whose optimal tokens can all be selected."""
        best = self._data.optimal
        return [which for which in range(len(best)) if separable(self.constraints(family, which, best[which]))]

    def head(self, which: int, selected: np.ndarray) -> tuple[np.ndarray, int] | None:
        """The value head of least norm under which every selected token scores at least one, and how many score one.

        None where no head does.
        """
        chosen = self._data.tokens[which][np.arange(len(selected)), selected] * self._data.labels[which][:, None]
        found = max_margin(chosen, "frobenius")
        if found is None:
            return None
        head = np.diag(found.W)
        return head, int((chosen @ head < 1 + SUPPORT).sum())

    def solution(self, family: str, which: int, selected: np.ndarray, norm: Norm) -> Solution | None:
        """The SVM of one data set for the selected tokens; None where they cannot be separated."""
        key = (family, which, tuple(selected.tolist()), norm)
        if key not in self._found:
            self._found[key] = max_margin(self.constraints(family, which, selected), norm)
        return self._found[key]


@dataclass(frozen=True)
class Outcome:
    """Result of training one arm."""

    sets: list[int]  # those that took part
    steps: list[int]
    weights: Tensor  # (evaluations, sets, d, d)
    selected: Tensor  # (sets, n)
    optimal: Tensor  # under the value heads at the end, (sets, n)
    solutions: dict[Norm, list[Solution | None]]
    decided: np.ndarray  # whether tokens are selected at all, (sets,)
    measured: list[dict[str, np.ndarray]]  # per evaluation


def train(
    arm: Arm, data: DataSets, sets: Sequence[int], settings: Margin, device: str, evaluated: Callable[[int], None]
) -> Trajectory:
    """Follow the flow of an arm, or its recipe, on some data sets."""
    problem = Problem.of(data.only(sets), device)
    d = data.tokens.shape[-1]
    drawn = [settings.first_seed + which for which in sets]
    weights = initial_weights(arm.how.kind, settings.init, settings.scale, drawn, d, settings.inner or d, device)
    if arm.how.recipe:
        shared = subset(settings, "loss", "evaluate_every")
        return descend(weights, problem, strength=settings.l2 if arm.how.decay else 0.0, evaluated=evaluated, **shared)
    course = Course(**subset(settings, "loss", "steps", "margin", "evaluate_every"))
    if arm.how.finite:
        method = finite.Method(arm.how.finite, **subset(settings, "lr", "beta2", "epsilon"))
        return finite.descend(weights, problem, method, course, evaluated)
    decay = Decay(arm.how.decay, settings.l2) if arm.how.decay else None
    heads = torch.from_numpy(data.heads[list(sets)]).to(device) if arm.how.head else None
    return follow(weights, problem, course, decay=decay, rate=settings.rate, heads=heads, evaluated=evaluated)


def compare(
    arm: Arm, trajectory: Trajectory, solver: Solver, data: DataSets, sets: Sequence[int], loss: str
) -> Outcome:
    """Measure a trajectory against the SVMs of the tokens selected at its end."""
    problem = Problem.of(data.only(sets), str(trajectory.weights.device))
    last = trajectory.weights[-1]
    selected = selected_tokens(problem, last)
    decided = (margins(problem, last, selected) > 0).cpu().numpy()
    family = FAMILIES[arm.how.kind]
    chosen = selected.cpu().numpy()
    solutions: dict[Norm, list[Solution | None]] = {
        norm: [
            solver.solution(family, which, chosen[number], norm) if decided[number] else None
            for number, which in enumerate(sets)
        ]
        for norm in get_args(Norm)
    }
    measured = []
    for number, W in enumerate(trajectory.weights):
        if trajectory.heads is not None:
            problem = problem.with_heads(trajectory.heads[number])
        figures = measure(problem, W, selected, solutions, loss)  # pyright: ignore[reportArgumentType]
        measured.append({name: value.cpu().numpy() for name, value in figures.items()})
    if trajectory.heads is not None:
        best = [solver.head(which, chosen[number]) for number, which in enumerate(sets)]
        for figures, heads in zip(measured, trajectory.heads.cpu().numpy(), strict=True):
            figures |= _of_heads(heads, best)
    best = problem.scores.argmax(-1)
    return Outcome(list(sets), trajectory.steps, trajectory.weights, selected, best, solutions, decided, measured)


def _of_heads(heads: np.ndarray, best: Sequence[tuple[np.ndarray, int] | None]) -> dict[str, np.ndarray]:
    """How large value heads are, their cosines to the max-margin heads, and how many examples hold those."""
    size = np.linalg.norm(heads, axis=1)
    found = {"head_norm": size, "cosine_head": np.full(len(size), np.nan), "supports": np.full(len(size), np.nan)}
    for number, one in enumerate(best):
        if one is not None:
            cosine = heads[number] @ one[0] / size[number] / np.linalg.norm(one[0])
            found["cosine_head"][number], found["supports"][number] = cosine, one[1]
    return found


# --- what is written ---


def plain(values: np.ndarray) -> Any:
    """Arrays as JSON has them: a few digits, and None for what is not a finite number."""
    if values.ndim:
        return [plain(part) for part in values]
    return float(f"{values:.{DIGITS}g}") if np.isfinite(values) else None


def records(arm: Arm, outcome: Outcome) -> list[Record]:
    """The lines of ``metrics.jsonl`` of one arm: one per evaluation, a list over data sets per measure."""
    return [
        {"step": step, "arm": arm.name, "datasets": outcome.sets} | {name: plain(v) for name, v in measured.items()}
        for step, measured in zip(outcome.steps, outcome.measured, strict=True)
    ]


def at_margins(outcome: Outcome, target: float) -> list[Record]:
    """The means over data sets when their margins were 1, 10, 100, …

    Between two evaluations values are interpolated in the logarithm of the margin. A data set that has not come so far
    is left out, and `datasets` counts the others.
    """
    margin = np.stack([measured["margin"] for measured in outcome.measured])  # (evaluations, sets)
    rows = []
    for exponent in range(int(np.floor(np.log10(target) + 1e-9)) + 1):
        found: dict[str, list[float]] = {name: [] for name in AT}
        sets: list[int] = []
        for number in range(margin.shape[1]):
            path = climb(margin[:, number])
            x = np.log10(margin[path, number])
            if not x.size or not x[0] <= exponent <= x.max() + 1e-2:
                continue
            sets.append(outcome.sets[number])
            for name in AT:
                y = np.array([measured[name][number] for measured in outcome.measured])[path]
                found[name].append(float(np.interp(exponent, np.maximum.accumulate(x), y)))
        if found[AT[0]]:
            row: Record = {"margin": 10.0**exponent, "datasets": len(found[AT[0]])}
            row |= {name: mean(values) for name, values in found.items()}
            rows.append(row | {"sets": sets, "each": {name: plain(np.array(found[name])) for name in PAIRED}})
    return rows


def summarise(arm: Arm, outcome: Outcome, data: DataSets, settings: Margin) -> Record:
    """The figures of one arm: means over its data sets at the end, and each data set's cosines."""
    last, seeds = outcome.measured[-1], len(outcome.sets)
    optimal = (outcome.selected == outcome.optimal).cpu().numpy()
    nuclear, frobenius = outcome.solutions["nuclear"], outcome.solutions["frobenius"]
    limit = settings.inner or data.tokens.shape[-1] if arm.how.kind == "separate" else np.inf
    short = [which for which, one in zip(outcome.sets, nuclear, strict=True) if one and one.rank > limit]
    unsolved = np.array([one is None for one in nuclear])
    row: Record = {
        "name": arm.name,
        "seeds": seeds,
        "datasets": outcome.sets,
        "steps": outcome.steps[-1],
        "reached": int((last["margin"] >= 0.9 * settings.margin).sum()),
        "undecided": int((~outcome.decided).sum()),
        "infeasible": int((unsolved & outcome.decided).sum()),
        "optimal": float(optimal.mean()),
        "all_optimal": int(optimal.all(1).sum()),
        "rank_short": short,
        "rank_nuclear": mean(one.rank for one in nuclear if one),
        "rank_frobenius": mean(one.rank for one in frobenius if one),
        "cosine_between": mean(
            float((one.W * other.W).sum() / np.linalg.norm(one.W) / np.linalg.norm(other.W))
            for one, other in zip(nuclear, frobenius, strict=True)
            if one and other
        ),
        "nearer_nuclear": int((last["cosine_nuclear"] > last["cosine_frobenius"]).sum()),
        "margin_least": mean([last["margin"].min()]),
        "margin": float(np.median(last["margin"])),
        "each": {name: plain(last[name]) for name in (*AT, "margin", *OF_HEADS) if name in last},
        "at": at_margins(outcome, settings.margin),
    }
    scalars = (name for name, value in last.items() if value.ndim == 1 and name not in row)
    row |= {name: mean(last[name]) for name in scalars}
    for norm in get_args(Norm):
        row[f"cosine_{norm}_least"] = min(filter(np.isfinite, last[f"cosine_{norm}"].tolist()), default=None)
    return row


def arrays(arm: Arm, outcome: Outcome) -> dict[str, np.ndarray]:
    """Arrays for a picture of an arm: its weights through time, the tokens selected and both solutions."""
    unknown = np.full(outcome.weights.shape[2:], np.nan)
    found = {
        "datasets": np.array(outcome.sets),
        "steps": np.array(outcome.steps),
        "weights": outcome.weights.cpu().numpy(),
        "selected": outcome.selected.cpu().numpy(),
        **{norm: np.stack([one.W if one else unknown for one in of]) for norm, of in outcome.solutions.items()},
    }
    return {f"{arm.name}_{name}": array for name, array in found.items()}
