"""Stochastic rounding: expectation, neighbours, and nothing where nothing is to round."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankdecay.linalg.rounding import stochastic_round

NARROW = [torch.bfloat16, torch.float16]


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", NARROW)
@given(value=st.floats(-6e4, 6e4, width=32), seed=st.integers(0, 2**32))
def test_the_result_is_one_of_the_two_neighbours(dtype, value, seed):
    x = torch.tensor([value], dtype=torch.float32)
    out = stochastic_round(x, dtype, _seeded(seed))
    assert out.dtype == dtype
    near = x.to(dtype)
    infinity = torch.tensor([float("inf")], dtype=dtype)
    around = {near.item(), torch.nextafter(near, infinity).item(), torch.nextafter(near, -infinity).item()}
    assert out.item() in around
    assert (out.float() - x).abs() <= (torch.nextafter(near.abs(), infinity) - near.abs()).float()


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_dtype_can_hold_is_kept_bit_for_bit(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert torch.equal(stochastic_round(every.float(), dtype, _seeded()).view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.0 + 1e-4, -1.0 - 1e-4, 0.1, -3.14159, 1e-7, 0.0])
def test_the_expectation_is_the_value(dtype, value):
    draws = 200_000
    x = torch.full((draws,), value)
    out = stochastic_round(x, dtype, _seeded()).double()
    gap = out.max() - out.min()
    assert (out.mean() - x[0]).abs() <= 5 * gap / 2 / draws**0.5


def test_the_same_generator_gives_the_same_rounding():
    x = torch.randn(100)
    first, second = (stochastic_round(x, torch.bfloat16, _seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, stochastic_round(x, torch.bfloat16, _seeded(4)))
