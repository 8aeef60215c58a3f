"""Reads run directories, complete or not: what pages, figures and verdicts are made from.

Only the files are needed. A run that is still going, or was interrupted, has no summary and perhaps no snapshots, and
reads all the same. What had to be left out is said in `StoredRun.notices`.
"""

import functools
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rankdecay import files
from rankdecay.lab.errors import SettingError
from rankdecay.lab.settings import Record, renamed
from rankdecay.lab.store import SCHEMA, check_content, read_json, read_metrics, snapshot_files

LARGEST_SNAPSHOT = 2**28  # bytes, unpacked
LABELS = ("groups", "positions")  # arrays that all members share


@dataclass(frozen=True)
class StoredRun:
    """Content of a run directory, or from several that were merged.

    Attributes:
        directories: where it comes from.
        configs: their ``config.json``, each after those of the commands whose grid it added to.
        config: that of the whole.
        rows: the lines of ``metrics.jsonl``.
        summary: that of the run; one computed from the rows, or None, while it is not complete.
        complete: whether the run is.
        notices: what a reader must know before believing the rest.
        left_out: snapshots that are not read, while one that fits nothing is looked for.
    """

    directories: list[Path]
    configs: list[Record]
    config: Record
    rows: list[Record]
    summary: Record | None
    complete: bool
    notices: list[str] = field(default_factory=list)
    left_out: frozenset[Path] = frozenset()

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
        SettingError: When the directory is not a run, or the file is damaged.
    """
    path = directory / "config.json"
    config = read_json(path)
    if config is None:
        raise SettingError(f"{directory} has no config.json: give the --out directory of a rankdecay experiment")
    check_content(config, path)
    schema = config.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        known = f"this version reads up to {SCHEMA}"
        raise SettingError(f"{path} has schema {schema!r}, and {known}: install a newer rankdecay")
    return config


def read_run(
    directory: str | Path,
    check: Callable[[Record], Record] = lambda row: row,
    so_far: Callable[[StoredRun], Record | None] = lambda stored: None,
    aliases: Mapping[str, str] | None = None,
) -> StoredRun:
    """Read one run directory.

    Args:
        directory: holds at least ``config.json``.
        check: returns a line of ``metrics.jsonl`` as it is to be read; raises a `ValueError`, `TypeError`, `KeyError`
            or `AttributeError` for one it cannot use.
        so_far: makes a summary of a run that is not complete, if its rows allow one.
        aliases: older names of arms, with those of today.

    Raises:
        SettingError: When the directory is not a run, or anything but the last line of ``metrics.jsonl`` is damaged.
    """
    directory, notices = Path(directory), []
    today = functools.partial(renamed, aliases=aliases or {})
    config, summary = today(read_config(directory)), read_json(directory / "summary.json")
    if summary is not None:
        check_content(summary, directory / "summary.json")
    if summary is not None and summary.get("command") != config.get("command"):
        raise SettingError(
            f"{directory / 'summary.json'} belongs to {summary.get('command')!r}, but config.json to "
            f"{config.get('command')!r}: restore the one that was changed"
        )
    rows = check_rows(directory, map(today, read_metrics(directory, notices.append)), check)
    if summary is not None and len(rows) < summary.get("lines", 0):
        raise SettingError(
            f"{directory / 'metrics.jsonl'} has {len(rows)} lines, and summary.json was made from {summary['lines']}: "
            "restore it from a copy, or remove summary.json and run the command again"
        )
    configs = [*config.get("earlier", []), config]
    stored = StoredRun([directory], configs, config, rows, summary and today(summary), summary is not None, notices)
    return stored if stored.complete else replace(stored, summary=so_far(stored))


def check_rows(directory: Path, rows: Iterable[Record], check: Callable[[Record], Record]) -> list[Record]:
    """The lines of ``metrics.jsonl`` as they are to be read.

    Raises:
        SettingError: For one that ``check`` refuses (see `read_run`), or with a value of another kind than the others.
    """
    rows = list(rows)
    number, checked = 0, []
    try:
        for number, row in enumerate(rows, start=1):  # noqa: B007 - named below
            checked.append(check(row))
        if odd := _odd(rows):
            number, name = odd
            raise ValueError(f"its {name} is {str(rows[number - 1][name])[:40]!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingError(
            f"{directory / 'metrics.jsonl'}, line {number}: not a row of this experiment ({error!r}): restore the file "
            "from a copy"
        ) from error
    return checked


def _odd(rows: Sequence[Record]) -> tuple[int, str] | None:
    """The line and name of a value that is of another kind than in most lines: a text where the others have a number.

    Lines of earlier versions have no checksum, and a chart would show such a value as a gap.
    """
    found: dict[str, dict[frozenset[str], list[int]]] = {}
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            found.setdefault(name, {}).setdefault(_kinds(value), []).append(number)
    for name, lines in found.items():
        usual = max(lines, key=lambda kinds: len(lines[kinds]))
        for kinds, numbers in lines.items():
            if not kinds <= usual and usual and 2 * len(numbers) < len(lines[usual]):
                return numbers[0], name
    return None


def _kinds(value: object) -> frozenset[str]:
    """The kinds of value in a value of JSON; none of null."""
    if isinstance(value, (list, dict)):
        inside = value.values() if isinstance(value, dict) else value
        return frozenset({type(value).__name__}.union(*map(_kinds, inside)))
    if value is None:
        return frozenset()
    return frozenset({"number" if type(value) in (int, float) else type(value).__name__})


def snapshots(stored: StoredRun) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The snapshots of a run by step, one at a time; the newest is left out, with a notice, if it cannot be read.

    Raises:
        SettingError: For an older one that cannot be read.
    """
    paths = [path for path in snapshot_files(stored.directory) if path not in stored.left_out]
    for path in paths:
        try:
            arrays = read_snapshot(path)
        except SettingError as error:
            if path != paths[-1]:
                raise
            stored.notices.append(f"The newest snapshot, {path.name}, is left out: {error}")
        else:
            yield int(path.stem), arrays


def read_snapshot(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one snapshot.

    Raises:
        SettingError: If it cannot be read, is compressed from more than makes sense, or its arrays do not fit together.
    """
    try:
        raw = io.BytesIO(files.read_bytes(path, LARGEST_SNAPSHOT, SettingError))
        with zipfile.ZipFile(raw) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_SNAPSHOT:
            raise SettingError(f"{path} unpacks to {size} bytes, more than any snapshot has: remove it")
        with np.load(raw, allow_pickle=False) as file:
            arrays: dict[str, np.ndarray] = {name: file[name] for name in file.files}
        if odd := next((name for name, array in arrays.items() if array.dtype.kind not in "biufU"), None):
            raise ValueError(f"{odd} is of type {arrays[odd].dtype}")
        if "arms" in arrays:
            counts = {name: array.shape[:1] for name, array in arrays.items() if name not in LABELS}
            if len(set(counts.values())) > 1:
                raise ValueError(f"its arrays are of {sorted(set(counts.values()))} members")
    except SettingError:
        raise
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        raise SettingError(
            f"{path} cannot be read as a snapshot ({str(error)[:200]}); restore it, or remove it to continue without it"
        ) from None
    return arrays
