"""A made-up sweep (docs/reference/run-directory.md): per arm and strength, a logistic in the share of the data."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rankdecay.lab.experiments.boundary.statistics import reference, summarise

# Per arm: the share of the data at the best strength, the best strength, and the stable rank it ends at.
ARMS: dict[str, tuple[float, float, float]] = {
    "none": (0.62, 0.0, 22.0),
    "l2": (0.4, 0.3, 14.0),
    "prox": (0.24, 0.1, 1.6),
    "smooth": (0.26, 0.1, 2.2),
    "prototype": (0.31, 0.03, 2.8),
    "radial_only": (0.55, 0.1, 21.0),
    "tangential_only": (0.25, 0.1, 1.8),
    "raise_rank": (0.9, 1.0, 40.0),
    "sphere_low_rank": (0.28, 1.0, 1.9),
    "uniform_attention": (0.45, 0.0, 1.0),
}
CONTROLS = {
    "none": "Whether the queries and keys need any decay.",
    "uniform_attention": "Whether switching attention off does as well.",
    "radial_only": "Whether the norm alone explains the effect.",
}
WITHOUT_STRENGTH = ("none", "uniform_attention")
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
FRACTIONS = (0.15, 0.2, 0.27, 0.36, 0.48)
BUDGET = 4000
EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


def write_sweep(
    directory: Path,
    arms: Sequence[str] = tuple(ARMS),
    *,
    strengths: Sequence[float] = STRENGTHS,
    fractions: Sequence[float] = FRACTIONS,
    rest_decays: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0, 1, 2),
    evaluations: int = 21,
    summary: bool = True,
    task: str = "add",
    settings: dict[str, Any] | None = None,
    boundaries: dict[str, float] | None = None,
) -> Path:
    """Write a sweep; `settings` are further settings, `boundaries` override an arm's share of the data."""
    directory.mkdir(parents=True, exist_ok=True)
    every = {
        "task": task, "arms": list(arms), "strengths": list(strengths), "fractions": list(fractions),
        "rest_decays": list(rest_decays), "seeds": len(seeds), "steps": BUDGET, "threshold": 0.99, **(settings or {}),
    }  # fmt: skip
    grid = ("arms", "fractions", "strengths", "rest_decays", "seeds")
    config = {
        "command": "boundary",
        "schema": 1,
        "fixed": {name: value for name, value in every.items() if name not in grid},
        "settings": every,
        "arms": [{"name": a, "description": f"The arm {a}.", "control": CONTROLS.get(a)} for a in arms],
        "versions": {"rankdecay": "0.1.0", "torch": "2.13.0"},
        "machine": "a made-up machine",
        "reproduce": f"rankdecay boundary --task {task} --out {directory.name}",
    }
    (directory / "config.json").write_text(json.dumps(config))
    rows = [
        made_up_run(arm, strength, rest, fraction, seed, evaluations, (boundaries or {}).get(arm))
        for arm in arms
        for strength in ((0.0,) if arm in WITHOUT_STRENGTH else strengths)
        for rest in rest_decays
        for fraction in fractions
        for seed in seeds
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        result = {"command": "boundary", "settings": every, "threshold": 0.99, "wall_seconds": 100.0}
        result |= summarise(rows, list(arms), reference(arms))
        (directory / "summary.json").write_text(json.dumps(result))
    return directory


def made_up_run(
    arm: str, strength: float, rest: float, fraction: float, seed: int, evaluations: int, boundary: float | None = None
) -> dict[str, Any]:
    """One finished run."""
    lowest, best, rank = ARMS.get(arm, (0.3, 0.1, 5.0))
    lowest = boundary or lowest
    draw = random.Random(f"{arm} {strength} {rest} {fraction} {seed}")
    off = math.log(strength / best) if strength else 0.0
    f50 = lowest * (1 + 0.06 * off * off) * (1 + 0.1 * abs(rest - 1.0))
    chance = 1 / (1 + math.exp(-math.log(fraction / f50) / 0.08))
    diverged = strength >= 1.0 and arm == "l2" and draw.random() < 0.3
    generalised = not diverged and draw.random() < chance
    takes = int(min(BUDGET - 200, 500 * (f50 / fraction) ** 2 * draw.uniform(0.7, 1.4) + 200)) if generalised else None
    final_rank = 1 + (rank - 1) * draw.uniform(0.9, 1.1) * (1 if abs(off) < 1 or not strength else 1.5)
    last = min(BUDGET, 2 * takes) if takes else BUDGET
    steps = [round(last * i / (evaluations - 1)) for i in range(evaluations)]
    middle = takes or 10 * BUDGET
    test = [0.02 + 0.978 / (1 + math.exp(-(step - 0.85 * middle) / (0.04 * middle))) for step in steps]
    if not generalised:
        test = [0.02 + 0.3 * chance * step / BUDGET + 0.01 * draw.random() for step in steps]
    ranks = [final_rank + (24 - final_rank) * math.exp(-3 * step / (0.8 * (takes or BUDGET))) for step in steps]
    spectrum = [math.exp(-i / max(0.5, final_rank)) for i in range(32)]
    memorised = next((s for s in steps if s > 150), None)
    return {
        "arm": arm, "strength": strength, "rest_decay": rest, "train_fraction": fraction,
        "train_examples": round(fraction * 1_000_000), "seed": seed,
        "outcome": "generalised" if generalised else "diverged" if diverged else "budget",
        "steps_to_generalise": takes, "steps": last, "budget": BUDGET,
        "test_accuracy": None if diverged else test[-1], "best_test_accuracy": max(test),
        "train_accuracy": 1.0, "stable_rank": None if diverged else ranks[-1], "effective_rank": 1.5 * ranks[-1],
        "product_stable_rank": 0.6 * ranks[-1], "product_effective_rank": ranks[-1], "query_norm": 8.0, "key_norm": 8.0,
        "angular_step": 0.001, "tangential_share": 0.4 if strength else None, "memorised_at": memorised,
        "rank_fell_at": next((s for s, r in zip(steps, ranks, strict=True) if r < 12), None),
        "accuracy_rose_at": next((s for s, t in zip(steps, test, strict=True) if t > 0.5), None),
        "curve": {
            "step": steps, "train_accuracy": [1 - 0.95 * math.exp(-s / 80) for s in steps], "test_accuracy": test,
            "stable_rank": ranks, "query_norm": [8 + 4 * math.exp(-s / 500) for s in steps],
        },
        "spectrum": spectrum, "spectrum_index": list(range(1, 33)), "seconds": 3.5,
    }  # fmt: skip


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., Path]:
    """`make_sweep(arms, name="sweep", **options)` writes a sweep and returns its directory."""

    def make(*args: Any, name: str = "sweep", **kwargs: Any) -> Path:
        return write_sweep(tmp_path / name, *args, **kwargs)

    return make


@pytest.fixture(scope="module")
def shared_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sweep for the tests of a module, with an arm whose name is markup."""
    arms = ["none", "l2", "prox", "smooth", EVIL]
    return write_sweep(tmp_path_factory.mktemp("boundary") / "sweep", arms, rest_decays=(0.5, 1.0))
