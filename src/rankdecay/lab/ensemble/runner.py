"""Trains ensembles side by side into a run directory, so that a kill at any moment loses what came since a checkpoint.

All ensembles advance to the same step, are evaluated there, and only then is the checkpoint replaced: whatever a
directory holds after a kill is consistent at one step. Writing checkpoints takes at most a twentieth of the time.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from rankdecay.lab.ensemble.ensemble import Ensemble, train_unless_stopped
from rankdecay.lab.ensemble.members import State
from rankdecay.lab.ensemble.outcome import diverged
from rankdecay.lab.progress import Progress
from rankdecay.lab.settings import Record
from rankdecay.lab.store import Checkpoint, RunDirectory, Throttle
from rankdecay.lab.stored import LABELS

Leaves = Callable[[Sequence[Record]], bool]
Measurement = tuple[list[Record], dict[str, np.ndarray]]


class Runner:
    """Trains ensembles from the checkpoint of the run directory to the last step.

    Args:
        run: the directory.
        ensembles: freshly built, at step 0.
        steps: how far to train.
        evaluate_every: steps between evaluations.
        leaves: given the records of one member so far, whether it leaves the batch. Diverged members always do.
    """

    def __init__(
        self,
        run: RunDirectory,
        ensembles: Sequence[Ensemble],
        *,
        steps: int,
        evaluate_every: int,
        leaves: Leaves = lambda records: False,
    ) -> None:
        self._run, self._ensembles = run, list(ensembles)
        self._steps, self._every, self._leaves = steps, evaluate_every, leaves
        self._history: dict[tuple[str, int], list[Record]] = {}
        self.step = 0
        self.seconds = 0.0
        self._throttle = Throttle()
        checkpoint = run.resume()
        if checkpoint:
            self._restore(checkpoint)

    @property
    def work(self) -> int:
        """Member-steps left if nobody leaves."""
        return (self._steps - self.step) * sum(len(e.members) for e in self._ensembles)

    def train(self, progress: Progress) -> list[Record]:
        """Train to the last step and return every record of the run."""
        self._start = time.monotonic() - self.seconds  # as if there had been no interruption
        if self.step == 0 and not self._history:
            self._advance(0, progress)
        while self.step < self._steps and any(e.members for e in self._ensembles):
            self._advance(min(self._every, self._steps - self.step), progress)
        return self._run.metrics()

    def _advance(self, steps: int, progress: Progress) -> None:
        """Train, evaluate and store every ensemble for one interval; let members leave and write a checkpoint."""
        snapshots = []
        running = [ensemble for ensemble in self._ensembles if ensemble.members]
        for ensemble, (records, arrays) in zip(running, self._measured(running, steps), strict=True):
            self.seconds = time.monotonic() - self._start
            for record in records:
                record["seconds"] = round(self.seconds, 3)
                self._history.setdefault((record["arm"], record["seed"]), []).append(record)
            self._run.append(records)
            snapshots.append(arrays)
            progress.update(records, steps * len(records))
            keep = [not self._is_finished(record) for record in records]
            if not all(keep):
                ensemble.retain(keep)
        self.step += steps
        progress.estimate()  # not before: the steps of later ensembles were made but not counted
        self._run.save_snapshot(self.step, _joined(snapshots))
        self._throttle(lambda: self._run.save_checkpoint(self._checkpoint()))

    def _measured(self, ensembles: Sequence[Ensemble], steps: int) -> Iterator[Measurement]:
        """Train and evaluate ensembles, several at once on a CPU; yield their measurements in order.

        An ensemble per core needs no barrier inside an operation, and its numbers do not depend on how many cores
        there are.
        """
        threads = torch.get_num_threads()
        at_once = min(threads, len(ensembles)) if ensembles[0].training.device == "cpu" else 1
        if at_once == 1:
            yield from (_train_and_evaluate(ensemble, steps, threading.Event()) for ensemble in ensembles)
            return
        stop = threading.Event()
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)) as pool:
            try:
                yield from pool.map(lambda ensemble: _train_and_evaluate(ensemble, steps, stop), ensembles)
            finally:
                stop.set()  # an interrupt must not wait for the interval to end

    def _is_finished(self, record: Record) -> bool:
        return diverged(record) or self._leaves(self._history[record["arm"], record["seed"]])

    def _checkpoint(self) -> Checkpoint:
        tensors, members = {}, []
        for ensemble in self._ensembles:
            for index, member in enumerate(ensemble.members):
                tensors |= ensemble.state(index).named(len(members))
                members.append([member.arm, member.seed])
        return Checkpoint(self.step, tensors, {"members": members, "seconds": self.seconds})

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step, self.seconds = checkpoint.step, checkpoint.extra["seconds"]
        left = {(arm, seed): number for number, (arm, seed) in enumerate(checkpoint.extra["members"])}
        for ensemble in self._ensembles:
            ensemble.retain([(m.arm, m.seed) in left for m in ensemble.members])
            for index, member in enumerate(ensemble.members):
                state = State.of(self.step, checkpoint.tensors, left[member.arm, member.seed])
                ensemble.restore(index, state)
        for record in self._run.metrics():
            self._history.setdefault((record["arm"], record["seed"]), []).append(record)


def _train_and_evaluate(ensemble: Ensemble, steps: int, stop: threading.Event) -> Measurement:
    """Train one ensemble for an interval and evaluate it; raise InterruptedError once ``stop`` is set."""
    start = time.monotonic()
    train_unless_stopped(ensemble, steps, stop)
    spent = (time.monotonic() - start) / (steps * len(ensemble.members)) if steps else None
    records, arrays = ensemble.evaluate()
    return [record | {"step_seconds": spent} for record in records], arrays


def _joined(snapshots: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the snapshots of several ensembles: rows are concatenated, labels are shared."""
    first = snapshots[0]
    return {k: first[k] if k in LABELS else np.concatenate([s[k] for s in snapshots]) for k in first}
