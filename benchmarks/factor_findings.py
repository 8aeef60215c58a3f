"""The numbers on `rankdecay factor` in `docs/findings`: the tables of stored summaries, and what a run does not print.

    python benchmarks/factor_findings.py store runs/factor docs/data/factor/standard
    python benchmarks/factor_findings.py strengths docs/data/factor/standard        # a line per arm and strength
    python benchmarks/factor_findings.py beside --json docs/data/factor/beside.json # about two minutes on one core

Stored are the settings and the summary, which has medians over the seeds and the largest deviation.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import stored
import torch
from torch import Tensor

from rankdecay.lab.experiments.factor.factorised import Factors, Method, Training, imbalance, product, shrunk
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.store import read_json

TARGET = torch.diag(torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))
VALUES = torch.linalg.svdvals(TARGET)
Row = dict[str, Any]


# --- what a run prints ---


def strengths(options: argparse.Namespace) -> None:
    """A Markdown line per arm and strength."""
    for directory in options.directories:
        summary = read_json(directory / "summary.json") or {"arms": []}
        print("| arm | λ | rank | at the soft threshold | largest deviation | above the optimum | "
              "imbalance left | its rate | −2 ln(1 − ηλ) |\n" + "|---|" + "--:|" * 8)  # fmt: skip
        for row in summary["arms"]:
            if options.arms and row["name"] not in options.arms:
                continue
            settled = "—" if row["settled"] is None else f"{row['settled']} of {row['seeds']}"
            left = _ratio(row.get("imbalance"), row.get("imbalance_initial"))
            shown = [row["name"], f"{row['strength']:g}", f"{row['rank']:g}", settled]
            shown += [_short(row.get("deviation_largest")), _short(row.get("optimality_gap")), left]
            shown += [_short(row.get(key), ".4g") for key in ("imbalance_rate", "predicted_rate_of_steps")]
            print(f"| {' | '.join(shown)} |")


def _short(value: float | None, form: str = ".1e") -> str:
    return "—" if value is None else format(value, form)


def _ratio(value: float | None, of: float | None) -> str:
    return "—" if value is None or not of else f"{value / of:.2g}"


# --- what it does not ---


def start(strengths: Sequence[float], seeds: Sequence[int]) -> tuple[Factors, Tensor]:
    """Half of standard normal 5×5 factors of every seed, repeated for every strength; and the strengths."""
    draws = [
        [0.5 * generator.standard_normal((5, 5)) for _ in range(2)] for generator in map(np.random.default_rng, seeds)
    ]
    factors = [torch.from_numpy(np.stack([A for A, _ in draws])), torch.from_numpy(np.stack([B.T for _, B in draws]))]
    repeated = [factor.repeat(len(strengths), 1, 1) for factor in factors]
    return repeated, torch.tensor(strengths, dtype=torch.float64).repeat_interleave(len(seeds))


def distance(training: Training, strengths: Tensor) -> Tensor:
    """The largest deviation of a problem's singular values from the soft threshold."""
    sigma = torch.linalg.svdvals(product(training.factors))
    return (sigma - shrunk(VALUES, strengths[:, None], 2)).abs().amax(-1)


def conserved() -> list[Row]:
    """Imbalance of seed 0 without decay, at three rates."""
    rows = []
    for lr, steps in ((0.1, 1000), (0.01, 2000), (0.001, 20_000)):
        factors, none = start([0.0], [0])
        training = Training(factors, TARGET, none, Method(lr))
        for _ in range(steps):
            training.step()
        rows.append({"rate": lr, "steps": steps, "before": imbalance(factors).item()})
        rows[-1]["after"] = imbalance(training.factors).item()
    return rows


def late_adam() -> list[Row]:
    """Adam with L2 in the loss, at step 1000 and at 6000: 150 problems, three strengths."""
    rows = []
    for lr in (0.1, 0.03):
        factors, some = start([0.1, 0.3, 0.5], range(50))
        training = Training(factors, TARGET, some, Method(lr, "adam"))
        furthest = torch.zeros(150, dtype=torch.float64)
        for step in range(1, 6001):
            training.step()
            if step % 50 == 0 and step > 1000:
                furthest = torch.maximum(furthest, distance(training, some))
            if step in (1000, 6000):
                off = distance(training, some)
                near = (off < 1e-3).double().mean().item()
                rows.append({"rate": lr, "step": step, "within_1e-3": near, "worst": off.max().item()})
        rows[-1] |= {"were_beyond_1e-2": int((furthest > 1e-2).sum()), "furthest": furthest.max().item()}
    return rows


def decoupled_floor() -> list[Row]:
    """AdamW at two rates: the share of the imbalance that is left, and the singular values."""
    rows = []
    for lr, steps in ((0.1, 2500), (0.01, 25_000)):
        factors, some = start([0.05, 0.4], range(50))
        training = Training(factors, TARGET, some, Method(lr, "adam", "decoupled"))
        begun = imbalance(factors)
        for _ in range(steps):
            training.step()
        share = (imbalance(training.factors) / begun).view(2, 50).median(1).values.tolist()
        sigma = torch.linalg.svdvals(product(training.factors)).view(2, 50, 5).median(1).values.tolist()
        rows.append({"rate": lr, "steps": steps, "strengths": [0.05, 0.4], "left": share, "singular_values": sigma})
    return rows


def large_epsilon() -> list[Row]:
    """AdamW with ε far above the gradients: how far it ends from the soft threshold of λε."""
    factors, some = start([0.01, 0.03], range(20))
    training = Training(factors, TARGET, some, Method(1.0, "adam", "decoupled", epsilon=10.0))
    for _ in range(3000):
        training.step()
    return [{"strengths": [0.01, 0.03], "off": distance(training, 10 * some).view(2, 20).amax(1).tolist()}]


def damped_momentum() -> list[Row]:
    """Momentum with decoupled decay: the largest imbalance of 100 problems."""
    factors, some = start([0.1, 0.4], range(50))
    training = Training(factors, TARGET, some, Method(0.1, "momentum", "decoupled"))
    for _ in range(1500):
        training.step()
    return [{"strengths": [0.1, 0.4], "largest_imbalance": imbalance(training.factors).max().item()}]


PARTS = (conserved, late_adam, decoupled_floor, large_epsilon, damped_momentum)


def beside(path: Path) -> None:
    """Runs every part and writes what it found."""
    torch.set_num_threads(1)
    document: Row = {"machine": describe_machine("cpu"), "versions": versions()}
    document |= {part.__name__: part() for part in PARTS}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="*")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one of the commands above."""
    stored.command_line(__doc__, stored.store, {"strengths": strengths}, _options, arguments, {"beside": beside})


if __name__ == "__main__":
    main()
