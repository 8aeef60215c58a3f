"""The self-contained HTML page of an experiment on the decay of attention."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rankdecay.lab.experiments.attention.read import PARTS, Grid, cell_key, main_mlp_decay, read_grid
from rankdecay.lab.experiments.attention.summary import of
from rankdecay.lab.experiments.attention.verdict import error_of, verdict
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.style import arm_styles

Row = dict[str, Any]
Values = dict[str, dict[str, list[Any]]]  # part, measure, then the mean over layers and each layer

NUMBERS = 400_000  # of the curves in one page, about 2.5 MB beside plotly's 5; steps that do not fit are left out
FEWEST_STEPS = 8  # of a curve, however many there are
MEASURES = {
    "pseudo_rank": "pseudo rank",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "imbalance": "imbalance",
    "nuclear_gap": "gap to the nuclear norm",
}
SHOWN = {"measure": "the measure chosen above", "loss": "loss", "train_loss": "training loss", "accuracy": "accuracy"}
PRODUCTS = ("query_key", "value_output")
FILES = {
    "config.json": "what was asked, the versions and the machine",
    "metrics.jsonl": "every evaluation of every run, layer by layer, one JSON object per line",
    "summary.json": "what every cell of the grid came to; absent while the experiment goes on",
    "models": "the trained models that were kept",
}
STYLES = ["page.css", "attention_decay.css"]
SCRIPTS = ["core.js", "plotly.js", "controls.js", "legend.js", "attention_decay.js"]


def write_page(directory: Path, path: Path) -> Path:
    """Writes the page of a run directory to ``path``, by atomic rename, and returns the path."""
    return pieces.write(render(directory), path)


def render(directory: Path) -> str:
    """The page as one HTML string."""
    grid = read_grid(directory)
    data, notices = page_data(grid)
    mapped = {cell["arm"] for cell in data["cells"]} if len({cell["mlp"] for cell in data["cells"]}) > 1 else set()
    labels = {index: arm["label"] for index, arm in enumerate(data["arms"])}
    curves = {cell["arm"] for cell in data["cells"] if cell["step"]}
    accurate = any(is_number(cell["accuracy"]) for cell in data["cells"])
    parts = {
        **pieces.shared(
            [grid.config],
            grid.arms,
            verdict(grid.summary),
            [*grid.notices, *notices],
            directory=directory.resolve().name,
            drawn="charts",
            again="The same version on the same device gives the same numbers; another device may give other digits.",
            wall_seconds=(grid.summary or {}).get("wall_seconds"),
            files=pieces.file_list({k: v for k, v in FILES.items() if k != "models" or (directory / k).is_dir()}),
        ),
        "without": "" if data["cells"] else pieces.absent("There is nothing to show before the first evaluation."),
        "table": _table(grid),
        "hidden": "" if data["cells"] else " hidden",
        "choices": _choices(grid, data),
        "quality": pieces.choice("quality", "Quality", {name: name for name in ("loss", "accuracy")[: 1 + accurate]}),
        "hidden_map": "" if mapped else " hidden",
        "mapped": pieces.choice("mapped", "Arm", {index: labels[index] for index in sorted(mapped)}),
        "hidden_time": "" if curves else " hidden",
        "trained": pieces.choice("trained", "Arm", {index: labels[index] for index in sorted(curves)}),
        "shown": pieces.choice("shown", "Show", SHOWN if accurate else {k: SHOWN[k] for k in SHOWN if k != "accuracy"}),
        "spread": pieces.choice("spread", "Layers", {"one": "as chosen above", "each": "each in a chart of its own"}),
        "data": pieces.embedded(data),
    }
    return pieces.fill("attention_decay.html", parts, STYLES, SCRIPTS, "attention")


# --- what the charts are drawn from ---


def page_data(grid: Grid) -> tuple[dict[str, Any], list[str]]:
    """Every cell with what it ended at and its curves, means over seeds; and what had to be left out, in words."""
    arms = grid.arms
    styles = arm_styles(arms)
    results = {cell_key(cell): cell for cell in grid.cells}
    by_cell: dict[tuple[Any, ...], dict[int, list[Row]]] = {key: {} for key in results}
    for row in grid.records:
        by_cell.setdefault((row["arm"], row["strength"], row["mlp_decay"], row["qk_norm"]), {}).setdefault(
            row["seed"], []
        ).append(row)
    every = {key: _curves(runs) for key, runs in by_cell.items()}
    lines = sum(1 + len(layers) for curve in every.values() for layers in _layers_of(curve[:1]))
    steps = max(FEWEST_STEPS, NUMBERS // max(1, lines * len(PARTS) * len(MEASURES)))
    longest = max((len(curve) for curve in every.values()), default=0)
    cells = []
    for key in sorted(by_cell, key=lambda key: (arms.index(key[0]), key[3], key[2] or 0, key[1])):
        name, strength, mlp, norm = key
        cell = results.get(key, {})
        loss, error = cell.get("loss"), error_of(cell)
        cells.append({
            "arm": arms.index(name), "strength": strength, "mlp": "" if mlp is None else f"{mlp:g}",
            "norm": "on" if norm else "off",
            "loss": loss, "error": error, "accuracy": cell.get("accuracy"),
            # in full, because the numbers of a page have four digits
            "words": f"{loss:.4f}" + ("" if error is None else f" ± {error:.4f}") if is_number(loss) else "",
            "diverged": cell.get("diverged") or 0, "seeds": cell.get("seeds") or len(by_cell[key]),
            "ends": _ends(cell.get("mean"), cell.get("layers")),
            "untrained": _ends(cell.get("untrained_mean"), cell.get("untrained")),
            **_over_steps(_evenly(every[key], steps)),
        })  # fmt: skip
    notices = []
    if longest > steps:
        notices.append(f"The curves are shown at {steps} of up to {longest} evaluations, evenly spaced.")
    data = {
        "arms": [{"name": name, **vars(styles[name])} for name in arms],
        "parts": PARTS,
        "measures": MEASURES,
        "layers": max((_depth(cell[when]) for cell in cells for when in ("ends", "over")), default=0),
        "cells": cells,
    }
    return data, notices


def _depth(values: Values) -> int:
    """How many layers there are values of, beside their mean."""
    return max((len(lines) - 1 for measures in values.values() for lines in measures.values()), default=0)


def _ends(mean: Any, layers: Any) -> Values:
    """Part, measure: the mean over layers, then each layer."""
    rows: list[Any] = [mean or {}, *(layers or [])]
    return {
        part: {name: [row.get(part, {}).get(name) for row in rows] for name in MEASURES if name in rows[0][part]}
        for part in PARTS
        if part in rows[0]
    }


def _curves(runs: Mapping[int, Sequence[Row]]) -> list[Row]:
    """The evaluations of a cell over steps, means over its seeds.

    Of the runs that ended if there are any, so that no seed leaves a mean on the way; else of what there is.
    """
    ended = [rows for rows in runs.values() if rows[-1].get("ended") and not rows[-1].get("diverged")]
    by_step: dict[int, list[Row]] = {}
    for rows in ended or runs.values():
        for row in rows:
            if "layers" in row:
                by_step.setdefault(row["step"], []).append(row)
    return [{"step": step, "rows": by_step[step]} for step in sorted(by_step)]


def _layers_of(curve: Sequence[Row]) -> list[list[Row]]:
    return [point["rows"][0]["layers"] for point in curve]


def _over_steps(curve: Sequence[Row]) -> Row:
    def over(key: str) -> list[float | None]:
        return [_mean([row.get(key) for row in point["rows"]]) for point in curve]

    count = max(map(len, _layers_of(curve)), default=0)
    parts = [part for part in PARTS if any(part in layer for layers in _layers_of(curve) for layer in layers)]
    values: Values = {}
    for part in parts:
        for name in MEASURES:
            by_layer = [
                [_mean([_at(row["layers"], layer, part, name) for row in point["rows"]]) for point in curve]
                for layer in range(count)
            ]
            if any(value is not None for line in by_layer for value in line):
                mean = [_mean(list(at)) for at in zip(*by_layer, strict=True)]
                values.setdefault(part, {})[name] = [mean, *by_layer]
    steps = [point["step"] for point in curve]
    return {"step": steps, "over": values, "curve": {k: over(k) for k in ("loss", "train_loss", "accuracy")}}


def _at(layers: Sequence[Row], layer: int, part: str, name: str) -> Any:
    return layers[layer].get(part, {}).get(name) if layer < len(layers) else None


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return sum(known) / len(known) if known else None


def _evenly(items: list[Row], most: int) -> list[Row]:
    """At most `most` items, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# --- words and tables ---


