"""The self-contained HTML page of a run.

One file with everything in it: the words and tables are plain HTML, made here of the pieces in
:mod:`rankdecay.lab.report.page`; the charts are drawn by `page/*.js` with plotly, from data embedded as JSON.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab.experiments.grok.read import Run, is_number
from rankdecay.lab.experiments.grok.verdict import seed_count, verdict, wilson_interval
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report import style
from rankdecay.lab.report.page import SNAPSHOT_NUMBERS, choice

COLUMNS = {
    "generalised": "Generalised",
    "steps_to_generalise": "Steps, median",
    "test_accuracy": "Test accuracy",
    "train_accuracy": "Train accuracy",
    "diverged": "Diverged seeds",
    "stable_rank": "Stable rank",
    "effective_rank": "Effective rank",
    "product_stable_rank": "Stable rank, head product",
    "product_effective_rank": "Effective rank, head product",
    "query_norm": "‖W_Q‖",
    "key_norm": "‖W_K‖",
    "decay_size": "Decay step, ‖D‖/‖W‖",
    "tangential_share": "Tangential share",
    "steps_per_second": "Steps per second",
}
METRICS = ["train_accuracy", "test_accuracy", "stable_rank", "effective_rank", "product_stable_rank"]
METRICS += ["product_effective_rank", "radial_share", "tangential_share"]
ACCURACIES = {"test_accuracy": "test", "train_accuracy": "training"}
RANKS = {
    "stable_rank": "stable rank of W_Q, W_K",
    "effective_rank": "effective rank of W_Q, W_K",
    "product_stable_rank": "stable rank of head products",
    "product_effective_rank": "effective rank of head products",
}
FILES = {
    "config.json": "what was asked, the versions and the machine",
    "metrics.jsonl": "every evaluation of every member, one JSON object per line",
    "snapshots/": "spectra and attention maps, one numpy archive per step",
    "summary.json": "the result per arm",
}
SCRIPTS = ["core.js", "plotly.js", "controls.js", "legend.js"]
SCRIPTS += ["curves.js", "spectra.js", "needle.js", "attention.js", "start.js"]


def render(run: Run) -> str:
    """The page of a run as one HTML string."""
    data, frames = curves_data(run), snapshot_data(run)
    metrics = set(data["metrics"])
    parts = {
        **pieces.shared(
            [run.config],
            run.arms,
            verdict(run.summary, run.last_step),
            [*run.notices, *frames["notices"]],
            directory=run.directory.resolve().name,
            drawn="charts",
            again="This command asks for the same run; another machine or version may give other digits.",
            wall_seconds=(run.summary or {}).get("wall_seconds"),
            files=pieces.file_list(FILES),
            sources="the files beside it",
        ),
        "criterion": _criterion(run),
        "table": _table(run),
        "accuracy": _chart("accuracy-chart", "accuracy", "Accuracy", _known(ACCURACIES, metrics)),
        "rank": _chart("rank-chart", "rank", "Rank", _known(RANKS, metrics)),
        "timeline": _timeline(frames),
        "spectra": _spectra(frames),
        "needle": _needle(frames),
        "share": _chart(
            "share-chart",
            "share",
            "Share",
            _known({"tangential_share": "tangential", "radial_share": "radial"}, metrics),
        ),
        "attention": _attention(frames),
        "data": pieces.embedded(data),
        "snapshot_data": pieces.embedded(frames),
    }
    return pieces.fill("page.html", parts, ["page.css"], SCRIPTS, "grok")


def curves_data(run: Run) -> dict[str, Any]:
    """What the page's curves are drawn from: the arms with their style, each member's metrics as columns."""
    arms = run.arms
    styles = style.arm_styles(arms)
    lines = [line for member in run.metrics.values() for line in member]
    present = [name for name in METRICS if any(is_number(line.get(name)) for line in lines)]
    return {
        "arms": [{"name": name, **vars(styles[name])} for name in arms],
        "metrics": present,
        "members": [
            {
                "arm": arms.index(arm),
                "seed": seed,
                "step": [line["step"] for line in member],
                "values": {
                    name: [line[name] if is_number(line.get(name)) else None for line in member] for name in present
                },
            }
            for (arm, seed), member in sorted(
                run.metrics.items(), key=lambda item: (arms.index(item[0][0]), item[0][1])
            )
        ],
    }


def snapshot_data(run: Run) -> dict[str, Any]:
    """What the page's slider moves through: a frame per snapshot, thinned evenly when there are too many."""
    snapshots, notices = run.snapshots, []
    size = max((sum(array.size for array in snapshot.arrays.values()) for snapshot in snapshots), default=0)
    fit = max(2, SNAPSHOT_NUMBERS // size) if size else 0
    if len(snapshots) > fit > 0:
        notices.append(f"The page shows {fit} of the {len(snapshots)} snapshots in the directory, evenly spaced.")
        snapshots = [snapshots[i] for i in np.linspace(0, len(snapshots) - 1, fit).round().astype(int)]
    members = list(dict.fromkeys(member for snapshot in snapshots for member in snapshot.members))
    arms = run.arms
    members = sorted((m for m in members if m[0] in arms), key=lambda m: (arms.index(m[0]), m[1]))
    first = snapshots[0] if snapshots else None

    def shape(name: str) -> list[int]:
        return list(first.arrays[name].shape[1:]) if first and name in first.arrays else []

    frames = [
        {
            name: [array[snapshot.members.index(m)] if m in snapshot.members else None for m in members]
            for name, array in snapshot.arrays.items()
        }
        for snapshot in snapshots
    ]
    return {
        "steps": [snapshot.step for snapshot in snapshots],
        "members": [{"arm": arms.index(arm), "seed": seed} for arm, seed in members],
        "singular_values_shape": shape("singular_values"),
        "product_shape": shape("product"),
        "attention_shape": shape("attention"),
        "groups": first.groups if first else [],
        "positions": first.positions if first else [],
        "frames": frames,
        "notices": notices,
    }


# --- pieces of HTML ---


def _table(run: Run) -> str:
    rows = run.summary["arms"] if run.summary else _measured_so_far(run)
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    if not any(row.get("diverged") for row in rows):
        columns = [key for key in columns if key != "diverged"]
    if not rows or not columns:
        return pieces.absent("Nothing has been measured yet.")
    labels = style.arm_styles(str(row["name"]) for row in rows)
    lines = [(labels[str(row["name"])].label, [_cell(row, key) for key in columns]) for row in rows]
    return pieces.table("Summary per arm", ["Arm", *(COLUMNS[key] for key in columns)], lines)


def _criterion(run: Run) -> str:
    threshold: Any = (run.summary or {}).get("threshold")
    if not is_number(threshold):
        return ""
    return (
        f"A seed has generalised when its test accuracy reaches {threshold * 100:g} % and the next evaluation holds it."
    )


def _measured_so_far(run: Run) -> list[dict[str, Any]]:
    """Means over seeds of every member's last evaluation, for a run without a summary."""
    rows = []
    for arm in run.arms:
        last = [lines[-1] for (name, _), lines in run.metrics.items() if name == arm and lines]
        row: dict[str, Any] = {"name": arm}
        for key in COLUMNS:
            values = [float(line[key]) for line in last if is_number(line.get(key))]
            row[key] = sum(values) / len(values) if values else None
        rows.append(row)
    return rows if run.metrics else []


def _cell(row: dict[str, Any], key: str) -> str:
    value: Any = row.get(key)
    if not is_number(value):
        return "—"
    if key == "generalised":
        seeds = seed_count(row)
        low, high = wilson_interval(int(value), seeds)
        return f"{int(value)} of {seeds} <small>{low * 100:.0f}–{high * 100:.0f} %</small>"
    if key == "steps_to_generalise":
        return f"{value:,.0f}"
    if key.endswith(("accuracy", "share")):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _known(choices: dict[str, str], present: set[str]) -> dict[str, str]:
    return {key: text for key, text in choices.items() if key in present}


def _chart(identity: str, state: str, label: str, choices: dict[str, str]) -> str:
    """A chart with the choice of what it shows above it, and the legend that switches arms on and off."""
    if not choices:
        return pieces.absent(f"{label}: not recorded in this run.")
    return (
        f'<figure><div class="controls">{choice(state, label, choices)}</div>'
        f'<div class="legend" role="group" aria-label="Arms shown"></div>'
        f'<div class="chart" id="{identity}"></div></figure>'
    )


def _timeline(frames: dict[str, Any]) -> str:
    if not frames["steps"]:
        return pieces.absent("This run has no snapshots, so no spectra or attention maps.")
    last = len(frames["steps"]) - 1
    seeds = {str(seed): str(seed) for seed in sorted({member["seed"] for member in frames["members"]})}
    return (
        '<div class="timeline" role="group" aria-label="Time">'
        '<button type="button" id="play">Play</button>'
        f'<label class="slider"><span>Step <output id="step-output">{frames["steps"][-1]:,}</output></span>'
        f'<input type="range" id="step-slider" min="0" max="{last}" value="{last}" step="1"></label>'
        f"{choice('seed', 'Seed', seeds)}</div>"
    )


def _matrices(frames: dict[str, Any], products: bool) -> dict[str, str]:
    layers = (frames["singular_values_shape"] or [0])[0]
    choices = {
        f"singular_values:{layer}:{index}": f"layer {layer + 1}, W_{name}"
        for layer in range(layers)
        for index, name in enumerate("QK")
    }
    if products and frames["product_shape"]:
        layers, heads = frames["product_shape"][:2]
        choices |= {
            f"product:{layer}:{head}": f"layer {layer + 1}, head {head + 1}: W_Qᵀ W_K"
            for layer in range(layers)
            for head in range(heads)
        }
    return choices


def _spectra(frames: dict[str, Any]) -> str:
    matrices = _matrices(frames, products=True)
    if not matrices:
        return pieces.absent("Spectra: not recorded in this run.")
    scales = {"relative": "relative to σ₁", "absolute": "absolute"}
    return (
        f'<figure><div class="controls">{choice("matrix", "Matrix", matrices)}'
        f"{choice('scale', 'Values', scales)}</div>"
        '<div class="legend" role="group" aria-label="Arms shown"></div>'
        '<div class="chart" id="spectra-chart"></div></figure>'
    )


def _needle(frames: dict[str, Any]) -> str:
    matrices = _matrices(frames, products=False)
    if not matrices:
        return pieces.absent("Needle and fan: no spectra recorded in this run.")
    return f'<div class="controls">{choice("needle", "Matrix", matrices)}</div><div class="needles" id="needles"></div>'


def _attention(frames: dict[str, Any]) -> str:
    if not frames["attention_shape"]:
        return pieces.absent("Attention maps: not recorded in this run.")
    layers = {str(layer): f"layer {layer + 1}" for layer in range(frames["attention_shape"][0])}
    return (
        f'<figure><div class="controls">{choice("layer", "Layer", layers)}'
        '<span class="scale"><span>0</span><i></i><span>1 &nbsp;share of attention</span></span></div>'
        '<div class="chart grid" id="attention-chart"></div></figure>'
    )


def write_page(run: Run, path: Path) -> Path:
    """Render the page of a run and put it at `path`, by atomic rename."""
    return pieces.write(render(run), path)
