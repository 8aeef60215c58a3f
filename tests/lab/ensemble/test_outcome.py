"""What a run came to, from made-up evaluations."""

import math

import pytest

from rankdecay.lab.ensemble.outcome import diverged, first_step, steps_to_hold


def evaluations(*accuracies):
    return [{"step": 10 * n, "test_accuracy": accuracy} for n, accuracy in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("accuracies", "step"),
    [
        ((), None),
        ((1.0,), None),  # nothing has held it yet
        ((0.2, 0.95, 0.95), 20),  # reaching it exactly counts
        ((0.2, 0.96, 0.94, 0.96), None),
        ((0.96, 0.94, 0.96, 0.97, 0.1), 30),
        ((None, 0.96, None, 0.96, 0.96), 40),
        ((0.2, 0.9, 0.9499), None),
    ],
)
def test_the_first_step_from_which_accuracy_holds(accuracies, step):
    assert steps_to_hold(evaluations(*accuracies), 0.95) == step


def test_holding_never_changes_with_further_evaluations():
    accuracies = [0.2, 0.96, 0.5, 0.96, 0.99, 0.1, 1.0, 1.0]
    seen = [steps_to_hold(evaluations(*accuracies[:n]), 0.95) for n in range(len(accuracies) + 1)]
    assert seen == [None] * 5 + [40] * 4


FINITE = {"train_loss": 1.0, "test_loss": 1.0, "query_norm": 1.0, "rest_norm": 1.0, "angular_step": None}


def test_a_run_has_diverged_when_its_loss_or_weights_are_no_numbers():
    assert not diverged(FINITE)  # other figures may be undefined
    for key in ("train_loss", "test_loss", "query_norm", "rest_norm"):
        assert diverged(FINITE | {key: None})


def test_the_first_step_within_bounds():
    records = [{"step": s, "rank": r} for s, r in ((10, None), (20, 5.0), (30, 2.0), (40, None), (50, 1.0))]
    assert first_step(records, "rank") == 20
    assert first_step(records, "rank", below=2.0) == 30
    assert first_step(records, "rank", below=1.5) == 50
    assert first_step(records, "rank", above=5.0) == 20
    assert first_step(records, "rank", below=0.5) is None
    assert first_step(records, "rank", above=math.inf) is None
    assert first_step([], "rank") is None
