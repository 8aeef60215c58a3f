"""The cost of one decay step: every rule and backend, beside an SVD, AdamW, Muon and the public prototype's decay.

    python benchmarks/step.py                                    # about 12 minutes on 2 CPU cores
    python benchmarks/step.py --cases 24x768 --rules prox --peer PATH
    python benchmarks/step.py --cases 24x768 --rounds 5          # the ratios that are goals, 5 minutes
    python benchmarks/step.py --cases gpt2 --rules prox --rounds 5 --patience 90  # the share of a GPT-2 step
    python benchmarks/step.py --device cuda --json step.json

A case is a stack of square float32 matrices (``24x768``: 24 of 768²), or ``gpt2``: W_Q and W_K of GPT-2 124M, 24 blocks
of 768² inside 12 fused parameters, decayed by the real hook. In a stack, matrices of rank n/2 with a spectrum over five
decades, as a decay leaves them, and fresh Gaussian ones take turns. τ = 3e-5·rms(σ): a learning rate of 3e-4 times a
strength of 0.1. ``smooth`` has ε = τ, ``smooth 0.13`` ε = 0.13·‖W‖_F, as five cubic steps have; ``heads`` are the same
entries as heads of 64 rows. Ratios of medians follow each table: to five cubic Newton-Schulz steps in float32
(``newton_schulz``, of this library), laws of the norm to AdamW.

Rounds of every variant are interleaved, because these machines drift. The first round warms up; the time is the median
of the others. A variant runs at least twice (once if that takes a minute) and stops after ``--patience`` seconds, 25; a
small case is repeated for 5 seconds. Where median and best are far apart, something else was using the machine.

========  ==============================================================================================================
column    meaning
========  ==============================================================================================================
measured  matrices that were timed; "1 of 48": the time is that of one, times 48
ran       the backend that actually ran (``record_backends``)
ms        of one decay: median of n rounds, and the best; then per training step at some ``every``
step      error ‖(W − out) − (W − ref)‖_F / ‖W − ref‖_F against a float64 SVD, the worst over matrices (n > 1024 and
          ``gpt2``: of the first alone)
rounding  the same of the reference itself once it is rounded to float32: what no implementation goes below
weight    error ‖out − ref‖_F / ‖W‖_F
ceiling   products only: achieved part of the rate of one product of the same stack in the dtype it computes in,
          float32 without TF32 (``smooth``: float64 at this τ); operations counted while it ran
peak      memory allocated at the same time beside W, the result included, as a part of W
share     the decay's part of a training step of GPT-2 (forward, backward, AdamW; 4 × 512 tokens), decay included; of
          ``cycle`` rows at the default ``every``, over as many steps of the optimizer with its hook
========  ==============================================================================================================

The prototype's dependencies (seaborn, tqdm) have to be installed for ``--peer``; its code is read from PATH, never
copied.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import rankdecay as rd
from rankdecay.lab.machine import describe_machine, resolve_device, versions
from rankdecay.linalg import Backend, choose_backend, newton_schulz, power_step, record_backends, shrink
from rankdecay.linalg.backend import full_precision
from rankdecay.linalg.exact import NULL_TOLERANCE

CASES = ("4x128", "24x768", "48x2048", "8x4096", "gpt2")
RULES: tuple[str, ...] = ("prox", "smooth", "polar", "newton_schulz")
#: Without --full, what a CPU measures of the large cases: one matrix, and of 8x4096 the default rule alone.
ON_CPU: dict[str, Sequence[str]] = {"48x2048": RULES, "8x4096": ["prox"]}
LEARNING_RATE, STRENGTH = 3e-4, 0.1
EVERY = (1, 4, 8, 16)
SMOOTHING, HEAD = 0.13, 64
NEWTON_SCHULZ = "five cubic steps"
POWERS = (0.0, 2.0)
#: Seconds: for one variant, for a single run to be the only one, and at least for a case.
PATIENCE, LONG, LEAST = 25.0, 60.0, 5.0


@dataclass
class Row:
    case: str
    what: str
    measured: str = ""
    ran: str = ""
    rounds: int = 0
    ms: float = 0.0
    best: float = 0.0
    every: dict[int, float] = field(default_factory=dict)
    step_error: float | None = None
    rounding: float | None = None
    weight_error: float | None = None
    ceiling: float | None = None
    peak: float | None = None
    share: dict[int, float] = field(default_factory=dict)


def timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """``call`` without TF32, returning its seconds."""

    def run() -> float:
        with full_precision(torch.device(device)), Clock(device) as clock:
            call()
        return clock.seconds

    return run


def interleaved(
    variants: dict[str, Callable[[], float]], rounds: int, patience: float = PATIENCE
) -> dict[str, list[float]]:
    """Seconds of each variant, in rounds, without the first where there are others."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    start, done = time.perf_counter(), 0
    while done < rounds + 1 or time.perf_counter() - start < LEAST:
        for name, run in variants.items():
            if done * min(times[name], default=0.0) < (LONG if done == 1 else patience):
                times[name].append(run())
        done += 1
    return {name: seconds[1:] or seconds for name, seconds in times.items()}


