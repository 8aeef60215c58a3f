"""The tables of `docs/findings` on attention and its SVM, from the stored summaries of `rankdecay margin`.

    python benchmarks/margin_findings.py store runs/margin_generic docs/data/margin/generic
    python benchmarks/margin_findings.py arms docs/data/margin/*        # one line per arm
    python benchmarks/margin_findings.py growth docs/data/margin/*      # and per power of ten of the margin
    python benchmarks/margin_findings.py paired docs/data/margin/{finite,adam}  # arms less the flow, at equal margins
    python benchmarks/margin_findings.py inner docs/data/margin/inner_*         # fewer columns than the dimension
    python benchmarks/margin_findings.py head docs/data/margin/head             # a value head that is trained too

Stored are the settings and the summary, which has the figures of each data set at the end.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stored
from stored import interval

from rankdecay.lab.store import read_json

Row = dict[str, Any]
DATA = Path("docs/data/margin")
FLOW = "finite"  # whose arm separate the runs without one are held against at equal margins


def summaries(options: argparse.Namespace) -> list[tuple[str, Row]]:
    """The runs asked for, by the name of their folder."""
    return [(path.name, summary) for path in options.directories if (summary := read_json(path / "summary.json"))]


def arms(options: argparse.Namespace) -> None:
    """A Markdown line per run and arm: means over data sets, and the data set furthest from it."""
    print("| run | arm | steps | cosine to nuclear (least) | to Frobenius (least) | nearer to nuclear | ‖W‖_* above "
          "(range) | ‖W‖_F above | effective rank | median margin | all tokens optimal |")  # fmt: skip
    print("|" + "---|" * 11)
    for run, summary in summaries(options):
        for row in summary["arms"]:
            cosines = (f"{row[f'cosine_{norm}']:.4f} ({row[f'cosine_{norm}_least']:.4f})" for norm in NORMS)
            excess = [value for value in row["each"]["nuclear_excess"] if value is not None]
            shown = [
                run, row["name"], str(row["steps"]), *cosines, f"{row['nearer_nuclear']} of {row['seeds']}",
                f"{row['nuclear_excess']:.2%} ({min(excess):.2%}–{max(excess):.2%})", f"{row['frobenius_excess']:.2%}",
                f"{row['effective_rank']:.2f}", f"{row['margin']:.2g}", f"{row['all_optimal']} of {row['seeds']}",
            ]  # fmt: skip
            print(f"| {' | '.join(shown)} |")
    for run, summary in summaries(options):
        for row in summary["arms"]:
            excess = [value for value in row["each"]["nuclear_excess"] if value is not None]
            within = sum(value <= 0.002 for value in excess)
            near = sum(value is not None and value >= 0.995 for value in row["each"]["cosine_nuclear"])
            print(f"{run}, {row['name']}: {within} of {len(excess)} within 0.2 % of the least ‖W‖_*, "
                  f"{near} at a cosine of at least 0.995 to the nuclear SVM; the SVMs' ranks "
                  f"{row['rank_nuclear']:.1f} and {row['rank_frobenius']:.1f}, their cosine "
                  f"{row['cosine_between']:.3f}")  # fmt: skip


NORMS = ("nuclear", "frobenius")
GROWTH: dict[str, Callable[[Row], str]] = {
    "cosine to nuclear": lambda at: f"{at['cosine_nuclear']:.3f}",
    "cosine to Frobenius": lambda at: f"{at['cosine_frobenius']:.3f}",
    "‖W‖_* above": lambda at: f"{at['nuclear_excess']:.2%}",
    "‖W‖_F above": lambda at: f"{at['frobenius_excess']:.2%}",
    "effective rank": lambda at: f"{at['effective_rank']:.2f}",
    "data sets": lambda at: str(at["datasets"]),
}


def growth(options: argparse.Namespace) -> None:
    """A Markdown table per run and arm: the figures when the margins were 1, 10, 100, …"""
    for run, summary in summaries(options):
        for row in summary["arms"]:
            if len(row["at"]) > 1:
                heads = " | ".join(f"{at['margin']:.0e}" for at in row["at"])
                print(f"\n**{run}, {row['name']}**\n\n| margin | {heads} |")
                print("|" + "---|" * (len(row["at"]) + 1))
                for name, figure in GROWTH.items():
                    print(f"| {name} | {' | '.join(figure(at) for at in row['at'])} |")


# --- what the theory leaves out: finite steps, fewer columns, a trained head ---


def at_margin(run: str, arm: str, margin: float, key: str) -> dict[int, float]:
    """A figure of every data set of an arm when it had some margin, by the data set."""
    row = stored.arms(DATA / run)[arm]
    for at in row["at"]:
        if math.isclose(at["margin"], margin):
            return dict(zip(at["sets"], at["each"][key], strict=True))
    return {}


def differences(run: str, arm: str, margin: float, key: str = "cosine_nuclear") -> list[float]:
    """By how much an arm is above the flow in every data set that both have at some margin."""
    of = run if "separate" in stored.arms(DATA / run) else FLOW
    own, flow = at_margin(run, arm, margin, key), at_margin(of, "separate", margin, key)
    return [own[which] - flow[which] for which in sorted(own.keys() & flow.keys())]


def paired(options: argparse.Namespace) -> None:
    """A Markdown line per run, arm and margin: its cosine and norm beside the flow's in the same data sets."""
    print("| run | arm | margin | data sets | cosine to nuclear | less the flow's | ‖W‖_* above the flow's, of the "
          "least |\n" + "|---|---|" + "--:|" * 5)  # fmt: skip
    for run, summary in summaries(options):
        for row in summary["arms"]:
            for at in row["at"]:
                found = differences(run, row["name"], at["margin"])
                if row["name"] == "separate" or len(found) < 3:
                    continue
                excess = differences(run, row["name"], at["margin"], "nuclear_excess")
                print(f"| {run} | {row['name']} | {at['margin']:g} | {len(found)} | {at['cosine_nuclear']:.3f} | "
                      f"{interval(found, '+.3f')} | {interval(excess, '+.1%')} |")  # fmt: skip


