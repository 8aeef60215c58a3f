"""Colours stand out from the page, and an arm nobody knows has one of its own."""

from pathlib import Path

import pytest

from rankdecay.lab import report
from rankdecay.lab.experiment import load, names
from rankdecay.lab.report.style import _KNOWN, arm_styles

LIGHT_BACKGROUND = "#fcfbf8"  # those of page.css
DARK_BACKGROUND = "#14161a"


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted([luminance(first), luminance(second)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("experiment", ["", *names()])
def test_arm_colours_stand_out_from_both_backgrounds(experiment):
    own = load(experiment).styles_of({}) if experiment else {}
    for name, look in arm_styles([*(own or _KNOWN), *"abcde"], own).items():
        assert contrast(look.light, LIGHT_BACKGROUND) >= 3, name
        assert contrast(look.light, "#ffffff") >= 3, name
        assert contrast(look.dark, DARK_BACKGROUND) >= 3, name


def test_an_unknown_arm_keeps_its_name_and_gets_a_colour_of_its_own():
    looks = arm_styles(["no_qk_norm", "new_arm", "low_rank", "newer_arm"])
    assert looks["new_arm"].label == "new_arm"
    assert len({look.light for look in looks.values()}) == 4


def test_the_page_has_the_backgrounds_the_colours_were_chosen_for():
    css = (Path(report.__file__).parent / "assets" / "page.css").read_text()
    assert f"--background: {LIGHT_BACKGROUND}" in css
    assert f"--background: {DARK_BACKGROUND}" in css
