"""Which modules are attention, and what is said of those that cannot be read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.locate import Unhandled, locate
from rankdecay.attention.source import ModuleSource

from .families import build


def test_compiled_models_are_seen_through() -> None:
    [layer, _] = rd.find_attention(torch.compile(build("llama")))
    assert layer.query.parameter_name == "_orig_mod.model.layers.0.self_attn.q_proj.weight"


def test_tied_attention_is_listed_under_each_name() -> None:
    model = build("llama")
    first, second = (model.model.layers[i].self_attn.q_proj for i in range(2))
    second.weight = first.weight
    layers = rd.find_attention(model)
    assert layers[0].query.tensor().data_ptr() == layers[1].query.tensor().data_ptr()
    assert layers[0].query.parameter_name != layers[1].query.parameter_name


def test_latent_attention_is_named_with_the_reason() -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=50, q_lora_rank=16,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn: multi-head latent attention .*two factors"):
        rd.find_attention(model)
    both = nn.ModuleDict({"latent": model, "plain": build("llama")})
    with pytest.warns(UserWarning, match=r"latent.model.layers.0.self_attn is not handled: multi-head latent"):
        assert len(rd.find_attention(both)) == 2


class _Own(nn.Module):
    """Somebody's own attention: odd names, keys and values in one."""

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        self.asks = nn.Linear(24, 24, bias=False)
        self.answers = nn.Linear(24, 24)
        self.mix = nn.Linear(24, 24)
        if heads:
            self.num_heads = heads


def test_ones_own_attention_is_named_in_one_call() -> None:
    model = nn.Sequential(_Own(), _Own())
    names = rd.AttentionNames(query="asks", fused="answers", output="mix", num_heads=4)
    layers = rd.find_attention(model, names)
    assert [layer.name for layer in layers] == ["0", "1"]
    layer = layers[0]
    assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, 2, 6)
    assert torch.equal(layer.key.tensor(), model[0].answers.weight[:12])
    assert torch.equal(layer.value.bias(), model[0].answers.bias[12:])
    assert layer.output.heads().shape == (4, 24, 6)


def test_what_is_not_attention_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"no attention was found in Linear.*weight \(3, 4\).*names=AttentionNames"):
        rd.find_attention(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"got int"):
        rd.find_attention(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"under the names 'asks', 'answer'"):
        rd.find_attention(_Own(), rd.AttentionNames(query="asks", fused="answer", output="mix", num_heads=4))
    with pytest.raises(ValueError, match=r"asks has 24 rows, and an unknown number.*num_heads"):
        rd.find_attention(_Own(), rd.AttentionNames(query="asks", fused="answers"))


def test_the_first_row_of_names_that_matches_counts() -> None:
    both = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "query", "key", "value")})
    both.num_heads = 2
    [found], unhandled = locate(ModuleSource(both))
    assert found.places["query"].parameter == "q_proj.weight"
    assert unhandled == []


def test_a_number_of_heads_given_overrides_the_settings() -> None:
    attention = nn.ModuleDict({"qkv": nn.Linear(16, 48)})
    attention.num_heads = 4
    [found], _ = locate(ModuleSource(attention), num_heads=2)
    assert found.head_dim == 8


def test_what_is_not_handled_says_where_and_why() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q", "k", "v")})})
    found, [module] = locate(ModuleSource(model))
    assert found == []
    assert str(module).startswith("a: q has 24 rows")
    assert str(Unhandled("", "flattened")) == "the model: flattened"
