"""The tables of `docs/findings` on L2 under rotary positions, from the stored summaries of `rankdecay rotary`.

    python benchmarks/rotary_findings.py store runs/rotary docs/data/rotary/geometric
    python benchmarks/rotary_findings.py planes docs/data/rotary/*       # what is left, with positions and without
    python benchmarks/rotary_findings.py optimum docs/data/rotary/*      # and whether that is the optimum

Stored are the settings and the summary, which has the counts of each seed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stored
from stored import interval

from rankdecay.lab.store import read_json

Row = dict[str, Any]
DATA = Path("docs/data/rotary")


def rows(directory: Path, arm: str) -> list[Row]:
    """The rows of an arm, one of each strength above zero; none without a summary."""
    summary = read_json(directory / "summary.json") or {"arms": []}
    return [row for row in summary["arms"] if row["name"] == arm and row["strength"]]


def planes(options: argparse.Namespace) -> None:
    """A Markdown line per run and strength: planes and ranks, means over seeds with 95 % intervals."""
    print("| run | λ | planes | rank of W_Q | of W_QᵀW_K | without positions: planes | rank of W_Q | of W_QᵀW_K |\n"
          "|---|" + "--:|" * 7)  # fmt: skip
    for directory in options.directories:
        for turned, plain in zip(rows(directory, "rotary"), rows(directory, "unturned"), strict=True):
            counts = [
                interval(row["each"][key], ".1f")
                for row in (turned, plain)
                for key in ("active", "query_rank", "product_rank")
            ]
            print(f"| {directory.name} | {turned['strength']:g} | {' | '.join(counts)} |")


def optimum(options: argparse.Namespace) -> None:
    """A Markdown line per run and strength: which penalty L2 is, and whether descent ends at its least."""
    print("| run | λ | above Σ‖a_j‖‖b_j‖ | above ‖W_QᵀW_K‖_* | certified | above the convex minimum, median "
          "(largest) | attainable | at rest above it | planes of the minimum |\n|---|" + "--:|" * 8)  # fmt: skip
    for directory in options.directories:
        for row in rows(directory, "rotary"):
            if "above_convex" not in row:
                continue
            gaps = " | ".join(f"{max(row[key], 0):.1e}" for key in ("plane_gap", "nuclear_gap"))
            above = " ".join(f"{max(row[key], 0):.0e}" for key in ("above_convex", "above_convex_largest"))
            above = above.replace(" ", " (") + ")"
            shown = [directory.name, f"{row['strength']:g}", gaps, f"{row['certified']} of {row['seeds']}", above]
            shown += [str(row["attainable"]), str(row["not_global"]), f"{row['same_planes']} of {row['seeds']}"]
            print(f"| {' | '.join(shown)} |")


def words(run: str, arm: str, key: str, strength: str = "") -> str:
    """``fourier rotary active 0.8``: a mean over seeds; ``fourier rotary certified``: a count of all problems;
    ``fourier rotary above_convex_largest``: the largest."""
    own = rows(DATA / run, arm)
    if strength:
        (row,) = (row for row in own if row["strength"] == float(strength))
        return interval(row["each"][key], ".1f")
    if key == "not_global":
        return str(sum(row[key] for row in own))
    if key == "moving":  # the minimum can be attained, and descent had neither attained it nor come to rest
        return str(sum(row["attainable"] - row["certified"] - row["not_global"] for row in own))
    if isinstance(own[0][key], int):
        return f"{sum(row[key] for row in own):,} of {sum(row['seeds'] for row in own):,}"
    return f"{max(row[key] for row in own):.0e}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, stored.store, {"planes": planes, "optimum": optimum}, arguments=arguments)


if __name__ == "__main__":
    main()
