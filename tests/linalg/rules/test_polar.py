"""The rule that subtracts the polar factor: null directions, and the overshoot."""

import torch
from matrices import (
    with_spectrum,
)

from rankdecay.linalg import (
    shrink,
)

BACKENDS = ["exact", "matmul"]


def test_polar_rule_leaves_null_directions_alone():
    W = with_spectrum((10, 6), torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    sigma = torch.linalg.svdvals(shrink(W, 0.5, "polar"))
    torch.testing.assert_close(sigma, torch.tensor([2.5, 1.5, 0, 0, 0, 0]).double(), rtol=0, atol=1e-12)


def test_polar_rule_overshoots_by_design():
    W = torch.diag(torch.tensor([3.0, 0.4]))
    torch.testing.assert_close(shrink(W, 1.0, "polar"), torch.diag(torch.tensor([2.0, -0.6])))
