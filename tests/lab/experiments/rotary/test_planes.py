"""Scores under rotary positions: against matrices that turn, autograd, a convex solver and closed forms."""

import math

import numpy as np
import pytest
import torch

from rankdecay.lab.convex import nuclear_fit, solve
from rankdecay.lab.experiments.rotary import planes
from rankdecay.lab.experiments.rotary.planes import Scores, coupling, duality_gap, nuclear, products

FREQUENCIES = torch.tensor([1.0, 0.6, 0.25], dtype=torch.float64)
OFFSETS = torch.arange(9, dtype=torch.float64)
ORIGIN = torch.zeros(1, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def problem(strength=0.3, count=2, left=4, right=5, rank_one=True, M=None):
    target = (
        products(normal(count, 3, left), normal(count, 3, right, seed=1)) if rank_one else normal(count, 3, left, right)
    )
    M = coupling(FREQUENCIES, OFFSETS) if M is None else M
    return Scores(M, target, torch.full((count,), strength, dtype=torch.float64))


def by_turning(a, b, offset):
    """W_QᵀR_ΔW_K of one problem, in which R turns the two rows of a plane by f·Δ."""
    total = torch.zeros(a.shape[-1], b.shape[-1], dtype=torch.float64)
    for f, one, other in zip(FREQUENCIES.tolist(), a, b, strict=True):
        c, s = math.cos(f * offset), math.sin(f * offset)
        R = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        total = total + torch.stack([one.real, one.imag]).mT @ R @ torch.stack([other.real, other.imag])
    return total


def test_the_fit_is_that_of_scores_whose_planes_turn():
    scores = problem()
    a, b, a_target, b_target = (
        normal(2, 3, 4, seed=2),
        normal(2, 3, 5, seed=3),
        normal(2, 3, 4),
        normal(2, 3, 5, seed=1),
    )
    for number in range(2):
        given = (by_turning(a[number], b[number], at) - by_turning(a_target[number], b_target[number], at)
                 for at in OFFSETS.tolist())  # fmt: skip
        expected = sum(float(difference.square().sum()) for difference in given) / len(OFFSETS)
        assert float(scores.fit(products(a, b))[number]) == pytest.approx(expected)


def test_the_gradients_are_those_of_autograd_on_the_rows():
    scores = problem()
    parts = [torch.view_as_real(normal(2, 3, width, seed=width)).requires_grad_() for width in (4, 5)]
    value = planes.objective(scores, *(torch.view_as_complex(part) for part in parts))
    by_autograd = torch.autograd.grad(value.sum(), parts)
    mine = planes.gradients(scores, *(torch.view_as_complex(part.detach()) for part in parts))
    for expected, found in zip(by_autograd, mine, strict=True):
        torch.testing.assert_close(torch.view_as_real(found), expected)


def test_fourier_frequencies_do_not_see_each_other():
    f = 2 * math.pi * torch.arange(1, 5, dtype=torch.float64) / 16
    torch.testing.assert_close(coupling(f, torch.arange(16).double()), torch.eye(8, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # of the reference, by less than what is compared
@pytest.mark.parametrize("rank_one", [True, False])
def test_the_convex_problem_is_solved_as_an_interior_point_solver_does(rank_one):
    import cvxpy

    scores = problem(0.4, count=1, left=2, right=3, rank_one=rank_one)
    H = planes.solve(scores, 5000)
    value = scores.fit(H) + scores.strength * nuclear(H)
    assert 0 <= float(duality_gap(scores, H, value)) < 1e-9
    parts = [cvxpy.Variable((2, 3)) for _ in range(6)]  # real, then imaginary parts of the planes
    target = torch.cat([scores.target.real, scores.target.imag], 1)[0].numpy()
    root = np.linalg.cholesky(scores.coupling.numpy() + 1e-13 * np.eye(6)).T
    missed = [sum(root[i, j] * (parts[j] - target[j]) for j in range(6)) for i in range(6)]
    # the nuclear norm of Re + i Im is half that of the real matrix [[Re, -Im], [Im, Re]]
    real = [cvxpy.bmat([[parts[j], -parts[j + 3]], [parts[j + 3], parts[j]]]) for j in range(3)]
    penalty = sum(cvxpy.normNuc(matrix) for matrix in real) / 2
    reference = solve(cvxpy.Problem(cvxpy.Minimize(0.5 * sum(map(cvxpy.sum_squares, missed)) + 0.4 * penalty)))
    assert float(value) == pytest.approx(reference, abs=1e-6)


def test_the_certificate_is_never_below_what_a_candidate_is_above_the_minimum():
    scores = problem(0.4, count=3, rank_one=False)
    best = planes.solve(scores, 5000)
    least = scores.fit(best) + scores.strength * nuclear(best)
    for seed in range(5):
        H = best + 0.3 * normal(*best.shape, seed=seed)
        value = scores.fit(H) + scores.strength * nuclear(H)
        gap = duality_gap(scores, H, value)
        assert bool((gap >= value - least - 1e-9).all())
        assert bool((value - least > 0.01).all())


def test_L2_is_the_group_penalty_once_the_sides_of_a_plane_are_balanced():
    scores = problem()
    a, b = normal(2, 3, 4, seed=2), normal(2, 3, 5, seed=3)
    H = products(a, b)
    group = scores.fit(H) + scores.strength * nuclear(H)
    torch.testing.assert_close(nuclear(H), (a.norm(dim=-1) * b.norm(dim=-1)).sum(1))
    assert bool((planes.objective(scores, a, b) > group).all())
    scale = (b.norm(dim=-1) / a.norm(dim=-1)).sqrt()[..., None]
    torch.testing.assert_close(planes.objective(scores, a * scale, b / scale), group)
    turned = torch.polar(torch.ones(2, 3), torch.randn(2, 3)).to(a.dtype)[..., None]
    torch.testing.assert_close(planes.objective(scores, a * scale * turned, b / scale * turned), group)


def test_without_positions_it_is_the_nuclear_norm_of_the_product():
    """The planes of one problem are then free to take any part of S: its optimum is that of ½‖S - S*‖² + λ‖S‖_*."""
    scores = problem(0.5, M=coupling(FREQUENCIES, ORIGIN), count=1)
    H = planes.solve(scores, 5000)
    value = scores.fit(H) + scores.strength * nuclear(H)
    assert float(duality_gap(scores, H, value)) < 1e-9
    reference = nuclear_fit(scores.target.real.sum(1)[0].numpy(), 0.5)
    assert float(value) == pytest.approx(reference.objective, abs=1e-6)
    np.testing.assert_allclose(H.real.sum(1)[0].numpy(), reference.W, atol=1e-4)
