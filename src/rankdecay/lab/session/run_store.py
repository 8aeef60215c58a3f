"""Storage of runs that follow one another: which have ended, and where an interrupted one continues."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from rankdecay.lab.errors import SettingError
from rankdecay.lab.session.distributed import broadcast
from rankdecay.lab.session.run_key import key_of
from rankdecay.lab.session.session import Run, Session
from rankdecay.lab.settings import Record
from rankdecay.lab.store import Checkpoint, RunDirectory, Throttle


class RunStore:
    """Store of the runs of one directory, on rank 0; every other rank has a `NonWriter`.

    The last row of a run that has ended carries ``"ended": true``. Rows of an interrupted run that came after its
    checkpoint are dropped, because it writes them again.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        rows = directory.drop_damaged_line()
        self._ended = {key_of(row) for row in rows if row.get("ended")}
        self._saved = directory.load_checkpoint()
        if self._saved is not None and key_of(self._saved.extra["run"]) in self._ended:  # killed between the two writes
            self._saved = None
            directory.drop_checkpoint()
        interrupted = None if self._saved is None else key_of(self._saved.extra["run"])
        kept = [row for row in rows if key_of(row) in self._ended or _is_before(row, interrupted, self._saved)]
        if len(kept) < len(rows):
            directory.replace_metrics(kept)
        if self._saved is not None:
            directory.check_lines(self._saved, rows)
        self._before = max((row["wall"] for row in kept), default=0.0)
        self._start = time.monotonic()
        self._throttle = Throttle()
        self._last: Record | None = None
        self.checkpoint_step = None if self._saved is None else self._saved.step
        """Step of the checkpoint of the current run, if it has one."""

    @property
    def seconds(self) -> float:
        """Wall time of the experiment without interruptions."""
        return self._before + time.monotonic() - self._start

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Runs that have not ended, an interrupted one first.

        Raises:
            SettingError: If the interrupted one is none of these: the next checkpoint would replace its own.
        """
        runs = list(runs)
        saved = None if self._saved is None else self._saved.extra["run"]
        if saved is not None and key_of(saved) not in {key_of(run.key) for run in runs}:
            which = ", ".join(f"{name} {value}" for name, value in saved.items() if value is not None)
            raise SettingError(
                f"--out {self._directory.path} has an interrupted run ({which}) that these settings leave out: "
                "ask for it too, so that it can end (one that diverges, with `skip_diverged`); or remove "
                f"{self._directory.path / 'checkpoint.safetensors'} to drop it; or choose another directory"
            )
        left = [run for run in runs if key_of(run.key) not in self._ended]
        return broadcast(sorted(left, key=lambda run: self._checkpoint_of(run) is None))

    def begin(self, run: Run) -> Checkpoint | None:
        """Return the checkpoint from which a run continues, if it was interrupted."""
        self._directory.reopen()  # one that was complete, and whose grid grew
        return broadcast(self._checkpoint_of(run))

    def add(self, record: Record) -> None:
        """Store a row; the newest one is held back until it is known whether it is the last of its run."""
        self._flush()
        self._last = record | {"wall": round(self.seconds, 3)}

    def end(self, run: Run) -> None:
        """Mark a run as ended and drop its checkpoint."""
        if self._last is not None:
            self._last["ended"] = True
        self._flush()
        self._ended.add(key_of(run.key))
        self._saved = self.checkpoint_step = None
        self._directory.drop_checkpoint()

    def checkpoint(self, session: Session) -> None:
        """Save the state of the current run, unless the last time was too recent."""

        def save() -> None:
            broadcast(True)
            self._directory.save_checkpoint(session.checkpoint())

        self._flush()
        if self._throttle(save):
            self.checkpoint_step = session.step
        else:
            broadcast(False)

    def save_model(self, run: Run, model: nn.Module, save: Callable[[nn.Module, Path], None]) -> None:
        """Save a trained model under the name of its run."""
        self._directory.save_model(run.file_name, lambda path: save(model, path))

    def _checkpoint_of(self, run: Run) -> Checkpoint | None:
        return self._saved if self._saved is not None and key_of(self._saved.extra["run"]) == key_of(run.key) else None

    def _flush(self) -> None:
        if self._last is not None:
            self._directory.append([self._last])
            self._last = None


class NonWriter:
    """Store of every rank but 0: receives what rank 0 shares, and takes part in collectives."""

    checkpoint_step = None
    seconds = None

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Receive the runs that have not ended."""
        return broadcast(None)

    def begin(self, run: Run) -> Checkpoint | None:
        """Receive the checkpoint of an interrupted run."""
        return broadcast(None)

    def add(self, record: Record) -> None:
        """No-op: only rank 0 writes."""

    def end(self, run: Run) -> None:
        """No-op: only rank 0 writes."""

    def checkpoint(self, session: Session) -> None:
        """Take part in gathering the state, if rank 0 saves it."""
        if broadcast(None):
            session.checkpoint()

    def save_model(self, run: Run, model: nn.Module, save: Callable[[nn.Module, Path], None]) -> None:
        """No-op: only rank 0 writes."""


def _is_before(row: Record, interrupted: tuple[Any, ...] | None, saved: Checkpoint | None) -> bool:
    return saved is not None and key_of(row) == interrupted and row["step"] <= saved.step
