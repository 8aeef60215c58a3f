"""Trajectories: many runs at once are the runs one by one, and those are torch.optim.AdamW with our decay."""

import math
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.lab.ensemble.control import YOKED_SEED, Control
from rankdecay.lab.ensemble.ensemble import Ensemble, train_unless_stopped
from rankdecay.lab.ensemble.members import Member, Training
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.ensemble.yoked import norm_paths
from rankdecay.lab.machine import compiler_available
from rankdecay.lab.tasks import make_dataset
from rankdecay.linalg import shrink
from rankdecay.spectrum import spectrum
from tests import needs
from tests.comparing import assert_equal_weights
from tests.lab.ensemble.reference import ReferenceTransformer

MODULUS = 5  # 25 pairs: every batch below is larger than the vocabulary, or smaller where a test says so
CONFIG = TransformerConfig(MODULUS + 1, 3, MODULUS, width=8, depth=2, heads=2, mlp_width=12)
BATCH = 10
PRECISE = Training(batch_size=BATCH, precision="float64")

PROX = LowRank(20.0, rule="prox")  # of so small a side, every step
SMOOTH = LowRank(20.0, rule="smooth", smoothing=0.01)
POLAR = LowRank(0.003, rule="polar", scale="absolute", lr_coupled=False)
PROTOTYPE = LowRank(0.01, rule="newton_schulz", scale="absolute", lr_coupled=False)
HEADS = replace(PROX, unit="head")
AMOUNT = Frobenius(40.0, power=0)  # 0.04 of a norm of about 1.6 in every step: at a cap of 0.1 from the 30th on

MEMBERS = [
    Member("none", 0, None, 1.0),
    Member("none", 1, None, 0.0, lr=3e-3),
    Member("l2", 0, Frobenius(1.0), 1.0),
    Member("l2_strong", 2, Frobenius(30.0), 0.1, lr=2e-3),
    Member("prox", 0, PROX, 1.0),
    Member("prox_strong", 1, replace(PROX, strength=50.0), 1.0, lr=5e-4),
    Member("prox_every", 0, replace(PROX, every=4), 1.0),
    Member("prox_head", 3, HEADS, 1.0),
    Member("smooth", 0, SMOOTH, 3.0),
    Member("polar", 0, POLAR, 1.0),
    Member("prototype", 4, PROTOTYPE, 0.1),
    Member("wide", 0, PROX, 1.0, initial_scale=3.0),
    Member("uniform", 0, None, 1.0, uniform_attention=True),
    Member("uniform_decayed", 1, PROTOTYPE, 1.0, uniform_attention=True),
    Member("power_0", 0, replace(AMOUNT, cap=0.1), 1.0),
    Member("power_0_stopped", 1, replace(AMOUNT, strength=100.0), 1.0, lr=2e-3),  # without a cap it takes all there is
    Member("power_2", 1, Frobenius(30.0, power=2), 1.0),
    Member("power_2_head", 0, Frobenius(60.0, power=2, cap=0.03, unit="head"), 1.0),
    Member("l2_capped", 2, Frobenius(30.0, cap=0.01), 1.0),
    Member("l2_per_step", 2, Frobenius(0.03, lr_coupled=False), 1.0),
    Member("l2_ramp", 0, Frobenius(30.0, warmup=20), 1.0),
    Member("power_0_ramp", 3, replace(AMOUNT, warmup=15, cap=0.1), 1.0),
    Member("keep", 0, replace(PROX, strength=50.0, keep=2), 1.0),
    Member("preserve_norm", 1, replace(PROX, preserve_norm=True), 1.0),
    Member("keep_preserve", 1, replace(PROX, strength=50.0, keep=3, preserve_norm=True, unit="head"), 1.0),
    Member("prox_ramp", 0, replace(PROX, warmup=30), 1.0),
    Member("prox_ramp_every", 0, replace(PROX, every=4, warmup=30), 1.0),
]
FRACTIONS = [0.5, 0.6, 0.7, 0.8, 0.5, 0.9, 0.5, 0.75, 0.5, 0.5, 0.65, 0.5, 0.5, 0.85]
FRACTIONS += [0.5, 0.6, 0.7, 0.5, 0.8, 0.6, 0.5, 0.9, 0.5, 0.6, 0.7, 0.5, 0.55]


def dataset(member: Member, fraction: float = 0.6):
    return make_dataset("subtract", member.seed, modulus=MODULUS, train_fraction=fraction)


def ensemble(members, fractions=None, training: Training = PRECISE, config: TransformerConfig = CONFIG) -> Ensemble:
    fractions = fractions or [0.6] * len(members)
    data = [dataset(member, fraction) for member, fraction in zip(members, fractions, strict=True)]
    return Ensemble(config, members, data, training)


def weights(of: Ensemble, index: int) -> dict[str, torch.Tensor]:
    return {name: value[index].detach().clone() for name, value in of.parameters.items()}


# --- member of many = member alone ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together() -> Ensemble:
    trained = ensemble(MEMBERS, FRACTIONS)
    trained.train(50)
    return trained


@pytest.mark.parametrize("index", range(len(MEMBERS)), ids=[f"{m.arm}-{m.seed}" for m in MEMBERS])
def test_a_member_of_many_is_the_member_alone(together, index):
    alone = ensemble([MEMBERS[index]], [FRACTIONS[index]])
    alone.train(50)
    assert_equal_weights(weights(together, index), weights(alone, 0))


@pytest.mark.parametrize("index", [0, 4, 12])
def test_a_member_of_many_measures_as_alone(together, index):
    alone = ensemble([MEMBERS[index]], [FRACTIONS[index]])
    alone.train(50)
    (expected,), expected_arrays = alone.evaluate()
    records, arrays = together.evaluate()
    assert records[index].keys() == expected.keys()
    for key, value in expected.items():
        assert records[index][key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), key
    for key in ("singular_values", "product", "attention"):
        np.testing.assert_allclose(arrays[key][index], expected_arrays[key][0], atol=1e-5)


