"""Trains many runs through a few places: when one has generalised, diverged or used its budget, the next moves in.

A *trial* is one run of a sweep: a member, the network and the data set it needs. `train` fills the places of an
ensemble from a source of trials of the same network, and yields a row for each trial that ends. It knows nothing of
where it runs: `ensemble.local` drives it in threads, `ensemble.cluster` in tasks on many machines. A member's
trajectory does not depend on its neighbours but for how batched products of another size round; nor, then, does a row
depend on which trials shared its places. In float64 that shows in no stored digit; in mixed precision a run near an
edge may come out otherwise.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from rankdecay.lab.ensemble.control import acted_at, decay_acts, memorised
from rankdecay.lab.ensemble.ensemble import Ensemble, train_unless_stopped
from rankdecay.lab.ensemble.members import Member, State, Training
from rankdecay.lab.ensemble.outcome import (
    FELL,
    FIGURES,
    KEY,
    LATER_FIGURES,
    MEMORISED,
    ROSE,
    Key,
    Record,
    diverged,
    first_step,
    steps_to_hold,
)
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.ensemble.yoked import norm_paths
from rankdecay.lab.tasks import make_dataset
from rankdecay.spectrum import spectrum

SPECTRUM_POINTS = 24  # singular values a row keeps, evenly spread over the logarithm of the index
CURVES = ("train_accuracy", "test_accuracy", "stable_rank", "query_norm")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        strength, train_fraction: its coordinates in the phase diagram; the member has arm, seed and rest decay.
        member: what is trained.
        config: its network; trials of one network share ensembles.
        data: arguments of `make_dataset` beside the seed.
        stays: train to the end of the budget even after generalising.
    """

    strength: float
    train_fraction: float
    member: Member
    config: TransformerConfig
    data: dict[str, Any] = field(hash=False)
    stays: bool = False

    @property
    def key(self) -> Key:
        """Unique key of the trial within the sweep."""
        return (self.member.arm, self.strength, self.member.rest_decay, self.train_fraction, self.member.seed)


@dataclass(frozen=True)
class SweepPlan:
    """Settings that all trials of a sweep share.

    Attributes:
        training: batch size, precision and device.
        budget: steps after which a run ends.
        evaluate_every: steps between evaluations; divides the budget, so that no run is measured at a step that
            depends on its neighbours.
        threshold: accuracy of the set that decides that counts as generalised when the next evaluation holds it.
        places: members trained at once by one ensemble.
    """

    training: Training
    budget: int
    evaluate_every: int
    threshold: float
    places: int


@dataclass(frozen=True)
class Saved:
    """Unfinished trial: its state at its last evaluation, and its evaluations so far."""

    state: State
    initial_rank: float
    records: list[Record]


