"""The settings of the matrix experiment: what is filled in, and what is refused."""

import dataclasses
import math

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.factor.settings import Factor, check


def test_size_and_target_follow_from_each_other():
    assert check(Factor()).target == ("0.2", "0.4", "0.6", "0.8", "1")
    assert check(Factor(target=("3", "1"))).size == 2
    assert check(Factor(target=("random",), size=6)).target_rank == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": (0.1, -0.2)}, r"--strengths -0.2 is negative or not finite"),
        ({"strengths": (math.nan,)}, r"--strengths nan is negative or not finite"),
        ({"strengths": ()}, r"--strengths is empty: give for example"),
        ({"strengths": (10.0,)}, r"--strengths 10 at --lr 0.1 would flip the sign of the weights: stay below 10"),
        ({"observed": 0.0}, r"--observed 0 must be a share of the entries in \(0, 1\]"),
        ({"observed": 1.5}, r"--observed 1.5 must be"),
        ({"depth": 1}, r"--depth 1 must be at least 2"),
        ({"depth": 5, "arms": ("factors",)}, r"--depth 5 has no effect without the arm deep: leave it out"),
        ({"lr": 0.0}, r"--lr 0.0 must be a finite number > 0"),
        ({"scale": math.inf}, r"--scale inf must be"),
        ({"seeds": 0}, r"--seeds 0 is too small: give at least 1"),
        ({"evaluate_every": 0}, r"--evaluate-every 0 is too small"),
        ({"arms": ("factor",)}, r"did you mean 'factors'"),
        ({"arms": ()}, r"--arms is empty: choose from factors"),
        ({"size": 1}, r"--size 1 is too small"),
        ({"size": 4, "target": ("1", "2", "3")}, r"--target has 3 values for --size 4: give 4 values, or leave out"),
        ({"target": ("1", "two")}, r"--target 1 two is not a diagonal: give numbers, or 'random' alone"),
        ({"target": ("1", "-1")}, r"--target 1 -1 must be singular values"),
        ({"target": ("0", "0")}, r"not all 0"),
        ({"target": ("1", "nan")}, r"finite"),
        ({"target": ("random",), "target_rank": 7}, r"--target-rank 7 must be between 1 and --size 5"),
        ({"target_rank": 2}, r"--target-rank 2 has an effect on --target random alone"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    settings = dataclasses.replace(Factor(), **changes)
    with pytest.raises(SettingError, match=message):
        check(settings)
