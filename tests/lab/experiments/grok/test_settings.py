"""What the experiment can be asked, and what it refuses."""

import dataclasses
import math

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.grok.settings import ARMS, PRESETS, Grok, check
from rankdecay.lab.settings import NOT_IDENTITY, identity


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run is that one would go on with
    preset = PRESETS[name]
    assert check(preset) == dataclasses.replace(preset, validation=0 if name == "prototype" else 1000)
    assert PRESETS[name].preset == name
    assert set(PRESETS[name].arms) <= set(ARMS)


def test_where_and_how_it_is_shown_is_not_what_is_computed():
    settings = Grok()
    assert set(identity(settings)) == {f.name for f in dataclasses.fields(settings)} - set(NOT_IDENTITY)
    assert {"out", "quiet", "json"} <= set(NOT_IDENTITY)
    for name in ("seeds", "steps", "task", "strength", "lr", "precision"):
        assert name in identity(settings)


@pytest.mark.parametrize(
    ("asked", "rule", "named"),
    [
        (("none", "low_rank"), "prox", ("none", "low_rank")),
        (("smooth",), "prox", ("smooth",)),
        (("low_rank", "prox"), "smooth", ("smooth", "prox")),
        (("low_rank", "smooth", "l2"), "smooth", ("smooth", "l2")),  # the same rule twice is one arm
        (("smooth", "low_rank", "prox"), "smooth", ("smooth", "prox")),
    ],
)
def test_where_rules_are_compared_low_rank_goes_by_its_rule(asked, rule, named):
    settings = check(Grok(arms=asked, rule=rule))
    assert settings.arms == named
    assert check(settings) == settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, ["--steps 0", "at least 1"]),
        ({"seeds": 0}, ["--seeds 0", "at least 1"]),
        ({"batch_size": -1}, ["--batch-size -1", "at least 1"]),
        ({"evaluate_every": 0}, ["--evaluate-every 0", "at least 1"]),
        ({"strength": -0.5}, ["--strength -0.5", ">= 0"]),
        ({"strength": math.inf}, ["--strength inf", "finite"]),
        ({"weight_decay": -1.0}, ["--weight-decay -1.0", ">= 0"]),
        ({"tuned_strength": math.nan}, ["--tuned-strength nan", "finite"]),
        ({"lr": -1e-3}, ["--lr -0.001", ">= 0"]),
        ({"weight_decay": 1000.0}, ["--weight-decay 1000", "below 500"]),
        ({"tuned_strength": 200.0, "lr": 0.01}, ["--tuned-strength 200", "--lr 0.01", "below 100"]),
        ({"threshold": 0.0}, ["--threshold 0.0", "0.95"]),
        ({"threshold": 1.1}, ["--threshold 1.1", "0.95"]),
        ({"width": 10}, ["--width 10", "multiple of the 4 heads"]),
        ({"width": 0}, ["--width 0", "multiple of the 4 heads"]),
        ({"arms": ()}, ["--arms", "empty", "low_rank"]),
        ({"arms": ("none", "lowrank")}, ["--arms 'lowrank'", "'low_rank'"]),
        ({"task": "ad"}, ["--task 'ad'", "'add'"]),
    ],
)
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(SettingError) as error:
        check(dataclasses.replace(Grok(), **changes))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_strength_that_no_arm_has_is_not_looked_at():
    assert check(Grok(arms=("none", "low_rank"), tuned_strength=200.0, lr=0.01)).tuned_strength == 200
