"""The numbers on `rankdecay factor` in `docs/findings`: the tables of stored summaries, and what a run does not print.

    python benchmarks/factor_findings.py store runs/factor docs/data/factor/standard
    python benchmarks/factor_findings.py strengths docs/data/factor/standard        # a line per arm and strength
    python benchmarks/factor_findings.py beside --json docs/data/factor/beside.json # about two minutes on one core
    python benchmarks/factor_findings.py more --json docs/data/factor/more.json     # five: noise, two dimensions
    python benchmarks/factor_findings.py noise docs/data/factor/more.json           # a line per noise, rate and λ
    python benchmarks/factor_findings.py plane docs/data/factor/more.json           # a line per optimizer

Stored are the settings and the summary, which has medians over the seeds and the largest deviation.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import stored
import torch
from torch import Tensor

from rankdecay.lab.experiments.factor.factorised import (
    Diffusion,
    Dynamics,
    Factors,
    Method,
    Training,
    differences,
    imbalance,
    product,
    shrunk,
)
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
            shown += [stored.figure(row.get(key), ".1e") for key in ("deviation_largest", "optimality_gap")] + [left]
            shown += [stored.figure(row.get(key), ".4g") for key in ("imbalance_rate", "predicted_rate_of_steps")]
            print(f"| {' | '.join(shown)} |")


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


NOISES, SEEDS, MU, LENGTH = (0.0, 0.01, 0.1), 20, 0.1, 0.25


def noise() -> list[Row]:
    """Proposition B.2: imbalance under momentum, noise and decoupled decay, from 20 seeds, to a time of 60/η."""
    rows = []
    for rate, strength, sigma in [(0.1, 0.4, sigma) for sigma in NOISES] + [(0.1, 0.1, 0.1), (0.03, 0.4, 0.1)]:
        factors, some = start([strength], range(SEEDS))
        path = Diffusion(factors, TARGET, some, Dynamics(rate, momentum=MU, noise=sigma, length=LENGTH), seed=100)
        steps = round(60 / rate / LENGTH)
        times, seen, off = [], [imbalance(factors)], torch.zeros(SEEDS, dtype=torch.float64)
        for step in range(1, steps + 1):
            path.step()
            seen.append(imbalance(path.factors))
            off = torch.maximum(off, (differences(path.factors)[0] - path.predicted).norm(dim=(1, 2)))
            times.append(step * LENGTH * rate)
        course = torch.stack(seen)
        share = course / course[0]
        early = [i for i, at in enumerate(times) if 1 <= at <= 4]  # before the floor is seen
        slope = torch.tensor([times[i] for i in early], dtype=torch.float64)
        slope = slope - slope.mean()
        logs = share[[i + 1 for i in early]].log()
        rates = -(slope[:, None] * logs).sum(0) / slope.square().sum() / (2 * strength)
        floors = course[-steps // 3 :].mean(0)
        bound = path.largest_gradient * path.largest_factor + sigma * (MU * 25 * math.log(4 * 25 / 0.05)) ** 0.5
        bounds = {"printed": 4 * rate * path.largest_factor / strength * bound,
                  "derived": 2 * path.largest_factor / strength * bound}  # fmt: skip
        rows.append(
            {
                "rate": rate, "strength": strength, "noise": sigma, "seeds": SEEDS,
                "off_identity": (off / course[0]).max().item(), "rate_over_predicted": rates.median().item(),
                "floor": floors.median().item(), "floor_low": floors.min().item(), "floor_high": floors.max().item(),
                "share": share[-steps // 3 :].mean(0).median().item(),
                **{f"of_{name}_bound": (floors / of).max().item() for name, of in bounds.items()},
            }
        )  # fmt: skip
    return rows


LEAST = {"least_l2": (0.2, 0.4), "least_l1": (0.0, 0.5), "least_linf": (1 / 3, 1 / 3)}
RAY = torch.tensor([1.0, 2.0], dtype=torch.float64)  # the solutions are where this times w is one


def two_dimensions() -> list[Row]:
    """Two dimensions: where AdamW(λ, ε) and Adam with L2 of λε end from 20 starts, on w itself and on w = a·b."""
    rows = []
    for parametrisation in ("direct", "product"):
        for optimizer, epsilon, weight, lr, steps in (
            ("AdamW", 10.0, 1e-3, 1.0, 20_000),
            ("Adam with L2", 10.0, 1e-2, 1.0, 20_000),
            ("AdamW", 1e-8, 0.1, 0.03, 40_000),  # falling rate: normalised steps do not fade of themselves
        ):
            rng = torch.Generator().manual_seed(0)
            count = 2 if parametrisation == "product" else 1
            leaves = [torch.randn(20, 2, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(count)]
            kind = torch.optim.AdamW if optimizer == "AdamW" else torch.optim.Adam
            how = kind(leaves, lr=lr, eps=epsilon, weight_decay=weight)
            for step in range(steps):
                if epsilon < 1:
                    how.param_groups[0]["lr"] = lr * (1 - step / steps)
                how.zero_grad()
                (0.5 * (_product(leaves) @ RAY - 1).square()).sum().backward()
                how.step()
            ends = _product(leaves).detach()
            rows.append({"parametrisation": parametrisation, "optimizer": optimizer, "epsilon": epsilon,
                         "weight_decay": weight, "ends": ends.tolist()})  # fmt: skip
            for name, at in LEAST.items():
                rows[-1][f"from_{name}"] = (ends - torch.tensor(at).double()).norm(dim=1).median().item()
    return rows


def _product(leaves: Sequence[Tensor]) -> Tensor:
    return math.prod(leaves) if len(leaves) > 1 else leaves[0]  # pyright: ignore[reportReturnType]


MORE = (noise, two_dimensions)
PARTS = (conserved, late_adam, decoupled_floor, large_epsilon, damped_momentum)


def beside(path: Path, parts: Sequence[Callable[[], list[Row]]] = PARTS) -> None:
    """Run every part and write what it found."""
    torch.set_num_threads(1)
    document: Row = {"machine": describe_machine("cpu"), "versions": versions()}
    document |= {part.__name__: part() for part in parts}
    path.write_text(json.dumps(document, indent=1) + "\n")


def more(path: Path) -> None:
    """Run the parts on noise and on two dimensions."""
    beside(path, MORE)


def _parts(options: argparse.Namespace, name: str) -> list[Row]:
    return [row for path in options.directories for row in json.loads(path.read_text())[name]]


def noise_table(options: argparse.Namespace) -> None:
    """A Markdown line per noise, rate and strength of Proposition B.2."""
    print("| σ | η | λ | off the identity | early rate / 2ηλ | imbalance at the end (range over seeds) | share left | "
          "of the printed bound |\n" + "|" + "--:|" * 8)  # fmt: skip
    for row in _parts(options, "noise"):
        print(f"| {row['noise']:g} | {row['rate']:g} | {row['strength']:g} | {row['off_identity']:.1%} | "
              f"{row['rate_over_predicted']:.2f} | {row['floor']:.2g} "
              f"({row['floor_low']:.2g}–{row['floor_high']:.2g}) | "
              f"{row['share']:.1%} | {row['of_printed_bound']:.1%} |")  # fmt: skip


def plane_table(options: argparse.Namespace) -> None:
    """A Markdown line per parametrisation and optimizer of the toy in two dimensions."""
    print("| parametrisation | optimizer | ε | decay | least ‖w‖₂ | least ‖w‖₁ | least ‖w‖_∞ |\n|---|---|" + "--:|" * 5)
    for row in _parts(options, "two_dimensions"):
        print(f"| {row['parametrisation']} | {row['optimizer']} | {row['epsilon']:g} | {row['weight_decay']:g} | "
              f"{row['from_least_l2']:.3f} | {row['from_least_l1']:.3f} | {row['from_least_linf']:.3f} |")  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="*")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    measured = {"beside": beside, "more": more}
    tables = {"strengths": strengths, "noise": noise_table, "plane": plane_table}
    stored.command_line(__doc__, stored.store, tables, _options, arguments, measured)


if __name__ == "__main__":
    main()