class TrialQueue:
    """Queue of trials that wait to be trained, shared by the threads that train them."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[TransformerConfig, deque[Trial]] = {}
        for trial in trials:
            self._waiting.setdefault(trial.config, deque()).append(trial)

    def network(self) -> TransformerConfig | None:
        """The network with the most trials waiting, or None when none wait."""
        with self._lock:
            return max(self._waiting, key=lambda c: len(self._waiting[c]), default=None)

    def take(self, config: TransformerConfig) -> Trial | None:
        """The next trial of a network, removed from those waiting."""
        with self._lock:
            queue = self._waiting.get(config)
            if not queue:
                return None
            trial = queue.popleft()
            if not queue:
                del self._waiting[config]
            return trial


@dataclass
class _Run:
    """Trial that a place of an ensemble is training."""

    trial: Trial
    examples: int
    initial_rank: float
    records: list[Record]
    finished: bool = False


Intermission = Callable[[Callable[[], dict[Key, Saved]]], None]


def train(
    source: TrialQueue,
    plan: SweepPlan,
    *,
    stop: threading.Event | None = None,
    saved: dict[Key, Saved] | None = None,
    after_interval: Intermission = lambda states: None,
) -> Iterator[Record]:
    """Train trials until the source has none left, and yield the row of each as it ends.

    Args:
        source: of trials; others may take from it meanwhile.
        plan: what they share.
        stop: once set, gives up within a few steps by raising InterruptedError.
        saved: trials that were unfinished when an earlier sweep ended, to be continued.
        after_interval: called after each interval with a function that returns the unfinished trials.
    """
    saved = saved or {}
    while (config := source.network()) is not None:
        ensemble = Ensemble(config, [], [], plan.training)
        yield from _Places(ensemble, source, plan, stop or threading.Event(), saved).train(after_interval)


class _Places:
    """Ensemble whose places are refilled as their trials end."""

    def __init__(
        self, ensemble: Ensemble, source: TrialQueue, plan: SweepPlan, stop: threading.Event, saved: dict[Key, Saved]
    ) -> None:
        self._ensemble, self._source, self._plan, self._stop, self._saved = ensemble, source, plan, stop, saved
        self._runs: list[_Run] = []

    def train(self, after_interval: Intermission) -> Iterator[Record]:
        self._fill()
        while any(not run.finished for run in self._runs):
            train_unless_stopped(self._ensemble, self._plan.evaluate_every, self._stop)
            rows = self._evaluate()
            self._fill()
            after_interval(self._unfinished)
            yield from rows

    def _evaluate(self) -> list[Record]:
        """Measure every run, let schedules act, and return the rows of those that have ended."""
        records, arrays = self._ensemble.evaluate()
        rows = []
        for index, (run, record) in enumerate(zip(self._runs, records, strict=True)):
            if run.finished:
                continue
            had_memorised = memorised(run.records)
            run.records.append(record)
            if memorised(run.records) and not had_memorised:
                self._ensemble.truncate(index)
            if self._has_ended(run):
                run.finished = True
                sigma = arrays["singular_values"][index]
                whole = row(run.trial, run.records, run.initial_rank, sigma, self._plan)
                rows.append(whole | {"train_examples": run.examples})
        self._ensemble.schedule([self._decay_acts(run) for run in self._runs])
        return rows

    def _has_ended(self, run: _Run) -> bool:
        record = run.records[-1]
        generalised = steps_to_hold(run.records, self._plan.threshold) is not None
        return diverged(record) or record["step"] >= self._plan.budget or (generalised and not run.trial.stays)

    def _decay_acts(self, run: _Run) -> bool:
        generalised = steps_to_hold(run.records, self._plan.threshold) is not None
        return decay_acts(run.trial.member.control.schedule, run.records, generalised)

    def _fill(self) -> None:
        """Move waiting trials into the places of runs that have ended."""
        free = self._plan.places - sum(not run.finished for run in self._runs)
        taken = [trial for _ in range(free) if (trial := self._source.take(self._ensemble.config))]
        # A compiled step is made for one number of members: ended runs keep the places that nobody takes.
        ballast = free - len(taken) if self._plan.training.compile else 0
        ended = [index for index, run in enumerate(self._runs) if run.finished]
        leaving = set(ended[ballast:])
        if leaving:
            self._ensemble.retain([index not in leaving for index in range(len(self._runs))])
            self._runs = [run for index, run in enumerate(self._runs) if index not in leaving]
        if not taken:
            return
        first = len(self._runs)
        datasets = [make_dataset(seed=trial.member.seed, **trial.data) for trial in taken]
        self._ensemble.admit([trial.member for trial in taken], datasets, self._paths(taken))
        ranks = spectrum(self._ensemble.query_key[first:]).stable_rank.flatten(1).mean(1).tolist()
        for index, (trial, data, rank) in enumerate(zip(taken, datasets, ranks, strict=True), first):
            run = _Run(trial, len(data.train_targets), rank, [])
            before = self._saved.pop(trial.key, None)
            if before is not None:
                self._ensemble.restore(index, before.state)
                run.initial_rank, run.records = before.initial_rank, list(before.records)
            self._runs.append(run)
        self._ensemble.schedule([self._decay_acts(run) for run in self._runs])

    def _paths(self, trials: Sequence[Trial]) -> list[Tensor | None]:
        """The norms that yoked runs are given, of runs that are trained for them first."""
        yoked = [place for place, trial in enumerate(trials) if trial.member.control.yoked is not None]
        members, data = [trials[place].member for place in yoked], [trials[place].data for place in yoked]
        found = norm_paths(self._ensemble.config, members, data, self._plan.training, self._plan.budget, self._stop)
        paths: list[Tensor | None] = [None] * len(trials)
        for place, path in zip(yoked, found, strict=True):
            paths[place] = path
        return paths

    def _unfinished(self) -> dict[Key, Saved]:
        return {
            run.trial.key: Saved(self._ensemble.state(index), run.initial_rank, list(run.records))
            for index, run in enumerate(self._runs)
            if not run.finished and run.records
        }


def row(trial: Trial, records: Sequence[Record], initial_rank: float, sigma: np.ndarray, plan: SweepPlan) -> Record:
    """Row that a sweep stores of one run (``docs/reference/run-directory.md``).

    Args:
        trial: the run.
        records: its evaluations.
        initial_rank: mean stable rank of its queries and keys at step 0.
        sigma: singular values of its queries and keys at the end, ``(depth, 2, width)``.
        plan: of the sweep.
    """
    last = records[-1]
    steps = steps_to_hold(records, plan.threshold)
    control = trial.member.control
    accuracies = [r["test_accuracy"] for r in records if r["test_accuracy"] is not None]
    outcome = "generalised" if steps is not None else "diverged" if diverged(last) else "budget"
    curves = [*CURVES, *(["validation_accuracy"] if "validation_accuracy" in last else [])]
    index = np.unique(np.geomspace(1, sigma.shape[-1], SPECTRUM_POINTS).round().astype(int))
    largest = sigma[..., :1]
    relative = np.divide(sigma, largest, out=np.zeros_like(sigma), where=largest > 0).reshape(-1, sigma.shape[-1])
    spectrum_now = np.nan_to_num(relative).mean(0)[index - 1]
    return {
        **dict(zip(KEY, trial.key, strict=True)),
        "outcome": outcome,
        "steps_to_generalise": steps,
        "steps": last["step"],
        "budget": plan.budget,
        "best_test_accuracy": _short(max(accuracies, default=None)),
        **{name: _short(last[name]) for name in (*FIGURES, "decay_size")},
        **{name: _short(last[name]) for name in LATER_FIGURES if name in last},
        **({"acted_at": acted_at(control, records, steps)} if control.switches else {}),
        "memorised_at": first_step(records, "train_accuracy", above=MEMORISED),
        "rank_fell_at": first_step(records, "stable_rank", below=FELL * initial_rank) if initial_rank > 0 else None,
        "accuracy_rose_at": first_step(records, "test_accuracy", above=ROSE),
        "curve": {"step": [r["step"] for r in records], **{k: [_short(r[k]) for r in records] for k in curves}},
        "spectrum_index": index.tolist(),
        "spectrum": [_short(float(value)) for value in spectrum_now],
    }


def _short(value: float | None) -> float | None:
    """Round to four significant digits."""
    return None if value is None else float(f"{value:.4g}")
