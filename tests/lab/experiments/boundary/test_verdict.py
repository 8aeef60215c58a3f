import pytest

from rankdecay.lab.experiments.boundary.read import read_sweep
from rankdecay.lab.experiments.boundary.verdict import ratio_words, settled, verdict


def _arm(name, fraction, low=None, high=None, censored=None, **more):
    cells = [{"train_fraction": f, "strength": 1.0, "rest_decay": 1.0, "seeds": 3, "budget": 400} for f in (0.1, 0.5)]
    boundary = {
        "train_fraction": fraction, "low": low, "high": high, "censored": censored, "edge": more.pop("edge", None),
        "rest_edge": more.pop("rest_edge", None), "strength": 1.0, "rest_decay": 1.0,
    }  # fmt: skip
    return {"name": name, "runs": 6, "boundary": boundary, "cells": cells, **more}


def _verdict(*arms, differences=(), complete=True):
    result = verdict({"arms": list(arms), "settings": {"task": "add"}, "differences": list(differences)}, complete)
    return result.headline, dict(result.points)


def _difference(arm, ratio=None, low=None, high=None, censored=None):
    return {"reference": "low_rank", "arm": arm, "ratio": ratio, "low": low, "high": high, "censored": censored}


LOW_RANK = _arm("low_rank", 0.2, 0.17, 0.23)


def test_the_arm_that_needs_least_data_and_the_next():
    headline, points = _verdict(_arm("l2", 0.35, 0.3, 0.4), LOW_RANK, _arm("none", 0.5, 0.4, None, "above"))
    assert headline == (
        "Low-rank decay needed the least data, each arm at its best strength: half of its runs generalise at "
        "20 % of the data (95 % interval 17–23 %). Next came L2 at 35 % of the data (30–40 %)."
    )
    assert "No decay: fewer than half of the runs" in points["Bounded by the grid"]
    assert "bounds, not estimates" in points["Bounded by the grid"]
    assert points["Edge of the grid"] == "No best strength lies at the edge of what was tried."


def test_an_order_within_the_intervals_is_not_settled():
    headline, _ = _verdict(_arm("l2", 0.22, 0.19, 0.26), LOW_RANK)
    assert headline.endswith("their intervals overlap, so their order is not settled.")


def test_one_arm_is_compared_with_nothing():
    headline, points = _verdict(LOW_RANK)
    assert headline.endswith("there is no other arm to compare it with.")
    for control, words in (("No decay", "any decay at all"), ("L2", "L2 on the same"), ("Uniform attention", "off")):
        assert points[control].startswith("Not in this sweep: it is open whether")
        assert words in points[control]


def test_nothing_generalised():
    headline, points = _verdict(_arm("l2", 0.5, None, None, "above"), _arm("low_rank", 0.5, None, None, "above"))
    assert "does not tell the arms apart" in headline
    assert list(points) == ["How far this goes"]


def test_the_least_data_of_the_grid_was_enough():
    headline, points = _verdict(LOW_RANK, _arm("smooth", 0.1, None, 0.12, "below"))
    assert headline.startswith(
        "Smooth low-rank decay generalised in at least half of the runs even with the least data"
    )
    assert "how little would do is not known. Next came low-rank decay at 20 %" in headline
    assert "even with the least data tried (10 % of the data)" in points["Bounded by the grid"]


def test_a_best_strength_at_the_edge_is_said():
    _, points = _verdict(_arm("l2", 0.3, edge="highest", rest_edge="lowest"), _arm("low_rank", 0.2, edge="highest"))
    assert points["Edge of the grid"] == (
        "Best at the highest strength tried: L2 and low-rank decay; best at the lowest decay of the rest tried: L2. "
        "Beyond the grid they may need less data than is stated here."
    )


