"""Runs that follow one another in one directory: what is kept, dropped and done again after an interruption."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rankdecay.decay.policy import Frobenius
from rankdecay.lab.session.run_store import RunStore
from rankdecay.lab.session.session import Plan, Run, Session
from rankdecay.lab.store import Checkpoint, RunDirectory
from tests.lab.tiny import Repeat, save

CONFIG = {"command": "language", "settings": {}, "arms": []}
DECAYS = {"query_key": Frobenius(0.1)}
FIRST, SECOND, THIRD = (Run("l2", strength, 0.1, False, 0, DECAYS) for strength in (0.0, 0.1, 1.0))


@pytest.fixture
def directory(tmp_path):
    with RunDirectory.open(tmp_path / "run", CONFIG, print) as opened:
        yield opened


def record(run: Run, step: int) -> dict:
    return {**run.key, "step": step, "loss": 1.0 / (step + 1)}


def steps(directory: RunDirectory) -> list[tuple]:
    return [(row["strength"], row["step"], row.get("ended", False)) for row in directory.metrics()]


def checkpoint(run: Run, step: int) -> Checkpoint:
    return Checkpoint(step, {"model.w": torch.ones(2)}, {"run": run.key})


def test_the_last_record_of_a_run_says_that_it_ended(directory):
    store = RunStore(directory)
    for step in (0, 10, 20):
        store.add(record(FIRST, step))
    store.end(FIRST)
    store.add(record(SECOND, 0))
    assert steps(directory) == [(0.0, 0, False), (0.0, 10, False), (0.0, 20, True)]
    assert store.missing([FIRST, SECOND, THIRD]) == [SECOND, THIRD]
    walls = [row["wall"] for row in directory.metrics()]
    assert walls == sorted(walls)


def test_an_interrupted_run_goes_on_first_and_loses_what_came_after_its_checkpoint(directory):
    rows = [record(FIRST, 20) | {"ended": True}, *(record(THIRD, step) for step in (0, 10, 20))]
    directory.append([row | {"wall": float(i)} for i, row in enumerate(rows)])
    directory.save_checkpoint(checkpoint(THIRD, 10))
    store = RunStore(directory)
    assert steps(directory) == [(0.0, 20, True), (1.0, 0, False), (1.0, 10, False)]
    assert store.missing([FIRST, SECOND, THIRD]) == [THIRD, SECOND]
    assert store.begin(SECOND) is None
    saved = store.begin(THIRD)
    assert saved is not None
    assert saved.step == store.checkpoint_step == 10
    assert 2.0 <= store.seconds < 3.0 + 2.0  # from the last row that was kept on
    store.end(THIRD)
    assert store.checkpoint_step is None
    assert directory.load_checkpoint() is None


def test_a_run_without_a_checkpoint_begins_again(directory):
    directory.append([record(FIRST, 0) | {"wall": 0.0}, record(FIRST, 10) | {"wall": 1.0}])
    store = RunStore(directory)
    assert directory.metrics() == []
    assert store.missing([FIRST]) == [FIRST]
    assert store.begin(FIRST) is None


def test_the_checkpoint_of_a_run_that_ended_is_removed(directory):
    """A kill may come after the last record and before the checkpoint is dropped."""
    directory.append([record(FIRST, 20) | {"ended": True, "wall": 1.0}])
    directory.save_checkpoint(checkpoint(FIRST, 10))
    store = RunStore(directory)
    assert directory.load_checkpoint() is None
    assert store.checkpoint_step is None
    assert store.missing([FIRST, SECOND]) == [SECOND]
    assert steps(directory) == [(0.0, 20, True)]


def test_a_line_cut_short_makes_its_run_go_on(directory):
    directory.append([record(FIRST, 10) | {"wall": 1.0}])
    directory.save_checkpoint(checkpoint(FIRST, 10))
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(FIRST, 20) | {"wall": 2.0, "ended": True})[:-5])
    store = RunStore(directory)
    assert steps(directory) == [(0.0, 10, False)]
    assert store.missing([FIRST]) == [FIRST]


def test_checkpoints_are_rare_and_follow_their_records(directory):
    store = RunStore(directory)
    session = Session(FIRST, Repeat(), Plan(steps=4, batch_size=8, lr=1e-2))
    store.add(session.evaluate())
    start = time.monotonic()
    store.checkpoint(session)
    took = time.monotonic() - start
    assert start < store._throttle.due <= start + 21 * took
    store._throttle.due += 3600  # a busy machine may take longer than that for what follows
    path = directory.path / "checkpoint.safetensors"
    written = path.stat().st_mtime_ns
    assert steps(directory) == [(0.0, 0, False)]
    for _ in session.train(1):
        pass
    store.add(session.evaluate())
    store.checkpoint(session)  # too soon, but the record is there
    assert path.stat().st_mtime_ns == written
    assert store.checkpoint_step == 0
    assert steps(directory) == [(0.0, 0, False), (0.0, 1, False)]
    store._throttle.due = time.monotonic()
    store.checkpoint(session)
    saved = directory.load_checkpoint()
    assert saved is not None
    assert saved.step == store.checkpoint_step == 1
    again = RunStore(directory)
    assert again.begin(FIRST) is not None
    assert again.missing([SECOND, FIRST]) == [FIRST, SECOND]


def test_models_are_named_after_their_runs(directory):
    store = RunStore(directory)
    model = Repeat().model(0, False)
    store.save_model(THIRD, model, save)
    store.save_model(Run("low_rank", 0.25, None, True, 3, DECAYS), model, save)
    assert sorted(p.name for p in (directory.path / "models").iterdir()) == [
        "l2_1_mlp_0.1_seed_0",
        "low_rank_0.25_qk_norm_seed_3",
    ]
    assert [p.name for p in (directory.path / "models" / "l2_1_mlp_0.1_seed_0").iterdir()] == ["model.safetensors"]
