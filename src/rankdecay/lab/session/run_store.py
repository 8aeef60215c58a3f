"""What a directory holds of runs that follow one another, and where an interrupted one goes on."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from rankdecay.lab.experiments.attention.summary import key_of
from rankdecay.lab.session.distributed import share
from rankdecay.lab.session.session import Run, Session
from rankdecay.lab.store import Checkpoint, Rarely, Record, RunDirectory


class RunStore:
    """The runs of one directory, in the one process that writes; beside others, each of them has a `Follower`.

    Records of a run that has ended carry ``"ended": true`` in their last line; those of the run under way that came
    after its checkpoint are dropped when it goes on, because it writes them again.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        rows = directory.drop_damaged_line()
        self._ended = {key_of(row) for row in rows if row.get("ended")}
        self._saved = directory.load_checkpoint()
        if self._saved is not None and key_of(self._saved.extra["run"]) in self._ended:  # a kill came between the two
            self._saved = None
            directory.drop_checkpoint()
        under_way = None if self._saved is None else key_of(self._saved.extra["run"])
        kept = [row for row in rows if key_of(row) in self._ended or _is_before(row, under_way, self._saved)]
        if len(kept) < len(rows):
            directory.replace_metrics(kept)
        self._before = max((row["wall"] for row in kept), default=0.0)
        self._begun = time.monotonic()
        self._rarely = Rarely()
        self._last: Record | None = None
        self.checkpoint_step = None if self._saved is None else self._saved.step
        """The step of the checkpoint of the run under way, if it has one."""

    @property
    def seconds(self) -> float:
        """Wall time of the experiment, interruptions left out."""
        return self._before + time.monotonic() - self._begun

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs that have not ended, the one under way first."""
        left = [run_ for run_ in runs if key_of(run_.key) not in self._ended]
        return share(sorted(left, key=lambda run_: self._of(run_) is None))

    def begin(self, run_: Run) -> Checkpoint | None:
        """Where a run goes on, if it was interrupted."""
        return share(self._of(run_))

    def add(self, record: Record) -> None:
        """Stores an evaluation; the last of a run only with `end`, which says so in the same line."""
        self._flush()
        self._last = record | {"wall": round(self.seconds, 3)}

    def end(self, run_: Run) -> None:
        """The run is over."""
        if self._last is not None:
            self._last["ended"] = True
        self._flush()
        self._ended.add(key_of(run_.key))
        self._saved = self.checkpoint_step = None
        self._directory.drop_checkpoint()

    def checkpoint(self, session: Session) -> None:
        """Keeps the state of the run under way, if that has not just been done."""

        def keep() -> None:
            share(True)
            self._directory.save_checkpoint(session.checkpoint())

        self._flush()
        if self._rarely(keep):
            self.checkpoint_step = session.step
        else:
            share(False)

    def save_model(self, run_: Run, model: nn.Module, save: Callable[[nn.Module, Path], None]) -> None:
        """Keeps a trained model under a name that says which it is."""
        self._directory.save_model(run_.file_name, lambda path: save(model, path))

    def _of(self, run_: Run) -> Checkpoint | None:
        return self._saved if self._saved is not None and key_of(self._saved.extra["run"]) == key_of(run_.key) else None

    def _flush(self) -> None:
        if self._last is not None:
            self._directory.append([self._last])
            self._last = None


class Follower:
    """The store of a process that does not write: it learns what the first one has, and takes part where all must."""

    checkpoint_step = None

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """As the first process says."""
        return share(None)

    def begin(self, run_: Run) -> Checkpoint | None:
        """As the first process says."""
        return share(None)

    def add(self, record: Record) -> None:
        """Nothing."""

    def end(self, run_: Run) -> None:
        """Nothing."""

    def checkpoint(self, session: Session) -> None:
        """Its part of the state, if the first process keeps it."""
        if share(None):
            session.checkpoint()

    def save_model(self, run_: Run, model: nn.Module, save: Callable[[nn.Module, Path], None]) -> None:
        """Nothing."""


def _is_before(row: Record, under_way: tuple[Any, ...] | None, saved: Checkpoint | None) -> bool:
    return saved is not None and key_of(row) == under_way and row["step"] <= saved.step
