"""What the page of `rankdecay margin` draws: curves against the margin, solutions, and the pictures in two dimensions.

Two data sets have different margins at one step, so means over them are taken at equal margins.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.experiments.margin.data import DataSets

Row = dict[str, Any]

MEASURES = ("cosine_nuclear", "cosine_frobenius", "nuclear_excess", "frobenius_excess")
NORMS = ("nuclear", "frobenius")
SMALLEST = 0.1  # margin from which curves are drawn: below it the softmax selects little and a norm over it says less
GRID = 80  # margins of a mean
NUMBERS = (
    400_000  # of single data sets in one page, about 2.5 MB beside plotly's 5; evaluations that do not fit are left out
)
FEWEST = 8  # evaluations of a curve, however many there are
CHOICES = 50  # data sets that can be looked at one by one
PICTURED = 12  # data sets, and examples of each, of the pictures in two dimensions
MOMENTS = 120  # of a picture


@dataclass(frozen=True)
class Snapshot:
    """The arrays of a run: the data, and per arm the weights through time and both solutions."""

    arrays: Mapping[str, np.ndarray]

    def of(self, arm: str, what: str) -> np.ndarray | None:
        """An array of one arm, if it is there."""
        return self.arrays.get(f"{arm}_{what}")


def read_snapshot(directory: Path, notice: Callable[[str], None]) -> Snapshot:
    """The snapshot of a run directory; an empty one, and a notice, where there is none that can be read."""
    paths = sorted((directory / "snapshots").glob("*.npz"))
    if not paths:
        return Snapshot({})
    try:
        # opened here, because numpy leaves open what it finds damaged
        with paths[-1].open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return Snapshot({name: file[name] for name in file.files})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        notice(f"The snapshot {paths[-1].name} cannot be read: what is drawn from it is left out.")
        return Snapshot({})


# --- curves against the margin ---


def climb(margin: np.ndarray) -> np.ndarray:
    """The evaluations of one data set that a curve has: from the last one without a margin on, from `SMALLEST` on.

    Args:
        margin: shape (evaluations,).
    """
    without = np.flatnonzero(~(margin > 0))
    found = margin >= SMALLEST
    found[: without[-1] + 1 if without.size else 0] = False
    return np.flatnonzero(found)


def at_equal_margins(margin: np.ndarray, values: Sequence[np.ndarray]) -> Row:
    """Means and ranges over data sets at equal margins, from where half have come to where the first of them ended.

    Beyond that the mean would jump with every data set that leaves it.

    Args:
        margin: shape (evaluations, sets).
        values: of each measure, in the same shape.

    Returns:
        ``margin``, the number of data sets there as ``sets``, and per measure ``mean``, ``low`` and ``high``.
    """
    paths = [climb(column) for column in margin.T]
    logs = [np.maximum.accumulate(np.log10(margin[path, number])) for number, path in enumerate(paths)]
    ends = [(log[0], log[-1]) for log in logs if log.size]
    begun = float(np.median([low for low, _ in ends])) if ends else 0.0
    ended = min((high for _, high in ends), default=-1.0)
    if begun > ended:
        return {"margin": [], "sets": [], "values": [{"mean": [], "low": [], "high": []} for _ in values]}
    grid = np.linspace(begun, ended, GRID)
    # NaN where a data set has not begun
    every = np.full((len(values), len(paths), GRID), np.nan)
    for number, (path, log) in enumerate(zip(paths, logs, strict=True)):
        if log.size:
            for measure, value in enumerate(values):
                every[measure, number] = np.interp(grid, log, value[path, number], left=np.nan, right=np.nan)
    parts = [{"mean": np.nanmean(of, 0), "low": np.nanmin(of, 0), "high": np.nanmax(of, 0)} for of in every]
    return {"margin": 10**grid, "sets": np.isfinite(every[0]).sum(0), "values": parts}


def arm_curves(lines: Sequence[Row], row: Row, snapshot: Snapshot, most: int) -> Row:
    """What the charts draw of one arm.

    Args:
        lines: of ``metrics.jsonl``, in order.
        row: of the summary.
        snapshot: of the run.
        most: evaluations of a single data set.
    """
    if not lines:
        return {"mean": {"margin": []}, "each": {}, "end": {}, "solutions": {}}
    sets: list[int] = row["datasets"]
    margin = _array(lines, "margin")
    measured = {name: _array(lines, name) for name in MEASURES}
    sigma = _array(lines, "singular_values")  # (evaluations, sets, d)
    mean = at_equal_margins(margin, [*measured.values(), *np.moveaxis(sigma, -1, 0)])
    parts = mean.pop("values")
    each = {}
    for number, which in enumerate(sets[:CHOICES]):
        path = climb(margin[:, number])
        path = path[evenly(len(path), most)]
        each[str(which)] = {
            "margin": margin[path, number],
            **{name: of[path, number] for name, of in measured.items()},
            "singular_values": sigma[path, number].T,
        }
    return {
        "mean": mean | dict(zip(MEASURES, parts, strict=False)) | {"singular_values": parts[len(MEASURES) :]},
        "each": each,
        "end": {name: row.get(name) for name in (*MEASURES, "margin")},
        "solutions": {norm: _spectra(snapshot.of(row["name"], norm), sets) for norm in NORMS},
    }


def fitting(rows: Sequence[Row], dimension: int) -> int:
    """How many evaluations of every single data set fit in a page."""
    curves = sum(min(len(row["datasets"]), CHOICES) for row in rows) * (len(MEASURES) + 1 + dimension)
    return max(FEWEST, NUMBERS // max(1, curves))


def evenly(count: int, most: int) -> np.ndarray:
    """Indices of at most ``most`` of ``count`` items, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _array(lines: Sequence[Row], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], dtype=float)  # None, what cannot be said, becomes NaN


