"""Run directories: write, resume, read. The files are described in ``docs/reference/run-directory.md``.

The rules that make a run survive being killed at any moment:

* metrics are appended, whole lines at a time; a line a kill cut short is dropped, with a notice, on the next reading;
* a line carries a checksum of itself and of the one before it, and a checkpoint the number of lines it was written
  after, so that a line which is changed or missing is noticed;
* everything else is written beside its final name and renamed over it, so a file is either whole or not there;
* what was written after the last checkpoint is removed on resuming, because the resumed run writes it again;
* the summary is written last and marks the run complete; what a kill left beside it is removed by the next command.

Nothing in a directory is trusted: what is read has to be a regular file in it, of a size that makes sense.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from rankdecay import files
from rankdecay.lab.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from rankdecay.lab.settings import Record

SCHEMA = 1
Notice = Callable[[str], None]
IDENTITY = ("command", "schema", "settings", "arms")  # what decides whether a directory belongs to a command
EXTENSIBLE_IDENTITY = ("command", "schema", "fixed", "shared_arms")  # the same where the axes of the grid may grow
DEFAULTS_OF_OLD_SETTINGS = {  # settings that older directories lack, with the value that all their runs had
    "first_seed": 0,
    "validation": 0,
}
DESCRIBING = ("description", "control")  # of an arm: words, which may be put better
REMOVED_SETTINGS = ("preset",)  # settings that older directories have and that never changed what was computed
LARGEST = {"metrics.jsonl": 2**29, "config.json": 2**24, "summary.json": 2**26}  # bytes that make sense
FILES = (*LARGEST, "report.html", "report.html.part", ".lock")  # regular files, where they are at all
CHECKPOINT_NAME = re.compile(
    r"(checkpoint|under_way-\d+)\.safetensors"
)  # what a run needs to go on, and no longer when complete
SNAPSHOT = re.compile(r"[0-9]{8}\.npz")
_CHECKED = re.compile(rb'(\{.+), "crc": "([0-9a-f]{8})"\}', re.DOTALL)  # a line with its checksum
KINDS = {"step": int, "seed": int, "arm": str, "seconds": float, "wall": float}  # of what rows have in common
DEEPEST = 50  # levels of a file of ours, which have about five
CHECKPOINT_RARITY = 20  # the next checkpoint waits this many times the duration of the last: at most 5 % of the time
# What the keys of a configuration and of a summary have to be, where they are there at all.
CONTENT: dict[str, type | tuple[type, ...]] = {
    "command": str, "settings": dict, "arms": list, "versions": dict, "machine": str, "reproduce": str,
    "precision": dict, "fixed": dict, "threshold": (int, float), "wall_seconds": (int, float, type(None)), "lines": int,
    "earlier": list,
}  # fmt: skip


def read_metrics(directory: Path, notice: Notice | None = None) -> list[Record]:
    """The records of ``metrics.jsonl``, without a last line that was cut short.

    Raises:
        SettingError: If a line before the last is damaged or missing, which no interruption explains.
    """
    return [record for record, _ in _read_lines(directory, notice)]


def _read_lines(directory: Path, notice: Notice | None = None) -> list[tuple[Record, bytes]]:
    """The records of ``metrics.jsonl``, each with the line that it is."""
    path = directory / "metrics.jsonl"
    if not os.path.lexists(path):
        return []
    _check_inside(path)
    lines = files.read_bytes(path, LARGEST[path.name], SettingError).split(b"\n")
    last = max((number for number, line in enumerate(lines, 1) if line), default=0)
    found: list[tuple[Record, bytes]] = []
    previous = b""
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record, previous = _parsed(line, previous)
        except ValueError as error:
            if number < last or isinstance(error, _Changed):
                raise SettingError(
                    f"{path}, line {number} {error}: restore the file from a copy; or remove this line and those after "
                    "it, and the checkpoint if there is one, to compute them again; or use another --out"
                ) from None
            if notice:
                notice(f"{path.name}: dropped a damaged last line, cut short after {len(line)} bytes")
        else:
            found.append((record, line))
    return found


class _Changed(ValueError):
    """Raised for a line that is whole and yet not what was written, which no interruption explains."""


def _parsed(line: bytes, previous: bytes) -> tuple[Record, bytes]:
    """Return the record of a line without its checksum, and that; a `ValueError` says what is wrong with the line."""
    checked, crc = _CHECKED.fullmatch(line), b""
    if checked:
        crc = checked[2]
        if _checksum(checked[1], previous) != crc:
            raise _Changed("is damaged, or one before it is missing: checksum mismatch")
        line = checked[1] + b"}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is damaged") from None  # the last one perhaps because it was cut short
    if not isinstance(record, dict) or not record:
        raise _Changed(f"is damaged: it holds {'nothing' if record == {} else type(record).__name__}, not a record")
    for name, kind in KINDS.items():
        value = record.get(name, kind())
        right = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if (not right and value is not None) or isinstance(value, bool):
            raise _Changed(f"is damaged: its {name} is {str(value)[:40]!r}")
    return record, crc


def _checksum(body: bytes, previous: bytes) -> bytes:
    """Of a line without its end, and the checksum of the line before."""
    return b"%08x" % zlib.crc32(previous + body)


def _check_inside(path: Path) -> None:
    """Raise a `SettingError` if a file of a run directory is a link to one elsewhere."""
    if path.is_symlink() and not files.real(path).is_relative_to(files.real(path.parent)):
        raise SettingError(f"{path} is a link that leads out of the directory: put the file itself there")


def read_json(path: Path) -> Record | None:
    """A file that holds one JSON object, or ``None`` if it is not there.

    Raises:
        SettingError: If it holds anything else.
    """
    if not os.path.lexists(path):
        return None
    _check_inside(path)
    remedy = "restore it, or use another --out"
    value = files.read_json(path, LARGEST[path.name], SettingError, remedy)
    if _is_deep(value):
        raise SettingError(f"{path} is nested more than {DEEPEST} levels deep: {remedy}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other `DEEPEST` times: what walks them does so by calling itself."""
    level = [value]
    for _ in range(DEEPEST):
        lists = [each for each in level if isinstance(each, list)]
        objects = [each.values() for each in level if isinstance(each, dict)]
        level = [inner for each in (*lists, *objects) for inner in each if isinstance(inner, (list, dict))]
    return bool(level)


