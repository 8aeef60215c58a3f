"""Every shrinkage against a float64 SVD, the algebra of the soft threshold, the contract of `shrink`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    DTYPES,
    SHAPES,
    by_svd,
    conditioned,
    gaussian,
    low_rank,
    orthonormal,
    rounding,
    spectral_error,
    with_spectrum,
)

from rankdecay.linalg import (
    newton_schulz,
    polar,
    record_backends,
    shrink,
    smooth_polar,
    soft_threshold,
    spectral_clip,
)

BACKENDS = ["exact", "matmul"]
RULES = ["prox", "smooth", "polar", "newton_schulz"]
TAUS = [1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 0.5, 0.999, 1.5, 1e3]


def thresholded(tau):
    return lambda s: (s - tau).clamp_min(0)


# ---- accuracy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold_accuracy(dtype, kappa, tau):
    for shape in [(33, 65), (40, 40), (1, 7), (127, 20)]:
        W = conditioned(shape, kappa, dtype)
        # S_τ(W) = W - clip_τ(W): putting σ - τ together again would add the SVD's own rounding to the reference.
        expected = W.double() - by_svd(W, lambda s: s.clamp_max(tau))
        error = spectral_error(soft_threshold(W, tau, "exact"), expected)
        assert error <= 1e-6 * tau + rounding(W), shape


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6])
def test_soft_threshold_accuracy_by_products(kappa, tau):
    # What this backend reaches in float32, as its docstring says: not the 1e-6 τ of the exact one.
    for shape in [(33, 65), (40, 40), (1, 7), (127, 20)]:
        W = conditioned(shape, kappa, torch.float32)
        error = spectral_error(soft_threshold(W, tau, "matmul"), by_svd(W, thresholded(tau)))
        assert error <= 2e-5 * min(tau, 1) + 1e-6, shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 1e-6, 1e-2, 0.5, 10.0])
def test_spectral_clip_accuracy(beta, backend):
    W = conditioned((40, 64), 1e4, torch.float32)
    expected = by_svd(W, lambda s: s.clamp_max(beta))
    assert spectral_error(spectral_clip(W, beta, backend), expected) <= (3e-7 if backend == "exact" else 4e-6)


def test_everything_below_the_threshold_becomes_exactly_zero():
    W = conditioned((20, 30), 1e4, torch.float32)
    assert not soft_threshold(W, 1.001).any()
    assert not soft_threshold(W * 1e-30, 1.0).any()


def test_dead_directions_do_not_come_back():
    W = low_rank(40, 40, 4)
    sigma = torch.linalg.svdvals(soft_threshold(W, 1e-3).double())
    assert float(sigma[4:].max()) <= rounding(W)


def test_published_cubic_response():
    # low_rank_decay.md 7.3: p_5 at these points, the other direction making ‖W‖_F = 1.
    for s, expected in [(0.3, 0.99577), (0.1, 0.65872), (0.05, 0.36582), (0.01, 0.07582), (0.001, 0.00759)]:
        W = torch.diag(torch.tensor([math.sqrt(1 - s * s), s], dtype=torch.float64))
        assert float(newton_schulz(W)[1, 1]) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("steps", "slope"), [(3, 3.38), (5, 7.59), (7, 17.09), (10, 57.67), (15, 437.9), (20, 3325)])
def test_published_cubic_slope(steps, slope):
    W = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    assert float(newton_schulz(W, steps)[1, 1]) / 1e-9 == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("shape", [(512, 128), (128, 512), (128, 128)])
def test_newton_schulz_transposes(shape):
    W = gaussian(*shape)
    torch.testing.assert_close(newton_schulz(W.mT), newton_schulz(W).mT, rtol=0, atol=1e-6)


def test_newton_schulz_of_zero_and_of_tiny():
    assert not newton_schulz(torch.zeros(3, 4)).any()
    W = gaussian(6, 4)
    assert torch.equal(newton_schulz(W * 2.0**-100), newton_schulz(W))


# ---- each rule is what its formula says ---------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_rules_against_their_formulas(shape):
    W, tau = gaussian(*shape, dtype=torch.float64), 0.2
    frobenius = float(W.norm())

    def cubic(s):
        x = s / frobenius
        for _ in range(5):
            x = x * (3 - x * x) / 2
        return s - tau * x

    expected = {
        "prox": by_svd(W, thresholded(tau)),
        "smooth": by_svd(W, lambda s: s - tau * s / (s * s + tau * tau).sqrt()),
        "polar": by_svd(W, lambda s: s - tau),
        "newton_schulz": by_svd(W, cubic),
    }
    for rule in RULES:
        torch.testing.assert_close(shrink(W, tau, rule), expected[rule], rtol=0, atol=1e-10)
        if rule != "newton_schulz":
            torch.testing.assert_close(shrink(W, tau, rule, backend="matmul"), expected[rule], rtol=0, atol=1e-6)


def test_smoothing_widens_the_ramp():
    W, tau = gaussian(2, 12, 8, dtype=torch.float64), 1e-3
    for i in range(2):
        eps = max(tau, 0.1 * float(W[i].norm()))
        expected = W[i] - tau * smooth_polar(W[i], eps)
        torch.testing.assert_close(shrink(W, tau, "smooth", smoothing=0.1)[i], expected, rtol=0, atol=1e-12)


def test_polar_rule_leaves_null_directions_alone():
    W = with_spectrum((10, 6), torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    sigma = torch.linalg.svdvals(shrink(W, 0.5, "polar"))
    torch.testing.assert_close(sigma, torch.tensor([2.5, 1.5, 0, 0, 0, 0]).double(), rtol=0, atol=1e-12)


def test_polar_rule_overshoots_by_design():
    W = torch.diag(torch.tensor([3.0, 0.4]))
    torch.testing.assert_close(shrink(W, 1.0, "polar"), torch.diag(torch.tensor([2.0, -0.6])))


def test_step_counts_reach_newton_schulz():
    W = gaussian(12, 12)
    torch.testing.assert_close(shrink(W, 0.1, "newton_schulz", steps=9), W - 0.1 * newton_schulz(W, 9))


# ---- contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_dtype_and_input_are_kept(dtype, rule, backend):
    for shape in [(4, 6), (6, 4), (2, 3, 5, 5), (1, 8), (3, 0, 2)]:
        W = gaussian(*shape, dtype=dtype)
        before = W.clone()
        got = shrink(W, 0.01, rule, backend=backend)
        assert got.shape == W.shape
        assert got.dtype == dtype
        assert got.isfinite().all()
        assert torch.equal(W, before)
        assert got.data_ptr() != W.data_ptr() or W.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_zero_step_is_the_identity_bit_for_bit(rule, backend):
    W = gaussian(3, 10, 6, dtype=torch.bfloat16)
    W[0, 0, 0] = -0.0
    got = shrink(W, 0.0, rule, backend=backend)
    assert torch.equal(got.view(torch.int16), W.view(torch.int16))
    got = shrink(W, torch.tensor([0.0, 0.5, 0.0]), rule, backend=backend)
    assert torch.equal(got[[0, 2]].view(torch.int16), W[[0, 2]].view(torch.int16))
    assert not torch.equal(got[1], W[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_one_step_per_matrix(rule, backend):
    W = gaussian(2, 3, 10, 6)
    tau = torch.tensor([[0.1, 0.2, 30.0], [0.5, 1e-4, 1.0]])
    got = shrink(W, tau, rule, backend=backend)
    for i in range(2):
        for j in range(3):
            alone = shrink(W[i, j], float(tau[i, j]), rule, backend=backend)
            torch.testing.assert_close(got[i, j], alone, rtol=1e-5, atol=1e-5)
    broadcast = shrink(W, torch.tensor([0.1, 0.2, 0.3]), rule, backend=backend)
    torch.testing.assert_close(broadcast[1, 2], shrink(W[1, 2], 0.3, rule, backend=backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_non_finite_spoils_only_its_slice(rule, backend):
    W = gaussian(5, 10, 6)
    clean = shrink(W, 0.1, rule, backend=backend)
    W[1, 0, 0] = float("nan")
    W[3, 2, 2] = float("inf")
    got = shrink(W, torch.tensor([0.1, 0.1, 0.1, 0.1, -0.1]), rule, backend=backend)
    assert got[[1, 3, 4]].isnan().all()
    torch.testing.assert_close(got[[0, 2]], clean[[0, 2]], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_ends_of_the_range(rule, backend):
    W = torch.diag(torch.tensor([1.0, 0.5, 0.25]))
    for scale in (1e-42, 1e-30, 1e30, 1e38):
        got = shrink(W * scale, 0.1 * scale, rule, backend=backend)
        torch.testing.assert_close(got / scale, shrink(W, 0.1, rule, backend=backend), rtol=0, atol=2e-3)
    for tau in (1e-30, 1.0):
        assert shrink(W * 1e-42, tau, rule, backend=backend).isfinite().all()
        assert shrink(W * 1e38, tau, rule, backend=backend).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_zero_matrix_stays_zero(rule):
    for backend in BACKENDS:
        assert not shrink(torch.zeros(2, 4, 6), 0.1, rule, backend=backend).any()


def test_low_precision_weights_are_rounded_once():
    # W - τ U Vᵀ with U Vᵀ itself rounded to bfloat16 would differ.
    W = gaussian(30, 20, dtype=torch.bfloat16)
    for rule in RULES:
        assert torch.equal(
            shrink(W, 0.05, rule, backend="exact"), shrink(W.float(), 0.05, rule, backend="exact").bfloat16()
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_reported_backend(backend):
    W = gaussian(6, 4)
    for rule in RULES:
        with record_backends() as ran:
            shrink(W, 0.1, rule, backend=backend)
        assert set(ran) == {"matmul" if rule == "newton_schulz" else backend}
        with record_backends() as ran:
            shrink(W, 0.0, rule, backend=backend)
        assert ran == []


@pytest.mark.parametrize("tau", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_refuses_a_step_that_is_none(rule, tau):
    with pytest.raises(ValueError, match=r"tau=.*finite number >= 0"):
        shrink(torch.eye(2), tau, rule)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: shrink(W, 0.1, "newton-schulz"), r"rule='newton-schulz'.*did you mean 'newton_schulz'"),
        (lambda W: shrink(W, 0.1, backend="gpu"), r"backend='gpu'.*auto, exact, matmul"),
        (lambda W: shrink(W, torch.ones(2)), r"tau has shape \(2,\).*\(3,\) of W"),
        (lambda W: shrink(W, torch.ones(3, 4, 4)), r"tau has shape \(3, 4, 4\)"),
        (lambda W: shrink(W, 0.1, "smooth", smoothing=-1.0), r"smoothing=-1\.0"),
        (lambda W: shrink(W, 0.1, "newton_schulz", steps=0), r"steps=0"),
        (lambda W: newton_schulz(W, 2.5), r"steps=2\.5"),
        (lambda W: spectral_clip(W, -2.0), r"beta=-2\.0"),
        (lambda W: soft_threshold(W[0, 0], 0.1), r"W has shape \(4,\)"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 4, 4))


# ---- properties ---------------------------------------------------------------------------------------

dimensions = st.integers(1, 9)
levels = st.floats(0, 5)
seeds = st.integers(0, 10_000)
slow_is_fine = settings(max_examples=40, deadline=None)


def random_matrix(m, n, seed):
    return gaussian(m, n, seed=seed, dtype=torch.float64)


@slow_is_fine
@given(m=dimensions, n=dimensions, a=levels, b=levels, seed=seeds)
def test_soft_threshold_composes(m, n, a, b, seed):
    W = random_matrix(m, n, seed)
    twice = soft_threshold(soft_threshold(W, b), a)
    torch.testing.assert_close(twice, soft_threshold(W, a + b), rtol=0, atol=1e-10)


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds, distance=st.floats(1e-6, 10))
def test_soft_threshold_is_non_expansive(m, n, tau, seed, distance):
    A = random_matrix(m, n, seed)
    B = A + distance * random_matrix(m, n, seed + 1)
    apart = float((soft_threshold(A, tau) - soft_threshold(B, tau)).norm())
    assert apart <= float((A - B).norm()) * (1 + 1e-9) + 1e-12


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds, rule=st.sampled_from(RULES))
def test_commutes_with_orthogonal_factors(m, n, tau, seed, rule):
    W, left, right = random_matrix(m, n, seed), orthonormal(m, m, seed + 1), orthonormal(n, n, seed + 2)
    rotated = shrink(left @ W @ right, tau, rule)
    torch.testing.assert_close(rotated, left @ shrink(W, tau, rule) @ right, rtol=0, atol=1e-8)


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds, backend=st.sampled_from(BACKENDS))
def test_moreau_identity(m, n, tau, seed, backend):
    W = random_matrix(m, n, seed)
    clipped = spectral_clip(W, tau, backend)
    total = soft_threshold(W, tau, backend) + clipped
    torch.testing.assert_close(total, W, rtol=0, atol=1e-10)
    if backend == "exact":
        assert float(torch.linalg.matrix_norm(clipped, ord=2)) <= tau * (1 + 1e-9) + 1e-12


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=levels, seed=seeds)
def test_soft_threshold_is_the_proximal_map(m, n, tau, seed):
    # W - S is τ times a subgradient at S: <W - S, S> = τ ‖S‖_* and ‖W - S‖₂ <= τ.
    W = random_matrix(m, n, seed)
    S = soft_threshold(W, tau)
    nuclear = float(torch.linalg.matrix_norm(S, ord="nuc"))
    assert float(((W - S) * S).sum()) == pytest.approx(tau * nuclear, abs=1e-9)
    assert float(torch.linalg.matrix_norm(W - S, ord=2)) <= tau + 1e-10


@slow_is_fine
@given(m=dimensions, n=dimensions, tau=st.floats(1e-3, 5), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_smooth_never_overshoots_and_stays_near_the_prox(m, n, tau, seed, backend):
    W = random_matrix(m, n, seed)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    response = torch.einsum("ik,ij,kj->k", U, shrink(W, tau, "smooth", backend=backend), Vh)
    prox = (sigma - tau).clamp_min(0)
    assert float(response.min()) >= -1e-6
    # ε = τ: at most (1 - 1/√2) τ = 0.293 τ away from the prox (matrix_functions.md, section 2).
    assert float((response - prox).abs().max()) <= 0.2930 * tau + 1e-6


@slow_is_fine
@given(m=dimensions, n=dimensions, c=st.floats(1e-6, 1e6), seed=seeds)
def test_homogeneity(m, n, c, seed):
    W = random_matrix(m, n, seed)
    torch.testing.assert_close(soft_threshold(c * W, c * 0.5) / c, soft_threshold(W, 0.5), rtol=0, atol=1e-10)
    torch.testing.assert_close(polar(c * W), polar(W), rtol=0, atol=1e-7)
