"""A sweep on one machine: the rows of `sweep.train`, from threads, after a kill, and not after a failure."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rankdecay.decay.policy import LowRank
from rankdecay.lab import store
from rankdecay.lab.ensemble import local, sweep
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Member, Training
from rankdecay.lab.ensemble.outcome import key_of
from rankdecay.lab.ensemble.sweep import SweepPlan, Trial, TrialQueue
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.errors import SettingError
from rankdecay.lab.store import RunDirectory
from tests.lab.disk import full_for
from tests.waiting import HANG, no_hang

NETWORK = TransformerConfig(6, 3, 5, width=8, depth=1, heads=2, mlp_width=16)
PLAN = SweepPlan(Training(batch_size=10, precision="float64"), budget=80, evaluate_every=20, threshold=0.95, places=2)
DATA = {"task": "add", "modulus": 5, "split": "ordered", "train_fraction": 0.8}
DECAYS = {"none": None, "prox": LowRank(10.0)}
TRIALS = [
    Trial(1.0, 0.8, Member(arm, seed, decay, 1.0, lr=1e-2), NETWORK, DATA)
    for seed in (0, 1, 2)
    for arm, decay in DECAYS.items()
]
CONFIG = {"command": "boundary", "settings": {}, "arms": []}


def opened(path: Path) -> RunDirectory:
    return RunDirectory.open(path, CONFIG, print)


def by_key(rows) -> dict:
    rows = [json.loads(json.dumps(row)) for row in rows]
    assert max(Counter(map(key_of, rows)).values(), default=1) == 1
    return {key_of(row): row for row in rows}


def assert_same_rows(got: dict, expected: dict) -> None:
    """Integers and text exactly, numbers within what another number of neighbours may change."""
    assert got.keys() == expected.keys()
    for key, wanted in expected.items():
        for name, value in wanted.items():
            if name == "curve":
                for column, values in value.items():
                    assert got[key][name][column] == pytest.approx(values, rel=2e-3), (key, column)
            elif isinstance(value, float) or name == "spectrum":
                assert got[key][name] == pytest.approx(value, rel=2e-3, abs=1e-6), (key, name)
            else:
                assert got[key][name] == value, (key, name)


@pytest.fixture(scope="module")
def expected() -> dict:
    rows = by_key(sweep.train(TrialQueue(TRIALS), PLAN))
    assert len(rows) == len(TRIALS)
    return rows


@pytest.fixture
def directory(tmp_path):
    with opened(tmp_path / "run") as found:
        yield found


def under_way(directory: RunDirectory) -> list[str]:
    return sorted(path.name for path in directory.path.glob("under_way-*"))


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_those_of_a_plain_sweep(directory, expected, threads, workers):
    threads(workers)
    assert_same_rows(by_key(local.rows(TRIALS, PLAN, directory)), expected)
    assert torch.get_num_threads() == workers, "the threads of whoever asked are left alone"
    assert under_way(directory) == [f"under_way-{n}.safetensors" for n in range(workers)]
    directory.finish({})
    assert under_way(directory) == []


def test_no_trials_are_no_rows(directory):
    assert list(local.rows([], PLAN, directory)) == []


def test_more_threads_than_trials(directory, expected, threads):
    threads(3)
    rows = by_key(local.rows(TRIALS[:2], PLAN, directory))
    assert_same_rows(rows, {t.key: expected[t.key] for t in TRIALS[:2]})
    assert len(under_way(directory)) <= 2


# --- interrupted and continued ---------------------------------------------------------------------------------------


def counted(monkeypatch) -> list[int]:
    trained: list[int] = []
    original = Ensemble.train

    def spy(self, steps):
        trained.append(steps * len(self.members))
        original(self, steps)

    monkeypatch.setattr(Ensemble, "train", spy)
    return trained


def interrupt(directory: RunDirectory, monkeypatch, calls: int) -> dict:
    """Rows that ended before the machine failed in a call of `Ensemble.train`."""
    ended, seen, original = [], 0, Ensemble.train

    def fail(self, steps):
        nonlocal seen
        seen += 1
        if seen == calls:
            raise OSError("the machine fails")
        original(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Ensemble, "train", fail)
        with pytest.raises(OSError, match="the machine fails"):
            ended.extend(local.rows(TRIALS, PLAN, directory))
    return by_key(ended)


@pytest.mark.parametrize("calls", [1, 4, 12])
def test_what_was_under_way_is_continued(directory, expected, monkeypatch, calls):
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 0)
    ended = {}
    stopped = interrupt(directory, monkeypatch, calls)
    ended |= stopped
    saved = local.read_saved(directory)
    steps = sum(state.state.step for key, state in saved.items() if key not in ended)
    assert (steps > 0) == (calls > 2)
    trained = counted(monkeypatch)
    rest = [t for t in TRIALS if t.key not in ended]
    ended |= by_key(local.rows(rest, PLAN, directory))
    assert_same_rows(ended, expected)
    assert sum(trained) == PLAN.budget * len(rest) - steps


def test_interrupted_twice_nothing_saved_is_lost(directory, expected, monkeypatch):
    """The second session has one place: the states it has not come to yet are saved along."""
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 0)
    wide = replace(PLAN, places=6)
    stop = threading.Event()
    save = local._Saver(directory, "under_way-0", {})

    def first_interval(states):
        save(states)
        stop.set()

    with pytest.raises(InterruptedError):
        list(sweep.train(TrialQueue(TRIALS), wide, stop=stop, after_interval=first_interval))
    assert [s.state.step for s in local.read_saved(directory).values()] == [20] * 6
    with monkeypatch.context() as patch:
        patch.setattr(Ensemble, "train", lambda *_: (_ for _ in ()).throw(OSError("at once")))
        with pytest.raises(OSError, match="at once"):
            list(local.rows(TRIALS, replace(PLAN, places=1), directory))
    calls, original = 0, Ensemble.train

    def fail(self, steps):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("later")
        original(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Ensemble, "train", fail)
        with pytest.raises(OSError, match="later"):
            list(local.rows(TRIALS, replace(PLAN, places=1), directory))
    assert sorted(s.state.step for s in local.read_saved(directory).values()) == [20] * 5 + [40]
    assert_same_rows(by_key(local.rows(TRIALS, wide, directory)), expected)


KILLED = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_local as t
from rankdecay.lab import store
from rankdecay.lab.ensemble import local
from rankdecay.lab.ensemble.ensemble import Ensemble

t.torch.set_num_threads(2)
store.CHECKPOINT_RARITY = 0
calls, original = 0, Ensemble.train

def train(self, steps):
    global calls
    calls += 1
    if calls == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, steps)

Ensemble.train = train
with t.opened(Path(sys.argv[2])) as directory:
    for row in local.rows(t.TRIALS, t.PLAN, directory):
        directory.append([row])
"""


