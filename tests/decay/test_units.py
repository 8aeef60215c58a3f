"""What a strength means, in the words of describe(): each number is what the hook really does."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay.units import in_units, present
from tests.decay.models import make_model, zero_gradients

MATRIX = torch.diag(torch.tensor([4.0, 2.0, 0.4, 0.1]))


def steps_in(words: str) -> int:
    found = re.search(r"after ([\d,]+) steps?", words)
    assert found is not None, words
    return int(found[1].replace(",", ""))


def steps_until(decay: rd.Decay, lr: float, done) -> int:
    model = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in "qk"})
    with torch.no_grad():
        for each in model.values():
            each.weight.copy_(MATRIX)
    names = rd.AttentionNames(query="q", key="k", value="k", num_heads=1)
    optimizer = torch.optim.SGD(rd.param_groups(model, query_key=decay, names=names), lr=lr)
    rd.attach(optimizer)
    for step in range(1, 10_000):
        zero_gradients(model)
        optimizer.step()
        if done(model["q"].weight.detach()):
            return step
    raise AssertionError


def test_l2_halves_the_norm_after_the_steps_that_are_said():
    decay = rd.Frobenius(0.5)
    said = steps_in(in_units(decay, 0.1, [MATRIX]))
    assert steps_until(decay, 0.1, lambda w: w.norm() <= MATRIX.norm() / 2) == pytest.approx(said, rel=0.05)


def test_a_constant_amount_is_used_up_after_the_steps_that_are_said():
    decay = rd.Frobenius(0.5, power=0)
    assert steps_until(decay, 0.1, lambda w: not w.any()) == steps_in(in_units(decay, 0.1, [MATRIX]))


def test_an_absolute_threshold_ends_a_singular_value_of_rms_size_after_the_steps_that_are_said():
    decay, rms = rd.LowRank(0.5, scale="absolute"), float(MATRIX.norm()) / 2
    largest = float(MATRIX.max())
    ended = steps_until(decay, 0.1, lambda w: not w.any())
    assert ended == pytest.approx(largest / rms * steps_in(in_units(decay, 0.1, [MATRIX])), rel=0.05)


def test_a_relative_threshold_ends_a_small_singular_value_after_about_the_steps_that_are_said():
    decay, tenth = rd.LowRank(0.01), float(MATRIX.norm()) / 2 / 10
    assert tenth > 0.1  # the smallest goes first
    ended = steps_until(decay, 0.1, lambda w: float(w[3, 3]) == 0)
    assert ended == pytest.approx(0.1 / tenth * steps_in(in_units(decay, 0.1, [MATRIX])), rel=0.1)


@pytest.mark.parametrize(
    ("decay", "lr", "words"),
    [
        (rd.LowRank(0.1), 0.0, "at the present lr of 0 a step takes nothing"),
        (rd.Frobenius(0.2, lr_coupled=False), 0.5, "a step takes 0.2 of the norm: half is left after 4 steps"),
        (rd.Frobenius(100.0), 0.1, "at the present lr of 0.1 a step takes 1 of the norm: nothing is left after one"),
        (rd.Frobenius(1e300), 0.1, "nothing is left after one"),
        (rd.LowRank(1.0, scale="absolute"), 0.1, "a step takes 0.1 of every singular value"),
    ],
)
def test_words(decay, lr, words):
    assert words in in_units(decay, lr, [])


@pytest.mark.parametrize(
    ("decay", "lr", "words"),
    [
        (rd.Frobenius(0.5, power=0, cap=0.05), 0.1, "at the cap of 0.05 after 70 steps, never zero"),
        (rd.Frobenius(5.0, power=0, cap=0.05), 0.1, "the cap, so never zero"),
        (rd.Frobenius(0.1, power=1, cap=0.5), 10.0, "half is left after 1 step"),
        (rd.LowRank(1.0, rule="smooth", scale="absolute"), 0.1, "at most 0.1 of every singular value, now 2.2 in the"),
        (rd.LowRank(1.0, scale="absolute", keep=2), 0.1, "every singular value but the 2 largest, now"),
        (rd.Frobenius(0.5, warmup=5), 0.1, "at the present lr of 0.1 and after the warm-up a step takes"),
    ],
)
def test_words_where_nothing_becomes_zero_or_something_is_spared(decay, lr, words):
    assert words in in_units(decay, lr, [MATRIX])


def test_other_rules_than_the_prox_promise_no_zero():
    for rule in ("smooth", "polar", "newton_schulz"):
        assert "zero" not in in_units(rd.LowRank(1.0, rule=rule), 0.1, [MATRIX])
        assert "zero" not in in_units(rd.LowRank(1.0, rule=rule, scale="absolute"), 0.1, [MATRIX])


def test_the_cap_of_a_constant_amount_is_reached_after_the_steps_that_are_said():
    decay = rd.Frobenius(0.5, power=0, cap=0.05)
    said = steps_in(in_units(decay, 0.1, [MATRIX]))
    reached = steps_until(decay, 0.1, lambda w: w.norm() <= 1.00001)
    assert abs(reached - said) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "decay",
    [
        rd.LowRank(1.0),
        rd.LowRank(1e-310),
        rd.LowRank(1.7e308),
        rd.LowRank(1.0, scale="absolute"),
        rd.Frobenius(1e-310),
        rd.Frobenius(1.0, power=0),
        rd.Frobenius(1.0, power=0, cap=0.1),
        rd.Frobenius(1.7e308, power=20),
    ],
)
def test_every_weight_and_every_strength_can_be_described(decay, dtype):
    largest = torch.finfo(dtype).max
    for value in (0.0, largest, -largest, 1 / largest, math.nan, math.inf):
        matrix = torch.full((3, 4), value, dtype=dtype)
        for lr in (1e-3, 1e3):
            words = in_units(decay, lr, present([matrix]))
            assert "nan" not in words


def test_a_norm_beyond_the_square_root_of_the_range_is_said_as_it_is():
    assert "now 3e+300 in the mean" in in_units(
        rd.Frobenius(1.0, power=0), 0.1, [torch.full((3, 3), 1e300, dtype=torch.float64)]
    )


def test_the_description_says_it_for_every_role_and_for_weights_elsewhere_what_can_be_said():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.2, power=0))
    text = attachment.describe()
    assert "note: query_key: at the present lr of 0.1 a step takes 0.01 of the root mean square" in text
    assert re.search(r"note: value_output: at the present lr of 0.1 a step takes \S+ of the norm, now", text)
    assert "at the present" not in attachment.describe(ranks=True)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("by", ["roles", "groups"])
def test_l2_that_a_norm_of_the_weight_undoes_is_spoken_of(norm: str, by: str) -> None:
    def described(decay: rd.Decay) -> tuple[str, float]:
        torch.manual_seed(0)
        model = make_model()
        [layer, *_] = rd.find_attention(model)
        linear = model.get_submodule(layer.output.parameter_name.removesuffix(".weight"))
        getattr(nn.utils.parametrizations, norm)(linear)
        if by == "roles":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            attachment = rd.attach(optimizer, model, value_output=decay)
        else:
            optimizer = torch.optim.SGD(rd.param_groups(model, value_output=decay), lr=0.1)
            attachment = rd.attach(optimizer)
        before = linear.eval().weight.detach().clone()
        zero_gradients(model)
        optimizer.step()
        return attachment.describe(), float((linear.weight - before).detach().norm() / before.norm())

    said, change = described(rd.Frobenius(1.0))
    assert f"{norm} takes out the length of 1 of its matrices" in said
    assert change < 1e-5
    said, change = described(rd.LowRank(1.0))
    assert "takes out the length" not in said
    assert change > 1e-3