def of_inner(run: str, fits: bool, key: str) -> list[float]:
    """A figure at the end of the data sets whose nuclear SVM has a rank that K and Q can have, or of the others."""
    row = stored.arms(DATA / run)["separate"]
    short = set(row["rank_short"])
    return [v for which, v in zip(row["datasets"], row["each"][key], strict=True) if (which not in short) == fits]


def inner(options: argparse.Namespace) -> None:
    """A Markdown line per number of columns: the data sets whose SVM's rank fits, and those whose rank does not."""
    print("| columns d_e, of d | the SVM's rank | data sets | cosine to nuclear | ‖W‖_* above the least of any rank |\n"
          "|---|---|" + "--:|" * 3)  # fmt: skip
    for run, summary in summaries(options):
        settings = summary["settings"]
        columns = f"{settings['inner'] or settings['dimension']} of {settings['dimension']}"
        for fits in (True, False):
            if cosines := of_inner(run, fits, "cosine_nuclear"):
                said = "at most d_e" if fits else "above d_e"
                excess = of_inner(run, fits, "nuclear_excess")
                print(f"| {columns} | {said} | {len(cosines)} | {interval(cosines)} | {interval(excess, '.1%')} |")


def of_head(run: str, all_hold: bool, key: str) -> list[float]:
    """A figure of the data sets in which every example holds the max-margin head, or of the others."""
    summary = read_json(DATA / run / "summary.json") or {}
    (row,) = (row for row in summary["arms"] if row["name"] == "trained_head")
    every = summary["shape"]["examples"]
    return [
        value
        for value, supports in zip(row["each"][key], row["each"]["supports"], strict=True)
        if supports is not None and (supports == every) == all_hold
    ]


def head(options: argparse.Namespace) -> None:
    """A Markdown line per kind of data set: whether every example is a support vector of the trained head."""
    print("| every example holds the head | data sets | median ‖v‖ | cosine of v to the max-margin head (least) | "
          "margin of attention, median (range) | 2 ln ‖v‖ | cosine to nuclear |\n|---|" + "--:|" * 6)  # fmt: skip
    for run, _ in summaries(options):
        for all_hold in (True, False):
            margins = of_head(run, all_hold, "margin")
            if margins:
                norm = statistics.median(of_head(run, all_hold, "head_norm"))
                least = min(of_head(run, all_hold, "cosine_head"))
                print(f"| {'yes' if all_hold else 'no'} | {len(margins)} | {norm:.0e} | {least:.4f} | "
                      f"{statistics.median(margins):.3g} ({min(margins):.3g}–{max(margins):.3g}) | "
                      f"{2 * math.log(norm):.3g} | {interval(of_head(run, all_hold, 'cosine_nuclear'))} |")  # fmt: skip


def beyond(what: str, run: str, *more: str) -> str:
    """Words for pages: ``less finite normalised 1e4``, ``inner inner_4 fits count``, ``head head no margin``."""
    if what == "less":
        arm, margin, *key = more
        form = "+.1%" if key == ["nuclear_excess"] else "+.3f"
        return interval(differences(run, arm, float(margin), *key), form)
    if what == "inner":
        which, key = more
        found = of_inner(run, which == "fits", "margin" if key == "count" else key)
        return str(len(found)) if key == "count" else interval(found, ".1%" if key == "nuclear_excess" else ".3f")
    if what == "head":
        which, key = more
        found = of_head(run, which == "yes", "margin" if key == "count" else key)
        if key == "count":
            return str(len(found))
        if key in ("margin", "head_norm"):
            return f"{statistics.median(found):.3g}"
        return interval(found, ".1%" if key == "nuclear_excess" else ".3f")
    raise ValueError(f"{what!r} is none of less, inner, head")


TABLES = {"arms": arms, "growth": growth, "paired": paired, "inner": inner, "head": head}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, stored.store, TABLES, arguments=arguments)


if __name__ == "__main__":
    main()
