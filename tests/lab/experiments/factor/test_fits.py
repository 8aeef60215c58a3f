"""The fits of the matrix experiment: their problems, and the figures made of them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from rankdecay.lab.experiments.factor.experiment import make_arms
from rankdecay.lab.experiments.factor.factorised import curvature
from rankdecay.lab.experiments.factor.fits import (
    Bound,
    deviations,
    imbalance_rates,
    initial_factors,
    make_problems,
    train,
)
from rankdecay.lab.experiments.factor.settings import Factor, check


def test_the_default_is_the_toy_of_the_paper():
    settings = check(Factor(seeds=2))
    problems = make_problems(settings, "cpu")
    assert torch.equal(problems.target[0], torch.diag(torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)))
    rng = np.random.default_rng(1)
    A, B = 0.5 * rng.standard_normal((5, 5)), 0.5 * rng.standard_normal((5, 5))
    factors = initial_factors(settings, 2, "cpu")
    for number in range(len(settings.strengths)):  # the same at every strength
        np.testing.assert_array_equal(factors[0][2 * number + 1].numpy(), A)
        np.testing.assert_array_equal(factors[1][2 * number + 1].numpy(), B.T)
    (merged,) = initial_factors(settings, 1, "cpu")
    np.testing.assert_allclose(merged[1].numpy(), A @ B.T, atol=1e-15)
    assert problems.strength.tolist() == [s for s in settings.strengths for _ in range(2)]


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("depth", [3, 5])
def test_deeper_products_begin_about_as_curved_as_two_factors(size, depth):
    settings = check(Factor(seeds=20, size=size, strengths=(0.0,)))
    two, deep = (curvature(initial_factors(settings, d, "cpu")).median().item() for d in (2, depth))
    assert two / 4 < deep < 4 * two


def test_random_targets_and_masks_are_of_their_seed():
    settings = check(Factor(seeds=3, size=8, target=("random",), target_rank=2, observed=0.25, strengths=(0.1, 0.2)))
    problems = make_problems(settings, "cpu")
    assert problems.mask is not None
    torch.testing.assert_close(problems.values[:, 0], torch.ones(6, dtype=torch.float64))
    assert problems.values[:, 2:].max().item() < 1e-12
    assert problems.mask.sum((1, 2)).tolist() == [16] * 6
    for part in (problems.target, problems.mask):
        assert torch.equal(part[:3], part[3:])
        assert not torch.equal(part[0], part[1])
    fewer = make_problems(dataclasses.replace(settings, seeds=1), "cpu")
    assert torch.equal(fewer.target[0], problems.target[0])


def test_more_seeds_change_nothing_in_those_there_were():
    few, many = (check(Factor(seeds=n, strengths=(0.0, 0.1, 0.3), steps=60)) for n in (2, 5))
    for arm in make_arms(few):
        ends = []
        for settings in (few, many):
            outcome = train(
                arm, make_problems(settings, "cpu"), initial_factors(settings, arm.how.depth, "cpu"), settings
            )
            ends.append(outcome.W.view(3, settings.seeds, 5, 5)[:, :2])
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


def test_rates_of_an_exact_exponential():
    steps = list(range(0, 201, 20))
    time = torch.tensor(steps, dtype=torch.float64)
    imbalances = torch.stack([4 * torch.exp(-0.03 * time), torch.exp(-0.01 * time)], 1)
    rates = imbalance_rates(steps, imbalances, 0.1)
    assert rates is not None
    assert rates.tolist() == pytest.approx([0.03, 0.01])
    assert imbalance_rates([0, 500], imbalances[:2], 0.1) is None  # no evaluation in the window
    assert imbalance_rates(steps, torch.zeros_like(imbalances), 0.1) is None  # nothing but rounding


def test_deviations_of_a_deep_product_do_not_depend_on_which_values_were_dropped():
    deep = next(arm for arm in make_arms(Factor()) if arm.name == "deep")
    values = torch.tensor([[1.0, 0.8]], dtype=torch.float64)
    expected, distance, _ = deviations(deep, values, values, 0.1)
    assert distance.item() > 0.05
    dropped = torch.tensor([[expected[0, 1].item(), 0.0]], dtype=torch.float64)
    assert deviations(deep, dropped, values, 0.1)[1].item() < 1e-12


def test_a_bound_that_is_broken_is_counted():
    """Factors of a gap above their bound do not exist; a bound made too small is noticed all the same."""
    A = torch.eye(2, dtype=torch.float64)[None]
    bound = Bound()
    bound.see([A, A])
    assert (bound.checks, bound.violations) == (1, 0)
    bound.see([2 * A, A])
    assert (bound.checks, bound.violations) == (2, 0)
    assert bound.largest_ratio == pytest.approx((5 - 4) / (math.sqrt(6) * 3))