def test_order_does_not_matter():
    members = [MEMBERS[i] for i in (0, 4, 8)]
    forwards, backwards = ensemble(members), ensemble(members[::-1])
    forwards.train(20)
    backwards.train(20)
    for i in range(3):
        assert_equal_weights(weights(forwards, i), weights(backwards, 2 - i))


# --- the ensemble = AdamW and our decay -------------------------------------------------------------------------


BLOCKS = ("value", "output", "mlp_in", "mlp_out")


def train_plainly(member: Member, config: TransformerConfig, initial, batches, answers) -> dict[str, torch.Tensor]:
    """The loop a user would write: one module, torch.optim.AdamW with groups, the decay after each step."""
    network = ReferenceTransformer.with_parameters(config, initial)
    control, decay = member.control, member.decay
    roles = {name: name.split(".")[0] for name in initial}
    targets = [network.parameter_named(name) for name, role in roles.items() if role in ("query", "key")]
    blocks = [network.parameter_named(name) for name, role in roles.items() if role in BLOCKS]
    others = [network.parameter_named(name) for name, role in roles.items() if role not in ("query", "key", *BLOCKS)]
    given = [each for each in (decay, control.also) if each]
    l2 = sum(each.strength for each in given if isinstance(each, Frobenius) and each.is_l2)
    own = decay if not (isinstance(decay, Frobenius) and decay.is_l2) else None
    also = control.also if control.also and not (isinstance(control.also, Frobenius) and control.also.is_l2) else None
    fast = member.lr * control.query_key_lr
    groups = [
        {"params": targets, "weight_decay": l2, "lr": fast},
        {"params": blocks, "weight_decay": 0.0 if control.blocks else member.rest_decay},
        {"params": others, "weight_decay": member.rest_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=member.lr, betas=(0.9, 0.999), eps=1e-8)
    for step, tokens in enumerate(batches, 1):
        expected = torch.tensor([answers[tuple(row)] for row in tokens.tolist()])
        optimizer.zero_grad()
        for block in network.blocks:
            block.sharpness = min(1.0, step / control.sharpen) if control.sharpen else 1.0
        F.cross_entropy(network(tokens), expected).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in targets if own else []:
                heads = config.heads if own.unit == "head" else 1
                parts = [part_of(control.part, part, decayed(part, own, fast, step)) for part in parameter.chunk(heads)]
                parameter.copy_(torch.cat(parts))
            for parameter in blocks if own and control.blocks else []:
                parameter.copy_(part_of(control.part, parameter, decayed(parameter, own, member.lr, step)))
            for parameter in targets if also else []:
                parameter.copy_(decayed(parameter, also, fast, step))
            if control.norm is not None:
                radius = control.norm
                if control.norm_from:
                    left = max(0.0, 1 - step / control.norm_steps)  # of the way from the first norm to the last
                    if control.norm_fall == "linear":
                        radius += left * (control.norm_from - control.norm)
                    else:
                        radius *= math.exp(left * math.log(control.norm_from / control.norm))
                for parameter in targets:
                    parameter *= radius / parameter.norm()
    return {name: network.parameter_named(name).detach() for name in initial}


def part_of(part: str, weight: torch.Tensor, decayed: torch.Tensor) -> torch.Tensor:
    step = weight - decayed
    if part == "whole" or not step.any():
        return decayed
    direction = weight / weight.norm()
    radial = (step * direction).sum() * direction
    return weight - {"whole": step, "radial": radial, "tangential": step - radial, "reversed": 2 * radial - step}[part]


def decayed(weight: torch.Tensor, decay: Frobenius | LowRank, lr: float, step: int) -> torch.Tensor:
    """A weight after the decay of a step, the first of which is 1, with its warm-up and its law written out."""
    every = (decay.every or 1) if isinstance(decay, LowRank) else 1
    if step % every:
        return weight
    ramp = sum(min(1.0, (step - back) / decay.warmup) if decay.warmup else 1.0 for back in range(every))
    amount = ramp * decay.strength * (lr if decay.lr_coupled else 1.0)
    if isinstance(decay, Frobenius):
        norm = float(weight.norm())
        return weight * (1 - min(amount * norm ** (decay.power - 1), decay.cap or 1.0)) if norm else weight
    return shrunk(weight, decay, amount)


def shrunk(weight: torch.Tensor, decay: LowRank, amount: float) -> torch.Tensor:
    """One decay step, its threshold written out."""
    tau = amount
    if decay.scale == "relative":
        tau *= float(torch.linalg.svdvals(weight).square().mean().sqrt())
    if not decay.keep and not decay.preserve_norm:
        return shrink(weight, tau, decay.rule, smoothing=decay.smoothing)
    assert decay.rule == "prox"
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    after = torch.cat([sigma[: decay.keep], (sigma[decay.keep :] - tau).clamp_min(0)])
    after = after * (sigma.norm() / after.norm()) if decay.preserve_norm else after
    return left * after @ right


@pytest.mark.parametrize("index", range(len(MEMBERS)), ids=[f"{m.arm}-{m.seed}" for m in MEMBERS])
def test_a_member_is_a_plain_loop_with_adamw(index, batches_seen):
    assert_is_a_plain_loop(MEMBERS[index], batches_seen)


def assert_is_a_plain_loop(member: Member, batches_seen, steps: int = 50) -> None:
    one = ensemble([member])
    initial = weights(one, 0)
    one.train(steps)
    batches = [tokens[0] for tokens in batches_seen]
    assert len(batches) == steps
    data = dataset(member)
    answers = dict(zip(map(tuple, data.train_tokens.tolist()), data.train_targets.tolist(), strict=True))
    expected = train_plainly(member, CONFIG, initial, batches, answers)
    assert_equal_weights(weights(one, 0), expected)
    moved = max(float((expected[name] - initial[name]).abs().max()) for name in initial)
    assert moved > 1e-3


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "width", "gains": True}, {"qk_norm": "none"}, {"gains": True, "depth": 1}], ids=str
)
def test_other_networks_are_plain_loops_too(changes, batches_seen):
    config = replace(CONFIG, **changes)
    member = MEMBERS[4]
    one = ensemble([member], config=config, training=replace(PRECISE, batch_size=4))  # smaller than the vocabulary
    initial = weights(one, 0)
    one.train(50)
    data = dataset(member)
    answers = dict(zip(map(tuple, data.train_tokens.tolist()), data.train_targets.tolist(), strict=True))
    expected = train_plainly(member, config, initial, [tokens[0] for tokens in batches_seen], answers)
    assert_equal_weights(weights(one, 0), expected)


