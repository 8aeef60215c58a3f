"""The numbers on `rankdecay factor` in `docs/findings.md` that a run of the command does not print.

python benchmarks/factor_findings.py        # about two minutes on one core
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rankdecay.lab.experiments.factor.factorised import Factors, Method, Training, imbalance, product, shrunk

TARGET = torch.diag(torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))
VALUES = torch.linalg.svdvals(TARGET)


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


def conserved() -> None:
    for lr, steps in ((0.1, 1000), (0.01, 2000), (0.001, 20_000)):
        factors, strengths = start([0.0], [0])
        training = Training(factors, TARGET, strengths, Method(lr))
        for _ in range(steps):
            training.step()
        begun, ended = imbalance(factors).item(), imbalance(training.factors).item()
        print(f"no decay, seed 0, rate {lr}, {steps} steps: imbalance {begun:.4f} → {ended:.4f}")


def late_adam() -> None:
    for lr in (0.1, 0.03):
        factors, strengths = start([0.1, 0.3, 0.5], range(50))
        training = Training(factors, TARGET, strengths, Method(lr, "adam"))
        furthest = torch.zeros(150, dtype=torch.float64)
        for step in range(1, 6001):
            training.step()
            if step % 50 == 0 and step > 1000:
                furthest = torch.maximum(furthest, distance(training, strengths))
            if step in (1000, 6000):
                off = distance(training, strengths)
                near = (off < 1e-3).double().mean()
                print(f"Adam, rate {lr}, step {step}: within 1e-3 {near:.2f}, worst {off.max():.1e}")
        print(f"  further off than 1e-2 after step 1000: {(furthest > 1e-2).sum()} of 150, worst {furthest.max():.3f}")


def decoupled_floor() -> None:
    for lr, steps in ((0.1, 2500), (0.01, 25_000)):
        factors, strengths = start([0.05, 0.4], range(50))
        training = Training(factors, TARGET, strengths, Method(lr, "adam", "decoupled"))
        begun = imbalance(factors)
        for _ in range(steps):
            training.step()
        share = (imbalance(training.factors) / begun).view(2, 50).median(1).values.tolist()
        sigma = torch.linalg.svdvals(product(training.factors)).view(2, 50, 5).median(1).values.tolist()
        print(f"AdamW, rate {lr}, {steps} steps, strengths .05 and .4: imbalance left {share}, singular values {sigma}")


def large_epsilon() -> None:
    factors, strengths = start([0.01, 0.03], range(20))
    training = Training(factors, TARGET, strengths, Method(1.0, "adam", "decoupled", epsilon=10.0))
    for _ in range(3000):
        training.step()
    print(
        "AdamW, ε = 10, rate 1: off the soft threshold of λε by",
        distance(training, 10 * strengths).view(2, 20).amax(1).tolist(),
    )


def damped_momentum() -> None:
    factors, strengths = start([0.1, 0.4], range(50))
    training = Training(factors, TARGET, strengths, Method(0.1, "momentum", "decoupled"))
    for _ in range(1500):
        training.step()
    print("momentum, decoupled, 1500 steps: largest imbalance", imbalance(training.factors).max().item())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in (conserved, late_adam, decoupled_floor, large_epsilon, damped_momentum):
        part()
