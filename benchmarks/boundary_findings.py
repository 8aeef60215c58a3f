"""The tables of `docs/findings.md` on the phase diagram, from the stored rows of the sweeps.

    python benchmarks/boundary_findings.py store runs/selection docs/data/boundary/selection   # a compact copy
    python benchmarks/boundary_findings.py table docs/data/boundary/selection                  # one line per arm
    python benchmarks/boundary_findings.py table docs/data/boundary/selection --rest 3 --differences
    python benchmarks/boundary_findings.py cells docs/data/boundary/add                        # best accuracy per cell
    python benchmarks/boundary_findings.py ranks docs/data/boundary/selection --rest 2         # what is left
    python benchmarks/boundary_findings.py ends docs/data/boundary/selection                   # what the runs kept

A compact copy is a run directory: its rows without curves and spectra, so `rankdecay report` draws it too, and a longer
sweep goes on from it.
"""

import argparse
import json
import statistics
from typing import Any

import stored

from rankdecay.lab.experiments.boundary.settings import ALIASES
from rankdecay.lab.experiments.boundary.statistics import reference, summarise
from rankdecay.lab.settings import renamed
from rankdecay.lab.store import read_metrics
from rankdecay.lab.tasks import SAMPLED

DROPPED = ("curve", "spectrum", "spectrum_index", "decay_size", "seconds")


def store(options: argparse.Namespace) -> None:
    """Copies a run directory without what only its page shows."""
    stored.copy(options.run, options.to, (_kept(row) for row in read_metrics(options.run)))


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in DROPPED} | {"seconds": round(row["seconds"])}


def rows_and_names(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str], bool]:
    """The rows asked for, the arms in their order, and whether sizes are numbers of examples."""
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    by_number = False
    for directory in options.directories:
        config = renamed(json.loads((directory / "config.json").read_text()), ALIASES)
        names |= {arm["name"]: None for arm in config["arms"]}
        rows += [renamed(row, ALIASES) for row in read_metrics(directory)]
        by_number = config["settings"]["task"] in SAMPLED
    if options.rest is not None:
        rows = [row for row in rows if row["rest_decay"] == options.rest or row["arm"] == "l2_all"]
    chosen = [name for name in names if not options.arms or name in {ALIASES.get(arm, arm) for arm in options.arms}]
    return [row for row in rows if row["arm"] in chosen], chosen, by_number


def table(options: argparse.Namespace) -> None:
    """A Markdown line per arm at its best strength, lowest boundary first."""
    rows, names, by_number = rows_and_names(options)
    summary = summarise(rows, names, ALIASES.get(options.reference, options.reference) or reference(names))
    whole = rows[0]["train_examples"] / rows[0]["train_fraction"] if by_number else 1.0
    sizes = sorted({row["train_fraction"] for row in rows})

    def size(value: float | None) -> str:
        return "…" if value is None else f"{value * whole:.0f}" if by_number else f"{value:.3g}"

    heads = [f"{size(s)}" for s in sizes]
    print(f"| arm | best strength | boundary (95 %) | {' | '.join(heads)} | stable rank | ‖W_Q‖ | angle per step |")
    print("|" + "---|" * (len(sizes) + 6))
    order = {"below": 0, None: 1, "above": 2}
    scored = [arm for arm in summary["arms"] if arm["boundary"]]
    for arm in sorted(scored, key=lambda a: (order[a["boundary"]["censored"]], a["boundary"]["train_fraction"])):
        best = arm["boundary"]
        column = [c for c in arm["cells"] if (c["strength"], c["rest_decay"]) == (best["strength"], best["rest_decay"])]
        strength = f"{best['strength']:g}" if best["strength"] else "—"
        strength += f" ({best['edge']} tried)" if best["edge"] in ("lowest", "highest") else ""
        several = len({c["rest_decay"] for c in arm["cells"]}) > 1 and arm["name"] != "l2_all"
        strength += f", rest {best['rest_decay']:g}" if several else ""
        sign = {"above": "> ", "below": "< "}.get(best["censored"] or "", "")
        bound = f"{sign}{size(best['train_fraction'])} ({size(best['low'])}–{size(best['high'])})"
        cells = {c["train_fraction"]: c for c in column}
        counts = [_count(cells.get(s)) for s in sizes]
        figures = [_mean(column, key) for key in ("stable_rank", "query_norm", "angular_step")]
        print(f"| {arm['name']} | {strength} | {bound} | {' | '.join(counts)} | {' | '.join(figures)} |")
    if options.differences:
        print("\n| compared | ratio of boundaries (95 %) |\n|---|---|")
        for d in summary["differences"]:
            names_of = [d.get("reference"), d.get("other") or d.get("arm")]
            said = "cannot be told" if d["ratio"] is None else f"{d['censored'] or ''} {d['ratio']:.2f}".strip()
            interval = f" ({_short(d['low'])}–{_short(d['high'])})" if d["ratio"] is not None else ""
            print(f"| {names_of[0]} / {names_of[1]} | {said}{interval} |")
    if options.events:
        print("\n| arm | rank first | together | accuracy first | rank alone | accuracy alone | neither |")
        print("|" + "---|" * 7)
        for arm in scored:
            print(f"| {arm['name']} | " + " | ".join(str(count) for count in arm["events"].values()) + " |")


