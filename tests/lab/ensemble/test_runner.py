"""A run that is interrupted, killed or out of disk ends as if nothing had happened."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankdecay.decay.policy import LowRank
from rankdecay.lab import store
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Member, Training
from rankdecay.lab.ensemble.runner import Runner
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.errors import SettingError
from rankdecay.lab.progress import Progress
from rankdecay.lab.store import RunDirectory, read_metrics
from rankdecay.lab.tasks import make_dataset
from tests import needs
from tests.comparing import timeless
from tests.lab.disk import full_for
from tests.waiting import HANG

CONFIG = {"command": "test", "settings": {}, "arms": []}
NETWORK = TransformerConfig(6, 3, 5, width=8, depth=1, heads=2, mlp_width=8)
NONE = [Member("none", seed, None, 1.0) for seed in (0, 1)]
LOW_RANK = [Member("low_rank", seed, LowRank(5.0), 1.0) for seed in (0, 1)]
METRICS = (
    "step arm seed train_accuracy train_loss test_accuracy test_loss stable_rank effective_rank product_stable_rank "
    "product_effective_rank query_norm key_norm rest_norm decay_size radial_share tangential_share seconds"
)


def make_ensembles(*groups) -> list[Ensemble]:
    training = Training(batch_size=5, precision="float64")
    return [
        Ensemble(NETWORK, group, [make_dataset("add", m.seed, modulus=5) for m in group], training)
        for group in groups or (NONE, LOW_RANK)
    ]


class Watcher(Progress):
    """Silent progress that calls ``then(step)`` after every evaluation of an ensemble."""

    def __init__(self, then=lambda step: None) -> None:
        super().__init__("test", ["none", "low_rank"], quiet=True, to_stderr=True)
        self.then = then

    def update(self, records, member_steps) -> None:
        super().update(records, member_steps)
        self.then(records[0]["step"])


def run(path: Path, *groups, then=lambda step: None, steps=12, every=3, leaves=lambda records: False) -> list[dict]:
    with RunDirectory.open(path, CONFIG, print) as directory:
        runner = Runner(directory, make_ensembles(*groups), steps=steps, evaluate_every=every, leaves=leaves)
        return runner.train(Watcher(then))


def snapshots(path: Path) -> dict[int, dict[str, np.ndarray]]:
    return {int(p.stem): dict(np.load(p)) for p in sorted((path / "snapshots").glob("*.npz"))}


def assert_same_run(path: Path, expected: Path) -> None:
    assert timeless(read_metrics(path)) == timeless(read_metrics(expected))
    got, wanted = snapshots(path), snapshots(expected)
    assert got.keys() == wanted.keys()
    for step, arrays in wanted.items():
        assert got[step].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[step][name], array)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runner") / "whole"
    run(path)
    return path


def test_every_member_is_evaluated_at_every_interval(whole):
    records = read_metrics(whole)
    seen = [(r["step"], r["arm"], r["seed"]) for r in records]
    assert sorted(seen) == sorted((s, a, i) for s in (0, 3, 6, 9, 12) for a in ("none", "low_rank") for i in (0, 1))
    assert all(set(METRICS.split()) <= set(record) for record in records)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert set(snapshots(whole)) == {0, 3, 6, 9, 12}
    assert snapshots(whole)[3]["arms"].tolist() == ["none", "none", "low_rank", "low_rank"]


def test_a_last_interval_may_be_shorter(tmp_path):
    records = run(tmp_path / "run", NONE, steps=7, every=5)
    assert sorted({r["step"] for r in records}) == [0, 5, 7]


class Stop(Exception):
    """Raised in the middle of a run, as Ctrl-C is."""


@pytest.mark.parametrize("moment", range(1, 11))
def test_interrupted_and_continued_is_uninterrupted(whole, tmp_path, moment):
    """Ten evaluations of an ensemble, and a stop right after each: before its snapshot and checkpoint are stored."""
    evaluations = 0

    def stop(step):
        nonlocal evaluations
        evaluations += 1
        if evaluations == moment:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", then=stop)
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_with_rare_checkpoints_an_interrupted_run_still_ends_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 1e9)  # only the first evaluation is followed by one

    def stop(step):
        if step == 9:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", then=stop)
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_the_clock_goes_on_over_sessions(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECKPOINT_RARITY", 0)  # a checkpoint at every evaluation, however fast they come

    def stop(step):
        if step == 9:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", then=stop)
    before = [r["seconds"] for r in read_metrics(tmp_path / "run") if r["step"] <= 6]
    after = [r["seconds"] for r in run(tmp_path / "run")]
    assert after[: len(before)] == before
    assert after == sorted(after)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_line_cut_short_by_a_kill(whole, tmp_path, share):
    def cut(step):
        if step == 6:
            path = tmp_path / "run" / "metrics.jsonl"
            *lines, last = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines) + last[: int(share * len(last))])
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", then=cut)
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@needs.full_disk
@pytest.mark.parametrize("name", ["metrics.jsonl", "snapshots/00000006.npz", "checkpoint.safetensors"])
def test_a_full_disk_costs_nothing_that_was_stored(whole, tmp_path, monkeypatch, name):
    monkeypatch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)  # a checkpoint at each evaluation
    path = tmp_path / "run"
    with contextlib.ExitStack() as disk:

        def fill(step):
            if step != 3 or (path / "aside").exists():
                return
            if name == "metrics.jsonl":
                (path / name).rename(path / "aside")
                (path / name).symlink_to("/dev/full")
            else:
                disk.enter_context(full_for(path / f"{name}.partial"))

        with pytest.raises(SettingError) as error:
            run(path, then=fill)
    assert all(word in str(error.value) for word in ("disk is full", name, "free", "again"))
    assert "\n" not in str(error.value)
    if (path / "aside").exists():
        (path / name).unlink()
        (path / "aside").rename(path / name)
    assert timeless(read_metrics(path))[:4] == timeless(read_metrics(whole))[:4]
    run(path)
    assert_same_run(path, whole)


# --- members that leave -----------------------------------------------------------------------------------------


def early(records) -> bool:
    return records[-1]["arm"] == "none" and records[-1]["seed"] == 0 and records[-1]["step"] >= 3


def test_who_leaves_is_not_missed_and_who_stays_is_not_disturbed(whole, tmp_path):
    records = run(tmp_path / "run", leaves=early)
    expected = [r for r in read_metrics(whole) if (r["arm"], r["seed"]) != ("none", 0) or r["step"] <= 3]
    got = {(r["step"], r["arm"], r["seed"]): r for r in timeless(records)}
    assert len(got) == len(expected)
    for record in timeless(expected):
        same = got[record["step"], record["arm"], record["seed"]]
        for key, value in record.items():
            assert same[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), key
    assert snapshots(tmp_path / "run")[3]["seeds"].tolist() == [0, 1, 0, 1]
    assert snapshots(tmp_path / "run")[6]["seeds"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("when", [3, 6, 9])
def test_interrupted_after_someone_left(tmp_path, when):
    run(tmp_path / "whole", leaves=early)

    def stop(step):
        if step == when:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", leaves=early, then=stop)
    run(tmp_path / "run", leaves=early)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_ends_when_everyone_has_left(tmp_path):
    records = run(tmp_path / "run", leaves=lambda rows: rows[-1]["step"] >= 6)
    assert max(r["step"] for r in records) == 6


def test_an_ensemble_that_everyone_left_is_resumed_as_empty(tmp_path):
    def leaves(rows):
        return rows[-1]["arm"] == "none" and rows[-1]["step"] >= 3

    def stop(step):
        if step == 9:
            raise Stop

    run(tmp_path / "whole", leaves=leaves)
    with pytest.raises(Stop):
        run(tmp_path / "run", leaves=leaves, then=stop)
    run(tmp_path / "run", leaves=leaves)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert snapshots(tmp_path / "run")[12]["arms"].tolist() == ["low_rank", "low_rank"]


def test_a_member_that_diverges_leaves_and_its_records_stay_readable(whole, tmp_path):
    bad = replace(NONE[0], arm="bad", rest_decay=1e6, lr=1e6)
    records = run(tmp_path / "run", [NONE[0], bad, NONE[1]], LOW_RANK, steps=60, every=30)
    last = [r for r in records if r["arm"] == "bad"][-1]
    assert last["step"] < 60
    assert last["train_loss"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    others = [r for r in records if r["arm"] != "bad" and r["step"] == 60]
    assert len(others) == 4
    assert all(r["test_loss"] is not None for r in others)


# --- kill -9 at every file operation -----------------------------------------------------------------------------

TINY = (
    "grok --task add --modulus 5 --steps 4 --evaluate-every 2 --seeds 1 --batch-size 8 --width 8 --arms low_rank "
    "--precision float32 --device cpu --quiet"
)
KILLS = """
import os, signal, sys
from rankdecay import cli
import rankdecay.lab.experiment