def test_differences_are_grouped_by_what_their_interval_allows():
    names = ("l2", "smooth", "prototype", "none", "sphere", "uniform_attention")
    _, points = _verdict(
        LOW_RANK,
        *(_arm(name, 0.3) for name in names),
        differences=[
            _difference("l2", 0.5, 0.4, 0.7),
            _difference("smooth", 1.5, 1.2, 1.9),
            _difference("prototype", 0.9, 0.7, 1.2),
            _difference("none", 0.4, None, 0.6, "at most"),
            _difference("sphere", censored="unknown"),
            _difference("uniform_attention", 0.8, None, None, "at most"),
        ],
    )
    text = points["Low-rank decay and the others"]
    assert "It needed less than: L2 0.50 (0.40–0.70); no decay at most 0.40 (<0.60)." in text
    assert "It needed more than: smooth low-rank decay 1.50 (1.20–1.90)." in text
    assert "or is open: prototype 0.90 (0.70–1.20); uniform attention at most 0.80." in text
    assert "same end of the grid: fixed norm." in text


@pytest.mark.parametrize(
    ("difference", "words", "reading"),
    [
        (_difference("l2", 0.5, 0.4, 0.7), "0.50 (0.40–0.70)", "less"),
        (_difference("l2", 2.0, 1.4, None, "at least"), "at least 2.00 (>1.40)", "more"),
        (_difference("l2", 0.9, 0.7, 1.0), "0.90 (0.70–1.00)", None),
        (_difference("l2", censored="unknown"), "not known", None),
    ],
)
def test_ratios_in_words(difference, words, reading):
    assert ratio_words(difference) == words
    assert settled(difference) == reading


def test_controls_that_did_as_well_are_said_first_to_last():
    _, points = _verdict(LOW_RANK, _arm("none", 0.3, 0.25, 0.35), _arm("uniform_attention", 0.1, None, 0.1, "below"))
    assert "generalising needs no decay of queries and keys" in points["No decay"]
    assert "cannot tell the benefit of a low-rank pattern" in points["Uniform attention"]
    assert "already at 10 % of the data, the least tried" in points["Uniform attention"]


def test_controls_that_failed():
    _, points = _verdict(LOW_RANK, _arm("uniform_attention", 0.5, 0.4, None, "above"))
    assert points["Uniform attention"].endswith("On this grid, switching attention off was not enough.")


def test_l2_of_everything_stands_in_for_l2():
    _, points = _verdict(LOW_RANK, _arm("l2_all", 0.3, 0.25, 0.35))
    assert "L2" not in points
    assert "does not require low-rank decay" in points["L2 of all"]


def test_the_order_of_events_is_no_cause():
    counts = {"rank_first": 4, "together": 1, "accuracy_first": 0, "rank_only": 1, "accuracy_only": 0, "neither": 0}
    _, points = _verdict(_arm("low_rank", 0.2, events=counts), _arm("l2", 0.3), differences=[_difference("l2", 0.7)])
    assert points["Order of events"].startswith("In 4 of 6 runs of low-rank decay")
    assert "need not be the cause" in points["Order of events"]


def test_diverged_runs_are_counted():
    _, points = _verdict(LOW_RANK, _arm("l2", 0.3, diverged=2))
    assert points["Diverged"].startswith("Runs that diverged: 2 of L2;")


def test_limits_name_seeds_budget_and_association():
    _, points = _verdict(LOW_RANK)
    assert "6 runs, 3 per cell" in points["How far this goes"]
    assert "within 400 steps" in points["How far this goes"]
    assert "not what caused what" in points["How far this goes"]


def test_a_sweep_still_running_says_so():
    assert verdict(None).headline == "This sweep is not complete."
    _, points = _verdict(LOW_RANK, complete=False)
    assert points["Not complete"] == "6 runs are finished; what follows can still change."


def test_every_sweep_the_statistics_can_make_has_words(make_sweep):
    for number, boundary in enumerate((0.01, 0.3, 5.0)):
        directory = make_sweep(["l2", "low_rank"], name=str(number), boundaries={"low_rank": boundary})
        result = verdict(read_sweep([directory]).summary)
        assert "None" not in str(result)
        assert "nan" not in str(result)