def _spectra(solutions: np.ndarray | None, sets: Sequence[int]) -> Row:
    """Singular values of the solutions: their mean over data sets, and of every data set that can be chosen."""
    if solutions is None or len(solutions) != len(sets):
        return {}
    known = [number for number, solution in enumerate(solutions) if np.isfinite(solution).all()]
    if not known:
        return {}
    sigma = np.linalg.svd(solutions[known], compute_uv=False)
    each = dict(zip([str(sets[number]) for number in known], sigma, strict=True))
    return {"mean": sigma.mean(0)} | {which: each[which] for which in list(each)[:CHOICES]}


# --- the pictures in two dimensions ---


def pictures(snapshot: Snapshot, rows: Sequence[Row], metrics: Sequence[Row]) -> Row | None:
    """Tokens, queries and the direction of W z through time; None unless tokens are in two dimensions."""
    names = ("tokens", "queries", "heads", "labels")
    if not all(name in snapshot.arrays for name in names) or snapshot.arrays["tokens"].shape[-1] != 2:
        return None
    data = DataSets(*(snapshot.arrays[name] for name in names))
    drawn = {str(row["name"]): _directions(snapshot, row, metrics, data) for row in rows}
    shown = sorted({int(which) for arm in drawn.values() for which in arm})[:PICTURED]
    if not shown:
        return None
    optimal = data.optimal
    return {
        "sets": {
            str(which): [
                {"tokens": x, "query": z, "optimal": int(best)}
                for x, z, best in list(zip(data.tokens[which], data.queries[which], optimal[which], strict=True))[
                    :PICTURED
                ]
            ]
            for which in shown
        },
        "arms": [{str(which): arm[str(which)] for which in shown if str(which) in arm} for arm in drawn.values()],
    }


def _directions(snapshot: Snapshot, row: Row, metrics: Sequence[Row], data: DataSets) -> dict[str, Row]:
    """Of every data set of an arm, the angles of W z through time and with both solutions, and the tokens selected."""
    name = str(row["name"])
    weights, selected = snapshot.of(name, "weights"), snapshot.of(name, "selected")
    margins = {line["step"]: line["margin"] for line in metrics if line["arm"] == name}
    steps = snapshot.of(name, "steps")
    if weights is None or selected is None or steps is None or weights.shape[1] != len(row["datasets"]):
        return {}
    found = {}
    for number, which in enumerate(row["datasets"][:PICTURED]):
        moving = np.flatnonzero((weights[:, number] != weights[-1, number]).any((1, 2)))
        kept = evenly(int(moving.max(initial=-1)) + 2, MOMENTS)  # a data set that has ended waits for the others
        z = data.queries[which][:PICTURED]
        at = [margins.get(int(step), [])[number : number + 1] for step in steps[kept]]
        found[str(which)] = {
            "step": steps[kept],
            "margin": [value[0] if value and is_number(value[0]) else None for value in at],
            "angles": _angles(weights[kept, number], z),
            "selected": selected[number][:PICTURED],
            **{
                norm: None if (of := snapshot.of(name, norm)) is None else _angles(of[number][None], z)[0]
                for norm in NORMS
            },
        }
    return found


def _angles(W: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The angle of W z, shape (moments, examples); NaN where it is zero."""
    direction = np.einsum("tij,nj->tni", W / np.abs(W).max((1, 2), keepdims=True).clip(1e-300), z)
    angle = np.arctan2(direction[..., 1], direction[..., 0])
    return np.where(np.linalg.norm(direction, axis=-1) > 0, angle, np.nan)
