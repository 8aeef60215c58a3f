"""Time per training step and run: the ensemble engine against the public prototype's loop, in one process.

    python benchmarks/grok.py                              # ours alone
    python benchmarks/grok.py --peer PATH                  # PATH: a checkout with the prototype's experiment.py
    python benchmarks/grok.py --device cuda --members 64
    python benchmarks/grok.py --curves 4                   # do mixed precision's accuracy curves match float32's?

The work is the prototype's own: addition mod 113, ordered split at 0.5, two layers of width 128, full-width QK-norm
with gains, batch 512, its Newton–Schulz decay on W_Q and W_K, the whole test set evaluated every 200 steps (ours
evaluates part of the training set and the spectra as well). Rounds of every variant are interleaved, because these
machines drift; the table gives the median over rounds and the median of the ratio to the peer's round beside it. The
prototype's dependencies (seaborn, tqdm) have to be installed for ``--peer``; its code is read from PATH, never copied.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from rankdecay.lab.ensemble.ensemble import Ensemble, compiler_available
from rankdecay.lab.experiments.grok.experiment import make_arms, make_datasets, make_ensembles
from rankdecay.lab.experiments.grok.settings import PRESETS, Grok
from rankdecay.lab.machine import describe_machine

EVALUATE_EVERY = 200
BLOCKS, BLOCK_STEPS = 30, 4


def build(
    settings: Grok, members: int, precision: str, device: str, *, compile: bool = False, decay: bool = True
) -> Ensemble:
    """An ensemble of ``members`` seeds of the prototype's low-rank arm, or of its arm without decay."""
    settings = dataclasses.replace(settings, seeds=members, precision=precision, compile="on" if compile else "off")
    settings = dataclasses.replace(settings, arms=("prototype" if decay else "none",))
    return make_ensembles(settings, make_arms(settings), make_datasets(settings), device)[0]


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def our_round(ensemble: Ensemble, steps: int) -> float:
    """Seconds per step and run, evaluation included."""
    device = ensemble.training.device
    synchronise(device)
    start = time.perf_counter()
    for _ in range(0, steps, EVALUATE_EVERY):
        ensemble.evaluate()
        ensemble.train(min(EVALUATE_EVERY, steps))
    synchronise(device)
    return (time.perf_counter() - start) / (steps * len(ensemble.members))


def peer_round(path: str, device: str) -> Callable[[int], float]:
    """A function that runs the prototype's own loop and returns seconds per step."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.path.insert(0, path)
    import experiment  # type: ignore[import-not-found]

    def run(steps: int) -> float:
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            experiment.train_run(argparse.Namespace(steps=steps, device=device), 0.5, "LowRank", 0.01, device)
        synchronise(device)
        return (time.perf_counter() - start) / steps

    return run


def speed(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Interleaved rounds of every variant."""
    settings = PRESETS["prototype"]
    device, members = arguments.device, arguments.members
    variants: dict[str, Callable[[int], float]] = {}
    if arguments.peer:
        variants["prototype's loop"] = peer_round(arguments.peer, device)
    compiled = compiler_available(device) and not arguments.no_compile
    for precision in ("float32", "mixed"):
        for name, options in {
            precision: {},
            f"{precision}, compiled": {"compile": True} if compiled else None,
        }.items():
            if options is None:
                continue
            ensemble = build(settings, members, precision, device, **options)
            ensemble.train(3)  # warm-up, and the compiler's time
            variants[name] = lambda steps, ensemble=ensemble: our_round(ensemble, steps)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, run in variants.items():
            times[name].append(run(arguments.steps))
    rows = []
    for name, seconds in times.items():
        row: dict[str, object] = {"variant": name, "milliseconds": 1e3 * statistics.median(seconds)}
        if arguments.peer:
            peer = times["prototype's loop"]
            row["times_faster"] = statistics.median(p / s for p, s in zip(peer, seconds, strict=True))
        if name in ("float32", "mixed"):
            row["decay_share"] = decay_share(settings, members, name, device)
        rows.append(row)
    return rows


def decay_share(settings: Grok, members: int, precision: str, device: str) -> float:
    """The decay's share of a step: short blocks with and without it in turn, so that drift falls on both alike."""
    ensembles = [build(settings, members, precision, device, decay=decay) for decay in (True, False)]
    blocks: list[list[float]] = [[], []]
    for _ in range(BLOCKS):
        for ensemble, seconds in zip(ensembles, blocks, strict=True):
            synchronise(device)
            start = time.perf_counter()
            ensemble.train(BLOCK_STEPS)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    return 1 - statistics.median(blocks[1]) / statistics.median(blocks[0])


def curves(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Test accuracy along the prototype's run, mean over seeds, in float32 and in mixed precision."""
    settings = dataclasses.replace(PRESETS["prototype"], weight_decay=1.0, steps=1200)
    ensembles = {p: build(settings, arguments.curves, p, arguments.device) for p in ("float32", "mixed")}
    rows = []
    for step in range(100, settings.steps + 1, 100):
        row: dict[str, object] = {"step": step}
        for precision, ensemble in ensembles.items():
            ensemble.train(100)
            accuracies = [record["test_accuracy"] for record in ensemble.evaluate()[0]]
            row |= {precision: statistics.fmean(accuracies), f"{precision}_by_seed": accuracies}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="folder that holds the prototype's experiment.py")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--curves", type=int, metavar="SEEDS", default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = curves(arguments) if arguments.curves else speed(arguments)
    machine = describe_machine(arguments.device)
    if arguments.json:
        print(json.dumps({"machine": machine, "members": arguments.members, "rows": rows}))
        return
    print(f"{machine}; torch {torch.__version__}; {arguments.members} members")
    for row in rows:
        print("  ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
