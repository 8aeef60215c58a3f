"""Laws of the norm, spared singular values and warm-ups, as the hook applies them, against formulas in float64."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.decay.targets import STATE_KEY
from tests.decay.models import make_model, query_key, train, zero_gradients

LR = 0.1


def stepped(
    model: nn.Module, by: str, decay: rd.LowRank | rd.Frobenius, steps: int = 1, lr: float = LR
) -> tuple[torch.optim.Optimizer, rd.Attachment]:
    """The model after steps of SGD without any gradient."""
    if by == "groups":
        optimizer = torch.optim.SGD(rd.param_groups(model, query_key=decay), lr=lr)
        attachment = rd.attach(optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        attachment = rd.attach(optimizer, model, query_key=decay)
    for _ in range(steps):
        zero_gradients(model)
        optimizer.step()
    return optimizer, attachment


def norm_left(norm: float, decay: rd.Frobenius, steps: int = 1) -> float:
    for step in range(1, steps + 1):
        ramp = min(1.0, step / decay.warmup) if decay.warmup else 1.0
        share = LR * decay.strength * ramp * norm ** (decay.power - 1) if norm else 0.0
        norm *= 1 - min(share, decay.cap or 1.0)
    return norm


@pytest.mark.parametrize("by", ["groups", "roles"])
@pytest.mark.parametrize(
    "decay",
    [
        rd.Frobenius(0.5, power=0),
        rd.Frobenius(0.5, power=2),
        rd.Frobenius(0.5, power=0.5),
        rd.Frobenius(5.0, power=0, cap=0.1),
        rd.Frobenius(1e300, power=0, cap=0.25),
        rd.Frobenius(0.5, warmup=4),
        rd.Frobenius(0.5, power=0, warmup=4),
        rd.Frobenius(3.0, cap=0.2),
    ],
)
def test_the_norm_of_every_matrix_follows_its_law_and_nothing_else_changes(by, decay):
    model = make_model()
    before = query_key(model)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "q_proj" not in n and "k_proj" not in n}
    stepped(model, by, decay, steps=3)
    for old, new in zip(before, query_key(model), strict=True):
        expected = old * (norm_left(float(old.norm()), decay, steps=3) / float(old.norm()))
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-7)
    for name, value in model.named_parameters():
        if name in others and "query_key_value" not in name:
            assert torch.equal(value, others[name]), name


def test_each_head_has_a_norm_of_its_own():
    model = make_model()
    before = query_key(model)
    stepped(model, "roles", rd.Frobenius(0.5, power=0, unit="head"))
    layer = rd.find_attention(model)[0]
    heads = layer.query.window.heads(before[0])
    expected = torch.stack([head * (1 - min(1.0, LR * 0.5 / float(head.norm()))) for head in heads])
    torch.testing.assert_close(layer.query.heads().double(), expected, rtol=1e-5, atol=1e-7)


def test_a_zero_matrix_stays_zero_under_every_decay():
    for decay in (rd.Frobenius(1.0, power=0), rd.Frobenius(1.0, power=2), rd.LowRank(1.0, preserve_norm=True)):
        model = make_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        stepped(model, "roles", decay)
        assert not any(matrix.any() for matrix in query_key(model))


def test_l2_with_power_one_is_the_optimizers_and_with_a_cap_or_a_warm_up_it_is_ours():
    for decay, by in [(rd.Frobenius(0.1), "AdamW"), (rd.Frobenius(0.1, cap=0.5), "rankdecay"),
                      (rd.Frobenius(0.1, warmup=3), "rankdecay")]:  # fmt: skip
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        rows = rd.attach(optimizer, model, value_output=decay).rows()
        assert {row.by for row in rows if row.role == "value_output" and "o_proj" in row.name} == {by}


# ---- low rank ------------------------------------------------------------------------------------------------------


def left(matrix: Tensor, decay: rd.LowRank, ramp: float = 1.0) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    tau = LR * decay.strength * ramp * sigma.norm() / len(sigma) ** 0.5
    eps = max(tau, decay.smoothing * sigma.norm())
    after = (sigma - tau).clamp_min(0) if decay.rule == "prox" else sigma - tau * sigma / torch.hypot(sigma, eps)
    after = torch.where(torch.arange(len(sigma)) < decay.keep, sigma, after)
    if decay.preserve_norm:
        after = after * (sigma.norm() / after.norm())
    return (U * after @ Vh).to(matrix.dtype)


@pytest.mark.parametrize("by", ["groups", "roles"])
@pytest.mark.parametrize(
    "decay",
    [
        rd.LowRank(4.0, keep=3),
        rd.LowRank(4.0, rule="smooth", smoothing=0.1, keep=3),
        rd.LowRank(4.0, preserve_norm=True),
        rd.LowRank(2.0, keep=2, preserve_norm=True),
        rd.LowRank(8.0, warmup=4),
    ],
)
def test_the_largest_are_spared_the_norm_is_held_and_the_strength_rises(by, decay):
    model = make_model()
    before = query_key(model)
    stepped(model, by, decay)
    for old, new in zip(before, query_key(model), strict=True):
        torch.testing.assert_close(new, left(old, decay, 0.25 if decay.warmup else 1.0), rtol=0, atol=2e-6)


def test_equal_singular_values_are_spared_the_same_at_every_step():
    weight = nn.Parameter(torch.eye(6))
    model = nn.ModuleDict({"q": nn.Linear(6, 6, bias=False), "k": nn.Linear(6, 6, bias=False)})
    model["q"].weight = weight
    names = rd.AttentionNames(query="q", key="k", value="k", num_heads=1)
    optimizer = torch.optim.SGD(rd.param_groups(model, query_key=rd.LowRank(1.0, keep=2), names=names), lr=0.05)
    rd.attach(optimizer)
    for _ in range(12):
        zero_gradients(model)
        optimizer.step()
    sigma = torch.linalg.svdvals(weight.detach())
    torch.testing.assert_close(sigma[:2], torch.ones(2), rtol=0, atol=1e-5)
    assert float(sigma[2]) < 0.6


# ---- an interval by shape ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["groups", "roles"])
def test_large_matrices_are_decayed_more_rarely_and_the_table_says_so(by):
    model = nn.ModuleDict({n: nn.Linear(100, 100, bias=False) for n in "qkvo"})
    names = rd.AttentionNames(query="q", key="k", value="v", output="o", num_heads=4)
    roles = {"query_key": rd.LowRank(4.0), "value_output": rd.LowRank(4.0, unit="head")}
    if by == "groups":
        optimizer = torch.optim.SGD(rd.param_groups(model, names=names, **roles), lr=LR)
        attachment = rd.attach(optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attachment = rd.attach(optimizer, model, names=names, **roles)
    described = {row.role: row.decay for row in attachment.rows()}
    assert described["query_key"].endswith("every 3 steps by shape")  # ⌈100 / 48⌉
    assert "every" not in described["value_output"]  # heads of 25
    changed = []
    for _ in range(6):
        before = model["q"].weight.detach().clone()
        zero_gradients(model)
        optimizer.step()
        changed.append(not torch.equal(before, model["q"].weight))
    assert changed == [False, False, True] * 2


def test_intervals_are_a_function_of_the_smaller_side():
    assert [rd.LowRank(1.0).interval(side) for side in (1, 48, 49, 128, 768, 10_000)] == [1, 1, 2, 3, 16, 16]
    assert rd.LowRank(1.0, every=5).interval(4096) == 5


# ---- warm-ups over saves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["groups", "roles"])
@pytest.mark.parametrize("decay", [rd.LowRank(2.0, warmup=7, every=2), rd.Frobenius(0.5, power=0, warmup=7)])
def test_a_warm_up_and_a_cycle_go_on_after_saving_pausing_and_the_same_decay_again(by, decay):
    def build() -> tuple[nn.Module, torch.optim.Optimizer, rd.Attachment]:
        model = make_model()
        if by == "groups":
            optimizer = torch.optim.AdamW(rd.param_groups(model, query_key=decay), lr=LR)
            return model, optimizer, rd.attach(optimizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        return model, optimizer, rd.attach(optimizer, model, query_key=decay)

    whole, optimizer, _ = build()
    train(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(3, 9))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, other, attachment = build()
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    attachment.set(query_key=decay)  # which changes nothing
    train(resumed, other, range(3, 9))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    if by == "roles":
        counts = [each[STATE_KEY] for each in state["optimizer"]["state"].values() if STATE_KEY in each]
        assert [count["query_key_warmed"] for count in counts] == [3] * 5


@pytest.mark.parametrize("by", ["groups", "roles"])
def test_another_decay_warms_up_from_its_first_step_and_a_pause_does_not_count(by):
    model = make_model()
    optimizer, attachment = stepped(model, by, rd.Frobenius(0.5, power=0), steps=5)
    attachment.set(query_key=rd.Frobenius(0.5, power=0, warmup=10))
    attachment.pause()
    zero_gradients(model)
    optimizer.step()
    attachment.resume()
    before = query_key(model)
    zero_gradients(model)
    optimizer.step()
    for old, new in zip(before, query_key(model), strict=True):
        assert float(old.norm() - new.norm()) == pytest.approx(LR * 0.5 / 10, rel=1e-3)


def test_a_state_of_before_there_were_warm_ups_loads():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rd.attach(optimizer, model, query_key=rd.LowRank(1.0, every=4, warmup=3))
    zero_gradients(model)
    optimizer.step()
    state = optimizer.state_dict()
    for each in state["state"].values():
        each.get(STATE_KEY, {}).pop("query_key_warmed", None)
    optimizer.load_state_dict(state)
    zero_gradients(model)
    optimizer.step()
    counts = next(each[STATE_KEY] for each in optimizer.state.values() if STATE_KEY in each)
    assert (counts["query_key_steps"], counts["query_key_warmed"]) == (2, 1)


# ---- 16 bits, extremes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [rd.Frobenius(0.02, power=0), rd.Frobenius(0.001, power=2)])
def test_16_bit_weights_are_decayed_on_average(decay):
    model = make_model(torch.bfloat16)
    before = [matrix.double() for matrix in query_key(model)]
    stepped(model, "roles", decay, steps=40)
    for old, new in zip(before, query_key(model), strict=True):
        expected = norm_left(float(old.norm()), decay, steps=40) / float(old.norm())
        along = float((new.double() * old).sum() / old.square().sum())
        assert along == pytest.approx(expected, abs=0.15 * (1 - expected) + 2e-3)
        assert expected < 0.999


@pytest.mark.filterwarnings("ignore:.* at 1 or more a weight vanishes")
@pytest.mark.parametrize("strength", [1e38, 1e300, 1.7e308])
@pytest.mark.parametrize("lr", [1e-3, 1e10])
@pytest.mark.parametrize("decay", [rd.LowRank, rd.Frobenius])
def test_no_strength_makes_a_nan(decay, strength, lr):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype)
        stepped(model, "roles", decay(strength), steps=2, lr=lr)
        if decay is rd.LowRank:
            assert not any(matrix.any() for matrix in query_key(model))


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e37])
def test_the_relative_scale_is_the_same_at_every_size_of_weights(size):
    weights = []
    for factor in (1.0, 2.0 ** round(math.log2(size))):
        model = make_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        stepped(model, "roles", rd.LowRank(2.0))
        weights.append([matrix / factor for matrix in query_key(model)])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rd.Frobenius(0.1, power=-1), "power=-1 must be a finite number >= 0"),
        (lambda: rd.Frobenius(0.1, cap=0.0), r"cap=0.0 must be a finite number > 0 and <= 1"),
        (lambda: rd.Frobenius(0.1, cap=1.5), r"cap=1.5 must be a finite number > 0 and <= 1"),
        (lambda: rd.Frobenius(0.1, warmup=-1), "warmup=-1 must be a whole number >= 0"),
        (lambda: rd.LowRank(0.1, warmup=2.5), "warmup=2.5 must be a whole number"),
        (lambda: rd.LowRank(0.1, keep=-1), "keep=-1 must be a whole number >= 0"),
        (lambda: rd.LowRank(0.1, rule="polar", keep=2), "rule='polar'; use rule='prox'"),
        (lambda: rd.LowRank(0.1, every=0), "every=0 must be a whole number >= 1; .*None"),
        (lambda: rd.param_groups(make_model(), query_key=rd.LowRank(0.1, keep=12)), "keep=12 .*spares every"),
        (lambda: rd.param_groups(make_model(), other=rd.Frobenius(0.1, power=0, unit="head")), "which has no heads"),
    ],
)
def test_what_makes_no_sense_is_one_clear_message(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_old_order_of_arguments_is_refused_by_name():
    with pytest.raises(TypeError, match="lr_coupled is a keyword, lr_coupled=False"):
        rd.Frobenius(0.1, False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("decay", [rd.LowRank(0.1), rd.Frobenius(0.1, power=0)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_spoils_itself_alone_and_is_named_once(decay, value):
    model = make_model()
    healthy = make_model()
    bad = model.layers[1]["attention"].k_proj.weight
    with torch.no_grad():
        bad[2, 3] = value
    stepped(healthy, "roles", decay, steps=2)
    with pytest.warns(UserWarning, match="1.attention.k_proj.weight has entries that are not finite") as caught:
        stepped(model, "roles", decay, steps=2)
    assert len(caught) == 1
    for new, expected in zip(query_key(model), query_key(healthy), strict=True):
        if new.shape == bad.shape and new.isnan().any():
            assert new.isnan().all()
        else:
            assert torch.equal(new, expected)
    assert sum(bool(matrix.isnan().any()) for matrix in query_key(model)) == 1


@pytest.mark.parametrize(
    "decay", [rd.LowRank(1e308), rd.LowRank(1e39, warmup=3), rd.Frobenius(1e308, power=0), rd.Frobenius(1e308, cap=0.5)]
)
def test_a_strength_beyond_float32_and_a_learning_rate_that_is_a_tensor_make_no_nan(decay):
    model = make_model()
    before = [matrix.clone() for matrix in query_key(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.0))
    rd.attach(optimizer, model, query_key=decay)
    for lr in (0.0, 1e-30):
        optimizer.param_groups[0]["lr"].fill_(lr)
        zero_gradients(model)
        optimizer.step()
        after = query_key(model)
        assert all(matrix.isfinite().all() for matrix in after)
        assert lr or all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.filterwarnings("ignore:.* at 1 or more a weight vanishes")
@pytest.mark.parametrize("decay", [rd.LowRank(3.0, preserve_norm=True), rd.LowRank(1e3, rule="polar")])
def test_an_entry_that_grows_stays_in_the_range_of_float16(decay):
    model = nn.Module()
    model.weight = nn.Parameter(torch.diag(torch.tensor([60000.0, 30000.0, 10.0, 5.0])).half())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rd.attach(optimizer, model, other=decay)
    for _ in range(5):
        zero_gradients(model)
        optimizer.step()
        assert model.weight.isfinite().all()


@pytest.mark.parametrize("by", ["groups", "roles"])
def test_another_decay_warms_up_anew_after_steps_of_a_longer_warm_up(by):
    model = make_model()
    optimizer, attachment = stepped(model, by, rd.Frobenius(0.1, power=0, warmup=10), steps=5)
    before = [float(matrix.norm()) for matrix in query_key(model)]
    attachment.set(query_key=rd.Frobenius(0.2, power=0, warmup=4))
    zero_gradients(model)
    optimizer.step()
    for matrix, norm in zip(query_key(model), before, strict=True):
        assert norm - float(matrix.norm()) == pytest.approx(LR * 0.2 / 4, rel=1e-3)


@pytest.mark.parametrize(
    "decay",
    [rd.LowRank(20.0), rd.LowRank(20.0, "polar"), rd.Frobenius(20.0), rd.LowRank(1.0, lr_coupled=False)],
    ids=str,
)
def test_a_step_that_takes_all_is_warned_of_once(decay):
    """Also where the rate rises to it later; not where the strength is in the units of the singular values."""
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(rd.param_groups(layer, other=decay, exclude="bias"), lr=0.01)
    rd.attach(optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    if decay.lr_coupled:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match=r"other: .*strength.* is [12], and at 1 or more a weight vanishes"):
        optimizer.step()
    optimizer.step()


def test_l2_that_the_optimizer_applies_is_warned_of_too():
    """AdamW turns the sign of a weight round there; not while it is paused."""
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    attachment = rd.attach(optimizer, layer, other=rd.Frobenius(20.0))
    attachment.pause()
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    attachment.resume()
    with pytest.warns(UserWarning, match=r"other: lr · strength is 2, and at 1 or more a weight vanishes"):
        optimizer.step()


def test_l2_of_a_group_that_the_optimizer_applies_is_warned_of_too():
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(rd.param_groups(layer, other=rd.Frobenius(20.0), exclude="bias"), lr=0.1)
    rd.attach(optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"other: lr · strength is 2, and at 1 or more a weight vanishes"):
        optimizer.step()


def test_an_absolute_strength_of_any_size_is_no_reason_to_warn():
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(
        rd.param_groups(layer, other=rd.LowRank(20.0, scale="absolute"), exclude="bias"), lr=0.1
    )
    rd.attach(optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
