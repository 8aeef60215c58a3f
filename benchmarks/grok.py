"""Time per training step and run: the ensemble engine against the public prototype's loop, in one process.

    python benchmarks/grok.py                              # ours alone
    python benchmarks/grok.py --peer PATH                  # PATH: a checkout with the prototype's experiment.py
    python benchmarks/grok.py --device cuda --members 64
    python benchmarks/grok.py --curves 4                   # do mixed precision's accuracy curves match float32's?
    python benchmarks/grok.py --parts --threads 1          # each part of a step of the default grok, and its ceiling

The work is the prototype's own: addition mod 113, ordered split at 0.5, two layers of width 128, full-width QK-norm
with gains, batch 512, its Newton–Schulz decay on W_Q and W_K, the whole test set evaluated every 200 steps (ours
evaluates part of the training set and the spectra as well). Rounds of every variant are interleaved, because these
machines drift; the table gives the median over rounds and the median of the ratio to the peer's round beside it. The
prototype's dependencies (seaborn, tqdm) have to be installed for ``--peer``; its code is read from PATH, never copied.

``--parts`` takes one float32 step of the default `rankdecay grok` apart (three seeds of the low-rank arm; a core trains
one such ensemble). Every call that the network makes is recorded with its inputs and timed alone, forwards and
backwards. Its ceiling is the time that its products take at the rate of one large float32 product, and its memory
passes (every input and output once) at the rate of a triad over arrays of the size of the largest activation, which
are in the cache as they are in training. The share is ceiling over time.
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
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from clock import seconds_of

from rankdecay.lab.ensemble import transformer
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.experiments.grok.experiment import make_arms, make_datasets, make_ensembles
from rankdecay.lab.experiments.grok.settings import PRESETS, Grok
from rankdecay.lab.machine import compiler_available, describe_machine

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


# --- the parts of a step ----------------------------------------------------------------------------------


Call = tuple[Callable[..., object], tuple[object, ...]]
FUNCTIONS = ("_Product", "_UnitRMS", "_Gather")  # of the transformer, by what they are called in the table
PART_NAMES = {"_Product": "products", "_UnitRMS": "norms", "_Gather": "gathered tables", "_attend": "attention"}


def recorded(ensemble: Ensemble) -> tuple[dict[str, list[Call]], Callable[[], tuple[torch.Tensor, ...]]]:
    """The calls of one forward pass by part, and a function that does the pass and its backward."""
    calls: dict[str, list[Call]] = {}

    def spy(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*inputs: object, **options: object) -> object:
            bound = (lambda *i: function(*i, **options)) if options else function
            calls.setdefault(PART_NAMES.get(name, name), []).append((bound, inputs))
            return function(*inputs, **options)

        return call

    rows = ensemble._batch_indices(1)[0]
    member = torch.arange(len(ensemble.members))[:, None]
    tokens, targets = ensemble._train_tokens[member, rows], ensemble._train_targets[member, rows]
    arguments = ensemble.parameters, tokens, targets, ensemble.config, torch.float32
    with contextlib.ExitStack() as stack:
        for name in FUNCTIONS:
            function = getattr(transformer, name)
            stack.enter_context(patch.object(transformer, name, SimpleNamespace(apply=spy(name, function.apply))))
        stack.enter_context(patch.object(transformer, "_attend", spy("_attend", transformer._attend)))
        stack.enter_context(patch.object(F, "silu", spy("silu", F.silu)))
        stack.enter_context(patch.object(F, "cross_entropy", spy("cross-entropy", F.cross_entropy)))
        transformer.loss(*arguments)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(transformer.loss(*arguments).sum(), list(ensemble.parameters.values()))

    return calls, gradients


def replay(calls: list[Call]) -> tuple[Callable[[], object], float, float]:
    """A function that does some calls forwards and backwards, their operations, and the bytes of their passes."""
    prepared, operations, moved = [], 0.0, 0.0
    for function, inputs in calls:
        leaves = [
            i.detach().clone().requires_grad_() if isinstance(i, torch.Tensor) and i.is_floating_point() else i
            for i in inputs
        ]
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, torch.Tensor)
        wanted = [i for i in leaves if isinstance(i, torch.Tensor) and i.requires_grad]
        prepared.append((function, leaves, wanted, torch.randn_like(out)))
        operations += 3 * 2 * out.numel() * wanted[0].shape[-1]
        read, written = sum(i.nbytes for i in wanted), out.nbytes
        moved += (read + written) + (read + written + read)  # forwards; backwards

    def work() -> None:
        for function, leaves, wanted, gradient in prepared:
            out = function(*leaves)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, wanted, gradient)  # type: ignore[arg-type]

    return work, operations, moved


def parts(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Milliseconds of every part of a step, its share of the step, and its ceiling's share of its time."""
    torch.set_num_threads(arguments.threads)
    settings = dataclasses.replace(PRESETS["default"], precision="float32", compile="off", arms=("low_rank",))
    (ensemble,) = make_ensembles(settings, make_arms(settings), make_datasets(settings), "cpu")
    ensemble.train(4)
    calls, gradients = recorded(ensemble)
    found = dict(zip(ensemble.parameters, gradients(), strict=True))
    every = settings.every
    square, column = torch.randn(2048, 2048), torch.randn(3 * 128 * 5 * 256)
    into, other = torch.empty_like(column), torch.randn_like(column)

    def adamw() -> None:
        for rows in ensemble._rows:
            rows.step(found, ensemble.training.betas, ensemble.training.eps)

    def decay() -> None:  # an interval's worth, once
        for group in ensemble._groups:
            ensemble._decayed(group, every, ensemble.query_key)

    works: dict[str, tuple[Callable[[], object], float, float]] = {
        "step": (lambda: ensemble.train(4), 0, 0),
        "forward and backward": (gradients, 0, 0),
        **{name: replay(some) for name, some in calls.items()},
        "AdamW": (adamw, 0, 7 * ensemble._weights.nbytes),
        "low-rank decay": (decay, 0, 0),
        "one product": (lambda: square @ square, 2 * 2048**3, 0),
        "triad": (lambda: torch.add(column, other, alpha=0.5, out=into), 0, 3 * column.nbytes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(arguments.rounds + 1):  # the first warms up
        for name, (work, _, _) in works.items():
            spent = seconds_of(work, repeats=1 if name == "one product" else 8) / {
                "step": 4,
                "low-rank decay": every,
            }.get(name, 1)
            if number:
                seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = works["one product"][1] / median["one product"]
    bandwidth = works["triad"][2] / median["triad"]
    rows: list[dict[str, object]] = [
        {"part": "one product", "gflop_per_second": rate / 1e9},
        {"part": "triad", "gigabytes_per_second": bandwidth / 1e9},
    ]
    for name, (_, operations, moved) in works.items():
        if name in ("one product", "triad"):
            continue
        row: dict[str, object] = {"part": name, "milliseconds": 1e3 * median[name]}
        row["share_of_step"] = median[name] / median["step"]
        if moved:
            ceiling = operations / rate if name == "products" else moved / bandwidth
            row["share_of_ceiling"] = ceiling / median[name]
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
    parser.add_argument("--parts", action="store_true", help="the parts of a step and their ceilings")
    parser.add_argument("--threads", type=int, default=1, help="for --parts: an ensemble has one core")
    parser.add_argument("--curves", type=int, metavar="SEEDS", default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = parts(arguments) if arguments.parts else curves(arguments) if arguments.curves else speed(arguments)
    machine = describe_machine(arguments.device)
    members = PRESETS["default"].seeds if arguments.parts else arguments.curves or arguments.members
    if arguments.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, "members": members, "rows": rows}, indent=1))
        return
    print(f"{machine}; torch {torch.__version__}; {members} members")
    for row in rows:
        print("  ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
