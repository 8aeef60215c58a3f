"""Charts of the page of a sweep: phase maps with their runs, differences, events and controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from rankdecay.lab.experiments.boundary.arms import styles
from rankdecay.lab.experiments.boundary.claims import (
    UNKNOWN,
    amount_words,
    ratio_words,
    seeds_words,
    settled,
)
from rankdecay.lab.experiments.boundary.maps import DataAxis, PhaseMap, by_boundary, data_axis, phase_maps, rest_decays
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.chart import evenly_spaced_indices
from rankdecay.lab.report.section import Html, Section
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.report.table import table
from rankdecay.lab.report.words import is_number
from rankdecay.lab.settings import Record as Row
from rankdecay.lab.stored import StoredRun

NUMBERS = 700_000  # of curves and spectra in one page, about 4 MB beside plotly's 5; curves that do not fit are thinned
FEWEST_POINTS = 8  # of a curve, however many there are
CURVES = ("train_accuracy", "test_accuracy", "stable_rank", "query_norm")
EVENTS = {
    "rank_first": "Rank first",
    "together": "Together",
    "accuracy_first": "Accuracy first",
    "rank_only": "Rank only",
    "accuracy_only": "Accuracy only",
    "neither": "Neither",
}
BOUNDARIES = '<figure><div class="chart grid" id="boundaries-chart"></div></figure>'
#: What the colour of a cell can be: its name, and the scale it is on.
MEASURES = {
    "generalised": ("share of seeds that generalised", "share"),
    "steps_to_generalise": ("median steps to generalise", "log"),
    "best_test_accuracy": ("best test accuracy, mean", "share"),
    "stable_rank": ("stable rank at the end, mean", "log"),
}


def page_data(sweep: StoredRun, axis: DataAxis, maps: list[PhaseMap]) -> dict[str, Any]:
    """Maps with their cells and fitted boundaries, every run's curves and spectrum, the boundaries at best strength."""
    curves, notices = _curves(sweep.rows)
    runs: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(sweep.rows):
        runs.setdefault((row["arm"], row["rest_decay"], row["strength"], row["train_fraction"]), []).append(index)
    placed = []
    for item in maps:
        cells = []
        for (column, row), cell in sorted(item.cells.items()):
            key = (item.arm, cell["rest_decay"], item.strengths[column], cell["train_fraction"])
            cells.append({"column": column, "row": row, "runs": runs.get(key, []), **_cell(cell, axis)})
        placed.append({
            "arm": sweep.arms.index(item.arm),
            "rest": item.rest,
            "strengths": [f"{strength:g}" for strength in item.strengths] if item.has_strengths else [""],
            "cells": cells,
            "fits": [vars(fit) for fit in item.fits],
            "neighbours": item.neighbours(),
            "segments": [[column for column, _ in segment] for segment in item.segments()],
        })  # fmt: skip
    return {
        "rows": axis.ticks,
        "data": axis.title,
        "ticks": [axis.value(fraction) for fraction in axis.fractions],
        "threshold": (sweep.summary or {}).get("threshold"),
        "measures": {name: {"label": label, "scale": scale} for name, (label, scale) in MEASURES.items()},
        "maps": placed,
        "first": _first(sweep, axis, maps),
        "best": _best(sweep, axis),
        "notices": notices,
        **curves,
    }


def _cell(cell: dict[str, Any], axis: DataAxis) -> dict[str, Any]:
    names = ("seeds", "generalised", "diverged", "generalised_low", "generalised_high", "steps_to_generalise")
    names += ("steps_low", "steps_high", "budget", "test_accuracy", "best_test_accuracy", "train_accuracy")
    names += ("stable_rank", "effective_rank", "query_norm", "tangential_share")
    return {"amount": axis.amount(cell["train_fraction"], unit=True), **{name: cell.get(name) for name in names}}


