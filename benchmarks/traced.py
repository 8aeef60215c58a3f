"""Shared by the benchmarks that follow runs of `rankdecay boundary` through time: their ensemble, and the command."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Training
from rankdecay.lab.experiments.boundary.arms import every_arm
from rankdecay.lab.experiments.boundary.experiment import trials
from rankdecay.lab.experiments.boundary.settings import Boundary
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.tasks import make_dataset
from rankdecay.lab.tasks.base import Dataset

Rows = list[dict[str, Any]]


def ensemble_of(settings: Boundary, arm: str, strength: float) -> tuple[Ensemble, list[Dataset]]:
    """The runs of an arm at one strength and size, a member a seed, with the data of each."""
    some = list(trials(settings, every_arm(settings)[arm], [strength]))
    data = [make_dataset(seed=one.member.seed, **one.data) for one in some]
    return Ensemble(some[0].config, [one.member for one in some], data, Training(settings.batch_size)), data


def main(
    description: str | None,
    rows_of: Callable[[str, float, float, int], Rows],
    arms: Mapping[str, float],
    columns: Sequence[str],
    steps: int,
    fractions: Sequence[float],
) -> None:
    """Run the command: follow every arm at every fraction, and write the rows.

    Args:
        description: of the command.
        rows_of: the rows of an arm, a strength, a fraction and a number of steps.
        arms: strengths by name.
        columns: names of what a point of a curve has.
        steps: of a run, unless the user gives another number.
        fractions: of the data, unless the user gives others.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--fractions", type=float, nargs="+", default=fractions)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    rows = [row for f in given.fractions for arm, s in arms.items() for row in rows_of(arm, s, f, given.steps)]
    document = {
        "machine": describe_machine("cpu"),
        "versions": versions(),
        "columns": columns,
        "seconds": round(time.monotonic() - begun),
        "rows": rows,
    }
    given.json.write_text(json.dumps(document, separators=(",", ":")) + "\n")
