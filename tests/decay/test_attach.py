"""The hook: exact on its matrices, nothing elsewhere, under every optimizer and through every interruption.

The reference is a float64 SVD of each matrix, taken out of the model by hand.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
import rankdecay.decay.attachment as attachment_module
from rankdecay.attention import Window
from rankdecay.decay.apply import apply
from tests import needs
from tests.attention.layouts import build_layout
from tests.decay.models import (
    STRENGTH,
    Model,
    backward,
    groups_of,
    make_model,
    query_key,
    train,
    zero_gradients,
)

LR = 0.1


def _shrunk(matrix: Tensor, tau: Tensor | float) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag_embed((s - tau).clamp_min(0)) @ vh


def _tau(matrix: Tensor, rate: float, scale: str = "relative") -> Tensor:
    rms = matrix.norm(dim=(-2, -1)) / min(matrix.shape[-2:]) ** 0.5
    return rate * (rms if scale == "relative" else torch.ones_like(rms))


def _others(model: Model) -> dict[str, Tensor]:
    """Every number of the model that is not in W_Q or W_K."""
    held = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().clone()
        if name.endswith("query_key_value.weight"):
            value = value.unflatten(0, (2, 12))[:, 9:].clone()
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            held[name] = value
    return held


# ---- exactness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", ["matrix", "head"])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_a_step_without_gradient_shrinks_exactly_the_chosen_matrices(dtype, unit, scale):
    model = make_model(dtype)
    # In float16 the ε of Adam is 0, and 0/0 its step.
    kind = torch.optim.SGD if dtype == torch.float16 else torch.optim.AdamW
    optimizer = kind(groups_of(model, unit=unit, scale=scale), lr=LR)
    rd.attach(optimizer)
    before, others = query_key(model, unit == "head"), _others(model)
    zero_gradients(model)
    optimizer.step()
    for old, new in zip(before, query_key(model, unit == "head"), strict=True):
        tau = _tau(old, LR * STRENGTH, scale)[..., None]
        expected = (torch.linalg.svdvals(old) - tau).clamp_min(0)
        rounding = torch.finfo(dtype).eps * old.norm(dim=(-2, -1))[..., None]
        assert ((torch.linalg.svdvals(new) - expected).abs() <= 1e-5 * tau + rounding).all()
        assert (expected.diff() <= 0).all()
        assert not torch.equal(old, new)
    for name, value in _others(model).items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "falcon-grouped", "bloom", "t5", "bart", "distilbert"])
def test_the_same_on_real_models(family):
    transformers = needs.package("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt = {"n_embd": 32, "n_head": 4, "n_layer": 2, **common}
    llama = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
             "intermediate_size": 48, **common}  # fmt: skip
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, **common,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
    t5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 48, **common}
    model = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**llama)),
        "falcon-grouped": lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(**llama, num_kv_heads=2, new_decoder_architecture=True)
        ),
        "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_head=4, **common)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
        "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**bart)),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=32, n_heads=4, n_layers=1, hidden_dim=48, vocab_size=50)
        ),
    }[family]()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    layers = rd.find_attention(model)
    chosen = {id(view.weight()): view for layer in layers for view in (layer.query, layer.key)}
    before = [view.tensor().clone() for layer in layers for view in layer.views]
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in chosen}
    zero_gradients(model)
    optimizer.step()
    after = [(view.role, view.tensor()) for layer in layers for view in layer.views]
    for old, (role, new) in zip(before, after, strict=True):
        if role in ("query", "key"):
            old, new = old.double(), new.double()
            tau = _tau(old, LR * STRENGTH)
            difference = torch.linalg.svdvals(new) - (torch.linalg.svdvals(old) - tau).clamp_min(0)
            assert difference.abs().max() <= 1e-5 * tau + torch.finfo(torch.float32).eps * old.norm()
        else:
            assert torch.equal(old, new)
    for name, parameter in model.named_parameters():
        assert name not in rest or torch.equal(parameter, rest[name])


# ---- optimizers ------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[dict]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=LR, foreach=False),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, lr=LR, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=LR, fused=True),
    "adamw-tensor-lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(LR)),
    "adam": lambda groups: torch.optim.Adam(groups, lr=LR),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=LR),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=LR),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["prox", "smooth", "polar", "newton_schulz"])
def test_the_decay_follows_the_optimizers_own_step(name, rule):
    """Three steps with the hook, against the same optimizer with the library's rule applied by hand."""
    from rankdecay.linalg import shrink

    model = make_model()
    by_hand = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](groups_of(model, rule=rule))
    plain = OPTIMIZERS[name](groups_of(by_hand, rule=rule))
    rd.attach(optimizer)
    views = [view for layer in rd.find_attention(by_hand) for view in (layer.query, layer.key)]
    for seed in range(3):
        for one, its in ((model, optimizer), (by_hand, plain)):
            its.zero_grad()
            backward(one, seed)
            its.step()
        for view in views:
            matrix = view.tensor()
            with torch.no_grad():
                view.window.write(view.weight(), shrink(matrix, _tau(matrix, LR * STRENGTH), rule))
        for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        by_hand.load_state_dict(model.state_dict())  # roundings apart, which an optimizer may make large


