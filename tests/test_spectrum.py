"""Named ranks: closed forms, invariances, the order between them, and what random matrices have."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.spectrum import Spectrum, spectrum

RANKS = ["stable_rank", "participation_ratio", "nuclear_rank", "effective_rank"]
NORMS = ["nuclear_norm", "frobenius_norm", "spectral_norm"]


def values(s: Spectrum) -> dict[str, float]:
    found = {name: float(getattr(s, name)) for name in (*RANKS, *NORMS)}
    return found | {"pseudo_rank": float(s.pseudo_rank()), "numerical_rank": float(s.numerical_rank())}


def test_three_four():
    s = spectrum(torch.diag(torch.tensor([3.0, 4.0])))
    torch.testing.assert_close(s.singular_values, torch.tensor([4.0, 3.0]).double())
    entropy = -(4 / 7) * math.log(4 / 7) - (3 / 7) * math.log(3 / 7)
    expected = {
        "nuclear_norm": 7,
        "frobenius_norm": 5,
        "spectral_norm": 4,
        "stable_rank": 25 / 16,
        "nuclear_rank": 49 / 25,
        "participation_ratio": 625 / (256 + 81),
        "effective_rank": math.exp(entropy),
        "pseudo_rank": 1,
        "numerical_rank": 2,
    }
    assert values(s) == pytest.approx(expected, rel=1e-12)
    # docs/theory.md section 4.2: cosine with the polar factor, and the squared tangential norm.
    assert float(s.nuclear_norm / (math.sqrt(2) * s.frobenius_norm)) == pytest.approx(0.98995, abs=5e-6)
    assert 2 - float(s.nuclear_rank) == pytest.approx(0.04, abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 6), (6, 1)])
def test_zero_matrix_has_rank_zero(shape):
    assert set(values(spectrum(torch.zeros(shape))).values()) == {0.0}


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
def test_empty_matrix_has_rank_zero(shape):
    s = spectrum(torch.zeros(shape))
    for name in (*RANKS, *NORMS):
        assert getattr(s, name).shape == shape[:-2]
        assert not getattr(s, name).any()
    assert not s.pseudo_rank().any()
    assert not s.numerical_rank().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_one(dtype):
    W = torch.outer(torch.arange(1.0, 7.0, dtype=dtype), torch.arange(1.0, 5.0, dtype=dtype))
    found = values(spectrum(W))
    for name in RANKS:
        assert found[name] == pytest.approx(1, rel=1e-5)
    assert found["pseudo_rank"] == 0.25
    assert found["numerical_rank"] == 1


def test_float32_product_has_the_rank_of_its_factors():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 5, generator=generator) @ torch.randn(5, 48, generator=generator)
    assert float(spectrum(W).numerical_rank()) == 5


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_orthogonal(n):
    W = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    found = values(spectrum(W))
    for name in (*RANKS, "numerical_rank", "nuclear_norm"):
        assert found[name] == pytest.approx(n, rel=1e-12)
    assert found["pseudo_rank"] == pytest.approx(math.ceil(0.95 * n) / n)


def test_pseudo_rank_counts_the_sum_not_the_squares():
    s = Spectrum(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    assert [float(s.pseudo_rank(share)) for share in (0.4, 0.5, 0.8, 0.81, 0.95, 1.0)] == [
        0.25,
        0.25,
        0.5,
        0.75,
        1,
        1,
    ]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, 95])
def test_pseudo_rank_refuses_a_percentage(share):
    with pytest.raises(ValueError, match=r"share=.* > 0 and <= 1; 0.95"):
        Spectrum(torch.ones(3)).pseudo_rank(share)


def test_numerical_rank_takes_a_tolerance_per_matrix():
    s = Spectrum(torch.tensor([[4.0, 2.0, 1.0], [4.0, 2.0, 1.0]]))
    assert s.numerical_rank(1.5).tolist() == [2, 2]
    assert s.numerical_rank(torch.tensor([0.5, 3.0])).tolist() == [3, 1]


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_properties_have_the_leading_shape(shape):
    s = spectrum(torch.randn(*shape, 6, 5, generator=torch.Generator().manual_seed(2)))
    assert s.singular_values.shape == (*shape, 5)
    assert s.singular_values.dtype == torch.float64
    assert bool((s.singular_values.diff(dim=-1) <= 0).all())
    for name in (*RANKS, *NORMS):
        assert getattr(s, name).shape == shape
    assert s.pseudo_rank().shape == s.numerical_rank().shape == shape


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_spoils_only_its_slice(poison):
    W = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3))
    W[1, 2, 3] = poison
    s = spectrum(W)
    for value in [getattr(s, name) for name in (*RANKS, *NORMS)] + [s.pseudo_rank(), s.numerical_rank()]:
        assert value.isnan().tolist() == [False, True, False]


def test_a_spectrum_that_is_partly_known_has_no_norm():
    s = Spectrum(torch.tensor([[3.0, math.nan], [math.inf, 1.0], [3.0, 1.0]]))
    for value in [getattr(s, name) for name in (*RANKS, *NORMS)]:
        assert value.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e200, 1e307])
def test_ends_of_the_range(scale):
    s = spectrum(torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64)) * scale)
    assert float(s.stable_rank) == pytest.approx(25 / 16, rel=1e-3)
    assert float(s.frobenius_norm) == pytest.approx(5 * scale, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_is_taken_exactly(dtype):
    W = torch.randn(8, 6, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    torch.testing.assert_close(spectrum(W).singular_values, torch.linalg.svdvals(W.detach().double()))


def test_the_tail_is_accurate():
    sigma = torch.logspace(0, -12, 13, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    torch.testing.assert_close(spectrum(Q * sigma).singular_values, sigma, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("draw", "shape", "expected"),
    [
        ("standard_normal", (128, 128), (32.7, 102.8, 91.9)),
        ("uniform", (128, 128), (31.6, 103.1, 92.5)),
        ("standard_normal", (512, 128), (57.5, 123.7, 119.8)),
    ],
)
def test_random_matrices(draw, shape, expected):
    """docs/theory.md section 1.3, one draw each: the mean of five others comes within a few per cent."""
    rng = np.random.default_rng(0)
    size = (5, *shape)
    W = rng.uniform(-1, 1, size) if draw == "uniform" else rng.standard_normal(size)
    s = spectrum(torch.from_numpy(W))
    assert float(s.stable_rank.mean()) == pytest.approx(expected[0], rel=0.05)
    assert float(s.effective_rank.mean()) == pytest.approx(expected[1], rel=0.01)
    assert float(s.nuclear_rank.mean()) == pytest.approx(expected[2], rel=0.01)


def test_a_matrix_without_numbers_is_refused():
    with pytest.raises(ValueError, match=r"meta device.*load its weights first"):
        spectrum(torch.eye(3, device="meta"))


@pytest.mark.parametrize(
    ("bad", "error"),
    [([1.0], TypeError), (torch.ones(3, dtype=torch.int64), TypeError), (torch.tensor(1.0), ValueError)],
)
def test_refuses_what_is_no_spectrum(bad, error):
    with pytest.raises(error, match=r"singular_values"):
        Spectrum(bad)


def test_is_frozen():
    with pytest.raises(AttributeError):
        spectrum(torch.eye(2)).singular_values = torch.ones(2)


sigmas = st.lists(st.floats(0, 1e6), min_size=1, max_size=12).map(lambda x: sorted(x, reverse=True))


@settings(max_examples=100, deadline=None)
@given(sigma=sigmas)
def test_order_of_the_ranks(sigma):
    s = Spectrum(torch.tensor(sigma, dtype=torch.float64))
    found = [float(getattr(s, name)) for name in RANKS]
    # stable <= participation <= nuclear <= effective <= number of non-zero values
    bounds = [*found, float((s.singular_values > 0).sum())]
    for smaller, larger in itertools.pairwise(bounds):
        assert smaller <= larger * (1 + 1e-9)
    if sigma[0] > 0:
        assert found[0] >= 1 - 1e-12
        assert 0 < float(s.pseudo_rank()) <= 1
        assert float(s.pseudo_rank(0.5)) <= float(s.pseudo_rank(0.95))


@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), exponent=st.floats(-30, 30), seed=st.integers(0, 1000))
def test_invariances(m, n, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, dtype=torch.float64, generator=generator)
    left = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64, generator=generator))[0]
    expected = spectrum(W)
    for other in (W.mT, left @ W, W * 10.0**exponent):
        s = spectrum(other)
        for name in RANKS:
            assert float(getattr(s, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-9)
        assert float(s.numerical_rank()) == float(expected.numerical_rank())
