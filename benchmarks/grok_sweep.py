"""The sweep behind the defaults of ``rankdecay grok``: every decay of W_Q and W_K over a range of strengths.

    python benchmarks/grok_sweep.py run --out docs/data/grok_sweep.jsonl                # skips what the file has
    python benchmarks/grok_sweep.py run --rest 1 --only l2 smooth --out docs/data/grok_sweep.jsonl
    python benchmarks/grok_sweep.py table docs/data/grok_sweep.jsonl

One line per run: settings, test accuracy at every evaluation, ranks and norms at the end. The file is appended to and
a run it holds is never computed twice, so a longer sweep continues a shorter one.
"""

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from rankdecay.decay import Frobenius, LowRank
from rankdecay.decay.policy import OfMatrix
from rankdecay.lab.ensemble.outcome import steps_to_hold
from rankdecay.lab.experiment import Arm
from rankdecay.lab.experiments.grok.experiment import GrokTreatment, make_datasets, make_ensembles
from rankdecay.lab.experiments.grok.settings import Grok
from rankdecay.lab.settings import subset

EVALUATE_EVERY = 40


def absolute(rule: Any, amount: float, **options: Any) -> LowRank:
    """A low-rank decay that takes ``amount`` per step, whatever the learning rate and the size of the weight."""
    return LowRank(amount, rule=rule, scale="absolute", lr_coupled=False, **options)


def treatments(lr: float, rest: float) -> dict[str, tuple[OfMatrix | None, bool]]:
    """Decay, and whether attention is held uniform, of every arm by name.

    L2 and relative strengths are named by what they take per step, lr times strength.
    """
    table: dict[str, tuple[OfMatrix | None, bool]] = {
        "none": (None, False),
        "uniform_attention": (None, True),
        "l2 usual": (Frobenius(rest), False),
    }
    for share in (0.01, 0.03, 0.06, 0.1, 0.2, 0.4):
        table[f"l2 {share:g}"] = (Frobenius(share / lr), False)
    for amount in (0.005, 0.01, 0.02, 0.04):
        table[f"newton_schulz absolute {amount:g}"] = (absolute("newton_schulz", amount), False)
        table[f"smooth F/7.6 absolute {amount:g}"] = (absolute("smooth", amount, smoothing=1 / 7.6), False)
    for every in (2, 4, 8):
        name = f"smooth F/7.6 absolute 0.01 every {every}"
        table[name] = (absolute("smooth", 0.01, smoothing=1 / 7.6, every=every), False)
    for amount in (0.01, 0.02):
        table[f"smooth F/30 absolute {amount:g}"] = (absolute("smooth", amount, smoothing=1 / 30), False)
        table[f"smooth F/100 absolute {amount:g}"] = (absolute("smooth", amount, smoothing=1 / 100), False)
    for amount in (0.0025, 0.005, 0.01, 0.02):
        table[f"prox absolute {amount:g}"] = (absolute("prox", amount, every=4), False)
    for share in (0.03, 0.1, 0.2):
        table[f"prox relative {share:g}"] = (LowRank(share / lr, every=4), False)
        table[f"smooth F/7.6 relative {share:g}"] = (LowRank(share / lr, rule="smooth", smoothing=1 / 7.6), False)
    return table


