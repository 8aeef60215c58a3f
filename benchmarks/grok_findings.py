"""The tables of `docs/findings` on the default of `rankdecay grok`, from the stored summaries.

python benchmarks/grok_findings.py table docs/data/grok_default     # a line per arm
python benchmarks/grok_findings.py seeds docs/data/grok_default     # the step from which each seed held
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stored

from rankdecay.lab.store import read_json, read_metrics

Row = dict[str, Any]


def held(row: Row) -> str:
    """In how many seeds an arm held the threshold."""
    return f"{row['generalised']} of {row['seeds']}"


def _figure(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: stored.figure(row.get(key), form)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "held 95 %": held,
    "median step": _figure("steps_to_generalise", "g"),
    "final test": _figure("test_accuracy", ".1%"),
    "final train": _figure("train_accuracy", ".1%"),
    "stable rank W_Q, W_K": _figure("stable_rank", ".3g"),
    "effective": _figure("effective_rank", ".3g"),
    "stable rank of a head's product": _figure("product_stable_rank", ".3g"),
    "effective rank": _figure("product_effective_rank", ".3g"),
    "‖W_Q‖": _figure("query_norm", ".3g"),
    "‖W_K‖": _figure("key_norm", ".3g"),
    "decay step / ‖W‖": _figure("decay_size", ".1%"),
    "across W": _figure("tangential_share", ".1%"),
}


def lost(directory: Path, arm: str) -> int:
    """How many seeds of an arm held the threshold and end below it."""
    threshold = (read_json(directory / "summary.json") or {})["threshold"]
    held_from = stored.arms(directory)[arm]["steps_to_generalise_by_seed"]
    last = {row["seed"]: row["test_accuracy"] for row in read_metrics(directory) if row["arm"] == arm}
    ends = [last[seed] or 0.0 for seed in sorted(last)]
    return sum(step is not None and end < threshold for step, end in zip(held_from, ends, strict=True))


def table(options: argparse.Namespace) -> None:
    """A Markdown line per arm."""
    for directory in options.directories:
        print(f"| arm | {' | '.join(COLUMNS)} |\n|---|" + "--:|" * len(COLUMNS))
        for name, row in stored.arms(directory).items():
            print(f"| {name} | {' | '.join(column(row) for column in COLUMNS.values())} |")


def seeds(options: argparse.Namespace) -> None:
    """A Markdown line per arm that held in any seed: the step from which each did."""
    for directory in options.directories:
        print("| arm | held from, seed by seed | of them below it at the end |\n|---|---|--:|")
        for name, row in stored.arms(directory).items():
            if row["generalised"]:
                steps = (stored.figure(step, "g") for step in row["steps_to_generalise_by_seed"])
                print(f"| {name} | {', '.join(steps)} | {lost(directory, name)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, stored.store, {"table": table, "seeds": seeds}, arguments=arguments)


if __name__ == "__main__":
    main()
