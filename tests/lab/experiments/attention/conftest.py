"""Made-up experiments as docs/reference/run-directory.md has them, deterministic; and one that was trained."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from rankdecay.lab.experiment import run
from rankdecay.lab.experiments.attention.runs import Command
from rankdecay.lab.experiments.attention.runs import make_experiment as experiment_of
from rankdecay.lab.experiments.attention.settings import AttentionDecay
from rankdecay.lab.experiments.attention.summary import summarise
from rankdecay.lab.session.gpt import GPT, GPTConfig
from rankdecay.lab.session.session import summarise_losses

EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"
UNITS = {"recall": "sequences", "language": "tokens", "vision": "images"}
STRENGTHS = {"l2": (0.0, 0.1, 1.0, 10.0), "low_rank": (0.1, 1.0, 10.0)}


def write_experiment(
    directory: Path,
    arms: Sequence[str] = ("l2", "low_rank"),
    *,
    command: str = "language",
    strengths: dict[str, tuple[float, ...]] | None = None,
    mlp_decays: Sequence[float | None] = (0.1,),
    norms: Sequence[bool] = (False,),
    seeds: int = 2,
    layers: int = 3,
    steps: Sequence[int] = (0, 50, 100, 150, 200),
    accuracy: bool = True,
    diverged: Sequence[tuple[str, float, int]] = (),
    runs: int | None = None,
    summary: bool = True,
) -> Path:
    """Writes an experiment; `diverged` are arm, strength and seed, and only the first `runs` runs have ended."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "command": command,
        "schema": 1,
        "settings": {"arms": list(arms), "mlp_decays": list(mlp_decays), "seeds": seeds, "steps": steps[-1]},
        "arms": [{"name": name, "description": f"The arm {name}."} for name in arms],
        "versions": {"rankdecay": "0.1.0", "torch": "2.13.0"},
        "machine": "a made-up machine",
        "reproduce": f"rankdecay {command} --steps {steps[-1]}",
    }
    (directory / "config.json").write_text(json.dumps(config))
    keys = [
        {"arm": arm, "strength": strength, "mlp_decay": mlp, "qk_norm": norm, "seed": seed}
        for seed in range(seeds)
        for norm in norms
        for arm in arms
        for mlp in mlp_decays
        for strength in (strengths or STRENGTHS).get(arm, (0.1, 1.0))
    ]
    records: list[dict[str, Any]] = []
    for number, key in enumerate(keys[:runs]):
        lost = (key["arm"], key["strength"], key["seed"]) in diverged
        rows = [evaluation(key, step, layers, accuracy, UNITS[command]) for step in (steps[:2] if lost else steps)]
        if lost:
            rows.append({**key, "step": steps[1] + 7, "diverged": True})
        is_under_way = runs is not None and number == runs - 1
        records += rows[:-1] if is_under_way else [*rows[:-1], rows[-1] | {"ended": True}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    (directory / "summary.json").unlink(missing_ok=True)
    if summary and runs is None:
        result = {"command": command, "settings": config["settings"], "unit": UNITS[command], "wall_seconds": 321.0}
        (directory / "summary.json").write_text(json.dumps(result | {"arms": summarise(records, UNITS[command])}))
    return directory


def evaluation(key: dict[str, Any], step: int, layers: int, accuracy: bool, unit: str) -> dict[str, Any]:
    """One line: the rank falls with the decay, the loss is least at strength 1 and with an MLP decay of 0.1."""
    strength, is_low_rank = key["strength"], key["arm"] != "l2"
    share = 1 - math.exp(-step / 60)
    pull = math.log1p(10 * strength) * (1.4 if is_low_rank else 1.0)
    off = (math.log10(strength) if strength else -1.5) ** 2 + (math.log10((key["mlp_decay"] or 0.1) * 10)) ** 2
    loss = 6 - share * (2.6 - 0.02 * off) + 0.003 * key["seed"] + (0.01 if key["qk_norm"] else 0.0)
    found = []
    for layer in range(layers):
        sizes = {"query_key": 0.88, "value_output": 0.9, "query": 0.94, "key": 0.93}
        if key["qk_norm"]:
            del sizes["query_key"]
        parts = {}
        for part, start in sizes.items():
            weak = 0.2 if part == "value_output" and is_low_rank else 1.0
            weak *= 0.1 if key["qk_norm"] and part in ("query", "key") and not is_low_rank else 1.0
            rank = start * math.exp(-share * (0.1 + weak * 0.3 * pull) * (1 + 0.05 * layer))
            values = {
                "pseudo_rank": rank,
                "effective_rank": 1 + 30 * rank,
                "stable_rank": 1 + 8 * rank,
                "nuclear_norm": 5,
            }
            if part in ("query_key", "value_output"):
                values |= {
                    "imbalance": 0.4 * math.exp(-share * strength),
                    "nuclear_gap": 1e-3 * math.exp(-strength * share),
                }
            parts[part] = {name: float(f"{value:.6g}") for name, value in values.items()}
            parts[part] |= {f"{name}_min": value * 0.9 for name, value in parts[part].items()}
        found.append(parts)
    return {
        **key,
        "step": step,
        unit: 1000 * step,
        "seconds": step / (40 if is_low_rank else 50),
        "train_loss": loss - 0.1 if step else None,
        "loss": loss,
        "loss_error": 0.004,
        "accuracy": (6 - loss) / 6 if accuracy else None,
        "layers": found,
        "wall": float(step),
    }


@pytest.fixture
def make_experiment(tmp_path: Path) -> Callable[..., Path]:
    """`make_experiment(arms, **options)` writes a directory and returns its path."""
    return lambda *args, **options: write_experiment(tmp_path / "run", *args, **options)


class Copying:
    """Sequences whose second half repeats the first."""

    unit = "tokens"

    def model(self, seed, qk_norm):
        return GPT(GPTConfig(32, 16, 16, 2, 2, 32, qk_norm=qk_norm), seed)

    def batch(self, seed, step, size):
        half = torch.randint(32, (size, 6), generator=torch.Generator().manual_seed(1000 * step + seed))
        return (torch.cat([half, half], 1),)

    def size(self, batch):
        return batch[0].numel()

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def evaluate(self, model, device):
        return summarise_losses([self.loss(model, self.batch(999, i, 4)).item() for i in range(3)], 0.5)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny experiment of the real code, with and without QK-norm and with two decays of the MLPs."""
    out = tmp_path_factory.mktemp("attention") / "run"
    settings = AttentionDecay(
        strengths=("l2=0,10", "low_rank=10"), mlp_decays=(0.0, 0.1), qk_norm="both", steps=4, evaluate_every=2,
        warmup=1, batch_size=4, lr=1e-2, out=out, device="cpu", quiet=True,
    )  # fmt: skip
    experiment = experiment_of(Command("language", {"default": settings}, lambda s: s, lambda s: Copying(), "tokens"))
    run(experiment, settings, "rankdecay language")
    return out
