"""Which file of a run directory does not fit the others, found by leaving files out: what to say where a page fails.

Each file was checked by itself when it was read. What is left is a file that is whole and yet not what the others were
written with: a snapshot of other arrays, a row of other numbers, a summary or a configuration that was edited.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rankdecay.lab.errors import SettingError
from rankdecay.lab.settings import Record
from rankdecay.lab.store import snapshot_files
from rankdecay.lab.stored import StoredRun

T = TypeVar("T")
Signature = tuple[type, str, int | None]
FileAndRemedy = tuple[str, str]  # a file, and what to do about it

#: What code raises that reads a dictionary or an array which is not what it was written as.
UNFIT = (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError, RuntimeError)


@contextlib.contextmanager
def explain_inconsistency(find: Callable[[Exception], FileAndRemedy]) -> Iterator[None]:
    """Say which file does not fit the others, where something made from them fails.

    Args:
        find: returns the file that is to blame for an error, and what to do about it.

    Raises:
        SettingError: With the name of the file.
    """
    try:
        yield
    except SettingError:
        raise
    except UNFIT as error:
        file, remedy = find(error)
        kind, where, line = _signature(error)
        signature = f"{kind.__name__}: {str(error)[:200]}, {Path(where).name}:{line}"
        raise SettingError(
            f"{file} is inconsistent with the other files ({signature}): {remedy}; if you changed nothing, please "
            "report a bug"
        ) from error


def in_summary(directory: Path) -> FileAndRemedy:
    """File and remedy for a summary."""
    return f"{directory / 'summary.json'}", "restore it, or remove it and run the command again, which recreates it"


def in_line(directory: Path, number: int) -> FileAndRemedy:
    """File and remedy for a line of the metrics; for none in particular if the number is 0."""
    place = f"{directory / 'metrics.jsonl'}{f', line {number}' if number else ''}"
    return place, (
        "restore the file from a copy; or remove the line and those after it, with summary.json and the checkpoint if "
        "they are there, and run the command again, which recomputes them"
    )


def in_snapshot(path: Path) -> FileAndRemedy:
    """File and remedy for a snapshot."""
    return f"{path}", f"restore it, or remove it to continue without the spectra of step {int(path.stem)}"


def in_checkpoint(directory: Path, checkpoints: Sequence[Path]) -> FileAndRemedy:
    """File and remedy where a run cannot be continued: its checkpoint, or the lines if it has none."""
    if not checkpoints:
        return in_line(directory, 0)
    return ", ".join(map(str, checkpoints)), (
        "restore it, or remove it and run the command again: the run in progress is retrained"
    )


def in_configuration(directory: Path) -> FileAndRemedy:
    """File and remedy for the configuration."""
    return f"{directory / 'config.json'}", "restore it, or run the command again with another --out"


def find_inconsistent_file(
    stored: StoredRun, make: Callable[[StoredRun], object], error: Exception
) -> FileAndRemedy | None:
    """Return which file makes a page or figure fail, and what to do; None if this run does not make it fail so.

    Args:
        stored: the run, with no summary but that of its file.
        make: makes the page or figure that failed.
        error: exception that it raised.
    """
    sign, directory = _signature(error), stored.directory

    def fails(run: StoredRun) -> bool:
        try:
            make(replace(run, notices=[]))
        except UNFIT as again:
            return _signature(again) == sign
        return False

    if not fails(stored):
        return None
    snapshots, rows, summary = snapshot_files(directory), stored.rows, stored.summary

    def fails_with(kept: Sequence[Path]) -> bool:
        return fails(replace(stored, left_out=frozenset(snapshots) - set(kept)))

    def fails_of(kept: Sequence[Record]) -> bool:
        return fails(replace(stored, rows=list(kept)))

    if (found := _one_of(snapshots, fails_with)) is not None:
        return in_snapshot(snapshots[found])
    if (found := _one_of(rows, fails_of)) is not None:
        return in_line(directory, found + 1)
    if summary is not None and not fails(replace(stored, summary=None, complete=False)):
        plain = {"arms": [{"name": arm["name"]} for arm in stored.config.get("arms", [])]}
        if fails(replace(stored, config=stored.config | plain)):
            return in_summary(directory)
        return (
            f"{directory / 'config.json'}, or summary.json beside it,",
            "restore the one that was changed; without summary.json the same command recreates it",
        )
    if len(snapshots) == 1 and not fails_with(()):
        return in_snapshot(snapshots[0])
    if len(rows) == 1 and not fails_of(()):
        return in_line(directory, 1)
    return in_configuration(directory)


def _one_of(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> int | None:
    """Return the number, from 0, of the item that makes it fail; None if it is none, or any of them does."""
    if len(items) < 2 or fails(items[:0]):
        return None
    first = _first(items, fails)
    return first if first or not fails(items[-1:]) else None


def _first(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> int:
    """Return the number, from 0, of the first item up to which it fails, where it does not without any of them."""
    works, failing = 0, len(items)
    while failing - works > 1:
        middle = (works + failing) // 2
        if fails(items[:middle]):
            failing = middle
        else:
            works = middle
    return failing - 1


def _signature(error: Exception) -> Signature:
    """Signature that tells an error from others: its type, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return type(error), frame.filename, frame.lineno
