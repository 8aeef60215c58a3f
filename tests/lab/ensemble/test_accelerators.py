"""Accelerators: each is the plain loop of its definition, no neighbour notices it, and it is resumed bit for bit."""

import math
from collections import deque
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.lab.ensemble.accelerators import (
    HIDDEN,
    CautiousDecay,
    GrokfastEMA,
    GrokfastMA,
    HiddenRate,
    Moment,
    Muon,
    OrthoGrad,
    StableMax,
    orthogonalised,
    stable_logits,
)
from rankdecay.lab.ensemble.control import Control
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Member, State, Training
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.tasks import make_dataset
from tests import needs
from tests.comparing import assert_equal_weights
from tests.lab.ensemble.reference import ReferenceTransformer

MODULUS = 5
CONFIG = TransformerConfig(MODULUS + 1, 3, MODULUS, width=8, depth=2, heads=2, mlp_width=12, gains=True)
PRECISE = Training(batch_size=10, precision="float64")
STEPS = 25

ACCELERATORS = {
    "grokfast_ema": GrokfastEMA(2.0, alpha=0.9),
    "grokfast_ma": GrokfastMA(5.0, window=6),
    "orthograd": OrthoGrad(),
    "stablemax": StableMax(),
    "muon": Muon(0.02),
    "momentum": Muon(0.02, orthogonal=False),
    "hidden_rate": HiddenRate(0.01),
    "cautious": CautiousDecay(),
}
MEMBERS = {name: Member(name, 3, Frobenius(30.0), 20.0, 2e-3, accelerator=a) for name, a in ACCELERATORS.items()}
MEMBERS |= {f"{name}_alone": replace(member, decay=None, rest_decay=0.0) for name, member in MEMBERS.items()}


def dataset(member: Member):
    return make_dataset("subtract", member.seed, modulus=MODULUS, train_fraction=0.6)


def ensemble(*members: Member, training: Training = PRECISE) -> Ensemble:
    return Ensemble(CONFIG, members, [dataset(member) for member in members], training)


def weights(of: Ensemble, index: int = 0) -> dict[str, torch.Tensor]:
    return {name: value[index].detach().clone() for name, value in of.parameters.items()}


# --- each is its definition ------------------------------------------------------------------------------------------


def stablemax_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))  # at 1 its gradient would be 0 · ∞
    return -torch.log(s[torch.arange(len(answers)), answers] / s.sum(-1)).mean()


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def train_plainly(member: Member, initial, batches, answers) -> dict[str, torch.Tensor]:
    """The loop a user would write: one module, Adam written out, and the rule as its authors state it."""
    network = ReferenceTransformer.with_parameters(CONFIG, initial)
    parameters = {name: network.parameter_named(name) for name in initial}
    rule, (b1, b2), eps = member.accelerator, (0.9, 0.999), 1e-8
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    square = {name: torch.zeros_like(p) for name, p in parameters.items()}
    slow: dict[str, torch.Tensor] = {}
    queue = {name: deque(maxlen=6) for name in parameters}
    for step, tokens in enumerate(batches, 1):
        expected = torch.tensor([answers[tuple(row)] for row in tokens.tolist()])
        network.zero_grad()
        loss = stablemax_loss if isinstance(rule, StableMax) else F.cross_entropy
        loss(network(tokens), expected).backward()
        for name, p in parameters.items():
            g, w = p.grad, p.data
            assert g is not None
            l2 = member.constant_l2 if name.split(".")[0] in ("query", "key") else member.rest_decay
            if isinstance(rule, GrokfastEMA):
                slow[name] = rule.alpha * slow.get(name, g) + (1 - rule.alpha) * g
                g = g + rule.factor * slow[name]
            elif isinstance(rule, GrokfastMA):
                queue[name].append(g.clone())
                if len(queue[name]) == rule.window:
                    g = g + rule.factor * sum(queue[name]) / rule.window
            elif isinstance(rule, OrthoGrad):
                across = g - (w * g).sum() / (w * w).sum() * w
                g = across * g.norm() / across.norm()
            elif isinstance(rule, Muon) and name.split(".")[0] in HIDDEN:
                mean[name] = rule.momentum * mean[name] + (1 - rule.momentum) * g
                ahead = rule.momentum * mean[name] + (1 - rule.momentum) * g
                w *= 1 - member.lr * l2
                update = (
                    newton_schulz(ahead) if rule.orthogonal else ahead * min(w.shape) ** 0.5 / (ahead.norm() + 1e-7)
                )
                w -= rule.lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * update
                continue
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            update = mean[name] / (1 - b1**step) / ((square[name] / (1 - b2**step)).sqrt() + eps)
            decayed = torch.where(update * w >= 0, w, 0) if isinstance(rule, CautiousDecay) else w
            own = rule.lr if isinstance(rule, HiddenRate) and name.split(".")[0] in HIDDEN else member.lr
            w -= own * update + member.lr * l2 * decayed
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_the_plain_loop_of_the_definition(name, batches_seen):
    member = MEMBERS[name]
    one, plain = ensemble(member), ensemble(replace(member, accelerator=None))
    initial = weights(one)
    one.train(STEPS)
    batches = [tokens[0] for tokens in batches_seen]
    data = dataset(member)
    answers = dict(zip(map(tuple, data.train_tokens.tolist()), data.train_targets.tolist(), strict=True))
    expected = train_plainly(member, initial, batches, answers)
    assert_equal_weights(weights(one), expected, atol=1e-9)
    plain.train(STEPS)
    off = max(float((expected[n] - weights(plain)[n]).abs().max()) for n in expected)
    if name == "cautious_alone":
        assert off < 1e-9, "without a decay there is nothing to be cautious of"
    else:
        assert off > 1e-4, "it does something"


