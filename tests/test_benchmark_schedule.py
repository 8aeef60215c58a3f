"""The pre-stated tests of `benchmarks/schedule.py`: contrasts, equivalence, the verdict, and which arms come first."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import schedule
import tuning


def rows(times: dict[str, dict[tuple[int, int], int | None]]) -> list[dict]:
    return [
        {"arm": arm, "seed": seed, "train_examples": size, "steps_to_generalise": steps}
        for arm, some in times.items()
        for (seed, size), steps in some.items()
    ]


def test_log_ratios_are_paired_by_seed_and_size_and_averaged_over_sizes():
    some = rows(
        {"a": {(0, 600): 400, (0, 700): 800, (1, 600): 200}, "b": {(0, 600): 800, (0, 700): 800, (1, 600): 800}}
    )
    np.testing.assert_allclose(schedule.log_ratios(some, "a", "b", 800), [math.log(0.5) / 2, math.log(0.25)])
    with pytest.raises(SystemExit, match="b has no run of seed 1 with 600 examples"):
        schedule.log_ratios([row for row in some if (row["arm"], row["seed"]) != ("b", 1)], "a", "b", 800)


def test_a_contrast_is_a_t_test_over_seeds():
    ratios = np.random.default_rng(0).normal(-0.02, 0.05, 10)
    found = schedule.contrast(ratios)
    low, high = stats.ttest_1samp(ratios, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((math.exp(low), math.exp(high)))

    def p(bound: float, alternative: str = "two-sided") -> float:
        _, value = stats.ttest_1samp(ratios, bound, alternative=alternative)
        return value  # pyright: ignore[reportReturnType] - scipy has no types

    margin = math.log(1.08)
    assert found["p"] == pytest.approx(p(0))
    assert found["p_equivalent"] == pytest.approx(max(p(margin, "less"), p(-margin, "greater")))
    assert found["p_faster"] == pytest.approx(p(-margin, "less"))


def test_holm():
    assert schedule.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_the_headline_stands_is_withdrawn_or_is_open():
    def of(mean: float, spread: float) -> dict:
        return schedule.contrast(mean + spread * np.linspace(-1, 1, 10))

    same, vague, faster = of(0.01, 0.02), of(0.0, 0.5), of(-0.3, 0.05)
    learnt = [0.9, 0.8, 1.0]
    assert schedule.verdict(same, same, learnt) == "stands"
    assert schedule.verdict(same, same, [0.9, 0.4, 1.0]) == "open"  # two runs at the horizon look alike
    assert schedule.verdict(same, vague, learnt) == "open"
    assert schedule.verdict(same, faster, learnt) == schedule.verdict(faster, vague, learnt) == "withdrawn"
    assert schedule.verdict(same, of(0.3, 0.05), learnt) == "open"  # slower, which is no reason to withdraw
    assert schedule.contrast(np.zeros(10))["p_equivalent"] == 0.0  # the same evaluation in every seed


def test_every_arm_and_variant_can_be_made():
    protocol = schedule.TINY
    for arm, grid in schedule.GRIDS.items():
        for ramp in schedule.RAMPS.get(arm, (None,)):
            name = arm if ramp is None else f"{arm}@{ramp}"
            for strength in grid or (0.0,):
                one = schedule.trial(protocol, name, strength, 2.0, 60, 100)
                assert one.key == (name, strength, 2.0, one.train_fraction, 100)
                assert one.member.decay is None or one.member.decay.warmup == (ramp or 0)
    also = schedule.trial(protocol, "elastic", 5.0, 2.0, 60, 200, l2_strength=7.0).member.control.also
    assert also is not None
    assert also.strength == 7.0


def test_a_report_of_runs_that_are_not_all_there_is_refused(monkeypatch, tmp_path):
    """A verdict on the seeds that happen to be there would be none of the protocol's."""
    protocol = schedule.Protocol()
    arms = {
        arm: {"name": arm, "strength": 1.0, "rest_decay": 2.0}
        for arm in ("smooth", "radial_only", "raise_rank", "l2_ramp", "l2")
    }
    monkeypatch.setattr(schedule, "tuned", lambda directory, protocol: {"low_rank": "smooth", "arms": arms})
    stored = rows({arm: {(s, n): 400 + s for s in protocol.test_seeds for n in protocol.test_sizes} for arm in arms})
    own = {"strength": 1.0, "rest_decay": 2.0, "test_accuracy": 1.0, "stable_rank": 2.0}
    stored = [row | own for row in stored]
    stored += [row | {"strength": 2.0, "steps_to_generalise": 4000} for row in stored]  # before it was tuned again
    monkeypatch.setattr(schedule, "read_metrics", lambda path: stored)
    assert schedule.report(protocol, tmp_path)["headline"] == "stands"
    for row in [row for row in stored if row["arm"] == "smooth" and row["seed"] == 209]:
        stored.remove(row)
    with pytest.raises(SystemExit, match="test lacks 4 runs of smooth: run --stage test first"):
        schedule.report(protocol, tmp_path)


def test_the_arms_of_the_contrasts_are_frozen_first_and_the_others_added(monkeypatch, tmp_path):
    def fake(path, protocol, wanted, budget, device):
        if any(one.key[0] not in named for one in wanted):
            raise KeyboardInterrupt
        return [
            {
                **dict(zip(("arm", "strength", "rest_decay", "train_fraction", "seed"), one.key, strict=True)),
                "steps_to_generalise": 10 + abs(math.log2(one.key[1] / 8.0)),
            }
            for one in wanted
        ]

    named = {f"{a}@{r}" for a in schedule.NAMED for r in schedule.RAMPS.get(a, ())} | set(schedule.NAMED)
    monkeypatch.setattr(tuning, "trained", fake)
    with pytest.raises(KeyboardInterrupt):
        schedule.tune(schedule.TINY, tmp_path, "cpu")
    first = schedule.tuned(tmp_path, schedule.TINY)
    assert set(first["arms"]) == set(schedule.NAMED) == {"l2", "l2_ramp", "radial_only", "raise_rank", "smooth", "prox"}
    named |= set(schedule.GRIDS) | {f"{a}@{r}" for a, ramps in schedule.RAMPS.items() for r in ramps}
    strengths = {**schedule.GRIDS, "none": (4.0, 8.0, 16.0)}
    monkeypatch.setattr(schedule, "SPACE", replace(schedule.SPACE, strengths=strengths))
    second = schedule.tune(schedule.TINY, tmp_path, "cpu")
    assert set(second["arms"]) == set(schedule.GRIDS)
    assert {arm: second["arms"][arm] for arm in schedule.NAMED} == first["arms"]
    with pytest.raises(SystemExit, match="is frozen"):
        schedule.tune(schedule.TINY, tmp_path, "cpu")
