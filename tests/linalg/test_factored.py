"""Singular values of a product from its factors, against the product itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.linalg.factored import factored_singular_values


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 12), batch=st.integers(1, 3), seed=st.integers(0, 999)
)
def test_equal_to_the_svd_of_the_product(m, n, k, batch, seed):
    k = min(k, m, n)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, m, k, generator=generator, dtype=torch.float64)
    b = torch.randn(batch, n, k, generator=generator, dtype=torch.float64)
    expected = torch.linalg.svdvals(a @ b.mT)[:, :k]
    torch.testing.assert_close(factored_singular_values(a, b), expected, rtol=1e-10, atol=1e-10)


def test_zero_and_rank_one_factors():
    a = torch.ones(5, 3)
    values = factored_singular_values(a, torch.zeros(4, 3))
    assert torch.equal(values, torch.zeros(3, dtype=torch.float64))
    values = factored_singular_values(a, torch.ones(4, 3))
    torch.testing.assert_close(values[0].item(), 3 * (5 * 4) ** 0.5)
    assert values[1:].abs().max() < 1e-12


@pytest.mark.parametrize(("a", "b"), [((5, 3), (4, 2)), ((2, 3), (4, 3))])
def test_shapes_that_cannot_be_factors_are_refused(a, b):
    with pytest.raises(ValueError, match="head"):
        factored_singular_values(torch.ones(a), torch.ones(b))
