"""The tables of `docs/findings` on attention and its SVM, from the stored summaries of `rankdecay margin`.

    python benchmarks/margin_findings.py store runs/margin_generic docs/data/margin/generic
    python benchmarks/margin_findings.py arms docs/data/margin/*        # one line per arm
    python benchmarks/margin_findings.py growth docs/data/margin/*      # and per power of ten of the margin

Stored are the settings and the summary, which has the figures of each data set at the end.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import stored

from rankdecay.lab.store import read_json

Row = dict[str, Any]


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one of the commands above."""
    stored.command_line(__doc__, stored.store, {"arms": arms, "growth": growth}, arguments=arguments)


if __name__ == "__main__":
    main()
