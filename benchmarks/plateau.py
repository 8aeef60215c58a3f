"""Where subtraction stops at a test accuracy near .4: which pairs are answered, and with what.

    python benchmarks/plateau.py --json docs/data/plateau.json     # three minutes on a core

The runs of `docs/data/boundary/subtract` at two sizes, three times as long, in float32. At every 120 steps the share of
right answers, and of answers that are right but for the sign (b − a in the place of a − b), on training and test set.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankdecay.lab.ensemble import transformer
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Training
from rankdecay.lab.experiments.boundary.arms import every_arm
from rankdecay.lab.experiments.boundary.experiment import trials
from rankdecay.lab.experiments.boundary.settings import Boundary
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.tasks import make_dataset

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
    own = settings(fraction)
    some = list(trials(own, every_arm(own)[arm], [strength]))
    data = [make_dataset(seed=one.member.seed, **one.data) for one in some]
    ensemble = Ensemble(some[0].config, [one.member for one in some], data, Training(own.batch_size))
    sets = {
        name: tuple(torch.stack([torch.from_numpy(getattr(d, f"{name}_{part}")) for d in data])
                    for part in ("tokens", "targets"))
        for name in ("train", "test")
    }  # fmt: skip
    setting: dict[str, Any] = {"arm": arm, "strength": strength, "fraction": fraction}
    rows = [setting | {"seed": one.member.seed, "curve": []} for one in some]
    for step in range(EVERY, steps + 1, EVERY):
        ensemble.train(EVERY)
        found = {name: shares(ensemble, *both) for name, both in sets.items()}
        for number, row in enumerate(rows):
            row["curve"].append([step, *(round(share, 4) for name in found for share in found[name][number])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--fractions", type=float, nargs="+", default=(0.6, 0.8))
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    rows = [row for f in given.fractions for arm, s in ARMS.items() for row in curves(arm, s, f, given.steps)]
    document = {
        "machine": describe_machine("cpu"),
        "versions": versions(),
        "columns": ["step", "train right", "train right but for the sign", "test right", "test right but for the sign"],
        "seconds": round(time.monotonic() - begun),
        "rows": rows,
    }
    given.json.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