class _Unknown(torch.optim.Optimizer):
    """Somebody's optimizer, whose weight decay is not what ours means."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter, alpha=1000 * group["weight_decay"])


@needs.muon
def test_muon_beside_adamw():
    model = make_model()
    groups = groups_of(model)
    matrices = [group for group in groups if "query_key" in group["role"] or group["role"] == "value_output"]
    rest = [group for group in groups if all(group is not other for other in matrices)]
    muon, adamw = torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=LR)
    attachments = [rd.attach(muon), rd.attach(adamw)]
    assert "rankdecay" in attachments[0].describe()
    before = query_key(model)
    zero_gradients(model)
    muon.step()
    adamw.step()
    for old, new in zip(before, query_key(model), strict=True):
        torch.testing.assert_close(new, _shrunk(old, _tau(old, LR * STRENGTH)), atol=1e-6, rtol=0)


def _adam_decouples() -> bool:
    return "decoupled_weight_decay" in torch.optim.Adam([nn.Parameter(torch.zeros(1))]).defaults


@pytest.mark.parametrize(
    ("build", "by"),
    [
        (lambda groups: torch.optim.AdamW(groups, lr=LR), "AdamW"),
        # torch's Adam could not decouple its L2 before 2.7
        (lambda groups: torch.optim.Adam(groups, lr=LR), "Adam" if _adam_decouples() else "rankdecay"),
        (lambda groups: torch.optim.NAdam(groups, lr=LR), "NAdam"),
        (lambda groups: torch.optim.SGD(groups, lr=LR), "rankdecay"),
        (lambda groups: torch.optim.RMSprop(groups, lr=LR), "rankdecay"),
        (lambda groups: _Unknown(groups, {"lr": LR, "weight_decay": 0.0}), "rankdecay"),
    ],
)
def test_frobenius_is_decoupled_and_applied_once_under_any_optimizer(build, by):
    model = make_model()
    groups = rd.param_groups(
        model, rd.Frobenius(0.5), query_key=rd.LowRank(0.0), value_output=rd.Frobenius(0.2), embedding=rd.Frobenius(0.0)
    )
    optimizer = build(groups)
    attachment = rd.attach(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero_gradients(model)
    optimizer.step()
    decayed = {"layers.0.attention.v_proj.weight": 0.2, "layers.2.attention.dense.weight": 0.2, "head.weight": 0.5}
    for name, parameter in model.named_parameters():
        if name.endswith("query_key_value.weight"):
            held, was = parameter.unflatten(0, (2, 12)), before[name].unflatten(0, (2, 12))
            assert torch.equal(held[:, :9], was[:, :9])
            torch.testing.assert_close(held[:, 9:], was[:, 9:] * (1 - LR * 0.2))
        else:
            kind = 0.2 if name.endswith(("v_proj.weight", "o_proj.weight")) else decayed.get(name, 0.0)
            torch.testing.assert_close(parameter, before[name] * (1 - LR * kind), atol=1e-7, rtol=1e-6)
    [line] = [line for line in attachment.describe().splitlines() if line.startswith("head.weight")]
    assert f"L2 0.5  {by}" in " ".join(line.split("  ")).replace("   ", "  ") or by in line.split()


def test_learning_rates_and_schedules_count():
    model = make_model()
    groups = groups_of(model)
    for group in groups:
        group["lr"] = 0.3 if "value_output" in group["role"] else 0.2
    optimizer = torch.optim.SGD(groups, lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rd.attach(optimizer)
    expected = query_key(model)
    for step in range(3):
        zero_gradients(model)
        optimizer.step()
        scheduler.step()
        rates = [0.2, 0.2, 0.2, 0.2, 0.3, 0.3]  # the fused parameter's group has its own
        expected = [_shrunk(m, _tau(m, rate * 0.5**step * STRENGTH)) for m, rate in zip(expected, rates, strict=True)]
    for now, wanted in zip(query_key(model), expected, strict=True):
        torch.testing.assert_close(now, wanted, atol=1e-6, rtol=0)


def test_without_coupling_the_learning_rate_does_not_count():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model, lr_coupled=False, scale="absolute"), lr=1e-30)
    optimizer.param_groups[0]["lr"] = 1e-30
    rd.attach(optimizer)
    before = query_key(model)
    zero_gradients(model)
    optimizer.step()
    for old, new in zip(before, query_key(model), strict=True):
        torch.testing.assert_close(new, _shrunk(old, STRENGTH), atol=1e-6, rtol=0)


# ---- steps that are not ----------------------------------------------------------------------------------


def test_accumulated_gradients_are_one_step():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    before = query_key(model)
    for seed in range(3):
        backward(model, seed)
        assert all(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))
    optimizer.step()
    assert {g["query_key_steps"] for g in optimizer.param_groups if "query_key_steps" in g} == {1}


def _scaled_step(model: Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, overflow: bool) -> None:
    """A step under a scaler with gradients of zero, of which one overflows, so that the step is skipped."""
    zero_gradients(model)
    scaler.scale(torch.ones(()))
    if overflow:
        model.head.weight.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_scaler_is_none_of_a_warm_up(fused):
    model = make_model()
    optimizer = torch.optim.SGD(
        rd.param_groups(model, query_key=rd.Frobenius(1.0, power=0, warmup=4)), lr=LR, fused=fused
    )
    attachment = rd.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    before = query_key(model)
    for overflow in (True, True, False):
        _scaled_step(model, optimizer, scaler, overflow)
    for old, new in zip(before, query_key(model), strict=True):
        assert float(old.norm() - new.norm()) == pytest.approx(LR / 4, rel=1e-4)
    optimizer.state_dict()
    assert {value for name, value in attachment.state_dict().items() if name.endswith("warmed")} == {1}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_step_skipped_by_the_scaler_decays_nothing(fused, every):
    model, reference = make_model(), make_model()
    how = {"every": every, "scale": "absolute", "strength": 0.1}
    optimizer = torch.optim.AdamW(groups_of(model, **how), lr=LR, fused=fused)
    rd.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    good = 0
    for step in range(9):
        overflow = step in (0, 2, 5)
        state = [p.detach().clone() for p in model.parameters()]
        _scaled_step(model, optimizer, scaler, overflow)
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(state, model.parameters(), strict=True))
        good += not overflow
    applied = good // every * every
    shrink_by = [
        (torch.linalg.svdvals(a) - torch.linalg.svdvals(b))[0] / (LR * 0.1)
        for a, b in zip(query_key(reference), query_key(model), strict=True)
    ]
    if fused:  # the hook cannot read which steps were skipped: what it applies is Σ lr of the others
        pending = [
            group["query_key_pending"] for group in optimizer.state_dict()["param_groups"]
            if "query_key_pending" in group
        ]  # fmt: skip
        applied = good - pending[0] / (LR * 0.1)
        assert 0 <= pending[0] <= (every + 1) * LR * 0.1
    for times in shrink_by:
        assert float(times) == pytest.approx(applied, abs=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_what_was_spared_nothing_is_decayed_in_one_stack_also_at_a_rate_in_a_tensor(every, monkeypatch):
    model = make_model()
    optimizer = torch.optim.AdamW(groups_of(model, every=every), lr=torch.tensor(LR))
    rd.attach(optimizer)
    seen = []

    def spy(steps, backend):
        seen.append(sorted(len(step.parameters) for step in steps))
        apply(steps, backend)

    monkeypatch.setattr("rankdecay.decay.attachment.apply", spy)
    for _ in range(every):
        zero_gradients(model)
        optimizer.step()
    assert seen[-1] == [1, 2, 2]  # of the three kinds of matrices, all there are of each


@pytest.mark.parametrize("rule", ["prox", "newton_schulz"])
@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_a_skipped_step_takes_nothing_of_what_had_no_gradient(rule, scale):
    """One matrix has never a gradient and one lacks it once, in a cycle whose last step overflows."""
    model, twin = make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    how = {"every": 3, "strength": 0.1, "rule": rule, "scale": scale}
    frozen, spared = (model.layers[number]["attention"].q_proj.weight for number in (0, 1))
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = torch.optim.AdamW(groups_of(model, **how), lr=LR, fused=True)
    rd.attach(optimizer)
    for step in range(6):
        zero_gradients(model)
        frozen.grad, spared.grad = None, (None if step == 1 else spared.grad)
        scaler.scale(torch.ones(()))
        if step == 2:
            model.head.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(frozen, before)
    other = torch.optim.SGD(groups_of(twin, **how | {"every": 1}), lr=LR * 4)  # steps 0, 3, 4 and 5; not 1 and 2
    rd.attach(other)
    zero_gradients(twin)
    other.step()
    torch.testing.assert_close(spared, twin.layers[1]["attention"].q_proj.weight, atol=1e-5, rtol=0)


def test_parameters_without_gradient_and_frozen_ones_are_left_alone():
    model = make_model()
    frozen = model.layers[0]["attention"].q_proj.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR)
    attachment = rd.attach(optimizer)
    zero_gradients(model)
    frozen.grad = None
    without = model.layers[1]["attention"].k_proj.weight
    without.grad = None
    with_gradient = model.layers[1]["attention"].q_proj.weight
    before = [p.detach().clone() for p in (frozen, without, with_gradient)]
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert torch.equal(without, before[1])
    assert not torch.equal(with_gradient, before[2])
    [line] = [x for x in attachment.describe().splitlines() if x.startswith("layers.0.attention.q_proj.weight")]
    assert "frozen" in line


@pytest.mark.parametrize("closure", [False, True])
def test_an_optimizer_that_clears_gradients_inside_its_step(closure):
    class Consuming(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    model = make_model()
    optimizer = Consuming(groups_of(model), lr=LR)
    rd.attach(optimizer)
    before = query_key(model)

    def make_gradients():
        zero_gradients(model)
        return 0.0

    if closure:
        optimizer.step(make_gradients)
    else:
        make_gradients()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))


def test_with_a_closure_the_last_steps_gradients_do_not_count():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    weight = model.layers[0]["attention"].q_proj.weight

    def make_gradients():
        optimizer.zero_grad()
        zero_gradients(model)
        weight.grad = None
        return 0.0

    zero_gradients(model)
    before = weight.detach().clone()
    optimizer.step(closure=make_gradients)
    assert torch.equal(weight, before)
    assert not torch.equal(
        model.layers[0]["attention"].k_proj.weight, make_model().layers[0]["attention"].k_proj.weight
    )


# ---- every k steps, and interruptions --------------------------------------------------------------------


def test_every_k_applies_what_the_steps_gathered():
    one, many = make_model(), make_model()
    optimizers = [
        torch.optim.SGD(groups_of(model, every=every, scale="absolute"), lr=LR)
        for model, every in ((one, 1), (many, 4))
    ]
    for optimizer in optimizers:
        rd.attach(optimizer)
    schedule = [0.1, 0.02, 0.05, 0.01] * 2
    for step, lr in enumerate(schedule):
        for model, optimizer in zip((one, many), optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr
            zero_gradients(model)
            optimizer.step()
        same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(query_key(one), query_key(many), strict=True)]
        assert all(same) if step % 4 == 3 else not any(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_in_mid_cycle_changes_nothing(dtype):
    whole = make_model(dtype)
    optimizer = torch.optim.AdamW(groups_of(whole, every=4), lr=LR)
    rd.attach(optimizer)
    train(whole, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(6, 12))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = make_model(dtype)
    resumed.load_state_dict(state["model"])
    other = torch.optim.AdamW(groups_of(resumed, every=4), lr=LR)
    rd.attach(other)
    other.load_state_dict(state["optimizer"])
    train(resumed, other, range(6, 12))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_without_these_decays_is_refused_as_what_it_is():
    model = make_model()
    plain = torch.optim.AdamW(rd.param_groups(make_model(), rd.Frobenius(0.1)), lr=LR)
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR)
    rd.attach(optimizer)
    state = plain.state_dict()
    with pytest.raises(ValueError, match=r"no decay for query_key in group .* saved with other decays"):
        optimizer.load_state_dict(state)
    for group in state["param_groups"]:
        del group["role"]
    with pytest.raises(ValueError, match=r"no decay for query_key in group .* saved by an optimizer without rankdecay"):
        optimizer.load_state_dict(state)


def test_a_strength_can_be_changed_while_training():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    for strength in (0.5, 0.0, 1.5):
        for group in optimizer.param_groups:
            if "query_key_strength" in group:
                group["query_key_strength"] = strength
        before = query_key(model)
        zero_gradients(model)
        optimizer.step()
        for old, new in zip(before, query_key(model), strict=True):
            torch.testing.assert_close(new, _shrunk(old, _tau(old, LR * strength)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "0.1", None])
def test_a_strength_that_is_none_stops_at_the_next_step(value):
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    for group in optimizer.param_groups:
        if "query_key_strength" in group:
            group["query_key_strength"] = value
    zero_gradients(model)
    with pytest.raises(
        ValueError, match=r"strength (must be a finite number|is .* expected a number)|query_key_strength"
    ):
        optimizer.step()


# ---- compiled, copied, wrapped ---------------------------------------------------------------------------


def test_a_compiled_model_and_a_compiled_step():
    eager, compiled = make_model(), make_model()
    optimizers = []
    for model in (eager, compiled):
        whole = torch.compile(model, backend="eager") if model is compiled else model
        groups = rd.param_groups(whole, rd.Frobenius(0.0), query_key=rd.LowRank(STRENGTH, every=2))
        optimizers.append(torch.optim.AdamW(groups, lr=torch.tensor(LR)))
        rd.attach(optimizers[-1])
    step = torch.compile(optimizers[1].step, backend="eager")
    for seed in range(5):
        for model, optimizer, advance in zip((eager, compiled), optimizers, (optimizers[0].step, step), strict=True):
            optimizer.zero_grad()
            backward(model, seed)
            advance()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_no_hook_until_it_is_attached(duplicate):
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model, every=2), lr=LR)
    attachment = rd.attach(optimizer)
    zero_gradients(model)
    optimizer.step()
    pair = nn.ModuleList([model])
    pair.optimizer = optimizer
    second = duplicate(pair)
    copied, its = second[0], second.optimizer
    before = query_key(copied)
    zero_gradients(copied)  # neither way of copying keeps them
    its.step()
    assert all(torch.equal(a, b) for a, b in zip(before, query_key(copied), strict=True))
    rd.attach(its)
    its.step()
    optimizer.step()
    for a, b in zip(query_key(model), query_key(copied), strict=True):
        assert torch.equal(a, b)  # the copy also continues the cycle
    copied_attachment = duplicate(attachment)
    assert not copied_attachment.active
    with pytest.raises(RuntimeError, match=r"copied or pickled, which drops hooks.*rankdecay.attach"):
        copied_attachment.describe()


def test_detaching_stops_and_attaching_again_continues():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    attachment = rd.attach(optimizer)
    attachment.detach()
    before = query_key(model)
    zero_gradients(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))
    assert "detached from SGD: what follows is not applied" in attachment.describe()
    again = rd.attach(optimizer)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, query_key(model), strict=True))
    attachment.detach()  # twice does no harm, and not to the other
    assert again.active
    assert not attachment.active


def test_a_group_added_later_is_decayed_too():
    model, late = make_model(), make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    for group in rd.param_groups(late, rd.Frobenius(0.5), query_key=rd.LowRank(STRENGTH)):
        optimizer.add_param_group(group)
    before, head = query_key(late), late.head.weight.detach().clone()
    for each in (model, late):
        zero_gradients(each)
    optimizer.step()
    for old, new in zip(before, query_key(late), strict=True):
        torch.testing.assert_close(new, _shrunk(old, _tau(old, LR * STRENGTH)), atol=1e-6, rtol=0)
    torch.testing.assert_close(late.head.weight, head * (1 - LR * 0.5))


# ---- narrow weights --------------------------------------------------------------------------------------


# ---- on a device -----------------------------------------------------------------------------------------


@needs.cuda
def test_a_step_captured_in_a_cuda_graph_is_refused():
    model = make_model().cuda()
    optimizer = torch.optim.AdamW(groups_of(model), lr=torch.tensor(LR, device="cuda"), capturable=True)
    rd.attach(optimizer)
    for _ in range(3):
        zero_gradients(model)
        optimizer.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captured in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@needs.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_on_cuda_never_waits_for_the_device(dtype, fused):
    model, on_cpu = make_model(dtype).cuda(), make_model(dtype)
    optimizers = [torch.optim.SGD(groups_of(m, every=2), lr=LR, fused=fused) for m in (model, on_cpu)]
    for optimizer in optimizers:
        rd.attach(optimizer)
    for m in (model, on_cpu):
        zero_gradients(m)
    optimizers[0].step()  # warms up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizers[0].step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        optimizers[1].step()
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for a, b in zip(query_key(model), query_key(on_cpu), strict=True):
        torch.testing.assert_close(a.cpu(), b, **close)


# ---- saying what is done ---------------------------------------------------------------------------------


# ---- bad input -------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused():
    optimizer = torch.optim.SGD(groups_of(make_model()), lr=LR)
    rd.attach(optimizer)
    with pytest.raises(ValueError, match=r"SGD is attached already.*detach\(\)"):
        rd.attach(optimizer)


def test_an_optimizer_without_our_groups_is_refused():
    with pytest.raises(ValueError, match=r"AdamW\(rankdecay.param_groups\(model, ...\), ...\)"):
        rd.attach(torch.optim.AdamW(make_model().parameters()))
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got Model"):
        rd.attach(make_model())
    with pytest.raises(ValueError, match=r"backend='exakt'.*did you mean 'exact'"):
        rd.attach(torch.optim.SGD(groups_of(make_model())), backend="exakt")


def test_two_decays_on_one_parameter_are_refused():
    model = make_model()
    first = torch.optim.SGD(groups_of(model), lr=LR)
    attachment = rd.attach(first)
    second = torch.optim.AdamW(groups_of(model), lr=LR)
    with pytest.raises(ValueError, match=r"q_proj.weight would be decayed twice: an attached SGD.*detach"):
        rd.attach(second)
    attachment.detach()
    rd.attach(second)


def test_an_optimizer_that_is_gone_does_not_count():
    model = make_model()
    for _ in range(2):
        optimizer = torch.optim.SGD(groups_of(model), lr=LR)
        attachment = rd.attach(optimizer)
    del optimizer
    with pytest.raises(RuntimeError, match="no longer exists"):
        attachment.describe()


def test_swapped_parameters_are_refused_unless_they_have_the_same_shapes():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    other = make_model()
    index, group = next((i, g) for i, g in enumerate(optimizer.param_groups) if g["role"] == "query_key")
    names = group["param_names"]
    group["params"] = [dict(other.named_parameters())[name] for name in names]
    before = group["params"][0].detach().clone()
    for p in group["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not torch.equal(group["params"][0], before)
    group["params"] = [nn.Parameter(torch.zeros(5, 5)) for _ in names]
    with pytest.raises(ValueError, match=rf"parameters of group {index} \(role query_key\) are not those.*\(5, 5\)"):
        optimizer.step()
    group["params"] = [nn.Parameter(torch.zeros(120)) for _ in names]
    with pytest.raises(ValueError, match=r"flattened, as DeepSpeed ZeRO and FSDP1 do.*FSDP2"):
        optimizer.step()


def test_a_flattened_parameter_is_refused_when_attaching():
    model = make_model()
    groups = groups_of(model)
    for group in groups:
        if group["role"] == "query_key":
            group["params"] = [nn.Parameter(p.detach().flatten()) for p in group["params"]]
    with pytest.raises(ValueError, match=r"q_proj.weight \(query_key\).*flattened"):
        rd.attach(torch.optim.SGD(groups, lr=LR))


def test_wrappers_are_seen_through_and_engines_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self._base_optimizer = inner

    inner = torch.optim.SGD(groups_of(make_model()), lr=LR)
    assert rd.attach(Wrapper(inner)).optimizer is inner
    engine = Wrapper(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"got Linear. An engine that owns its optimizer, such as DeepSpeed's"):
        rd.attach(engine)
    with pytest.raises(TypeError, match=r"got list: attach to each of several optimizers, with the roles that it has"):
        rd.attach([inner, inner])  # pyright: ignore[reportArgumentType] - what is tested


def test_an_optimizer_without_a_learning_rate_needs_a_decay_without_one():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    model = make_model()
    with pytest.raises(ValueError, match=r"Own has no 'lr'.*lr_coupled=False"):
        rd.attach(Own(groups_of(model)))
    optimizer = Own(groups_of(model, lr_coupled=False))
    rd.attach(optimizer)
    zero_gradients(model)
    before = query_key(model)
    optimizer.step()
    assert not torch.equal(before[0], query_key(model)[0])


# ---- windows of every layout -----------------------------------------------------------------------------

#: By the ending of a parameter's name: views of its matrices of W_Q and W_K, (out, in) each, cut by hand.
CUTS: dict[str, dict[str, Callable[[Tensor], list[Tensor]]]] = {
    "qwen3_next": {
        "q_proj.weight": lambda w: [w.view(4, 2, 8, 32)[:, 0]],
        "k_proj.weight": lambda w: [w],
    },
    "deepseek_v3": {
        "q_a_proj.weight": lambda w: [w],
        "q_b_proj.weight": lambda w: [w.view(4, 12, 16)[:, :8], w.view(4, 12, 16)[:, 8:]],
        "kv_a_proj_with_mqa.weight": lambda w: [w[8:]],
        "kv_b_proj.weight": lambda w: [w.view(4, 14, 8)[:, :8]],
    },
    "jetmoe": {"experts.input_linear.weight": lambda w: [w], "kv_proj.weight": lambda w: [w[:16]]},
    "xlnet": {"rel_attn.q": lambda w: [w.permute(1, 2, 0)], "rel_attn.k": lambda w: [w.permute(1, 2, 0)]},
    "deberta": {"in_proj.weight": lambda w: [w.view(4, 24, 32)[:, :8], w.view(4, 24, 32)[:, 8:16]]},
    "convbert": {"self.query.weight": lambda w: [w], "self.key.weight": lambda w: [w]},
    "gemma4-keys-are-values": {
        "layers.0.self_attn.q_proj.weight": lambda w: [w.view(4, 8, 32)],
        "layers.0.self_attn.k_proj.weight": lambda w: [w.view(2, 8, 32)],
        "layers.1.self_attn.q_proj.weight": lambda w: [w.view(4, 16, 32)],
        "layers.1.self_attn.k_proj.weight": lambda w: [w.view(2, 16, 32)],
    },
}  # fmt: skip


@pytest.mark.parametrize("unit", ["matrix", "head"])
@pytest.mark.parametrize("name", CUTS)
def test_a_decay_through_a_window_changes_its_rows_and_nothing_else(name: str, unit: str) -> None:
    model = build_layout(name).double()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rate = LR * STRENGTH
    for parameter, weight in expected.items():
        for ending, cut in CUTS[name].items():
            for part in cut(weight) if parameter.endswith(ending) else ():
                one_head = ending == "q_a_proj.weight" or len(part) == 4
                heads = part if part.ndim == 3 else part.unflatten(0, (1, -1) if one_head else (-1, 8))
                if name == "jetmoe" and unit == "head" and part.ndim == 3:  # two heads in each expert
                    heads = part.view(6, 8, 32)
                matrix = heads if unit == "head" else heads.reshape(-1, heads.shape[-1])
                shrunk = _shrunk(matrix, _tau(matrix, rate)[..., None] if unit == "head" else _tau(matrix, rate))
                part.copy_(shrunk.reshape(part.shape))
    optimizer = torch.optim.SGD(groups_of(model, unit=unit), lr=LR)
    rd.attach(optimizer)
    zero_gradients(model)
    optimizer.step()
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[parameter], msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", [*CUTS, "deepseek_v4", "levit", "gemma3n", "funnel"])
def test_windows_in_a_state_dict_are_read_back(name: str) -> None:
    model = build_layout(name)
    optimizer = torch.optim.AdamW(groups_of(model))
    rd.attach(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)["param_groups"]
    texts = {
        text for group in stored for key, keys in group.items() if key.endswith("_blocks") for text in keys.split("; ")
    }
    assert texts
    for text in texts:
        assert str(Window.parse(text)) == text
    known = {str(replace(view.window, label="")) for layer in rd.find_attention(model) for view in layer.views}
    assert {text.rpartition(": ")[2] for text in texts} <= known


def test_what_was_not_handled_is_kept_by_the_attachment() -> None:
    model = nn.ModuleDict({"known": make_model(), "odd": nn.ModuleDict({"kqv": nn.Linear(8, 24)})})
    with pytest.warns(UserWarning, match=r"^odd is not decayed: kqv \(24, 8\) holds .* names=AttentionNames") as warned:
        groups = groups_of(model)
    assert len(warned) == 1
    optimizer = torch.optim.SGD(groups, lr=LR)
    attachment = rd.attach(optimizer)
    [said] = attachment.unhandled
    assert said.startswith("odd: kqv (24, 8) holds")
    assert "kqv (24, 8)" in attachment.describe()
    assert rd.attach(torch.optim.SGD(groups_of(make_model()), lr=LR)).unhandled == ()


def test_groups_made_before_to_empty_are_noticed_at_the_first_step() -> None:
    with torch.device("meta"):
        model = Model()
    optimizer = torch.optim.SGD(groups_of(model), lr=LR)
    rd.attach(optimizer)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"q_proj\.weight is on the meta device.*param_groups after it"):
        optimizer.step()


def test_an_assumed_order_is_in_the_description_and_not_in_the_state() -> None:
    attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
    model = nn.ModuleDict({"attn": attention})
    groups = rd.param_groups(model, query_key=rd.LowRank(0.1), num_heads=2)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attachment = rd.attach(optimizer)
    assert "assumed: attn.qkv.weight holds all queries, then all keys, then all values" in attachment.describe()
    assert attachment.unhandled == ()
    assert "assumed" not in str(optimizer.state_dict())
    known = nn.MultiheadAttention(8, 2)
    optimizer = torch.optim.SGD(rd.param_groups(known, query_key=rd.LowRank(0.1)), lr=0.1)
    assert "assumed" not in rd.attach(optimizer).describe()


def test_an_optimizer_that_is_collected_while_another_is_attached(monkeypatch):
    """One in a cycle of references lives until the collector runs, which may be in the middle of an attach."""

    def cyclic() -> None:
        optimizer = torch.optim.SGD(rd.param_groups(make_model(), query_key=rd.LowRank(1.0)), lr=0.1)
        rd.attach(optimizer)
        optimizer.itself = optimizer  # pyright: ignore[reportAttributeAccessIssue]

    living = attachment_module._living

    def then_collected():
        found = living()
        gc.collect()
        return found

    gc.collect()
    gc.disable()
    try:
        cyclic()
        assert len(living()) >= 1
        monkeypatch.setattr(attachment_module, "_living", then_collected)
        other = torch.optim.SGD(rd.param_groups(make_model(), query_key=rd.LowRank(1.0)), lr=0.1)
        assert rd.attach(other).optimizer is other
    finally:
        gc.enable()
