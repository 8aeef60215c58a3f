"""Decays given to ``attach`` by role: exactly those, and groups that stay as they were found."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay.targets import STATE_KEY
from tests import needs
from tests.decay.models import STRENGTH, backward, make_model, query_key, train, zero_gradients

LR = 0.1
PAIR = ("q_proj", "k_proj")
MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.3, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=LR, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=LR, weight_decay=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, weight_decay=0.3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.3),
    "lion": lambda p: torch.optim.Rprop(p, lr=LR),
}


def _same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", MAKERS)
def test_the_rest_of_the_model_is_trained_as_if_nothing_were_attached(kind: str) -> None:
    """Of every optimizer, with its own L2; and the named role has its decay and no L2."""
    plain, decayed = make_model(), make_model()
    optimizers = [MAKERS[kind](model.parameters()) for model in (plain, decayed)]
    rd.attach(optimizers[1], decayed, query_key=rd.LowRank(STRENGTH), exclude="layers.2")  # which is fused
    for model in (plain, decayed):
        zero_gradients(model)
    before = query_key(decayed)
    optimizers[1].step()
    for old, new in zip(before[:4], query_key(decayed)[:4], strict=True):
        s = torch.linalg.svdvals(old)
        tau = LR * STRENGTH * old.norm() / min(old.shape) ** 0.5
        torch.testing.assert_close(torch.linalg.svdvals(new), (s - tau).clamp_min(0), atol=1e-5, rtol=0)
    optimizers[0].step()
    for (name, a), b in zip(plain.named_parameters(), decayed.parameters(), strict=True):
        if "q_proj.weight" not in name and "k_proj.weight" not in name:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("paused", [False, True])
def test_a_fused_parameter_keeps_the_optimizers_l2_of_its_values_alone(paused: bool) -> None:
    """Also while the decay of the rest is paused."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH if paused else 0.0))
    if paused:
        attachment.pause()
    fused = model.layers[2]["attention"].query_key_value.weight
    before = fused.detach().clone().unflatten(0, (2, 12))
    zero_gradients(model)
    optimizer.step()
    after = fused.detach().unflatten(0, (2, 12))
    assert torch.equal(after[:, :9], before[:, :9])
    torch.testing.assert_close(after[:, 9:], before[:, 9:] * (1 - LR * 0.3))


def test_l2_through_the_gradient_of_a_part_of_a_parameter_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.3)
    with pytest.raises(ValueError, match=r"query_key_value.weight in group 0 .* name value_output as well"):
        rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.0))
    assert attachment.active
    attachment.detach()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    optimizer.param_groups[0]["weight_decay"] = 0.3  # as a schedule raises it
    zero_gradients(model)
    with pytest.raises(ValueError, match=r"weight_decay=0.3 goes through the gradient of SGD"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_attaching_train_alike(kind: str, dtype: torch.dtype) -> None:
    roles = {"query_key": rd.LowRank(STRENGTH, every=2), "value_output": rd.Frobenius(0.2), "mlp": rd.Frobenius(0.0)}
    roles = {role: decay for role, decay in roles.items() if role != "mlp"}
    rest = {"norm": rd.Frobenius(0.0), "bias": rd.Frobenius(0.0)}
    makers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    by_groups, by_roles = make_model(dtype), make_model(dtype)
    groups = rd.param_groups(by_groups, rd.Frobenius(0.4), **roles)
    first = makers[kind](groups, lr=1e-2)
    rd.attach(first)
    second = makers[kind](by_roles.parameters(), lr=1e-2)
    rd.attach(second, by_roles, rd.Frobenius(0.4), **roles, **rest)
    train(by_groups, first, range(5))
    train(by_roles, second, range(5))
    for a, b in zip(by_groups.parameters(), by_roles.parameters(), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        else:
            assert (a - b).float().norm() < 0.05 * a.float().norm()


def test_groups_stay_as_they_were_found() -> None:
    model = make_model()
    by_size = sorted(model.parameters(), key=lambda p: p.numel())
    groups = [
        {"params": by_size[:5], "lr": 0.01, "mine": "kept"},
        {"params": by_size[5:], "weight_decay": 0.2, "layer": 3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    found = [dict(group) for group in optimizer.param_groups]
    objects = list(optimizer.param_groups)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.3))
    train(model, optimizer, range(3))
    attachment.describe()
    attachment.detach()
    for group, before, same in zip(optimizer.param_groups, found, objects, strict=True):
        assert group is same
        assert list(group) == list(before)
        assert all(group[key] is before[key] or group[key] == before[key] for key in before if key != "params")
        assert [id(p) for p in group["params"]] == [id(p) for p in before["params"]]


def test_a_step_that_raises_leaves_the_groups_whole_for_whatever_comes_next() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1))

    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    assert len(optimizer.state_dict()["param_groups"]) == 1
    train(model, optimizer, range(2))
    assert len(optimizer.param_groups) == 1


class _Fails(torch.optim.AdamW):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_what_is_done_to_the_groups_after_a_step_that_raised_stays() -> None:
    """No hook runs when a step raises, so the groups are put back together at the next one."""
    model = make_model()
    optimizer = _Fails(model.parameters(), lr=LR, weight_decay=0.1)
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1), exclude="layers.2")  # which is fused
    zero_gradients(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    new = nn.Linear(4, 4)
    optimizer.add_param_group({"params": new.parameters()})
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.fails = False
    others = [p for name, p in model.named_parameters() if "q_proj" not in name and "k_proj" not in name]
    before = [p.detach().clone() for p in others if p.ndim == 1]
    optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert all(p is q for p, q in zip(optimizer.param_groups[1]["params"], new.parameters(), strict=True))
    assert all(torch.equal(p, old) for p, old in zip((p for p in others if p.ndim == 1), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", ["adamw", "sgd", "momentum"])
@pytest.mark.parametrize("first", ["attach", "load"])
def test_resuming_in_mid_cycle_changes_nothing(dtype: torch.dtype, maker: str, first: str) -> None:
    def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=4), value_output=rd.Frobenius(0.1))

    whole = make_model(dtype)
    optimizer = MAKERS[maker](whole.parameters())
    attach(whole, optimizer)
    train(whole, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(6, 12))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = make_model(dtype)
    resumed.load_state_dict(state["model"])
    other = MAKERS[maker](resumed.parameters())
    if first == "attach":
        attach(resumed, other)
    other.load_state_dict(state["optimizer"])
    if first == "load":
        attach(resumed, other)
    train(resumed, other, range(6, 12))
    _same(whole, resumed)


def test_the_state_has_one_key_of_ours_and_only_where_a_resumed_run_needs_it() -> None:
    for every, kept in ((1, False), (3, True)):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        rd.attach(optimizer, model, query_key=rd.LowRank(0.1, every=every))
        train(model, optimizer, range(2))
        ours = {name for name, p in model.named_parameters() if STATE_KEY in optimizer.state[p]}
        assert bool(ours) == kept
        assert all("q_proj.weight" in n or "k_proj.weight" in n or "query_key_value.weight" in n for n in ours)
        for state in optimizer.state.values():
            assert all(type(value) in (int, float) for value in state.get(STATE_KEY, {}).values())
            assert set(state) <= {"step", "exp_avg", "exp_avg_sq", STATE_KEY}


def test_a_run_without_decay_continues_with_it_and_the_other_way_round() -> None:
    with_decay, without = make_model(), make_model()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=LR) for model in (with_decay, without)]
    rd.attach(optimizers[0], with_decay, query_key=rd.LowRank(STRENGTH, every=3))
    for model, optimizer in zip((with_decay, without), optimizers, strict=True):
        train(model, optimizer, range(4))
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    for state, attached in ((saved[1], True), (saved[0], False)):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=3)) if attached else None
        optimizer.load_state_dict(state)
        train(model, optimizer, range(4, 7))
        if attachment is not None:
            assert {value for name, value in attachment.state_dict().items() if name.endswith("steps")} == {3}


