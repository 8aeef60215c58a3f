"""Read a run directory of `recall`, `language` or `vision` (`docs/run_directory.md`), complete or not.

Only the files are needed. While an experiment is going on, what its runs came to is computed from those that have
ended; the one under way shows in the curves alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.summary import KEY, key_of, summarise
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.store import read_json, read_metrics

Row = dict[str, Any]
CellKey = tuple[Any, ...]  # arm, strength, decay of the MLPs, QK-norm

COMMANDS = ("recall", "language", "vision")
PARTS = {"query_key": "W_KᵀW_Q", "value_output": "W_O\u00a0W_V", "query": "W_Q", "key": "W_K"}
USUAL = 0.1  # a decay of the MLPs as is usual: where there are several, the one to speak of
# Of an evaluation; the one name beside them is what the experiment counts.
_KNOWN = {*KEY, "step", "seconds", "train_loss", "loss", "loss_error", "accuracy", "layers", "wall"}
_KNOWN |= {"ended", "diverged"}


@dataclass(frozen=True)
class Grid:
    """All evaluations of an experiment, and what its runs came to."""

    directory: Path
    config: dict[str, Any]
    records: list[Row]  # evaluations, and the lines of runs that diverged
    cells: list[Row]  # as `attention_summary.summarise` gives them
    summary: dict[str, Any] | None  # None while the experiment is not complete
    unit: str  # what is counted: tokens, sequences, images
    notices: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """Arm names: the configuration's order, then any that only the cells or the measurements know."""
        named = [str(arm["name"]) for arm in self.config.get("arms", [])]
        return list(dict.fromkeys([*named, *(cell["name"] for cell in self.cells), *(r["arm"] for r in self.records)]))


def read_grid(directory: str | Path) -> Grid:
    """Reads a run directory.

    Args:
        directory: holds at least `config.json`.

    Raises:
        SettingError: when the directory is no such run, or anything but the last line of `metrics.jsonl` is damaged.
    """
    directory = Path(directory)
    notices: list[str] = []
    config = read_json(directory / "config.json")
    if config is None:
        raise SettingError(f"{directory} has no config.json: give the --out directory of a rankdecay experiment")
    if not all(isinstance(arm, dict) and "name" in arm for arm in config.get("arms", [])):
        raise SettingError(f"{directory / 'config.json'}: an arm has no name; restore the file")
    records = _records(directory, notices)
    summary = read_json(directory / "summary.json")
    unit = (summary or {}).get("unit") or _unit(records)
    if summary is not None:
        cells = [_checked(directory, cell) for cell in summary.get("arms", [])]
    else:
        ended = {key_of(row) for row in records if row.get("ended")}
        usable = [row for row in records if row.get("diverged") or row["loss"] is not None]
        cells = summarise([row for row in usable if key_of(row) in ended], unit)
        if records:
            count = f"{len(ended):,} run{'s have' if len(ended) != 1 else ' has'} ended"
            notices.append(f"The experiment is not complete: {count} so far, and the figures here are of those alone.")
    return Grid(directory, config, records, cells, summary, str(unit), notices)


def cell_key(cell: Mapping[str, Any]) -> CellKey:
    """What tells a cell from every other."""
    return (cell["name"], *(cell[name] for name in KEY[1:-1]))


def main_mlp_decay(cells: Iterable[Mapping[str, Any]]) -> float | None:
    """The decay of the MLPs to speak of where there are several: the usual one, else that of the least loss."""
    cells = list(cells)
    values = {cell["mlp_decay"] for cell in cells}
    if len(values) <= 1 or USUAL in values:
        return USUAL if USUAL in values else next(iter(values), None)
    known = [cell for cell in cells if is_number(cell.get("loss"))] or cells
    return min(known, key=lambda cell: cell["loss"] or 0)["mlp_decay"]


def series(
    cells: Iterable[Mapping[str, Any]], *, qk_norm: bool, mlp_decay: float | None
) -> dict[str, list[Mapping[str, Any]]]:
    """The cells with a result at one choice of the other axes, by arm, each from the weakest decay to the strongest."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["strength"]):
        if cell["qk_norm"] == qk_norm and cell["mlp_decay"] == mlp_decay and is_number(cell.get("loss")):
            found.setdefault(cell["name"], []).append(cell)
    order = list(dict.fromkeys(cell["name"] for cell in cells))
    return {name: found[name] for name in order if name in found}


# --- reading ---


def _records(directory: Path, notices: list[str]) -> list[Row]:
    found: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(read_metrics(directory, notices.append), start=1):
        try:
            row = _record(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            path = directory / "metrics.jsonl"
            raise SettingError(f"{path}, line {number}: not an evaluation of a run ({error!r})") from error
        found[(*key_of(row), row["step"], bool(row.get("diverged")))] = row  # measured again after a resume: the later
    return list(found.values())


def _record(line: Row) -> Row:
    """A line of metrics.jsonl, if it has what a report needs; raises otherwise."""
    numbers = [line["strength"], line["step"], line["seed"]]
    numbers += [] if line["mlp_decay"] is None else [line["mlp_decay"]]
    if not all(map(is_number, numbers)) or not isinstance(line["qk_norm"], bool):
        raise ValueError(f"a run with the numbers {numbers} and QK-norm {line['qk_norm']!r}")
    row = {**line, "arm": str(line["arm"])}
    if line.get("diverged"):
        return row
    for layer in line["layers"]:
        for measures in layer.values():
            measures.items()
    if not is_number(line["seconds"]) or not is_number(line[_unit([line])]):
        raise ValueError("an evaluation without its time or size")
    if not is_number(line["loss"]):  # it trains on, but there is nothing that a mean could use
        row |= {"loss": None, "loss_error": None} | ({"diverged": True} if line.get("ended") else {})
    accuracy = line["accuracy"]
    return row | {"accuracy": accuracy if is_number(accuracy) else None}


def _unit(records: Sequence[Row]) -> str:
    first = next((row for row in records if not row.get("diverged")), {})
    return next((name for name in first if name not in _KNOWN), "examples")


def _checked(directory: Path, cell: Any) -> Row:
    """A cell of summary.json, if it has the names that tell which it is."""
    try:
        key = cell_key(cell)
        if not is_number(key[1]) or not (key[2] is None or is_number(key[2])):
            raise ValueError(f"no cell has the key {key}")
        return {**cell, "name": str(cell["name"]), "qk_norm": bool(cell["qk_norm"])}
    except (ValueError, TypeError, KeyError) as error:
        raise SettingError(f"{directory / 'summary.json'} has a damaged arm ({error!r}): restore the file") from error
