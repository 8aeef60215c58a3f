"""Gradient flow of attention: against autograd where float64 can follow, against closed forms where it cannot."""

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from rankdecay.lab.experiments.margin.data import draw
from rankdecay.lab.experiments.margin.flow import (
    Course,
    Decay,
    Problem,
    follow,
    gradient,
    infimum,
    initial_weights,
    log_excess,
    loss_value,
    product,
)

LOSSES = ("exponential", "logistic")


def problem(kind="generic", sets=2, n=3, L=4, d=5, score=4.0) -> Problem:
    return Problem.of(draw(kind, range(sets), n, L, d, score))


def cosines(A, B):
    A, B = A.flatten(1), B.flatten(1)
    return ((A * B).sum(1) / A.norm(dim=1) / B.norm(dim=1)).tolist()


def of(P, example):
    return P.queries[0, example].tolist(), P.scores[0, example].tolist()


# --- the gradient ---


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [0.0, 1.0, 20.0])
def test_the_gradient_is_that_of_autograd(loss, size):
    P = problem()
    W = (size * torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss_value(P, W, loss).sum(), W)
    found = gradient(P, W.detach(), loss)
    torch.testing.assert_close(found.log_size.exp()[:, None, None] * found.direction, -by_autograd, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradients_of_K_and_Q_are_those_of_autograd(loss):
    """∇_K = G Q and ∇_Q = Gᵀ K: docs/theory.md section 7.2."""
    P = problem()
    K, Q = (w.requires_grad_() for w in initial_weights("separate", "random", 1.0, [0, 1], 5, 3))
    for_K, for_Q = torch.autograd.grad(loss_value(P, product([K, Q]), loss).sum(), [K, Q])
    found = gradient(P, product([K, Q]).detach(), loss)
    G = found.log_size.exp()[:, None, None] * found.direction
    torch.testing.assert_close(G @ Q, -for_K)
    torch.testing.assert_close(G.mT @ K, -for_Q)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_exact_where_a_float64_softmax_is_saturated(loss):
    """Direction and size at margins of 3000, where exp(-margin) is 0 in float64, against 4000 digits."""
    P = problem(sets=1, n=2, L=3, d=3)
    generator = torch.Generator().manual_seed(1)
    W = 1e4 * torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    found = gradient(P, W, loss)
    assert float(found.log_size) < -500
    total = [[Decimal(0)] * 3 for _ in range(3)]
    with localcontext(prec=4000):
        for i in range(2):
            x, z, score = ([Decimal(v) for v in part] for part in (P.tokens[0, i].flatten().tolist(), *of(P, i)))
            logits = [
                sum(x[3 * t + a] * Decimal(W[0, a, b].item()) * z[b] for a in range(3) for b in range(3))
                for t in range(3)
            ]
            weights = [(value - max(logits)).exp() for value in logits]
            p = [weight / sum(weights) for weight in weights]
            mean = sum(q * s for q, s in zip(p, score, strict=True))
            slope = (-mean).exp() if loss == "exponential" else 1 / (1 + mean.exp())
            for t, a, b in itertools.product(range(3), repeat=3):
                total[a][b] += slope * p[t] * (score[t] - mean) * x[3 * t + a] * z[b] / 2
        largest = max(abs(value) for row in total for value in row)
        scaled = np.array([[float(value / largest) for value in row] for row in total])
        log_largest = float(largest.ln())
    mine = found.direction[0].numpy()
    np.testing.assert_allclose(mine / abs(mine).max(), scaled, atol=1e-8)
    assert float(found.log_size) + math.log(abs(mine).max()) == pytest.approx(log_largest, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_above_its_infimum_is_exact_before_and_after_saturation(loss):
    P = problem("equal")
    best = P.scores.argmax(-1)
    W = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gap = loss_value(P, W, loss) - infimum(P, loss)
    torch.testing.assert_close(log_excess(P, W, best, loss).exp(), gap)
    # one step of W along the gradient of the margins, far out: log gap falls by what the least margin grows
    trained = follow([W], P, Course(margin=1e4, steps=3000), rate=0.02).weights[-1]
    if not bool((P.logits(trained).argmax(-1) == best).all()):
        pytest.fail("the flow did not select the optimal tokens")
    once, twice = (log_excess(P, factor * trained, best, loss) for factor in (1, 2))
    mu = gradient(P, trained, loss).margin
    torch.testing.assert_close(once - twice, mu, rtol=1e-3, atol=5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_the_value_heads_is_that_of_autograd(loss):
    P = problem()
    W = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heads = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss_value(P.with_heads(heads), W, loss).sum(), heads)
    found = gradient(P.with_heads(heads.detach()), W, loss, heads=True)
    torch.testing.assert_close(found.log_size.exp()[:, None] * found.heads, -by_autograd)
    data = draw("generic", range(2), 3, 4, 5, 4.0)
    torch.testing.assert_close(P.with_heads(torch.from_numpy(data.heads)).scores, P.scores)


def test_beside_scores_of_1e18_what_attention_adds_is_not_rounded_away():
    """Of one example the weight e^-γ̄ is common to all: a longer head scales the gradient by W and not that by v."""
    P = problem(sets=1, n=1)
    W = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heads = torch.randn(1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    short, long = (gradient(P.with_heads(size * heads), W, "exponential", heads=True) for size in (1.0, 1e18))
    torch.testing.assert_close(long.direction, short.direction)
    torch.testing.assert_close(1e18 * long.heads, short.heads)


# --- the flow ---


@pytest.mark.parametrize("kind", ["merged", "separate", "diagonal"])
def test_the_path_is_that_of_gradient_flow_in_real_time(kind):
    """Small plain gradient steps trace the same curve: compared where it has the same length."""
    P = problem("equal", sets=1, d=6)
    begin = initial_weights(kind, "paper", 0.7, [0], 6, 6)  # W grows from zero, so its norm is a clock
    mine = follow(begin, P, Course(steps=300, evaluate_every=300), rate=2e-3).weights[-1]
    weights = [w.clone() for w in begin]
    for _ in range(20_000):
        leaves = [w.requires_grad_() for w in weights]
        gradients = torch.autograd.grad(loss_value(P, product(leaves), "exponential").sum(), leaves)
        size = torch.stack([g.norm() for g in gradients]).norm()
        weights = [w.detach() - 2e-3 / size * g for w, g in zip(leaves, gradients, strict=True)]
        W = product(weights)
        if float(W.norm()) >= float(mine.norm()):
            break
    assert cosines(W, mine)[0] > 0.9999


def test_the_path_of_weights_and_heads_is_that_of_their_joint_gradient_flow():
    P = problem(sets=1, d=6)
    heads = torch.from_numpy(draw("generic", range(1), 3, 4, 6, 4.0).heads)
    begin = initial_weights("separate", "random", 0.7, [0], 6, 6)
    mine = follow(begin, P, Course(steps=400, evaluate_every=400), rate=1e-3, heads=heads)
    leaves = [w.clone() for w in (*begin, heads)]
    while float(leaves[-1].norm()) < float(mine.heads[-1].norm()):
        leaves = [w.requires_grad_() for w in leaves]
        loss = loss_value(P.with_heads(leaves[2]), product(leaves[:2]), "exponential").sum()
        gradients = torch.autograd.grad(loss, leaves)
        leaves = [w.detach() - 1e-2 * g for w, g in zip(leaves, gradients, strict=True)]
    torch.testing.assert_close(product(leaves[:2]), mine.weights[-1], rtol=0.01, atol=0.01)
    torch.testing.assert_close(leaves[2], mine.heads[-1], rtol=0.01, atol=0.01)
    assert float(mine.heads[-1].norm()) > 1.3 * float(heads.norm())


def test_condition_5_keeps_the_balance_of_K_and_Q_and_begins_at_zero():
    K, Q = begin = initial_weights("separate", "paper", 3.0, [0, 1], 5, 5)
    assert not product(begin).any()
    torch.testing.assert_close(K.square() + Q.square(), 18 * torch.eye(5).double().expand(2, 5, 5))
    xi_k, xi_q = initial_weights("diagonal", "paper", 3.0, [0], 5, 5)
    torch.testing.assert_close(xi_k.square() + xi_q.square(), torch.full((1, 5), 18.0).double())
    merged = initial_weights("merged", "random", 2.0, [4], 5, 3)
    torch.testing.assert_close(merged[0], product(initial_weights("separate", "random", 2.0, [4], 5, 3)))


def test_lemma_A1_the_diagonal_flow_is_a_hyperbolic_sine():
    """β = ω₀² sinh(φ): along the flow ξ_k² - ξ_q² stays 2ω₀², the invariant behind it, up to the step's third order."""
    from rankdecay.lab.experiments.margin.flow import step

    P = problem("equal", sets=3, d=20, n=4, L=3)
    weights = initial_weights("diagonal", "paper", 0.5, range(3), 20, 20)
    for _ in range(1500):
        weights, *_ = step(weights, P, "exponential", Decay(), 4e-3, 1e300)
    K, Q = weights
    assert float((K * Q).abs().max()) > 5
    torch.testing.assert_close(K.square() - Q.square(), torch.full_like(K, 0.5), rtol=0.02, atol=0)


def test_margins_of_1e8_and_far_more_are_reached_and_finished_sets_stay():
    P = problem("equal", sets=3, n=2, L=2, d=4)
    found = follow(
        initial_weights("separate", "paper", 1.0, range(3), 4, 4), P, Course(margin=1e60, steps=20_000), rate=0.02
    )
    assert found.steps[-1] < 20_000
    last = gradient(P, found.weights[-1], "exponential").margin
    assert bool(((last > 0.5e60) & (last < 2e60)).all())
    assert bool(found.weights.isfinite().all())


def test_under_assumption_A4_the_flow_ends_at_the_closed_form():
    """Sheen et al., Theorem 5.1, and the closed form of both SVMs: cosine 1 from either parametrisation."""
    data = draw("aligned", range(4), 3, 5, 6, 4.0)
    P = Problem.of(data)
    best = data.tokens[:, :, 0]
    c = np.einsum("bik,bilk->bil", best, data.tokens)[:, :, 1:].max(-1)
    scale = 1 / ((1 - c) * (best**2).sum(-1) * (data.queries**2).sum(-1))
    closed = torch.from_numpy(np.einsum("bi,bik,biq->bkq", scale, best, data.queries))
    for kind in ("merged", "separate"):
        begin = initial_weights(kind, "paper", 1.0, range(4), 6, 6)
        W = follow(begin, P, Course(margin=1e6, steps=20_000), rate=0.01).weights[-1]
        assert min(cosines(W, closed)) > 0.9999, kind


# --- explicit decay ---


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1e-2, 1e-8])
def test_an_explicit_decay_ends_at_the_minimum_of_its_objective(strength):
    """Stationarity of loss + ε(‖K‖² + ‖Q‖²): K and Q balance, and their W is that of 2ε‖W‖_* by soft thresholds."""
    P = problem("equal", sets=2)
    begin = initial_weights("separate", "random", 0.5, [0, 1], 5, 5)
    apart = follow(begin, P, Course(steps=6000), decay=Decay("l2", strength), rate=0.02).weights[-1]
    begin = initial_weights("merged", "random", 0.5, [0, 1], 5, 5)
    by_prox = follow(begin, P, Course(steps=6000), decay=Decay("low_rank", strength), rate=0.02).weights[-1]

    def objective(W):
        return loss_value(P, W, "exponential") + 2 * strength * torch.linalg.svdvals(W).sum(-1)

    excess = (objective(apart) - objective(by_prox)) / (2 * strength)  # in units of the norm
    assert float(excess.abs().max()) < 0.02 * float(torch.linalg.svdvals(by_prox).sum(-1).max())
    if (
        strength == 1e-2
    ):  # at 1e-8 the minimum is so flat that after these steps the direction lags, at a cosine of 0.994
        assert min(cosines(apart, by_prox)) > 0.999


def test_a_decay_too_strong_for_any_margin_brings_the_weights_to_zero():
    P = problem("equal", sets=1)
    begin = initial_weights("merged", "random", 0.5, [0], 5, 5)
    found = follow(begin, P, Course(steps=4000), decay=Decay("low_rank", 1e4), rate=0.02)
    assert not found.weights[-1].any()
    assert found.steps[-1] < 4000