def test_killed_and_continued_is_uninterrupted(tmp_path, expected, monkeypatch):
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with opened(path) as directory:
        ended = by_key(directory.drop_damaged_line())
        saved = local.read_saved(directory)
        steps = sum(state.state.step for key, state in saved.items() if key not in ended)
        assert steps > 0
        trained = counted(monkeypatch)
        rest = [t for t in TRIALS if t.key not in ended]
        assert_same_rows(ended | by_key(local.rows(rest, PLAN, directory)), expected)
        assert sum(trained) == PLAN.budget * len(rest) - steps


def test_a_saved_state_comes_back_as_it_was(directory):
    stop, kept = threading.Event(), {}
    save = local._Saver(directory, "under_way-0", {})

    def after(states):
        kept.update(states())
        save(states)
        stop.set()

    with pytest.raises(InterruptedError):
        list(sweep.train(TrialQueue(TRIALS), PLAN, stop=stop, after_interval=after))
    found = local.read_saved(directory)
    assert found.keys() == kept.keys() == {t.key for t in TRIALS[:2]}
    for key, saved in kept.items():
        assert (found[key].initial_rank, found[key].records) == (saved.initial_rank, saved.records)
        assert found[key].state.step == saved.state.step == 20
        for name in ("weights", "mean", "square"):
            assert torch.equal(getattr(found[key].state, name), getattr(saved.state, name))


