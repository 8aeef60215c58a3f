"""What the settings of vision refuse, and its defaults."""

import dataclasses

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.vision.settings import Vision, check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_share": 0.0}, "--valid-share 0 leaves no images to validate with: give a share in"),
        ({"valid_share": 1.0}, "--valid-share 1 leaves no images to train on: give a share in"),
        ({"qk_norm": "on"}, "--qk-norm on: .* has no QK-norm: give --library timm"),
        ({"qk_norm": "both"}, "--qk-norm both: .* give --library timm"),
        ({"image_size": 16}, "--image-size is for --image-folder"),
        ({"grey": True}, "--grey is for --image-folder"),
        ({"patch": 3}, "--patch 3 does not divide the image of 8 pixels a side: give for example --patch 8"),
        ({"image_folder": "x", "image_size": 30}, "--patch 8 does not divide the image of 30 .* example --patch 2"),
        ({"patch": 0}, "--patch 0 is too small"),
        ({"width": 30}, "--width 30 must be a multiple of the 4 heads: for example 64"),
        ({"depth": 0}, "--depth 0 is too small"),
        ({"library": "timm", "arms": ("l2", "uniform")}, "--arms uniform: .* one parameter .* --library transformers"),
        ({"arms": ("positions",)}, "--arms 'positions' is unknown"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(SettingError, match=message):
        check(dataclasses.replace(Vision(), **changes))


def test_the_defaults_can_work():
    check(Vision())
    check(Vision(image_folder="x"))
    check(Vision(library="timm", qk_norm="both"))
