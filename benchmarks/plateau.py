"""Where subtraction stops at a test accuracy near .4: which pairs are answered, and with what.

    python benchmarks/plateau.py --json docs/data/plateau.json     # three minutes on a core

The runs of `docs/data/boundary/subtract` at two sizes, three times as long, in float32. At every 120 steps the share of
right answers, and of answers that are right but for the sign (b − a in the place of a − b), on training and test set.
"""

from typing import Any

import torch
import traced
from torch import Tensor

from rankdecay.lab.ensemble import transformer
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.experiments.boundary.settings import Boundary

MODULUS, EVERY = 31, 120
ARMS = {"l2": 10.0, "none": 0.0}


def settings(fraction: float) -> Boundary:
    """The settings of the stored sweep at one size."""
    return Boundary(
        task="subtract", modulus=MODULUS, fractions=(fraction,), train_examples=(), rest_decays=(3.0,), seeds=3,
        steps=1200, precision="float32",
    )  # fmt: skip


def shares(ensemble: Ensemble, tokens: Tensor, targets: Tensor) -> list[tuple[float, float]]:
    """Per member the share of right answers, and of answers right but for the sign."""
    with torch.no_grad():
        logits = transformer.forward(ensemble.parameters, tokens, ensemble.config, torch.float32)
    answers = logits.argmax(-1)
    right, mirrored = answers == targets, answers == (-targets) % MODULUS
    found = right.double().mean(1), (mirrored & ~right).double().mean(1)
    return list(zip(*(share.tolist() for share in found), strict=True))


def curves(arm: str, strength: float, fraction: float, steps: int) -> list[dict[str, Any]]:
    """Rows of the members of one arm at one size, a dict per seed."""
    ensemble, data = traced.ensemble_of(settings(fraction), arm, strength)
    sets = {
        name: tuple(torch.stack([torch.from_numpy(getattr(d, f"{name}_{part}")) for d in data])
                    for part in ("tokens", "targets"))
        for name in ("train", "test")
    }  # fmt: skip
    setting: dict[str, Any] = {"arm": arm, "strength": strength, "fraction": fraction}
    rows = [setting | {"seed": member.seed, "curve": []} for member in ensemble.members]
    for step in range(EVERY, steps + 1, EVERY):
        ensemble.train(EVERY)
        found = {name: shares(ensemble, *both) for name, both in sets.items()}
        for number, row in enumerate(rows):
            row["curve"].append([step, *(round(share, 4) for name in found for share in found[name][number])])
    return rows


def main() -> None:
    columns = ["step", "train right", "train right but for the sign", "test right", "test right but for the sign"]
    traced.main(__doc__, curves, ARMS, columns, steps=3600, fractions=(0.6, 0.8))


if __name__ == "__main__":
    main()
