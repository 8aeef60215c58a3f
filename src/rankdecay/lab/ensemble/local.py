"""Runs the trials of a sweep on this machine: a thread per core of a CPU, one ensemble of many places on a GPU.

An ensemble per core needs no barrier inside an operation. Trials under way are saved now and then, so that a kill loses
little: what a thread holds is one file, written at most a twentieth of the time.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from rankdecay.lab.ensemble.members import State
from rankdecay.lab.ensemble.outcome import Key, Record
from rankdecay.lab.ensemble.sweep import Saved, SweepPlan, Trial, TrialQueue, train
from rankdecay.lab.store import Checkpoint, RunDirectory, Throttle

WAKE = 0.2  # seconds after which a waiting main thread looks for an interrupt


def rows(
    trials: Sequence[Trial], plan: SweepPlan, directory: RunDirectory, aliases: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Train trials and yield a row for each as it ends, continuing those that ``directory`` saw under way.

    Args:
        trials: to train.
        plan: what they share.
        directory: where trials under way are saved.
        aliases: older names of arms, with those of today.
    """
    workers = 1 if plan.training.device != "cpu" else min(torch.get_num_threads(), max(1, len(trials)))
    source, keys = TrialQueue(trials), {trial.key for trial in trials}
    saved = {key: state for key, state in read_saved(directory, aliases).items() if key in keys}
    stop, ended = threading.Event(), queue.SimpleQueue[Record]()

    def work(number: int) -> None:
        save = _Saver(directory, f"under_way-{number}", saved)
        for row in train(source, plan, stop=stop, saved=saved, after_interval=save):
            ended.put(row)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        futures = [pool.submit(work, number) for number in range(workers)]
        try:
            over = False
            while not over:
                over = all(
                    future.done() for future in futures
                )  # check before draining: a finished worker has queued its last row
                with contextlib.suppress(queue.Empty):
                    while True:
                        yield ended.get(timeout=0 if over else WAKE)
                for future in futures:
                    if future.done():
                        future.result()  # raises what the worker raised
        finally:
            stop.set()  # an interrupt must not wait for the sweep to end


class _Saver:
    """Saves the trials of one thread, rarely enough to cost little, and those that wait to be continued."""

    def __init__(self, directory: RunDirectory, name: str, waiting: dict[Key, Saved]) -> None:
        self._directory, self._name, self._waiting, self._throttle = directory, name, waiting, Throttle()

    def __call__(self, under_way: Callable[[], dict[Key, Saved]]) -> None:
        self._throttle(lambda: self._save(under_way()))

    def _save(self, under_way: dict[Key, Saved]) -> None:
        tensors, runs = {}, []
        for key, run in {**self._waiting, **under_way}.items():
            tensors |= run.state.named(len(runs))
            runs.append([key, run.state.step, run.initial_rank, run.records])
        self._directory.save_checkpoint(Checkpoint(0, tensors, {"runs": runs}), self._name)


def read_saved(directory: RunDirectory, aliases: Mapping[str, str] | None = None) -> dict[Key, Saved]:
    """Every trial that a directory saw under way, each at its furthest step."""
    found: dict[Key, Saved] = {}
    for path in sorted(directory.path.glob("under_way-*.safetensors")):
        checkpoint = directory.load_checkpoint(path.stem)
        if checkpoint is None:
            continue
        for number, ((arm, *place), step, rank, records) in enumerate(checkpoint.extra["runs"]):
            key: Key = (str((aliases or {}).get(arm, arm)), *place)
            state = State.of(step, checkpoint.tensors, number)
            before = found.get(key)
            if before is None or before.state.step < step:
                found[key] = Saved(state, rank, records)
    return found
