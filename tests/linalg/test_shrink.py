"""Each rule against its formula, and the contract of `shrink`; what holds of every step is in test_shares.py."""

import pytest
import torch
from matrices import (
    DTYPES,
    SHAPES,
    by_svd,
    gaussian,
    thresholded,
)

from rankdecay.linalg import (
    newton_schulz,
    record_backends,
    shrink,
    soft_threshold,
    spectral_clip,
)

BACKENDS = ["exact", "matmul"]
RULES = ["prox", "smooth", "polar", "newton_schulz"]


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


@pytest.mark.parametrize("backend", ["exact", "matmul"])
@pytest.mark.parametrize("shape", [(4, 4), (24, 64), (64, 300), (130, 130)])
def test_below_the_threshold_four_roundings_are_left_in_float64(shape, backend):
    W = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(W)
    for part in (0.1, 0.5, 0.9):
        tau = part * sigma[:, 0]
        left = torch.linalg.svdvals(shrink(W, tau, backend=backend))
        below = torch.where(sigma < tau[:, None], left, 0.0) / sigma[:, :1]
        assert float(below.max()) <= 4 * torch.finfo(torch.float64).eps
