"""What the benchmarks that tune share: the criterion, the edges of a grid, and the settings that are frozen."""

import json
import math
import sys
from dataclasses import asdict, replace
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
    def following(times: list[float], grid: tuple[float, ...] = (1.0, 2.0, 4.0)) -> float | None:
        return tuning.beyond(dict(zip(grid, times, strict=True)))

    assert following([3, 2, 1]) == 8.0
    assert following([1, 2, 3]) == 0.5
    assert following([3, 1, 3]) is None
    assert following([2, 2, 2]) is None  # nobody learns: there is no best
    assert following([3], (0.0,)) is None  # no strength
    assert following([1, 2, 3], (0.0, 1.0, 2.0)) is None  # there is no decay below none


def test_a_strength_that_turns_weights_round_is_not_tried():
    times = {64.0: 3.0, 128.0: 2.0, 256.0: 1.0}
    assert tuning.another_strength(tuning.Protocol(), "l2_ramp@200", times) is None
    assert tuning.another_strength(tuning.Protocol(), "raise_rank", times) == 512.0


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


def test_an_edge_that_stays_open_is_said_and_frozen_at_the_last_strength_that_was_trained(monkeypatch, run):
    """The stronger the faster, without end, for one arm; the others do best inside."""
    monkeypatch.setattr(tuning, "WIDENINGS", 2)

    def times(name, strength, rest):
        inside = abs(math.log2(rest / 2)) + abs(math.log2(int(name.partition("@")[2] or 200) / 200))
        return inside + (50 / strength if name == "smooth" else 10 + abs(math.log2(strength / 8.0)) if strength else 49)

    frozen, trained = run(schedule.SPACE, times)
    rows = [{"arm": name, "strength": s, "rest_decay": rest} for name, s, rest in trained]
    assert {arm for arm, own in frozen.items() if tuning.edges(own, rows)} == {"smooth"}
    assert frozen["smooth"]["strength"] == max(schedule.GRIDS["smooth"]) * 2**2
    for own in frozen.values():
        assert {(own["name"], strength) for strength in own["strengths"]} <= {setting[:2] for setting in trained}


