"""`benchmarks/accelerators.py`: equal grids, whole runs of a tiny protocol, and a report of what is there."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import accelerators
import tuning

from rankdecay.lab.experiments.boundary.arms import every_arm

TINY = accelerators.protocol_of("selection", None, tiny=True)


def test_every_arm_is_given_as_many_settings():
    counts = {}
    for arm, grid in accelerators.GRIDS.items():
        first = {(strength, accelerators.SPACE.first(arm, strength)) for strength in grid or (0.0,)}
        strength = grid[2] if grid else 0.0  # the number is the same whichever is best
        counts[arm] = len(first | {(strength, rest) for rest in accelerators.SPACE.then(arm, strength)})
    assert set(counts.values()) == {9}, counts
    for grid in accelerators.GRIDS.values():
        assert {b / a for a, b in pairwise(grid)} <= {2.0}


def test_arms_can_be_made_of_both_tasks_and_are_what_they_are_called():
    for task in accelerators.PROTOCOLS:
        protocol = accelerators.protocol_of(task, None, tiny=False)
        assert {(100 <= seed < 200) for seed in protocol.tune_seeds} == {True}
        assert min(protocol.test_seeds) >= 200
        known = every_arm(protocol.settings())
        for arm, grid in accelerators.GRIDS.items():
            strength = grid[0] if grid else 0.0
            rest = accelerators.SPACE.first(arm, strength)
            one = tuning.trial(protocol, arm, strength, rest, protocol.tune_sizes[0], 100)
            assert one.key[:3] == (arm, strength, rest)
            assert one.data["task"] == task
            assert one.member.accelerator == known[arm].how.treat(strength).accelerator
            assert (one.member.accelerator is not None) == (arm in (*accelerators.ACCELERATORS, *accelerators.OF_MUON))
    assert accelerators.protocol_of("add", None, tiny=False).modulus == 97
    assert accelerators.protocol_of("add", 31, tiny=False).modulus == 31


def holm_of_nine(ps: list[float]) -> list[float]:
    """Holm over nine contrasts of which two are there: the others come last."""
    smaller, larger = sorted(ps)
    adjusted = {smaller: min(1.0, 9 * smaller)}
    adjusted[larger] = max(adjusted[smaller], min(1.0, 8 * larger))
    return [adjusted[p] for p in ps]


@pytest.fixture
def few(monkeypatch):
    """Three arms at three strengths each."""
    grids = {"learning_rate": (0.01, 0.02), "grokfast_ema": (1.0, 2.0), "none": ()}
    monkeypatch.setattr(accelerators, "GRIDS", grids)
    monkeypatch.setattr(accelerators, "SPACE", tuning.Space(grids, rests=(0.0, 2.0), own_rests={"none": (0.0,)}))
    monkeypatch.setattr(tuning, "WIDENINGS", 0)


def test_the_stages_one_after_another(few, tmp_path, capsys):
    held = accelerators.tune(TINY, tmp_path, "cpu")["arms"]
    assert list(held) == ["learning_rate", "grokfast_ema", "none"]
    accelerators.test(TINY, tmp_path, "cpu")
    rows = [json.loads(line) for line in (tmp_path / "test" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(TINY.test_seeds)
    assert {row["steps"] for row in rows} == {TINY.test_budget}, "to the end, also when 95 % was held"
    accelerators.cost(TINY, tmp_path, "cpu")
    for own in held.values():  # of so small a run nothing may have held, and then there would be no contrast
        own["restricted_mean_time"] = 60.0
    (tmp_path / "tuned.json").write_text(json.dumps(json.loads((tmp_path / "tuned.json").read_text()) | {"arms": held}))
    found = accelerators.report(TINY, tmp_path)
    assert [(one["arm"], one["against"]) for one in found["contrasts"]] == [("grokfast_ema", "learning_rate")]
    assert all(arm["milliseconds"] > 0 for arm in found["arms"])
    assert next(arm for arm in found["arms"] if arm["arm"] == "none")["of_adamw"] == 1
    accelerators.show(found)
    assert "grokfast_ema / learning_rate: " in capsys.readouterr().out
    accelerators.test(TINY, tmp_path, "cpu")  # nothing is left to train
    assert len((tmp_path / "test" / "metrics.jsonl").read_text().splitlines()) == len(rows)


def test_an_arm_whose_runs_are_not_all_there_is_left_out(monkeypatch, tmp_path):
    own = {"strength": 1.0, "rest_decay": 2.0, "restricted_mean_time": 50.0}
    arms = {arm: own | {"name": arm} for arm in ("learning_rate", "muon", "orthograd")}
    monkeypatch.setattr(accelerators, "tuned", lambda directory, protocol: {"arms": arms})
    rows = [
        {
            "arm": arm, "strength": 1.0, "rest_decay": 2.0, "seed": seed, "train_examples": 60,
            "steps_to_generalise": steps + seed, "test_accuracy": accuracy,
        }
        for arm, steps, accuracy in (("learning_rate", -140, 0.99), ("muon", -180, 0.6), ("orthograd", -100, 0.99))
        for seed in TINY.test_seeds
    ]  # fmt: skip
    rows[-1]["steps_to_generalise"] = None
    before = [row | {"strength": 0.5, "steps_to_generalise": 20} for row in rows if row["arm"] == "muon"]
    monkeypatch.setattr(accelerators, "read_metrics", lambda path: [*before, *rows])  # Muon was tuned again
    whole = accelerators.report(TINY, tmp_path)
    assert [(arm["arm"], arm["held"], arm["still"]) for arm in whole["arms"]] == [
        ("learning_rate", 3, 3), ("muon", 3, 0), ("orthograd", 2, 2)
    ]  # fmt: skip
    assert whole["contrasts"][1]["ratio"] < 0.5
    ps = [one["p"] for one in whole["contrasts"]]
    assert [one["p_holm"] for one in whole["contrasts"]] == holm_of_nine(ps)
    arms["muon"]["restricted_mean_time"] = float(TINY.tune_budget)  # of which nothing held in tuning
    assert [one["arm"] for one in accelerators.report(TINY, tmp_path)["contrasts"]] == ["orthograd"]
    rows.pop(0)
    less = accelerators.report(TINY, tmp_path)
    assert [arm["arm"] for arm in less["arms"]] == ["muon", "orthograd"]
    assert less["contrasts"] == []


def test_a_tiny_protocol_is_a_smaller_one_of_the_same_task():
    same = replace(accelerators.PROTOCOLS["selection"], **accelerators.TINY, tune_sizes=(60,), test_sizes=(60,))
    assert same == TINY
    assert accelerators.protocol_of("add", None, tiny=True).sized(0.5) == {"fractions": (0.5,)}