@needs.muon
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_is_that_of_torch(decay):
    """Which orthogonalises in bfloat16, so a step is as near as that is; and so are several."""
    torch.manual_seed(0)
    start = [torch.randn(6, 6), torch.randn(12, 6), torch.randn(6, 12)]
    lr, muon = 2e-3, Muon(0.02)
    member = Member("muon", 0, None, decay, lr, accelerator=muon)
    names = ("query.0", "mlp_in.0", "mlp_out.0")
    layout = {name: tuple(w.shape) for name, w in zip(names, start, strict=True)}
    flat = torch.cat([w.flatten() for w in start])
    mean = torch.zeros_like(flat)
    parameters = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = torch.optim.Muon(parameters, lr=muon.lr, weight_decay=lr * decay / muon.lr, momentum=muon.momentum)
    for step in range(1, 6):
        gradients = [torch.randn_like(w) for w in start]
        share = torch.full_like(flat, lr * member.rest_decay)
        gradient = torch.cat([g.flatten() for g in gradients])
        muon.act(Moment(flat, gradient, mean, torch.zeros(0, len(flat)), share, step, 0.9, layout))
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter.grad = g
        optimizer.step()
        expected = torch.cat([p.detach().flatten() for p in parameters])
        torch.testing.assert_close(flat, expected, rtol=0, atol=2e-3 * step)
    assert (flat - torch.cat([w.flatten() for w in start])).abs().max() > 0.03


def test_the_published_settings():
    assert (GrokfastEMA(2.0).alpha, GrokfastMA(5.0).window, Muon(0.02).momentum) == (0.98, 100, 0.95)


# --- the pieces ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6), st.integers(0, 1))
def test_the_softmax_of_stable_logits_is_stablemax(values, answer):
    logits = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(stable_logits(logits), torch.tensor([answer]))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = stablemax_loss(logits, torch.tensor([answer]))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-7, atol=1e-12)


def test_stable_logits_of_zero_and_of_huge_ones_have_gradients():
    logits = torch.tensor([0.0, 1e30, -1e30], requires_grad=True)
    stable_logits(logits).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([1.0, 1e-30, 1e-30]))


