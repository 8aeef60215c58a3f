"""Finite rescaling: what it changes, what it leaves, and when it does not know."""

import pytest
import torch
from torch import nn

from rankdecay.audit import audit
from rankdecay.audit.trial import RESCALING, Trial, alternating
from rankdecay.audit.view import ParameterView

from .models import row


def test_a_rescaling_uncovers_a_coincidence():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0]]))

    def loss():  # stationary along W, just here
        return (model.weight.sum() - 2).square() + model.weight[0, 0] - model.weight[0, 1]

    assert row(audit(model, loss), "weight").kind == "scale_invariant"
    assert row(audit(model, loss, confirm=True), "weight").kind == "neither"


def test_gradients_are_taken_also_where_they_are_switched_off():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        assert row(audit(model, lambda: model(torch.ones(1, 2)).sum()), "weight").kind


def test_units_are_scaled_up_and_down_in_turn():
    assert alternating(3).tolist() == [RESCALING, 1 / RESCALING, RESCALING]


def test_the_change_is_that_of_the_rescaled_loss_and_nothing_stays():
    weight = nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
    trial = Trial(lambda: weight.square().sum())
    view = ParameterView("weight", weight, None)
    assert trial.change([(view, torch.tensor([2.0]))]) == pytest.approx(3 * 13)
    assert weight.tolist() == [2, 3]
    assert trial.unchanged([(view, torch.tensor([2.0]))], reference=13, tolerance=1e-3) is False
    assert trial.unchanged([(view, torch.tensor([1.0]))], reference=13, tolerance=1e-3) is True


def test_a_change_below_the_rounding_of_the_loss_is_no_answer():
    weight = nn.Parameter(torch.tensor([2.0]))
    trial = Trial(lambda: weight.sum())
    assert trial.unchanged([(ParameterView("weight", weight, None), torch.tensor([1.5]))], 1e-9, 1e-3) is None


def test_parameters_are_put_back_when_the_loss_fails():
    weight = nn.Parameter(torch.tensor([2.0]))

    def loss():
        if weight.item() != 2:
            raise RuntimeError("out of memory")
        return weight.sum()

    trial = Trial(loss)
    with pytest.raises(RuntimeError, match="out of memory"):
        trial.change([(ParameterView("weight", weight, None), torch.tensor([1.5]))])
    assert weight.item() == 2
