"""The tables of `docs/findings.md` on the decay of attention, from the stored rows of recall, language and vision.

    python benchmarks/attention_findings.py store runs/language docs/data/language/default   # a compact copy
    python benchmarks/attention_findings.py table docs/data/language/default                 # one line per cell
    python benchmarks/attention_findings.py layers docs/data/recall/default                  # and of each layer
    python benchmarks/attention_findings.py balance runs/language/models/*                   # of the models it kept

A compact copy is a run directory: its rows with the measures that the tables show, so `rankdecay report` draws it too.
"""

import argparse
import json
import statistics
from typing import Any

import stored

from rankdecay import inspect
from rankdecay.lab.experiments.attention.summary import difference, of, summarise
from rankdecay.lab.store import read_json, read_metrics

MEASURES = ("pseudo_rank", "imbalance", "nuclear_gap")
PARTS = ("query_key", "value_output")
Row = dict[str, Any]


def store(options: argparse.Namespace) -> None:
    """Copies a run directory with the measures that the tables show."""
    stored.copy(options.run, options.to, (_kept(row) for row in read_metrics(options.run)))
    summary = json.loads((options.run / "summary.json").read_text())
    summary["arms"] = summarise(read_metrics(options.to), summary["unit"])
    (options.to / "summary.json").write_text(json.dumps(summary, separators=(",", ":"), ensure_ascii=False) + "\n")


def _kept(row: Row) -> Row:
    kept = {key: value for key, value in row.items() if key != "pieces" or row.get("ended")}
    if "layers" in row:
        kept["layers"] = [
            {part: {m: v[m] for m in MEASURES if m in v} for part, v in layer.items()} for layer in row["layers"]
        ]
    return kept


def table(options: argparse.Namespace) -> None:
    """A Markdown line per cell, its loss against that of no decay with the same MLP decay and norm."""
    for directory in options.directories:
        unit = (read_json(directory / "summary.json") or {"unit": "tokens"})["unit"]
        cells = summarise(read_metrics(directory), unit)
        _lines(cells, unit)


def _lines(cells: list[Row], unit: str) -> None:
    heads = ["arm", "decay", "MLP", "QK-norm", "loss", "above no decay", "accuracy", "rank QK", "rank VO"]
    heads += ["imbalance QK", "imbalance VO", "gap QK", "gap VO", f"{unit}/s", "at equal time"]
    shown = [[*_named(cell), *_figures(cell, _no_decay(cells, cell))] for cell in cells]
    keep = [i for i in range(len(heads)) if any(row[i] != "—" for row in shown)]
    print("\n| " + " | ".join(heads[i] for i in keep) + " |\n|" + "---|" * len(keep))
    for row in shown:
        print("| " + " | ".join(row[i] for i in keep) + " |")
    for cell in cells[:1]:
        ranks = ", ".join(f"{part} {_number(of(cell['untrained_mean'], part, 'pseudo_rank'), '.2f')}" for part in PARTS)
        print(f"\nuntrained pseudo rank: {ranks}")


def _named(cell: Row) -> list[str]:
    norm = "yes" if cell["qk_norm"] else "no"
    return [cell["name"], f"{cell['strength']:g}", _number(cell["mlp_decay"], "g"), norm]


def _figures(cell: Row, none: Row | None) -> list[str]:
    if cell["loss"] is None:
        return ["diverged", *["—"] * 10]
    above = "—"
    if none is not None and none is not cell:
        distance, error = difference(cell, none)
        above = f"{distance:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
    figures = [f"{cell['loss']:.4f}", above, _number(cell["accuracy"], ".3f")]
    for measure in MEASURES:
        figures += [_number(of(cell["mean"], part, measure), ".3g") for part in PARTS]
    return [*figures, _number(cell["per_second"], ",.0f"), _number(cell["loss_at_equal_time"], ".4f")]


def _no_decay(cells: list[Row], cell: Row) -> Row | None:
    same = [
        c
        for c in cells
        if c["strength"] == 0 and (c["mlp_decay"], c["qk_norm"]) == (cell["mlp_decay"], cell["qk_norm"])
    ]
    return same[0] if same and same[0]["loss"] is not None else None


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def layers(options: argparse.Namespace) -> None:
    """A Markdown line per cell and layer: pseudo rank and imbalance of both products, untrained in brackets."""
    for directory in options.directories:
        print("\n| arm | decay | QK-norm | layer | rank QK | rank VO | imbalance QK | imbalance VO |\n|" + "---|" * 8)
        for cell in summarise(read_metrics(directory), (read_json(directory / "summary.json") or {})["unit"]):
            for index, (layer, before) in enumerate(zip(cell["layers"], cell["untrained"], strict=True)):
                shown = [
                    f"{_number(of(layer, part, measure), '.2f')} ({_number(of(before, part, measure), '.2f')})"
                    for measure in MEASURES[:2]
                    for part in PARTS
                ]
                print(f"| {cell['name']} | {cell['strength']:g} | {_named(cell)[3]} | {index} | {' | '.join(shown)} |")


def balance(options: argparse.Namespace) -> None:
    """A Markdown line per checkpoint: nuclear ratio and imbalance of both products, means over heads and layers."""
    print("| model | ratio QK | imbalance QK | ratio VO | imbalance VO |\n|---|---|---|---|---|")
    for directory in options.directories:
        rows = inspect(directory).rows
        figures = []
        for part in PARTS:
            for measure in ("nuclear_ratio", "imbalance"):
                values = [row[measure] for row in rows if row.get("product") == part]
                figures.append(f"{statistics.fmean(values):.3f}" if values else "—")
        print(f"| {directory.name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    stored.command_line(__doc__, store, {"table": table, "layers": layers, "balance": balance})
