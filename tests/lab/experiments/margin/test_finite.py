"""Steps of finite length: those of torch where float64 can follow, and on from there."""

import pytest
import torch

from rankdecay.lab.experiments.margin.data import draw
from rankdecay.lab.experiments.margin.finite import Method, descend
from rankdecay.lab.experiments.margin.flow import Course, Problem, gradient, initial_weights, loss_value, product
from rankdecay.lab.experiments.margin.recipe import descend as descend_in_float64

P = Problem.of(draw("generic", range(2), 3, 4, 5, 4.0))
OPTIMIZERS = {
    "gd": lambda leaves: torch.optim.SGD(leaves, 0.05),
    "adam": lambda leaves: torch.optim.Adam(leaves, 0.05, (0.9, 0.97), 1e-3),
}


def begin():
    return initial_weights("separate", "random", 1.0, [0, 1], 5, 3)


def trained(optimizer, steps, **changes):
    course = {"loss": "exponential", "margin": 1e6, "evaluate_every": 10}
    method = {"lr": 0.05, "beta2": 0.97, "epsilon": 1e-3}
    course |= {name: value for name, value in changes.items() if name in course}
    method |= {name: value for name, value in changes.items() if name in method}
    return descend(begin(), P, Method(optimizer, **method), Course(steps=steps, **course))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_a_step_is_that_of_torch(optimizer, loss):
    """ε of 1e-3 is near these gradients, so its units are seen; the mean over sets is not part of a loss of its own."""
    leaves = [w.requires_grad_() for w in begin()]
    by_torch = OPTIMIZERS[optimizer](leaves)
    for _ in range(60):
        by_torch.zero_grad()
        loss_value(P, product(leaves), loss).sum().backward()
        by_torch.step()
    mine = trained(optimizer, 60, loss=loss)
    assert mine.steps == [0, 10, 20, 30, 40, 50, 60]
    torch.testing.assert_close(mine.weights[-1], product(leaves).detach(), rtol=1e-5, atol=1e-7)


def test_normalised_steps_are_those_of_the_published_recipe_until_its_softmax_saturates():
    mine = trained("normalised", 20, lr=0.1).weights[-1]
    theirs = descend_in_float64(begin(), P, loss="exponential", strength=0.0, lr=0.1, steps=20).weights[-1]
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("optimizer", "margin", "changes"), [("normalised", 800.0, {"lr": 0.1}), ("adam", 200.0, {"beta2": 0.9})]
)
def test_steps_go_on_beyond_where_a_float64_softmax_saturates_and_finished_sets_stay(optimizer, margin, changes):
    """Without ε Adam's steps do not fade: its moments are kept in units of the gradient."""
    found = trained(optimizer, 8000, margin=margin, epsilon=0.0, **changes)
    last = gradient(P, found.weights[-1], "exponential")
    assert found.steps[-1] < 8000
    assert bool(((last.margin >= margin) & (last.margin < margin + 20)).all())
    assert float(last.log_size.max()) < -0.9 * margin


def test_with_an_epsilon_adam_fades_where_its_gradient_is_smaller():
    small, none = (trained("adam", 3000, epsilon=epsilon).weights[-1] for epsilon in (1e-8, 0.0))
    margins = [gradient(P, W, "exponential").margin.min() for W in (small, none)]
    assert margins[0] < 40 < margins[1]
