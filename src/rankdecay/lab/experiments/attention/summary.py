"""Rows and cells of the grid: a row is an evaluation of a run, a cell the mean of the runs of all seeds.

Importing this module imports neither torch nor numpy: reports read rows without what trained them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankdecay.lab.report.words import counted, is_number, known, mean
from rankdecay.lab.session.run_key import KEY, key_of
from rankdecay.lab.settings import Record

if TYPE_CHECKING:
    from rankdecay.lab.stored import StoredRun

Cell = Mapping[str, Any]
USUAL = 0.1  # the usual decay of every matrix; of several decays of the MLPs, the one to speak of


# --- rows ---


def check_row(line: Record, unit: str) -> Record:
    """A line of ``metrics.jsonl`` with what a report needs; raises for one without.

    A run whose last loss is not finite counts as diverged: it trained on, but no mean can use it.
    """
    numbers = [line["strength"], line["step"], line["seed"]]
    numbers += [] if line["mlp_decay"] is None else [line["mlp_decay"]]
    if not all(map(is_number, numbers)) or not isinstance(line["qk_norm"], bool):
        raise ValueError(f"a run with the numbers {numbers} and QK-norm {line['qk_norm']!r}")
    row = {**line, "arm": str(line["arm"])}
    if line.get("diverged"):
        return row
    for layer in line["layers"]:
        for measures in layer.values():
            if not all(value is None or is_number(value) for value in measures.values()):
                raise ValueError("a measure of a layer that is not a number")
    if not is_number(line["seconds"]) or not is_number(line[unit]):
        raise ValueError("an evaluation without its time or size")
    if not is_number(line["loss"]):
        row |= {"loss": None, "loss_error": None} | ({"diverged": True} if line.get("ended") else {})
    return row | {"accuracy": line["accuracy"] if is_number(line["accuracy"]) else None}


def newest(rows: Iterable[Record]) -> list[Record]:
    """Rows without those that were measured again when a run was resumed."""
    return list({(*key_of(row), row["step"], bool(row.get("diverged"))): row for row in rows}.values())


def so_far(stored: StoredRun, unit: str) -> Record | None:
    """The summary of an experiment that is not complete, from the runs that have ended; None before the first."""
    rows = newest(stored.rows)
    ended = {key_of(row) for row in rows if row.get("ended")}
    if not ended:
        return None
    stored.notices.append(f"Ended so far: {counted(len(ended), 'run')}.")
    usable = [row for row in rows if key_of(row) in ended and (row.get("diverged") or row["loss"] is not None)]
    known_so_far = {"command": stored.config.get("command"), "settings": stored.settings, "unit": unit}
    return known_so_far | {"arms": summarise(usable, unit)}


# --- cells ---


def summarise(records: Sequence[Record], unit: str) -> list[Record]:
    """One cell per arm, strength, decay of the MLPs and QK-norm: means over seeds at the end of training.

    Args:
        records: the rows of an experiment.
        unit: what the problem counts.

    Returns:
        Each with the names of `KEY` (the arm as ``name``, seeds counted), ``diverged``, ``averaged_seeds`` (of the runs
        that did not diverge, which every mean is over), ``loss`` and ``loss_error`` (the standard error over seeds; of
        one seed that of its evaluation), ``sample`` (what that error is over: the losses of the seeds, or of the pieces
        of the validation set; see `difference`), ``accuracy``, ``per_second`` (in
        training steps alone), ``loss_at_equal_time`` (where every run had trained as long as the quickest of all),
        ``layers`` and ``untrained``: part, then measure, at the end and at step 0; and ``mean``, ``untrained_mean``,
        the same over the layers.
    """
    cells = by_cell(records)
    ends = [rows[-1] for runs in cells.values() for rows in _done(runs)]
    quickest = min((row["seconds"] for row in ends), default=0.0)
    return [_cell(key, runs, unit, quickest) for key, runs in cells.items()]


def by_cell(records: Iterable[Record]) -> dict[tuple[Any, ...], list[list[Record]]]:
    """The rows of each run, from the lowest seed up, under the key of the run without its seed."""
    cells: dict[tuple[Any, ...], dict[int, list[Record]]] = {}
    for record in records:
        *cell, seed = key_of(record)
        cells.setdefault(tuple(cell), {}).setdefault(seed, []).append(record)
    return {key: [runs[seed] for seed in sorted(runs)] for key, runs in cells.items()}


def _done(runs: Sequence[list[Record]]) -> list[list[Record]]:
    return [rows for rows in runs if not rows[-1].get("diverged")]


def _cell(key: tuple[Any, ...], runs: Sequence[list[Record]], unit: str, quickest: float) -> Record:
    done = _done(runs)
    last = [rows[-1] for rows in done]
    losses = [row["loss"] for row in last]
    error, sample = (last[0]["loss_error"], last[0].get("pieces", [])) if last else (None, [])
    if len(losses) > 1:
        error, sample = statistics.stdev(losses) / math.sqrt(len(losses)), losses
    rates = [row[unit] / max(row["seconds"], 1e-9) for row in last]
    layers, untrained = _mean_layers(last), _mean_layers([rows[0] for rows in done])
    return {
        "name": key[0],
        **dict(zip(KEY[1:-1], key[1:], strict=True)),
        "seeds": len(runs),
        "diverged": len(runs) - len(done),
        "averaged_seeds": [row["seed"] for row in last],
        "loss": statistics.fmean(losses) if done else None,
        "loss_error": error,
        "accuracy": mean(row["accuracy"] for row in last),
        "per_second": statistics.median(rates) if done else None,
        "loss_at_equal_time": statistics.fmean(_loss_at(rows, quickest) for rows in done) if done else None,
        "sample": sample,
        "layers": layers,
        "untrained": untrained,
        "mean": _mean_parts(layers),
        "untrained_mean": _mean_parts(untrained),
    }


def difference(cell: Cell, other: Cell) -> tuple[float, float | None]:
    """The loss of a cell minus another's, and the standard error of that; None where it is not known.

    Cells of the same seeds have the same batches and validation set, so their losses are compared seed by seed, or
    piece by piece of the validation set: what is common to both, such as how hard a piece is, cancels. Where different
    seeds diverged, or one cell has more of them, the errors are added as those of independent means.
    """
    distance = cell["loss"] - other["loss"]
    sample, reference = cell.get("sample") or [], other.get("sample") or []
    seeds, other_seeds = (each.get("averaged_seeds", each["seeds"]) for each in (cell, other))
    if len(sample) == len(reference) > 1 and seeds == other_seeds:
        gaps = [a - b for a, b in zip(sample, reference, strict=True)]
        return distance, statistics.stdev(gaps) / math.sqrt(len(gaps))
    errors = known((cell, other), "loss_error")
    return distance, math.hypot(*errors) if len(errors) == 2 else None


def _loss_at(rows: Sequence[Record], seconds: float) -> float:
    """The loss of a run after some seconds of training, on a line between two evaluations."""
    for before, after in itertools.pairwise(rows):
        if after["seconds"] >= seconds:
            share = (seconds - before["seconds"]) / max(after["seconds"] - before["seconds"], 1e-9)
            return before["loss"] + share * (after["loss"] - before["loss"])
    return rows[-1]["loss"]


def _mean_layers(records: Sequence[Record]) -> list[Record]:
    """Part, then measure, for each layer: the mean over records."""
    return [_mean_parts(layers) for layers in zip(*(record["layers"] for record in records), strict=True)]


def _mean_parts(layers: Sequence[Record]) -> Record:
    parts = layers[0] if layers else {}
    return {part: {name: mean(layer[part][name] for layer in layers) for name in parts[part]} for part in parts}


def of(cell: Cell, part: str, measure: str = "pseudo_rank", when: str = "mean") -> float | None:
    """A measure of a part over layers, at the end or ``"untrained_mean"``.

    Under QK-norm, where W_KᵀW_Q is no product, that of W_Q and W_K themselves: the mean of both, as of ``"matrices"``.
    """
    means = cell.get(when) or {}
    stands_for = {"query_key": ("query", "key"), "matrices": ("query", "key")}
    names = (part,) if part in means else stands_for.get(part, ())
    return mean(means[name].get(measure) for name in names if name in means)


# --- cells of one arm, and the axes beside the strength ---


def main_mlp_decay(cells: Sequence[Cell]) -> float | None:
    """The decay of the MLPs to speak of where there are several: the usual one, else that of the least loss."""
    values = {cell["mlp_decay"] for cell in cells}
    if len(values) <= 1 or USUAL in values:
        return USUAL if USUAL in values else next(iter(values), None)
    known = [cell for cell in cells if is_number(cell.get("loss"))] or cells
    return min(known, key=lambda cell: cell["loss"] or 0)["mlp_decay"]


def series(cells: Sequence[Cell], *, qk_norm: bool, mlp_decay: float | None) -> dict[str, list[Cell]]:
    """The cells with a loss at one choice of the other axes, by arm, each from the weakest decay to the strongest."""
    found: dict[str, list[Cell]] = {cell["name"]: [] for cell in cells}
    for cell in sorted(cells, key=lambda cell: cell["strength"]):
        if cell["qk_norm"] == qk_norm and cell["mlp_decay"] == mlp_decay and is_number(cell.get("loss")):
            found[cell["name"]].append(cell)
    return {name: chosen for name, chosen in found.items() if chosen}


def by_norm(cells: Sequence[Cell]) -> dict[bool, dict[str, list[Cell]]]:
    """The cells at the main decay of the MLPs, without and with QK-norm, by arm."""
    main = main_mlp_decay(cells)
    found = {norm: series(cells, qk_norm=norm, mlp_decay=main) for norm in (False, True)}
    return {norm: arms for norm, arms in found.items() if arms}


def without_decay(arms: Mapping[str, Sequence[Cell]], name: str) -> Cell | None:
    """The reference of an arm: its cell at strength 0, else that of an arm that decays the same, or of any."""
    candidates = (cell for other in (name, "l2_query_key", *arms) for cell in arms.get(other, ()))
    return next((cell for cell in candidates if cell["strength"] == 0), None)
