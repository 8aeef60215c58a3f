"""Read a run directory (`docs/run_directory.md`) into plain structures.

Only the files are needed: a run that is still going, or was interrupted, has no `summary.json` and perhaps no
snapshots, and reads all the same. What had to be left out is said in `Run.notices`.
"""

import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.store import read_json, read_metrics

Member = tuple[str, int]  # an arm and a seed: one training run


@dataclass(frozen=True)
class Snapshot:
    """Spectra and attention of the members still training at one step, as in `docs/run_directory.md`."""

    step: int
    members: list[Member]
    arrays: dict[str, np.ndarray]  # singular_values, product, attention: the first axis is the member
    groups: list[str]
    positions: list[str]


@dataclass(frozen=True)
class Run:
    """Everything a report needs from one run directory."""

    directory: Path
    config: dict[str, Any]
    metrics: dict[Member, list[dict[str, Any]]]  # by member, ordered by step
    snapshots: list[Snapshot]
    summary: dict[str, Any] | None
    notices: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """Arm names: the configuration's order, then any that only the measurements know."""
        named = [str(arm["name"]) for arm in self.config.get("arms", [])]
        summarised = [str(arm["name"]) for arm in (self.summary or {}).get("arms", [])]
        return list(dict.fromkeys([*named, *summarised, *(arm for arm, _ in self.metrics)]))

    @property
    def last_step(self) -> int | None:
        """The last step anything was measured at, or None before the first evaluation."""
        return max((int(line["step"]) for lines in self.metrics.values() for line in lines), default=None)


def read_run(directory: str | Path) -> Run:
    """Read one run directory.

    Args:
        directory: holds at least `config.json`.

    Returns:
        The run; `summary` is None while it is not complete.

    Raises:
        SettingError: when the directory is not a run, or anything but the last line of `metrics.jsonl` or the
            newest snapshot is damaged.
    """
    directory = Path(directory)
    notices: list[str] = []
    config = read_json(directory / "config.json")
    if config is None:
        raise SettingError(f"{directory} has no config.json: give the --out directory of a rankdecay experiment")
    summary = read_json(directory / "summary.json")
    metrics = _metrics(directory, notices)
    return Run(directory, config, metrics, _snapshots(directory / "snapshots", notices), summary, notices)


def across_seeds(run: Run, arm: str, metric: str) -> list[tuple[int, float, float, float]]:
    """A metric over the seeds still training, as rows (step, median, lowest, highest)."""
    values: dict[int, list[float]] = {}
    for (name, _), lines in run.metrics.items():
        for line in lines if name == arm else ():
            if is_number(line.get(metric)):
                values.setdefault(int(line["step"]), []).append(float(line[metric]))
    return [(step, median(at), min(at), max(at)) for step, at in sorted(values.items())]


def final_spectrum(run: Run, arm: str) -> np.ndarray | None:
    """Median of σᵢ/σ₁ over seeds, layers, queries and keys at each member's last snapshot, shape (width,)."""
    last: dict[Member, np.ndarray] = {}
    for snapshot in run.snapshots:
        for row, member in enumerate(snapshot.members):
            if member[0] == arm and "singular_values" in snapshot.arrays:
                last[member] = snapshot.arrays["singular_values"][row]  # (layers, 2, width)
    if not last:
        return None
    spectra = np.concatenate([values.reshape(-1, values.shape[-1]) for values in last.values()])
    largest = spectra[:, :1]
    normal = np.divide(spectra, largest, out=np.zeros_like(spectra), where=largest > 0)
    return np.median(normal, axis=0)


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _metrics(directory: Path, notices: list[str]) -> dict[Member, list[dict[str, Any]]]:
    found: dict[Member, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(read_metrics(directory, notices.append), start=1):
        try:
            member, step = (str(line["arm"]), int(line["seed"])), int(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            path = directory / "metrics.jsonl"
            raise SettingError(f"{path}, line {number}: not an evaluation of one member ({error!r})") from error
        found.setdefault(member, {})[step] = line  # a step measured again after a resume: the later one counts
    return {member: [lines[step] for step in sorted(lines)] for member, lines in found.items()}


def _snapshots(directory: Path, notices: list[str]) -> list[Snapshot]:
    paths = sorted(directory.glob("*.npz"), key=lambda path: int(path.stem)) if directory.is_dir() else []
    snapshots = []
    for path in paths:
        try:
            snapshots.append(_snapshot(path))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if path != paths[-1]:
                raise SettingError(f"{path} cannot be read ({error!r}); remove it to report without it") from error
            notices.append(f"The newest snapshot, {path.name}, cannot be read and is left out.")
    return snapshots


def _snapshot(path: Path) -> Snapshot:
    with np.load(path, allow_pickle=False) as file:
        members = list(zip(map(str, file["arms"]), map(int, file["seeds"]), strict=True))
        arrays = {name: file[name] for name in ("singular_values", "product", "attention") if name in file}
        names = {name: [str(item) for item in file[name]] if name in file else [] for name in _NAMES}
    return Snapshot(int(path.stem), members, arrays, names["groups"], names["positions"])


_NAMES = ("groups", "positions")
