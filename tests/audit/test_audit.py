"""The audit against the known symmetries of real classes, and what it refuses."""

import pytest
import torch
from torch import nn

from rankdecay.audit import audit

from .models import INVARIANT, NEITHER, PAIR, kinds, language_model


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize(
    ("name", "query_key", "by_head", "value_output"),
    [
        ("qwen3", INVARIANT, INVARIANT, PAIR),
        ("gemma3", INVARIANT, INVARIANT, INVARIANT),  # a norm after attention: W_V and W_O are invariant as wholes
        ("olmo2", INVARIANT, NEITHER, INVARIANT),  # one norm over all heads
        ("persimmon", INVARIANT, INVARIANT, PAIR),  # with biases
        ("llama", PAIR, PAIR, PAIR),
        ("qwen2", PAIR, PAIR, PAIR),  # biases and rotary positions
        ("gpt2", PAIR, PAIR, PAIR),
        ("gptj", PAIR, PAIR, PAIR),
        ("gpt_neox", PAIR, PAIR, PAIR),
        ("falcon-grouped", PAIR, PAIR, PAIR),  # fused, interleaved, grouped
        ("bloom", PAIR, PAIR, PAIR),  # ALiBi
    ],
)
def test_attention_of_real_models(name, query_key, by_head, value_output, confirm):
    report = audit(*language_model(name), confirm=confirm)
    for part in ("query", "key"):
        assert kinds(report, part) == query_key
        assert kinds(report, part, head=True) == by_head
    for part in ("value", "output"):
        assert kinds(report, part) == value_output
        assert kinds(report, part, head=True) == PAIR
    for found in report.rows:
        if found.part and found.role != "bias" and found.kind != "neither":
            assert found.confirmed is (True if confirm else None)


def test_evidence_is_sharp_in_float64():
    report = audit(*language_model("llama"))
    for found in report.rows:
        if found.kind == "pair":
            assert found.balance < 1e-12
        if found.part == "query":
            assert found.euler > 1e-2
    report = audit(*language_model("qwen3"))
    assert all(found.euler < 1e-5 for found in report.rows if found.part in ("query", "key"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "expected"), [("qwen3", INVARIANT), ("llama", PAIR)])
def test_lower_precision(name, expected, dtype):
    report = audit(*language_model(name, dtype), confirm=dtype == torch.float32)
    assert kinds(report, "query", head=True) == kinds(report, "key", head=True) == expected
    assert kinds(report, "value") == PAIR


def test_the_model_is_left_as_it_was():
    model, loss = language_model("falcon-grouped")
    model.transformer.h[0].mlp.dense_h_to_4h.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def breaks():
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("out of memory")
        return loss()

    audit(model, loss, confirm=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        audit(model, breaks, confirm=True)
    assert model.training
    assert model.lm_head.weight.grad is kept
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_already_computed_keeps_its_graph():
    model, loss = language_model("llama")
    value = loss()
    assert kinds(audit(model, value), "query") == PAIR
    value.backward()


def test_errors_say_the_remedy():
    model = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    cases = [
        (TypeError, "function of no arguments", lambda: audit(model, 3.0)),  # pyright: ignore
        (TypeError, "returned float", lambda: audit(model, lambda: 3.0)),  # pyright: ignore
        (TypeError, "torch.nn.Module", lambda: audit(x, lambda: x.sum())),  # pyright: ignore
        (ValueError, r"\.mean\(\)", lambda: audit(model, lambda: model(x))),
        (ValueError, "no graph", lambda: audit(model, model(x).sum().detach())),
        (ValueError, "does not depend", lambda: audit(model, nn.Linear(2, 1)(x).sum())),
        (ValueError, "finite", lambda: audit(model, lambda: model(x).sum() / 0)),
        (ValueError, "tolerance", lambda: audit(model, model(x).sum(), tolerance=2.0)),
        (ValueError, "its value", lambda: audit(model, model(x).sum(), confirm=True)),
        (ValueError, "eval", lambda: audit(model, lambda: (model(x) * torch.rand(2)).sum(), confirm=True)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        audit(model, lambda: model(x.requires_grad_()).sum())


def test_names_that_match_nothing():
    from rankdecay import AttentionNames

    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no attention"):
        audit(model, model(torch.ones(2)).sum(), names=AttentionNames(fused="nothing"))
