"""Decompositions of a stack in one call of torch's and in parts with a thread each, on an idle machine and a busy one.

    python benchmarks/decompositions.py --json docs/data/decompositions.json

Busy: as many processes beside it as there are threads, each multiplying matrices. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from clock import seconds_of

from rankdecay.lab.machine import describe_machine
from rankdecay.linalg.stack import decomposed

SHAPES = ((32, 64), (32, 128), (8, 512))  # matrices, their side
OTHER_WORK = "import torch\ntorch.set_num_threads(1)\nX = torch.randn(512, 512)\nwhile True: X @ X"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", OTHER_WORK]) for _ in range(processes)]
    try:
        time.sleep(5 if others else 0)  # until they have imported torch
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(rounds: int) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for beside in (0, torch.get_num_threads()):
        with busy(beside):
            for count, side in SHAPES:
                X = torch.randn(count, side, side, dtype=torch.float64)
                for name, function in (("svd", torch.linalg.svd), ("eigh", torch.linalg.eigh)):
                    A = X @ X.mT if name == "eigh" else X
                    ways = {"one call": partial(function, A), "in parts": partial(decomposed, function, A)}
                    took: dict[str, list[float]] = {way: [] for way in ways}
                    for _ in range(rounds + 1):  # the first warms up
                        for way, call in ways.items():
                            took[way].append(1e3 * seconds_of(call))
                    rows.append(
                        {"decomposition": name, "matrices": count, "side": side, "beside": beside}
                        | {way: round(statistics.median(each[1:]), 2) for way, each in took.items()}
                    )
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to store the rows")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    if arguments.json is not None:
        stored = {"machine": describe_machine("cpu"), "threads": torch.get_num_threads(), "rows": rows}
        arguments.json.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
