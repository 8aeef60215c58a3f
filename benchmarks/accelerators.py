"""Published accelerators of grokking beside the decays of this library, every arm tuned alike (`docs/findings`).

    python benchmarks/accelerators.py --stage time                 # milliseconds of a step, DIR/cost.json
    python benchmarks/accelerators.py --stage tune                 # seeds 100-102; freezes DIR/tuned.json, arm by arm
    python benchmarks/accelerators.py --stage test                 # seeds 200-209, each arm at its frozen settings
    python benchmarks/accelerators.py --stage report [--json]      # from the stored rows alone
    python benchmarks/accelerators.py --task add --modulus 97 --stage ...

Selection mod 13 with 1,250 examples, or addition mod 97 with 40 % of the pairs; the network of the default `rankdecay
grok`. Every stage goes on where it was interrupted. DIR is docs/data/accelerators/TASK. Three sets: training,
validation (1,000 examples, which decides tuning and when 95 % is held) and test, read once for the accuracy at the end.
Held-out runs are trained to the end of their budget, so that what is lost again is seen.

**Tuning** (`benchmarks/tuning.py`): for every arm nine settings, and strengths and decays of the rest beyond an edge
until the best is inside. ``--again ARM`` tunes frozen arms again where more is tried than before.

* Arms with a strength: six of them, in factors of two about the published value, at a decay of the rest of 2; then the
  decays of the rest 0, 1 and 4 at the best, or at all strengths where nothing held at 2. The strength is λ of Grokfast
  (α 0.98 and a window of 100 stay as published), the learning rate of AdamW (`learning_rate`), of ⊥Grad (which has no
  factor of its own) and of Muon's matrices, L2 of W_Q and W_K (`l2`), and the strength of `smooth`. So are two controls
  of Muon, added when its lead was seen: the same steps without orthogonalising (`momentum`), and AdamW at a rate of
  those matrices' own (`hidden_rate`).
* StableMax, `none` and uniform attention have no strength: nine decays of the rest, 0 and ¼ to 32 in factors of two.
* `cautious` and `l2_all` decay every matrix by their strength, so that is nine strengths, ⅛ to 32.

All but `l2`, `smooth`, `cautious` and `l2_all` have no decay of W_Q and W_K. Muon's decoupled decay takes the share of
a weight that AdamW's takes in the other arms. This is one size with three seeds: a reduced protocol, the same for all.

**Contrasts**, named beforehand: each accelerator, `l2` and `smooth` against the tuned learning rate, and cautious decay
against `l2_all`. Times of one seed are paired, the seed is the unit; t-tests, Holm over all nine, where one that is not
run yet, or of an arm of which no run of tuning held, counts as p = 1. Muon against its two controls is no contrast of
these: it was not named beforehand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import tuning
from schedule import contrast, holm, log_ratios
from tuning import (
    Protocol,
    Row,
    Space,
    mean_time,
    restricted,
    setting_of,
    setting_of_frozen,
    train_held_out,
    trial,
    tuned,
)

from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Training
from rankdecay.lab.experiments.boundary.settings import Boundary
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.store import read_metrics
from rankdecay.lab.tasks import make_dataset

RATES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
OF_ALL = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
GRIDS: dict[str, tuple[float, ...]] = {  # in the order in which they are tuned
    "learning_rate": RATES,
    "l2": (4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
    "grokfast_ema": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "muon": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    "orthograd": RATES,
    "smooth": (0.625, 1.25, 2.5, 5.0, 10.0, 20.0),
    "stablemax": (),
    "grokfast_ma": (0.625, 1.25, 2.5, 5.0, 10.0, 20.0),
    "cautious": OF_ALL,
    "l2_all": OF_ALL,
    "none": (),
    "uniform_attention": (),
    "momentum": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    "hidden_rate": RATES,
}
SPACE = Space(
    GRIDS,
    rests=(0.0, 1.0, 2.0, 4.0),
    own_rests={arm: (0.0, 0.25, *OF_ALL[2:]) for arm, grid in GRIDS.items() if not grid},
    of_all=frozenset(("cautious", "l2_all")),
)
ACCELERATORS = ("grokfast_ema", "grokfast_ma", "orthograd", "stablemax", "muon", "cautious")
CONTRASTS = (*((arm, "learning_rate") for arm in (*ACCELERATORS, "l2", "smooth")), ("cautious", "l2_all"))
OF_MUON = ("momentum", "hidden_rate")
CONTROLS = (*(("muon", arm) for arm in OF_MUON), *((arm, "learning_rate") for arm in OF_MUON))
HOLDS = 0.95
PLACES, STEPS, ROUNDS = 4, 16, 9  # of what is timed: runs at once, steps of a reading, readings of each arm


@dataclasses.dataclass(frozen=True)
class Accelerated(Protocol):
    """Protocol of a task."""

    tune_sizes: tuple[float, ...] = (1250,)
    tune_budget: int = 800
    test_seeds: tuple[int, ...] = tuple(range(200, 210))
    test_sizes: tuple[float, ...] = (1250,)
    test_budget: int = 1600
    horizons: tuple[int, ...] = (800, 1600)
    task: str = "selection"

    command: ClassVar[str] = "accelerators"

    def settings(self, ramp: int | None = None) -> Boundary:
        """The same, of the task."""
        return dataclasses.replace(super().settings(ramp), task=self.task)

    def sized(self, size: float) -> Row:
        """A number of examples, or a share of the pairs."""
        return super().sized(size) if self.task == "selection" else {"fractions": (size,)}


PROTOCOLS = {
    "selection": Accelerated(),
    "add": Accelerated(
        modulus=97,
        tune_sizes=(0.4,),
        tune_budget=1600,
        test_sizes=(0.4,),
        test_budget=3200,
        horizons=(1600, 3200),
        task="add",
    ),
}
TINY: Row = {
    "modulus": 5, "width": 16, "mlp_width": 16, "batch_size": 8, "lr": 1e-2, "validation": 4, "evaluate_every": 20,
    "tune_seeds": (100,), "tune_budget": 120, "test_seeds": (200, 201, 202), "test_budget": 120, "horizons": (60, 120),
}  # fmt: skip


def protocol_of(task: str, modulus: int | None, tiny: bool) -> Protocol:
    """The protocol of a task."""
    protocol = PROTOCOLS[task]
    if tiny:
        sizes = (60,) if task == "selection" else (0.5,)
        return dataclasses.replace(protocol, **TINY, tune_sizes=sizes, test_sizes=sizes)
    return dataclasses.replace(protocol, modulus=modulus or protocol.modulus)


# --- the stages ---


def tune(protocol: Protocol, directory: Path, device: str, again: Sequence[str] = ()) -> Row:
    """Tune and freeze one arm after another."""
    return tuning.tune([(arm,) for arm in GRIDS], SPACE, protocol, directory, device, again=again)


def test(protocol: Protocol, directory: Path, device: str) -> None:
    """Every arm that is frozen, to the end of the budget, on seeds that tuning has not seen."""
    held = tuned(directory, protocol)["arms"]
    wanted = [
        dataclasses.replace(trial(protocol, own["name"], own["strength"], own["rest_decay"], size, seed), stays=True)
        for own in held.values()
        for seed in protocol.test_seeds
        for size in protocol.test_sizes
    ]
    train_held_out(protocol, directory, wanted, device)


def cost(protocol: Protocol, directory: Path, device: str) -> None:
    """Milliseconds of a step of one run in every arm, in rounds of all arms, each at the middle of its grid."""
    torch.set_num_threads(1)
    ensembles = {}
    for arm, grid in GRIDS.items():
        strength = grid[len(grid) // 2] if grid else 0.0
        rest = SPACE.first(arm, strength)
        some = [trial(protocol, arm, strength, rest, protocol.tune_sizes[0], 100 + n) for n in range(PLACES)]
        data = [make_dataset(seed=one.member.seed, **one.data) for one in some]
        members = [one.member for one in some]
        ensembles[arm] = Ensemble(some[0].config, members, data, Training(protocol.batch_size, device=device))
        ensembles[arm].train(STEPS)
    clock = time.thread_time if device == "cpu" else time.perf_counter
    rounds: dict[str, list[float]] = {arm: [] for arm in ensembles}
    for _ in range(ROUNDS):
        for arm, ensemble in ensembles.items():
            start = clock()
            ensemble.train(STEPS)
            if device != "cpu":
                torch.cuda.synchronize()
            rounds[arm].append(1e3 * (clock() - start) / STEPS / PLACES)
    plain = rounds["none"]
    arms = {
        arm: {
            "milliseconds": statistics.median(times),
            "of_adamw": statistics.median(t / p for t, p in zip(times, plain, strict=True)),
        }
        for arm, times in rounds.items()
    }
    measured = {
        "machine": describe_machine(device),
        "versions": versions(),
        "clock": clock.__name__,
        "places": PLACES,
        "arms": arms,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cost.json").write_text(json.dumps(measured, indent=1) + "\n")


def still(rows: Sequence[Row]) -> tuple[int, int]:
    """How many runs held 95 % on validation, and how many of those have it on the test set at the end."""
    held = [row for row in rows if row["steps_to_generalise"] is not None]
    return len(held), sum((row["test_accuracy"] or 0.0) >= HOLDS for row in held)


def report(protocol: Protocol, directory: Path) -> Row:
    """Everything that is printed, from the stored rows: arms and contrasts that have all of their runs."""
    held = tuned(directory, protocol)["arms"]
    frozen = {setting_of_frozen(own) for own in held.values()}
    rows = [row for row in read_metrics(directory / "test") if setting_of(row) in frozen]  # an arm may be tuned again
    path = directory / "cost.json"
    costs = json.loads(path.read_text())["arms"] if path.exists() else {}
    arms = {}
    for arm, own in held.items():
        some = [row for row in rows if row["arm"] == own["name"]]
        if len(some) < len(protocol.test_seeds) * len(protocol.test_sizes):
            continue
        generalised, kept = still(some)
        arms[arm] = {
            "arm": arm,
            **{key: own[key] for key in ("strength", "rest_decay")},
            "runs": len(some),
            "restricted_mean_time": {str(horizon): mean_time(some, horizon) for horizon in protocol.horizons},
            "times": sorted(restricted(row, protocol.horizons[-1]) for row in some),
            "held": generalised,
            "still": kept,
            "test_accuracy": statistics.fmean(row["test_accuracy"] or 0.0 for row in some),
            **costs.get(arm, {}),
        }
    able = {arm for arm in arms if held[arm]["restricted_mean_time"] < protocol.tune_budget}  # the others are not tuned
    pairs = [pair for pair in CONTRASTS if set(pair) <= able]
    horizon = protocol.horizons[-1]
    found: list[Row] = [contrast(log_ratios(rows, a, b, horizon)) | {"arm": a, "against": b} for a, b in pairs]
    lacking = [1.0] * (len(CONTRASTS) - len(found))  # so that none of the others looks better than it will
    for one, adjusted in zip(found, holm([*(one["p"] for one in found), *lacking]), strict=False):
        one["p_holm"] = adjusted
    beside = [
        contrast(log_ratios(rows, a, b, horizon)) | {"arm": a, "against": b} for a, b in CONTROLS if {a, b} <= able
    ]
    return {"arms": list(arms.values()), "contrasts": found, "controls": beside}


def show(result: Row) -> None:
    for arm in sorted(result["arms"], key=lambda arm: list(arm["restricted_mean_time"].values())[-1]):
        times = "  ".join(f"{h}: {t:,.0f}" for h, t in arm["restricted_mean_time"].items())
        settings = f"{arm['arm']} {arm['strength']:g}, rest {arm['rest_decay']:g}"
        print(
            f"{settings:<36} {arm['runs']:>3} runs  {times}  held {arm['held']}, still {arm['still']}  "
            f"test {arm['test_accuracy']:.3f}  {arm.get('milliseconds', np.nan):.2f} ms"
        )
    for one in result["contrasts"]:
        print(
            f"{one['arm']} / {one['against']}: {one['ratio']:.3f} ({one['low']:.3f}-{one['high']:.3f}), "
            f"p {one['p']:.3g}, Holm {one['p_holm']:.3g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("time", "tune", "test", "report"), required=True)
    parser.add_argument("--task", choices=tuple(PROTOCOLS), default="selection")
    parser.add_argument("--modulus", type=int, help="by default 13 of selection, 97 of add")
    parser.add_argument("--dir", type=Path, help="by default docs/data/accelerators/TASK")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a protocol of a minute, to try the command; needs a --dir")
    parser.add_argument("--json", action="store_true")
    arguments = tuning.parse_arguments(parser)
    if arguments.tiny and arguments.dir is None:
        parser.error("--tiny needs a --dir of its own: docs/data/accelerators is for the protocol itself")
    protocol = protocol_of(arguments.task, arguments.modulus, arguments.tiny)
    directory = arguments.dir or Path("docs/data/accelerators") / arguments.task
    if arguments.stage == "report":
        result = report(protocol, directory)
        print(json.dumps(result, indent=1)) if arguments.json else show(result)
    elif arguments.stage == "tune":
        tune(protocol, directory, arguments.device, arguments.again)
    else:
        {"test": test, "time": cost}[arguments.stage](protocol, directory, arguments.device)


if __name__ == "__main__":
    main()
