"""Reads the run directories of a sweep, one or several, as one table of finished runs.

Several directories are merged when they differ in nothing but the axes of their grid, as when the seeds of a sweep
were spread over machines or an arm was added later. A run that more than one of them has counts once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankdecay.lab.ensemble.outcome import Key, key_of
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.boundary.settings import ALIASES, GRID
from rankdecay.lab.report.words import counted, is_number
from rankdecay.lab.settings import Record
from rankdecay.lab.store import DESCRIBING, REMOVED_SETTINGS
from rankdecay.lab.stored import StoredRun, read_config, read_run

OUTCOMES = ("generalised", "budget", "diverged")
REMEDY = "only sweeps that differ in nothing but their grid are merged: report them one by one"


def checked_row(line: Record) -> Record:
    """A finished run as a report needs it; raises a `ValueError`, `TypeError` or `KeyError` for any other line."""
    outcome = str(line["outcome"])
    numbers = {key: float(line[key]) for key in ("strength", "rest_decay", "train_fraction")}
    needed = [*numbers.values(), line["train_examples"], line["budget"]]
    needed += [line["steps_to_generalise"]] if outcome == "generalised" else []
    if outcome not in OUTCOMES or not all(map(is_number, needed)):
        raise ValueError(f"outcome {outcome!r} with the numbers {needed}")
    return {**line, **numbers, "arm": str(line["arm"]), "seed": int(line["seed"]), "outcome": outcome}


def so_far(stored: StoredRun) -> Record | None:
    """The summary of a sweep that is not complete, or of several; None before the first run is finished."""
    if not stored.rows:
        return None
    from rankdecay.lab.experiments.boundary.statistics import reference, summarise  # scipy: slow to import

    present = dict.fromkeys(row["arm"] for row in stored.rows)
    known = reference([arm for arm in stored.arms if arm in present])
    return {
        "command": "boundary",
        "settings": stored.settings,
        "threshold": stored.settings.get("threshold"),
        **summarise(stored.rows, stored.arms, known),
    }


def merged(paths: Sequence[Path]) -> StoredRun:
    """The directories of one sweep as one run.

    Its summary is that of the directory, if there is one only and it is complete; else it is made from the rows.

    Raises:
        SettingError: When a directory is not a sweep, is damaged, or is not of the same sweep as the first.
    """
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if (command := read_config(path).get("command")) != "boundary":
            raise SettingError(f"{path} is a run of {command!r}, not of 'boundary': report it by itself")
    parts = [read_run(path, checked_row, aliases=ALIASES) for path in paths]
    for part in parts:
        _refuse_another(parts[0], part)
    notices = [notice for part in parts for notice in part.notices]
    rows = _unique([row for part in parts for row in part.rows], notices)
    complete = all(part.complete for part in parts) and bool(rows)
    first = parts[0]
    whole = StoredRun(
        [part.directory for part in parts],
        [config for part in parts for config in part.configs],
        _together([part.config for part in parts]) if len(parts) > 1 else first.config,
        rows,
        first.summary if len(parts) == 1 else None,
        complete,
        notices,
    )
    if whole.summary is not None:
        return whole
    seconds: list[Any] = [(part.summary or {}).get("wall_seconds") for part in parts]
    summary = so_far(whole)
    if summary is not None:
        summary["wall_seconds"] = sum(seconds) if all(map(is_number, seconds)) else None
    return dataclasses.replace(whole, summary=summary)


def _unique(rows: Sequence[Record], notices: list[str]) -> list[Record]:
    """Every run once, the first of each; says how many were there again, and whether they came out otherwise."""
    found: dict[Key, Record] = {}
    again, otherwise = 0, 0
    for row in rows:
        first = found.setdefault(key_of(row), row)
        again += first is not row
        otherwise += first["outcome"] != row["outcome"]
    if again:
        notices.append(
            f"{counted(again, 'run')} stood there more than once (same arm, strength, decay of the rest, data and "
            f"seed): the first of each counts; {otherwise:,} came out differently the second time."
        )
    return list(found.values())


def fixed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all runs of a sweep share."""
    fixed = config.get("fixed", config.get("settings", {}))
    return {name: value for name, value in fixed.items() if name not in (*GRID, *REMOVED_SETTINGS)}


def _refuse_another(first: StoredRun, part: StoredRun) -> None:
    """Raise unless two configurations differ in the axes of their grid alone, naming the first difference."""

    def compare(what: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            values = f"{ours!r} in {first.directory}, {theirs!r} in {part.directory}"
            raise SettingError(f"{what} is {values}: {REMEDY}")

    compare("schema", first.config.get("schema"), part.config.get("schema"))
    ours, theirs = fixed_settings(first.config), fixed_settings(part.config)
    for name in {**ours, **theirs}:
        compare(name, ours.get(name), theirs.get(name))
    known = {arm["name"]: arm for arm in first.config.get("arms", [])}
    for arm in part.config.get("arms", []):
        same = known.get(arm["name"], arm)
        for name in same.keys() & arm.keys() - set(DESCRIBING):
            compare(f"{name} of the arm {arm['name']}", same[name], arm[name])


def _together(configs: Sequence[Record]) -> Record:
    """The first configuration, with the axes and the arms of all."""
    settings, fixed = dict(configs[0].get("settings", {})), fixed_settings(configs[0])
    for name in [name for name in settings if name not in fixed]:
        values = [config["settings"][name] for config in configs if name in config.get("settings", {})]
        if all(isinstance(value, list) for value in values):
            every = list(dict.fromkeys(item for value in values for item in value))
            settings[name] = sorted(every) if all(map(is_number, every)) else every
        else:
            distinct = [value for i, value in enumerate(values) if value not in values[:i]]
            settings[name] = distinct[0] if len(distinct) == 1 else distinct
    arms = {arm["name"]: arm for config in reversed(configs) for arm in config.get("arms", [])}
    names = dict.fromkeys(arm["name"] for config in configs for arm in config.get("arms", []))
    return {**configs[0], "settings": settings, "arms": [arms[name] for name in names]}
