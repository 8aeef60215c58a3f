"""What the runs of an attention-decay experiment came to: means over seeds, beside the untrained values.

Importing this module imports neither torch nor numpy: reports read rows without what trained them.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]
KEY = ("arm", "strength", "mlp_decay", "qk_norm", "seed")  # what tells a run from every other of its experiment


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The run that a row belongs to."""
    return tuple(row[name] for name in KEY)


def summarise(records: Sequence[Record], unit: str) -> list[Record]:
    """One object per arm, strength, decay of the MLPs and QK-norm: means over seeds of what the runs ended with.

    Args:
        records: all of an experiment.
        unit: what the problem counts.

    Returns:
        Each with the names of `KEY` (the arm as ``name``, seeds counted), ``diverged``, ``loss`` and ``loss_error``
        (the standard error over seeds; of one seed that of its evaluation), ``sample`` (what that error is over: the
        losses of the seeds, or of the pieces of the validation set; see `difference`), ``accuracy``, ``per_second`` (in
        training steps alone), ``loss_at_equal_time`` (where every run had trained as long as the quickest of all),
        ``layers`` and ``untrained``: part, then measure, at the end and at step 0; and ``mean``, ``untrained_mean``,
        the same over the layers.
    """
    by_run: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        by_run.setdefault(key_of(record), []).append(record)
    done = [rows for rows in by_run.values() if not rows[-1].get("diverged")]
    quickest = min((rows[-1]["seconds"] for rows in done), default=0.0)
    cells: dict[tuple[Any, ...], list[list[Record]]] = {}
    for key, rows in by_run.items():
        cells.setdefault(key[:-1], []).append(rows)
    return [_cell(key, runs, unit, quickest) for key, runs in cells.items()]


def _cell(key: tuple[Any, ...], runs: Sequence[Sequence[Record]], unit: str, quickest: float) -> Record:
    done = [rows for rows in runs if not rows[-1].get("diverged")]
    last = [rows[-1] for rows in done]
    cell: Record = {
        "name": key[0],
        **dict(zip(KEY[1:-1], key[1:], strict=True)),
        "seeds": len(runs),
        "diverged": len(runs) - len(done),
        **dict.fromkeys(("loss", "loss_error", "accuracy", "per_second", "loss_at_equal_time")),
        "sample": [],
        "layers": [],
        "untrained": [],
        "mean": {},
        "untrained_mean": {},
    }
    if not last:
        return cell
    losses = [row["loss"] for row in last]
    cell["loss"] = statistics.fmean(losses)
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else last[0]["loss_error"]
    cell["loss_error"] = spread
    cell["sample"] = losses if len(losses) > 1 else last[0].get("pieces", [])
    if last[0]["accuracy"] is not None:
        cell["accuracy"] = statistics.fmean(row["accuracy"] for row in last)
    cell["per_second"] = statistics.median(row[unit] / max(row["seconds"], 1e-9) for row in last)
    cell["loss_at_equal_time"] = statistics.fmean(_loss_at(rows, quickest) for rows in done)
    cell["layers"], cell["untrained"] = _mean_layers(last), _mean_layers([rows[0] for rows in done])
    cell["mean"], cell["untrained_mean"] = _over_layers(cell["layers"]), _over_layers(cell["untrained"])
    return cell


def difference(cell: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float | None]:
    """By how much the loss of a cell is above another's, and the standard error of that; None where it is not known.

    Cells have the same seeds, batches and validation set, so their losses are held against each other seed by seed, or
    piece by piece of the validation set: what is common to both, such as how hard a piece is, cancels.
    """
    distance = cell["loss"] - other["loss"]
    mine, others = cell.get("sample") or [], other.get("sample") or []
    if len(mine) == len(others) > 1 and cell["seeds"] == other["seeds"]:
        gaps = [a - b for a, b in zip(mine, others, strict=True)]
        return distance, statistics.stdev(gaps) / math.sqrt(len(gaps))
    errors = [cell.get("loss_error"), other.get("loss_error")]
    return distance, None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]


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
    return {
        part: {measure: _mean(layer[part][measure] for layer in layers) for measure in layers[0][part]}
        for part in layers[0]
    }


def _over_layers(layers: Sequence[Record]) -> Record:
    return _mean_parts(layers) if layers else {}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def of(mean: Mapping[str, Any], part: str, measure: str) -> float | None:
    """A measure of a part; under QK-norm, where there is no product, of W_Q and W_K on their own: their mean."""
    if part in mean:
        return mean[part].get(measure)
    if part == "query_key" and "query" in mean:
        return _mean(mean[matrix].get(measure) for matrix in ("query", "key"))
    return None
