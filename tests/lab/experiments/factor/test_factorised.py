"""The matrix problems against their theory: Kobayashi et al., arXiv 2410.23819, and the toy of their Figure 1.

The toy, docs/theory.md section 5.6: a 5×5 target diag(.2, .4, .6, .8, 1), η = 0.1, A and B half of standard normal
draws of numpy's generator 0.
"""

import math

import numpy as np
import pytest
import torch

from rankdecay.lab.experiments.factor.factorised import (
    Diffusion,
    Dynamics,
    Factors,
    Method,
    Training,
    balanced,
    borderline,
    curvature,
    differences,
    duality_gap,
    fit,
    gap,
    gap_bound,
    gradients,
    imbalance,
    objective,
    product,
    quasi_norm,
    residual,
    shrunk,
)

VALUES = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
TARGET = torch.diag(VALUES.flip(0))


def start(strengths, seeds=(0,), scale: float = 0.5, depth: int = 2, n: int = 5) -> tuple[Factors, torch.Tensor]:
    """Gaussian factors of every seed at every strength, and the strength of each problem."""
    drawn = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        factors = [scale * rng.standard_normal((n, n)) for _ in range(depth)]
        if depth > 1:
            factors[-1] = factors[-1].T
        drawn.append(factors)
    stacked = [torch.from_numpy(np.stack(factor)).repeat(len(strengths), 1, 1) for factor in zip(*drawn, strict=True)]
    return stacked, torch.tensor(strengths, dtype=torch.float64).repeat_interleave(len(seeds))


def trained(strengths, steps: int, method: Method | None = None, seeds=(0,), **changes) -> Training:
    training = Training(*_problem(strengths, seeds, **changes), method or Method(0.1))
    for _ in range(steps):
        training.step()
    return training


def _problem(strengths, seeds, **changes):
    factors, strength = start(strengths, seeds, **changes)
    return factors, TARGET, strength


def values(training: Training) -> torch.Tensor:
    return torch.linalg.svdvals(product(training.factors))


# --- the toy, number by number ---


def test_the_singular_values_of_the_toy():
    expected = [
        (1, 0.8, 0.6, 0.4, 0.2),
        (0.95, 0.75, 0.55, 0.35, 0.15),
        (0.9, 0.7, 0.5, 0.3, 0.1),
        (0.8, 0.6, 0.4, 0.2, 0.0003),
        (0.6, 0.4, 0.2, 0.0048, 0),
        (0.2, 0.0049, 0, 0, 0),
    ]
    training = trained((0.0, 0.05, 0.1, 0.2, 0.4, 0.8), 1000)
    torch.testing.assert_close(values(training), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)
    off = imbalance(training.factors)
    assert off[1].item() == pytest.approx(1.7e-4, rel=0.05)
    assert off[2].item() == pytest.approx(6.5e-9, rel=0.05)
    assert gap(training.factors)[1].item() == pytest.approx(5.2e-9, rel=0.05)
    assert gap(training.factors)[2].abs().item() < 1e-14


def test_the_imbalance_decays_at_twice_the_rate_of_the_factors():
    strengths = (0.05, 0.1, 0.2, 0.4, 0.8)
    training = trained(strengths, 20)
    assert imbalance(start(strengths)[0])[0].item() == pytest.approx(4.043, abs=5e-4)
    early = imbalance(training.factors)
    for _ in range(100):
        training.step()
    rates = ((early / imbalance(training.factors)).log() / 100).tolist()
    assert rates[:4] == pytest.approx([0.0100, 0.0202, 0.0408, 0.083], rel=0.005)
    for strength, rate in zip(strengths, rates, strict=True):
        assert rate == pytest.approx(-2 * math.log1p(-0.1 * strength), rel=0.05)  # of a step
        # of the flow; descent is faster by the factor 1 + ηλ/2 and a term of second order, together 8 % at λ = 0.8
        assert rate == pytest.approx(0.2 * strength, rel=0.05 if strength < 0.8 else 0.085)


def test_without_decay_the_imbalance_stays_as_far_as_steps_are_small():
    begun = imbalance(start((0.0,))[0]).item()
    assert begun == pytest.approx(4.0428, abs=1e-4)
    for lr, kept, left in ((0.1, 3.873, 1.65), (0.01, 4.030, 1.76)):
        training = trained((0.0,), round(100 / lr), Method(lr))
        assert imbalance(training.factors).item() == pytest.approx(kept, abs=1e-3)
        assert gap(training.factors).item() == pytest.approx(left, abs=0.01)
    # nearly all of it is lost early, while the residual is large
    assert imbalance(trained((0.0,), 5000, Method(0.001)).factors).item() == pytest.approx(4.0415, abs=1e-4)


