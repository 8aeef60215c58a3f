"""Runs the trials of a sweep over a Ray cluster: tasks of a few trials each, which stream their rows back.

Only the driver sees rows, so one process writes the store. A task whose worker or machine is lost is submitted again
with those of its trials that have no row yet. That is done here and not by Ray, whose own retry would train the others
again, and tells rows apart by their position, which another processor's last digits can change.
"""

import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from rankdecay.lab.ensemble.outcome import Record, key_of
from rankdecay.lab.ensemble.sweep import SweepPlan, Trial, TrialQueue, train
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.errors import SettingError
from rankdecay.lab.machine import available_cpus

LOSSES = 5  # times that a task may lose its worker without a new row, before its trials are to blame
ROUNDS = 8  # a task has at most this many times the places of its ensemble: it is pickled, and waits for its last run
TASKS_PER_SLOT = {"cpu": 4, "cuda": 1}  # a CPU wants balance, a GPU full ensembles
SUBMITTED_PER_SLOT = 2  # tasks the cluster knows of: those that run, and their successors
WAKE = 1.0  # seconds after which a waiting driver looks for an interrupt
CONNECT = 30.0  # seconds that a machine far away has to answer; one where nothing listens refuses at once
MEMORY = 100 * 2**20  # bytes of object store of a Ray started here: a row has a few thousand
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no report to Ray's makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do anyway, and warns about until told
}


@dataclass
class _Task:
    """Trials of one network that are trained together, less those that have ended."""

    trials: list[Trial]
    losses: int = 0  # of its worker since its last row


def rows(
    trials: Sequence[Trial], plan: SweepPlan, address: str, gpu_share: float, notice: Callable[[str], None]
) -> Iterator[Record]:
    """Train trials on a cluster and yield a row for each as it ends.

    Args:
        trials: to train.
        plan: what they share.
        address: of the cluster: ``auto``, ``host:port``, or ``local`` to start one on this machine. A connection that
            this process has is used as it is.
        gpu_share: of a GPU that each task takes, when the plan's device is one.
        notice: receives a line when a worker is lost.

    Raises:
        SettingError: Without Ray, for a cluster that cannot be reached or lacks what the plan needs, or for trials
            that lose one worker after another. An error in a task is raised as what it was there.
    """
    with _connected(address) as ray:
        yield from _Cluster(ray, address, plan, gpu_share, notice).rows(trials)


def tasks(trials: Sequence[Trial], plan: SweepPlan, slots: int) -> list[list[Trial]]:
    """Split trials into tasks of one network each, in the order of their first trials.

    Args:
        trials: in the order in which to start them.
        plan: what they share.
        slots: tasks that run at once.
    """
    size = math.ceil(len(trials) / (slots * TASKS_PER_SLOT[_kind(plan)]))
    size = min(size, ROUNDS * plan.places)
    ordered: list[list[Trial]] = []
    last: dict[TransformerConfig, list[Trial]] = {}
    for trial in trials:
        if len(last.get(trial.config, ())) in (0, size):
            last[trial.config] = []
            ordered.append(last[trial.config])
        last[trial.config].append(trial)
    return ordered


def _kind(plan: SweepPlan) -> str:
    return plan.training.device.partition(":")[0]


def _train(trials: list[Trial], plan: SweepPlan) -> Iterator[Record]:
    """Train the trials of a task in the worker."""
    if plan.training.device == "cpu":
        torch.set_num_threads(1)
    for row in train(TrialQueue(trials), plan):  # noqa: UP028 - Ray sends values, which `yield from` would pass on
        yield row


