"""The tables of `docs/findings` on what decays, inspection and monitoring cost, from the stored readings.

python benchmarks/cost_findings.py step docs/data/step.json            # of earlier code, over sizes
python benchmarks/cost_findings.py goals docs/data/step_goals.json     # 24 × 768², beside five Newton–Schulz steps
python benchmarks/cost_findings.py gpt2 docs/data/step_goals.json      # as a share of a training step of GPT-2
python benchmarks/cost_findings.py inspection docs/data/inspection.json
python benchmarks/cost_findings.py parts docs/data/grok_parts.json     # of a step of the default grok
python benchmarks/cost_findings.py sweep docs/data/boundary_speed.json # beside the prototype's loop
python benchmarks/cost_findings.py tiers docs/data/tiers.json          # the error of smooth in tiers
python benchmarks/cost_findings.py sharded docs/data/sharded.json      # of sharded weights
python benchmarks/cost_findings.py paper docs/data/sharded_paper.json  # and on paper
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sharded as sharded_script
import stored

Row = dict[str, Any]
CASES = ("4x128", "24x768", "48x2048", "8x4096")
FIVE_STEPS = "five cubic steps"
GOALS = ("prox, exact", "smooth, exact", "smooth 0.13", "heads, prox", "heads, smooth 0.13", "norm^0, in place")
GOALS += ("norm^2, in place", FIVE_STEPS, "torch.linalg.svd", "AdamW.step", "AdamW.step, fused")


def rows_of(path: Path, case: str | None = None) -> dict[str, Row]:
    """The readings of a case by what was timed."""
    return {row["what"]: row for row in json.loads(path.read_text())["rows"] if case is None or row["case"] == case}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def step(options: argparse.Namespace) -> None:
    """A Markdown line per decay: milliseconds of the whole stack, by size."""
    for path in options.directories:
        by_case = {case: rows_of(path, case) for case in CASES}
        names = list(dict.fromkeys(name for rows in by_case.values() for name in rows))
        print(f"| ms | {' | '.join(case.replace('x', ' × ') + '²' for case in CASES)} |\n|---|" + "--:|" * len(CASES))
        for name in names:
            print(f"| {name} | {' | '.join(_number(by_case[c].get(name, {}).get('ms')) for c in CASES)} |")


def goals(options: argparse.Namespace) -> None:
    """A Markdown line per decay of 24 × 768², beside five cubic steps and AdamW's."""
    for path in options.directories:
        rows = rows_of(path, "24x768")
        print("| | ms | of five cubic steps | memory at its peak, in matrices |\n|---|--:|--:|--:|")
        for name in GOALS:
            row = rows[name]
            peak = "" if row.get("peak") is None else f"{row['peak']:.2f}"
            print(f"| {name} | {_number(row['ms'])} | {row['ms'] / rows[FIVE_STEPS]['ms']:.2g} | {peak} |")


def gpt2(options: argparse.Namespace) -> None:
    """A Markdown line per decay: milliseconds a step and share of a training step of GPT-2 124M."""
    for path in options.directories:
        print("| | ms a step | of a step with the decay in it |\n|---|--:|--:|")
        for name, row in rows_of(path, "gpt2").items():
            shares = row.get("share") or {}
            share = f"{next(iter(shares.values())):.2%} (every {next(iter(shares))})" if shares else ""
            print(f"| {name} | {_number(row['ms'])} | {share} |")


def inspection(options: argparse.Namespace) -> None:
    """A Markdown line per model: milliseconds a layer of `inspect`, of an SVD, of reading."""
    for path in options.directories:
        heads = ["model", "`inspect`, ms a layer", "SVD of the products, ms", "times `inspect`", "reading, ms"]
        print(f"| {' | '.join([*heads, 'times less than `inspect`', 'MB above idle'])} |\n|---|" + "--:|" * 6)
        for row in json.loads(path.read_text())["rows"]:
            shown = [_number(row["inspect_ms"]), _number(row["direct_ms"]), _number(row["times_faster_than_direct"])]
            shown += [f"{row['read_ms']:.1f}", _number(row["times_reading"]), _number(row["peak_mb_above_idle"])]
            print(f"| {row['model']} | {' | '.join(shown)} |")


def parts(options: argparse.Namespace) -> None:
    """A Markdown line per part of a step: milliseconds, share of the step and of its ceiling."""
    for path in options.directories:
        document = json.loads(path.read_text())
        print("| part | ms | of the step | of its ceiling |\n|---|--:|--:|--:|")
        for row in document["wide"]["rows"]:
            if "milliseconds" in row:
                ceiling = "" if row.get("share_of_ceiling") is None else f"{row['share_of_ceiling']:.0%}"
                print(f"| {row['part']} | {row['milliseconds']:.1f} | {row['share_of_step']:.0%} | {ceiling} |")


def sweep(options: argparse.Namespace) -> None:
    """A Markdown line per variant: milliseconds per step and cell, beside the prototype's loop."""
    for path in options.directories:
        print("| variant | ms per step and cell | cells a minute | times the prototype's loop |\n|---|--:|--:|--:|")
        for row in json.loads(path.read_text())["rows"]:
            shown = f"{row['milliseconds']:.1f} | {row['cells_per_minute']:.2f} | {row['times_faster']:.1f}"
            print(f"| {row['variant']} | {shown} |")


def sharded(options: argparse.Namespace) -> None:
    """A Markdown line per layout: what a decay of sharded weights takes and sends."""
    for path in options.directories:
        print(sharded_script.HEADER)
        for row in json.loads(path.read_text())["rows"]:
            print(sharded_script.line(sharded_script.Row(**row)))


def paper(options: argparse.Namespace) -> None:
    """A Markdown line per size and layout: the same on paper."""
    for path in options.directories:
        print(sharded_script.PAPER_HEADER)
        for row in json.loads(path.read_text())["rows"]:
            print(sharded_script.line(sharded_script.PaperRow(**row)))


def tiers(options: argparse.Namespace) -> None:
    """A Markdown line per ε: the worst error of a `smooth` step by kinds of products, and the one that is taken."""
    for path in options.directories:
        rows = json.loads(path.read_text())["rows"]
        names = list(dict.fromkeys(name for row in rows for name in row["errors"]))
        print(f"| ε / ‖W‖_F | {' | '.join(names)} | taken |\n|--:|" + "--:|" * len(names) + "---|")
        for row in rows:
            shown = [f"{row['errors'][name]:.1e}" if name in row["errors"] else "" for name in names]
            print(f"| {row['ratio']:g} | {' | '.join(shown)} | {row['chosen'].replace('-', 'no short polynomial')} |")


TABLES = {"step": step, "goals": goals, "gpt2": gpt2, "inspection": inspection, "parts": parts, "sweep": sweep}
TABLES |= {"sharded": sharded, "paper": paper, "tiers": tiers}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, stored.store, TABLES, arguments=arguments)


if __name__ == "__main__":
    main()
