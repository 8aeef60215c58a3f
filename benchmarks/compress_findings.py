"""The tables of `docs/findings` on compressing, from the rows of `benchmarks/compress.py`.

    python benchmarks/compress_findings.py arms docs/data/compress         # by every way to a smaller head
    python benchmarks/compress_findings.py rivals docs/data/compress       # other ways to as many bytes, before healing
    python benchmarks/compress_findings.py predicted docs/data/compress    # what the weights say of the loss
    python benchmarks/compress_findings.py pretrained docs/data/compress   # a real checkpoint
    python benchmarks/compress_findings.py decoding docs/data/compress     # tokens per second
    python benchmarks/compress_findings.py files docs/data/compress        # seconds of a large checkpoint

What follows ± is half of a 95 % interval of Student's t over seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import stored
from scipy import stats
from stored import interval, read_lines

Row = dict[str, Any]
DATA = Path("docs/data/compress")
ARMS = {
    "cut": "cut at once",
    "planes": "`Planes`, then cut",
    "l2": "L2, then cut",
    "low_rank": "low rank per head, then cut",
    "small": "small from the start",
}


def families(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows))


def by_arm(rows: Sequence[Row], family: str) -> dict[tuple[str, int], dict[int, Row]]:
    """Rows by arm and head size, and then by seed."""
    found: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        if row["family"] == family:
            found.setdefault((row["arm"], row["head_dim"]), {})[row["seed"]] = row
    return found


def differences(some: dict[int, Row], others: dict[int, Row], key: str = "healed", other: str = "") -> list[float]:
    """Differences of one arm from another, seed by seed."""
    return [row[key] - others[seed][other or key] for seed, row in some.items() if seed in others]


def arms(options: argparse.Namespace) -> None:
    """A Markdown line per arm and head size."""
    for directory in options.directories:
        rows = read_lines(directory / "train.jsonl")
        for family in families(rows):
            found = by_arm(rows, family)
            ((_, whole), dense) = next((key, some) for key, some in found.items() if key[0] == "dense")
            each = next(iter(dense.values()))["cache_bytes"]
            frozen = json.loads((directory / f"tuned-{family}.json").read_text())["strengths"]
            strengths = ", ".join(f"{name} {value:g}" for name, value in frozen.items())
            print(f"**{family}**, head {whole}: loss {interval(losses(dense))}, {each:g} bytes a token;")
            print(f"strengths {strengths}\n")
            heads = ["", "head", "bytes a token", "seeds", "cuts of zeros alone", "before the cut", "cut", "at the end"]
            print(f"| {' | '.join([*heads, '− dense', '− cut at once'])} |\n|---|" + "--:|" * 9)
            for size in sorted({size for _, size in found} - {whole}, reverse=True):
                for arm, name in ARMS.items():
                    some = found.get((arm, size), {})
                    if not some:
                        continue
                    one = next(iter(some.values()))
                    zeros = f"{sum(row['exact'] for row in some.values())} of {len(some)}" if "exact" in one else ""
                    cells = [name, f"{size}", f"{one['cache_bytes']:g}", f"{len(some)}", zeros]
                    cells += [interval(losses(some, key)) if key in one else "" for key in ("whole", "cut", "healed")]
                    cells.append(interval(differences(some, dense), "+.3f"))
                    against = differences(some, found.get(("cut", size), {}))
                    cells.append(interval(against, "+.3f") if arm != "cut" and against else "")
                    print(f"| {' | '.join(cells)} |")
            print()


def losses(some: dict[int, Row], key: str = "healed") -> list[float]:
    return [row[key] for row in some.values()]


def rivals(options: argparse.Namespace) -> None:
    """A Markdown line per method: by how much the loss of the trained models rises."""
    for directory in options.directories:
        rows = read_lines(directory / "rivals.jsonl")
        for family in families(rows):
            mine = [row for row in rows if row["family"] == family]
            sizes = sorted({row["head_dim"] for row in mine}, reverse=True)
            heads = [f"head {size}, {what}" for size in sizes for what in ("keys alone", "keys and values")]
            print(f"**{family}**, {len({row['seed'] for row in mine})} seeds\n")
            print(f"| | {' | '.join(heads)} |\n|---|" + "--:|" * len(heads))
            for method in dict.fromkeys(row["method"] for row in mine):
                cells = []
                for size in sizes:
                    some = [row for row in mine if (row["method"], row["head_dim"]) == (method, size)]
                    cells += [interval([row[key] - row["whole"] for row in some], "+.3f") for key in ("keys", "both")]
                print(f"| {method} | {' | '.join(cells)} |")
            print()


def correlations(rows: Sequence[Row], family: str, what: str, data: bool) -> list[float]:
    """Spearman's correlation of the energy left out with the rise of the loss, by seed."""
    found = []
    mine = [row for row in rows if (row["family"], row["what"], row["data"]) == (family, what, data)]
    for seed in dict.fromkeys(row["seed"] for row in mine):
        some = [row for row in mine if row["seed"] == seed]
        correlation, _ = stats.spearmanr([row["share"] for row in some], [row["rise"] for row in some])
        found.append(float(cast(Any, correlation)))
    return found