def test_the_attachments_own_state_can_hold_the_counts() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=4), counts="attachment")
    train(model, optimizer, range(6))
    assert not any(STATE_KEY in state for state in optimizer.state.values())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attachment.state_dict()))
    train(model, optimizer, range(6, 10))
    resumed = make_model()
    resumed.load_state_dict(saved[0])
    other = torch.optim.AdamW(resumed.parameters(), lr=LR)
    again = rd.attach(other, resumed, query_key=rd.LowRank(STRENGTH, every=4), counts="attachment")
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    train(resumed, other, range(6, 10))
    _same(model, resumed)


@pytest.mark.parametrize("by", ["groups", "roles"])
def test_a_decay_is_changed_paused_and_resumed_in_mid_run(by: str) -> None:
    model = make_model()
    roles = {"query_key": rd.LowRank(STRENGTH), "value_output": rd.Frobenius(0.1)}
    if by == "groups":
        optimizer = torch.optim.SGD(rd.param_groups(model, rd.Frobenius(0.0), **roles), lr=LR)
        attachment = rd.attach(optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attachment = rd.attach(optimizer, model, **roles)

    def factor() -> float:
        before = query_key(model)[0]
        zero_gradients(model)
        optimizer.step()
        return float(query_key(model)[0].norm() / before.norm())

    assert factor() < 0.99
    attachment.pause()
    assert factor() == 1
    assert "paused on SGD: what follows is not applied" in attachment.describe()
    attachment.resume()
    attachment.set(query_key=rd.Frobenius(0.5))
    assert factor() == pytest.approx(1 - LR * 0.5, rel=1e-5)
    assert "L2 0.5" in attachment.describe()
    attachment.set(query_key=rd.LowRank(0.0))
    assert factor() == 1
    attachment.set(query_key=rd.LowRank(STRENGTH))
    assert factor() < 0.99
    with pytest.raises(TypeError, match=r"text is read by \*\*rankdecay.decays\(mlp='LowRank:0.1'\)"):
        rd.param_groups(model, mlp="LowRank:0.1")
    with pytest.raises(TypeError, match=r"query_key=0\.1 is not a decay"):
        attachment.set(query_key=0.1)
    with pytest.raises(ValueError, match="mlp has no parameter"):
        attachment.set(mlp=rd.LowRank(1.0))


def test_a_group_keeps_its_number_while_the_optimizer_steps() -> None:
    """Dion's optimizers keep a learning rate for each number."""
    model = make_model()
    layers, *others = [list(part.parameters()) for part in (model.layers, model.norm, model.head)]
    groups = [{"params": params, "lr": LR * number} for number, params in enumerate([layers, *others], start=1)]
    seen: list[list[float]] = []

    class Seen(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    optimizer = Seen(groups, weight_decay=0.3)
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.0))
    rates = [group["lr"] for group in optimizer.param_groups]
    train(model, optimizer, range(1))
    assert seen[0][:3] == rates
    assert set(seen[0][3:]) == {LR}  # what has a decay of its own, as further groups


def test_an_amount_that_waits_when_cycles_are_given_up_is_applied_once() -> None:
    runs = [make_model(), make_model()]
    for model, every in zip(runs, (3, 1), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1, every=every, scale="absolute"))
        zero_gradients(model)
        optimizer.step()
        attachment.set(query_key=rd.LowRank(0.1, scale="absolute"))
        for _ in range(3):
            optimizer.step()
    for one, other in zip(*(query_key(model) for model in runs), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_excluded_is_left_to_the_optimizer() -> None:
    for exclude in ("layers.0.attention", "layers.0.*", ["layers.0.attention.q_proj.weight", "*0*k_proj.weight"]):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
        attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH), exclude=exclude)
        before = model.layers[0]["attention"].q_proj.weight.detach().clone()
        zero_gradients(model)
        optimizer.step()
        torch.testing.assert_close(model.layers[0]["attention"].q_proj.weight, before * (1 - LR * 0.3))
        rows = {row.name: row for row in attachment.rows()}
        assert "excluded" in rows["layers.0.attention.q_proj.weight"].why
    with pytest.raises(ValueError, match=r"exclude='layers.0.attn' matches no parameter: did you mean"):
        rd.attach(torch.optim.AdamW(model.parameters()), model, query_key=rd.LowRank(0.1), exclude="layers.0.attn")


@needs.muon
def test_two_optimizers_that_share_out_a_role() -> None:
    model = make_model()
    attention = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not a for a in attention)]
    muon, adamw = torch.optim.Muon(attention[:3], lr=LR), torch.optim.AdamW(attention[3:] + others, lr=LR)
    first = rd.attach(muon, model, query_key=rd.LowRank(STRENGTH))
    second = rd.attach(adamw, model, query_key=rd.LowRank(STRENGTH))
    assert "of its parameters are not in this optimizer (layers.1.attention.q_proj.weight" in first.describe()
    assert "of its parameters are not in this optimizer (layers.0.attention.q_proj.weight" in second.describe()
    before = query_key(model)
    zero_gradients(model)
    muon.step()
    adamw.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))


def test_a_group_added_later_is_decayed_too_and_one_of_another_module_is_not() -> None:
    model, head = make_model(), nn.Linear(9, 3)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights[:4], lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH))
    optimizer.add_param_group({"params": weights[4:], "lr": 0.05})
    optimizer.add_param_group({"params": list(head.parameters())})
    before = query_key(model)
    for module in (model, head):
        zero_gradients(module)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))
    assert "not a parameter of Model" in attachment.describe()


