"""What the maps and charts of a sweep's page are drawn from; `page/maps.js` and `page/cell.js` draw them."""

from collections.abc import Iterable
from typing import Any

from rankdecay.lab.experiments.boundary.maps import DataAxis, PhaseMap, by_boundary
from rankdecay.lab.experiments.boundary.read import Row, Sweep
from rankdecay.lab.experiments.boundary.verdict import amount_words
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.report.style import arm_styles

NUMBERS = 700_000  # of curves and spectra in one page, about 4 MB beside plotly's 5; curves that do not fit are thinned
FEWEST_POINTS = 8  # of a curve, however many there are
CURVES = ("train_accuracy", "test_accuracy", "stable_rank", "query_norm")
#: What the colour of a cell can be: its name, and the scale it is on.
MEASURES = {
    "generalised": ("share of seeds that generalised", "share"),
    "steps_to_generalise": ("median steps to generalise", "log"),
    "best_test_accuracy": ("best test accuracy, mean", "share"),
    "stable_rank": ("stable rank at the end, mean", "log"),
}


def page_data(sweep: Sweep, axis: DataAxis, maps: list[PhaseMap]) -> dict[str, Any]:
    """Maps with their cells and fitted boundaries, every run's curves and spectrum, the boundaries at best strength."""
    styles = arm_styles(sweep.arms)
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
        "arms": [{"name": name, **vars(styles[name])} for name in sweep.arms],
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
        kept = _evenly(len(steps), points)
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


def _evenly(length: int, most: int) -> list[int]:
    """Indices of at most `most` of `length` items, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _thinned(values: list[Any] | None, kept: Iterable[int]) -> list[float | None] | None:
    return [_short(values[i]) for i in kept] if values else None


def _short(value: Any) -> float | None:
    """Three digits: what a line on a screen can show."""
    return float(f"{value:.3g}") if is_number(value) else None


def _best(sweep: Sweep, axis: DataAxis) -> list[dict[str, Any]]:
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


def _first(sweep: Sweep, axis: DataAxis, maps: list[PhaseMap]) -> list[int]:
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
