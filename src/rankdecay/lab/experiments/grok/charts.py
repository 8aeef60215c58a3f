"""What the page and the figure of `grok` show: curves over steps, and spectra, needles and attention through time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.grok.summary import by_member
from rankdecay.lab.report.chart import Axis, Chart, Choice, Line, evenly, middle
from rankdecay.lab.report.page import SNAPSHOT_NUMBERS, absent, choice
from rankdecay.lab.report.section import Html, Section
from rankdecay.lab.report.style import ArmStyle, arm_styles
from rankdecay.lab.report.words import is_number, shown
from rankdecay.lab.settings import Record
from rankdecay.lab.stored import StoredRun, snapshots

ACCURACIES = {"test_accuracy": "test accuracy", "train_accuracy": "training accuracy"}
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
LEGEND = '<div class="legend" role="group" aria-label="Arms shown"></div>'


def styles(settings: Mapping[str, Any]) -> dict[str, ArmStyle]:
    """How arms of low-rank decay are drawn and called: by their rule, which for ``low_rank`` the settings say."""
    rule = str(settings.get("rule", ""))
    label = BY_RULE[rule].label if rule in BY_RULE else ", ".join(filter(None, ("low-rank decay", rule)))
    return BY_RULE | {"low_rank": ArmStyle(label, "#c2410c", "#ff8f5c")}


# --- curves ---


def _series(stored: StoredRun, metric: str) -> dict[str, list[tuple[list[int], list[Any]]]]:
    """A metric over steps: of each arm a line per seed that has it."""
    found: dict[str, list[tuple[list[int], list[Any]]]] = {arm: [] for arm in stored.arms}
    for (arm, _), records in by_member(stored.rows).items():
        values = [record.get(metric) for record in records]
        if any(map(is_number, values)):
            found[arm].append(([record["step"] for record in records], values))
    return found


def _curves(stored: StoredRun, name: str, label: str, metrics: Mapping[str, str], **axis: Any) -> Chart:
    """A chart of one of several metrics: a thin line per seed under the median of the seeds still training."""
    looks, thin, bold = arm_styles(stored.arms, styles(stored.settings)), [], []
    for metric in metrics:
        where = {name: metric}
        for arm, series in _series(stored, metric).items():
            if len(series) > 1:
                thin += [Line(looks[arm].label, x, y, arm, mark="thin", where=where) for x, y in series]
            steps, values, low, high = middle(series)
            if steps:
                words = _words(series, steps, values, low, high)
                bold.append(Line(looks[arm].label, steps, values, arm, where=where, words=words))
    measured = {line.where[name] for line in bold}
    offered = {metric: words for metric, words in metrics.items() if metric in measured} or metrics
    axes = {metric: Axis(words, **axis) for metric, words in offered.items()}
    return Chart(
        name,
        f"{name.title()} over steps",
        Axis("step"),
        axes,
        [*thin, *bold],
        [Choice(name, label, offered)],
        name,
        empty=f"{name.title()}: not recorded in this run.",
    )


def _words(series: Sequence[tuple[list[int], list[Any]]], steps: Sequence[int], *ends: Sequence[float]) -> list[str]:
    """What is said of a median: its value, the range of the seeds and their number."""
    at = [step for x, y in series for step, value in zip(x, y, strict=True) if is_number(value)]
    said = []
    for step, value, low, high in zip(steps, *ends, strict=True):
        count = at.count(step)
        said.append(shown(value) + (f"  ({shown(low)} to {shown(high)}, {count} seeds)" if count > 1 else ""))
    return said


# --- through time ---


def time_data(stored: StoredRun) -> Record:
    """What the slider moves through: a frame per snapshot, thinned evenly, with a notice, where there are too many."""
    found = list(snapshots(stored))
    size = max((sum(arrays[name].size for name in ARRAYS if name in arrays) for _, arrays in found), default=0)
    fit = max(2, SNAPSHOT_NUMBERS // size) if size else len(found)
    if len(found) > fit:
        stored.notices.append(f"The page shows {fit} of the {len(found)} snapshots in the directory, evenly spaced.")
        found = [found[i] for i in evenly(len(found), fit)]
    order = [list(zip(map(str, arrays["arms"]), map(int, arrays["seeds"]), strict=True)) for _, arrays in found]
    arms = stored.arms
    known = {member for own in order for member in own if member[0] in arms}
    members = sorted(known, key=lambda member: (arms.index(member[0]), member[1]))
    first = found[0][1] if found else {}
    return {
        "steps": [step for step, _ in found],
        "members": [{"arm": arms.index(arm), "seed": seed} for arm, seed in members],
        **{f"{name}_shape": list(first[name].shape[1:]) if name in first else [] for name in ARRAYS},
        **{name: [str(label) for label in first.get(name, ())] for name in ("groups", "positions")},
        "frames": [
            {
                name: [arrays[name][own.index(member)] if member in own else None for member in members]
                for name in ARRAYS
                if name in arrays
            }
            for own, (_, arrays) in zip(order, found, strict=True)
        ],
    }


def _timeline(time: Record) -> str:
    last = len(time["steps"]) - 1
    seeds = {str(seed): str(seed) for seed in sorted({member["seed"] for member in time["members"]})}
    return f"""<p>The pictures below follow one slider and one seed: <a href="#spectra">spectra</a>,