def check_content(record: Record, path: Path) -> None:
    """Raise a `SettingError` if a configuration or summary is not made of what it should be."""
    for name, kinds in CONTENT.items():
        if name in record and not isinstance(record[name], kinds):
            raise SettingError(f"{path}: its {name} is {str(record[name])[:60]!r}; restore the file")
    if not all(isinstance(arm, dict) and isinstance(arm.get("name"), str) for arm in record.get("arms", [])):
        raise SettingError(f"{path}: an arm has no name; restore the file")
    for command in record.get("earlier", []):
        if not isinstance(command, dict):
            raise SettingError(f"{path}: its earlier has {str(command)[:60]!r}; restore the file")
        check_content(command, path)


def snapshot_files(directory: Path) -> list[Path]:
    """The snapshots of a run directory, by step; files of other names are none.

    Raises:
        SettingError: If something else stands in the place of their directory.
    """
    folder = directory / "snapshots"
    if not os.path.lexists(folder):
        return []
    if folder.is_symlink() or not folder.is_dir():
        raise SettingError(f"{folder} is {_kind(folder)}, not a directory: restore or remove it")
    try:
        return sorted(path for path in folder.iterdir() if SNAPSHOT.fullmatch(path.name))
    except OSError as error:
        raise SettingError(f"{folder} cannot be read ({error.strerror}): restore access to it") from None


def _kind(path: Path) -> str:
    return "a link" if path.is_symlink() else files.kind_of(path)


