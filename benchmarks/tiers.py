r"""The error of a ``smooth`` step by products of TF32 and bfloat16, against float64, on any machine.

    python benchmarks/tiers.py                                   # a few minutes
    python benchmarks/tiers.py --ratios 0.13 0.5 --sides 64
    python benchmarks/tiers.py --ratios 0.03 0.0626 0.08 0.13 0.2 0.3 0.35 0.5 1 --sides 64 256 \
        --json docs/data/tiers.json

A tier (`rankdecay.linalg.tiers`) differs from float32 in the rounding of the operands, which a CPU does alike; so this
prints what a GPU has, up to the rounding of its sums. Each number is the worst ‖step - wanted‖_F / ‖wanted‖_F over
spectra (Gaussian, five decades, one large direction, a tenth of the rank), seeds and shapes; the last column is what
``choose_tier`` takes on a GPU that has them. Below ε/‖W‖_F = 0.0625 there is no short polynomial: float32 and
float64 products then, whatever the device (`smooth_polar_by_products`).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankdecay.lab.machine import describe_machine, versions
from rankdecay.linalg.matmul import choose_tier, smooth_by_few_products, smooth_by_products
from rankdecay.linalg.stack import prepare
from rankdecay.linalg.tiers import Product, by_bfloat16x3, by_tf32, of_bfloat16

RATIOS = (0.001, 0.003, 0.01, 0.03, 0.0626, 0.07, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0, 2.0)
LEAST = 0.0625
PRODUCTS: dict[str, Product | None] = {
    "bfloat16": lambda A, B: of_bfloat16(A.bfloat16(), B.bfloat16()),  # no tier: it is too coarse everywhere
    "tf32": by_tf32,
    "bfloat16x3": by_bfloat16x3,
    "float32": None,
}


def spectra(m: int, n: int, seed: int) -> Iterator[Tensor]:
    """Matrices (m, n) of several kinds."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    yield W
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    yield (U * torch.logspace(0, -5, min(m, n))) @ Vh
    yield W + 30 * torch.outer(torch.randn(m, generator=generator), torch.randn(n, generator=generator))
    yield W[:, : max(1, n // 10)] @ torch.randn(max(1, n // 10), n, generator=generator)


def step_error(W: Tensor, ratio: float, product: Product | None) -> float:
    """Relative error of the step, W V (τ/√(σ² + ε²)) Vᵀ with τ = ε."""
    X = prepare(W[None], torch.float32).X
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).double()
    eps, share = ratio * norm, torch.ones(1, 1, 1)
    if ratio < LEAST:
        got = smooth_by_products(X, eps, share, norm, ratio)
    else:
        got = smooth_by_few_products(X, eps, share, ratio, product)
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    wanted = (U * (eps[..., 0] * sigma / torch.hypot(sigma, eps[..., 0]))[..., None, :]) @ Vh
    return float((got.double() - wanted).norm() / wanted.norm())


def worst(ratio: float, product: Product | None, sides: list[tuple[int, int]], seeds: int) -> float:
    return max(step_error(W, ratio, product) for m, n in sides for seed in range(seeds) for W in spectra(m, n, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="ε/‖W‖_F")
    parser.add_argument("--json", type=Path, help="write the machine and every number")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    sides = [(n + n // 2 * (n < 512), n) for n in arguments.sides]
    print(f"{'ε/‖W‖_F':>8}" + "".join(f"{tier:>12}" for tier in PRODUCTS) + f"{'chosen':>12}")
    for ratio in arguments.ratios:
        chosen = choose_tier(ratio, ("tf32", "bfloat16x3", "float32")) if ratio >= LEAST else "-"
        measured = [tier for tier in PRODUCTS if ratio >= LEAST or tier == "float32"]
        errors = {tier: worst(ratio, PRODUCTS[tier], sides, arguments.seeds) for tier in measured}
        rows.append({"ratio": ratio, "chosen": chosen, "errors": errors})
        cells = "".join(f"{errors[tier]:12.1e}" if tier in errors else " " * 12 for tier in PRODUCTS)
        print(f"{ratio:8g}{cells}{chosen:>12}", flush=True)
    if arguments.json:
        document = {"machine": describe_machine("cpu"), "versions": versions(), "sides": arguments.sides, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
