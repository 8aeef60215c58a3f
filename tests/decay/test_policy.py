"""Policies: thresholds against numbers, refusals, and an import without torch."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.decay.policy import Frobenius, LowRank, Planes
from rankdecay.linalg import shrink

WIDE = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
DIAGONAL = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))


# --- thresholds -----------------------------------------------------------------------------------------------


def test_relative_threshold_of_a_known_matrix():
    """PX-rel on diag(3, 1) with ηλ = 0.1: rms(σ) = √5 = 2.23607."""
    policy = LowRank(10.0, rule="prox", scale="relative")
    tau = policy.threshold(DIAGONAL, lr=0.01)
    assert tau.item() == pytest.approx(0.223607, abs=1e-6)
    after = shrink(DIAGONAL, tau, policy.rule)
    expected = torch.diag(torch.tensor([2.776393, 0.776393], dtype=torch.float64))
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=0)
    stable_rank = after.norm() ** 2 / torch.linalg.matrix_norm(after, 2) ** 2
    assert stable_rank.item() == pytest.approx(1.0782, abs=1e-4)


@pytest.mark.parametrize(
    ("scale", "lr_coupled", "expected"),
    [
        ("relative", True, 0.01 * 5 * math.sqrt(5)),
        ("relative", False, 5 * math.sqrt(5)),
        ("absolute", True, 0.01 * 5),
        ("absolute", False, 5),
    ],
)
@pytest.mark.parametrize("weight", [DIAGONAL, WIDE, WIDE.T], ids=["square", "wide", "tall"])
def test_threshold_formulas(scale, lr_coupled, expected, weight):
    policy = LowRank(5.0, scale=scale, lr_coupled=lr_coupled)
    assert policy.threshold(weight, 0.01).item() == pytest.approx(expected, rel=1e-12)


def test_threshold_of_a_stack_with_its_own_rates():
    stack = torch.stack([DIAGONAL, 2 * DIAGONAL, torch.zeros_like(DIAGONAL)])
    tau = LowRank(2.0).threshold(stack, torch.tensor([0.1, 0.01, 0.1]).double())
    expected = torch.tensor([2 * 0.1 * 5**0.5, 2 * 0.01 * 2 * 5**0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(tau, expected)
    assert LowRank(99.0).threshold(stack.float(), 0.1).dtype == torch.float32


def test_a_threshold_of_16_bits_does_not_overflow_on_its_way():
    tau = LowRank(1.0).threshold(torch.full((100, 100), 1000.0, dtype=torch.float16), 1.0)
    assert tau.dtype == torch.float16
    assert float(tau) == pytest.approx(1e4, rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 6), columns=st.integers(1, 6), rate=st.floats(1e-4, 0.3))
def test_a_relative_step_is_never_longer_than_that_of_l2(seed, rows, columns, rate):
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    policy = LowRank(1.0)
    step = weight - shrink(weight, policy.threshold(weight, rate), policy.rule)
    assert step.norm() <= rate * weight.norm() * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_relative_thresholds_follow_the_size_of_the_weight_and_absolute_ones_do_not(seed, factor):
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    relative, absolute = LowRank(0.1, scale="relative"), LowRank(0.1, scale="absolute")
    expected = factor * relative.threshold(weight, 0.01)
    torch.testing.assert_close(relative.threshold(factor * weight, 0.01), expected)
    torch.testing.assert_close(absolute.threshold(factor * weight, 0.01), absolute.threshold(weight, 0.01))


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [Frobenius, LowRank])
def test_strengths_that_cannot_work(policy, strength):
    with pytest.raises(ValueError, match=rf"strength={strength!r} must be a finite number >= 0; 0 switches it off"):
        policy(strength)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "soft"}, r"rule='soft' is unknown: .*\(known: newton_schulz, polar, prox, smooth"),
        ({"scale": "rel"}, r"scale='rel' is unknown: did you mean 'relative'. \(known: relative, absolute\)"),
        ({"unit": "layer"}, r"unit='layer' is unknown: .*\(known: matrix, head\)"),
        ({"every": 0}, r"every=0 must be a whole number >= 1"),
        ({"every": -2}, r"every=-2 must be a whole number >= 1"),
        ({"every": 1.5}, r"every=1.5 must be a whole number >= 1"),
        ({"smoothing": -1.0}, r"smoothing=-1.0 must be a finite number >= 0"),
        ({"smoothing": math.nan}, r"smoothing=nan must be a finite number >= 0"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        LowRank(0.1, **changes)


def test_zero_switches_off():
    assert LowRank(0.0).threshold(DIAGONAL, 0.1).item() == 0
    assert Frobenius(0.0).strength == 0


def test_policies_are_plain_frozen_data():
    assert LowRank(0.1) == LowRank(0.1, "prox", "relative", "matrix", None, True, 0.0)
    assert len({LowRank(0.1), LowRank(0.1), LowRank(0.2), Frobenius(0.1)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        LowRank(0.1).strength = 0.2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Frobenius(0.25), ["L2", "0.25"]),
        (LowRank(0.1), ["prox", "0.1", "relative"]),
        (
            LowRank(0.01, rule="newton_schulz", scale="absolute", lr_coupled=False),
            ["newton", "0.01", "absolute", "step"],
        ),
        (LowRank(2.0, unit="head", every=4), ["prox", "2", "head", "4"]),
    ],
)
def test_descriptions_name_what_was_chosen(policy, words):
    assert all(word in policy.describe() for word in words)


def test_importing_policies_does_not_import_torch():
    code = "import sys, rankdecay.decay.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what docs/guides/choose-a-decay.md says -----------------------------------------------------------------------


@pytest.mark.parametrize(("amount", "differs"), [(0.05, 0.14), (0.005, 0.015), (3e-5, 9e-5)])
def test_eight_relative_steps_at_once_differ_from_eight_steps_by_what_the_page_says(amount, differs):
    weight = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 8
    one_by_one = weight
    for _ in range(8):
        one_by_one = shrink(one_by_one, amount, relative=True)
    at_once = shrink(weight, 8 * amount, relative=True)
    difference = (one_by_one - at_once).norm() / (one_by_one - weight).norm()
    assert float(difference) == pytest.approx(differs, rel=0.05)


@pytest.mark.parametrize(("rows", "along"), [(64, 0.98), (768, 0.72)])
def test_a_step_on_an_untrained_head_is_nearly_radial_as_the_page_says(rows, along):
    weight = torch.randn(rows, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = weight - shrink(weight, 1e-3, relative=True)
    share = (step * weight).sum().square() / (step.square().sum() * weight.square().sum())
    assert float(share) == pytest.approx(along, abs=0.005)


def test_numbers_of_numpy_and_torch_become_plain_ones_which_a_weights_only_load_takes():
    one, tenth = np.int64(1), np.float32(0.125)
    made = [
        Frobenius(tenth, power=np.float64(2), cap=tenth, warmup=one),
        LowRank(torch.tensor(0.125), every=one, keep=one, smoothing=tenth, warmup=one),  # pyright: ignore[reportArgumentType]
        Planes(tenth, keep=one, warmup=one),
    ]
    for decay in made:
        assert {type(value) for value in dataclasses.asdict(decay).values()} <= {int, float, bool, str}
        assert decay.strength == 0.125
