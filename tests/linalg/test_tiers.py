"""Products of tensor cores as a CPU rounds them: what they lose, which a step takes, and what it is off by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, relative_error
from tiers import LEAST, PRODUCTS, worst  # benchmarks/tiers.py

from rankdecay.linalg import tiers
from rankdecay.linalg.matmul import LEAST_RATIO, choose_tier
from rankdecay.linalg.tiers import available, by_bfloat16x3, by_tf32, product_of, round_to_tf32

ALL = ("tf32", "bfloat16x3", "float32")


@given(x=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
def test_tf32_has_eleven_bits_rounded_to_the_nearest(x):
    rounded = float(round_to_tf32(torch.tensor([x])))
    mantissa, _ = torch.frexp(torch.tensor(rounded, dtype=torch.float64))
    assert float(mantissa * 2**11) % 1 == 0
    assert abs(rounded - x) <= abs(x) * 2.0**-11
    assert float(round_to_tf32(torch.tensor([rounded]))) == rounded


def test_the_error_of_a_product_is_that_of_its_operands():
    A, B = gaussian(1, 90, 70), gaussian(1, 70, 60, seed=1)
    exact = A.double() @ B.double()
    assert torch.equal(by_tf32(A, B), round_to_tf32(A) @ round_to_tf32(B))
    assert 2.0**-14 < relative_error(by_tf32(A, B), exact) < 2.0**-11
    assert relative_error(by_bfloat16x3(A, B), exact) < 2.0**-16 < 2.0**-10 < relative_error(A.bfloat16(), A.double())
    assert relative_error(by_bfloat16x3(A, B), exact) < 2.0**-5 * relative_error(by_tf32(A, B), exact)


def test_a_step_takes_the_quickest_tier_that_is_good_enough_and_there():
    assert choose_tier(0.13, ALL) == "bfloat16x3"
    assert choose_tier(0.5, ALL) == "tf32"
    assert choose_tier(0.5, ("float32",)) == "float32" == choose_tier(0.13, ("tf32", "float32"))
    ratios = [LEAST, 0.1, 0.2, *LEAST_RATIO.values(), 0.7, 5.0]
    order = [ALL.index(choose_tier(ratio, ALL)) for ratio in sorted(ratios)]
    assert order == sorted(order, reverse=True)
    assert product_of("float32") is None


def test_only_cuda_from_ampere_on_has_tiers(monkeypatch):
    for capability, expected in (((7, 5), ("float32",)), ((8, 0), ALL), ((9, 0), ALL)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(tiers, "_SUMS_IN_FLOAT32", True)
        assert available(torch.device("cuda")) == expected
    monkeypatch.setattr(tiers, "_SUMS_IN_FLOAT32", False)
    assert available(torch.device("cuda")) == ("tf32", "float32")
    assert available(torch.device("cpu")) == ("float32",) == available(torch.device("mps"))


@pytest.mark.parametrize("ratio", [0.0626, 0.08, 0.13, 0.25, 0.35, 0.5, 1.0])
def test_the_step_by_the_chosen_tier_is_within_a_thousandth(ratio):
    assert worst(ratio, product_of(choose_tier(ratio, ALL)), [(120, 80)], 1) < 1e-3
    if choose_tier(ratio, ALL) != "tf32" and ratio < 0.25:  # a choice that could be wrong
        assert worst(ratio, by_tf32, [(120, 80)], 1) > 1e-3
    if ratio in (0.13, 1.0):
        assert worst(ratio, PRODUCTS["bfloat16"], [(120, 80)], 1) > 1e-3


def test_tf32_is_allowed_inside_alone():
    settings = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)
    with tiers._tf32_allowed():
        assert getattr(settings, name) == value
    assert getattr(settings, name) == before