def test_without_the_half_on_the_fit_the_threshold_would_be_half():
    """‖ABᵀ - D‖² + (λ/2)(…) at η is our problem at 2η and λ/2."""
    training = trained((0.0, 0.2), 1000, Method(0.2))
    assert imbalance(training.factors)[0].item() == pytest.approx(3.49, abs=0.01)
    assert gap(training.factors)[0].item() == pytest.approx(1.41, abs=0.01)
    expected = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(values(training)[1], expected, rtol=0, atol=5e-4)


def test_a_value_at_the_threshold_decays_like_one_over_t():
    training = trained((0.4,), 1000, seeds=range(20))
    for steps in (1000, 2000, 4000):
        while training.count < steps:
            training.step()
        left = values(training)[:, 3]
        assert left.max().item() == pytest.approx(borderline(0.1, steps), rel=0.02)
        assert left.min().item() > 0.8 * borderline(0.1, steps)


def test_a_single_matrix_shrinks_and_keeps_its_rank():
    strengths = (0.0, 0.05, 0.4, 0.8, 5.0)
    training = trained(strengths, 400, depth=1)
    expected = VALUES / (1 + torch.tensor(strengths, dtype=torch.float64)[:, None])
    torch.testing.assert_close(values(training), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(product(training.factors)[2], TARGET / 1.4, rtol=0, atol=1e-12)


# --- objective, gradients and optimizers ---


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("observed", [True, False])
def test_gradients_agree_with_autograd(depth, observed):
    generator = torch.Generator().manual_seed(depth)
    shapes = [(4, 6)] if depth == 1 else [(4, 3), *[(3, 3)] * (depth - 2), (3, 6)]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(7, *shape, generator=generator, dtype=torch.float64)

    factors = [draw(*shape).requires_grad_() for shape in shapes]
    target, mask = draw(4, 6), None if observed else (draw(4, 6) > 0).double()
    slope = residual(product(factors), target, mask)
    expected = torch.autograd.grad(fit(product(factors), target, mask).sum(), factors)
    for found, right in zip(gradients(factors, slope), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        (Method(0.1), lambda p, λ: torch.optim.SGD(p, 0.1, weight_decay=λ)),
        (Method(0.1, decay="decoupled"), lambda p, λ: torch.optim.SGD(p, 0.1, weight_decay=λ)),
        (Method(0.1, "momentum"), lambda p, λ: torch.optim.SGD(p, 0.1, 0.9, 0.9, weight_decay=λ)),
        (Method(0.1, "adam"), lambda p, λ: torch.optim.Adam(p, 0.1, weight_decay=λ)),
        (Method(0.1, "adam", "decoupled"), lambda p, λ: torch.optim.AdamW(p, 0.1, weight_decay=λ)),
    ],
)
def test_steps_are_those_of_torch(method, make):
    factors, strength = start((0.3,))
    training = Training(factors, TARGET, strength, method)
    parameters = [factor.clone().requires_grad_() for factor in factors]
    optimizer = make(parameters, 0.3)
    for step in range(30):
        training.step()
        optimizer.zero_grad()
        fit(product(parameters), TARGET).sum().backward()
        if method.optimizer == "momentum" and step == 0:  # torch begins its buffer undamped, at the first gradient
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        optimizer.step()
    for ours, theirs in zip(training.factors, parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
@pytest.mark.parametrize("decay", ["loss", "decoupled", "prox"])
def test_a_batch_is_its_problems_one_by_one(optimizer, decay):
    depth, steps = (1, 20) if decay == "prox" else (3, 60)
    method = Method(0.05, optimizer, decay)
    together = trained((0.0, 0.1, 0.7), steps, method, seeds=range(3), depth=depth, scale=0.3)
    for number, strength in enumerate((0.0, 0.1, 0.7)):
        for seed in range(3):
            alone = trained((strength,), steps, method, seeds=(seed,), depth=depth, scale=0.3)
            for batched, single in zip(together.factors, alone.factors, strict=True):
                torch.testing.assert_close(batched[3 * number + seed], single[0], rtol=0, atol=1e-12)


def test_training_leaves_the_factors_it_was_given():
    factors, strength = start((0.1,))
    before = [factor.clone() for factor in factors]
    training = Training(factors, TARGET, strength, Method(0.1))
    training.step()
    for factor, same in zip(factors, before, strict=True):
        assert torch.equal(factor, same)


def test_curvature_bounds_the_hessian_of_the_fit():
    factors, _ = start((0.0,), depth=3, scale=0.4)
    target = product(factors)[0]  # no residual: the Hessian is that of Gauss and Newton

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return fit(product([part.view(1, 5, 5) for part in flat.split(25)]), target).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.cat([factor.flatten() for factor in factors]))
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    assert 0.3 * curvature(factors).item() < largest <= curvature(factors).item() + 1e-9