def predicted(options: argparse.Namespace) -> None:
    """A Markdown line per model: the rank correlation of the energy left out with the rise of the loss."""
    for directory in options.directories:
        rows = read_lines(directory / "predicted.jsonl")
        kinds = (("plane", False), ("rank", False), ("rank", True))
        print("| | planes | ranks of the values | the same with data |\n|---|--:|--:|--:|")
        for family in families(rows):
            cells = [correlations(rows, family, what, data) for what, data in kinds]
            print(f"| {family} | {' | '.join(interval(some, '.2f') if some else '' for some in cells)} |")


def pretrained(options: argparse.Namespace) -> None:
    """A Markdown line per head size of a real checkpoint: at once, healed, and the original trained as long."""
    for directory in options.directories:
        rows = read_lines(directory / "pretrained.jsonl")
        print("| | head | bytes a token | trained for | loss before | after |\n|---|--:|--:|--:|--:|--:|")
        whole = max((row["head_dim"] for row in rows), default=0)
        for row in sorted(rows, key=lambda row: (row["model"], row["tokens"], -row["head_dim"])):
            name = row["model"] + (" (the control)" if row["head_dim"] == whole and row["tokens"] else "")
            name += ", the original as a teacher" if row["teacher"] else ""
            spent = f"{row['tokens']:,} tokens" if row["tokens"] else "nothing: the cut"
            print(
                f"| {name} | {row['head_dim']} | {row['cache_bytes']:,.0f} | {spent} | {row['before']:.3f} | "
                f"{row['after']:.3f} |"
            )


def decoding(options: argparse.Namespace) -> None:
    """A Markdown line per model and head size: tokens per second beside the original."""
    for directory in options.directories:
        rows = read_lines(directory / "decoding.jsonl")
        heads = [
            "| | head",
            "tokens a second",
            "of the original",
            "cache, bytes a token",
            "parameters",
            "sequences × behind",
        ]
        print(f"{' | '.join(heads)} |\n|---|" + "--:|" * 6)
        for row in rows:
            key = ("model", "context", "batch_size")
            beside = max((r for r in rows if all(r[k] == row[k] for k in key)), key=lambda r: r["head_dim"])
            print(
                f"| {row['model']} | {row['head_dim']} | {row['tokens_per_second']:,.1f} | "
                f"{row['tokens_per_second'] / beside['tokens_per_second']:.2f} | {row['cache_bytes']:,.0f} | "
                f"{row['parameters']:,} | {row['batch_size']} × {row['context']:,} |"
            )


def files(options: argparse.Namespace) -> None:
    """A Markdown line per state of the files: seconds of reading and writing them, and of making the model smaller."""
    for directory in options.directories:
        print(
            "| files | GB | read and written once | made smaller | of reading and writing twice |\n|---|" + "--:|" * 4
        )
        for row in read_lines(directory / "files.jsonl"):
            kind = f"{row['layers']} layers of width {row['width']:,}, {'' if row['in_memory'] else 'not '}in memory"
            print(
                f"| {kind} | {row['bytes'] / 1e9:.1f} | {row['copied']:.1f} s | {row['compressed']:.1f} s | "
                f"{row['compressed'] / 2 / row['copied']:.2f} |"
            )


def difference(family: str, arm: str, size: str, other: str, key: str = "healed", directory: Path = DATA) -> str:
    """The loss of an arm above that of another at the same head size (``dense``: of the original), in nats."""
    found = by_arm(read_lines(directory / "train.jsonl"), family)
    others = (
        found[other, int(size)] if other != "dense" else next(some for name, some in found.items() if name[0] == other)
    )
    return interval(differences(found[arm, int(size)], others, key), "+.3f")


def rise(family: str, arm: str, size: str, directory: Path = DATA) -> str:
    """The loss that the cut itself costs in an arm, in nats."""
    some = by_arm(read_lines(directory / "train.jsonl"), family)[arm, int(size)]
    return interval([row["cut"] - row["whole"] for row in some.values()], "+.3f")


def mean_rise(family: str, arm: str, size: str, directory: Path = DATA) -> float:
    """The same, of all seeds together."""
    some = by_arm(read_lines(directory / "train.jsonl"), family)[arm, int(size)]
    return statistics.fmean(row["cut"] - row["whole"] for row in some.values())


def sign(family: str, arm: str, size: str, other: str, key: str = "healed", directory: Path = DATA) -> int:
    """Whether an arm is worse (1) or better (-1) than another beyond the interval over seeds, or neither (0)."""
    found = by_arm(read_lines(directory / "train.jsonl"), family)
    values = differences(found[arm, int(size)], found[other, int(size)], key)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return int(low > 0) - int(high < 0)


TABLES = {
    "arms": arms, "rivals": rivals, "predicted": predicted, "pretrained": pretrained, "decoding": decoding,
    "files": files,
}  # fmt: skip


def store(options: argparse.Namespace) -> None:
    """Rows are stored where they are made."""
    raise SystemExit(f"{options.run}: benchmarks/compress.py --dir writes its rows where they are kept.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, store, TABLES, arguments=arguments)


if __name__ == "__main__":
    main()
