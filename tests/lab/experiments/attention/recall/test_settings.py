"""What the settings of recall refuse, and its defaults."""

import dataclasses

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.recall.settings import Recall, check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 40}, "--pairs 40 needs as many distinct keys, --keys is 32: give fewer pairs or more keys"),
        ({"pairs": 0}, "--pairs 0 is too small"),
        ({"queries": 21}, "--queries 21 asks for more keys than --pairs 20"),
        ({"values": 1}, "--values 1 leaves nothing to recall"),
        ({"label_noise": 1.0}, r"--label-noise 1.0 is outside \[0, 1\)"),
        ({"label_noise": -0.1}, r"--label-noise -0.1 is outside \[0, 1\)"),
        ({"valid_sequences": 1}, "--valid-sequences 1 gives no standard error"),
        ({"width": 30, "heads": 4}, "--width 30 must be a multiple of the 4 heads: for example 128"),
        ({"initial": -1.0}, "--initial -1.0 must be a finite number"),
        ({"mlp_decays": (0.3,)}, "--mlp-decays has no effect"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(SettingError, match=message):
        check(dataclasses.replace(Recall(), **changes))


def test_the_defaults_can_work_and_are_those_of_the_paper():
    settings = Recall()
    check(settings)
    assert (settings.pairs, settings.label_noise, settings.rest_decay) == (20, 0.05, 0.1)
    assert (settings.arms, settings.qk_norm) == (("l2", "low_rank"), "both")
