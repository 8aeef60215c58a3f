"""Run directories: write, resume, read. The files are described in ``docs/run_directory.md``.

The rules that make a run survive being killed at any moment:

* metrics are appended, whole lines at a time; a line a kill cut short is dropped, with a notice, on the next reading;
* everything else is written beside its final name and renamed over it, so a file is either whole or not there;
* what was written after the last checkpoint is removed on resuming, because the resumed run writes it again;
* the summary is written last and marks the run complete.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from rankdecay.lab.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
Record = dict[str, Any]
Notice = Callable[[str], None]
IDENTITY = ("command", "schema", "settings", "arms")  # what decides whether a directory belongs to a command
GROWING = ("command", "schema", "fixed")  # the same where the axes of the grid may grow
ADDED = {"first_seed": 0}  # settings that older directories lack, with the value that all their runs had
DESCRIBING = ("description", "control")  # of an arm: words, which may be put better
DROPPED = ("preset",)  # settings that older directories have and that never changed what was computed


def read_metrics(directory: Path, notice: Notice | None = None) -> list[Record]:
    """The records of ``metrics.jsonl``, without a last line that was cut short.

    Raises:
        SettingError: if a line before the last is damaged, which no interruption explains.
    """
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1 or (number == len(lines) - 1 and lines[-1]):
                raise SettingError(
                    f"{path}, line {number} is damaged: remove that line, or use another --out"
                ) from None
            if notice:
                notice(f"{path.name}: dropped a damaged last line, cut short after {len(line)} bytes")
    return records


def read_json(path: Path) -> Record | None:
    """A file that holds one JSON object, or ``None`` if it is not there.

    Raises:
        SettingError: if it holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise SettingError(f"{path} is not valid JSON ({error}): restore it, or use another --out") from None
    if not isinstance(value, dict):
        raise SettingError(f"{path} should hold one JSON object, not {type(value).__name__}: use another --out")
    return value


CHECKPOINT_RARITY = 20  # a checkpoint waits this many times as long as the last one took: at most 5 % of the time


class Throttle:
    """Limits how often something costly, such as writing a checkpoint, is called: to 5 % of the time.

    Attributes:
        due: when the next call may be made, on the clock of `time.monotonic`.
    """

    def __init__(self) -> None:
        self.due = 0.0

    def __call__(self, act: Callable[[], object]) -> bool:
        """Calls ``act`` unless it is too early for it; returns whether it was called."""
        start = time.monotonic()
        if start < self.due:
            return False
        act()
        end = time.monotonic()
        self.due = end + CHECKPOINT_RARITY * (end - start)
        return True


@dataclass
class Checkpoint:
    """Where an interrupted run continues: a step, named tensors, and plain data."""

    step: int
    tensors: "dict[str, Tensor]"
    extra: Record