# --- balance, gap and bounds ---


@pytest.mark.parametrize(("m", "n"), [(5, 5), (4, 7)])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_balanced_factors_attain_the_quasi_norm(depth, m, n):
    W = torch.randn(20, m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = balanced(W, depth)
    torch.testing.assert_close(product(factors), W, rtol=0, atol=1e-12)
    assert imbalance(factors).max().item() < 1e-13
    assert gap(factors).abs().max().item() < 1e-13
    exact = quasi_norm(torch.linalg.svdvals(W), depth)
    torch.testing.assert_close(sum(f.square().sum((-2, -1)) for f in factors) / depth, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_gap_is_never_negative(depth):
    factors, strength = start((0.0, 0.3), range(500), depth=depth)
    assert gap(factors).min().item() > -1e-12
    W = product(factors)
    schatten = fit(W, TARGET) + strength * depth / 2 * quasi_norm(torch.linalg.svdvals(W), depth)
    assert (objective(factors, TARGET, strength) - schatten).min().item() > -1e-12


def test_proposition_b4_on_random_factors_of_all_kinds():
    generator = torch.Generator().manual_seed(0)
    tightest = 0.0
    for scale in (1e-3, 0.1, 1.0, 30.0):
        A, B = torch.randn(2, 3000, 4, 4, generator=generator, dtype=torch.float64)
        factors = [A, scale * B.mT]
        nuclear = torch.linalg.svdvals(product(factors)).sum(-1)
        bound = gap_bound(factors)
        assert (gap(factors) <= bound * (1 + 1e-12)).all()
        # the first half of the proposition: of one factor alone
        (difference,) = differences(factors)
        root = torch.linalg.svdvals(difference).sum(-1).sqrt()
        one = (nuclear - A.square().sum((-2, -1))).abs()
        assert (one <= root * torch.linalg.svdvals(A).sum(-1) * (1 + 1e-12)).all()
        tightest = max(tightest, (gap(factors) / bound).max().item())
    assert tightest > 0.3


@pytest.mark.parametrize(
    "method", [Method(0.1), Method(0.1, "momentum"), Method(0.1, "adam"), Method(0.1, "adam", "decoupled")]
)
def test_the_gap_is_below_its_bound_at_every_step(method):
    training = Training(*_problem((0.0, 0.1, 0.4), range(30)), method)
    for _ in range(150):
        training.step()
        assert (gap(training.factors) <= gap_bound(training.factors) + 1e-12).all()


# --- where training ends ---


@pytest.mark.parametrize("method", [Method(0.1), Method(0.1, "momentum"), Method(0.1, "momentum", "decoupled")])
def test_the_factors_end_balanced_at_the_soft_threshold(method):
    strengths = (0.1, 0.3, 0.5)  # none is a value of the target
    training = trained(strengths, 1500, method, seeds=range(30))
    expected = shrunk(VALUES, training.strength[:, None], 2)
    torch.testing.assert_close(values(training), expected, rtol=0, atol=1e-6)
    assert imbalance(training.factors).max().item() < 1e-12
    assert duality_gap(product(training.factors), TARGET, training.strength).max().item() < 1e-6


def test_adam_ends_at_the_soft_threshold_too():
    training = trained((0.1, 0.3, 0.5), 1500, Method(0.1, "adam"), seeds=range(30))
    off = (values(training) - shrunk(VALUES, training.strength[:, None], 2)).abs().amax(-1)
    assert off.median().item() < 1e-8
    assert off.max().item() < 1e-2


def test_decoupled_decay_with_adam_has_a_floor_where_l2_has_none():
    """AdamW's decay is held against normalised gradients: neither the balance nor the threshold follows."""
    coupled = trained((0.1, 0.4), 1000, Method(0.1, "adam"), seeds=range(20))
    decoupled = trained((0.1, 0.4), 1000, Method(0.1, "adam", "decoupled"), seeds=range(20))
    begun = imbalance(start((0.1, 0.4), range(20))[0])
    assert (imbalance(coupled.factors) / begun).median().item() < 1e-6
    floor = imbalance(decoupled.factors)
    assert 0.05 < (floor / begun).median().item() < 0.6
    for _ in range(1000):
        decoupled.step()
    assert imbalance(decoupled.factors).median().item() == pytest.approx(floor.median().item(), rel=0.5)
    assert values(decoupled)[:, -1].min().item() > 0.15  # none of the singular values is dropped
    assert values(decoupled)[:, 0].median().item() > 0.98


def test_decoupled_adam_is_l2_while_its_epsilon_is_far_above_the_gradients():
    """λ_L2 = λ ε, at the learning rate η/ε: section 3.5 of the paper."""
    training = trained((0.01, 0.03), 3000, Method(1.0, "adam", "decoupled", epsilon=10.0), seeds=range(5))
    expected = shrunk(VALUES, 10 * training.strength[:, None], 2)
    torch.testing.assert_close(values(training), expected, rtol=0, atol=0.02)


def test_the_proximal_step_ends_at_the_optimum_at_once():
    training = trained((0.0, 0.1, 0.2, 0.4), 400, Method(0.1, decay="prox"), seeds=range(5), depth=1)
    expected = shrunk(VALUES, training.strength[:, None], 2)
    torch.testing.assert_close(values(training), expected, rtol=0, atol=1e-12)
    one_step = trained((0.3,), 1, Method(1.0, decay="prox"), depth=1)
    torch.testing.assert_close(values(one_step)[0], shrunk(VALUES, one_step.strength, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [3, 4])
def test_deep_products_end_where_the_quasi_norm_is_stationary(depth):
    scale = {3: 0.31, 4: 0.27}[depth]
    training = trained((0.02, 0.1, 0.3), 2000, seeds=range(20), depth=depth, scale=scale)
    expected = shrunk(VALUES, training.strength[:, None], depth)
    places = torch.cat([expected, torch.zeros_like(expected[:, :1])], 1)
    off = (values(training)[:, :, None] - places[:, None]).abs().amin(-1).amax(-1)  # order is lost where one is dropped
    assert (off < 1e-6).double().mean().item() > 0.9
    assert (imbalance(training.factors) < 5 * torch.exp(-0.2 * training.strength * 2000) + 1e-6).all()
    # Lemma 3.2 for neighbours: λ F_lᵀF_l = λ F_{l+1}F_{l+1}ᵀ, so the penalty is the quasi-norm there
    assert gap(training.factors)[20:].abs().max().item() < 1e-6


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_shrunk_is_the_largest_local_minimum_of_the_scalar_problem(depth):
    w = torch.linspace(0, 1.5, 300_001, dtype=torch.float64)
    for s in (0.05, 0.3, 0.9, 1.4):
        for strength in (0.0, 0.01, 0.1, 0.25):
            found = shrunk(torch.tensor(s, dtype=torch.float64), torch.tensor(strength, dtype=torch.float64), depth)
            loss = 0.5 * (w - s) ** 2 + strength * depth / 2 * w.pow(2 / depth)
            inner = (loss[1:-1] < loss[:-2]) & (loss[1:-1] < loss[2:])
            expected = w[1:-1][inner].max().item() if inner.any() else 0.0
            assert found.item() == pytest.approx(expected, abs=2e-5)


def test_the_duality_gap_is_an_upper_bound_that_closes_at_the_optimum():
    generator = torch.Generator().manual_seed(3)
    W, target = torch.randn(2, 50, 4, 6, generator=generator, dtype=torch.float64)
    strength = torch.full((50,), 0.7, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(target, full_matrices=False)
    optimum = U @ torch.diag_embed((S - 0.7).clamp(min=0)) @ Vh

    def nuclear(X: torch.Tensor) -> torch.Tensor:
        return fit(X, target) + strength * torch.linalg.svdvals(X).sum(-1)

    assert duality_gap(optimum, target, strength).abs().max().item() < 1e-12
    for size in (1e-6, 1e-2, 1.0):
        near = optimum + size * W
        assert (duality_gap(near, target, strength) >= nuclear(near) - nuclear(optimum) - 1e-12).all()


# --- momentum and noise ---


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_proposition_B2_says_what_the_imbalance_is_but_for_the_step(noise):
    """Halving dt halves what the path is off the identity; without the integral it would be off by far more."""
    target = torch.diag(torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64))
    rng = torch.Generator().manual_seed(0)
    factors = [0.7 * torch.randn(4, 3, 3, dtype=torch.float64, generator=rng) for _ in range(2)]
    strength = torch.full((4,), 0.3, dtype=torch.float64)
    off = []
    for length in (0.2, 0.1):
        path = Diffusion(factors, target, strength, Dynamics(rate=0.1, momentum=0.3, noise=noise, length=length))
        for _ in range(round(60 / length)):
            path.step()
        (found,) = differences(path.factors)
        off.append(float((found - path.predicted).norm(dim=(1, 2)).max()))
        alone = math.exp(-2 * 0.1 * 0.3 * 60) * differences(factors)[0]
        if noise:
            assert off[-1] < 0.3 * float((found - alone).norm(dim=(1, 2)).min())
    if not noise:
        assert off[1] == pytest.approx(off[0] / 2, rel=0.2)
