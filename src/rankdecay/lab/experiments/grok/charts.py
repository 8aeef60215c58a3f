"""Charts of the page and the figure of `grok`: curves over steps, and spectra, needles and attention through time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.grok.summary import by_member
from rankdecay.lab.report.chart import Axis, Chart, Choice, Line, evenly_spaced_indices, median_band
from rankdecay.lab.report.page import SNAPSHOT_NUMBERS, absent, asset, choice
from rankdecay.lab.report.section import Html, Section
from rankdecay.lab.report.style import ArmStyle, arm_styles
from rankdecay.lab.report.words import figure_text, is_number
from rankdecay.lab.settings import Record
from rankdecay.lab.stored import StoredRun, snapshots

ACCURACIES = {
    "test_accuracy": "test accuracy",
    "validation_accuracy": "validation accuracy",  # which decides, where there is that set
    "train_accuracy": "training accuracy",
}
RANKS = {
    "stable_rank": "stable rank of W_Q, W_K",
    "effective_rank": "effective rank of W_Q, W_K",
    "product_stable_rank": "stable rank of head products",
    "product_effective_rank": "effective rank of head products",
}
SHARES = {"tangential_share": "tangential share", "radial_share": "radial share"}
FLOOR = 1e-6  # of σ₁: float32 resolves little below it
SHARE_LIMITS = (-0.02, 1.03)
ARRAYS = ("singular_values", "product", "attention")  # of a snapshot; their first axis is the member
SCRIPTS = ("time.js", "spectra.js", "needle.js", "attention.js")
BY_RULE = {
    "prox": ArmStyle("low-rank decay, prox", "#9a2f0a", "#ff7a6b", "dash"),
    "smooth": ArmStyle("low-rank decay, smooth", "#a34a2a", "#ffb199", "dot"),
    "polar": ArmStyle("low-rank decay, polar", "#7a5c00", "#d8b861", "longdash"),
    "newton_schulz": ArmStyle("low-rank decay, Newton–Schulz", "#b0307a", "#ff86bf", "dashdot"),
}


def styles(settings: Mapping[str, Any]) -> dict[str, ArmStyle]:
    """How arms of low-rank decay are drawn and called: by their rule, which for ``low_rank`` the settings say."""
    rule = str(settings.get("rule", ""))
    label = BY_RULE[rule].label if rule in BY_RULE else ", ".join(filter(None, ("low-rank decay", rule)))
    of_this_run = {
        "low_rank": ArmStyle(label, "#c2410c", "#ff8f5c"),
        "relative": ArmStyle(f"{label}, relative", "#b8602a", "#ffb98a", "dashdot"),
    }
    return BY_RULE | of_this_run


# --- curves ---


def _series(stored: StoredRun, metric: str) -> dict[str, list[tuple[list[int], list[Any]]]]:
    """A metric over steps: of each arm a line per seed that has it."""
    found: dict[str, list[tuple[list[int], list[Any]]]] = {arm: [] for arm in stored.arms}
    for (arm, _), records in by_member(stored.rows).items():
        values = [record.get(metric) for record in records]
        if any(map(is_number, values)):
            found[arm].append(([record["step"] for record in records], values))
    return found


def _curves(stored: StoredRun, name: str, metrics: Mapping[str, str], **axis: Any) -> Chart:
    """A chart of one of several metrics: a thin line per seed under the median of the seeds still training."""
    looks, thin, bold = arm_styles(stored.arms, styles(stored.settings)), [], []
    for metric in metrics:
        where = {name: metric}
        for arm, series in _series(stored, metric).items():
            if len(series) > 1:
                thin += [Line(looks[arm].label, x, y, arm, mark="thin", where=where) for x, y in series]
            steps, values, low, high = median_band(series)
            if steps:
                words = _words(series, steps, values, low, high)
                bold.append(Line(looks[arm].label, steps, values, arm, where=where, words=words))
    measured = {line.where[name] for line in bold}
    offered = {metric: words for metric, words in metrics.items() if metric in measured} or metrics
    axes = {metric: Axis(words, **axis) for metric, words in offered.items()}
    title, empty = f"{name.title()} over steps", f"{name.title()}: not recorded in this run."
    return Chart(
        name, title, Axis("step"), axes, [*thin, *bold], [Choice(name, name.title(), offered)], name, empty=empty
    )


def _words(series: Sequence[tuple[list[int], list[Any]]], steps: Sequence[int], *ends: Sequence[float]) -> list[str]:
    """Words for a median: its value, the range of the seeds and their number."""
    at = [step for x, y in series for step, value in zip(x, y, strict=True) if is_number(value)]
    texts = []
    for step, value, low, high in zip(steps, *ends, strict=True):
        count = at.count(step)
        texts.append(
            figure_text(value) + (f"  ({figure_text(low)} to {figure_text(high)}, {count} seeds)" if count > 1 else "")
        )
    return texts


# --- through time ---


def time_data(stored: StoredRun) -> Record:
    """Frames of the slider: one per snapshot, thinned evenly, with a notice, where there are too many."""
    found = list(snapshots(stored))
    size = max((sum(arrays[name].size for name in ARRAYS if name in arrays) for _, arrays in found), default=0)
    fit = max(2, SNAPSHOT_NUMBERS // size) if size else len(found)
    if len(found) > fit:
        stored.notices.append(f"The page shows {fit} of the {len(found)} snapshots in the directory, evenly spaced.")
        found = [found[i] for i in evenly_spaced_indices(len(found), fit)]
    order = [list(zip(map(str, arrays["arms"]), map(int, arrays["seeds"]), strict=True)) for _, arrays in found]
    arms = stored.arms
    known = {member for in_snapshot in order for member in in_snapshot if member[0] in arms}
    members = sorted(known, key=lambda member: (arms.index(member[0]), member[1]))
    first = found[0][1] if found else {}
    return {
        "steps": [step for step, _ in found],
        "members": [{"arm": arms.index(arm), "seed": seed} for arm, seed in members],
        **{f"{name}_shape": list(first[name].shape[1:]) if name in first else [] for name in ARRAYS},
        **{name: [str(label) for label in first.get(name, ())] for name in ("groups", "positions")},
        "frames": [
            {
                name: [arrays[name][in_snapshot.index(member)] if member in in_snapshot else None for member in members]
                for name in ARRAYS
                if name in arrays
            }
            for in_snapshot, (_, arrays) in zip(order, found, strict=True)
        ],
    }


SHARE = """<p class="below">What each arm's own decay steps did: the share of ‖D‖² across W (tangential) or along it
(radial). The two add to 1; an arm without decay has no line.</p>"""


def _controls(time: Record) -> dict[str, str]:
    """Parts that ``time.html`` and ``attention.html`` leave open: the slider's end, and what a reader chooses from."""
    matrices, products = (time[f"{name}_shape"] or [0, 0] for name in ("singular_values", "product"))
    each = {
        f"singular_values:{layer}:{index}": f"layer {layer + 1}, W_{name}"
        for layer in range(matrices[0])
        for index, name in enumerate("QK")
    }
    heads = {
        f"product:{layer}:{head}": f"layer {layer + 1}, head {head + 1}: W_Qᵀ W_K"
        for layer in range(products[0])
        for head in range(products[1])
    }
    seeds = sorted({member["seed"] for member in time["members"]})
    return {
        "shown": f"{time['steps'][-1]:,}",
        "last": str(len(time["steps"]) - 1),
        "seed": choice("seed", "Seed", {seed: seed for seed in seeds}),
        "matrix": choice("matrix", "Matrix", each | heads),
        "scale": choice("scale", "Values", {"relative": "relative to σ₁", "absolute": "absolute"}),
        "needle": choice("needle", "Matrix", each),
        "layer": choice("layer", "Layer", {i: f"layer {i + 1}" for i in range(time["attention_shape"][0])}),
    }