def _check_kinds(path: Path) -> None:
    """Raise a `SettingError` if something else stands in the place of a file that is written or read here.

    A pipe would be waited for, and what is written through a link harms a file somewhere else.
    """
    for entry in sorted(path.iterdir()):
        mode = entry.lstat().st_mode
        if (entry.name in FILES or CHECKPOINT_NAME.fullmatch(entry.name)) and not stat.S_ISREG(mode):
            raise SettingError(f"{entry} is {_kind(entry)}, not a file: restore or remove it")
        if entry.name in ("snapshots", "models") and not stat.S_ISDIR(mode):
            raise SettingError(f"{entry} is {_kind(entry)}, not a directory: restore or remove it")


def _is_left_over(path: Path) -> bool:
    """Whether a file or directory is one that a kill left half written."""
    name = path.name.removesuffix(".partial")
    return path.name.endswith(".partial") and (
        name in FILES or CHECKPOINT_NAME.fullmatch(name) is not None or SNAPSHOT.fullmatch(name) is not None
    )


def _tidy(path: Path) -> None:
    """Remove what a kill left: files half written, and beside a summary what only an incomplete run needs."""
    complete = os.path.isfile(path / "summary.json")
    for entry in [*path.iterdir(), *(path / "snapshots").glob("*.partial")]:
        if _is_left_over(entry) or (complete and CHECKPOINT_NAME.fullmatch(entry.name)):
            with contextlib.suppress(IsADirectoryError):
                entry.unlink()
    for model in (path / "models").glob("*.partial"):
        shutil.rmtree(model, ignore_errors=True)


def is_run(path: Path) -> bool:
    """Whether a directory has the configuration of a run, or one that cannot be read."""
    try:
        config = read_json(path / "config.json")
    except SettingError:
        return True
    return config is not None and {"command", "schema"} <= set(config)


def tidy(path: Path) -> None:
    """Remove what a kill left in a run directory, unless another process has it open or it cannot be written.

    A directory of another kind is left alone, whatever the names of its files.
    """
    with contextlib.suppress(OSError):
        if not (path / ".lock").is_file() or (path / ".lock").is_symlink():
            return
        if not is_run(path):
            return
        with (path / ".lock").open("ab") as lock:
            if _lock(lock):
                _check_kinds(path)
                _tidy(path)


class Throttle:
    """Limits how often something costly, such as writing a checkpoint, is called: to 5 % of the time.

    Attributes:
        due: when the next call may be made, on the clock of `time.monotonic`.
    """

    def __init__(self) -> None:
        self.due = 0.0

    def __call__(self, act: Callable[[], object]) -> bool:
        """Call ``act`` unless it is too early for it; return whether it was called."""
        start = time.monotonic()
        if start < self.due:
            return False
        act()
        end = time.monotonic()
        self.due = end + CHECKPOINT_RARITY * (end - start)
        return True


@dataclass
class Checkpoint:
    """State from which an interrupted run continues: a step, named tensors, and plain data.

    Attributes:
        step: of the run.
        tensors: by name.
        extra: what else it takes.
        lines: of ``metrics.jsonl`` that were there when it was written; None before they were counted.
    """

    step: int
    tensors: dict[str, Tensor]
    extra: Record
    lines: int | None = field(default=None, compare=False)


