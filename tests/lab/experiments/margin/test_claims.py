"""What is said of attention against its SVMs."""

import copy

import pytest

from rankdecay.lab.experiments.margin.experiment import EXPERIMENT
from rankdecay.lab.report.words import verdict

APPROACH = "K and Q apart come nearer the nuclear SVM as the margin grows"
LEFT_OUT = "No data set is left out"


def arm(summary, name):
    return next(row for row in summary["arms"] if row["name"] == name)


def verdict_of(summary):
    return verdict(summary, EXPERIMENT.headline, EXPERIMENT.checks, EXPERIMENT.styles)


def changed(summary, name, **changes):
    """The verdict after a row has other figures."""
    summary = copy.deepcopy(summary)
    arm(summary, name).update(changes)
    return verdict_of(summary)


def point(outcome, claim):
    return next((point for point in outcome.points if point.claim == claim), None)


def test_the_headline_counts_data_sets(summary):
    assert "every data set" in changed(summary, "separate", nearer_nuclear=4).headline
    assert "in 3 of 4 data sets" in changed(summary, "separate", nearer_nuclear=3).headline
    assert "no nuclear-norm bias in 3 of 4" in changed(summary, "separate", nearer_nuclear=1).headline
    left = changed(summary, "separate", nearer_nuclear=3, undecided=1).headline
    assert "every data set" in left
    assert "means over 3 data sets" in left


def test_data_on_which_both_svms_agree_tell_nothing_apart(summary):
    assert "cannot tell the biases apart" in changed(summary, "separate", cosine_between=1.0).headline
    assert (
        point(changed(summary, "merged", cosine_between=1.0), "The flow on W itself ends nearer the Frobenius SVM")
        is None
    )


def test_the_approach_compares_means_over_the_same_data_sets(summary):
    def at(margin, datasets, cosine):
        found = {"margin": margin, "datasets": datasets, "cosine_nuclear": cosine, "nuclear_excess": 1 - cosine}
        return found | {"cosine_frobenius": 0.5}

    rows = [at(1.0, 2, 0.5), at(10.0, 4, 0.7), at(1000.0, 4, 0.9), at(1e6, 4, 0.99)]
    found = point(changed(summary, "separate", at=rows), APPROACH)
    assert found.holds
    assert "0.700 at margin 10, 0.900 at margin 1,000 and 0.990 at margin 1e6" in found.text
    assert "30.0%, 10.0% and 1.0%" in found.text
    assert "means over 4 data sets" in found.text
    assert "0.500" not in found.text
    assert not point(changed(summary, "separate", at=[*rows[1:], at(1e7, 4, 0.6)]), APPROACH).holds
    assert point(changed(summary, "separate", at=rows[:2]), APPROACH) is None


@pytest.mark.parametrize(
    ("name", "claim", "nearer"),
    [
        ("merged", "The flow on W itself ends nearer the Frobenius SVM", 0),
        ("diagonal", "Diagonal K and Q end nearer the ℓ1 solution", 3),
        ("low_rank", "A nuclear norm on W ends nearer the nuclear SVM", 4),
    ],
)
def test_a_claim_holds_in_every_data_set_or_not_at_all(summary, name, claim, nearer):
    row = {"cosine_between": 0.8}
    holding = point(changed(summary, name, nearer_nuclear=nearer, **row), claim)
    assert holding.holds
    assert f"cosine {arm(summary, name)['cosine_nuclear']:.4f} to the" in holding.text
    failing = point(changed(summary, name, nearer_nuclear=2, **row), claim)
    assert not failing.holds
    assert "in 2 of " in failing.text


def test_a_decay_says_where_it_stops_the_flow(summary):
    settled = point(
        changed(summary, "low_rank", steps=10, margin=23.0), "A nuclear norm on W ends nearer the nuclear SVM"
    )
    assert settled.text.endswith("stops the flow at a margin of about 23.")
    turning = point(changed(summary, "low_rank", steps=600), "A nuclear norm on W ends nearer the nuclear SVM")
    assert turning.text.endswith("after 600 steps the direction was not settled yet.")


def test_an_arm_that_did_not_run_leaves_its_claim_open(summary):
    outcome = verdict_of({**summary, "arms": [arm(summary, "separate")]})
    assert point(outcome, "The flow on W itself ends nearer the Frobenius SVM").holds is None
    assert "it is open whether it takes two factors" in str(outcome)
    assert "nothing to say" in verdict_of({**summary, "arms": [arm(summary, "merged")]}).headline


def test_data_sets_that_are_left_out_are_counted(summary):
    assert point(verdict_of(summary), LEFT_OUT).text == "diagonal: 1 inseparable."
    found = point(changed(summary, "merged", infeasible=2, undecided=1, rank_short=[3]), LEFT_OUT)
    assert "2 with selected tokens that no W separates, 1 that selected no tokens and in the means though" in found.text
    summary["arms"] = [row for row in summary["arms"] if row["name"] != "diagonal"]
    assert point(verdict_of(summary), LEFT_OUT).text == "diagonal: all 4 inseparable."
    summary["settings"]["parametrisation"] = ["merged", "separate", "low_rank"]
    assert point(verdict_of(summary), LEFT_OUT) is None


def test_what_cannot_be_said_is_left_unsaid(summary):
    for row in summary["arms"]:
        row.update(cosine_nuclear=None, cosine_frobenius=None, cosine_between=None, undecided=row["seeds"], at=[])
    outcome = verdict_of(summary)
    assert "nothing to say" in outcome.headline
    assert [found.claim for found in outcome.points if found.holds is not None] == [LEFT_OUT]
    assert "separate: 4 that selected no tokens" in point(outcome, LEFT_OUT).text