<a href="#needle">needle and fan</a>, <a href="#attention">attention maps</a>.</p>
<div class="timeline" role="group" aria-label="Time"><button type="button" id="play">Play</button>
<label class="slider"><span>Step <output id="step-output">{time["steps"][-1]:,}</output></span>
<input type="range" id="step-slider" min="0" max="{last}" value="{last}" step="1"></label>
{choice("seed", "Seed", seeds)}</div>"""


def _spectra(time: Record) -> str:
    layers, heads = (time["product_shape"] or [0, 0])[:2]
    products = {
        f"product:{layer}:{head}": f"layer {layer + 1}, head {head + 1}: W_Qᵀ W_K"
        for layer in range(layers)
        for head in range(heads)
    }
    scales = {"relative": "relative to σ₁", "absolute": "absolute"}
    return f"""<section id="spectra">
<h3>Spectra</h3>
<p>Every singular value of one matrix, largest first. Purely radial decay lowers a whole curve on the absolute scale and
leaves it in place on the relative one; decay that lowers rank bends the tail down on both. Bold is the chosen seed,
faint the others; values below the floor are drawn on it.</p>
<figure><div class="controls">{choice("matrix", "Matrix", _matrices(time) | products)}
{choice("scale", "Values", scales)}</div>{LEGEND}<div class="chart" id="spectra-chart"></div></figure>
</section>"""


def _needle(time: Record) -> str:
    return f"""<section id="needle">
<h3>Needle and fan</h3>
<p>The space of matrices, seen from W. The radial axis points along W: L2 always steps along it, and under QK-norm that
leaves the function unchanged. The needle is UVᵀ, the direction of low-rank decay at this W, drawn for every arm whether
or not it took that step; its foot on the axis is the radial part, its height the tangential part, which changes the
spectrum. Where singular values have vanished the nuclear norm has many subgradients, UVᵀ + Z with ‖Z‖₂ ≤ 1 on the null
space, and the needle opens into a fan.</p>
<div class="controls">{choice("needle", "Matrix", _matrices(time))}</div><div class="needles" id="needles"></div>
</section>"""


SHARE = """<p class="below">What each arm's own decay steps did: the share of ‖D‖² across W (tangential) or along it
(radial). The two add to 1; an arm without decay has no line.</p>"""


def _attention(time: Record) -> str:
    layers = {str(layer): f"layer {layer + 1}" for layer in range(time["attention_shape"][0])}
    return f"""<section id="attention">
<h3>Attention maps</h3>
<p>How much the last position attends to each position (columns), averaged over the test examples that end in each token
(rows). One map per arm and head. Heads are numbered, not matched: head 1 of two arms need not do the same work.</p>
<figure><div class="controls">{choice("layer", "Layer", layers)}
<span class="scale"><span>0</span><i></i><span>1 &nbsp;share of attention</span></span></div>
<div class="chart grid" id="attention-chart"></div></figure>
</section>"""


def _matrices(time: Record) -> dict[str, str]:
    layers = (time["singular_values_shape"] or [0])[0]
    return {
        f"singular_values:{layer}:{index}": f"layer {layer + 1}, W_{name}"
        for layer in range(layers)
        for index, name in enumerate("QK")
    }


def sections(stored: StoredRun) -> list[Section]:
    """Accuracy, rank, and what a slider through the snapshots moves."""
    seeds = (
        "A thin line is one seed, a bold line the median of the seeds still training. Click a name to hide or show its "
        "arm everywhere on the page; hover for values."
    )
    accuracy = _curves(stored, "accuracy", "Accuracy", ACCURACIES, limits=SHARE_LIMITS)
    rank = _curves(stored, "rank", "Rank", RANKS, scale="log")
    share = _curves(stored, "share", "Share", SHARES, limits=SHARE_LIMITS)
    time = time_data(stored)
    if not time["steps"]:
        through = [Html(absent("This run has no snapshots, so no spectra or attention maps.")), Html(SHARE), share]
    else:
        through = [
            Html(_timeline(time), {"time": time}, SCRIPTS, ("time.css",)),
            Html(_spectra(time)),
            Html(_needle(time)),
            Html(SHARE),
            share,
            Html(_attention(time)),
        ]
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
        own = [values for (arm, _), values in last.items() if arm == name]
        if own and (spectra := np.concatenate(own))[:, 0].any():  # a matrix held at zero has no direction
            largest = spectra[:, :1]
            found[name] = np.median(np.divide(spectra, largest, out=np.zeros_like(spectra), where=largest > 0), axis=0)
    return found


def figure(stored: StoredRun, path: Path) -> Path:
    """Draws accuracy and rank, the median over seeds with their range, and the singular values at the end.

    Raises:
        SettingError: while nothing is measured.
    """
    from rankdecay.lab.report.figure import draw

    looks = arm_styles(stored.arms, styles(stored.settings))

    def over_steps(metric: str) -> list[Line]:
        made = {arm: middle(series) for arm, series in _series(stored, metric).items() if series}
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
        raise SettingError(f"{stored.directory} has nothing to draw yet: let the run go on, or complete it")
    return draw(charts, looks, path)