class RunDirectory:
    """One experiment's directory, open for writing by one process.

    Use `RunDirectory.open`. All writing methods turn a full disk or a lost permission into a `SettingError`; what was
    written before stays valid.
    """

    def __init__(self, path: Path, lock: IO[bytes], notice: Notice) -> None:
        self.path = path
        self._lock = lock
        self._notice = notice
        self._end: tuple[int, bytes] | None = None  # number of lines, and the checksum of the last, once it is known
        self._grown: Record | None = None  # the configuration from the first addition on
        self._growing = threading.Lock()  # threads of a sweep save checkpoints

    @classmethod
    def open(
        cls,
        path: Path,
        config: Record,
        notice: Notice,
        identity: Sequence[str] = IDENTITY,
        defaults: Record | None = None,
    ) -> RunDirectory:
        """Create the directory, or open it again if it holds the same configuration.

        Args:
            path: the directory; its parents are created.
            config: must have the keys of ``identity``; compared with what the directory holds.
            notice: receives one line for everything a user should know.
            identity: the keys that decide whether the directory belongs to this configuration.
            defaults: of the settings: what those had that an older directory does not hold.

        Raises:
            SettingError: If the directory is in use, not writable, holds another configuration or other files.
        """
        config = {"schema": SCHEMA, **config}
        try:
            path.mkdir(parents=True, exist_ok=True)
            _check_kinds(path)
            leftovers = {".lock", "config.json.partial"}  # of a kill before there was a configuration
            if read_json(path / "config.json") is None and any(entry.name not in leftovers for entry in path.iterdir()):
                raise SettingError(f"--out {path} is not a run directory and is not empty: choose another")
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
            with run._guarded("."):
                _tidy(path)
            stored = read_json(path / "config.json")  # only now can nobody else be writing it
            if stored is None:
                run.save_config(config)
            else:
                check_content(stored, path / "config.json")
                _refuse_other_configuration(path, stored, json.loads(json.dumps(config)), identity, defaults or {})
            on_error.pop_all()
        return run

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @property
    def summary(self) -> Record | None:
        """Summary of a complete run; None of any other."""
        path = self.path / "summary.json"
        summary = read_json(path)
        if summary is not None:
            check_content(summary, path)
        return summary

    def append(self, records: Iterable[Record]) -> None:
        """Add lines to ``metrics.jsonl``."""
        self._save_grown()
        count, previous = self._last_line()
        text, end = _as_lines(records, previous)
        self._end = None  # until the line is written: a full disk may leave a part of it
        with self._guarded("metrics.jsonl"), (self.path / "metrics.jsonl").open("ab") as file:
            file.write(text)
        self._end = count + text.count(b"\n"), end

    def _last_line(self) -> tuple[int, bytes]:
        """How many lines ``metrics.jsonl`` has, and the checksum of the last; empty if that has none."""
        if self._end is None:
            lines = _read_lines(self.path)
            checked = _CHECKED.fullmatch(lines[-1][1]) if lines else None
            self._end = len(lines), checked[2] if checked else b""
        return self._end

    def metrics(self) -> list[Record]:
        """The records written so far."""
        return read_metrics(self.path, self._notice)

    def save_snapshot(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of one step."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self._write(f"snapshots/{step:08d}.npz", buffer.getvalue())

    def save_config(self, config: Record) -> None:
        """Write ``config.json``."""
        self._write("config.json", _as_json({"schema": SCHEMA, **config}))

    def grow(self, config: Record) -> None:
        """Have ``config.json`` written when something is added: until then the directory is what it was."""
        self._grown = config

    def _save_grown(self) -> None:
        with self._growing:
            if self._grown is not None:
                self.save_config(self._grown)
                self._grown = None

    @property
    def config(self) -> Record:
        """The configuration the directory holds."""
        return read_json(self.path / "config.json") or {}

    def save_checkpoint(self, checkpoint: Checkpoint, name: str = "checkpoint") -> None:
        """Replace a checkpoint; ``name`` is for runs that keep several."""
        from safetensors.torch import save

        self.reopen()  # of a complete sweep that is extended: beside a summary, a checkpoint is a leftover
        path = self.path / "metrics.jsonl"
        with self._guarded(path.name):
            if path.exists():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())  # the lines must not be lost to a power cut that the checkpoint survives
        header = json.dumps({"step": checkpoint.step, "extra": checkpoint.extra, "lines": self._last_line()[0]})
        tensors = {name: tensor.contiguous().cpu() for name, tensor in checkpoint.tensors.items()}
        metadata = {"checkpoint": header, "crc": _digest(header, tensors)}
        self._write(f"{name}.safetensors", save(tensors, metadata=metadata))

    def load_checkpoint(self, name: str = "checkpoint") -> Checkpoint | None:
        """A checkpoint written before, or ``None`` if there is none of that name."""
        from safetensors import SafetensorError, safe_open

        path = self.path / f"{name}.safetensors"
        if not os.path.lexists(path):
            return None
        try:
            if path.is_symlink() or not path.is_file():
                raise ValueError(f"it is {_kind(path)}, not a file")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            header = json.loads(metadata["checkpoint"])
            if "crc" in metadata and metadata["crc"] != _digest(metadata["checkpoint"], tensors):
                raise ValueError("checksum mismatch")
            step, extra, lines = header["step"], header["extra"], header.get("lines")
            if not (isinstance(step, int) and step >= 0 and isinstance(extra, dict) and isinstance(lines, int | None)):
                raise ValueError("unexpected header")
            return Checkpoint(step, tensors, extra, lines)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SettingError(f"{path} is damaged ({error}): remove it to start over, or use another --out") from None

    def check_lines(self, checkpoint: Checkpoint, records: Sequence[Record], name: str = "checkpoint") -> None:
        """Raise a `SettingError` if ``metrics.jsonl`` has lost lines that were there when a checkpoint was written."""
        if checkpoint.lines is not None and len(records) < checkpoint.lines:
            raise SettingError(
                f"{self.path / 'metrics.jsonl'} has {len(records)} lines and had {checkpoint.lines} when "
                f"{name}.safetensors was written: restore it from a copy; or remove {self.path / name}.safetensors to "
                "start over; or use another --out"
            )

    def resume(self) -> Checkpoint | None:
        """The last checkpoint, or ``None`` to start at step 0. Removes what was written after it."""
        checkpoint = self.load_checkpoint()
        step = checkpoint.step if checkpoint else 0
        records = self.metrics() if checkpoint else []
        if checkpoint:
            self.check_lines(checkpoint, records)
            if without := next((number for number, record in enumerate(records, 1) if "step" not in record), None):
                raise SettingError(
                    f"{self.path / 'metrics.jsonl'}, line {without} has no step: restore the file, or use another --out"
                )
        if (self.path / "metrics.jsonl").exists():
            self.replace_metrics([record for record in records if record["step"] <= step])
        for snapshot in snapshot_files(self.path):
            if checkpoint is None or int(snapshot.stem) > step:
                with self._guarded(f"snapshots/{snapshot.name}"):
                    snapshot.unlink()
        return checkpoint

    def finish(self, summary: Record) -> None:
        """Write the summary, which marks the run complete, and remove the checkpoint and a page made meanwhile."""
        with self._guarded("report.html"):
            (self.path / "report.html").unlink(missing_ok=True)  # beside a summary there is no page but its own
        self._write("summary.json", _as_json(summary))
        with self._guarded("checkpoint.safetensors"):
            _tidy(self.path)

    def checkpoints(self) -> list[Path]:
        """The files that an interrupted run continues from."""
        return sorted(entry for entry in self.path.iterdir() if CHECKPOINT_NAME.fullmatch(entry.name))

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint of a run that has ended, where others follow."""
        with self._guarded("checkpoint.safetensors"):
            (self.path / "checkpoint.safetensors").unlink(missing_ok=True)

    def save_model(self, name: str, write: Callable[[Path], None]) -> None:
        """Keep a trained model as the directory ``models/name``, whole or not at all.

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
        """Write ``metrics.jsonl`` again."""
        self._end = None
        self._write("metrics.jsonl", _as_lines(records)[0])

    def reopen(self) -> None:
        """Remove the summary of a complete run that is to go on, an extended sweep say."""
        self._save_grown()
        with self._guarded("summary.json"):
            (self.path / "summary.json").unlink(missing_ok=True)

    def drop_damaged_line(self) -> list[Record]:
        """The records written so far, after removing a last line that a kill cut short, so that more can follow."""
        found = _read_lines(self.path, self._notice)
        path = self.path / "metrics.jsonl"
        text = b"".join(line + b"\n" for _, line in found)
        if path.exists() and path.stat().st_size != len(text):
            self._write("metrics.jsonl", text)
            self._end = None
        return [record for record, _ in found]

    def _write(self, name: str, data: bytes) -> None:
        """Write a whole file under its name, or leave what was there."""
        path = self.path / name
        with self._guarded(name):
            path.parent.mkdir(exist_ok=True)
            files.put(path, path.with_name(path.name + ".partial"), data)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = "free some space, then run the same command again: it continues from the last checkpoint"
                raise SettingError(f"the disk is full, {self.path / name} was not written: {remedy}") from None
            where = self.path if name == "." else self.path / name
            too_large = error.errno == errno.EFBIG
            remedy = "raise the limit on the size of files (ulimit -f)" if too_large else "restore access"
            raise SettingError(
                f"{where} cannot be written ({error.strerror}): {remedy}, then run the command again"
            ) from None