def _choices(grid: Grid, data: Row) -> str:
    """What all charts follow; a choice of one is no choice."""
    present = [part for part in PARTS if any(part in cell["ends"] or part in cell["over"] for cell in data["cells"])]
    shown = pieces.choice("part", "Matrix", {part: PARTS[part] for part in present})
    shown += pieces.choice("measure", "Measure", MEASURES)
    if data["layers"] > 1:
        layers = {0: "mean of all", **{number: str(number) for number in range(1, data["layers"] + 1)}}
        shown += pieces.choice("layer", "Layer", layers)
    norms = sorted({cell["norm"] for cell in data["cells"]})
    if len(norms) > 1:
        shown += pieces.choice("norm", "QK-norm", {norm: norm for norm in norms})
    mlps = dict.fromkeys(cell["mlp"] for cell in data["cells"])
    if len(mlps) > 1:
        main = main_mlp_decay(grid.cells)
        chosen = None if main is None else f"{main:g}"
        shown += pieces.choice("mlp", "MLP decay", {mlp: mlp for mlp in sorted(mlps, key=float)}, chosen=chosen)
    return shown


def _table(grid: Grid) -> str:
    if not grid.cells:
        return ""
    styles = arm_styles(grid.arms)

    def several(axis: str) -> bool:
        return len({cell[axis] for cell in grid.cells}) > 1

    accurate = any(is_number(cell.get("accuracy")) for cell in grid.cells)
    heads = ["Arm", "Decay of attention"]
    heads += ["MLP decay"] if several("mlp_decay") else []
    heads += ["QK-norm"] if several("qk_norm") else []
    heads += ["Seeds", "Loss"] + (["Accuracy"] if accurate else [])
    heads += [f"{name} {PARTS[part]}" for name in ("Pseudo rank", "Imbalance", "Gap") for part in PRODUCTS]
    heads += [f"{grid.unit.capitalize()} per second", "Loss at equal time"]
    rows = []
    for cell in grid.cells:
        cells = [f"{cell['strength']:g}"]
        cells += ["—" if cell["mlp_decay"] is None else f"{cell['mlp_decay']:g}"] if several("mlp_decay") else []
        cells += ["yes" if cell["qk_norm"] else "no"] if several("qk_norm") else []
        cells += [_seeds(cell), _with(_number(cell.get("loss"), ".4f"), _number(error_of(cell), ".4f"), "±")]
        cells += [_number(cell.get("accuracy"), ".1%")] if accurate else []
        cells += [_rank(cell, part) for part in PRODUCTS]
        for measure in ("imbalance", "nuclear_gap"):
            cells += [_number(of(cell.get("mean") or {}, part, measure), ".3g") for part in PRODUCTS]
        cells += [_number(cell.get("per_second"), ",.0f"), _number(cell.get("loss_at_equal_time"), ".4f")]
        rows.append((styles[cell["name"]].label, cells))
    return pieces.table("What every cell came to", heads, rows)


def _seeds(cell: Row) -> str:
    lost: Any = cell.get("diverged")
    return _with(_number(cell.get("seeds"), ",d"), f"{lost:,} diverged" if lost else "—")


def _rank(cell: Row, part: str) -> str:
    mean = cell.get("mean") or {}
    value = _number(of(mean, part, "pseudo_rank"), ".3f")
    untrained = _number(of(cell.get("untrained_mean") or {}, part, "pseudo_rank"), ".3f")
    shown = _with(value, untrained, "untrained")
    return _with(shown, "W_Q, W_K") if part == "query_key" and mean and part not in mean else shown


def _with(value: str, more: str, name: str = "") -> str:
    """A number and, smaller, what belongs to it; neither is from outside."""
    return value if more == "—" else f"{value} <small>{escape(f'{name} {more}'.strip())}</small>"


def _number(value: Any, form: str) -> str:
    return format(value, form) if is_number(value) else "—"
