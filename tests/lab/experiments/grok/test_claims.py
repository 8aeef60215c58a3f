"""Claims flip when the numbers flip, and a control that did not run is named."""

import pytest

from rankdecay.lab.experiments.grok.charts import styles
from rankdecay.lab.experiments.grok.claims import CHECKS, headline
from rankdecay.lab.report.words import verdict

ATTENTION, TUNED = "Switching attention off is not enough", "A stronger L2 is not enough"
EARLIER, NEED = "Low-rank decay gets there before tuned L2", "Queries and keys need a decay"
KEPT, RANK = "What generalised stays so", "Arms that generalise end at a lower stable rank"
RATE = "The rate of success is known to within 20 %"


def arm(name, generalised, steps=None, seeds=3, **more):
    by_seed = [steps] * generalised + [None] * (seeds - generalised)
    figures = {"test_accuracy": 0.99, "stable_rank": None, "steps_to_generalise_by_seed": by_seed}
    return {"name": name, "seeds": seeds, "generalised": generalised, "steps_to_generalise": steps} | figures | more


def outcome(*arms, rule="smooth", **more):
    settings = {"steps": 600, "rule": rule}
    found = verdict({"arms": list(arms), "settings": settings, **more}, headline, CHECKS, styles(settings))
    return found.headline, {point.claim: point for point in found.points}


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (
            [arm("none", 0), arm("low_rank", 3, 400)],
            "Low-rank decay, smooth, generalised in 3 of 3 seeds (median 400 steps) within 600 steps; "
            "no other arm did.",
        ),
        (
            [arm("l2_tuned", 3, 550), arm("low_rank", 2, 400)],
            "Low-rank decay, smooth, generalised in 2 of 3 seeds (median 400 steps) within 600 steps; "
            "so did tuned L2 in 3 of 3 seeds (median 550 steps).",
        ),
        (
            [arm("l2", 1), arm("low_rank", 0)],
            "Low-rank decay, smooth, generalised in none of 3 seeds within 600 steps; L2 in 1 of 3 seeds did.",
        ),
        (
            [arm("prox", 0), arm("smooth", 1), arm("none", 0)],
            "Low-rank decay, prox, generalised in none of 3 seeds; low-rank decay, smooth, in 1 of 3 seeds "
            "within 600 steps; no other arm did.",
        ),
        ([arm("l2", 1)], "Generalised within 600 steps: L2 in 1 of 3 seeds."),
        (
            [arm("l2", 0), arm("none", 0)],
            "No arm generalised within 600 steps, so this run does not tell the arms apart.",
        ),
        (
            [arm("low_rank", 3, 400)],
            "Low-rank decay, smooth, generalised in 3 of 3 seeds (median 400 steps) within 600 steps; "
            "there was no other arm to compare with.",
        ),
    ],
)  # fmt: skip
def test_headline(arms, said):
    assert outcome(*arms)[0] == said


def test_a_run_that_goes_on_is_told_as_far_as_it_went():
    assert "within 250 steps" in outcome(arm("low_rank", 0), step=250)[0]


@pytest.mark.parametrize(("name", "claim"), [("uniform_attention", ATTENTION), ("l2_tuned", TUNED), ("none", NEED)])
def test_a_control_that_generalises_too_flips_its_claim(name, claim):
    subject = arm("low_rank", 3, 400)
    assert outcome(arm(name, 0), subject)[1][claim].holds is True
    flipped = outcome(arm(name, 2, 500), subject)[1][claim]
    assert flipped.holds is False
    assert "2 of 3 seeds (median 500 steps) generalised" in flipped.text
    assert claim not in outcome(arm(name, 0), arm("low_rank", 0))[1]  # where nothing did, its failure says nothing
    missing = outcome(subject)[1][claim]
    assert missing.holds is None
    assert f"{name} not in this run: it is open whether" in missing.text


def test_who_was_earlier_is_an_observation():
    point = outcome(arm("l2_tuned", 3, 550), arm("low_rank", 3, 400))[1][EARLIER]
    assert point.holds is True
    assert point.text == (
        "by the median low-rank decay, smooth, 150 steps earlier (400 against 550); "
        "3 seeds: an observation, not a test."
    )
    later = outcome(arm("l2_tuned", 12, 300, seeds=12), arm("low_rank", 12, 400, seeds=12))[1][EARLIER]
    assert later.holds is False
    assert "100 steps later" in later.text
    assert "observation" not in later.text
    assert EARLIER not in outcome(arm("l2_tuned", 1), arm("low_rank", 3, 400))[1]


def test_success_that_was_lost_again():
    kept, lost = arm("low_rank", 3, 400), arm("prototype", 3, 400, test_accuracy=0.61)
    assert outcome(kept)[1][KEPT].holds is True
    point = outcome(kept, lost)[1][KEPT]
    assert point.holds is False
    assert point.text.endswith("prototype (0.61).")


@pytest.mark.parametrize(("rank", "holds"), [(1.2, True), (30.0, False)])
def test_rank_is_reported_as_association(rank, holds):
    others = [arm("l2", 0, stable_rank=20.0), arm("uniform_attention", 0, stable_rank=0.0)]
    point = outcome(arm("low_rank", 3, 400, stable_rank=rank), *others)[1][RANK]
    assert point.holds is holds  # attention held uniform has no say
    assert "does not say why" in point.text


def test_few_seeds_do_not_tell_the_rate():
    point = outcome(arm("low_rank", 3, 400))[1][RATE]
    assert point.holds is False
    assert "between 44 and 100 %" in point.text
    assert outcome(arm("low_rank", 60, 400, seeds=60))[1][RATE].holds is True
