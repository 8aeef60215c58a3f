"""Reads run directories (`docs/run_directory.md`), complete or not: what pages, figures and verdicts are made from.

Only the files are needed. A run that is still going, or was interrupted, has no summary and perhaps no snapshots, and
reads all the same. What had to be left out is said in `StoredRun.notices`.
"""

import functools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.settings import renamed
from rankdecay.lab.store import Record, read_json, read_metrics


@dataclass(frozen=True)
class StoredRun:
    """Content of a run directory, or from several that were merged.

    Attributes:
        directories: where it comes from.
        configs: their ``config.json``, as they stand there.
        config: that of the whole.
        rows: the lines of ``metrics.jsonl``.
        summary: that of the run; one computed from the rows, or None, while it is not complete.
        complete: whether the run is.
        notices: what a reader must know before believing the rest.
    """

    directories: list[Path]
    configs: list[Record]
    config: Record
    rows: list[Record]
    summary: Record | None
    complete: bool
    notices: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """Directory of the run, the first of several."""
        return self.directories[0]

    @property
    def settings(self) -> Record:
        """Settings of the run."""
        return self.config.get("settings", {})

    @property
    def arms(self) -> list[str]:
        """Arm names: the configuration's order, then any that only the summary or the rows know."""
        named = [str(arm["name"]) for arm in self.config.get("arms", [])]
        summarised = [str(arm["name"]) for arm in (self.summary or {}).get("arms", [])]
        return list(dict.fromkeys([*named, *summarised, *(str(row["arm"]) for row in self.rows)]))

    @property
    def last_step(self) -> int | None:
        """The last step anything was measured at, or None before the first evaluation."""
        return max((int(row["step"]) for row in self.rows if "step" in row), default=None)


def read_config(directory: Path) -> Record:
    """The configuration of a run directory.

    Raises:
        SettingError: when the directory is not a run, or the file is damaged.
    """
    config = read_json(directory / "config.json")
    if config is None:
        raise SettingError(f"{directory} has no config.json: give the --out directory of a rankdecay experiment")
    if not all(isinstance(arm, dict) and "name" in arm for arm in config.get("arms", [])):
        raise SettingError(f"{directory / 'config.json'}: an arm has no name; restore the file")
    return config


def read_run(
    directory: str | Path,
    check: Callable[[Record], Record] = lambda row: row,
    so_far: Callable[[StoredRun], Record | None] = lambda stored: None,
    aliases: Mapping[str, str] | None = None,
) -> StoredRun:
    """Reads one run directory.

    Args:
        directory: holds at least ``config.json``.
        check: returns a line of ``metrics.jsonl`` as it is to be read; raises a `ValueError`, `TypeError`, `KeyError`
            or `AttributeError` for one it cannot use.
        so_far: makes a summary of a run that is not complete, if its rows allow one.
        aliases: older names of arms, with those of today.

    Raises:
        SettingError: when the directory is not a run, or anything but the last line of ``metrics.jsonl`` is damaged.
    """
    directory, notices = Path(directory), []
    today = functools.partial(renamed, aliases=aliases or {})
    config, summary = today(read_config(directory)), read_json(directory / "summary.json")
    if summary is not None and summary.get("command") != config.get("command"):
        raise SettingError(
            f"{directory / 'summary.json'} is of {summary.get('command')!r} and config.json beside it of "
            f"{config.get('command')!r}: restore the one that was changed"
        )
    rows = []
    for number, line in enumerate(read_metrics(directory, notices.append), start=1):
        try:
            rows.append(check(today(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            path = directory / "metrics.jsonl"
            raise SettingError(f"{path}, line {number}: not a row of this experiment ({error!r})") from error
    stored = StoredRun([directory], [config], config, rows, summary and today(summary), summary is not None, notices)
    return stored if stored.complete else replace(stored, summary=so_far(stored))


def snapshots(stored: StoredRun) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The snapshots of a run by step, one at a time; the newest is left out, with a notice, if it cannot be read.

    Raises:
        SettingError: for an older one that cannot be read.
    """
    folder = stored.directory / "snapshots"
    paths = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem)) if folder.is_dir() else []
    for path in paths:
        try:
            # opened here, because numpy leaves open what it finds damaged
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays: dict[str, Any] = {name: file[name] for name in file.files}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if path != paths[-1]:
                raise SettingError(f"{path} cannot be read ({error!r}); remove it to report without it") from error
            stored.notices.append(f"The newest snapshot, {path.name}, cannot be read and is left out.")
        else:
            yield int(path.stem), arrays