def test_betas_and_eps_are_those_of_adamw():
    member = MEMBERS[0]
    one = ensemble([member], training=replace(PRECISE, betas=(0.5, 0.9), eps=0.3))
    other = ensemble([member])
    one.train(5)
    other.train(5)
    assert not torch.allclose(one.parameters["query.0"], other.parameters["query.0"], atol=1e-6)


# --- the pieces of a step --------------------------------------------------------------------------------------


def test_prox_every_k_steps_acts_then_only_and_k_times_as_hard():
    every = replace(PROX, every=4)
    decayed, free = ensemble([Member("a", 0, every, 1.0)]), ensemble([Member("b", 0, None, 1.0)])
    for trained in (decayed, free):
        trained.train(3)
    assert_equal_weights(weights(decayed, 0), weights(free, 0), atol=0)
    for trained in (decayed, free):
        trained.train(1)
    for name in ("query.0", "key.1"):
        weight = free.parameters[name][0].detach()
        tau = 4 * every.strength * 1e-3 * float(weight.norm()) / math.sqrt(CONFIG.width)
        torch.testing.assert_close(decayed.parameters[name][0].detach(), shrink(weight, tau, "prox"))
    torch.testing.assert_close(decayed.parameters["value.0"], free.parameters["value.0"], atol=0, rtol=0)


def test_unit_head_decays_each_head_by_its_own_spectrum():
    member = Member("a", 0, HEADS, 1.0)
    decayed, free = ensemble([member]), ensemble([Member("b", 0, None, 1.0)])
    decayed.train(1)
    free.train(1)
    for head in (slice(0, 4), slice(4, 8)):
        weight = free.parameters["query.0"][0, head].detach()
        tau = PROX.strength * 1e-3 * float(weight.norm()) / math.sqrt(4)
        torch.testing.assert_close(decayed.parameters["query.0"][0, head].detach(), shrink(weight, tau, "prox"))


def test_low_rank_decay_lowers_the_rank_and_l2_does_not():
    decays = {"low_rank": PROX, "l2": Frobenius(1.0)}
    trained = ensemble([Member(arm, seed, decay, 1.0) for arm, decay in decays.items() for seed in (0, 1)])
    before = [r["effective_rank"] for r in trained.evaluate()[0]]
    trained.train(60)
    after = [r["effective_rank"] for r in trained.evaluate()[0]]
    assert all(a < 0.8 * b for a, b in zip(after[:2], before[:2], strict=True))
    assert all(a > 0.9 * b for a, b in zip(after[2:], before[2:], strict=True))


def test_uniform_attention_stays_uniform():
    trained = ensemble([MEMBERS[12], MEMBERS[13], MEMBERS[0]])
    trained.train(30)
    for index in (0, 1):
        assert all((trained.parameters[f"{r}.{i}"][index] == 0).all() for r in ("query", "key") for i in (0, 1))
        attention = trained.evaluate()[1]["attention"][index]
        np.testing.assert_allclose(attention, 1 / 3, atol=1e-7)
    assert (trained.parameters["value.0"][0] != trained.parameters["value.0"][2]).any()


def test_one_train_call_or_many():
    once, many = ensemble(MEMBERS[:5]), ensemble(MEMBERS[:5])
    once.train(23)
    for steps in (1, 7, 0, 15):
        many.train(steps)
    assert once.steps == many.steps == [23] * 5
    for i in range(5):
        assert_equal_weights(weights(once, i), weights(many, i), atol=0)


def test_evaluating_changes_nothing():
    plain, watched = ensemble(MEMBERS[:5]), ensemble(MEMBERS[:5])
    plain.train(6)
    for _ in range(6):
        watched.train(1)
        watched.evaluate()
    for i in range(5):
        assert_equal_weights(weights(plain, i), weights(watched, i), atol=0)


# --- controls --------------------------------------------------------------------------------------------------------

CONTROLLED = {
    "fast": Member("a", 0, None, 1.0, control=Control(query_key_lr=10.0)),
    "fast_decayed": Member("a", 1, PROX, 1.0, control=Control(query_key_lr=3.0)),
    "fast_l2": Member("a", 0, Frobenius(10.0), 1.0, control=Control(query_key_lr=3.0)),
    "blocks": Member("a", 0, PROX, 20.0, control=Control(blocks=True)),
    "blocks_every": Member("a", 1, replace(SMOOTH, every=3), 20.0, control=Control(blocks=True)),
    "blocks_per_head": Member("a", 1, HEADS, 20.0, control=Control(blocks=True)),
    "blocks_prototype": Member("a", 2, PROTOTYPE, 20.0, control=Control(blocks=True)),
    "blocks_radial": Member("a", 2, PROX, 20.0, control=Control(blocks=True, part="radial")),
    "radial": Member("a", 0, PROX, 1.0, control=Control(part="radial")),
    "tangential": Member("a", 1, SMOOTH, 1.0, control=Control(part="tangential")),
    "tangential_per_head": Member("a", 3, HEADS, 1.0, control=Control(part="tangential")),
    "reversed": Member("a", 2, replace(SMOOTH, every=4), 1.0, control=Control(part="reversed")),
    "sphere": Member("a", 0, None, 1.0, control=Control(norm=0.3)),
    "sphere_decayed": Member("a", 1, replace(PROX, every=2), 1.0, control=Control(norm=2.0)),
    "falling": Member("a", 0, None, 1.0, control=Control(norm=0.2, norm_from=1.6, norm_steps=12)),
    "falling_linearly": Member(
        "a", 1, PROX, 1.0, control=Control(norm=0.4, norm_from=1.6, norm_steps=15, norm_fall="linear")
    ),
    "elastic": Member("a", 0, PROX, 1.0, control=Control(also=Frobenius(30.0))),
    "ramp_low_rank": Member(
        "a", 2, replace(PROX, preserve_norm=True, every=2), 1.0, control=Control(also=Frobenius(30.0, warmup=10))
    ),
    "sharpened": Member("a", 1, PROX, 1.0, control=Control(sharpen=12)),
}


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlled_member_is_a_plain_loop_too(name, batches_seen):
    assert_is_a_plain_loop(CONTROLLED[name], batches_seen, steps=20)


