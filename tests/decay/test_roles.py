"""Roles of parameters, by place, name and shape."""

import torch
from torch import nn

from rankdecay.attention.layer import WHOLE
from rankdecay.decay.roles import assign_roles
from tests.decay.models import Nano


def roles_of(model: nn.Module) -> dict[str, str]:
    assigned, _ = assign_roles(model)
    return {name: "+".join(dict.fromkeys(b.role for b in entry.blocks)) for entry in assigned for name in entry.names}


def test_every_parameter_has_the_role_its_place_says():
    roles = roles_of(Nano(tied=False))
    assert roles["wte.weight"] == roles["pos_embed"] == roles["lm_head.weight"] == "embedding"
    assert roles["h.1.attn.c_attn.weight"] == "query_key+value_output"
    assert roles["h.1.attn.c_proj.weight"] == "value_output"
    assert roles["h.0.mlp.0.weight"] == roles["h.1.mlp.2.weight"] == "mlp"
    assert roles["h.0.ln_1.weight"] == "norm"
    assert roles["h.0.ln_1.bias"] == roles["h.0.attn.c_attn.bias"] == roles["probe.bias"] == "bias"
    assert roles["scale"] == roles["probe.weight"] == "other"


def test_a_block_knows_its_window_and_its_reason():
    by_name = {entry.names[0]: entry for entry in assign_roles(Nano(tied=False))[0]}
    fused = by_name["h.0.attn.c_attn.weight"].blocks
    assert [block.why for block in fused] == ["query", "key", "value"]
    assert [str(block.labelled_window()) for block in fused] == [
        "query: rows[0:16]/48 by 8", "key: rows[16:32]/48 by 8", "value: rows[32:48]/48 by 8"
    ]  # fmt: skip
    [output] = by_name["h.1.attn.c_proj.weight"].blocks
    assert str(output.labelled_window()) == "columns[0:16]/16 by 8"  # alone in its parameter: no name needed
    for name in ("wte.weight", "h.0.ln_1.weight", "scale", "h.0.mlp.0.weight"):
        [block] = by_name[name].blocks
        assert block.window is WHOLE
        assert block.labelled_window() is WHOLE


def test_a_tied_parameter_has_the_roles_of_all_its_names_that_say_something():
    model = nn.Module()
    model.wte = nn.Embedding(11, 16)
    model.other = nn.Linear(16, 11, bias=False)
    model.other.weight = model.wte.weight
    [entry] = assign_roles(model)[0]
    assert entry.names == ["wte.weight", "other.weight"]
    assert [block.role for block in entry.blocks] == ["embedding"]


def test_names_of_adapters_and_tokens_tell_their_roles():
    model = nn.Module()
    model.proj = nn.Module()
    model.proj.lora_A = nn.Linear(4, 2, bias=False)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.gate = nn.Parameter(torch.zeros(4))
    assert roles_of(model) == {"proj.lora_A.weight": "other", "cls_token": "embedding", "gate": "other"}