def test_what_cannot_be_attached_says_what_to_do() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match=r"needs the model: rankdecay.attach\(optimizer, model"):
        rd.attach(optimizer, query_key=rd.LowRank(0.1))
    with pytest.raises(TypeError, match=r"backend is a keyword, backend='exact'"):
        rd.attach(optimizer, "exact")
    with pytest.raises(ValueError, match="no role is named"):
        rd.attach(optimizer, model)
    with pytest.raises(ValueError, match=r"has no parameter of Model, but \d+ of the same shapes.*Build the optimizer"):
        rd.attach(optimizer, make_model(), query_key=rd.LowRank(0.1))
    with pytest.raises(ValueError, match=r"has no parameter of Linear; give the model"):
        rd.attach(optimizer, nn.Linear(3, 77), other=rd.Frobenius(0.1))
    head = torch.optim.AdamW(model.head.parameters(), lr=LR)
    with pytest.raises(ValueError, match=r"query_key=.* names no parameter of this AdamW: .*q_proj.weight and 4 more"):
        rd.attach(head, model, query_key=rd.LowRank(0.1))
    groups = torch.optim.AdamW(rd.param_groups(model, query_key=rd.LowRank(0.1)), lr=LR)
    with pytest.raises(ValueError, match=r"say their decays already, of query_key too; give all of them there"):
        rd.attach(groups, model, query_key=rd.LowRank(0.1))
    first = rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    with pytest.raises(ValueError, match=r"would be decayed twice: an attached AdamW"):
        rd.attach(torch.optim.SGD(model.parameters(), lr=LR), model, query_key=rd.LowRank(0.1))
    first.detach()


def test_per_step_l2_is_not_multiplied_by_the_learning_rate() -> None:
    for by in ("groups", "roles"):
        model = make_model()
        decay = rd.Frobenius(0.25, lr_coupled=False)
        if by == "groups":
            optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.0), query_key=decay), lr=1e-9)
            rd.attach(optimizer)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.3)
            rd.attach(optimizer, model, query_key=decay)
        before = query_key(model)
        zero_gradients(model)
        optimizer.step()
        for old, new in zip(before, query_key(model), strict=True):
            torch.testing.assert_close(new, old * 0.75, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Adam", "NAdam", "RAdam"])
def test_an_l2_of_the_strength_of_the_groups_own_is_decoupled_too(kind: str) -> None:
    model = make_model()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=LR, weight_decay=0.5)
    rd.attach(optimizer, model, embedding=rd.Frobenius(0.5))
    before = model.embedding.weight.detach().clone()
    for _ in range(3):  # in the first step of RAdam there is no difference
        zero_gradients(model)
        optimizer.step()
    torch.testing.assert_close(model.embedding.weight, before * (1 - LR * 0.5) ** 3)
    assert not optimizer.param_groups[0].get("decoupled_weight_decay", False), "as it was"


def test_a_rate_may_be_a_tensor_of_one_element() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor([LR]), fused=True)  # the others from torch 2.7 on
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.5, power=0))
    before = model.layers[0].attention.v_proj.weight.detach().clone()
    zero_gradients(model)
    optimizer.step()
    left = 1 - LR * 0.5 / before.norm()
    torch.testing.assert_close(model.layers[0].attention.v_proj.weight, before * left)


def test_a_gradient_that_is_kept_and_equals_the_weights_is_no_weight_of_the_optimizers() -> None:
    model = make_model()
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)  # so that the weights hardly move
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()  # of the loss ‖W‖² / 2
    optimizer.step()


def test_a_step_that_is_to_be_differentiated_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, differentiable=True)
    with pytest.raises(ValueError, match="SGD is built with differentiable=True"):
        rd.attach(optimizer, model, query_key=rd.LowRank(0.1))


def test_an_l2_that_is_set_is_at_once_said_to_be_by_whom_it_is() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(rd.param_groups(model, embedding=rd.LowRank(0.1)), lr=LR)
    attachment = rd.attach(optimizer)
    attachment.set(embedding=rd.Frobenius(0.2))
    [row] = [row for row in attachment.rows() if row.name == "embedding.weight"]
    assert (row.decay, row.by) == ("L2 0.2", "rankdecay")


@pytest.mark.parametrize("cast", ["before", "after"])
def test_l2_of_16_bit_weights_happens(cast: str) -> None:
    """AdamW's own is below their last digit at every step, and lost."""
    lost = {}
    for by in ("own", "groups", "roles"):
        model = make_model(torch.bfloat16 if cast == "before" else torch.float32)
        torch.manual_seed(0)
        if by == "own":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
        elif by == "groups":
            optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.5)), lr=1e-3)
            rd.attach(optimizer)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
            rd.attach(optimizer, model, rd.Frobenius(0.5))
        model.bfloat16()
        weight = model.embedding.weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape).abs() + 0.5)
        before = weight.detach().double().sum()
        zero_gradients(model)
        for _ in range(200):
            optimizer.step()
        lost[by] = float(1 - weight.detach().double().sum() / before)
    expected = 1 - (1 - 5e-4) ** 200
    assert lost["own"] < 0.01
    assert lost["groups"] == pytest.approx(expected, rel=0.1)
    assert lost["roles"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("maker", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize("by", ["groups", "roles"])
@pytest.mark.parametrize("cast", ["before attach", "after attach", "in mid-run"])
def test_l2_of_a_model_cast_to_16_bits_later_happens(maker: type, by: str, cast: str) -> None:
    model = make_model()
    torch.manual_seed(0)
    if by == "groups":
        optimizer = maker(rd.param_groups(model, rd.Frobenius(0.1)), lr=1e-3)
    else:
        optimizer = maker(model.parameters(), lr=1e-3, weight_decay=0.0)
    if cast == "before attach":
        model.bfloat16()
    attachment = rd.attach(optimizer) if by == "groups" else rd.attach(optimizer, model, rd.Frobenius(0.1))
    if cast == "in mid-run":
        zero_gradients(model)
        optimizer.step()
    if cast != "before attach":
        optimizer.zero_grad()
        optimizer.state.clear()  # whose moments have the old dtype
        model.bfloat16()
    weight = model.embedding.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape).abs() + 0.5)
    before = weight.detach().double().sum()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    zero_gradients(model)
    for _ in range(100):
        optimizer.step()
    lost = float(1 - weight.detach().double().sum() / before)
    assert lost == pytest.approx(1 - (1 - 1e-3) ** 100, rel=0.2)
    rows = {row.name: row for row in attachment.rows()}
    assert rows["embedding.weight"].by == "rankdecay"