def _count(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "—"
    steps = cell["steps_to_generalise"]
    return f"{cell['generalised']}/{cell['seeds']}" + (f" @{steps:g}" if steps is not None else "")


def _mean(column: list[dict[str, Any]], key: str) -> str:
    values = [c[key] for c in column if c[key] is not None]
    return f"{statistics.fmean(values):.2g}" if values else "—"


def _short(value: float | None) -> str:
    return "…" if value is None else f"{value:.2f}"


def cells(options: argparse.Namespace) -> None:
    """Best test accuracy of every cell (mean over seeds): an arm per table, fractions down, strengths across."""
    rows, names, _ = rows_and_names(options)
    for name in names:
        own = [row for row in rows if row["arm"] == name]
        strengths = sorted({row["strength"] for row in own})
        print(f"\n**{name}**\n\n| fraction | {' | '.join(f'{s:g}' for s in strengths)} |")
        print("|" + "---|" * (len(strengths) + 1))
        for fraction in sorted({row["train_fraction"] for row in own}, reverse=True):
            shown = []
            for strength in strengths:
                found = [
                    row["best_test_accuracy"] or 0.0
                    for row in own
                    if (row["train_fraction"], row["strength"]) == (fraction, strength)
                ]
                shown.append(f"{statistics.fmean(found):.2f}" if found else "—")
            print(f"| {fraction:g} | {' | '.join(shown)} |")


def ends(options: argparse.Namespace) -> None:
    """A Markdown line per arm: test accuracy at the end of the runs that generalised, and the best of all runs."""
    rows, names, _ = rows_and_names(options)
    threshold = json.loads((options.directories[0] / "config.json").read_text())["settings"]["threshold"]
    print(f"| arm | generalised | at their end: mean | worst | below {threshold:g} | best of all runs |")
    print("|" + "---|" * 6)
    for name in names:
        own = [row for row in rows if row["arm"] == name]
        if not own:
            continue
        last = [row["test_accuracy"] or 0.0 for row in own if row["outcome"] == "generalised"]  # none: it diverged
        mean, worst = (f"{statistics.fmean(last):.3f}", f"{min(last):.3f}") if last else ("—", "—")
        lost = sum(value < threshold for value in last)
        best = max(row["best_test_accuracy"] or 0.0 for row in own)
        print(f"| {name} | {len(last)} of {len(own)} | {mean} | {worst} | {lost} | {best:.3f} |")


def ranks(options: argparse.Namespace) -> None:
    """A Markdown line per arm at its best strength, of the runs that generalised: ranks of W_Q, W_K, products."""
    rows, names, _ = rows_and_names(options)
    keys = ("stable_rank", "effective_rank", "product_stable_rank", "product_effective_rank")
    print(
        "| arm | best strength | runs | stable rank W_Q, W_K | effective | stable rank W_KᵀW_Q of a head | effective |"
    )
    print("|" + "---|" * 7)
    for arm in summarise(rows, names, ALIASES.get(options.reference, options.reference) or reference(names))["arms"]:
        best = arm["boundary"]
        own = [
            row
            for row in rows
            if best
            and (row["arm"], row["strength"], row["rest_decay"], row["outcome"])
            == (arm["name"], best["strength"], best["rest_decay"], "generalised")
        ]
        if own:
            print(f"| {arm['name']} | {best['strength']:g} | {len(own)} | {' | '.join(_mean(own, k) for k in keys)} |")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--rest", type=float, help="only this decay of the rest of the model")
    parser.add_argument("--reference")
    parser.add_argument("--differences", action="store_true")
    parser.add_argument("--events", action="store_true")


if __name__ == "__main__":
    stored.command_line(__doc__, store, {"table": table, "cells": cells, "ends": ends, "ranks": ranks}, _options)
