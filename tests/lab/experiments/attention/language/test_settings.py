"""The sizes of the language model are defaults that options override."""

import dataclasses

import pytest

from rankdecay.lab.cli import parse
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.language.settings import PRESETS, Language, check


def test_sizes_are_defaults_that_options_override():
    settings = parse(["language", "--size", "gpt2", "--depth", "3"])
    assert isinstance(settings, Language)
    assert settings == dataclasses.replace(PRESETS["gpt2"], depth=3)
    assert parse(["language", "--size=small"]) == PRESETS["small"]
    assert parse(["language"]) == PRESETS["tiny"]


@pytest.mark.parametrize("size", PRESETS)
def test_the_defaults_of_every_size_can_work(size):
    check(PRESETS[size])


def test_planes_are_for_rotary_positions():
    check(dataclasses.replace(PRESETS["tiny"], arms=("planes",), strengths=()))
    with pytest.raises(SettingError, match="--arms planes decays rotary planes, and --positions learned has none"):
        check(dataclasses.replace(PRESETS["tiny"], arms=("planes",), strengths=(), positions="learned"))
