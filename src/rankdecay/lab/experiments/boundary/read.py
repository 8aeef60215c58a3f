"""Read the run directories of a sweep (`docs/run_directory.md`), one or several, into one table of finished runs.

Several directories are merged when they differ in nothing but the axes of their grid, as when the seeds of a sweep
were spread over machines or an arm was added later. A run that more than one of them has counts once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankdecay.lab.ensemble.outcome import Key, key_of
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.boundary.experiment import GRID
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.store import DROPPED, read_json, read_metrics

Row = dict[str, Any]  # one finished run: a line of metrics.jsonl

OUTCOMES = ("generalised", "budget", "diverged")


@dataclass(frozen=True)
class Sweep:
    """All finished runs of one directory or several, and what they amount to."""

    directories: list[Path]
    configs: list[dict[str, Any]]  # as they stand in the directories
    config: dict[str, Any]  # with the axes and arms of all of them
    rows: list[Row]
    summary: dict[str, Any] | None  # None before the first run is finished
    complete: bool
    notices: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """Arm names: the configuration's order, then any that only the runs or the summary know."""
        named = [str(arm["name"]) for arm in self.config.get("arms", [])]
        summarised = [str(arm["name"]) for arm in (self.summary or {}).get("arms", [])]
        return list(dict.fromkeys([*named, *summarised, *(row["arm"] for row in self.rows)]))


def read_sweep(directories: Sequence[str | Path]) -> Sweep:
    """Reads the directories of one sweep.

    Args:
        directories: one or more; each holds at least `config.json`.

    Returns:
        The sweep. Its summary is that of the directory, if there is one only and it is complete; else it is computed
        from the rows.

    Raises:
        SettingError: when a directory is not a sweep, is damaged, or is not of the same sweep as the first.
    """
    paths = list(dict.fromkeys(Path(directory) for directory in directories))
    notices: list[str] = []
    configs = [_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:], strict=True):
        _refuse_another(paths[0], configs[0], path, config)
    rows = _unique([row for path in paths for row in _rows(path, notices)], notices)
    summaries = [read_json(path / "summary.json") for path in paths]
    config = _merged(configs) if len(paths) > 1 else configs[0]
    return Sweep(
        paths, configs, config, rows, _summary(config, rows, summaries), all(summaries) and bool(rows), notices
    )


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    if config is None:
        raise SettingError(f"{path} has no config.json: give the --out directory of a rankdecay experiment")
    if config.get("command") != "boundary":
        raise SettingError(
            f"{path} is a run of {config.get('command')!r}, not of 'boundary', whose pages alone can be merged or "
            "written elsewhere: report it by itself, without --out"
        )
    return config


def _rows(path: Path, notices: list[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(read_metrics(path, notices.append), start=1):
        try:
            known = {"arm": str(line["arm"]), "seed": int(line["seed"]), "outcome": str(line["outcome"])}
            numbers = {name: float(line[name]) for name in ("strength", "rest_decay", "train_fraction")}
            needed = [line["train_examples"], line["budget"]]
            needed += [line["steps_to_generalise"]] if known["outcome"] == "generalised" else []
            if known["outcome"] not in OUTCOMES or not all(map(is_number, [*numbers.values(), *needed])):
                raise ValueError(f"outcome {known['outcome']!r} with the numbers {[*numbers.values(), *needed]}")
        except (ValueError, TypeError, KeyError) as error:
            raise SettingError(f"{path / 'metrics.jsonl'}, line {number}: not a finished run ({error!r})") from error
        rows.append({**line, **known, **numbers})
    return rows


def _unique(rows: Iterable[Row], notices: list[str]) -> list[Row]:
    """Every run once, the first of each; says how many were there again, and whether they came out otherwise."""
    found: dict[Key, Row] = {}
    again, otherwise = 0, 0
    for row in rows:
        first = found.setdefault(key_of(row), row)
        again += first is not row
        otherwise += first["outcome"] != row["outcome"]
    if again:
        notices.append(
            f"{again:,} run{'s were' if again > 1 else ' was'} there more than once (same arm, strength, decay of the "
            f"rest, data and seed) and count{'' if again > 1 else 's'} once"
            + (f"; {otherwise:,} came out differently the second time, where the first counts." if otherwise else ".")
        )
    return list(found.values())


def fixed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that all runs of a sweep share."""
    settings = config.get("settings", {})
    fixed = config.get("fixed", settings)
    return {name: value for name, value in fixed.items() if name not in (*GRID, *DROPPED)}


def _refuse_another(first_path: Path, first: dict[str, Any], path: Path, config: dict[str, Any]) -> None:
    """Raises unless two configurations differ in the axes of their grid alone, naming the first difference."""
    remedy = "only sweeps that differ in nothing but their grid are merged: report them one by one"
    if first.get("schema") != config.get("schema"):
        schemas = f"{first.get('schema')!r} in {first_path}, {config.get('schema')!r} in {path}"
        raise SettingError(f"schema is {schemas}: {remedy}")
    ours, theirs = fixed_settings(first), fixed_settings(config)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise SettingError(
                f"{name} is {ours.get(name)!r} in {first_path}, {theirs.get(name)!r} in {path}: {remedy}"
            )
    known = {arm["name"]: arm for arm in first.get("arms", [])}
    for arm in config.get("arms", []):
        same = known.get(arm["name"], arm)
        for name in {**same, **arm}:
            if name not in ("description", "control") and same.get(name) != arm.get(name):
                values = f"{same.get(name)!r} in {first_path}, {arm.get(name)!r} in {path}"
                raise SettingError(f"{name} of the arm {arm['name']} is {values}: {remedy}")


def _merged(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first configuration, with the axes and the arms of all."""
    settings = dict(configs[0].get("settings", {}))
    fixed = fixed_settings(configs[0])
    for name in [name for name in settings if name not in fixed]:
        values = [config["settings"][name] for config in configs if name in config.get("settings", {})]
        if all(isinstance(value, list) for value in values):
            every = list(dict.fromkeys(item for value in values for item in value))
            together = sorted(every) if all(map(is_number, every)) else every
        else:
            distinct = [value for i, value in enumerate(values) if value not in values[:i]]
            together = distinct[0] if len(distinct) == 1 else distinct
        if values:
            settings[name] = together
    arms = {arm["name"]: arm for config in reversed(configs) for arm in config.get("arms", [])}
    names = dict.fromkeys(arm["name"] for config in configs for arm in config.get("arms", []))
    return {**configs[0], "settings": settings, "arms": [arms[name] for name in names]}


def _summary(config: dict[str, Any], rows: list[Row], summaries: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    if len(summaries) == 1 and summaries[0] is not None:
        return summaries[0]
    if not rows:
        return None
    from rankdecay.lab.experiments.boundary.statistics import (  # scipy, which a finished sweep does not need
        reference,
        summarise,
    )

    present = dict.fromkeys(row["arm"] for row in rows)
    arms = list(dict.fromkeys([*(str(arm["name"]) for arm in config.get("arms", [])), *present]))
    settings = config.get("settings", {})
    seconds: list[Any] = [(summary or {}).get("wall_seconds") for summary in summaries]
    return {
        "command": "boundary",
        "settings": settings,
        "threshold": settings.get("threshold"),
        "wall_seconds": sum(seconds) if all(map(is_number, seconds)) else None,
        **summarise(rows, arms, reference([arm for arm in arms if arm in present])),
    }