@pytest.mark.parametrize("maker", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("by", ["groups", "roles"])
def test_a_schedule_of_weight_decay_counts_where_l2_is_the_groups_own(maker: type, by: str) -> None:
    """Written to every group, as DINO does; also for the values in a fused parameter."""
    model = make_model()
    if by == "groups":
        groups = rd.param_groups(model, rd.Frobenius(0.5), query_key=rd.LowRank(0.0))
        optimizer = maker(groups, lr=LR)
        attachment = rd.attach(optimizer)
    else:
        optimizer = maker(model.parameters(), lr=LR, weight_decay=0.0)
        how = {"exclude": "layers.2"} if maker is torch.optim.SGD else {}  # coupled L2 of a part cannot be
        attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.0), **how)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.2
    zero_gradients(model)
    kept = {"mlp": model.head.weight, "fused": model.layers[2]["attention"].query_key_value.weight}
    before = {name: p.detach().clone() for name, p in kept.items()}
    queries = query_key(model)[0]
    if by == "groups":
        with pytest.warns(UserWarning, match=r"weight_decay=0.2 was written to the group of query_key") as caught:
            optimizer.step()
        assert len(caught) == 1
    else:
        optimizer.step()
    torch.testing.assert_close(kept["mlp"], before["mlp"] * (1 - LR * 0.2))
    if by == "groups" or maker is torch.optim.AdamW:
        values = slice(9, 12)
        fused, was = (w.detach().unflatten(0, (2, 12)) for w in (kept["fused"], before["fused"]))
        torch.testing.assert_close(fused[:, values], was[:, values] * (1 - LR * 0.2))
        assert torch.equal(fused[:, :9], was[:, :9])
    assert torch.equal(query_key(model)[0], queries)
    rows = {(row.name, row.role): row.decay for row in attachment.rows()}
    assert rows["head.weight", "embedding" if ("head.weight", "embedding") in rows else "other"] == "L2 0.2"


def test_a_step_that_calls_the_step_of_its_base_class_is_one_step() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().step(closure)

    model = make_model()
    optimizer = Twice(model.parameters(), lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.Frobenius(0.5))
    zero_gradients(model)
    before = query_key(model)[0]
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(query_key(model)[0], before * (1 - LR * 0.5) ** 2)
    assert {value for name, value in attachment.state_dict().items() if name.endswith("steps")} == {2}

    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    optimizer.step()
    torch.testing.assert_close(query_key(model)[0], before * (1 - LR * 0.5) ** 3)


class _Holds(torch.optim.Optimizer):
    """Has the groups of an optimizer that it steps, and a list of its own that holds them, as many a wrapper."""

    def __init__(self, **held: torch.optim.Optimizer) -> None:
        vars(self).update(held)
        self._held = lambda: [*held.values()]
        super().__init__([group for each in held.values() for group in each.param_groups], {})

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for each in self._held():
            each.step()


class _Hides(_Holds):
    """The same, which nothing tells."""

    def __init__(self, held: torch.optim.Optimizer) -> None:
        super().__init__(held=held)
        del vars(self)["held"]


def test_a_wrapper_that_holds_its_optimizer_under_any_name_is_seen_through() -> None:
    model, alone = make_model(), make_model()
    inside = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.3)
    wrapper = _Holds(whatever=inside)
    assert rd.attach(wrapper, model, query_key=rd.Frobenius(0.5), exclude="layers.2").optimizer is inside
    for trained, optimizer in ((model, wrapper), (alone, torch.optim.SGD(alone.parameters(), lr=LR))):
        backward(trained)
        optimizer.step()
    for after, stepped in zip(query_key(model)[:4], query_key(alone)[:4], strict=True):
        torch.testing.assert_close(after, stepped * (1 - LR * 0.5))


def test_a_wrapper_of_several_optimizers_is_refused_by_their_names() -> None:
    model = make_model()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    hybrid = _Holds(first=torch.optim.SGD(matrices, lr=LR), second=torch.optim.AdamW(rest, lr=LR))
    with pytest.raises(
        TypeError, match=r"steps 2 optimizers, SGD, AdamW: attach to each of its \.first, \.second that"
    ):
        rd.attach(hybrid, model, query_key=rd.LowRank(0.1))


def test_a_wrapper_that_hides_its_optimizer_is_refused_before_anything_is_stepped() -> None:
    """Its groups are divided for the step, and the other optimizer would step only one part of them."""
    model = make_model()
    inside = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.3)
    wrapper = _Hides(inside)
    attachment = rd.attach(wrapper, model, query_key=rd.Frobenius(0.5), exclude="layers.2")
    zero_gradients(model)
    before = query_key(model)
    with pytest.raises(ValueError, match=r"_Hides steps SGD by groups that both have.*attach to that SGD instead"):
        wrapper.step()
    assert all(map(torch.equal, query_key(model), before))
    assert [len(group["params"]) for group in inside.param_groups] == [len(list(model.parameters()))]
    attachment.detach()
    rd.attach(inside, model, query_key=rd.Frobenius(0.5), exclude="layers.2")
    wrapper.step()
    torch.testing.assert_close(query_key(model)[0], before[0] * (1 - LR * 0.5))