def test_controls_do_not_reach_the_neighbours():
    members = [MEMBERS[0], *CONTROLLED.values(), MEMBERS[4]]
    together = ensemble(members)
    together.train(8)
    for index, member in enumerate(members):
        alone = ensemble([member])
        alone.train(8)
        assert_equal_weights(weights(together, index), weights(alone, 0))


@pytest.mark.parametrize(("precision", "rounding"), [("float64", 1e-14), ("float32", 1e-6), ("mixed", 1e-6)])
def test_a_held_norm_is_held_at_every_step_from_the_first(precision, rounding):
    norms = [0.3, 2.0, None, 1.0]
    members = [Member(str(n), n, PROX if n % 2 else None, 1.0, control=Control(norm=v)) for n, v in enumerate(norms)]
    members.append(Member("uniform", 0, None, 1.0, uniform_attention=True, control=Control(norm=1.0)))
    trained = ensemble(members, training=replace(PRECISE, precision=precision))
    for step in range(8):
        for index in (0, 1, 3):
            now = trained.query_key[index].norm(dim=(-2, -1))
            torch.testing.assert_close(now, torch.full_like(now, norms[index]), rtol=rounding, atol=0)
        assert (trained.query_key[4] == 0).all(), step
        trained.train(1)
    free = ensemble([members[2]], training=replace(PRECISE, precision=precision))
    free.train(8)
    assert_equal_weights(weights(trained, 2), weights(free, 0), atol=1e-9 if precision == "float64" else 1e-3)


def test_the_angular_step_is_the_angle_the_last_step_turned_the_matrices_before_their_decay():
    members = [MEMBERS[0], MEMBERS[2], CONTROLLED["sphere"], Member("decayed", 0, PROX, 1.0), MEMBERS[12]]
    trained = ensemble(members)
    assert [r["angular_step"] for r in trained.evaluate()[0]] == [None] * 5  # no step yet
    trained.train(9)
    before, state = trained.query_key.clone(), trained.state(3)
    trained.train(1)
    records, after = trained.evaluate()[0], trained.query_key
    cosine = (before * after).sum((-2, -1)) / (before.norm(dim=(-2, -1)) * after.norm(dim=(-2, -1)))
    angle = torch.arccos(cosine).flatten(1).mean(1)
    for index in (0, 1, 2):
        assert records[index]["angular_step"] == pytest.approx(float(angle[index]), rel=1e-6)
    assert records[4]["angular_step"] is None  # a matrix of zeros has no direction
    twin = ensemble([MEMBERS[0]])
    twin.restore(0, state)
    twin.train(1)
    assert records[3]["angular_step"] == pytest.approx(twin.evaluate()[0][0]["angular_step"], rel=1e-9)
    assert records[3]["angular_step"] < 0.9 * float(angle[3])  # the decay itself turned it further


@pytest.mark.parametrize(
    "member",
    [
        MEMBERS[3],
        MEMBERS[4],
        MEMBERS[6],
        MEMBERS[7],
        MEMBERS[10],
        CONTROLLED["tangential"],
        replace(CONTROLLED["blocks"], rest_decay=0.0),
    ],
    ids=["l2", "prox", "every", "head", "prototype", "tangential", "blocks"],
)
def test_switched_off_a_decay_leaves_the_trajectory_without_it(member):
    trained, other = ensemble([member, MEMBERS[4]]), ensemble([member, MEMBERS[4]])
    trained.train(9)
    other.train(9)
    free = ensemble([replace(member, decay=None, control=Control())])
    free.restore(0, trained.state(0))
    trained.schedule([False, True])
    record = trained.evaluate()[0][0]
    assert record["decay_size"] is None, "what is recorded is what is done"
    trained.train(11)
    free.train(11)
    other.train(11)
    assert_equal_weights(weights(trained, 0), weights(free, 0))
    assert_equal_weights(weights(trained, 1), weights(other, 1), atol=0)
    state = trained.state(0)
    trained.schedule([True, True])  # and on again
    trained.train(8)
    resumed = ensemble([member])
    resumed.restore(0, state)
    resumed.train(8)
    assert_equal_weights(weights(trained, 0), weights(resumed, 0))


@pytest.mark.parametrize("unit", ["matrix", "head"])
def test_only_what_is_above_its_target_rank_is_decayed(unit):
    decay = replace(PROX, unit=unit)
    blocks = ensemble([MEMBERS[0]]).query_key[0]
    blocks = blocks.unflatten(-2, (2, 4)) if unit == "head" else blocks  # (depth, 2[, heads], rows, width)
    ranks = spectrum(blocks).stable_rank
    target = float(ranks.median())
    assert 0 < int((ranks > target).sum()) < ranks.numel()
    aimed = Member("aimed", 0, decay, 1.0, control=Control(target_rank=target))
    trained, free = ensemble([MEMBERS[0], aimed, replace(aimed, control=Control())]), ensemble([MEMBERS[0]] * 3)
    record = trained.evaluate()[0][1]
    assert 0 < record["radial_share"] < 1, "of those that are decayed"
    assert 0 < record["tangential_share"] < 1
    trained.train(1)
    free.train(1)
    got, plain, without = trained.query_key[1], trained.query_key[2], free.query_key[1]
    shape = (2, 2, 2, 4, 8) if unit == "head" else (2, 2, 8, 8)
    got, plain, without = (matrices.reshape(shape) for matrices in (got, plain, without))
    above = ranks > target
    torch.testing.assert_close(got[above], plain[above], rtol=0, atol=0)
    torch.testing.assert_close(got[~above], without[~above], rtol=0, atol=0)
    assert (plain != without).flatten(-2).any(-1).all()
    assert_equal_weights(weights(trained, 0), weights(free, 0), atol=0)


