import pytest

from rankdecay.lab.experiments.boundary.arms import styles
from rankdecay.lab.experiments.boundary.claims import CHECKS, headline, note, ratio_words, seeds_words, settled
from rankdecay.lab.experiments.boundary.read import merged
from rankdecay.lab.report.words import Facts, verdict


def _arm(name, fraction, low=None, high=None, censored=None, **more):
    cells = [{"train_fraction": f, "strength": 1.0, "rest_decay": 1.0, "seeds": 3, "budget": 400} for f in (0.1, 0.5)]
    boundary = {
        "train_fraction": fraction, "low": low, "high": high, "censored": censored, "edge": more.pop("edge", None),
        "rest_edge": more.pop("rest_edge", None), "strength": 1.0, "rest_decay": 1.0,
    }  # fmt: skip
    return {"name": name, "runs": 6, "diverged": more.pop("diverged", 0), "boundary": boundary, "cells": cells, **more}


def _verdict(*arms, differences=()):
    summary = {"arms": list(arms), "settings": {"task": "add"}, "differences": list(differences)}
    result = verdict(summary, headline, CHECKS, styles({}))
    return result.headline, {point.claim: point for point in result.points}


def _difference(arm, ratio=None, low=None, high=None, censored=None):
    return {"reference": "prox", "arm": arm, "ratio": ratio, "low": low, "high": high, "censored": censored}


PROX = _arm("prox", 0.2, 0.17, 0.23)
LESS = "The reference needs less data than every other arm"
INSIDE = "Every boundary lies within the grid"
STRENGTH = "Every best strength lies within the grid"
NONE = "Without decay of queries and keys half of the runs never generalise"
L2 = "L2 on the same matrices does not do it"
UNIFORM = "Switching attention off does not do it"


def test_the_arm_that_needs_least_data_and_the_next():
    said, points = _verdict(_arm("l2", 0.35, 0.3, 0.4), PROX, _arm("none", 0.5, 0.4, None, "above"))
    assert said == (
        "Soft threshold (prox) needed the least data, each arm at its best strength: half of its runs generalise at "
        "20 % of the data (17–23 %). Next came L2 at 35 % of the data (30–40 %)."
    )
    assert not points[INSIDE].holds
    assert "no decay (above)" in points[INSIDE].text
    assert points[STRENGTH].holds


def test_an_order_within_the_intervals_is_not_settled():
    said, _ = _verdict(_arm("l2", 0.22, 0.19, 0.26), PROX)
    assert said.endswith("their intervals overlap, so their order is not settled.")


def test_controls_that_did_not_run_are_open():
    said, points = _verdict(PROX)
    assert said.endswith("there is no other arm to compare it with.")
    for claim, words in ((NONE, "any decay at all"), (L2, "L2 would do"), (UNIFORM, "switching attention off")):
        assert points[claim].holds is None
        assert f"it is open whether {words}" in points[claim].text or words in points[claim].text


def test_nothing_generalised():
    said, points = _verdict(_arm("l2", 0.5, None, None, "above"), _arm("prox", 0.5, None, None, "above"))
    assert said.startswith("In no arm did half of the runs generalise")
    assert L2 not in points  # a control that failed too says nothing


def test_the_least_data_of_the_grid_was_enough():
    said, points = _verdict(PROX, _arm("smooth", 0.1, None, 0.12, "below"))
    assert said.startswith("Smooth low-rank decay generalised in at least half of the runs even with the least data")
    assert "Next came soft threshold (prox) at 20 %" in said
    assert "smooth low-rank decay (below)" in points[INSIDE].text


def test_a_best_strength_at_the_edge_is_said():
    _, points = _verdict(_arm("l2", 0.3, edge="highest", rest_edge="lowest"), _arm("prox", 0.2, edge="highest"))
    assert not points[STRENGTH].holds
    assert "best at the highest strength tried, L2 and soft threshold (prox)" in points[STRENGTH].text
    assert "lowest decay of the rest tried, L2" in points[STRENGTH].text


