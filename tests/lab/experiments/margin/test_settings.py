"""The settings of attention against its SVMs: what is refused."""

import dataclasses
import math

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.margin.settings import PRESETS, Margin, check


def test_presets_are_accepted_as_they_are():
    for preset in PRESETS.values():
        assert check(preset) == preset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parametrisation": ()}, "--parametrisation is empty: choose from merged"),
        ({"parametrisation": ("merge",)}, "did you mean 'merged'"),
        ({"tokens": 1}, "--tokens 1 leaves nothing to choose between"),
        ({"dimension": 1}, "--dimension 1 is too small"),
        ({"datasets": 0}, "--datasets 0 is too small"),
        ({"l2": -1.0}, "--l2 -1.0 must be a finite number >= 0"),
        ({"rate": 0.5}, "--rate 0.5 is too large for a flow"),
        ({"rate": math.nan}, "--rate nan must be"),
        ({"scale": 0.0}, "--scale 0.0 must be"),
        ({"margin": 1e200}, r"--margin 1e\+200 must be between"),
        ({"lr": 0.0}, "--lr 0.0 must be"),
        ({"beta2": 1.0}, r"--beta2 1 is outside \(0.81, 1\)"),
        ({"epsilon": -1e-8}, "--epsilon -1e-08 must be a finite number >= 0"),
        ({"parametrisation": ("trained_head",)}, r"--margin 1e\+06 is beyond what trained_head can follow"),
        ({"inner": -1}, "--inner -1 is negative"),
        ({"parametrisation": ("merged",), "lr": 5.0}, "--lr 5.0 has no effect without one of the arms descent, norm"),
        ({"parametrisation": ("merged",), "l2": 5.0}, "--l2 5.0 has no effect without one of the arms separate_l2"),
        ({"data": "equals"}, "did you mean 'equal'"),
        ({"data": "aligned", "tokens": 4}, "aligned data have tokens in pairs"),
        ({"data": "aligned", "tokens": 5, "examples": 12}, "--dimension 12 must be larger"),
        ({"data": "data.npz", "first_seed": 3}, "--first-seed 3 has no effect on --data data.npz .*: leave it out"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(SettingError, match=message):
        check(dataclasses.replace(Margin(), **changes))
