"""How the default of `rankdecay grok` was chosen: candidates on seeds that are not reported, 100 to 108.

    python benchmarks/grok_tuning.py run --out docs/data/grok_tuning.jsonl     # what is not there yet
    python benchmarks/grok_tuning.py table docs/data/grok_tuning.jsonl

A candidate has to hold 95 % test accuracy in every seed under low-rank decay and in none under the usual L2, in the
fewest steps; all in float32. A row is one candidate: its options and, by arm, the step from which each seed held.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankdecay.lab import experiment
from rankdecay.lab.cli import parse

SEEDS = ["--first-seed", "100", "--seeds", "9", "--arms", "low_rank", "l2", "--precision", "float32"]
SHARED = ["--modulus", "13", "--width", "64", "--lr", "2e-3", "--batch-size", "128", "--tuned-strength", "30"]
CANDIDATES = {
    "1050 examples, strength 5": "--mlp-width 256 --train-examples 1050 --steps 560 --strength 5 --weight-decay 2",
    "1000 examples, strength 4": "--mlp-width 256 --train-examples 1000 --steps 640 --strength 4 --weight-decay 2",
    "1050 examples, strength 4": "--mlp-width 256 --train-examples 1050 --steps 640 --strength 4 --weight-decay 2",
    "1100 examples, strength 4": "--mlp-width 256 --train-examples 1100 --steps 640 --strength 4 --weight-decay 2",
    "1100 examples, strength 4, rest 1.5": (
        "--mlp-width 256 --train-examples 1100 --steps 640 --strength 4 --weight-decay 1.5"
    ),
}


def row(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    """The row of a candidate's run."""
    arms = {
        arm["name"]: {"held_from": arm["steps_to_generalise_by_seed"], "test_accuracy": arm["test_accuracy"]}
        for arm in summary["arms"]
    }
    return {"candidate": name, "steps": summary["settings"]["steps"], "arms": arms}


def run(out: Path) -> None:
    """Run the candidates that have no row yet."""
    lines = out.read_text().splitlines() if out.exists() else []
    there = {json.loads(line)["candidate"] for line in lines}
    for name, options in CANDIDATES.items():
        if name in there:
            continue
        with TemporaryDirectory() as folder:
            arguments = ["grok", *SHARED, *options.split(), *SEEDS, "--out", f"{folder}/run"]
            summary = experiment.run(experiment.load("grok"), parse(arguments), "")
        with out.open("a") as file:
            file.write(json.dumps(row(name, summary), separators=(",", ":")) + "\n")


def table(path: Path) -> None:
    """Print a line per candidate."""
    print("| candidate | steps | low-rank held | last from | final test | L2 held | first from | final test |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for line in path.read_text().splitlines():
        found = json.loads(line)
        cells = []
        for arm, extreme in (("low_rank", max), ("l2", min)):
            held = [step for step in found["arms"][arm]["held_from"] if step is not None]
            seeds = len(found["arms"][arm]["held_from"])
            cells += [f"{len(held)} of {seeds}", str(extreme(held)) if held else "—"]
            cells += [f"{found['arms'][arm]['test_accuracy']:.2f}"]
        print(f"| {found['candidate']} | {found['steps']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("path", type=Path)
    given = parser.parse_args()
    run(given.out) if given.command == "run" else table(given.path)