@pytest.mark.parametrize("unit", ["matrix", "head"])
def test_a_target_rank_is_held_from_above(unit):
    """Looked at every other step, the rank falls to the target, and no further than one interval takes it."""
    members = [
        Member("aimed", 0, replace(PROX, unit=unit), 1.0, control=Control(target_rank=1.8)),
        Member("free", 0, replace(PROX, unit=unit), 1.0),
    ]
    trained = ensemble(members)
    for _ in range(60):
        trained.train(2)
        trained.schedule([True, True])
    blocks = trained.query_key.unflatten(-2, (2, 4)) if unit == "head" else trained.query_key
    ranks = spectrum(blocks).stable_rank.flatten(1)
    assert ranks[0].min() > 1.6
    assert ranks[0].max() < 2.0
    assert ranks[1].min() < 1.5


def test_truncation_cuts_one_member_alone():
    members = [replace(MEMBERS[i], control=Control(truncate_to=2)) for i in (0, 4, 0)]
    trained, untouched = ensemble([*members, MEMBERS[0]]), ensemble([*members, MEMBERS[0]])
    for other in (trained, untouched):
        other.train(5)
    trained.truncate(1)
    trained.truncate(3)  # names no rank
    for index in (0, 2, 3):
        assert_equal_weights(weights(trained, index), weights(untouched, index), atol=0)
    sigma = torch.linalg.svdvals(trained.query_key[1])
    torch.testing.assert_close(sigma[..., :2], torch.linalg.svdvals(untouched.query_key[1])[..., :2])
    assert (sigma[..., 2:] < 1e-12).all()
    for name, value in weights(trained, 1).items():
        if name.split(".")[0] not in ("query", "key"):
            assert torch.equal(value, weights(untouched, 1)[name])


def test_a_controlled_member_is_resumed_bit_for_bit():
    members = list(CONTROLLED.values())
    through, first, second = (ensemble(members) for _ in range(3))
    through.train(15)
    first.train(7)
    for index in range(len(members)):
        second.restore(index, first.state(index))
    second.train(8)
    for index in range(len(members)):
        assert_equal_weights(weights(second, index), weights(through, index), atol=0)


# --- norms of another run ---------------------------------------------------------------------------------------------


def yoked(seed: int, decay: LowRank = SMOOTH) -> Member:
    return Member("yoked", seed, None, 1.0, control=Control(yoked=decay))


def paths_of(members, steps: int) -> list[torch.Tensor]:
    how = {"task": "subtract", "modulus": MODULUS, "train_fraction": 0.6}
    return norm_paths(CONFIG, members, [how] * len(members), PRECISE, steps, threading.Event())


def test_a_yoked_member_has_the_norms_of_another_seed_and_nothing_else_of_it():
    members = [yoked(0), yoked(1, PROX)]
    paths = paths_of(members, 12)
    trained = Ensemble(CONFIG, members, [dataset(member) for member in members], PRECISE, paths)
    donors = [Member("donor", YOKED_SEED + seed, decay, 1.0) for seed, decay in ((0, SMOOTH), (1, PROX))]
    others, free = ensemble(donors), ensemble([Member("none", 0, None, 1.0)])
    for step in range(13):
        norms = trained.query_key.norm(dim=(-2, -1))
        torch.testing.assert_close(norms, others.query_key.norm(dim=(-2, -1)), rtol=1e-12, atol=0)
        torch.testing.assert_close(norms, torch.stack(paths)[:, step], rtol=1e-12, atol=0)
        if step == 0:
            cosine = torch.cosine_similarity(trained.query_key[0].flatten(2), free.query_key[0].flatten(2), dim=-1)
            torch.testing.assert_close(cosine, torch.ones_like(cosine))  # its own initial weights
        if step < 12:
            trained.train(1)
            others.train(1)
    with pytest.raises(ValueError, match="yoked is at step 13, and its path of the norm ends at 12"):
        trained.train(1)


def test_a_yoked_member_comes_and_is_resumed_as_any_other():
    members = [yoked(3), MEMBERS[0]]
    (path,) = paths_of(members[:1], 20)
    through, second = (
        Ensemble(CONFIG, members, [dataset(m) for m in members], PRECISE, [path, None]) for _ in range(2)
    )
    late = ensemble([MEMBERS[4]])
    through.train(15)
    late.train(3)
    late.admit(members[:1], [dataset(members[0])], [path])
    second.train(15)
    late.restore(1, second.state(0))
    late.retain([False, True])
    for trained in (through, late):
        trained.train(5)
    assert_equal_weights(weights(late, 0), weights(through, 0))


def test_a_yoked_member_without_a_path_is_refused():
    with pytest.raises(ValueError, match="yoked needs a path of the norm exactly if it is yoked"):
        ensemble([yoked(0)])


def test_a_path_of_the_norm_says_where_it_begins_and_ends():
    for wrong in ({"norm_from": 1.0}, {"norm": 0.3, "norm_steps": 5}, {"norm_from": 1.0, "norm_steps": 5}):
        with pytest.raises(ValueError, match="make no path of the norm"):
            Control(**wrong)
    with pytest.raises(ValueError, match="norm_fall='slow' must be one of"):
        Control(norm=0.3, norm_from=1.0, norm_steps=5, norm_fall="slow")
    with pytest.raises(ValueError, match="both say what the norm is"):
        Control(norm=0.3, yoked=PROX)


# --- a third set, and turning ----------------------------------------------------------------------------------------