def _lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or the process ends; return False if another process has locked it.

    Raises:
        SettingError: If this Python cannot lock a file.
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


def _as_lines(records: Iterable[Record], previous: bytes = b"") -> tuple[bytes, bytes]:
    """Return records as lines, each with the checksum of itself and the one before, and the last checksum."""
    lines = []
    for record in records:
        body = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")[:-1]
        previous = _checksum(body, previous)
        lines.append(body + b', "crc": "' + previous + b'"}\n')
    return b"".join(lines), previous


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    """The checksum of a checkpoint: of its header, and of name, type, shape and bytes of every tensor."""
    import torch

    crc = zlib.crc32(header.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        numbers: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(numbers, crc)
    return f"{crc:08x}"


def _as_json(value: Record) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _refuse_other_configuration(
    path: Path, stored: Record, wanted: Record, identity: Sequence[str], defaults: Record
) -> None:
    """Raise unless the stored identity equals the wanted one, naming the first difference.

    Settings that are absent in an older directory had their default then; arms are compared by what they do, not by
    how they are described, and an attribute that only one of two versions stores does not count.
    """
    for key in identity:
        if key in ("arms", "shared_arms"):
            known, asked = stored.get("arms") or [], wanted.get("arms") or []
            old, new = _comparable(known, asked), _comparable(asked, known)
            other = next((name for name in old if name in new and old[name] != new[name]), None)
            same = other is None if key == "shared_arms" else old == new
            what = f"its arm {other} differs" if key == "shared_arms" else "its arms differ"
        elif key in ("settings", "fixed"):
            old, new = _settings_of(stored, key, wanted, defaults), wanted[key]
            same = old == new
            name = next((k for k in {**old, **new} if (k in old) != (k in new) or old.get(k) != new.get(k)), "")
            what = f"{name} is {old.get(name)!r} there, {new.get(name)!r} now"
        else:
            same = stored.get(key) == wanted.get(key)
            what = f"{key} is {stored.get(key)!r} there, {wanted.get(key)!r} now"
        if not same:
            raise SettingError(
                f"--out {path} holds another configuration ({what}): choose another directory, or repeat what this one "
                "was begun with"
            )


def _settings_of(stored: Record, key: str, wanted: Record, defaults: Record) -> Record:
    """The stored settings, or what is fixed of them, with the defaults of those that an older version did not have."""
    old = stored.get(key)
    if old is None:  # nothing was "fixed" where the grid of the command could not grow yet
        axes = wanted["settings"].keys() - wanted[key].keys()
        old = {name: value for name, value in stored.get("settings", {}).items() if name not in axes}
    defaults = defaults | DEFAULTS_OF_OLD_SETTINGS
    kept = {name: value for name, value in old.items() if name not in REMOVED_SETTINGS}
    return {name: defaults.get(name) for name in wanted[key]} | kept


def _comparable(arms: Sequence[Record], others: Sequence[Record]) -> Record:
    """Attributes of arms by name, without descriptions and those that the other version of an arm lacks."""
    known = {arm["name"]: arm for arm in others}
    return {
        arm["name"]: {k: v for k, v in arm.items() if k not in DESCRIBING and k in known.get(arm["name"], arm)}
        for arm in arms
    }
