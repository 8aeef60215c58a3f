"""What the benchmarks that tune share: the criterion, the edges of a grid, and the settings that are frozen."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import schedule
import tuning

KEYS = ("arm", "strength", "rest_decay", "train_fraction", "seed")


def test_a_run_that_never_holds_counts_as_the_horizon_and_a_late_one_too():
    some = [{"steps_to_generalise": steps} for steps in (400, None, 1200, 800)]
    assert tuning.mean_time(some, 800) == (400 + 800 + 800 + 800) / 4
    assert tuning.mean_time(some, 1600) == (400 + 1600 + 1200 + 800) / 4


def test_a_grid_is_widened_where_its_best_is_at_an_edge():
    def following(times: list[float], name: str = "smooth", grid: tuple[float, ...] = (1.0, 2.0, 4.0)) -> float | None:
        return tuning.beyond(tuning.Protocol(), name, dict(zip(grid, times, strict=True)))

    assert following([3, 2, 1]) == 8.0
    assert following([1, 2, 3]) == 0.5
    assert following([3, 1, 3]) is None
    assert following([2, 2, 2]) is None  # nobody learns: there is no best
    assert following([3], grid=(0.0,)) is None  # no strength
    assert following([3, 2, 1], "l2_ramp@200", (64.0, 128.0, 256.0)) is None  # an L2 of 512 turns weights round


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Tunes arms of a space on times that a function makes up; the frozen arms, and the settings that were trained."""
    settings: set[tuple[str, float, float]] = set()

    def tuned(space: tuning.Space, times):
        def fake(path, protocol, wanted, budget, device):
            settings.update(one.key[:3] for one in wanted)
            return [
                dict(zip(KEYS, one.key, strict=True)) | {"steps_to_generalise": times(*one.key[:3])} for one in wanted
            ]

        monkeypatch.setattr(tuning, "trained", fake)
        parts = [(arm,) for arm in space.strengths]
        return tuning.tune(parts, space, schedule.TINY, tmp_path, "cpu")["arms"], settings

    return tuned


def test_an_edge_that_stays_open_is_frozen_as_such_at_the_last_strength_that_was_trained(monkeypatch, run):
    """The stronger the faster, without end, for one arm; the others do best inside."""
    monkeypatch.setattr(tuning, "WIDENINGS", 2)

    def times(name, strength, rest):
        return 50 / strength if name == "smooth" else 10 + abs(math.log2(strength / 8.0)) if strength else 60

    frozen, trained = run(schedule.SPACE, times)
    assert {arm for arm, own in frozen.items() if own["edge_is_open"]} == {"smooth"}
    assert frozen["smooth"]["strength"] == max(schedule.GRIDS["smooth"]) * 2**2
    for own in frozen.values():
        assert {(own["name"], strength) for strength in own["strengths"]} <= {setting[:2] for setting in trained}


def test_an_arm_without_a_strength_and_one_that_decays_everything_have_decays_of_their_own(run):
    strengths = {"smooth": (1.0, 2.0, 4.0), "none": (), "l2_all": (0.5, 1.0, 2.0)}
    rests = (0.0, 0.5, 1.0)
    space = tuning.Space(
        strengths, rests=(0.0, 4.0), first_rest=1.0, own_rests={"none": rests}, of_all=frozenset({"l2_all"})
    )
    frozen, trained = run(space, lambda name, strength, rest: 10 + (strength - 2) ** 2 + rest)
    assert {setting[1:] for setting in trained if setting[0] == "none"} == {(0.0, rest) for rest in rests}
    assert {setting[1:] for setting in trained if setting[0] == "l2_all"} == {(s, s) for s in (0.5, 1.0, 2.0)}
    assert {setting[1:] for setting in trained if setting[0] == "smooth"} == {
        (1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (2.0, 0.0), (2.0, 4.0)
    }  # fmt: skip
    assert [(own["strength"], own["rest_decay"]) for own in frozen.values()] == [(2.0, 0.0), (0.0, 0.0), (1.0, 1.0)]
    assert not any(own["rest_at_edge"] for own in frozen.values()), "there is no decay below none"


def test_where_no_strength_holds_all_are_tried_at_the_other_decays(run):
    """Arms that are alike at the first decay are not parted by the order in which they were tried."""
    space = tuning.Space({"smooth": (1.0, 2.0, 4.0), "l2": (1.0, 2.0, 4.0)}, rests=(0.0, 4.0), first_rest=2.0)

    def times(name, strength, rest):
        if name == "l2":
            return 10 + strength
        return 20 if (strength, rest) == (4.0, 4.0) else None

    frozen, trained = run(space, times)
    assert (frozen["smooth"]["strength"], frozen["smooth"]["rest_decay"]) == (4.0, 4.0)
    assert frozen["smooth"]["rest_at_edge"]
    assert {setting[1:] for setting in trained if setting[0] == "smooth"} == {
        (s, rest) for s in (1.0, 2.0, 4.0) for rest in (0.0, 2.0, 4.0)
    }
    assert {setting[1:] for setting in trained if setting[0] == "l2" and setting[2] != 2.0} == {
        (frozen["l2"]["strength"], rest) for rest in (0.0, 4.0)
    }


def test_what_is_frozen_is_not_tuned_again_and_another_protocol_does_not_read_it(run, tmp_path):
    space = tuning.Space({"l2": (4.0, 8.0, 16.0)})
    first, _ = run(space, lambda name, strength, rest: abs(strength - 8) + rest)
    assert json.loads((tmp_path / "tuned.json").read_text())["protocol"]["tune_seeds"] == [100, 101]
    assert (first["l2"]["rest_decay"], first["l2"]["rest_at_edge"]) == (1.0, True)
    with pytest.raises(SystemExit, match="is frozen"):
        run(space, lambda *setting: 1)
    both, _ = run(tuning.Space({"l2": (4.0, 8.0, 16.0), "none": ()}), lambda *setting: 1)
    assert list(both) == ["l2", "none"]
    assert both["l2"] == first["l2"]
    assert tuning.tuned(tmp_path, schedule.TINY)["protocol"] == json.loads(json.dumps(asdict(schedule.TINY)))
    with pytest.raises(SystemExit, match="tuned by another protocol"):
        tuning.tuned(tmp_path, tuning.Protocol())