class _KeepsGroups(torch.optim.SGD):
    """Steps the groups that it was built with."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.built_with = self.kept()

    def kept(self) -> list:
        return [(group, lambda group=group: group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group, parameters in self.built_with:
            for p in parameters():
                p.sub_(p.grad + group["weight_decay"] * p, alpha=group["lr"])


class _KeepsParameters(_KeepsGroups):
    """Steps the parameters that it was built with."""

    def kept(self) -> list:
        return [(group, lambda its=tuple(group["params"]): its) for group in self.param_groups]


class _KeepsAListBeside(_KeepsGroups):
    """Has something for each group that it was built with."""

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group, _ in zip(self.param_groups, self.built_with, strict=False):
            for p in group["params"]:
                p.sub_(p.grad + group["weight_decay"] * p, alpha=group["lr"])


@pytest.mark.parametrize("kind", [_KeepsGroups, _KeepsParameters, _KeepsAListBeside])
def test_an_optimizer_that_passes_over_a_part_of_a_group_is_told_what_to_do(kind: type) -> None:
    """It would not step the part, or with the weight decay that the part has not."""
    model = make_model()
    optimizer = kind(model.parameters(), lr=LR, weight_decay=0.3)
    attachment = rd.attach(optimizer, model, query_key=rd.Frobenius(0.5), exclude="layers.2")
    zero_gradients(model)
    with pytest.raises(
        ValueError, match=f"{kind.__name__} does not step by its param_groups.*a group of their own, or"
    ):
        optimizer.step()
    attachment.detach()
    named = [p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "k_proj.weight"))]
    rest = [p for p in model.parameters() if all(p is not each for each in named)]
    for groups, own in (([{"params": rest}, {"params": named}], 0.3), ([{"params": [*rest, *named]}], 0.0)):
        optimizer = kind(groups, lr=LR, weight_decay=own)
        attachment = rd.attach(optimizer, model, query_key=rd.Frobenius(0.5), exclude="layers.2")
        before, other = query_key(model)[0], model.head.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(query_key(model)[0], before * (1 - LR * 0.5))
        torch.testing.assert_close(model.head.weight.detach(), other * (1 - LR * own))
        attachment.detach()


class _Masters(torch.optim.SGD):
    """Steps copies in 32 bits of what has 16."""

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in (p for group in self.param_groups for p in group["params"]):
            wide = self.state[p].setdefault("wide", p.float().clone()) if p.dtype == torch.bfloat16 else p
            wide.sub_(p.grad, alpha=LR)
            p.copy_(wide)


@pytest.mark.parametrize("by", ["roles", "groups"])
def test_copies_of_some_weights_are_noticed_whatever_is_decayed_before_them(by: str) -> None:
    """Weights of 32 bits, of which there are no copies, and others of whose gains nothing can be told."""
    model = make_model()
    model.layers.to(torch.bfloat16)
    decays = {"embedding": rd.Frobenius(0.1, power=0), "norm": rd.Frobenius(0.1, power=0), "query_key": rd.LowRank(5.0)}
    groups = rd.param_groups(model, **decays) if by == "groups" else model.parameters()
    optimizer = _Masters(groups, lr=LR)
    rd.attach(optimizer, *([] if by == "groups" else [model]), **({} if by == "groups" else decays))
    zero_gradients(model)
    with pytest.raises(ValueError, match=r"_Masters keeps a copy of the weights in its state \('wide'\)"):
        optimizer.step()


def test_two_parameters_of_the_same_numbers_are_refused() -> None:
    """Tied by their data, and so stepped and decayed twice."""
    model = make_model()
    attention = model.layers[0]["attention"]
    attention.q_proj.weight.data = model.layers[1]["attention"].q_proj.weight.data
    for maker in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = maker(model.parameters(), lr=LR)
        with pytest.raises(
            ValueError, match=r"layers.0.*q_proj.weight and layers.1.*q_proj.weight are two parameters of"
        ):
            rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
        rd.attach(optimizer, model, query_key=rd.LowRank(0.1), exclude="layers.0").detach()
    attention.q_proj.weight = model.layers[1]["attention"].q_proj.weight
    rd.attach(torch.optim.SGD(model.parameters(), lr=LR), model, query_key=rd.LowRank(0.1))


def test_a_rate_of_numpy_leaves_plain_counts() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1, every=4), counts="attachment")
    optimizer.param_groups[0]["lr"] = np.interp(1, [0, 5], [0, LR])
    train(model, optimizer, range(2))
    assert {type(value) for value in attachment.state_dict().values()} == {int, float}


def test_a_default_that_no_matrix_has_is_refused() -> None:
    model = nn.LayerNorm(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="default= is the decay of matrices, and this SGD has none of LayerNorm"):
        rd.attach(optimizer, model, rd.Frobenius(0.1))


@pytest.mark.parametrize("by", ["roles", "groups"])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_parameters_that_the_model_has_replaced_are_named_once(all_of_them: bool, by: str) -> None:
    """The optimizer goes on with those it has, which nothing trains; beside others that are trained."""
    model = make_model()
    decays = {"query_key": rd.LowRank(0.1)}
    optimizer = torch.optim.SGD(rd.param_groups(model, **decays) if by == "groups" else model.parameters(), lr=LR)
    attachment = rd.attach(optimizer, *([] if by == "groups" else [model]), **({} if by == "groups" else decays))
    train(model, optimizer, range(3))
    assert "in place of" not in attachment.describe()
    if all_of_them:
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    else:
        linear = model.layers[0]["attention"].q_proj
        linear.weight = nn.Parameter(linear.weight.detach().clone())
    model.layers[1]["attention"].k_proj.weight.requires_grad_(False)  # which is still there
    with pytest.warns(
        UserWarning, match=r"the model has other parameters in place of \d of this SGD's \(layers.0"
    ) as told:
        train(model, optimizer, range(30))
    assert len(told) == 1
    assert ("in place of 1 of" in str(told[0].message)) != all_of_them
    assert "layers.0.attention.q_proj.weight" in attachment.describe().split("in place of")[1]


def test_a_step_that_never_comes_is_one_warning() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1))

    def passes() -> None:
        for _ in range(25):
            model.zero_grad()
            backward(model)

    with pytest.warns(UserWarning, match=r"10 backward passes without a step\(\) of the AdamW") as caught:
        passes()
    assert len(caught) == 1
    attachment.detach()


def test_steps_without_a_gradient_are_one_warning() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rd.attach(optimizer, model, query_key=rd.LowRank(0.1))

    def steps() -> None:
        for _ in range(25):
            optimizer.step()

    with pytest.warns(UserWarning, match="no decayed parameter had a gradient in 10 steps of AdamW") as caught:
        steps()
    assert len(caught) == 1


def test_between_a_failed_step_and_the_next_everything_can_be_asked() -> None:
    """Its groups are still divided; also of what another attachment asks."""

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    optimizer._init_group = fails  # called in its step
    zero_gradients(model)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    for ask in (attachment.describe, attachment.state_dict, optimizer.state_dict, attachment.detach):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert len(optimizer.param_groups) > 1
        rd.attach(torch.optim.AdamW(other.parameters()), other, query_key=rd.LowRank(0.1)).detach()
        ask()
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_a_scheduler_goes_on_after_a_closure_that_raised(by_name: bool) -> None:
    """As where a batch that does not fit in memory is left out: the scheduler knows the groups that it was made for."""
    model, twin = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
    rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    zero_gradients(model)
    optimizer.step()

    def fails() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure=fails) if by_name else optimizer.step(fails)
    assert len(optimizer.param_groups) == 1
    scheduler.step()
    optimizer.step()
    other = torch.optim.AdamW(twin.parameters(), lr=LR, weight_decay=0.3)
    rd.attach(other, twin, query_key=rd.LowRank(STRENGTH))
    zero_gradients(twin)
    other.step()
    other.param_groups[0]["lr"] = LR / 2
    other.step()
    _same(model, twin)


def test_asking_from_a_closure_changes_nothing_of_the_step() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.0))
    before = query_key(model)

    def closure() -> None:
        zero_gradients(model)
        assert "query_key: 6 × none" in attachment.describe()
        attachment.state_dict()

    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))


def test_a_closure_that_makes_no_gradient_is_a_step_without_any() -> None:
    """As of a training step of Lightning that returns None."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
    rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH), value_output=rd.Frobenius(1.0, power=0))
    before = copy.deepcopy(model)
    for _ in range(2):
        optimizer.step(lambda: None)
    _same(model, before)