def _curves(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    """Every run's curves, thinned evenly when there are too many; steps and indices that runs share stand once."""
    pools: dict[tuple[int, ...], int] = {}
    spectra = sum(len(row.get("spectrum") or ()) for row in rows)
    points = max(FEWEST_POINTS, (NUMBERS - spectra) // max(1, len(CURVES) * len(rows)))
    runs, longest = [], 0
    for row in rows:
        curve = row.get("curve") or {}
        steps = curve.get("step") or []
        longest = max(longest, len(steps))
        kept = evenly_spaced_indices(len(steps), points)
        index = tuple(row.get("spectrum_index") or ())
        runs.append({
            "seed": row["seed"], "outcome": row["outcome"], "steps": row.get("steps_to_generalise"),
            "budget": row["budget"],
            "at": pools.setdefault(tuple(int(steps[i]) for i in kept), len(pools)),
            "curves": {name: _thinned(curve.get(name), kept) for name in CURVES},
            "index": pools.setdefault(index, len(pools)),
            "spectrum": [_short(value) for value in row.get("spectrum") or ()],
        })  # fmt: skip
    notices = []
    if longest > points:
        notices.append(f"The curves of a run are shown at {points} of up to {longest} evaluations, evenly spaced.")
    return {"runs": runs, "pools": list(pools)}, notices


def _thinned(values: list[Any] | None, kept: Iterable[int]) -> list[float | None] | None:
    return [_short(values[i]) for i in kept] if values else None


def _short(value: Any) -> float | None:
    """Three digits: what a line on a screen can show."""
    return float(f"{value:.3g}") if is_number(value) else None


def _best(sweep: StoredRun, axis: DataAxis) -> list[dict[str, Any]]:
    """The boundary of every arm at its best strength, in the units of the axis."""

    def value(fraction: Any) -> float | None:
        return axis.value(fraction) if is_number(fraction) else None

    found = []
    for arm in by_boundary(sweep.summary):
        boundary = arm["boundary"]
        found.append({
            "arm": sweep.arms.index(arm["name"]), "at": value(boundary["train_fraction"]),
            "low": value(boundary.get("low")), "high": value(boundary.get("high")),
            "censored": boundary.get("censored"), "words": amount_words(boundary, axis),
        })  # fmt: skip
    return found


def _first(sweep: StoredRun, axis: DataAxis, maps: list[PhaseMap]) -> list[int]:
    """The cell to begin with, as map and cell: nearest to the boundary of the reference at its best strength."""
    if sweep.summary is None or not maps:
        return []
    differences = sweep.summary.get("differences", [])
    name = differences[0]["reference"] if differences else maps[0].arm
    best = next((arm.get("boundary") for arm in sweep.summary["arms"] if arm["name"] == name), None)
    number = 0
    if best:
        rests = (None, best["rest_decay"])
        number = next((i for i, m in enumerate(maps) if m.arm == name and m.rest_decay in rests), 0)
    keys = sorted(maps[number].cells)
    if best and best["strength"] in maps[number].strengths:
        column, at = maps[number].strengths.index(best["strength"]), axis.position(best["train_fraction"])
        return [number, keys.index(min(keys, key=lambda key: (key[0] != column, abs(key[1] - at))))]
    return [number, 0]


# --- the page ---


def sections(stored: StoredRun) -> list[Section]:
    """The sections of the page."""
    if stored.summary is None:
        return []
    axis = data_axis(stored.summary)
    maps = phase_maps(stored.summary, axis)
    data = page_data(stored, axis, maps)
    stored.notices.extend(data.pop("notices"))
    labels = {name: style.label for name, style in arm_styles(stored.arms, styles(stored.settings)).items()}
    phase = pieces.asset("phase.html", __package__, {"controls": _map_controls(maps), "inner": _inner()})
    return [
        Section(
            "Boundaries",
            "A point and its 95 % interval per arm, at its best strength; a triangle is a bound beyond the grid.",
            [Html(BOUNDARIES, data, ("maps.js", "cell.js", "boundary.js"), ("boundary.css",))],
        ),
        Section(
            "Phase maps",
            "One map per arm: strength of the decay across, training data upwards, steps of the grid evenly spaced. "
            "Point at a cell, or reach it with the arrow keys, to see its runs; click it, or press Enter, to keep it "
            "while you look at others.",
            [Html(phase)] if maps else [],
            "phase",
        ),
        Section(
            "Differences",
            "How many times as much data the reference needs as each other arm, each at its best strength: below 1 "
            "the reference needs less. Where a boundary lies beyond the grid the ratio is a bound. By seed: a ratio "
            "for each seed that both have, and Student's t over seeds; of the times to generalise likewise, at the "
            "sizes where one of the two did, with the budget for a run that did not. Settled is what the first two "
            "both say. Of many comparisons one in twenty is beyond its interval by chance.",
            _tables(_differences(stored.summary, labels)),
        ),
        Section(
            "Order of events",
            "Runs at each arm's best strength, by what came first: the fall of the stable rank of queries and keys, or "
            "the rise of test accuracy. Evaluations are steps apart, so together means in the same interval.",
            _tables(_events(stored.summary, labels)),
            "order",
        ),
        Section(
            "Controls",
            "What else could explain a success of low-rank decay, and the arm that isolates it or holds it fixed. An "
            "explanation without an arm here is open.",
            _controls(stored.config, labels),
        ),
    ]


def _tables(made: str) -> list[Html]:
    return [Html(made)] if made else []


def _map_controls(maps: list[PhaseMap]) -> str:
    controls = pieces.choice("measure", "Colour", {name: label for name, (label, _) in MEASURES.items()})
    rests = {f"{rest:g}": f"{rest:g}" for rest in rest_decays(maps)}
    return controls + (pieces.choice("rest", "Decay of the rest", {"all": "all", **rests}) if len(rests) > 1 else "")


def _inner() -> str:
    return pieces.choice("inner", "Second chart", {"stable_rank": "stable rank of W_Q, W_K", "query_norm": "‖W_Q‖"})


def _differences(summary: Row, labels: Mapping[str, str]) -> str:
    differences = summary.get("differences", [])
    if not differences:
        return ""
    reference = labels[differences[0]["reference"]]
    readings = {"less": f"{reference} needs less", "more": f"{reference} needs more", None: "not settled"}
    rows = [
        (
            labels[difference["arm"]],
            [
                escape(ratio_words(difference)),
                *(escape(seeds_words(difference.get(key))) for key in ("by_seed", "time")),
                escape(_reading(difference, readings)),
            ],
        )
        for difference in differences
    ]
    return table(
        "Differences", ["Compared with", f"Data of {reference} / its data", "By seed", "Time, by seed", "Reading"], rows
    )


def _reading(difference: Row, readings: Mapping[str | None, str]) -> str:
    return UNKNOWN if difference.get("censored") == "unknown" else readings[settled(difference)]


def _events(summary: Row, labels: Mapping[str, str]) -> str:
    rows = [
        (labels[arm["name"]], [f"{arm['events'].get(key, 0):,}" for key in EVENTS])
        for arm in summary["arms"]
        if arm.get("events")
    ]
    return table("Order of events", ["Arm", *EVENTS.values()], rows) if rows else ""


def _controls(config: Row, labels: Mapping[str, str]) -> list[Html]:
    """Explanations that each control rules out, as the experiment says it."""
    found = [(labels[arm["name"]], str(arm["control"])) for arm in config.get("arms", []) if arm.get("control")]
    shown = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in found)
    return [Html(f'<dl class="points">{shown}</dl>')] if found else []
