"""Cubic Newton-Schulz steps against the tables of docs/theory.md section 2.5."""

import math

import pytest
import torch
from matrices import (
    gaussian,
)

from rankdecay.linalg import (
    newton_schulz,
    shrink,
)
from rankdecay.linalg.rules.newton_schulz import RULE, with_steps
from rankdecay.rules import Options

BACKENDS = ["exact", "matmul"]


def test_cubic_response():
    # docs/theory.md section 2.5: p_5 at these points, the other direction making ‖W‖_F = 1.
    for s, expected in [(0.3, 0.99577), (0.1, 0.65872), (0.05, 0.36582), (0.01, 0.07582), (0.001, 0.00759)]:
        W = torch.diag(torch.tensor([math.sqrt(1 - s * s), s], dtype=torch.float64))
        assert float(newton_schulz(W)[1, 1]) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("steps", "slope"), [(3, 3.38), (5, 7.59), (7, 17.09), (10, 57.67), (15, 437.9), (20, 3325)])
def test_cubic_slope(steps, slope):
    W = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    assert float(newton_schulz(W, steps)[1, 1]) / 1e-9 == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("shape", [(512, 128), (128, 512), (128, 128)])
def test_newton_schulz_transposes(shape):
    W = gaussian(*shape)
    torch.testing.assert_close(newton_schulz(W.mT), newton_schulz(W).mT, rtol=0, atol=1e-6)


def test_newton_schulz_of_zero_and_of_tiny():
    assert not newton_schulz(torch.zeros(3, 4)).any()
    W = gaussian(6, 4)
    assert torch.equal(newton_schulz(W * 2.0**-100), newton_schulz(W))


def test_step_counts_reach_newton_schulz():
    W = gaussian(12, 12)
    torch.testing.assert_close(shrink(W, 0.1, "newton_schulz", steps=9), W - 0.1 * newton_schulz(W, 9))


@pytest.mark.usefixtures("nothing_stays_registered")
def test_a_rule_of_another_number_of_steps_is_known_by_its_name():
    rule = with_steps(9)
    assert with_steps(9) is rule
    assert with_steps(5) is RULE
    W = gaussian(12, 12)
    by_name = shrink(W, 0.1, rule.name)
    torch.testing.assert_close(by_name, shrink(W, 0.1, "newton_schulz", steps=9), rtol=0, atol=0)
    sigma, null = torch.linspace(0.1, 1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    wanted = RULE.fraction(sigma, null, null + 0.1, Options(steps=9))
    torch.testing.assert_close(rule.fraction(sigma, null, null + 0.1, Options()), wanted, rtol=0, atol=0)