class _Cluster:
    """Queue of tasks, those that run on the cluster and those that wait."""

    def __init__(
        self, ray: ModuleType, address: str, plan: SweepPlan, gpu_share: float, notice: Callable[[str], None]
    ) -> None:
        self._ray, self._address, self._gpu_share, self._notice = ray, address, gpu_share, notice
        self._gpu = _kind(plan) == "cuda"
        # Ray shows a task its own GPU alone, whatever number that has on its machine.
        self._plan = replace(plan, training=replace(plan.training, device=_kind(plan)))
        lost = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError")
        self._lost = tuple(getattr(ray.exceptions, name) for name in lost)
        options = {"num_cpus": 1, "num_gpus": gpu_share if self._gpu else 0, "max_retries": 0}
        self._train = ray.remote(**options, num_returns="streaming")(_train)
        self._waiting: deque[_Task] = deque()
        self._running: dict[Any, _Task] = {}  # by Ray's generator of their rows

    def rows(self, trials: Sequence[Trial]) -> Iterator[Record]:
        """Train trials, and yield their rows."""
        slots = self._slots()
        if slots == 0:
            cause = "has no GPU: use `device` cpu, or add" if self._gpu else "has no CPU: add"
            raise SettingError(f"`ray` {self._address}: the cluster {cause} a machine with 'ray start --address=...'")
        self._waiting.extend(map(_Task, tasks(trials, self._plan, slots)))
        try:
            self._submit(slots)
            while self._running:
                ready, _ = self._ray.wait(list(self._running), timeout=WAKE)
                for stream in ready:
                    row = self._next(stream)
                    if row is not None:
                        yield row
        finally:
            for stream in self._running:
                self._ray.cancel(stream, force=True)

    def _slots(self) -> int:
        """Number of tasks that the cluster can run at once."""
        resources = self._ray.cluster_resources()
        return int(resources.get("GPU", 0)) * int(1 / self._gpu_share) if self._gpu else int(resources.get("CPU", 0))

    def _submit(self, slots: int) -> None:
        while self._waiting and len(self._running) < SUBMITTED_PER_SLOT * max(1, slots):
            task = self._waiting.popleft()
            self._running[self._train.remote(task.trials, self._plan)] = task

    def _next(self, stream: Any) -> Record | None:
        """Take the row that a task has ready; None if the task has ended or was lost."""
        task = self._running[stream]
        try:
            row = self._ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            self._submit(self._slots())
            return None
        except self._ray.exceptions.RayTaskError as error:
            if "failed to import on the worker" not in str(error.cause):
                raise error.cause from error
            raise SettingError(
                f"`ray` {self._address}: a machine of the cluster cannot import rankdecay: install the same version "
                "there, in the Python that runs Ray"
            ) from error
        except self._lost as error:
            del self._running[stream]
            self._again(task, error)
            return None
        except self._ray.exceptions.RayError as error:
            reason = str(error).partition("\n")[0]
            raise SettingError(f"`ray` {self._address}: {reason}; the same command continues the sweep") from error
        left = [trial for trial in task.trials if trial.key != key_of(row)]
        if len(left) == len(task.trials):
            return None
        task.trials, task.losses = left, 0
        return row

    def _again(self, task: _Task, error: Exception) -> None:
        """Queue the rest of a lost task again."""
        task.losses += 1
        what = f"{len(task.trials)} unfinished run{'s' if len(task.trials) > 1 else ''}"
        name = type(error).__name__
        if task.losses > LOSSES:
            raise SettingError(
                f"`ray` {self._address}: {what} lost {task.losses} workers in a row ({name}): if their memory does "
                "not suffice, lower `places`; the same command continues the sweep"
            ) from error
        if task.trials:
            self._notice(f"Ray: a worker was lost ({name}); its {what} will be trained again")
            self._waiting.appendleft(task)
        self._submit(self._slots())


@contextmanager
def _connected(address: str) -> Iterator[ModuleType]:
    """Connect to Ray; close the connection at the end, and stop a Ray started here.

    Raises:
        SettingError: Without Ray, or if no connection can be made.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
        from ray._private import worker
    except ImportError:
        raise SettingError(f"`ray` {address} needs the package: pip install 'rankdecay[ray]'") from None
    if address not in ("local", "auto"):
        _check(address)
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        quiet |= {"include_dashboard": False, "num_cpus": available_cpus(), "object_store_memory": MEMORY}
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        if address == "local":
            raise SettingError(f"`ray` local: Ray did not start here ({reason}): try without `ray`") from error
        remedy = "start one with 'ray start --head', or use `ray` local"
        if address != "auto":
            remedy = "run on a machine of the cluster; if it asks for a token, set RAY_AUTH_MODE=token"
        raise SettingError(f"`ray` {address}: no connection to a cluster ({reason}): {remedy}") from error
    # Without this Ray prints pages on standard output, where --json promises one object, when a machine is lost.
    worker._worker_logs_enabled = False
    try:
        yield ray
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Refuse an address where no cluster answers, which Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise SettingError(f"`ray` {address} is not an address: give local, auto or host:port, such as 10.0.0.1:6379")
    remedy = "give the address that 'ray start --head' printed, or `ray` local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(f"`ray` {address}: nothing answers there ({reason}): {remedy}") from None
