"""Cells per minute of the prototype's 72-cell grid: `rankdecay boundary` against the prototype's own loop.

    python benchmarks/boundary.py                          # ours alone
    python benchmarks/boundary.py --peer PATH              # PATH: a checkout with the prototype's experiment.py
    python benchmarks/boundary.py --device cuda --peer PATH
    python benchmarks/boundary.py --ray-nodes              # efficiency from one Ray node to two, a core each
    python benchmarks/boundary.py --show docs/data/boundary_speed.json

The work is the prototype's own grid: 6 fractions × 6 strengths × (L2, low-rank), addition mod 113, batch 512, 2500
steps. A round trains the first steps of cells, evaluation included, with nobody leaving early; 2500 such steps are a
cell. The prototype trains one network at a time with all cores. Rounds are interleaved, because these machines drift;
medians. What leaving early saves is a property of the results and is read from a stored sweep (``--rows``).
Compiling is done before the first round and its time is given.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rankdecay.lab.ensemble import local
from rankdecay.lab.ensemble.sweep import SweepPlan, Trial
from rankdecay.lab.experiments.boundary.arms import make_arms
from rankdecay.lab.experiments.boundary.experiment import make_plan, trials
from rankdecay.lab.experiments.boundary.settings import PRESETS, Boundary, check
from rankdecay.lab.machine import describe_machine
from rankdecay.lab.store import RunDirectory

STEPS = 2500


def grid(precision: str) -> tuple[Boundary, list[Trial]]:
    """The prototype's grid, a fraction after the other so that any first part of it is a fair mix."""
    settings = check(dataclasses.replace(PRESETS["prototype"], precision=precision))
    arms = {arm.name: arm for arm in make_arms(settings)}
    per_arm = [list(trials(settings, arm, arm.strengths)) for arm in arms.values()]
    return settings, list(itertools.chain.from_iterable(zip(*per_arm, strict=True)))


def our_round(cells: list[Trial], plan: SweepPlan) -> tuple[float, float]:
    """Seconds per step and cell over all workers, and the share of the cores' time they used."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"command": "benchmark", "settings": {}, "arms": []}
        with RunDirectory.open(Path(folder) / "run", config, print) as directory:
            start, used = time.perf_counter(), _cpu_seconds()
            steps = sum(row["steps"] for row in local.rows(cells, plan, directory))
            seconds = time.perf_counter() - start
    return seconds / steps, (_cpu_seconds() - used) / seconds / torch.get_num_threads()


def peer_round(path: str, device: str, steps: int) -> Callable[[], tuple[float, float]]:
    """A function that runs the prototype's own loop, one cell of each arm."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.path.insert(0, path)
    import experiment  # type: ignore[import-not-found]

    def run() -> tuple[float, float]:
        start, used = time.perf_counter(), _cpu_seconds()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            for arm, strength in (("LowRank", 0.01), ("L2", 0.01)):
                experiment.train_run(argparse.Namespace(steps=steps, device=device), 0.5, arm, strength, device)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds / (2 * steps), (_cpu_seconds() - used) / seconds / torch.get_num_threads()

    return run


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of every variant."""
    variants: dict[str, Callable[[], tuple[float, float]]] = {}
    if arguments.peer:
        variants["prototype's loop"] = peer_round(arguments.peer, arguments.device, arguments.steps)
    compiling: dict[str, float] = {}
    for precision, compiled in itertools.product(("float32", "mixed"), (False, True)):
        settings, cells = grid(precision)
        settings = dataclasses.replace(
            settings,
            steps=arguments.steps,
            evaluate_every=min(arguments.steps, 100),
            threshold=1.0,
            compile="on" if compiled else "off",
            places=arguments.places,
        )
        plan = make_plan(settings, arguments.device, cells)
        at_once = plan.places * (torch.get_num_threads() if arguments.device == "cpu" else 1)
        name = precision + (", compiled" if compiled else "")
        start = time.perf_counter()
        our_round(cells[:at_once], dataclasses.replace(plan, budget=10, evaluate_every=10))
        compiling[name] = time.perf_counter() - start
        variants[name] = lambda cells=cells[:at_once], plan=plan: our_round(cells, plan)
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(arguments.rounds):
        for name, run in variants.items():
            readings[name].append(run())
            print(f"round {number + 1}: {name} {1e3 * readings[name][-1][0]:.2f} ms", file=sys.stderr, flush=True)
    rows = []
    for name, values in readings.items():
        seconds = [value[0] for value in values]
        row: dict[str, Any] = {
            "variant": name,
            "milliseconds": 1e3 * statistics.median(seconds),
            "cells_per_minute": 60 / (STEPS * statistics.median(seconds)),
            "cores_used": statistics.median(value[1] for value in values),
        }
        if arguments.peer:
            peer = [value[0] for value in readings["prototype's loop"]]
            row["times_faster"] = statistics.median(p / s for p, s in zip(peer, seconds, strict=True))
        if name in compiling:
            row["first_seconds"] = compiling[name]
        rows.append(row)
    return {"rounds": arguments.rounds, "steps": arguments.steps, "rows": rows}


def ray_nodes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same trials on one Ray node of one core and on two."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    from rankdecay.lab.ensemble import cluster

    settings, cells = grid("float32")
    settings = dataclasses.replace(
        settings, steps=arguments.steps, evaluate_every=min(arguments.steps, 100), threshold=1.0, places=2
    )
    plan = make_plan(dataclasses.replace(settings, compile="off"), "cpu", cells)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for nodes in times:
            machines = Cluster()
            for _ in range(nodes):
                machines.add_node(num_cpus=1, include_dashboard=False)
            address = str(machines.address)
            try:
                warm = cells[: 2 * nodes]
                list(cluster.rows(warm, dataclasses.replace(plan, budget=10, evaluate_every=10), address, 1, print))
                start = time.perf_counter()
                list(cluster.rows(cells[:8], plan, address, 1, print))
                times[nodes].append(time.perf_counter() - start)
            finally:
                ray.shutdown()
                machines.shutdown()
    one, two = (statistics.median(times[nodes]) for nodes in (1, 2))
    return {"one_node_seconds": one, "two_nodes_seconds": two, "efficiency": one / two / 2}


def early_leaving(path: Path) -> dict[str, Any]:
    """The share of the budget that was trained in a stored sweep, whose runs leave early."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {"runs": len(rows), "share_of_budget": sum(r["steps"] for r in rows) / sum(r["budget"] for r in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="folder that holds the prototype's experiment.py")
    parser.add_argument("--steps", type=int, default=100, help="steps per round and cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--places", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ray-nodes", action="store_true")
    parser.add_argument("--rows", type=Path, help="metrics.jsonl of a stored sweep: what leaving early saved")
    parser.add_argument("--json", type=Path, help="write the readings here")
    parser.add_argument("--show", type=Path, help="print stored readings")
    arguments = parser.parse_args()
    if arguments.show:
        result = json.loads(arguments.show.read_text())
    else:
        result = {"machine": describe_machine(arguments.device), "torch": torch.__version__}
        result |= {"ray_nodes": ray_nodes(arguments)} if arguments.ray_nodes else speed(arguments)
        if arguments.rows:
            result["early_leaving"] = early_leaving(arguments.rows)
    if arguments.json:
        stored = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(stored | result, indent=1) + "\n")
    for key, value in result.items():
        if key != "rows":
            print(f"{key}: {value}")
    for row in result.get("rows", []):
        print("  ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