def _halve(optimizer: torch.optim.Optimizer, key: str) -> None:
    for group in optimizer.param_groups:
        group[key] /= 2


def _with_schedule(optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step).step()


def _add_a_group(optimizer: torch.optim.Optimizer) -> None:
    added = nn.Parameter(torch.ones(3))
    added.grad = torch.zeros_like(added)
    optimizer.add_param_group({"params": [added], "lr": 0.2})


IN_A_STEP = {
    "weight_decay": lambda optimizer: _halve(optimizer, "weight_decay"),
    "lr": lambda optimizer: _halve(optimizer, "lr"),
    "the first group's lr": lambda optimizer: optimizer.param_groups[0].update(lr=LR / 3),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "a scheduler": _with_schedule,
    "a group": _add_a_group,
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # in a step it is before its end
@pytest.mark.parametrize("act", IN_A_STEP)
def test_what_a_closure_does_to_the_optimizer_is_as_if_done_before_the_step(act: str) -> None:
    """A closure may be all of a training step: Lightning's schedules and saves in it."""
    models, optimizers = [make_model(), make_model()], []
    for inside, model in enumerate(models):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
        optimizers.append(optimizer)
        rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH))
        for step in range(2):

            def closure(optimizer=optimizer, model=model, act=IN_A_STEP[act] if step == 0 else id) -> None:
                act(optimizer)
                zero_gradients(model)

            if inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    _same(*models)
    kept = [[{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] for optimizer in optimizers]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("schedule", [torch.optim.lr_scheduler.LambdaLR, torch.optim.lr_scheduler.ExponentialLR])
def test_a_schedule_in_a_hook_behind_the_step(schedule: type, first: bool) -> None:
    """Registered before the decay is attached, or after: the groups are whole, and the step's rate is its own."""
    model, twin = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
    other = torch.optim.AdamW(twin.parameters(), lr=LR, weight_decay=0.3)
    half = (lambda step: 0.5**step) if schedule is torch.optim.lr_scheduler.LambdaLR else 0.5
    in_hook, by_hand = schedule(optimizer, half), schedule(other, half)
    if first:
        optimizer.register_step_post_hook(lambda *_: in_hook.step())
    for each, its in ((optimizer, model), (other, twin)):
        rd.attach(each, its, query_key=rd.LowRank(STRENGTH))
    if not first:
        optimizer.register_step_post_hook(lambda *_: in_hook.step())
    for _ in range(3):
        for its in (model, twin):
            zero_gradients(its)
        optimizer.step()
        other.step()
        by_hand.step()
    _same(model, twin)
    assert in_hook.get_last_lr() == by_hand.get_last_lr() == [LR / 8]


@pytest.mark.parametrize("ask", ["describe", "state_dict", "set", "detach", "attach another"])
def test_a_group_that_was_just_added_is_known_to_whatever_is_asked_next(ask: str) -> None:
    model, other = make_model(), make_model()
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights[:4], lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH))
    optimizer.add_param_group({"params": weights[4:]})
    if ask == "set":
        attachment.set(query_key=rd.LowRank(0.1))
    elif ask == "attach another":
        rd.attach(torch.optim.SGD(other.parameters(), lr=LR), other, query_key=rd.LowRank(0.1))
    else:
        getattr(attachment, ask)()
    zero_gradients(model)
    optimizer.step()


def test_parameters_that_take_turns_have_each_its_own_decay() -> None:
    """As where blocks are trained in turn, by one group whose list is exchanged; or groups change places."""
    model = make_model()
    first, second = (model.layers[number]["attention"] for number in (0, 1))
    optimizer = torch.optim.AdamW([first.q_proj.weight, first.o_proj.weight], lr=LR, weight_decay=0.0)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH), exclude="layers.1")
    assert "q_proj" in attachment.describe()

    def moved(*weights: nn.Parameter) -> list[bool]:
        optimizer.param_groups[0]["params"] = list(weights)
        before = [weight.detach().clone() for weight in weights]
        zero_gradients(model)
        optimizer.step()
        return [not torch.equal(old, new) for old, new in zip(before, weights, strict=True)]

    assert moved(first.q_proj.weight, first.o_proj.weight) == [True, False]
    assert moved(second.q_proj.weight, second.o_proj.weight) == [False, False]  # excluded
    assert [row.name for row in attachment.rows()] == [
        "layers.1.attention.q_proj.weight",
        "layers.1.attention.o_proj.weight",
    ]
    assert moved(first.q_proj.weight, first.o_proj.weight) == [True, False]
    optimizer.add_param_group({"params": [first.k_proj.weight]})
    optimizer.add_param_group({"params": [first.v_proj.weight]})
    assert moved(first.q_proj.weight, first.o_proj.weight) == [True, False]
    optimizer.param_groups[1:] = optimizer.param_groups[:0:-1]
    weights = first.k_proj.weight, first.v_proj.weight
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    assert [not torch.equal(old, new) for old, new in zip(before, weights, strict=True)] == [True, False]


def test_blocks_of_other_shapes_take_turns() -> None:
    model = make_model()
    parts = [model.embedding, model.layers[0], model.head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.3)
    rd.attach(optimizer, model, query_key=rd.Frobenius(0.5), embedding=rd.Frobenius(1.0))
    zero_gradients(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for part in [*parts, *parts]:
        optimizer.param_groups[0]["params"] = list(part.parameters())
        optimizer.step()
    never = ("layers.1", "layers.2", "norm")
    strengths = {never: 0.0, ("embedding",): 1.0, ("layers.0.attention.q_proj.w", "layers.0.attention.k_proj.w"): 0.5}
    for name, parameter in model.named_parameters():
        strength = next((s for starts, s in strengths.items() if name.startswith(starts)), 0.3)
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - LR * strength) ** 2, msg=name)
    optimizer.param_groups[0]["params"] = list(model.embedding.parameters())
    optimizer.step()
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3, 3))]
    with pytest.raises(ValueError, match="are not those the decay was attached to"):
        optimizer.step()