out, command = sys.argv[1], sys.argv[2:]
rankdecay.lab.experiment.write_report = lambda directory: None  # slow; its interruption has its own test
WRITING = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"}


def session(path, fatal):
    '''Runs the command in a child that is killed before its fatal-th file operation; returns its wait status.'''
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event not in WRITING or not str(arguments[0]).startswith(path):
            return
        if event == "open" and not isinstance(arguments[1], str):
            return
        if event == "open" and arguments[1] in ("r", "rb"):
            return
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    os._exit(cli.main([*command, "--out", path]))


assert cli.main([*command, "--out", out + "/whole"]) == 0  # not in a child: whatever is imported, is so for all
fatal = 0
while True:
    fatal += 1
    path = f"{out}/{fatal}"
    status = session(path, fatal)
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert session(path, None) == 0, fatal
print(fatal)
"""


@needs.fork
def test_killed_before_any_one_of_its_file_operations_a_run_ends_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), *TINY.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a forked child has no worker threads to wait for
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout) - 1
    assert kills > 15
    expected = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for fatal in range(1, kills + 1):
        path = tmp_path / str(fatal)
        assert_same_run(path, tmp_path / "whole")
        summary = json.loads((path / "summary.json").read_text())
        for arm, wanted in zip(summary["arms"], expected["arms"], strict=True):
            assert timeless([arm | {"steps_per_second": 0}]) == timeless([wanted | {"steps_per_second": 0}])
        left = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.suffix != ".npz"}
        assert left == {".lock", "config.json", "metrics.jsonl", "summary.json"}, fatal