def run(options: argparse.Namespace) -> None:
    """Run every arm that the file does not hold yet."""
    torch.set_num_threads(options.threads)
    done = {(r["arm"], r["seed"], json.dumps(r["settings"])) for r in read(options.out)}
    for rest in options.rest:
        settings = dataclasses.replace(
            Grok(),
            seeds=options.seeds,
            steps=options.steps,
            weight_decay=rest,
            lr=options.lr,
            batch_size=options.batch_size,
            modulus=options.modulus,
            train_examples=options.examples,
            depth=options.depth,
            values=options.values,
            width=options.width,
            mlp_width=options.mlp_width,
        )
        datasets = make_datasets(settings)
        names = "task modulus values train_examples steps weight_decay lr batch_size precision width mlp_width depth"
        key = subset(settings, *names.split())
        for name, (decay, uniform) in treatments(settings.lr, rest).items():
            if options.only and not any(part in name for part in options.only):
                continue
            seeds = [seed for seed in datasets if (name, seed, json.dumps(key)) not in done]
            if not seeds:
                continue
            arm = Arm(name, "", GrokTreatment(decay, uniform))
            (ensemble,) = make_ensembles(settings, [arm], {seed: datasets[seed] for seed in seeds}, "cpu")
            history: dict[int, list[dict[str, Any]]] = {seed: [] for seed in seeds}
            while ensemble.steps[0] < settings.steps:
                ensemble.train(EVALUATE_EVERY)
                for record in ensemble.evaluate()[0]:
                    history[record["seed"]].append(record)
            with options.out.open("a") as file:
                for seed, records in history.items():
                    file.write(json.dumps(row(name, seed, key, records)) + "\n")
            final = [records[-1]["test_accuracy"] for records in history.values()]
            print(f"rest {rest:g}  {name:<32}", final, flush=True)


def row(arm: str, seed: int, settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as it is stored."""
    last = records[-1]
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings,
        "steps_to_95": steps_to_hold(records, 0.95),
        "test_accuracy": [None if (a := r["test_accuracy"]) is None else round(a, 4) for r in records],
        **{k: last[k] for k in ("train_accuracy", "stable_rank", "effective_rank", "query_norm", "key_norm")},
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The stored runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(options: argparse.Namespace) -> None:
    """Print a Markdown table per group of settings, arms ordered by how soon and how often they generalise."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in read(options.path):
        shown = (
            "modulus",
            "values",
            "width",
            "mlp_width",
            "depth",
            "train_examples",
            "weight_decay",
            "lr",
            "batch_size",
        )
        title = ", ".join(f"{name} {record['settings'][name]:g}" for name in shown)
        groups.setdefault(title, {}).setdefault(record["arm"], []).append(record)
    for title, by_arm in groups.items():
        print(f"\n**{title}**\n")
        print("| decay of W_Q, W_K | reached 95 % | median step | final test | worst | stable rank | ‖W_Q‖ |")
        print("|---|---|---|---|---|---|---|")
        lines = []
        for arm, runs in by_arm.items():
            steps = statistics.median(math.inf if r["steps_to_95"] is None else r["steps_to_95"] for r in runs)
            final = [r["test_accuracy"][-1] or 0.0 for r in runs]
            reached = sum(r["steps_to_95"] is not None for r in runs)
            line = f"| {arm} | {reached} of {len(runs)} | {'—' if math.isinf(steps) else f'{steps:g}'} | "
            line += f"{statistics.fmean(final):.2f} | {min(final):.2f} | "
            line += " | ".join(
                f"{statistics.fmean(r[k] or 0.0 for r in runs):.2g}" for k in ("stable_rank", "query_norm")
            )
            lines.append((steps, -reached, -statistics.fmean(final), line + " |"))
        print("\n".join(line for *_, line in sorted(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sweep = commands.add_parser("run")
    sweep.set_defaults(action=run)
    sweep.add_argument("--out", type=Path, required=True)
    sweep.add_argument("--rest", type=float, nargs="+", default=[3.0])
    sweep.add_argument("--lr", type=float, default=1e-3)
    sweep.add_argument("--modulus", type=int, default=31)
    sweep.add_argument("--examples", type=int, default=3000)
    sweep.add_argument("--values", type=int, default=4)
    sweep.add_argument("--width", type=int, default=128)
    sweep.add_argument("--mlp-width", type=int, default=512)
    sweep.add_argument("--depth", type=int, default=2)
    sweep.add_argument("--batch-size", type=int, default=256)
    sweep.add_argument("--steps", type=int, default=640)
    sweep.add_argument("--seeds", type=int, default=3)
    sweep.add_argument("--only", nargs="*", help="run arms whose name contains one of these")
    sweep.add_argument("--threads", type=int, default=2)
    show = commands.add_parser("table")
    show.set_defaults(action=table)
    show.add_argument("path", type=Path)
    options = parser.parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
