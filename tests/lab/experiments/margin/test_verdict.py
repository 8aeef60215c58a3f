"""What is said of attention against its SVMs."""

import copy
import json

import pytest

from rankdecay.lab.experiments.margin.verdict import verdict


@pytest.fixture
def summary(planar):
    return json.loads((planar / "summary.json").read_text())


def arm(summary, name):
    return next(row for row in summary["arms"] if row["name"] == name)


def lead_of(summary, name, **changes):
    changed = copy.deepcopy(summary)
    arm(changed, name).update(changes)
    return verdict(changed)


def test_the_headline_counts_data_sets(summary):
    assert "every data set" in lead_of(summary, "separate", nearer_nuclear=4).headline
    assert "in 3 of 4 data sets" in lead_of(summary, "separate", nearer_nuclear=3).headline
    assert "no nuclear-norm bias in 3 of 4" in lead_of(summary, "separate", nearer_nuclear=1).headline
    left = lead_of(summary, "separate", nearer_nuclear=3, undecided=1).headline
    assert "every data set" in left
    assert "means over 3 data sets" in left


def test_data_on_which_both_svms_agree_tell_nothing_apart(summary):
    assert "cannot tell the biases apart" in lead_of(summary, "separate", cosine_between=1.0).headline


def test_how_fast_compares_means_over_the_same_data_sets(summary):
    def at(margin, datasets, cosine):
        found = {"margin": margin, "datasets": datasets, "cosine_nuclear": cosine, "nuclear_excess": 1 - cosine}
        return found | {"cosine_frobenius": 0.5}

    rows = [at(1.0, 2, 0.5), at(10.0, 4, 0.7), at(1000.0, 4, 0.9), at(1e6, 4, 0.99)]
    text = dict(lead_of(summary, "separate", at=rows).points)["How fast"]
    assert "0.700 at margin 10, 0.900 at margin 1,000 and 0.990 at margin 1e6" in text
    assert "30.0%, 10.0% and 1.0%" in text
    assert "means over 4 data sets" in text
    assert "0.500" not in text
    assert "How fast" not in dict(lead_of(summary, "separate", at=rows[:2]).points)


def test_every_arm_has_its_sentence_from_its_own_numbers(summary):
    points = dict(verdict(summary).points)
    assert f"cosine {arm(summary, 'merged')['cosine_frobenius']:.4f} to the Frobenius SVM" in points["Merged"]
    assert f"{arm(summary, 'diagonal')['nuclear_excess']:.2%} above the least (mean of 3)" in points["Diagonal"]
    assert (
        f"as a nuclear norm on W, cosine {arm(summary, 'low_rank')['cosine_nuclear']:.4f}" in points["Explicit decay"]
    )
    arm(summary, "low_rank")["steps"] = summary["settings"]["steps"]
    text = dict(verdict(summary).points)["Explicit decay"]
    assert text.endswith("the direction was not settled yet as a nuclear norm on W.")
    assert points["Left out"] == "diagonal: 1 inseparable."
    assert "2 examples of 3 tokens in 2 dimensions" in points["Limits"]
    assert "Published recipe" not in points
    summary["arms"].append(arm(summary, "separate") | {"name": "recipe_bare"})
    assert "without to the nuclear SVM" in dict(verdict(summary).points)["Published recipe"]


def test_what_cannot_be_said_is_left_unsaid(summary):
    assert "not complete" in verdict(None).headline
    for row in summary["arms"]:
        row.update(cosine_nuclear=None, cosine_frobenius=None, undecided=row["seeds"], at=[])
    outcome = verdict(summary)
    assert "nothing to say" in outcome.headline
    points = dict(outcome.points)
    assert points.keys() == {"Left out", "Limits"}
    assert "separate: 4 that selected no tokens" in points["Left out"]
