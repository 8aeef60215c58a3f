"""One decay of the matrices of a role: stacked, cut into heads, rounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankdecay as rd
from rankdecay.attention.layer import WHOLE, Window
from rankdecay.decay import apply as module
from rankdecay.decay.apply import Step, apply
from rankdecay.linalg import record_backends, shrink
from tests.decay.models import groups_of, make_model, zero_gradients

LR = 0.1


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- which matrices ------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    experts=st.integers(1, 3),
    amount=st.floats(1e-3, 2),
    scale=st.sampled_from(["relative", "absolute"]),
    seed=st.integers(0, 10**6),
)
def test_each_matrix_decays_as_its_own_svd_says(m, n, experts, amount, scale, seed):
    weights = [drawn(m, n, seed=seed, dtype=torch.float64), drawn(experts, m, n, seed=seed + 1, dtype=torch.float64)]
    before = [weight.clone() for weight in weights]
    decay = rd.LowRank(1.0, scale=scale)
    apply([Step(weights, [WHOLE], decay, amount, 0)], "auto")
    for new, old in zip(weights, before, strict=True):
        U, sigma, Vh = torch.linalg.svd(old, full_matrices=False)
        tau = amount * (old.norm(dim=(-2, -1)) / min(m, n) ** 0.5 if scale == "relative" else 1)
        tau = torch.as_tensor(tau, dtype=torch.float64).expand(old.shape[:-2])
        expected = (U * (sigma - tau[..., None]).clamp_min(0)[..., None, :]) @ Vh
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-9)


def test_heads_are_matrices_of_their_own_and_the_rest_is_left():
    window = Window("rows", 0, 4, 6, 2)
    fused, whole = drawn(6, 5), drawn(6, 5)
    apply([Step([fused, whole], [window], rd.LowRank(1.0, unit="head"), 0.3, 0)], "auto")
    for new in (fused, whole):
        assert torch.equal(new[4:], drawn(6, 5)[4:])
        for head in range(2):
            old = drawn(6, 5)[2 * head : 2 * head + 2]
            tau = 0.3 * float(old.norm()) / 2**0.5
            torch.testing.assert_close(new[2 * head : 2 * head + 2], shrink(old, tau), rtol=0, atol=1e-6)


def test_a_parameter_without_heads_is_one_matrix_also_by_head():
    by_head, by_matrix = drawn(6, 5), drawn(6, 5)
    apply([Step([by_head], [WHOLE], rd.LowRank(1.0, unit="head"), 0.3, 0)], "auto")
    apply([Step([by_matrix], [WHOLE], rd.LowRank(1.0), 0.3, 0)], "auto")
    assert torch.equal(by_head, by_matrix)


def test_l2_takes_a_share_of_vectors_and_scalars_too():
    weights = [torch.tensor(2.0), torch.ones(3), drawn(2, 3, 4)]
    before = [weight.clone() for weight in weights]
    apply([Step(weights, [WHOLE], rd.Frobenius(1.0), 0.25, 0)], "auto")
    for new, old in zip(weights, before, strict=True):
        assert torch.equal(new, old - 0.25 * old)


# ---- stacks --------------------------------------------------------------------------------------------------------


def test_matrices_of_one_shape_are_one_call_within_the_bound_on_memory(monkeypatch):
    weights = [drawn(4, 3, seed=seed) for seed in range(5)] + [drawn(3, 4)]
    with record_backends() as ran:
        apply([Step([weight.clone() for weight in weights], [WHOLE], rd.LowRank(1.0), 0.1, 0)], "exact")
    assert ran == ["exact"] * 2
    together = [weight.clone() for weight in weights]
    apply([Step(together, [WHOLE], rd.LowRank(1.0), 0.1, 0)], "exact")
    monkeypatch.setitem(module._STACKED, "cpu", 24)
    with record_backends() as ran:
        apply([Step(weights, [WHOLE], rd.LowRank(1.0), 0.1, 0)], "exact")
    assert ran == ["exact"] * 4  # 2 + 2 + 1, and the one of another shape
    for one, other in zip(together, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("backend", "ran"), [("auto", "exact"), ("exact", "exact"), ("matmul", "matmul")])
def test_a_cpu_decomposes_unless_it_is_asked_for_products(backend, ran):
    with record_backends() as seen:
        apply([Step([drawn(4, 3)], [WHOLE], rd.LowRank(1.0), 0.1, 0)], backend)
    assert seen == [ran]


# ---- 16 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["prox", "smooth"])
def test_a_decay_below_the_last_digit_still_happens_on_average(dtype, rule):
    """τ = 1e-4 of the weight's size per step, 200 steps: to nearest, not one entry of a bfloat16 weight would move."""
    torch.manual_seed(0)
    attention = nn.ModuleDict(
        {name: nn.Linear(64, 64, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    )
    attention.num_heads = 4
    attention.to(dtype)
    reference = attention["q_proj"].weight.detach().double()
    rate, steps = 1e-4, 200
    decay = rd.LowRank(rate, rule=rule, scale="absolute", lr_coupled=False)
    optimizer = torch.optim.SGD(rd.param_groups(attention, rd.Frobenius(0.0), query_key=decay), lr=0.0)
    rd.attach(optimizer)
    zero_gradients(attention)
    state = torch.random.get_rng_state()
    for _ in range(steps):
        optimizer.step()
    assert torch.equal(torch.random.get_rng_state(), state)
    u, s, vh = torch.linalg.svd(reference)
    along = (u.T @ attention["q_proj"].weight.detach().double() @ vh.T).diag()
    lost = (s - along)[s > 0.2]  # directions far above the noise of rounding
    assert lost.mean().item() == pytest.approx(rate * steps, rel=0.05)


def test_replicas_round_alike():
    models = [make_model(torch.bfloat16) for _ in range(2)]
    for model in models:
        optimizer = torch.optim.SGD(groups_of(model), lr=LR)
        rd.attach(optimizer)
        torch.manual_seed(len(str(id(model))))
        for _ in range(3):
            torch.rand(7)
            zero_gradients(model)
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_another_seed_rounds_otherwise():
    weights = [drawn(64, 64, dtype=torch.bfloat16) for _ in range(3)]
    for weight, seed in zip(weights, (1, 1, 2), strict=True):
        apply([Step([weight], [WHOLE], rd.LowRank(1.0), 1e-3, seed)], "auto")
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
