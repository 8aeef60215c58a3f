"""What a control does to a decay step, and when a schedule lets it act."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.lab.ensemble.control import (
    MEMORISED,
    PLAIN,
    Control,
    above_rank,
    decay_acts,
    memorised,
    part_of_step,
    truncated,
)
from rankdecay.linalg import shrink
from rankdecay.spectrum import spectrum

PARTS = ("whole", "radial", "tangential", "reversed")


def matrices(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((-2, -1))


# --- the parts of a step -----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    seed=st.integers(0, 100),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_the_parts_of_any_step(leading, rows, columns, seed, scale):
    weight = scale * matrices(seed, *leading, rows, columns)
    decayed = weight - 0.1 * scale * matrices(seed + 1000, *leading, rows, columns)
    step = {part: weight - part_of_step(weight, decayed, part) for part in PARTS}
    close = {"rtol": 1e-9, "atol": 1e-12 * scale}
    torch.testing.assert_close(step["whole"], weight - decayed, rtol=0, atol=0)
    torch.testing.assert_close(step["radial"] + step["tangential"], step["whole"], **close)
    torch.testing.assert_close(step["radial"] - step["tangential"], step["reversed"], **close)
    square = inner(weight, weight)
    torch.testing.assert_close(
        inner(step["radial"], weight), inner(step["whole"], weight), rtol=1e-9, atol=1e-12 * scale**2
    )
    assert (inner(step["tangential"], weight).abs() <= 1e-12 * square).all()
    # the radial step is a multiple of the weight: Cauchy–Schwarz is an equality
    lengths = inner(step["radial"], step["radial"]) * square
    torch.testing.assert_close(inner(step["radial"], weight).square(), lengths, rtol=1e-9, atol=1e-12 * scale**4)


def test_the_radial_part_leaves_the_direction_and_lowers_the_norm_as_the_whole_does_to_first_order():
    weight = matrices(0, 4, 6, 6)
    tau = 1e-6
    decayed = shrink(weight, tau, "polar")
    radial = part_of_step(weight, decayed, "radial")
    norms = weight.norm(dim=(-2, -1), keepdim=True), radial.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(radial / norms[1], weight / norms[0], rtol=0, atol=1e-14)
    fell = norms[0] - norms[1]
    torch.testing.assert_close(fell, norms[0] - decayed.norm(dim=(-2, -1), keepdim=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(fell.flatten(), tau * torch.linalg.svdvals(weight).sum(-1) / norms[0].flatten())


@pytest.mark.parametrize("rule", ["smooth", "prox", "polar", "newton_schulz"])
def test_the_tangential_part_lowers_the_stable_rank_and_the_reversed_step_raises_it(rule):
    ranks = {}
    for part in PARTS:
        weight = matrices(1, 5, 8, 8)
        ranks[part] = [spectrum(weight).stable_rank]
        for _ in range(20):
            weight = part_of_step(weight, shrink(weight, 0.01, rule, smoothing=0.05), part)
            ranks[part].append(spectrum(weight).stable_rank)
    for part, rises in (("whole", False), ("tangential", False), ("reversed", True)):
        for before, after in zip(ranks[part], ranks[part][1:], strict=False):
            assert ((after > before) if rises else (after < before)).all(), part
    torch.testing.assert_close(ranks["radial"][-1], ranks["radial"][0])


@pytest.mark.parametrize("part", PARTS)
def test_a_zero_matrix_stays_zero_beside_others(part):
    weight = matrices(2, 3, 4, 4)
    weight[1] = 0
    after = part_of_step(weight, shrink(weight, 0.1), part)
    assert (after[1] == 0).all()
    for index in (0, 2):
        alone = part_of_step(weight[index], shrink(weight[index], 0.1), part)
        torch.testing.assert_close(after[index], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("part", PARTS)
def test_no_step_changes_nothing_to_the_last_bit(part):
    weight = matrices(3, 2, 5, 3)
    assert torch.equal(part_of_step(weight, weight.clone(), part), weight)


# --- truncation and the target rank --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), rank=st.integers(1, 8), seed=st.integers(0, 100))
def test_truncation_is_the_best_approximation_of_its_rank(rows, columns, rank, seed):
    weight = matrices(seed, 2, rows, columns)
    sigma = torch.linalg.svdvals(weight)
    cut = truncated(weight, rank)
    assert cut.shape == weight.shape
    kept = torch.linalg.svdvals(cut)
    torch.testing.assert_close(kept[..., :rank], sigma[..., :rank])
    assert (kept[..., rank:] < 1e-12).all()
    error = (weight - cut).square().sum((-2, -1))
    torch.testing.assert_close(error, sigma[..., rank:].square().sum(-1), rtol=1e-9, atol=1e-12)  # Eckart–Young


def test_above_rank_compares_each_matrix_with_its_target():
    weight = torch.stack([torch.diag(torch.tensor(d)) for d in ([1.0, 1, 1, 1], [2.0, 1, 0, 0], [0.0, 0, 0, 0])])
    assert above_rank(weight, torch.tensor(1.5)).tolist() == [True, False, False]  # 4, 1.25 and 0
    assert above_rank(weight, torch.tensor([4.0, 1.2, 0.0])).tolist() == [
        False,
        True,
        False,
    ]  # at the target: not above


# --- schedules -------------------------------------------------------------------------------------------------------


def records(*accuracies: float | None) -> list[dict]:
    return [{"step": 40 * number, "train_accuracy": accuracy} for number, accuracy in enumerate(accuracies)]


def test_memorised_at_any_evaluation_so_far():
    assert not memorised([])
    assert not memorised(records(0.5, None, 0.98))
    assert memorised(records(0.5, MEMORISED))
    assert memorised(records(1.0, 0.2))


@pytest.mark.parametrize(
    ("schedule", "accuracies", "generalised", "acts"),
    [
        ("always", (), False, True),
        ("always", (1.0,), True, True),
        ("after_memorising", (), False, False),
        ("after_memorising", (0.9,), True, False),
        ("after_memorising", (0.995,), False, True),
        ("after_memorising", (1.0, 0.3), True, True),
        ("until_generalised", (), False, True),
        ("until_generalised", (1.0,), False, True),
        ("until_generalised", (1.0,), True, False),
    ],
)
def test_when_a_schedule_lets_the_decay_act(schedule, accuracies, generalised, acts):
    assert decay_acts(schedule, records(*accuracies), generalised) is acts


def test_the_plain_control_controls_nothing():
    assert Control() == PLAIN
    assert (PLAIN.part, PLAIN.norm, PLAIN.query_key_lr, PLAIN.blocks) == ("whole", None, 1.0, False)
    assert (PLAIN.schedule, PLAIN.target_rank, PLAIN.truncate_to) == ("always", None, None)
