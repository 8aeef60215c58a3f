"""Pictures of `rankdecay margin` in two dimensions: tokens, queries and the direction of W z through time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rankdecay.lab.experiment import Html, Section
from rankdecay.lab.experiments.margin.data import ARRAYS, DataSets
from rankdecay.lab.report.chart import evenly_spaced_indices
from rankdecay.lab.report.page import asset, choice
from rankdecay.lab.report.words import is_number
from rankdecay.lab.settings import Record
from rankdecay.lab.stored import StoredRun

NORMS = ("nuclear", "frobenius")
PICTURED = 12  # data sets, and examples of each
MOMENTS = 120  # of a picture


def pictures(stored: StoredRun, arrays: Mapping[str, np.ndarray], labels: Mapping[str, str]) -> Section:
    """The section of a run whose tokens are in two dimensions; one without parts otherwise.

    Args:
        stored: the run, complete.
        arrays: of its snapshot.
        labels: of the arms that took part, by name.
    """
    assert stored.summary is not None
    drawn = picture_data(arrays, stored.summary["arms"], stored.rows)
    parts = []
    if drawn is not None:
        if (examples := stored.summary["shape"]["examples"]) > PICTURED:
            stored.notices.append(f"Pictures show the first {PICTURED} of {examples} examples.")
        arms = {name: labels[name] for name in drawn["arms"]}
        sets = {which: which for which in drawn["sets"]}
        controls = choice("pictured", "Arm", arms, "separate") + choice("planar", "Data set", sets)
        markup = asset("margin.html", __package__, {"controls": controls})
        parts = [Html(markup, {"pictures": drawn}, ("margin.js",), ("margin.css",))]
    return Section(
        "In two dimensions",
        "One picture per example. Circles are tokens, filled the one with the best score, ringed the one selected at "
        "the end; the thin grey arrow is the query z. The coloured arrow is the direction of W z, which grows with "
        "time and leaves its path behind; dashed and dotted are the directions of the two SVMs. A token is selected "
        "when the line through it, across the arrow, has every other token behind it.",
        parts,
        "picture",
    )


def picture_data(arrays: Mapping[str, np.ndarray], rows: Sequence[Record], metrics: Sequence[Record]) -> Record | None:
    """Data of `margin.js`; None unless tokens are in two dimensions.

    Args:
        arrays: of the snapshot.
        rows: of the summary.
        metrics: lines of ``metrics.jsonl``.
    """
    if not all(name in arrays for name in ARRAYS) or arrays["tokens"].shape[-1] != 2:
        return None
    data = DataSets(*(arrays[name] for name in ARRAYS))
    courses = {str(row["name"]): _courses(arrays, row, metrics, data) for row in rows}
    shown = sorted({int(which) for arm in courses.values() for which in arm})[:PICTURED]
    if not shown:
        return None

    def examples(which: int) -> list[Record]:
        parts = zip(data.tokens[which], data.queries[which], data.optimal[which], strict=True)
        return [{"tokens": x, "query": z, "optimal": int(best)} for x, z, best in parts][:PICTURED]

    return {
        "sets": {str(which): examples(which) for which in shown},
        "arms": {
            name: {which: course for which, course in arm.items() if int(which) in shown}
            for name, arm in courses.items()
            if arm
        },
    }


def _courses(
    arrays: Mapping[str, np.ndarray], row: Record, metrics: Sequence[Record], data: DataSets
) -> dict[str, Record]:
    """Of every data set of an arm, the angles of W z through time and with both solutions, and the tokens selected."""
    name = str(row["name"])
    weights, selected, steps = (arrays.get(f"{name}_{what}") for what in ("weights", "selected", "steps"))
    if weights is None or selected is None or steps is None or weights.shape[1] != len(row["datasets"]):
        return {}
    margins = {line["step"]: line["margin"] for line in metrics if line["arm"] == name}
    found = {}
    for number, which in enumerate(row["datasets"][:PICTURED]):
        moving = np.flatnonzero((weights[:, number] != weights[-1, number]).any((1, 2)))
        # a data set that has ended waits for the others
        kept = evenly_spaced_indices(int(moving.max(initial=-1)) + 2, MOMENTS)
        z = data.queries[which][:PICTURED]
        at = [margins.get(int(step), [])[number : number + 1] for step in steps[kept]]
        solutions = {norm: arrays.get(f"{name}_{norm}") for norm in NORMS}
        found[str(which)] = {
            "step": steps[kept],
            "margin": [value[0] if value and is_number(value[0]) else None for value in at],
            "angles": _angles(weights[kept, number], z),
            "selected": selected[number][:PICTURED],
            **{norm: None if of is None else _angles(of[number][None], z)[0] for norm, of in solutions.items()},
        }
    return found


def _angles(W: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The angle of W z, shape (moments, examples); NaN where it is zero."""
    direction = np.einsum("tij,nj->tni", W / np.abs(W).max((1, 2), keepdims=True).clip(1e-300), z)
    angle = np.arctan2(direction[..., 1], direction[..., 0])
    return np.where(np.linalg.norm(direction, axis=-1) > 0, angle, np.nan)
