"""The tables of `docs/findings` on models that others trained, from the rows of `benchmarks/pretrained.py`.

python benchmarks/pretrained_findings.py layers docs/data/pretrained.json      # ranks, by model and product
python benchmarks/pretrained_findings.py rounding docs/data/pretrained.json    # known ranks, rounded to four bits
"""

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stored

DATA = Path("docs/data/pretrained.json")
NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2", "gaussian": "Gaussian heads"}
SYMBOLS = {"query_key": "W_KᵀW_Q", "value_output": "W_O W_V"}
CUTS = {"gaussian": "Gaussian, of a rank", "minilm": "MiniLM's heads, cut", "smollm2": "SmolLM2's heads, cut"}
Row = dict[str, Any]


@functools.cache
def read(path: Path = DATA) -> Row:
    """The document of `benchmarks/pretrained.py`."""
    return json.loads(path.read_text())


def of(model: str, product: str, path: Path = DATA) -> list[Row]:
    """The rows of a model's product, by layer."""
    return [row for row in read(path)["layers"] if (row["model"], row["product"]) == (model, product)]


def figure(model: str, product: str, which: str, key: str = "rank", form: str = ".2f") -> str:
    """Of a product, that of the ``first`` layer, the range of the ``later`` or of ``all``, ``untrained``."""
    rows = of(model, product)
    if which == "untrained":
        named = {"rank": "untrained", "nuclear_ratio": "untrained_ratio", "imbalance": "untrained_imbalance"}
        return format(rows[0][named[key]], ".3f")
    if which == "first":
        return format(rows[0][key], form)
    values = [row[key] for row in (rows if which == "all" else rows[1:])]
    return f"{min(values):{form}}–{max(values):{form}}"


def rises(of_what: Sequence[str] = tuple(CUTS), path: Path = DATA) -> list[float]:
    """By how much rounding raises the pseudo rank of each control that was cut to a rank."""
    return [
        row["after"][product] - row["before"][product]
        for row in read(path)["rounding"]
        if row["of"] in of_what and row["rank"] is not None
        for product in SYMBOLS
    ]


def whole_rise(path: Path = DATA) -> float:
    """The largest change that rounding makes to the pseudo rank of MiniLM's whole heads, of a layer."""
    whole = [row for row in read(path)["rounding"] if row["rank"] is None]
    return max(abs(row["after"][p] - row["before"][p]) for row in whole for p in SYMBOLS)


def rounding_words(key: str, of_what: str = "") -> str:
    """The ``least``, ``largest`` or ``mean`` rise of what was cut, or the largest change of ``whole`` heads."""
    if key == "whole":
        return f"{whole_rise():.3f}"
    taken = {"least": min, "largest": max, "mean": statistics.fmean}[key]
    return f"{taken(rises((of_what,) if of_what else tuple(CUTS))):+.3f}"


def layers(options: argparse.Namespace) -> None:
    """A Markdown line per model and product."""
    print("| model | product | heads a layer, of | pseudo rank, first layer | later layers | single heads | untrained "
          "| nuclear / mean Frobenius | untrained | imbalance | untrained |")  # fmt: skip
    print("|---" * 3 + "|--:" * 8 + "|")
    for path in options.directories:
        for model in ("minilm", "smollm2"):
            for product, symbol in SYMBOLS.items():
                rows = of(model, product, path)
                ratio, imbalance = ([row[key] for row in rows] for key in ("nuclear_ratio", "imbalance"))
                later = [row["rank"] for row in rows[1:]]
                shown = [
                    NAMES[model], symbol, f"{rows[0]['heads']}, {rows[0]['head_dim']}", f"{rows[0]['rank']:.3f}",
                    f"{min(later):.2f}–{max(later):.2f}",
                    f"{min(row['least'] for row in rows):.2f}–{max(row['largest'] for row in rows):.2f}",
                    f"{rows[0]['untrained']:.3f}", f"{min(ratio):.2f}–{max(ratio):.2f}",
                    f"{rows[0]['untrained_ratio']:.3f}", f"{min(imbalance):.2f}–{max(imbalance):.2f}",
                    f"{rows[0]['untrained_imbalance']:.2f}",
                ]  # fmt: skip
                print(f"| {' | '.join(shown)} |")


def rounding(options: argparse.Namespace) -> None:
    """A Markdown line per control and rank: pseudo ranks of W_KᵀW_Q and W_O W_V before and after."""
    print("| heads | rank | W_KᵀW_Q before | rounded | W_O W_V before | rounded | ‖change‖ / ‖W‖ |\n|---|--:|"
          "--:|--:|--:|--:|--:|")  # fmt: skip
    for path in options.directories:
        rows = read(path)["rounding"]
        for what, label in CUTS.items():
            own = [row for row in rows if row["of"] == what]
            for rank in dict.fromkeys(row["rank"] for row in own):
                some = [row for row in own if row["rank"] == rank]
                shown = [label, f"{rank or 'whole'} of {some[0]['head_dim']}"]
                for product in SYMBOLS:
                    shown += [
                        f"{statistics.fmean(row[when][product] for row in some):.3f}" for when in ("before", "after")
                    ]
                shown.append(f"{statistics.fmean(row['error'] for row in some):.3f}")
                print(f"| {' | '.join(shown)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, stored.store, {"layers": layers, "rounding": rounding}, arguments=arguments)


if __name__ == "__main__":
    main()