def test_an_arm_without_a_strength_and_one_that_decays_everything_have_decays_of_their_own(run):
    strengths = {"smooth": (1.0, 2.0, 4.0), "none": (), "l2_all": (0.5, 1.0, 2.0)}
    rests = (0.0, 0.5, 1.0)
    space = tuning.Space(
        strengths, rests=(0.0, 1.0, 4.0), first_rest=1.0, own_rests={"none": rests}, of_all=frozenset({"l2_all"})
    )
    frozen, trained = run(space, lambda name, strength, rest: 10 + (strength - 2) ** 2 + rest)
    assert {setting[1:] for setting in trained if setting[0] == "none"} == {(0.0, rest) for rest in rests}
    assert {setting[1:] for setting in trained if setting[0] == "l2_all"} == {(s, s) for s in (0.5, 1.0, 2.0)}
    assert {setting[1:] for setting in trained if setting[0] == "smooth"} == {
        (1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (2.0, 0.0), (2.0, 4.0)
    }  # fmt: skip
    assert [(own["strength"], own["rest_decay"]) for own in frozen.values()] == [(2.0, 0.0), (0.0, 0.0), (1.0, 1.0)]


def test_where_no_strength_holds_all_are_tried_at_the_other_decays(run):
    """Arms that are alike at the first decay are not parted by the order in which they were tried."""
    space = tuning.Space({"smooth": (1.0, 2.0, 4.0), "l2": (1.0, 2.0, 4.0)}, rests=(0.0, 4.0), first_rest=2.0)

    def times(name, strength, rest):
        if name == "l2":
            return 10 + abs(strength - 2) + rest
        return 20 if (strength, rest) == (4.0, 4.0) else None

    frozen, trained = run(space, times)
    assert (frozen["smooth"]["strength"], frozen["smooth"]["rest_decay"]) == (4.0, 4.0)
    compared = {(s, rest) for s in (1.0, 2.0, 4.0) for rest in (0.0, 2.0, 4.0)}
    beyond = {(1.0, 8.0), (2.0, 8.0), (4.0, 8.0), (8.0, 0.0), (8.0, 4.0)}  # both ways, since (4, 4) is at both edges
    assert {setting[1:] for setting in trained if setting[0] == "smooth"} == compared | beyond
    assert {setting[1:] for setting in trained if setting[0] == "l2" and setting[2] != 2.0} == {
        (frozen["l2"]["strength"], rest) for rest in (0.0, 4.0)
    }


def test_ramps_and_decays_of_the_rest_are_widened_until_the_best_is_inside(run):
    space = tuning.Space({"l2_ramp": (4.0, 8.0, 16.0)}, {"l2_ramp": (5, 10)}, rests=(1.0, 2.0), first_rest=2.0)

    def times(name, strength, rest):
        distance = (abs(math.log2(value)) for value in (int(name.partition("@")[2]) / 40, strength / 32, rest / 0.25))
        return 10 + sum(distance)

    frozen, trained = run(space, times)
    own = frozen["l2_ramp"]
    assert (own["name"], own["strength"], own["rest_decay"]) == ("l2_ramp@40", 32.0, 0.25)
    assert {int(name.partition("@")[2]) for name, *_ in trained} == {5, 10, 20, 40}, "80 would outlast the 60 steps"
    assert {rest for *_, rest in trained} == {0.125, 0.25, 0.5, 1.0, 2.0}
    rows = [{"arm": name, "strength": s, "rest_decay": rest} for name, s, rest in trained]
    assert tuning.edges(own, rows) == ["ramp"]
    assert tuning.edges(own | {"name": "l2_ramp@20", "rest_decay": 2.0}, rows) == []


def test_what_is_frozen_is_tuned_again_where_it_is_asked_for_and_another_protocol_does_not_read_it(run, tmp_path):
    space = tuning.Space({"l2": (4.0, 8.0, 16.0)})
    first, _ = run(space, lambda name, strength, rest: 10 + abs(strength - 8) + rest)
    assert json.loads((tmp_path / "tuned.json").read_text())["protocol"]["tune_seeds"] == [100, 101]
    assert first["l2"]["strength"] == 8.0
    with pytest.raises(SystemExit, match="is frozen"):
        run(space, lambda *setting: 1)
    both, _ = run(tuning.Space({"l2": (4.0, 8.0, 16.0), "none": ()}), lambda *setting: 1)
    assert list(both) == ["l2", "none"]
    assert both["l2"] == first["l2"]
    with pytest.raises(SystemExit, match="--again l3: no such arm; it is one of l2, none"):
        tuning.tune([("l2", "none")], space, schedule.TINY, tmp_path, "cpu", again=["l3"])
    with pytest.raises(SystemExit, match=r"--again smooth: .*tuned.json does not have it yet; run --stage"):
        tuning.tune([("l2", "none", "smooth")], space, schedule.TINY, tmp_path, "cpu", again=["smooth"])
    again = tuning.tune([("l2", "none")], space, schedule.TINY, tmp_path, "cpu", again=["l2"])["arms"]
    assert again["l2"]["restricted_mean_time"] == 1
    assert again["none"] == both["none"]
    assert tuning.tuned(tmp_path, schedule.TINY)["protocol"] == json.loads(json.dumps(asdict(schedule.TINY)))
    with pytest.raises(SystemExit, match="tuned by another protocol"):
        tuning.tuned(tmp_path, tuning.Protocol())


@pytest.mark.parametrize("stage", ["test", "report"])
def test_tuning_again_is_refused_in_another_stage(monkeypatch, capsys, stage):
    monkeypatch.setattr(sys, "argv", ["schedule.py", "--stage", stage, "--again", "l2"])
    with pytest.raises(SystemExit):
        schedule.main()
    assert f"--again has no effect on --stage {stage}: give --stage tune" in capsys.readouterr().err


def test_held_out_seeds_may_become_more(run, tmp_path):
    first, _ = run(tuning.Space({"l2": (4.0, 8.0, 16.0)}), lambda name, strength, rest: 10 + abs(strength - 8) + rest)
    more = replace(schedule.TINY, test_seeds=(200, 201, 202, 203))
    tuning.train_held_out(more, tmp_path, [], "cpu")
    held = tuning.tuned(tmp_path, more)
    assert held["protocol"]["test_seeds"] == [200, 201, 202, 203]
    assert held["arms"] == first