class RunDirectory:
    """One experiment's directory, open for writing by one process.

    Use `RunDirectory.open`. All writing methods turn a full disk or a lost permission into a `SettingError`; what was
    written before stays valid.
    """

    def __init__(self, path: Path, lock: IO[bytes], notice: Notice) -> None:
        self.path = path
        self._lock = lock
        self._notice = notice

    @classmethod
    def open(
        cls,
        path: Path,
        config: Record,
        notice: Notice,
        identity: Sequence[str] = IDENTITY,
        defaults: Record | None = None,
    ) -> "RunDirectory":
        """Creates the directory, or opens it again if it holds the same configuration.

        Args:
            path: the directory; its parents are created.
            config: must have the keys of ``identity``; compared with what the directory holds.
            notice: receives one line for everything a user should know.
            identity: the keys that decide whether the directory belongs to this configuration.
            defaults: of the settings: what those had that an older directory does not hold.

        Raises:
            SettingError: if the directory is in use, not writable, holds another configuration or other files.
        """
        config = {"schema": SCHEMA, **config}
        try:
            path.mkdir(parents=True, exist_ok=True)
            leftovers = {".lock", "config.json.partial"}  # of a kill before there was a configuration
            if read_json(path / "config.json") is None and any(entry.name not in leftovers for entry in path.iterdir()):
                raise SettingError(f"--out {path} has other files in it and is no run directory: choose a new one")
            lock = (path / ".lock").open("ab")
        except OSError as error:
            raise SettingError(
                f"--out {path} cannot be written ({error.strerror}): choose a directory you may write to"
            ) from None
        with contextlib.ExitStack() as on_error:
            on_error.callback(lock.close)
            if not _lock(lock):
                raise SettingError(
                    f"--out {path} is in use by another process: wait for it, or choose another directory"
                )
            run = cls(path, lock, notice)
            stored = read_json(path / "config.json")  # only now can nobody else be writing it
            if stored is None:
                run.save_config(config)
            else:
                _refuse_other_configuration(path, stored, json.loads(json.dumps(config)), identity, defaults or {})
            on_error.pop_all()
        return run

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @property
    def summary(self) -> Record | None:
        """Summary of a complete run; None of any other."""
        return read_json(self.path / "summary.json")

    def append(self, records: Iterable[Record]) -> None:
        """Adds lines to ``metrics.jsonl``."""
        with self._guarded("metrics.jsonl"), (self.path / "metrics.jsonl").open("ab") as file:
            file.write(_as_lines(records))

    def metrics(self) -> list[Record]:
        """The records written so far."""
        return read_metrics(self.path, self._notice)

    def save_snapshot(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes the arrays of one step."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self._write(f"snapshots/{step:08d}.npz", buffer.getvalue())

    def save_config(self, config: Record) -> None:
        """Writes ``config.json``."""
        self._write("config.json", _as_json({"schema": SCHEMA, **config}))

    @property
    def config(self) -> Record:
        """The configuration the directory holds."""
        return read_json(self.path / "config.json") or {}

    def save_checkpoint(self, checkpoint: Checkpoint, name: str = "checkpoint") -> None:
        """Replaces a checkpoint; ``name`` is for runs that keep several."""
        from safetensors.torch import save

        header = json.dumps({"step": checkpoint.step, "extra": checkpoint.extra})
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        self._write(f"{name}.safetensors", save(tensors, metadata={"checkpoint": header}))

    def load_checkpoint(self, name: str = "checkpoint") -> Checkpoint | None:
        """A checkpoint written before, or ``None`` if there is none of that name."""
        from safetensors import SafetensorError, safe_open

        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["checkpoint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return Checkpoint(header["step"], tensors, header["extra"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # all but the first: another header
            raise SettingError(f"{path} is damaged ({error}): remove it to begin again, or use another --out") from None

    def resume(self) -> Checkpoint | None:
        """The last checkpoint, or ``None`` to begin at step 0. Removes what was written after it."""
        checkpoint = self.load_checkpoint()
        step = checkpoint.step if checkpoint else 0
        kept = [record for record in self.metrics() if record["step"] <= step] if checkpoint else []
        if (self.path / "metrics.jsonl").exists():
            self._write("metrics.jsonl", _as_lines(kept))
        for snapshot in (self.path / "snapshots").glob("*.npz"):
            if checkpoint is None or int(snapshot.stem) > step:
                snapshot.unlink()
        return checkpoint

    def finish(self, summary: Record) -> None:
        """Writes the summary, which marks the run complete, and removes the checkpoint and a page made meanwhile."""
        (self.path / "report.html").unlink(missing_ok=True)  # beside a summary there is no page but its own
        self._write("summary.json", _as_json(summary))
        for checkpoint in self.path.glob("*.safetensors"):
            checkpoint.unlink()

    def drop_checkpoint(self) -> None:
        """Removes the checkpoint of a run that has ended, where others follow."""
        (self.path / "checkpoint.safetensors").unlink(missing_ok=True)

    def save_model(self, name: str, write: Callable[[Path], None]) -> None:
        """Keeps a trained model as the directory ``models/name``, whole or not at all.

        Args:
            name: of the directory.
            write: fills a directory that exists and is empty.
        """
        final = self.path / "models" / name
        partial = final.with_name(f"{name}.partial")
        with self._guarded(f"models/{name}"):
            shutil.rmtree(partial, ignore_errors=True)  # a kill left it
            partial.mkdir(parents=True)
            write(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)

    def replace_metrics(self, records: Iterable[Record]) -> None:
        """Writes ``metrics.jsonl`` again."""
        self._write("metrics.jsonl", _as_lines(records))

    def reopen(self) -> None:
        """Removes the summary of a complete run that is to go on, an extended sweep say."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def drop_damaged_line(self) -> list[Record]:
        """The records written so far, after removing a last line that a kill cut short, so that more can follow."""
        records = self.metrics()
        path = self.path / "metrics.jsonl"
        text = _as_lines(records)
        if path.exists() and path.read_bytes() != text:
            self._write("metrics.jsonl", text)
        return records

    def _write(self, name: str, data: bytes) -> None:
        """Writes a whole file under its name, or leaves what was there."""
        path = self.path / name
        partial = path.with_name(path.name + ".partial")
        with self._guarded(name):
            path.parent.mkdir(exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = "free some space, then run the same command again: it continues from the last checkpoint"
                raise SettingError(f"the disk is full, {self.path / name} was not written: {remedy}") from None
            raise SettingError(
                f"{self.path / name} cannot be written ({error.strerror}): restore access, then run the command again"
            ) from None


def _lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or the process ends; return False if another process has locked it.

    Raises:
        SettingError: if this Python cannot lock a file.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_on_windows(file: IO[bytes]) -> bool:
    try:
        msvcrt: Any = import_module("msvcrt")  # by name: type checkers know it on Windows alone
    except ImportError:
        raise SettingError(
            f"--out {Path(file.name).parent} cannot be locked, since this Python has neither fcntl nor msvcrt: "
            "run the experiment with CPython on Linux, macOS or Windows"
        ) from None
    try:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def _as_lines(records: Iterable[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _as_json(value: Record) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _refuse_other_configuration(
    path: Path, stored: Record, wanted: Record, identity: Sequence[str], defaults: Record
) -> None:
    """Raises unless the stored identity equals the wanted one, naming the first difference.

    Settings that are absent in an older directory had their default then; arms are compared by what they do, not by
    how they are described, and an attribute that only one of two versions stores does not count.
    """
    for key in identity:
        old, new = stored.get(key), wanted.get(key)
        if key == "arms":
            old, new = _comparable(old or [], new or []), _comparable(new or [], old or [])
        if isinstance(old, dict) and isinstance(new, dict):
            old = {name: value for name, value in old.items() if name not in DROPPED}
            old = {name: (defaults | ADDED).get(name) for name in new if key != "arms"} | old
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict) and key != "arms":
            name = next(k for k in {**old, **new} if old.get(k) != new.get(k))
            what = f"{name} is {old.get(name)!r} there, {new.get(name)!r} now"
        else:
            what = f"its {key} differ" if key == "arms" else f"{key} is {old!r} there, {new!r} now"
        raise SettingError(f"--out {path} holds another configuration ({what}): choose another directory")


def _comparable(arms: Sequence[Record], others: Sequence[Record]) -> Record:
    """Attributes of arms by name, without descriptions and those that the other version of an arm lacks."""
    known = {arm["name"]: arm for arm in others}
    return {
        arm["name"]: {k: v for k, v in arm.items() if k not in DESCRIBING and k in known.get(arm["name"], arm)}
        for arm in arms
    }