def timing(seconds: list[float], of_all: float = 1.0) -> dict[str, Any]:
    """The time columns, scaled to all matrices of a case."""
    milliseconds = [1e3 * of_all * s for s in seconds]
    return {"rounds": len(seconds), "ms": statistics.median(milliseconds), "best": min(milliseconds)}


def reference(W: Tensor, tau: Tensor, steps: int = 5) -> dict[str, Tensor]:
    """W − ref of every rule, in float64 from an SVD: the table of rankdecay.linalg.shrink."""
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    t, p = tau.double()[:, None], sigma / sigma.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        p = p * (3 - p * p) / 2
    taken = {
        "prox": sigma.minimum(t),
        "smooth": t * sigma / torch.hypot(sigma, t),
        "polar": t * (sigma > NULL_TOLERANCE * sigma[:, :1]),
        "newton_schulz": t * p,
    }
    return {rule: (U * change[:, None]) @ Vh for rule, change in taken.items()}


def errors(W: Tensor, out: Tensor, step: Tensor) -> dict[str, float]:
    """The error columns: the worst of the matrices of which there is a reference."""
    W, out = W[: len(step)].double(), out[: len(step)].double()
    size, rounded = step.norm(dim=(-2, -1)), (W - step).float().double()
    off = (W - out - step).norm(dim=(-2, -1))
    return {
        "step_error": float((off / size).max()),
        "rounding": float(((W - rounded - step).norm(dim=(-2, -1)) / size).max()),
        "weight_error": float((off / W.norm(dim=(-2, -1))).max()),
    }


def decays(rules: Sequence[str]) -> list[tuple[str, str, Backend]]:
    backends: tuple[Backend, ...] = ("exact", "matmul")
    return [(f"{r}, {b}", r, b) for r in rules for b in backends if (r, b) != ("newton_schulz", "exact")]


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Most bytes that a call holds at one time beside what was there."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    kineto: Any = profiler.profiler
    held = most = 0
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# ---- stacks ------------------------------------------------------------------------------------------------