def sections(stored: StoredRun) -> list[Section]:
    """Accuracy, rank, and what a slider through the snapshots moves."""
    seeds = (
        "A thin line is one seed, a bold line the median of the seeds still training. Click a name to hide or show its "
        "arm everywhere on the page; hover for values."
    )
    accuracy = _curves(stored, "accuracy", ACCURACIES, limits=SHARE_LIMITS)
    rank = _curves(stored, "rank", RANKS, scale="log")
    share = _curves(stored, "share", SHARES, limits=SHARE_LIMITS)
    time = time_data(stored)
    if not time["steps"]:
        through = [Html(absent("This run has no snapshots, so no spectra or attention maps.")), Html(SHARE), share]
    else:
        pictures, attention = (asset(name, __package__, _controls(time)) for name in ("time.html", "attention.html"))
        through = [Html(pictures, {"time": time}, SCRIPTS, ("time.css",)), Html(SHARE), share, Html(attention)]
    return [
        Section("Accuracy", seeds, [accuracy]),
        Section("Rank", "", [rank]),
        Section("Through time", "", through, name="time"),
    ]


# --- the figure ---


def final_spectrum(stored: StoredRun) -> dict[str, np.ndarray]:
    """By arm, the median of σᵢ/σ₁ over seeds, layers, queries and keys at each member's last snapshot."""
    last: dict[tuple[str, int], np.ndarray] = {}
    for _, arrays in snapshots(stored):
        for arm, seed, values in zip(arrays["arms"], arrays["seeds"], arrays["singular_values"], strict=True):
            last[str(arm), int(seed)] = values.reshape(-1, values.shape[-1])
    found = {}
    for name in stored.arms:
        values_of_arm = [values for (arm, _), values in last.items() if arm == name]
        # A matrix held at zero has no direction.
        if values_of_arm and (spectra := np.concatenate(values_of_arm))[:, 0].any():
            largest = spectra[:, :1]
            found[name] = np.median(np.divide(spectra, largest, out=np.zeros_like(spectra), where=largest > 0), axis=0)
    return found


def figure(stored: StoredRun, path: Path) -> Path:
    """Draw accuracy and rank, the median over seeds with their range, and the singular values at the end.

    Raises:
        SettingError: While nothing is measured.
    """
    from rankdecay.lab.report.figure import draw

    looks = arm_styles(stored.arms, styles(stored.settings))

    def over_steps(metric: str) -> list[Line]:
        made = {arm: median_band(series) for arm, series in _series(stored, metric).items() if series}
        return [Line(looks[arm].label, x, y, arm, low, high) for arm, (x, y, low, high) in made.items()]

    ends = [
        Line(looks[arm].label, range(1, len(values) + 1), np.maximum(values, FLOOR).tolist(), arm)
        for arm, values in final_spectrum(stored).items()
    ]
    panels = [
        ("Test accuracy", "step", {"limits": SHARE_LIMITS}, over_steps("test_accuracy")),
        ("Stable rank of W_Q, W_K", "step", {"scale": "log"}, over_steps("stable_rank")),
        ("Singular values at the end, σᵢ/σ₁", "index i", {"scale": "log", "limits": (FLOOR, 1.6)}, ends),
    ]
    charts = [Chart(title, title, Axis(x), Axis(title, **y), lines) for title, x, y, lines in panels if lines]
    if not charts:
        raise SettingError(f"{stored.directory} has nothing to draw yet: let the run continue, or complete it")
    return draw(charts, looks, path)
