"""The tables of `docs/findings` on the decay of attention, from the stored rows of recall, language and vision.

    python benchmarks/attention_findings.py store runs/language docs/data/language/default   # a compact copy
    python benchmarks/attention_findings.py table docs/data/language/default                 # one line per cell
    python benchmarks/attention_findings.py layers docs/data/recall/default                  # and of each layer
    python benchmarks/attention_findings.py scatter docs/data/language                         # chance
    python benchmarks/attention_findings.py stands docs/data/language/standard docs/data/language/qk_norm
    python benchmarks/attention_findings.py balance runs/language/models/*                   # of the models it kept
    python benchmarks/attention_findings.py planes runs/language/models/*                    # and their rotary planes

A compact copy is a run directory: its rows with the measures that the tables show, so `rankdecay report` draws it too.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import stored
from scipy import stats

from rankdecay import find_attention, inspect, spectrum
from rankdecay.lab.experiments.attention.summary import difference, of, summarise
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.store import read_json, read_metrics

MEASURES = ("pseudo_rank", "imbalance", "nuclear_gap")
PARTS = ("query_key", "value_output")
Row = dict[str, Any]


def store(options: argparse.Namespace) -> None:
    """Copies a run directory with the measures that the tables show."""
    stored.copy(options.run, options.to, (_kept(row) for row in read_metrics(options.run)))
    summary = json.loads((options.run / "summary.json").read_text())
    summary["arms"] = summarise(read_metrics(options.to), summary["unit"])
    stored.write_summary(options.to, summary)


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
        _lines(cells_of(directory), (read_json(directory / "summary.json") or {"unit": "tokens"})["unit"])


def cells_of(directory: Path) -> list[Row]:
    """The cells of a stored run."""
    unit = (read_json(directory / "summary.json") or {"unit": "tokens"})["unit"]
    return summarise(read_metrics(directory), unit)


def measure(cell: Row, part: str, name: str = "pseudo_rank") -> float | None:
    """A measure of a product, or of W_Q or W_K alone, over heads and layers."""
    return (cell["mean"].get(part) or {}).get(name) if part in ("query", "key") else of(cell, part, name)


def over_seeds(directory: Path, arm: str, strength: str, part: str, name: str = "pseudo_rank") -> list[float]:
    """A measure of a product at the end, a mean over the layers, of every seed of a cell; ``accuracy`` of the cell."""
    found = []
    for row in read_metrics(directory):
        if (row["arm"], row["strength"], row.get("ended")) == (arm, float(strength), True):
            layers = [layer[part][name] for layer in row["layers"]] if name != "accuracy" else [row["accuracy"]]
            found.append(statistics.fmean(layers))
    return found


def seeds_of(directory: str, arm: str, strength: str, part: str, name: str = "pseudo_rank") -> str:
    """The mean of `over_seeds` and its 95 % interval, of a run below `docs/data`."""
    return stored.interval(over_seeds(Path("docs/data") / directory, arm, strength, part, name), ".2f")


def _lines(cells: list[Row], unit: str) -> None:
    heads = ["arm", "decay", "MLP", "QK-norm", "loss", "above no decay", "accuracy", "rank QK", "rank VO"]
    heads += ["rank W_Q", "rank W_K", "imbalance QK", "imbalance VO", "gap QK", "gap VO", f"{unit}/s", "at equal time"]
    shown = [[*_named(cell), *_figures(cell, _no_decay(cells, cell))] for cell in cells]
    keep = [i for i in range(len(heads)) if any(row[i] != "—" for row in shown)]
    print("\n| " + " | ".join(heads[i] for i in keep) + " |\n|" + "---|" * len(keep))
    for row in shown:
        print("| " + " | ".join(row[i] for i in keep) + " |")
    for cell in cells[:1]:
        ranks = ", ".join(f"{part} {_number(of(cell, part, when='untrained_mean'), '.2f')}" for part in PARTS)
        print(f"\nuntrained pseudo rank: {ranks}")


def _named(cell: Row) -> list[str]:
    norm = "yes" if cell["qk_norm"] else "no"
    return [cell["name"], f"{cell['strength']:g}", _number(cell["mlp_decay"], "g"), norm]


def _figures(cell: Row, none: Row | None) -> list[str]:
    if cell["loss"] is None:
        return ["diverged", *["—"] * 12]
    above = "—"
    if none is not None and none is not cell:
        distance, error = difference(cell, none)
        above = f"{distance:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
    figures = [f"{cell['loss']:.4f}", above, _number(cell["accuracy"], ".3f")]
    for measure in MEASURES:
        figures += [_number(of(cell, part, measure), ".3g") for part in PARTS]
        if measure == "pseudo_rank":
            figures += [_number((cell["mean"].get(side) or {}).get(measure), ".3g") for side in ("query", "key")]
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
                now, then = {"mean": layer}, {"mean": before}
                shown = [
                    f"{_number(of(now, part, measure), '.2f')} ({_number(of(then, part, measure), '.2f')})"
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


# --- what differs by chance ---

DATA = Path("docs/data/language")
BLOCK = (0.0, 0.1, 1.0)  # decays of attention and of the MLPs whose cells hardly differ but by chance
PLANE = 0.01  # of the largest: a plane above it counts as active
SHARE = 0.95  # of the sum of the planes' sizes, as of a pseudo rank
PLANE_FIGURES = {
    "query": "rank W_Q",
    "key": "rank W_K",
    "product": "rank W_KᵀW_Q at equal positions",
    "active": "planes above 1 % of the largest",
    "carrying": "planes that make 95 %",
}


FEWEST = 3  # seeds that say anything of a scatter


def chances(data: Path = DATA) -> list[Row]:
    """The difference of two runs that chance alone exceeds once in twenty times, as far as it was measured.

    From neighbouring cells of one seed, whose scatter holds what the decays do as well; and from seeds of no decay,
    where they are stored, whose scatter holds what two runs of one seed have in common. A difference of two cells of
    one seed is between the two, so it stands where it is beyond both.
    """
    cells = [cell for name in ("mlp", "standard") for cell in summarise(read_metrics(data / name), "tokens")]
    near = [cell for cell in cells if cell["strength"] in BLOCK and cell["mlp_decay"] in BLOCK]
    found = {"neighbouring cells of one seed": [cell["loss"] for cell in near if cell["name"] == "l2"]}
    seeds = data / "seeds"
    if (seeds / "config.json").exists():
        found["seeds of no decay"] = [row["loss"] for row in read_metrics(seeds) if row.get("ended")]
    rows = []
    for what, losses in found.items():
        if len(losses) >= FEWEST:
            pair = math.sqrt(2) * statistics.stdev(losses)
            bound = float(stats.t.ppf(0.975, len(losses) - 1)) * pair
            rows.append({"of": what, "runs": len(losses), "pair": pair, "bound": bound})
    return rows


def scatter(options: argparse.Namespace) -> None:
    """A Markdown line per way to say how far two runs differ by chance."""
    print("| from | runs | standard deviation of a difference | exceeded once in twenty times |\n|---|--:|--:|--:|")
    for found in chances(options.directories[0]):
        print(f"| {found['of']} | {found['runs']} | {found['pair']:.3f} | {found['bound']:.3f} |")


def standing(directories: Iterable[Path], data: Path = DATA) -> tuple[list[tuple[str, float, int]], int, int]:
    """The cells whose loss differs from that of no decay by more than chance, as it was measured in some way.

    Returns:
        The name of each, its difference, and beyond how many of the bounds it is; how many bounds there are; and how
        many cells were compared.
    """
    bounds = [found["bound"] for found in chances(data)]
    found, compared = [], 0
    for directory in directories:
        cells = summarise(read_metrics(directory), "tokens")
        for cell in cells:
            none = _no_decay(cells, cell)
            if none is None or none is cell or cell["loss"] is None:
                continue
            compared += 1
            distance = difference(cell, none)[0]
            if beyond := sum(abs(distance) > bound for bound in bounds):
                norm = " with QK-norm" if cell["qk_norm"] else ""
                found.append((f"{cell['name']} {cell['strength']:g}{norm}", distance, beyond))
    return found, len(bounds), compared


def stands(options: argparse.Namespace) -> None:
    """The differences from no decay that chance does not explain."""
    found, bounds, compared = standing(options.directories, options.directories[0].parent)

    def listed(wanted: bool) -> str:
        some = [f"{name} ({distance:+.3f})" for name, distance, beyond in found if (beyond == bounds) == wanted]
        return ", ".join(some) or "none"

    print(f"Of {compared} differences from no decay these stand: {listed(True)}. Beyond one measure of chance and not "
          f"the other: {listed(False)}.")  # fmt: skip


def plane_figures(directory: Path) -> Row:
    """Ranks of the heads of W_Q, of W_K and of their product at equal positions, and how many planes are in use."""
    found: dict[str, list[float]] = {key: [] for key in PLANE_FIGURES}
    for layer in find_attention(directory):
        for name, view, heads in (
            ("query", layer.query, layer.num_heads),
            ("key", layer.key, layer.num_key_value_heads),
        ):
            if view is not None:
                for head in view.tensor().double().unflatten(0, (heads, -1)):
                    found[name].append(spectrum(head).pseudo_rank(SHARE).item())
    for row in inspect(directory).rows:
        if row.get("product") != "query_key":
            continue
        found["product"].append(row["pseudo_rank"])
        sizes = sorted((math.sqrt(a * b) for a, b in zip(*row["squared_norms"].values(), strict=True)), reverse=True)
        found["active"].append(sum(size > PLANE * sizes[0] for size in sizes) / len(sizes))
        below = next(n for n, total in enumerate(itertools.accumulate(sizes), 1) if total >= SHARE * sum(sizes))
        found["carrying"].append(below / len(sizes))
    name = directory.name.partition("_mlp_")[0]  # of a model that `rankdecay language` keeps: arm and strength
    return {"model": name} | {key: round(statistics.fmean(values), 4) for key, values in found.items()}


def planes(options: argparse.Namespace) -> None:
    """A Markdown line per checkpoint, or per row of a stored file: ranks, and the rotary planes in use."""
    rows: list[Row] = []
    for path in options.directories:
        rows += json.loads(path.read_text())["rows"] if path.suffix == ".json" else [plane_figures(path)]
    if options.json:
        document = {"machine": describe_machine("cpu"), "versions": versions(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"| model | {' | '.join(PLANE_FIGURES.values())} |\n|---|" + "--:|" * len(PLANE_FIGURES))
    for row in rows:
        print(f"| {row['model']} | {' | '.join(f'{row[key]:.2f}' for key in PLANE_FIGURES)} |")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="of planes: write the rows here as well")


TABLES = {"table": table, "layers": layers, "scatter": scatter, "stands": stands, "balance": balance, "planes": planes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one of the commands above."""
    stored.command_line(__doc__, store, TABLES, _options, arguments)


if __name__ == "__main__":
    main()