def test_differences_are_grouped_by_what_their_interval_allows():
    found = [
        _difference("l2", 0.5, 0.4, 0.7),
        _difference("smooth", 1.5, 1.2, 1.9),
        _difference("prototype", 0.9, 0.7, 1.2),
        _difference("sphere", censored="unknown"),
    ]
    names = ("l2", "smooth", "prototype", "sphere")
    _, points = _verdict(PROX, *(_arm(name, 0.3) for name in names), differences=found)
    assert points[LESS].holds is None
    for words in ("less: L2 0.50 (0.40–0.70)", "more: smooth low-rank decay 1.50", "not settled: prototype 0.90"):
        assert words in points[LESS].text
    assert "not known, for both boundaries lie beyond the same end" in points[LESS].text
    for difference, holds in ((found[0], True), (found[1], False)):
        _, points = _verdict(PROX, _arm(difference["arm"], 0.3), differences=[difference])
        assert points[LESS].holds is holds


def test_a_difference_is_settled_where_the_seeds_say_so_too():
    by_fits, seeds = _difference("l2", 0.8, 0.7, 0.9), {"ratio": 0.85, "seeds": 5}
    assert settled(by_fits | {"by_seed": seeds | {"low": 0.7, "high": 0.99}}) == "less"
    assert settled(by_fits | {"by_seed": seeds | {"low": 0.7, "high": 1.04}}) is None
    assert settled(by_fits | {"by_seed": None}) == "less"
    assert seeds_words(seeds | {"low": 0.7, "high": 1.04}) == "0.85 (0.70–1.04)"
    assert seeds_words(seeds | {"low": None, "high": None}) == "0.85, one seed"
    assert seeds_words(seeds | {"low": 0.85, "high": 0.85}) == "0.85, all seeds alike"
    assert seeds_words(None) == "—"


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


def test_a_control_that_did_as_well_refutes_its_claim():
    _, points = _verdict(PROX, _arm("none", 0.3, 0.25, 0.35), _arm("uniform_attention", 0.1, None, 0.1, "below"))
    assert not points[NONE].holds
    assert "already at 10 % of the data, the least tried" in points[UNIFORM].text
    _, points = _verdict(PROX, _arm("uniform_attention", 0.5, 0.4, None, "above"))
    assert points[UNIFORM].holds


def test_l2_of_everything_stands_in_for_l2():
    _, points = _verdict(PROX, _arm("l2_all", 0.3, 0.25, 0.35))
    assert not points[L2].holds
    assert "L2 of all" in points[L2].text


def test_the_order_of_events_and_diverged_runs():
    counts = {"rank_first": 4, "together": 1, "accuracy_first": 0, "rank_only": 1, "accuracy_only": 0, "neither": 0}
    arms = _arm("prox", 0.2, events=counts), _arm("l2", 0.3, diverged=2)
    _, points = _verdict(*arms, differences=[_difference("l2", 0.7)])
    assert points["The rank falls before test accuracy rises"].text.startswith("in 4 of 6 runs of soft threshold")
    assert "2 of L2" in points["Every run stays finite"].text


def test_every_sweep_the_statistics_can_make_has_words(make_sweep):
    for number, boundary in enumerate((0.01, 0.3, 5.0)):
        directory = make_sweep(["l2", "prox"], name=str(number), boundaries={"prox": boundary})
        result = verdict(merged([directory]).summary, headline, CHECKS, styles({}))
        assert "None" not in str(result)
        assert "nan" not in str(result)


def test_the_note_says_which_set_decided_and_how_many_schedules_never_acted():
    def said(settings, **arm):
        summary = {"arms": [_arm("truncate", 0.2, **arm)], "settings": settings, "threshold": 0.95}
        return note(Facts.of(summary))

    old = said({"task": "add"})
    assert "when its test accuracy reaches 95 %" in old
    assert "schedule" not in old
    new = said({"task": "add", "validation": 100}, never_acted=3)
    assert "when its validation accuracy reaches 95 %" in new
    assert "3 runs ended before a schedule or a truncation acted" in new
