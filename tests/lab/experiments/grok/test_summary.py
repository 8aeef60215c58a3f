"""The figures of an arm follow from the records of its members."""

import pytest

from rankdecay.lab.ensemble.outcome import steps_to_hold
from rankdecay.lab.experiments.grok.summary import by_member, summarise, summarise_arm


def history(accuracies, arm: str = "none", seed: int = 0, **changes) -> list[dict]:
    record = {
        "arm": arm,
        "seed": seed,
        "train_accuracy": 1.0,
        "test_loss": 0.5,
        "stable_rank": 3.0 + seed,
        "effective_rank": 5.0,
        "product_stable_rank": 2.0,
        "product_effective_rank": 4.0,
        "query_norm": 1.0,
        "key_norm": 2.0,
        "decay_size": None,
        "radial_share": None,
        "tangential_share": None,
        "step_seconds": 0.01,
    }
    return [record | {"step": 50 * i, "test_accuracy": value} | changes for i, value in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.1, 0.96, 0.97, 0.2], 50),
        ([0.95, 0.95], 0),
        ([0.1, 0.96, 0.2, 0.96, 0.99], 150),
        ([0.1, 0.96, 0.94, 0.96, 0.94], None),  # reached, never held
        ([0.1, 0.2, 0.99], None),  # nobody knows yet whether it holds
        ([0.1, 0.949999], None),
        ([0.1, 0.99, None], None),  # diverged
        ([None, 0.99, 0.99], 50),
        ([0.99], None),
        ([], None),
    ],
)
def test_steps_to_hold(accuracies, expected):
    assert steps_to_hold(history(accuracies), 0.95) == expected


REACHED, LATER, NEVER = [0.1, 1.0, 1.0, 1.0], [0.1, 0.2, 1.0, 1.0], [0.1, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("members", "generalised", "steps"),
    [
        ([REACHED, REACHED, LATER], 3, 50),
        ([REACHED, LATER, NEVER], 2, 100),  # the seed that never got there counts as later than any other
        ([REACHED, NEVER, NEVER], 1, None),
        ([NEVER, NEVER, NEVER], 0, None),
        ([REACHED, LATER], 2, 75),
        ([REACHED], 1, 50),
        ([NEVER], 0, None),
    ],
)
def test_median_steps_to_generalise(members, generalised, steps):
    summary = summarise_arm("none", [history(a, seed=i) for i, a in enumerate(members)], 0.95)
    assert summary["seeds"] == len(members)
    assert summary["generalised"] == generalised
    assert summary["steps_to_generalise"] == steps


@pytest.mark.parametrize("members", [[REACHED, NEVER], [REACHED, LATER, NEVER, NEVER]])
def test_half_of_the_seeds_is_not_fewer_than_half(members):
    """docs/reference/run-directory.md: the median is null if *fewer* than half of the seeds got there."""
    summary = summarise_arm("none", [history(a, seed=i) for i, a in enumerate(members)], 0.95)
    assert summary["steps_to_generalise"] is not None


def test_other_figures_are_means_over_seeds_at_the_last_evaluation():
    members = [history([0.1, 0.4], seed=0), history([0.1, 0.8], seed=1, decay_size=0.25)]
    summary = summarise_arm("none", members, 0.95)
    assert summary["name"] == "none"
    assert summary["test_accuracy"] == pytest.approx(0.6)
    assert summary["stable_rank"] == pytest.approx(3.5)
    assert summary["decay_size"] == 0.25  # of the seed that has one
    assert summary["radial_share"] is None
    assert summary["steps_per_second"] == pytest.approx(100)


def test_records_are_sorted_into_arms_whatever_their_order():
    records = [r for arm, a in (("low_rank", LATER), ("none", NEVER)) for s in (1, 0) for r in history(a, arm, s)]
    arms = summarise(records[::-1], ["none", "low_rank"], 0.95)
    assert [arm["name"] for arm in arms] == ["none", "low_rank"]
    assert [arm["seeds"] for arm in arms] == [2, 2]
    assert [arm["steps_to_generalise"] for arm in arms] == [None, 100]
    assert summarise(records, ["none", "l2"], 0.95)[0]["name"] == "none"  # nothing of l2 is measured yet


def test_a_step_measured_again_counts_once():
    records = [*history([0.1, 0.2]), *history([0.1, 0.3])]
    [(member, rows)] = by_member(records).items()
    assert member == ("none", 0)
    assert [row["test_accuracy"] for row in rows] == [0.1, 0.3]