def test_of_several_states_of_a_trial_the_furthest_counts(directory):
    assert local.read_saved(directory) == {}
    for number, step in enumerate((40, 60, 20)):
        state = sweep.State(step, *(torch.full((3,), float(step)) for _ in range(3)))
        saved = {TRIALS[0].key: sweep.Saved(state, 1.0, [{"step": step}])}
        local._Saver(directory, f"under_way-{number}", {})(lambda saved=saved: saved)
    (found,) = local.read_saved(directory).values()
    assert (found.state.step, found.records) == (60, [{"step": 60}])
    assert found.state.weights.tolist() == [60.0] * 3


def test_states_of_trials_nobody_asks_for_are_ignored(directory, expected, monkeypatch):
    """Of those that have a row already, or belong to arms that were left out this time."""
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 0)
    interrupt(directory, monkeypatch, 4)
    saved = local.read_saved(directory)
    assert saved
    others = [t for t in TRIALS if t.key not in saved]
    trained = counted(monkeypatch)
    rows = by_key(local.rows(others, PLAN, directory))
    assert_same_rows(rows, {t.key: expected[t.key] for t in others})
    assert sum(trained) == PLAN.budget * len(others)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "foreign"])
def test_a_damaged_state_is_one_clear_error(directory, monkeypatch, damage):
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 0)
    interrupt(directory, monkeypatch, 4)
    path = directory.path / "under_way-0.safetensors"
    whole = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save

        whole = save({"a": torch.zeros(2)})  # a sound file of something else
    path.write_bytes({"cut": whole[:-9], "empty": b"", "noise": b"\x00\xff" * 99, "foreign": whole}[damage])
    with pytest.raises(SettingError) as error:
        list(local.rows(TRIALS, PLAN, directory))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in (str(path), "damaged", "remove it", "--out"))


def test_states_are_saved_rarely_enough_to_cost_little(directory, monkeypatch):
    clock, written = [100.0], []

    def write(checkpoint, name):
        written.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(directory, "save_checkpoint", write)
    monkeypatch.setattr(store.time, "monotonic", lambda: clock[0])
    save = local._Saver(directory, "under_way-0", {})
    for _ in range(1000):
        save(dict)
        clock[0] += 0.1
    assert 0.5 * len(written) <= 0.06 * (clock[0] - 100)
    assert len(written) > 5
    assert written[0] == 100.0, "the first soon, so that an early kill loses little"


# --- failures and the end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("calls", [1, 5])
def test_an_exception_of_a_worker_surfaces(directory, monkeypatch, threads, workers, calls):
    threads(workers)
    before = threading.active_count()
    interrupt(directory, monkeypatch, calls)
    assert threading.active_count() == before


def test_a_full_disk_is_reported_as_such(directory):
    partial = directory.path / "under_way-0.safetensors.partial"
    with full_for(partial), pytest.raises(SettingError, match="disk is full"):
        list(local.rows(TRIALS, PLAN, directory))


@pytest.mark.parametrize("workers", [1, 2])
def test_closing_stops_the_threads_in_the_middle_of_their_runs(directory, threads, workers):
    threads(workers)
    endless = replace(PLAN, budget=10**7)
    short = replace(TRIALS[0], member=replace(TRIALS[0].member, lr=1e30))  # diverges, which is one row
    rows = local.rows([short, *TRIALS[1:]], endless, directory)
    assert next(rows)["outcome"] == "diverged"
    alive = threading.active_count()
    with no_hang():
        rows.close()
    assert threading.active_count() == alive - workers


def test_an_interrupt_stops_the_threads_and_what_was_saved_is_continued(directory, expected, monkeypatch):
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 0)
    before, ended = threading.active_count(), []

    def take_one() -> None:
        for row in local.rows(TRIALS, PLAN, directory):
            ended.append(row)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_one()
    assert threading.active_count() == before
    known = by_key(ended)
    rest = [t for t in TRIALS if t.key not in known]
    assert_same_rows(known | by_key(local.rows(rest, PLAN, directory)), expected)
