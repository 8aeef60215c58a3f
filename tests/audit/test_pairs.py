"""Multiplicative pairs: partners, coincidences and adapters."""

import torch
from torch import nn

from rankdecay.audit import audit
from tests import needs
from tests.attention import families

from .models import PAIR, UNKNOWN, kinds, language_model, row


def test_gains_gates_and_partners():
    report = audit(*language_model("qwen3"))
    layer = "model.layers.1"
    assert row(report, f"{layer}.self_attn.q_norm.weight").partner == f"{layer}.self_attn.k_norm.weight"
    assert row(report, f"{layer}.mlp.up_proj.weight").partner == f"{layer}.mlp.down_proj.weight"
    assert row(report, f"{layer}.mlp.gate_proj.weight").kind == "neither"
    assert row(report, f"{layer}.input_layernorm.weight").kind == "neither"
    value = row(report, f"{layer}.self_attn.v_proj.weight", "value", head=1)
    assert value.partner == f"{layer}.self_attn.o_proj.weight output heads 2–3"
    assert row(report, f"{layer}.self_attn.o_proj.weight", "output", head=3).partner.endswith(
        "v_proj.weight value head 1"
    )
    assert (
        "effective learning rate; low-rank decay also turns it (tangential share"
        in row(report, f"{layer}.self_attn.q_proj.weight", "query").words
    )


def test_a_stored_gain_minus_one_is_no_factor():
    model, loss = language_model("gemma3")
    name = "model.layers.1.self_attn.q_norm.weight"
    assert row(audit(model, loss), name).words == "zero: there is nothing to decay yet."
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            nn.init.constant_(norm.weight, 0.5)
    assert row(audit(model, loss), name).kind == "pair"  # equal sides: the equation holds by coincidence
    assert row(audit(model, loss, confirm=True), name).kind == "neither"
    nn.init.constant_(model.model.layers[1].self_attn.k_norm.weight, 0.3)
    assert row(audit(model, loss), name).kind == "neither"


def test_adapters():
    peft = needs.package("peft")
    model, _ = language_model("llama", torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(3, families.VOCABULARY, (2, 7))
    report = audit(model.eval(), lambda: model(input_ids=ids, labels=ids).loss)
    factors = [found for found in report.rows if "lora" in found.name]
    assert {found.kind for found in factors} == PAIR
    assert all("nuclear norm" in found.words for found in factors)
    assert kinds(report, "query") == UNKNOWN  # frozen


def test_a_pair_is_both_sides_or_none():
    for name in ("llama", "gpt2", "opt"):
        report = audit(*language_model(name))
        wholes = {f"{found.name} {found.part}".strip(): found for found in report.rows if found.head is None}
        partners = {key: found.partner for key, found in wholes.items() if found.partner and found.role != "bias"}
        assert partners
        assert all(partners[partner] == key for key, partner in partners.items())