def test_the_validation_set_is_measured_beside_the_test_set():
    member = MEMBERS[4]
    data = make_dataset("subtract", 0, modulus=MODULUS, train_fraction=0.6, validation=4)
    trained = Ensemble(CONFIG, [member], [data], PRECISE)
    trained.train(20)
    (record,), _ = trained.evaluate()
    network = ReferenceTransformer.with_parameters(CONFIG, weights(trained, 0))
    for side in ("validation", "test"):
        tokens, targets = (torch.from_numpy(getattr(data, f"{side}_{what}")) for what in ("tokens", "targets"))
        assert record[f"{side}_accuracy"] == float((network(tokens).argmax(-1) == targets).double().mean())
        assert record[f"{side}_loss"] == pytest.approx(F.cross_entropy(network(tokens), targets).item(), abs=1e-9)
    with pytest.raises(ValueError, match="give it to all, or to none"):
        trained.admit([MEMBERS[0]], [dataset(MEMBERS[0])])


def test_the_angle_of_a_step_after_its_decay_and_over_twenty_steps():
    members = [MEMBERS[4], MEMBERS[0]]
    trained, other = ensemble(members), ensemble(members)
    train_unless_stopped(trained, 50, threading.Event())
    other.train(30)
    then = other.query_key.clone()
    other.train(19)
    before = other.query_key.clone()
    other.train(1)
    for index, record in enumerate(trained.evaluate()[0]):
        for key, start in (("angular_step_after", before), ("rotation", then)):
            flat = (start[index].flatten(2), other.query_key[index].flatten(2))
            angle = torch.arccos(torch.cosine_similarity(*flat, dim=-1)).mean()
            assert record[key] == pytest.approx(float(angle), rel=1e-6), key
    assert trained.evaluate()[0][0]["angular_step"] < trained.evaluate()[0][0]["angular_step_after"]
    trained.train(1)
    assert trained.evaluate()[0][0]["rotation"] is None  # not twenty steps ago


# --- members that are admitted later --------------------------------------------------------------------------------

LATE = [*MEMBERS, CONTROLLED["blocks_every"], CONTROLLED["reversed"], CONTROLLED["sphere"], CONTROLLED["fast"]]
SIZES = [*FRACTIONS, 0.6, 0.9, 0.7, 0.5]


def admit(to: Ensemble, members, fractions) -> None:
    to.admit(members, [dataset(member, fraction) for member, fraction in zip(members, fractions, strict=True)])


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("head_start", [7, 8])  # in another phase of `every` than the new ones, and in the same
def test_members_admitted_later_are_members_from_the_start_bit_for_bit(precision, head_start):
    training = replace(PRECISE, precision=precision)
    late = ensemble(LATE[:6], SIZES[:6], training)
    late.train(head_start)
    admit(late, LATE[6:], SIZES[6:])
    assert late.steps == [head_start] * 6 + [0] * (len(LATE) - 6)
    late.train(9)
    fresh = ensemble(LATE, SIZES, training)
    fresh.train(9)
    for index in range(6, len(LATE)):
        assert_equal_weights(weights(late, index), weights(fresh, index), atol=0)
    assert [r["step"] for r in late.evaluate()[0]] == late.steps
    assert repr(late.evaluate()[0][6:]) == repr(fresh.evaluate()[0][6:])


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_whoever_comes_and_goes_each_member_is_the_member_alone(precision, tolerance):
    training = replace(PRECISE, precision=precision)
    trained = ensemble([], [], training)
    present: list[int] = []

    def enter(*numbers: int) -> None:
        admit(trained, [LATE[n] for n in numbers], [SIZES[n] for n in numbers])
        present.extend(numbers)

    def leave(*numbers: int) -> None:
        trained.retain([n not in numbers for n in present])
        present[:] = [n for n in present if n not in numbers]

    enter(6, 0, 8)
    trained.train(7)
    enter(14, 3)
    trained.train(2)
    leave(0, 14)
    enter(7, 15, 16)
    enter()  # nobody
    trained.train(5)
    leave(*present)
    enter(4, 17)
    trained.train(6)
    leave(4)
    enter(6, 14)
    trained.train(9)
    assert trained.members == [LATE[n] for n in present]
    assert trained.steps == [15, 9, 9]
    for index, (number, steps) in enumerate(zip(present, trained.steps, strict=True)):
        alone = ensemble([LATE[number]], [SIZES[number]], training)
        alone.train(steps)
        assert_equal_weights(weights(trained, index), weights(alone, 0), atol=tolerance)


def test_admitting_nobody_changes_nothing():
    trained, other = ensemble(MEMBERS[:5]), ensemble(MEMBERS[:5])
    trained.train(5)
    trained.admit([], [])
    trained.train(5)
    other.train(10)
    for index in range(5):
        assert_equal_weights(weights(trained, index), weights(other, index), atol=0)


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
def test_a_member_restored_among_others_goes_on_where_it_was(precision):
    training = replace(PRECISE, precision=precision)
    through, first = (ensemble(LATE, SIZES, training) for _ in range(2))
    first.train(7)
    through.train(13)
    others = ensemble(LATE[:9], SIZES[:9], training)
    others.train(5)
    admit(others, LATE[9:], SIZES[9:])
    for index in range(9, len(LATE)):
        others.restore(index, first.state(index))
    assert others.steps == [5] * 9 + [7] * (len(LATE) - 9)
    others.train(6)
    for index in range(9, len(LATE)):
        assert_equal_weights(weights(others, index), weights(through, index), atol=0)


def test_a_late_member_with_too_little_data_is_refused_and_changes_nothing():
    trained, other = ensemble(MEMBERS[:2]), ensemble(MEMBERS[:2])
    trained.train(3)
    with pytest.raises(ValueError, match="batch_size 10 exceeds the smallest training set, 5 examples"):
        admit(trained, MEMBERS[2:4], [0.6, 0.2])
    assert trained.members == MEMBERS[:2]
    trained.train(3)
    other.train(6)
    for index in range(2):
        assert_equal_weights(weights(trained, index), weights(other, index), atol=0)


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "batch", "steps"), [(0.6, 10, 3), (0.6, 4, 15), (0.56, 7, 14), (0.52, 13, 5)])
def test_every_example_is_used_equally_often_over_whole_epochs(fraction, batch, steps, batches_seen):
    member = MEMBERS[0]
    data = dataset(member, fraction)
    one = ensemble([member], [fraction], training=replace(PRECISE, batch_size=batch))
    examples = list(map(tuple, data.train_tokens.tolist()))
    one.train(1)
    one.train(steps - 1)
    used = Counter(tuple(row) for tokens in batches_seen for row in tokens[0].tolist())
    epochs, rest = divmod(batch * steps, len(examples))
    assert rest == 0, "the test should span whole epochs"
    assert used == dict.fromkeys(examples, epochs)