def make_stack(count: int, n: int, device: str) -> Tensor:
    """In turn, matrices of rank n/2 with singular values over five decades, and Gaussian ones."""
    generator = torch.Generator(device).manual_seed(0)
    W = 0.02 * torch.randn(count, n, n, generator=generator, device=device)
    decades = torch.logspace(0, -5, n // 2, device=device)
    for i in range(0, count, 2):
        right = torch.randn(n // 2, n, generator=generator, device=device)
        W[i] = (W[i, :, : n // 2] * decades) @ right / (n // 2) ** 0.5
    return W


class Stack:
    """Decays of a stack of matrices, with what each returned, which backends it ran and its operations."""

    def __init__(self, W: Tensor, device: str) -> None:
        self.W, self.device = W, device
        self.tau = rd.LowRank(STRENGTH).threshold(W, LEARNING_RATE)
        self.outputs: dict[str, Tensor] = {}
        self.ran: dict[str, str] = {}
        self.operations: dict[str, int] = {}

    def decay(self, name: str, rule: str, backend: Backend) -> Callable[[], float]:
        """A decay by a rule and a backend, which returns its seconds."""

        def run() -> float:
            self.outputs.pop(name, None)
            counter = FlopCounterMode(display=False)
            counting = contextlib.nullcontext() if name in self.operations else counter
            with record_backends() as backends, counting, Clock(self.device) as clock:
                self.outputs[name] = shrink(self.W, self.tau, rule, backend=backend)
            self.operations.setdefault(name, counter.get_total_flops())
            self.ran[name] = " + ".join(dict.fromkeys(backends))
            return clock.seconds

        return run

    def extra(self, rules: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """Five cubic steps, and decays with smoothing and per head."""
        W, tau, n = self.W, self.tau, self.W.shape[1]
        found: dict[str, Callable[[], Tensor]] = {NEWTON_SCHULZ: lambda: newton_schulz(W)}
        if "smooth" in rules:
            found[f"smooth {SMOOTHING}"] = lambda: shrink(W, tau, "smooth", smoothing=SMOOTHING)
        if "prox" in rules and n % HEAD == 0:
            heads = W.unflatten(1, (n // HEAD, HEAD))
            found["heads, prox"] = lambda: shrink(heads, tau[:, None])
            found[f"heads, smooth {SMOOTHING}"] = lambda: shrink(heads, tau[:, None], "smooth", smoothing=SMOOTHING)
        return found

    def beside(self, path: str | None) -> dict[str, Callable[[], float]]:
        """Laws of the norm, an SVD, optimizers, and the prototype's decay if its path is given."""
        W, device = self.W, self.device
        in_place = W.clone()
        found = {
            f"norm^{power:g}, in place": timed(
                lambda power=power: power_step(in_place, 1e-9, power, out=in_place), device
            )
            for power in POWERS
        }
        found["torch.linalg.svd"] = timed(lambda: torch.linalg.svd(W, full_matrices=False), device)
        found["AdamW.step"] = timed(torch.optim.AdamW(trained(W), lr=LEARNING_RATE).step, device)
        found["AdamW.step, fused"] = timed(torch.optim.AdamW(trained(W), lr=LEARNING_RATE, fused=True).step, device)
        found["Muon.step"] = timed(torch.optim.Muon(trained(W), lr=LEARNING_RATE).step, device)
        if path:
            named = [(f"w{i}", p) for i, p in enumerate(trained(W))]
            found["prototype's decay"] = timed(peer(path)(named, decay_rate=float(self.tau[0])).step, device)
        return found


def stack_rows(case: str, rules: Sequence[str], arguments: argparse.Namespace) -> list[Row]:
    """The rows of a stack: decays, and what they are held against."""
    device = arguments.device
    count, n = map(int, case.split("x"))
    measured = count
    if device == "cpu" and case in ON_CPU and not arguments.full:
        rules = [rule for rule in ON_CPU[case] if rule in rules]
        measured = 1
    W = make_stack(measured, n, device)
    stack, chosen = Stack(W, device), decays(rules)
    extra = stack.extra(rules)
    variants = {name: stack.decay(name, rule, backend) for name, rule, backend in chosen}
    for X in (W, W.double()):
        variants[f"one product, {str(X.dtype)[6:]}"] = timed(lambda X=X: X @ X, device)
    variants |= {name: timed(call, device) for name, call in extra.items()}
    variants |= stack.beside(arguments.peer)
    seconds = interleaved(variants, arguments.rounds, arguments.patience)
    amount = str(count) if measured == count else f"{measured} of {count}"
    rows = {name: Row(case, name, amount, **timing(seconds[name], count / measured)) for name in variants}
    known = 1 if n > 1024 else measured
    taken = reference(W[:known], stack.tau[:known])
    for name, rule, _ in chosen:
        row = rows[name] = replace(rows[name], ran=stack.ran[name], **errors(W, stack.outputs[name], taken[rule]))
        row.every = {k: row.ms / k for k in EVERY}
        if stack.ran[name] == "matmul":
            product = rows["one product, " + ("float64" if rule == "smooth" else "float32")]
            row.ceiling = stack.operations[name] / (2 * measured * n**3) * product.ms / row.ms
    of_decay = {name: lambda r=rule, b=backend: shrink(W, stack.tau, r, backend=b) for name, rule, backend in chosen}
    for name, call in (of_decay | extra).items():
        rows[name].peak = peak_memory(call, device) / (W.numel() * W.element_size())
    for row in rows.values():
        print_ratio(row, rows)
    print(f'{case}: backend="auto" takes {choose_backend(W.shape, W.device, W.dtype)}', flush=True)
    return list(rows.values())


def print_ratio(row: Row, rows: dict[str, Row]) -> None:
    """Print the time of a decay over that of five cubic steps, and of a law of the norm over AdamW."""
    if row.what.startswith("norm^"):
        others = ("AdamW.step", "AdamW.step, fused")
    elif row.what.startswith(("prox", "smooth", "heads", "prototype")):
        others = (NEWTON_SCHULZ,)
    else:
        return
    for other in others:
        print(f"{row.case}: {row.what} / {other} = {row.ms / rows[other].ms:.2f}", flush=True)


def trained(W: Tensor) -> list[Parameter]:
    """Copies of the matrices, each a parameter with a gradient."""
    parameters = [Parameter(matrix.clone()) for matrix in W]
    for p in parameters:
        p.grad = 1e-3 * torch.randn_like(p)
    return parameters


def peer(path: str) -> Callable[..., Any]:
    """The prototype's decay, a class with a ``step``."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.path.insert(0, path)
    try:
        import experiment  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        sys.exit(f"--peer {path}: no module named {error.name}; its experiment.py needs matplotlib, seaborn and tqdm")
    return experiment.NewtonSchulzLowRankDecay


# ---- GPT-2 -------------------------------------------------------------------------------------------------


class TrainedGPT2:
    """GPT-2 under AdamW, with what the first call of each decay found."""

    def __init__(self, device: str) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        self.device = device
        self.model: Any = GPT2LMHeadModel(GPT2Config())
        self.model.to(device)
        self.tokens = torch.randint(50257, (4, 512), device=device)
        self.policy = rd.LowRank(STRENGTH, every=1)
        self.optimizer = self._adamw(self.policy)
        self.fused: list[Parameter] = [block.attn.c_attn.weight for block in self.model.transformer.h]
        self.found: dict[str, dict[str, Any]] = {}

    def _adamw(self, decay: rd.LowRank) -> torch.optim.AdamW:
        return torch.optim.AdamW(rd.param_groups(self.model, rd.Frobenius(0.1), query_key=decay), lr=LEARNING_RATE)

    def blocks(self) -> Tensor:
        """W_Q and W_K of every layer."""
        return torch.stack([block for p in self.fused for block in p.detach().split(768, dim=1)[:2]])

    def train(self) -> None:
        """One step without a decay of low rank."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()

    def decay(self, name: str, rule: str, backend: Backend) -> Callable[[], float]:
        """The hook's time in one step."""
        optimizer = self.optimizer

        def run() -> float:
            clock = Clock(self.device)
            before: list[Tensor] = []

            def start(*_: object) -> None:
                if name not in self.found:
                    before.append(self.blocks())
                clock.__enter__()

            for group in optimizer.param_groups:
                if "query_key_rule" in group:
                    group["query_key_rule"] = rule
            handles = [optimizer.register_step_post_hook(start)]
            attachment = rd.attach(optimizer, backend=backend)
            handles += [optimizer.register_step_post_hook(clock.__exit__)]
            with record_backends() as ran:
                optimizer.step()
            attachment.detach()
            for handle in handles:
                handle.remove()
            if name not in self.found:
                W = before[0]
                taken = reference(W[:1], self.policy.threshold(W[:1], LEARNING_RATE))[rule]
                self.found[name] = {"ran": " + ".join(dict.fromkeys(ran)), **errors(W, self.blocks(), taken)}
            return clock.seconds

        return run

    def cycle(self, decay: rd.LowRank, steps: int) -> Callable[[], float]:
        """The hook's time over as many steps as the default ``every`` has, per step."""

        def run() -> float:
            clock = Clock(self.device)
            seconds = 0.0
            other = self._adamw(decay)
            handles = [other.register_step_post_hook(lambda *_: clock.__enter__() and None)]
            attachment = rd.attach(other)
            handles += [other.register_step_post_hook(clock.__exit__)]
            for _ in range(steps):
                other.step()
                seconds += clock.seconds
            attachment.detach()
            for handle in handles:
                handle.remove()
            return seconds / steps

        return run


def gpt2_rows(case: str, rules: Sequence[str], arguments: argparse.Namespace) -> list[Row]:
    """The hook's own time, between a hook before it and one after it, and a training step without it."""
    device = arguments.device
    gpt2, chosen = TrainedGPT2(device), decays(rules)
    variants = {
        "training step": timed(gpt2.train, device),
        "of that AdamW.step": timed(gpt2.optimizer.step, device),
    }
    cycles = {
        "cycle: defaults": rd.LowRank(STRENGTH),
        "cycle: per head": rd.LowRank(STRENGTH, unit="head"),
        f"cycle: smooth {SMOOTHING}": rd.LowRank(STRENGTH, rule="smooth", smoothing=SMOOTHING),
    }
    lengths = {name: decay.interval(HEAD if decay.unit == "head" else 768) for name, decay in cycles.items()}
    variants |= {name: gpt2.cycle(decay, lengths[name]) for name, decay in cycles.items()}
    variants |= {f"hook: {name}": gpt2.decay(f"hook: {name}", rule, backend) for name, rule, backend in chosen}
    seconds = interleaved(variants, arguments.rounds, arguments.patience)
    rows = {name: Row(case, name, **timing(seconds[name])) for name in variants}
    for name, values in gpt2.found.items():
        row = rows[name] = replace(rows[name], measured="24", **values)
        row.every = {k: row.ms / k for k in EVERY}
        row.share = {k: ms / (rows["training step"].ms + ms) for k, ms in row.every.items()}
    for name, k in lengths.items():
        rows[name].share = {k: rows[name].ms / (rows["training step"].ms + rows[name].ms)}
    print(f'{case}: backend="auto" takes {"exact" if device == "cpu" else "matmul"}', flush=True)
    return list(rows.values())


# ---- the table ---------------------------------------------------------------------------------------------


def header() -> str:
    words = ("ms", "best", *(f"every={k}" for k in EVERY), "step", "rounding", "weight", "ceiling", "peak")
    columns = "".join(f"{word:>10}" for word in words)
    return f"{'case':8}{'what':28}{'measured':9}{'ran':7}{'n':>4}{columns}  share at every="


def line(row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return " " * 10 if value is None else f"{format(value, form):>10}"

    cells = [f"{row.case:8}{row.what:28}{row.measured:9}{row.ran:7}{row.rounds:>4}"]
    for ms in (row.ms, row.best, *(row.every.get(k) for k in EVERY)):
        cells.append(number(ms, ",.0f" if ms and ms >= 100 else ".2f"))
    cells += [number(error, ".1e") for error in (row.step_error, row.rounding, row.weight_error)]
    shares = (f"{k}: {share:.2%}" for k, share in row.share.items())
    cells += [number(row.ceiling, ".0%"), number(row.peak, ".2f"), "  ", ", ".join(shares)]
    return "".join(cells).rstrip()


def show(paths: Sequence[str]) -> None:
    for path in paths:
        record = json.loads(Path(path).read_text())
        print(f"{record['machine']}; torch {record['versions']['torch']}\n{header()}")
        for row in record["rows"]:
            by_every = {name: {int(k): v for k, v in (row[name] or {}).items()} for name in ("every", "share")}
            print(line(Row(**(row | by_every))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--rounds", type=int, default=3, help="after the one that warms up")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds after which a variant stops")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--peer", help="folder that holds the prototype's experiment.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="measure all matrices of the large cases on a CPU as well")
    parser.add_argument("--json", metavar="PATH", help="write the machine and every row")
    parser.add_argument("--show", nargs="+", metavar="PATH", help="print the tables of such files, and measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        return show(arguments.show)
    arguments.device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine = describe_machine(arguments.device)
    print(f"{machine}; torch {torch.__version__}; τ = {LEARNING_RATE * STRENGTH:g}·rms(σ)\n{header()}", flush=True)
    rows: list[Row] = []
    for case in arguments.cases:
        new = (gpt2_rows if case == "gpt2" else stack_rows)(case, arguments.rules, arguments)
        print("\n".join(map(line, new)), flush=True)
        rows += new
        if arguments.json:
            record = {"machine": machine, "versions": versions(), "rows": [asdict(row) for row in rows]}
            Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