def test_the_singular_values_of_what_is_orthogonalised_are_near_one():
    torch.manual_seed(1)
    matrices = torch.randn(5, 8, 24, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ orthogonalised(matrices) @ right.mT
    sigma = inside.diagonal(dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(sigma)).abs().max() < 1e-9, "the singular vectors stay"
    assert 0.6 < sigma.min() < sigma.max() < 1.3
    assert (orthogonalised(torch.zeros(1, 3, 4)) == 0).all()


def test_orthograd_of_weights_that_are_zero_is_the_gradient():
    one = ensemble(replace(MEMBERS["orthograd"], uniform_attention=True, decay=None))
    one.train(3)
    assert (one.query_key == 0).all()
    assert all(value.isfinite().all() for value in weights(one).values())


# --- neighbours, resuming --------------------------------------------------------------------------------------------


def test_no_member_depends_on_its_neighbours():
    members = [Member("none", 0, None, 1.0), *MEMBERS.values(), Member("l2", 1, Frobenius(1.0), 1.0)]
    together = ensemble(*members)
    together.train(STEPS)
    for index, member in enumerate(members):
        alone = ensemble(member)
        alone.train(STEPS)
        assert_equal_weights(weights(together, index), weights(alone), atol=1e-9)


def test_a_member_that_comes_later_goes_its_own_way():
    late, alone = ensemble(MEMBERS["muon"]), ensemble(MEMBERS["grokfast_ma"])
    late.train(4)
    late.admit([MEMBERS["grokfast_ma"], MEMBERS["cautious"]], [dataset(MEMBERS["grokfast_ma"])] * 2)
    late.train(5)
    late.retain([False, True, False])
    late.train(6)
    alone.train(11)
    assert_equal_weights(weights(late), weights(alone), atol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_it_is_resumed_bit_for_bit(precision):
    """In the middle of a window and of its second round; the tensors are those of a checkpoint."""
    members, training = list(MEMBERS.values()), replace(PRECISE, precision=precision)
    through, first, second = (ensemble(*members, training=training) for _ in range(3))
    through.train(20)
    first.train(10)
    stored: dict[str, torch.Tensor] = {}
    for index in range(len(members)):
        stored |= first.state(index).named(index)
    first.train(3)  # what goes on here is not in what was stored
    for index in range(len(members)):
        second.restore(index, State.of(10, stored, index))
    second.train(10)
    for index in range(len(members)):
        assert_equal_weights(weights(second, index), weights(through, index), atol=0)
    remember = [i for i, member in enumerate(members) if member.accelerator and member.accelerator.rows]
    assert len(remember) == 4
    assert [name for name in stored if name.endswith("memory")] == [f"{i}.memory" for i in remember]


def test_a_checkpoint_without_the_memory_is_refused():
    plain, grokfast = ensemble(Member("none", 0, None, 1.0)), ensemble(MEMBERS["grokfast_ema"])
    with pytest.raises(ValueError, match=r"stored memory are \(0, \d+\) .*belongs to another ensemble"):
        grokfast.restore(0, plain.state(0))
    with pytest.raises(ValueError, match=r"stored memory are \(1, \d+\)"):
        plain.restore(0, grokfast.state(0))


# --- decays and controls ---------------------------------------------------------------------------------------------


def test_a_schedule_switches_the_decay_that_an_accelerator_takes():
    for name in ("cautious", "muon"):
        one = ensemble(replace(MEMBERS[name], control=Control(schedule="until_generalised")))
        free = ensemble(replace(MEMBERS[name], decay=None))
        one.schedule([False])
        one.train(5)
        free.train(5)
        assert_equal_weights(weights(one), weights(free), atol=0)


def test_the_recorded_decay_is_not_said_to_be_all_of_what_is_taken_with_caution():
    one = ensemble(MEMBERS["cautious"], MEMBERS["muon"])
    one.train(2)
    cautious, muon = one.evaluate()[0]
    assert cautious["decay_size"] is None
    assert muon["decay_size"] == pytest.approx(2e-3 * 30.0)


def test_what_would_bypass_an_accelerator_is_refused_by_name():
    for decay in (LowRank(5.0), Frobenius(5.0, power=0, cap=0.1), Frobenius(5.0, warmup=9)):
        with pytest.raises(ValueError, match=r"careful: cautious decay is a way to take constant L2, and not .*leave"):
            Member("careful", 0, decay, 1.0, accelerator=CautiousDecay())
    for rule in (Muon(0.02), HiddenRate(0.02)):
        own = rf"m: {type(rule).__name__} has a learning rate of its own.*query_key_lr=3 would not change"
        with pytest.raises(ValueError, match=own):
            Member("m", 0, None, 1.0, control=Control(query_key_lr=3.0), accelerator=rule)