@pytest.mark.parametrize("counts", ["optimizer", "attachment"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_parameter_that_changes_its_group_in_mid_cycle_takes_what_is_pending_along(every: int, counts) -> None:
    """At the rate that it had in each step, whatever those of its new group have had."""
    model = make_model()
    queries, keys = ([layer["attention"].get_submodule(name).weight for layer in model.layers[:2]] for name in PAIR)
    groups = [{"params": keys, "lr": LR}, {"params": queries, "lr": 3 * LR}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=every), counts=counts)
    expected = {weight: weight.detach().double() for weight in (*queries, *keys)}
    pending = dict.fromkeys(expected, 0.0)
    first, second = (group["params"] for group in optimizer.param_groups)
    for step in range(8):
        if step == 2:
            first.insert(1, second.pop(0))
        if step == 5:
            second.append(first.pop(1))
        zero_gradients(model)
        optimizer.step()
        for group in optimizer.param_groups:
            for weight in group["params"]:
                pending[weight] += group["lr"] * STRENGTH
                if (step + 1) % every == 0:
                    u, s, vh = torch.linalg.svd(expected[weight], full_matrices=False)
                    tau = pending.pop(weight) * s.square().mean().sqrt()
                    expected[weight] = u * (s - tau).clamp_min(0) @ vh
                    pending[weight] = 0.0
    for weight, value in expected.items():
        torch.testing.assert_close(weight.detach().double(), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ask", ["describe", "rows", "state_dict", "set", "saved", "detach"])
@pytest.mark.parametrize("others", [slice(None, None, -1), slice(1, None, 2)])
def test_what_is_asked_after_an_exchange_is_of_what_there_is_now(ask: str, others: slice) -> None:
    """Before the next step; and it takes nothing of what is pending."""
    model = make_model()
    parameters = [layer["attention"].get_submodule(name).weight for layer in model.layers[:2] for name in PAIR]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=4))
    zero_gradients(model)
    optimizer.step()
    kept = optimizer.param_groups[0]["params"][others]
    optimizer.param_groups[0]["params"] = list(kept)
    for left in set(parameters) - set(kept):
        del optimizer.state[left]
    asked = {
        "describe": lambda: attachment.describe(),
        "rows": lambda: attachment.rows(),
        "state_dict": lambda: attachment.state_dict(),
        "set": lambda: attachment.set(query_key=rd.LowRank(STRENGTH, every=4)),
        "saved": lambda: optimizer.state_dict(),
        "detach": lambda: attachment.detach(),
    }
    asked[ask]()
    if ask == "detach":
        attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=4))
    assert len(attachment.rows()) == len(kept)
    optimizer.step()
    counts = attachment.state_dict()
    assert {n for name, n in counts.items() if name.endswith("_steps")} == {2}
    assert {n for name, n in counts.items() if name.endswith("_pending")} == {2 * LR * STRENGTH}


def test_a_parameter_that_a_second_attached_optimizer_is_given_later_is_refused() -> None:
    model = make_model()
    matrix = model.layers[0]["attention"].q_proj.weight
    rest = [p for p in model.parameters() if p is not matrix]
    first, second = torch.optim.SGD([matrix], lr=LR), torch.optim.SGD(rest, lr=LR)
    attachments = [rd.attach(optimizer, model, query_key=rd.LowRank(0.1)) for optimizer in (first, second)]
    second.add_param_group({"params": [matrix]})
    zero_gradients(model)
    with pytest.raises(ValueError, match=r"layers.0.attention.q_proj.weight would be decayed twice: an attached SGD"):
        second.step()
    attachments[0].detach()


