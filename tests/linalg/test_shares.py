"""Every step against the ten lines in float64, and what holds of any: scale, rotation, order, range, exact zeros."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import (
    beside_the_largest,
    conditioned,
    gaussian,
    low_rank,
    orthonormal,
    random_matrix,
    seeds,
    slow_is_fine,
    soft_threshold_by_svd,
    with_spectrum,
)

from rankdecay.linalg import power_step, record_backends, shrink, stack
from rankdecay.linalg.gram import shrink_factor

BACKENDS = ["auto", "exact", "matmul"]
RULES = ["prox", "smooth", "polar", "newton_schulz"]
sides = st.integers(0, 7)
rms = lambda W: W.double().norm() / max(1, min(W.shape)) ** 0.5  # noqa: E731


def reference(W, tau, rule, *, keep=0, preserve_norm=False, smoothing=0.0):
    """A step from an SVD in float64; the soft threshold by its own."""
    W = W.double()
    if rule == "prox":
        return soft_threshold_by_svd(W.tolist(), tau, keep=keep, preserve_norm=preserve_norm).reshape(W.shape)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    eps = max(tau, smoothing * float(sigma.norm()))
    left = sigma - tau * sigma / torch.hypot(sigma, torch.tensor(eps or 1.0))
    left = torch.where(torch.arange(len(sigma)) < keep, sigma, left)
    if preserve_norm and left.any():
        left = left * (sigma.norm() / left.norm())
    return U * left @ Vh


@slow_is_fine
@given(
    m=sides,
    n=sides,
    seed=seeds,
    share=st.sampled_from([1e-3, 0.1, 0.5, 1.0, 5.0]),
    rule=st.sampled_from(["prox", "smooth"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    backend=st.sampled_from(BACKENDS),
    relative=st.booleans(),
    keep=st.integers(0, 7),
    preserve_norm=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.13, 2.0]),
)
def test_a_step_is_the_reference(m, n, seed, share, rule, dtype, backend, relative, keep, preserve_norm, smoothing):
    W = random_matrix(m, n, seed).to(dtype)
    tau = share * float(rms(W)) if m and n else share
    options = {"keep": keep, "preserve_norm": preserve_norm, "smoothing": smoothing}
    got = shrink(W, share if relative else tau, rule, relative=relative, backend=backend, **options)
    assert got.dtype == dtype
    assert got.shape == W.shape
    if not W.numel():
        return
    wanted = reference(W, tau, rule, **options)
    # What is left of nearly nothing, and is then made as large as the matrix, has few digits; so have bfloat16 weights.
    size = float(W.double().norm())
    left = reference(W, tau, rule, keep=keep, smoothing=smoothing)
    few_digits = preserve_norm and float(left.norm()) < 0.1 * size
    grown = size / float(left.norm()) if preserve_norm and not few_digits else 1.0  # with what is left, its error
    step_error = 0.0 if backend == "exact" or dtype == torch.float64 or rule == "prox" else 6e-4
    bound = size * (3e-6 + 2 * torch.finfo(dtype).eps) + step_error * grown * float((W.double() - left).norm())
    if not few_digits:
        assert float((got.double() - wanted).norm()) <= bound
    elif keep or backend == "exact":
        assert float(got.double().norm()) == pytest.approx(size, rel=1e-2)


@slow_is_fine
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    seed=seeds,
    power=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    cap=st.sampled_from([0.05, 1.0]),
    amount=st.sampled_from([0.0, 1e-3, 0.3, 10.0]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_a_law_of_the_norm_is_its_formula(m, n, seed, power, cap, amount, scale, dtype):
    W = torch.stack([random_matrix(m, n, seed), torch.zeros(m, n, dtype=torch.float64)]).to(dtype) * scale
    norm = float(W[0].double().norm())
    each = amount * scale ** (1 - power)
    share = min(each * norm ** (power - 1), cap)
    amounts = torch.tensor([each, each], dtype=torch.float64) if dtype == torch.float64 else each
    got = power_step(W, amounts, power, cap)
    torch.testing.assert_close(got[0].double(), W[0].double() * (1 - share), rtol=2e-6, atol=1e-7 * norm)
    assert not got[1].any()
    again = W.clone()
    assert power_step(again, amounts, power, cap, out=again) is again
    assert torch.equal(again, got)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_law_of_the_norm_where_the_norm_is_beyond_its_dtype(power):
    for dtype, scales in ((torch.float32, (3e38, 1e-36)), (torch.float64, (1e305, 1e-300))):
        for scale in scales:
            W = torch.full((40, 30), scale, dtype=dtype)
            amount = math.exp(math.log(0.1) - (power - 1) * (math.log(scale) + math.log(1200) / 2))
            torch.testing.assert_close(power_step(W, amount, power) / W, torch.full_like(W, 0.9), rtol=1e-6, atol=0)
    W = gaussian(3, 4, 5)
    W[1, 0, 0] = torch.inf
    got = power_step(W, torch.tensor([0.1, 0.1, -1.0]), power)
    spoilt = got.isnan().flatten(1)
    assert spoilt.any(1).tolist() == [False, True, True]
    assert power == 1 or spoilt.all(1).tolist() == [False, True, True]


# ---- scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_relative_step_knows_no_scale(rule, backend):
    W = conditioned((9, 6), 1e3, torch.float32)
    for options in ({}, {"smoothing": 0.13}, {"preserve_norm": True}):
        expected = shrink(W, 0.2, rule, relative=True, backend=backend, **options)
        for k in (-90, -40, 60, 126):
            assert torch.equal(
                shrink(W * 2.0**k, 0.2, rule, relative=True, backend=backend, **options), expected * 2.0**k
            )
        for scale in (1e-30, 1e30, 3e38):  # the norm of the last overflows
            got = shrink(W * scale, 0.2, rule, relative=True, backend=backend, **options) / scale
            torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)
    W = W.double()
    expected = shrink(W, 0.2, rule, relative=True, backend=backend)
    for k in (-990, 1000):
        assert torch.equal(shrink(W * 2.0**k, 0.2, rule, relative=True, backend=backend), expected * 2.0**k)
    G = W.mT @ W
    C = shrink_factor(G, torch.tensor(0.2), rule, relative=True, backend="exact" if backend == "auto" else backend)
    torch.testing.assert_close(W - W @ C, expected, rtol=0, atol=1e-5)


def test_subnormal_weights_decay_as_others_do():
    W = torch.tensor([[3.0, 0.0], [0.0, 1.0]]) * 2.0**-140
    for backend in BACKENDS:
        got = shrink(W, 0.5, relative=True, backend=backend).double() * 2.0**140
        torch.testing.assert_close(got, shrink(W.double() * 2.0**140, 0.5, relative=True), rtol=0, atol=2.0**-8)


def test_the_gram_matrix_of_float64_weights_beyond_the_square_root_of_their_range():
    W = gaussian(7, 4, dtype=torch.float64)
    C = shrink_factor(W.mT @ W, 0.3 * 2.0**600, exponent=600)
    torch.testing.assert_close(W - W @ C, shrink(W, 0.3), rtol=0, atol=1e-9)
    assert shrink_factor(torch.full((2, 2), torch.inf).double(), 0.1).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_any_strength_gives_finite_weights(rule, backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        W = torch.stack([gaussian(6, 4, dtype=dtype), torch.zeros(6, 4, dtype=dtype)])
        for tau in (1e300, 1.7e308, torch.tensor([1e30, 1e30])):
            for relative in (False, True):
                got = shrink(W, tau, rule, relative=relative, backend=backend)
                assert got.isfinite().all()
                assert not got[1].any()
                assert not got[0].any()
        kept = shrink(W, 1e300, rule, preserve_norm=True, backend=backend)
        assert kept.isfinite().all()
        if rule in ("prox", "smooth"):
            assert torch.equal(kept, W)  # nothing would be left: it stays


# ---- what is below the threshold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["exact", "matmul"])
def test_nothing_is_left_below_the_threshold(backend):
    n = 48
    for W in (gaussian(n, n), conditioned((60, n), 1e4, torch.float32), low_rank(n, 70, n // 2)):
        sigma = torch.linalg.svdvals(W.double())
        for level in (float(sigma[5]), float(sigma[5]) * (1 + 1e-7), float(sigma[n // 2]), 1e-3 * float(sigma[0])):
            dead = int((sigma > level).sum())
            left = torch.linalg.svdvals(shrink(W, level, backend=backend).double())
            assert max(left[dead:].tolist(), default=0.0) <= 2 * 2.0**-23 * float(sigma[0])
        for level in (1.0, 1 + 1e-9, 1.5, 100):
            assert not shrink(W, float(sigma[0]) * level, backend=backend).any()


kinds = {
    "gaussian": lambda m, n, seed: gaussian(m, n, seed=seed, dtype=torch.float64),
    "decades": lambda m, n, seed: conditioned((m, n), 10.0 ** (seed % 17), torch.float64, seed),
    "low rank": lambda m, n, seed: low_rank(m, n, 1 + seed % min(m, n), seed, torch.float64),
    "equal": lambda m, n, seed: with_spectrum(
        (m, n), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)[torch.arange(min(m, n)) * (seed + 1) % 3], seed
    ),
}


def left_below(W, level, backend):
    """What a soft threshold at a level of σ₁ leaves below it, in units in the last place of σ₁."""
    unit = W.abs().max().double()
    sigma = torch.linalg.svdvals(W.double() / unit)
    tau = level * float(sigma[0])
    out = shrink(W, tau * float(unit), backend=backend).double() / unit
    if tau >= float(sigma[0]):
        assert not out.any()
        return 0.0
    below = beside_the_largest(out, int((sigma > tau).sum()))
    return below / float(sigma[0]) / torch.finfo(W.dtype).eps


@slow_is_fine
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    seed=seeds,
    kind=st.sampled_from(sorted(kinds)),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    power=st.floats(-1, 1),
    backend=st.sampled_from(["exact", "matmul"]),
    near=st.sampled_from([0.0, 1 - 1e-15, 1.0, 1 + 1e-15, 1 + 1e-12, 1 + 1e-7]),
    level=st.floats(1e-12, 1.0),
)
def test_at_most_two_units_in_the_last_place_are_left_below_the_threshold(
    m, n, seed, kind, dtype, power, backend, near, level
):
    range_ = {torch.float64: 280, torch.float32: 28}.get(dtype, 0)
    W = (kinds[kind](m, n, seed) * 10.0 ** (power * range_)).to(dtype)
    sigma = torch.linalg.svdvals(W.double() / W.abs().max().double())
    if near:  # at, just above or just below a singular value
        level = float(sigma[seed % len(sigma)] / sigma[0]) * near
    assert left_below(W, min(level, 1 + 1e-7), backend) <= 2


@pytest.mark.parametrize("backend", ["exact", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_of_large_matrices(dtype, backend):
    for kind, shape, seed in (("low rank", (260, 150), 40), ("decades", (140, 200), 6), ("gaussian", (130, 130), 1)):
        W = kinds[kind](*shape, seed).to(dtype)
        sigma = torch.linalg.svdvals(W.double())
        for level in (1e-3, float(sigma[9] / sigma[0]), 0.5):
            assert left_below(W, level, backend) <= 2


# ---- what is spared, and the norm -----------------------------------------------------------------------------------


def test_the_largest_are_spared_on_every_backend():
    W = with_spectrum((9, 6), torch.tensor([5.0, 3.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    for rule in ("prox", "smooth"):
        for backend in BACKENDS:
            with record_backends() as ran:
                got = shrink(W, 1.5, rule, keep=3, backend=backend)
            assert ran == ["exact"]
            sigma = torch.linalg.svdvals(got)
            torch.testing.assert_close(sigma[:3], torch.tensor([5.0, 3.0, 3.0]).double(), rtol=0, atol=1e-12)
            assert float(sigma[3]) < 1
        assert torch.equal(shrink(W, 1.5, rule, keep=6), W) or torch.allclose(
            shrink(W, 1.5, rule, keep=6), W, atol=1e-14
        )
        torch.testing.assert_close(shrink(W, 1.5, rule, keep=2), shrink(W, 1.5, rule, keep=2), rtol=0, atol=0)
    for rule in ("polar", "newton_schulz"):
        with pytest.raises(
            ValueError, match=rf"keep=2 is not possible with rule='{rule}'; use rule='prox' or 'smooth'"
        ):
            shrink(W, 0.1, rule, keep=2)
    with pytest.raises(ValueError, match=r"keep=-1 must be a whole number >= 0"):
        shrink(W, 0.1, keep=-1)


@pytest.mark.parametrize("options", [{"keep": 2}, {"preserve_norm": True}, {"keep": 1, "preserve_norm": True}])
def test_the_same_from_a_gram_matrix(options):
    W = gaussian(2, 9, 5, dtype=torch.float64)
    tau = torch.tensor([0.7, 2.5], dtype=torch.float64)
    for rule in ("prox", "smooth"):
        for backend in ("exact", "matmul"):
            C = shrink_factor(W.mT @ W, tau, rule, backend=backend, **options)
            torch.testing.assert_close(W - W @ C, shrink(W, tau, rule, backend="exact", **options), rtol=0, atol=2e-5)
    C = shrink_factor(W @ W.mT, torch.tensor(0.3), relative=True, rank=torch.tensor([5, 5]))  # of the longer side
    torch.testing.assert_close(W - C @ W, shrink(W, 0.3, relative=True), rtol=0, atol=1e-6)


# ---- large matrices and large stacks --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(130, 140), (150, 128)])
def test_a_large_matrix_by_what_it_loses(shape, dtype):
    W = conditioned(shape, 1e4, dtype)
    sigma = torch.linalg.svdvals(W.double())
    for level in (1e-7, 0.5 * float(sigma[-1]), float(sigma[-10]), float(sigma[64]), float(sigma[3])):
        for options in ({}, {"keep": 2}, {"preserve_norm": True}):
            got, wanted = shrink(W, level, **options), reference(W, level, "prox", **options)
            bound = 1e-7 if dtype == torch.float32 else 1e-12
            assert float((got.double() - wanted).norm()) <= bound * float(sigma.norm())


def test_a_stack_in_parts_is_the_stack(monkeypatch):
    W, tau = gaussian(3, 4, 8, 6), torch.rand(3, 4)
    whole = {rule: shrink(W, tau, rule, smoothing=0.1) for rule in RULES}
    monkeypatch.setitem(stack.WORKING, "cpu", 100)
    for rule in RULES:
        with record_backends() as ran:
            got = shrink(W, tau, rule, smoothing=0.1)
        assert len(ran) == 1
        torch.testing.assert_close(got, whole[rule], rtol=0, atol=1e-6)


# ---- properties -----------------------------------------------------------------------------------------------------


@slow_is_fine
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    seed=seeds,
    tau=st.floats(1e-3, 5),
    rule=st.sampled_from(["prox", "smooth"]),
    smoothing=st.sampled_from([0.0, 0.2]),
    backend=st.sampled_from(["exact", "matmul"]),
    options=st.sampled_from([{}, {"keep": 1}, {"preserve_norm": True}]),
)
def test_a_step_commutes_with_rotations_and_shrinks_in_order(m, n, seed, tau, rule, smoothing, backend, options):
    W, left, right = random_matrix(m, n, seed), orthonormal(m, m, seed + 1), orthonormal(n, n, seed + 2)
    options = options | {"smoothing": smoothing, "backend": backend}
    got = shrink(W, tau, rule, **options)
    atol = 1e-7 if backend == "exact" else 1e-4
    torch.testing.assert_close(
        shrink(left @ W @ right, tau, rule, **options), left @ got @ right, rtol=0, atol=atol * 50
    )
    if "preserve_norm" not in options:
        before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(got)
        assert (after <= before + 1e-5).all()  # t >= 0
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        response = torch.einsum("ik,ij,kj->k", U, got, Vh)
        assert (response >= -1e-5).all()  # t <= 1
        more = torch.linalg.svdvals(shrink(W, tau * 1.5, rule, **options))
        assert (more <= after + 1e-5).all()
