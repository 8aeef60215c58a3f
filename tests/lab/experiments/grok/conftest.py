"""A small run directory in the format of docs/reference/run-directory.md, with made-up, deterministic numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ARMS = ["none", "l2", "l2_tuned", "low_rank", "prototype", "uniform_attention"]
DECAY = {"low_rank": 0.02, "prototype": 0.025, "l2": 0.0, "l2_tuned": 0.004, "none": 0.0}
TIME = {"low_rank": 400, "prototype": 380, "l2_tuned": 600}  # when an arm generalises
STEPS = 800


def write_run(
    directory: Path,
    arms: list[str] | None = None,
    *,
    seeds: int = 2,
    width: int = 16,
    every: int = 200,
    summary: bool = True,
    snapshots: bool = True,
) -> Path:
    """Write a run of `arms` × `seeds`."""
    arms = ARMS if arms is None else arms
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "task": "selection",
        "modulus": 31,
        "steps": STEPS,
        "seeds": seeds,
        "rule": "smooth",
        "threshold": 0.95,
    }
    config = {
        "command": "grok",
        "schema": 1,
        "settings": settings,
        "arms": [{"name": name, "description": f"The arm {name}.", "decay": DECAY.get(name)} for name in arms],
        "versions": {"rankdecay": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "machine": "a made-up machine, 2 threads",
    }
    (directory / "config.json").write_text(json.dumps(config))
    members = [(arm, seed) for arm in arms for seed in range(seeds)]
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(0, STEPS + 1, every):
            spectra = np.stack([_spectra(arm, seed, step, width) for arm, seed in members])
            for (arm, seed), values in zip(members, spectra, strict=True):
                file.write(json.dumps(_evaluation(arm, seed, step, values)) + "\n")
            if snapshots:
                _write_snapshot(directory / "snapshots", step, members, spectra)
    if summary:
        rows = [_row(arm, seeds, width) for arm in arms]
        result = {"command": "grok", "wall_seconds": 61.5, "settings": settings, "threshold": 0.95, "arms": rows}
        (directory / "summary.json").write_text(json.dumps(result))
    return directory


def _spectra(arm: str, seed: int, step: int, width: int) -> np.ndarray:
    """(layers 2, query and key, width): a quarter circle law that the arm's decay moves down."""
    if arm == "uniform_attention":
        return np.zeros((2, 2, width), dtype=np.float32)
    start = np.random.default_rng(seed).uniform(-1, 1, (2, 2, width, width)) / np.sqrt(width)
    values = np.linalg.svd(start, compute_uv=False)
    lost = DECAY.get(arm, 0.0) * np.minimum(step, 400) / 10
    held = np.maximum(values - lost, 1e-4 * values) if arm != "l2" else values * 0.9995**step
    held[..., :2] += 0.5 * step / STEPS
    return held.astype(np.float32)


def _accuracy(arm: str, seed: int, step: int) -> float:
    when = TIME.get(arm, 10_000) + 30 * seed
    return float(0.08 + 0.91 / (1 + np.exp(-(step - when + 60) / 40)))


def _evaluation(arm: str, seed: int, step: int, spectra: np.ndarray) -> dict[str, Any]:
    stable = np.array([(s**2).sum() / max(s[0] ** 2, 1e-30) for s in spectra.reshape(-1, spectra.shape[-1])])
    decayed = arm not in ("none", "uniform_attention")
    radial = None if not decayed else 1.0 if arm.startswith("l2") else 0.75 - 0.2 * step / STEPS
    return {
        "step": step,
        "arm": arm,
        "seed": seed,
        "train_accuracy": float(1 - 0.95 * np.exp(-step / 80)),
        "test_accuracy": _accuracy(arm, seed, step),
        "train_loss": float(3 * np.exp(-step / 80)),
        "test_loss": 1.0,
        "stable_rank": float(stable.mean()) if stable.any() else None,
        "effective_rank": float(1.6 * stable.mean()) if stable.any() else None,
        "product_stable_rank": float(0.5 * stable.mean()) if stable.any() else None,
        "product_effective_rank": float(0.8 * stable.mean()) if stable.any() else None,
        "query_norm": float(np.sqrt((spectra[:, 0] ** 2).sum(-1)).mean()),
        "key_norm": float(np.sqrt((spectra[:, 1] ** 2).sum(-1)).mean()),
        "rest_norm": 20.0,
        "decay_size": 0.01 if decayed else None,
        "radial_share": radial,
        "tangential_share": None if radial is None else 1 - radial,
        "seconds": step / 10,
    }


def _write_snapshot(directory: Path, step: int, members: list[tuple[str, int]], spectra: np.ndarray) -> None:
    directory.mkdir(exist_ok=True)
    groups = ["1st + 2nd", "1st + 3rd", "2nd + 4th"]
    positions = ["value 1", "value 2", "value 3", "value 4", "pair"]
    focus = np.array([[3, 3, 0, 0, 0], [3, 0, 3, 0, 0], [0, 3, 0, 3, 0]])
    maps = []
    for arm, seed in members:
        sharp = np.array([[0.5, 1.0], [0.2, 0.8]]) * step / STEPS * (0.0 if arm == "uniform_attention" else 1.0)
        score = sharp[:, :, None, None] * np.roll(focus, seed, axis=1)
        maps.append(np.exp(score) / np.exp(score).sum(-1, keepdims=True))
    np.savez(
        directory / f"{step:08d}.npz",
        arms=np.array([arm for arm, _ in members]),
        seeds=np.array([seed for _, seed in members]),
        singular_values=spectra,
        product=np.stack([spectra[:, :, 0, ::2] * spectra[:, :, 1, ::2]] * 2, axis=2),
        attention=np.stack(maps).astype(np.float32),
        groups=np.array(groups),
        positions=np.array(positions),
    )


def _row(arm: str, seeds: int, width: int) -> dict[str, Any]:
    steps = TIME.get(arm)
    last = _evaluation(arm, 0, STEPS, _spectra(arm, 0, STEPS, width))
    return {
        "name": arm,
        "seeds": seeds,
        "generalised": seeds if steps else 0,
        "steps_to_generalise": steps,
        "steps_to_generalise_by_seed": [steps] * seeds,
        "steps_per_second": 12.5,
    } | {key: last[key] for key in last if key not in ("arm", "seed", "step", "seconds")}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(arms, **options)` writes a run directory and returns its path."""

    def make(*args: Any, **kwargs: Any) -> Path:
        return write_run(tmp_path / "run", *args, **kwargs)

    return make