def test_planes_that_are_parted_by_an_exchange_are_refused() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 8}
    config = needs.package("transformers").LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    model = needs.package("transformers").LlamaForCausalLM(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rd.attach(optimizer, model, query_key=rd.Planes(0.5))
    zero_gradients(model)
    optimizer.step()
    optimizer.param_groups[0]["params"] = list(model.model.layers[0].parameters())
    with pytest.raises(ValueError, match="query_key=Planes"):
        optimizer.step()


def _spared_once(model: nn.Module, exclude: str = "") -> tuple[torch.optim.Optimizer, rd.Attachment]:
    """The optimizer after two steps of a cycle of three, in the first of which layer 0's W_Q has no gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=3), exclude=exclude or ())
    if not exclude:
        for spared in (True, False):
            zero_gradients(model)
            if spared:
                model.layers[0]["attention"].q_proj.weight.grad = None
            optimizer.step()
    return optimizer, attachment


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    zero_gradients(model)
    optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_distributed_checkpoint_has_what_parameters_were_spared(flat: bool, tmp_path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, resumed = make_model(), make_model()
    optimizer, _ = _spared_once(model)
    checkpoint.save(
        {"model": model.state_dict(), "optimizer": states.get_optimizer_state_dict(model, optimizer, options=options)},
        checkpoint_id=tmp_path,
    )
    other = torch.optim.AdamW(resumed.parameters(), lr=LR, weight_decay=0.0)
    rd.attach(other, resumed, query_key=rd.LowRank(STRENGTH, every=3))
    read = {
        "model": resumed.state_dict(),
        "optimizer": states.get_optimizer_state_dict(resumed, other, options=options),
    }
    checkpoint.load(read, checkpoint_id=tmp_path)
    states.set_optimizer_state_dict(resumed, other, read["optimizer"], options=options)
    resumed.load_state_dict(read["model"])
    _step(model, optimizer)
    _step(resumed, other)
    _same(model, resumed)


def test_what_a_parameter_was_spared_is_its_own_also_where_others_are_excluded() -> None:
    model, resumed, plain = make_model(), make_model(), make_model()
    optimizer, _ = _spared_once(model)
    other, _ = _spared_once(resumed, exclude="layers.0")
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _step(model, optimizer)
    _step(resumed, other)
    for number in (1, 2):
        for one, two in zip(model.layers[number].parameters(), resumed.layers[number].parameters(), strict=True):
            assert torch.equal(one, two)
    assert torch.equal(resumed.layers[0]["attention"].q_proj.weight, plain.layers[0]["attention"].q_proj.weight)


def test_a_parameter_that_was_frozen_all_of_a_cycle_owes_nothing_of_it_after_resuming() -> None:
    model, resumed, plain = make_model(), make_model(), make_model()
    frozen = model.layers[0]["attention"].q_proj.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=3))
    for _ in range(2):
        zero_gradients(model)
        frozen.grad = None
        optimizer.step()
    other = torch.optim.AdamW(resumed.parameters(), lr=LR, weight_decay=0.0)
    rd.attach(other, resumed, query_key=rd.LowRank(STRENGTH, every=3))
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(state)
    _step(resumed, other)
    once = torch.optim.SGD(plain.parameters(), lr=LR)
    rd.attach(once, plain, query_key=rd.LowRank(STRENGTH, every=1))
    _step(plain, once)
    its = [each.layers[0]["attention"].q_proj.weight for each in (resumed, plain)]
    torch.testing.assert_close(*its)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_pending_of_a_low_rank_decay_is_none_of_an_l2_that_replaces_it(kind: type) -> None:
    """Whoever applies the L2; and it does not come back with the next low-rank decay."""
    model = make_model()
    optimizer = kind(model.parameters(), lr=LR, weight_decay=0.0)
    others = {"value_output": rd.Frobenius(0.0)}  # in one parameter with W_Q and W_K
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH, every=4), **others)
    for _ in range(2):
        _step(model, optimizer)
    before = query_key(model)
    attachment.set(query_key=rd.Frobenius(1.0))
    _step(model, optimizer)
    for old, new in zip(before, query_key(model), strict=True):
        torch.testing.assert_close(new, old * (1 - LR))
    attachment.set(query_key=rd.LowRank(STRENGTH, every=4))
    before, steps = query_key(model), 0
    while torch.equal(before[0], query_key(model)[0]):  # the cycle stands still while the optimizer decays
        _step(model, optimizer)
        steps += 1
    assert steps <= 2  # of those that are a parameter each: what is fused was decayed by the hook, and has counted on
    for old, new in zip(before[:4], query_key(model)[:4], strict=True):
        s = torch.linalg.svdvals(old)
        tau = steps * LR * STRENGTH * old.norm() / min(old.shape) ** 0.5
        torch.testing.assert_close(torch.linalg.svdvals(new), (s - tau).clamp_min(0), atol=1e-5, rtol=0)


def test_a_layer_that_was_added_to_the_model_is_decayed_too() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(STRENGTH))
    model.layers.append(make_model().layers[0])
    optimizer.add_param_group({"params": list(model.layers[3].parameters())})
    added = model.layers[3]["attention"].q_proj.weight
    before = added.detach().clone()
    zero_gradients(model)
    optimizer.step()
    assert not torch.equal(added, before)
    assert {row.role for row in attachment.rows() if row.name.startswith("layers.3")} >= {"query_key", "value_output"}


@pytest.mark.parametrize("by", ["groups", "roles", "roles, and counts aside"])
def test_with_every_k_a_parameter_is_decayed_for_the_steps_in_which_it_had_a_gradient(by: str) -> None:
    """Also if it never has one in each k-th step, as half of a model that is trained in turns."""

    def run(every: int, resume: bool = False) -> list[torch.Tensor]:
        model = make_model()
        decay = rd.LowRank(STRENGTH, scale="absolute", every=every)

        def make() -> tuple[torch.optim.Optimizer, rd.Attachment]:
            if by == "groups":
                optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.0), query_key=decay), lr=1e-2)
                return optimizer, rd.attach(optimizer)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            counts = "attachment" if "aside" in by else "optimizer"
            return optimizer, rd.attach(optimizer, model, query_key=decay, counts=counts)

        optimizer, attachment = make()
        for step in range(12):
            zero_gradients(model)
            for parameter in model.layers[step % 2].parameters():
                parameter.grad = None
            optimizer.step()
            if resume and step == 6:
                state, counts = copy.deepcopy((optimizer.state_dict(), attachment.state_dict()))
                attachment.detach()
                optimizer, attachment = make()
                optimizer.load_state_dict(state)
                if "aside" in by:
                    attachment.load_state_dict(counts)
        return query_key(model)

    for a, b, c in zip(run(1), run(4), run(4, resume=True), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
        assert torch.equal(b, c)


def test_a_hook_of_the_users_before_the_step_comes_first() -> None:
    """One that was registered after attaching; it sets the weight decay, which counts but for the named role."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.5)
    rd.attach(optimizer, model, query_key=rd.LowRank(0.0))

    def schedule(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 1.0

    optimizer.register_step_pre_hook(schedule)
    before, head = query_key(model), model.head.weight.detach().clone()
    zero_gradients(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))
    torch.testing.assert_close(model.head.weight, head * (1 - LR))
    assert optimizer.param_groups[0]["weight_decay"] == 1.0


def test_a_rate_that_the_step_itself_sets_counts() -> None:
    class WarmUp(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = LR
            return super().step(closure)

    model = make_model()
    optimizer = WarmUp(model.parameters(), lr=100.0)
    rd.attach(optimizer, model, query_key=rd.Frobenius(0.5))
    before = query_key(model)
    zero_gradients(model)
    optimizer.step()
    for old, new in zip(before, query_key(model), strict=True):
        torch.testing.assert_close(new, old * (1 - LR * 0.5))


def test_what_has_no_effect_any_more_is_refused() -> None:
    model = make_model()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    with pytest.raises(ValueError, match=r"the counts are of other parameters, such as state"):
        attachment.load_state_dict(optimizer.state_dict())
    removed = optimizer.param_groups.pop(0)
    with pytest.raises(ValueError, match=r"groups and now has .*: detach before removing groups"):
        optimizer.step()
    optimizer.param_groups.insert(0, removed)
    attachment.detach()
    for told in (lambda: attachment.set(query_key=rd.LowRank(1.0)), attachment.resume):
        with pytest.raises(RuntimeError, match="is detached, so the call would have no effect"):
            told()
    with pytest.raises(TypeError, match="the arguments are swapped"):
        rd.attach(model, optimizer, query_key=rd.LowRank(0.1))
    with pytest.raises(TypeError, match="lr_coupled='no' must be True or False"):
        rd.LowRank(0.1, lr_coupled="no")
    for wrong in (3, model.head):
        with pytest.raises(TypeError, match="exclude="):
            rd.attach(optimizer, model, query_key=rd.LowRank(0.1), exclude=wrong)
    with pytest.raises(ValueError, match=r"exclude='q_proj' matches no parameter: give '\*q_proj\*'"):
        rd.attach(optimizer, model, query_key=rd.LowRank(0.1), exclude="q_proj")


def test_a_group_key_of_the_users_may_be_called_role() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "role": "backbone"}], lr=LR)
    assert rd.attach(optimizer, model, query_key=rd.LowRank(0.1)).active


RELATIVE, ABSOLUTE = rd.LowRank(0.1, every=16), rd.LowRank(1.0, scale="absolute", every=16)


@pytest.mark.parametrize("after", [RELATIVE, rd.Frobenius(0.1), rd.Frobenius(0.1, power=0)])
@pytest.mark.parametrize("way", ["roles", "groups", "resumed"])
def test_what_is_pending_of_one_unit_is_not_applied_in_another(way, after):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    groups = rd.param_groups(model, query_key=ABSOLUTE) if way == "groups" else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=LR)
    attachment = rd.attach(optimizer) if way == "groups" else rd.attach(optimizer, model, query_key=ABSOLUTE)
    zero_gradients(model)
    for _ in range(15):
        optimizer.step()
    before = query_key(model)
    if way == "resumed":
        state = optimizer.state_dict()
        attachment.detach()
        rd.attach(optimizer, model, query_key=after)
        optimizer.load_state_dict(state)
    else:
        attachment.set(query_key=after)
    optimizer.step()
    for new, old in zip(query_key(model), before, strict=True):
        assert new.norm() / old.norm() > 0.9


def test_excluding_every_parameter_is_told_as_what_it_is() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="exclude leaves no parameter of Linear"):
        rd.attach(torch.optim.SGD(layer.parameters(), lr=LR), layer, other=rd.Frobenius(0.1), exclude="*")