def test_batches_are_shuffled_and_differ_between_epochs_and_seeds(batches_seen):
    members = [MEMBERS[0], replace(MEMBERS[0], arm="twin"), replace(MEMBERS[0], seed=5)]
    data = dataset(MEMBERS[0])  # the same for all three
    Ensemble(CONFIG, members, [data] * 3, replace(PRECISE, batch_size=5)).train(6)
    order = [[tuple(row) for tokens in batches_seen for row in tokens[m].tolist()] for m in range(3)]
    size = len(data.train_targets)
    assert order[0] == order[1]
    assert order[0] != order[2]
    assert order[0][:size] != order[0][size : 2 * size]
    assert order[0][:size] != list(map(tuple, data.train_tokens.tolist()))


def test_a_batch_larger_than_a_training_set_is_refused():
    with pytest.raises(ValueError, match="batch_size 10 exceeds the smallest training set, 5 examples"):
        ensemble(MEMBERS[:2], [0.6, 0.2])


# --- measuring ---------------------------------------------------------------------------------------------------


def test_accuracy_and_loss_are_over_the_whole_sets():
    """Members with training sets of several sizes: nothing of the padding may count."""
    trained = ensemble(MEMBERS[:4], FRACTIONS[:4])
    trained.train(20)
    for i, record in enumerate(trained.evaluate()[0]):
        data = dataset(MEMBERS[i], FRACTIONS[i])
        network = ReferenceTransformer.with_parameters(CONFIG, weights(trained, i))
        for side in ("train", "test"):
            tokens, targets = (torch.from_numpy(getattr(data, f"{side}_{what}")) for what in ("tokens", "targets"))
            logits = network(tokens)
            accuracy = (logits.argmax(-1) == targets).double().mean()
            assert record[f"{side}_accuracy"] == pytest.approx(accuracy.item(), abs=1e-12)
            assert record[f"{side}_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-9)


def test_ranks_and_norms():
    trained = ensemble(MEMBERS[:6])
    trained.train(10)
    records, arrays = trained.evaluate()
    for i, record in enumerate(records):
        p = weights(trained, i)
        sigma = {name: torch.linalg.svdvals(p[name]) for name in ("query.0", "key.0", "query.1", "key.1")}
        stable = [float(s.square().sum() / s[0] ** 2) for s in sigma.values()]
        effective = [float(torch.distributions.Categorical(s).entropy().exp()) for s in sigma.values()]
        assert record["stable_rank"] == pytest.approx(np.mean(stable), rel=1e-6)
        assert record["effective_rank"] == pytest.approx(np.mean(effective), rel=1e-6)
        for role in ("query", "key"):
            norm = np.mean([float(p[f"{role}.{layer}"].norm()) for layer in (0, 1)])
            assert record[f"{role}_norm"] == pytest.approx(norm, rel=1e-6)
        rest = math.sqrt(sum(float(v.square().sum()) for n, v in p.items() if n not in sigma))
        assert record["rest_norm"] == pytest.approx(rest, rel=1e-6)
        for layer in (0, 1):
            for index, role in enumerate(("query", "key")):
                expected = sigma[f"{role}.{layer}"].numpy()
                np.testing.assert_allclose(arrays["singular_values"][i, layer, index], expected, rtol=1e-5, atol=1e-6)
            for head in (0, 1):
                rows = slice(4 * head, 4 * head + 4)
                product = p[f"query.{layer}"][rows].T @ p[f"key.{layer}"][rows]
                expected = torch.linalg.svdvals(product)[:4].numpy()
                np.testing.assert_allclose(arrays["product"][i, layer, head], expected, rtol=1e-4, atol=1e-6)


def test_geometry_of_the_decay():
    members = [MEMBERS[i] for i in (0, 2, 4, 6, 10)]
    records = ensemble(members).evaluate()[0]
    by_arm = {record["arm"]: record for record in records}
    for key in ("decay_size", "radial_share", "tangential_share"):
        assert by_arm["none"][key] is None
    assert by_arm["l2"]["decay_size"] == pytest.approx(1e-3)
    assert by_arm["l2"]["radial_share"] == 1
    assert by_arm["l2"]["tangential_share"] == 0
    for arm in ("prox", "prox_every", "prototype"):
        shares = by_arm[arm]["radial_share"], by_arm[arm]["tangential_share"]
        assert sum(shares) == pytest.approx(1)
        assert all(0 < share < 1 for share in shares)
    assert by_arm["prox"]["decay_size"] <= 1e-3 * PROX.strength * (1 + 1e-9)
    assert by_arm["prox_every"]["decay_size"] == pytest.approx(by_arm["prox"]["decay_size"])  # per step


def test_radial_and_tangential_share_of_a_prox_step():
    one = ensemble([Member("a", 0, PROX, 1.0)])
    record = one.evaluate()[0][0]
    shares, sizes = [], []
    for name in ("query.0", "key.0", "query.1", "key.1"):
        weight = one.parameters[name][0].detach()
        step = weight - decayed(weight, PROX, 1e-3, 1)
        shares.append(float((step * weight).sum() / step.norm() / weight.norm()) ** 2)
        sizes.append(float(step.norm() / weight.norm()))
    assert record["radial_share"] == pytest.approx(np.mean(shares), rel=1e-6)
    assert record["decay_size"] == pytest.approx(np.mean(sizes), rel=1e-6)


def test_snapshots_name_members_groups_and_positions():
    data = make_dataset("selection", 0, modulus=7, train_examples=30)
    config = replace(CONFIG, vocabulary=data.vocabulary, length=data.length, outputs=data.outputs)
    one = Ensemble(config, [MEMBERS[0], MEMBERS[12]], [data, data], PRECISE)
    arrays = one.evaluate()[1]
    assert arrays["arms"].tolist() == ["none", "uniform"]
    assert arrays["seeds"].tolist() == [0, 0]
    assert arrays["groups"].tolist() == list(data.groups.values())
    assert arrays["positions"].tolist() == list(data.positions)
    assert arrays["attention"].shape == (2, 2, 2, len(data.groups), 5)
    np.testing.assert_allclose(arrays["attention"].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(arrays["attention"][1], 0.2, atol=1e-7)
    assert not np.allclose(arrays["attention"][0], 0.2, atol=1e-3)


# --- members that leave, members that diverge -------------------------------------------------------------------


def test_those_who_stay_go_on_as_if_nothing_had_happened():
    undisturbed, thinned = ensemble(MEMBERS, FRACTIONS), ensemble(MEMBERS, FRACTIONS)
    for trained in (undisturbed, thinned):
        trained.train(10)
    thinned.retain([i % 3 != 0 for i in range(len(MEMBERS))])
    thinned.train(10)
    thinned.retain([i % 2 == 0 for i in range(len(thinned.members))])
    thinned.train(10)
    undisturbed.train(20)
    left = [m for i, m in enumerate(MEMBERS) if i % 3 != 0][::2]
    assert thinned.members == left
    for i, member in enumerate(left):
        assert_equal_weights(weights(thinned, i), weights(undisturbed, MEMBERS.index(member)))
    records = {(r["arm"], r["seed"]): r for r in undisturbed.evaluate()[0]}
    for record in thinned.evaluate()[0]:
        expected = records[record["arm"], record["seed"]]
        assert record["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-9)


def test_everyone_may_leave():
    trained = ensemble(MEMBERS[:2])
    trained.retain([False, False])
    assert trained.members == []


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    "bad", [Member("bad", 0, PROX, 1.0, lr=1e30), Member("bad", 0, None, 1e6, lr=1e6)], ids=["decayed", "plain"]
)
def test_a_member_that_diverges_does_not_disturb_its_neighbours(precision, bad):
    neighbours = [MEMBERS[i] for i in (0, 4, 8, 9, 10)]
    training = replace(PRECISE, precision=precision)
    disturbed = ensemble([*neighbours[:2], bad, *neighbours[2:]], training=training)
    peaceful = ensemble(neighbours, training=training)
    for trained in (disturbed, peaceful):
        trained.train(60)
    assert not all(torch.isfinite(value[2]).all() for value in disturbed.parameters.values())
    records, arrays = disturbed.evaluate()
    for index, other in enumerate((0, 1, 3, 4, 5)):
        assert_equal_weights(
            weights(disturbed, other), weights(peaceful, index), atol=1e-9 if precision == "float64" else 1e-4
        )
        assert all(math.isfinite(records[other][key]) for key in ("test_loss", "stable_rank", "product_stable_rank"))
    assert records[2]["train_loss"] is None or records[2]["rest_norm"] is None
    assert np.isfinite(arrays["singular_values"][[0, 1, 3, 4, 5]]).all()


# --- resuming, compiling, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
def test_resumed_is_uninterrupted_bit_for_bit(precision):
    training = replace(PRECISE, precision=precision)
    through, first, second = (ensemble(MEMBERS, FRACTIONS, training) for _ in range(3))
    through.train(25)
    first.train(11)
    states = [first.state(index) for index in range(len(MEMBERS))]
    first.train(3)  # what was done after the state was taken is forgotten
    for index, state in enumerate(states):
        second.restore(index, state)
    second.train(14)
    assert second.steps == [25] * len(MEMBERS)
    for i in range(len(MEMBERS)):
        assert_equal_weights(weights(second, i), weights(through, i), atol=0)
    assert repr(second.evaluate()[0]) == repr(through.evaluate()[0])


def test_state_of_another_ensemble_is_refused():
    state = ensemble(MEMBERS[:3]).state(0)
    with pytest.raises(ValueError, match="belongs to another ensemble"):
        ensemble(MEMBERS[:2], config=replace(CONFIG, mlp_width=16)).restore(0, state)
    with pytest.raises(ValueError, match="belongs to another ensemble"):
        ensemble(MEMBERS[:3], training=replace(PRECISE, precision="float32")).restore(0, state)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_lower_precision_follows_the_same_course(precision):
    members = [MEMBERS[i] for i in (0, 2, 4, 6, 10)]
    exact, rough = ensemble(members), ensemble(members, training=replace(PRECISE, precision=precision))
    for trained in (exact, rough):
        trained.train(30)
    tolerance = 1e-3 if precision == "float32" else 0.05
    for got, expected in zip(rough.evaluate()[0], exact.evaluate()[0], strict=True):
        assert 0 <= got["train_accuracy"] <= 1
        assert 0 <= got["test_accuracy"] <= 1
        assert got["train_loss"] == pytest.approx(expected["train_loss"], abs=tolerance)
        assert got["stable_rank"] == pytest.approx(expected["stable_rank"], rel=tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
@needs.compiler
def test_compiled_is_eager_within_rounding():
    from torch._dynamo.utils import counters

    config = replace(CONFIG, depth=1)
    members = [MEMBERS[0], CONTROLLED["blocks_every"]]
    training = replace(PRECISE, precision="float32")
    eager = ensemble(members, config=config, training=training)
    compiled = ensemble(members, config=config, training=replace(training, compile=True))
    eager.train(10)
    torch._dynamo.reset()
    counters.clear()
    compiled.train(10)
    assert counters["stats"]["unique_graphs"] == 1, "one graph, compiled once"
    assert not counters["graph_break"]
    for i in range(2):
        assert_equal_weights(weights(compiled, i), weights(eager, i), atol=1e-4)


def test_without_a_compiler_it_trains_eagerly(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiler_available("cpu")
    members = [MEMBERS[0]]
    asked = ensemble(members, training=replace(PRECISE, compile=True))
    eager = ensemble(members)
    for trained in (asked, eager):
        trained.train(3)
    assert_equal_weights(weights(asked, 0), weights(eager, 0), atol=0.0)
