"""L2 under rotary positions: the science over a few seeds, the figures, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import run as run_experiment
from rankdecay.lab.experiments.rotary.experiment import EXPERIMENT
from rankdecay.lab.experiments.rotary.settings import PRESETS, Rotary, check

SMALL = Rotary(
    planes=4, width=6, offsets=16, strengths=(0.1, 0.6), seeds=4, steps=2000, quiet=True, device="cpu",
    evaluate_every=500,
)  # fmt: skip


def run(directory, **changes):
    settings = dataclasses.replace(SMALL, out=directory / "run", **changes)
    return {(row["name"], row["strength"]): row for row in run_experiment(EXPERIMENT, settings, "")["arms"]}


@pytest.mark.parametrize("heads", [1, 2])
def test_planes_that_do_not_see_each_other_end_at_the_soft_threshold_which_is_the_optimum(tmp_path, heads):
    """Sizes are ¼, ½, ¾ and 1: at .1 all four planes are left, at .6 two of them, in W_Q of rank four."""
    rows = run(tmp_path, frequencies="fourier", heads=heads)
    for strength, left in ((0.1, 4), (0.6, 2)):
        row = rows["rotary", strength]
        assert row["each"]["active"] == [left] * 4
        assert row["deviation_largest"] < 1e-6
        assert (row["certified"], row["attainable"], row["same_planes"], row["not_global"]) == (4, 4, 4, 0)
        assert row["plane_gap"] < 1e-12 < 1e-3 < row["nuclear_gap"]
        assert row["above_convex_largest"] < 1e-8
        assert row["plane_imbalance"] < 1e-7 < 1e-2 < row["imbalance"]
    assert rows["rotary", 0.6]["query_rank"] == 4


def test_without_positions_the_rank_falls_and_no_plane_goes(tmp_path):
    rows = run(tmp_path, arms=("unturned",), strengths=(0.05, 0.3))
    weak, strong = rows["unturned", 0.05], rows["unturned", 0.3]
    assert strong["product_rank"] < weak["product_rank"]
    assert strong["active"] >= 3
    assert strong["nuclear_gap"] < 1e-7
    assert strong["imbalance"] < 1e-7
    assert strong["certified"] == weak["certified"] == 4


def test_planes_that_share_their_directions_go_though_the_rank_is_two_already(tmp_path):
    rows = run(tmp_path, target="shared", frequencies="fourier")
    weak, strong = rows["rotary", 0.1], rows["rotary", 0.6]
    assert (weak["active"], strong["active"]) == (4, 2)
    assert weak["query_rank"] == strong["query_rank"] == 2


def test_scores_of_full_rank_in_every_plane_are_not_certified(tmp_path):
    """No W_Q and W_K attain the convex optimum, and the gap says no less."""
    row = run(tmp_path, target="full", frequencies="fourier", strengths=(0.1,))["rotary", 0.1]
    assert (row["certified"], row["attainable"], row["not_global"]) == (0, 0, 0)
    assert row["deviation_largest"] < 1e-5  # and yet it is the best that planes can do: Eckart and Young
    assert row["above_convex"] > 0.01


def test_the_files_and_what_a_rate_that_diverges_leaves(tmp_path):
    run(tmp_path, steps=500)
    (snapshot,) = (tmp_path / "run" / "snapshots").glob("*.npz")
    with np.load(snapshot) as arrays:
        assert arrays["rotary_sizes"].shape == (8, 4)
    assert "Planes and ranks" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(SettingError, match="--lr 50 is too large"):
        run(tmp_path / "other", lr=50.0)


def test_presets_are_accepted_as_they_are():
    for preset in PRESETS.values():
        assert check(preset) == preset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("rotery",)}, "did you mean 'rotary'"),
        ({"strengths": ()}, "--strengths is empty"),
        ({"strengths": (math.nan,)}, "--strengths nan is negative or not finite"),
        ({"frequencies": "fourier", "offsets": 16}, "--offsets 16 cannot tell 8 planes apart: give at least 17"),
        ({"momentum": 1.0}, r"--momentum 1 is outside \[0, 1\)"),
        ({"theta": 1.0}, "--theta 1 must be above 1"),
        ({"theta": 5.0, "frequencies": "fourier"}, "--theta 5.0 has no effect on --frequencies fourier"),
        ({"heads": 0}, "--heads 0 is too small"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(SettingError, match=message):
        check(dataclasses.replace(Rotary(), **changes))
