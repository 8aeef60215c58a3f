"""Names of projections: which are complete, what each says, and no alarm where there is no attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.locate import locate
from rankdecay.attention.names import (
    FUSED,
    is_fused_like,
    is_input_like,
    is_key_like,
    is_query_key_norm,
    is_query_like,
    is_value_like,
)
from rankdecay.attention.source import ModuleSource
from tests import needs


def test_three_projections_or_a_fused_one_are_needed() -> None:
    for given in ({}, {"query": "q"}, {"query": "q", "key": "k"}, {"fused": "qkv", "key": "k"}):
        with pytest.raises(ValueError, match=r"expected query, key and value, or fused alone"):
            rd.AttentionNames(**given)


def test_a_query_beside_a_fused_parameter_leaves_keys_and_values_in_it() -> None:
    assert rd.AttentionNames(query="q", fused="kv").order == "kv"
    assert rd.AttentionNames(fused="qkv").order == "qkv"


@pytest.mark.parametrize("given", [{"num_heads": 0}, {"head_dim": 2.0}, {"blocks": True}])
def test_numbers_are_whole_and_positive(given) -> None:
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=rf"^{name}={value} must be a whole number >= 1$"):
        rd.AttentionNames(fused="qkv", **given)


def test_one_output_name_or_several() -> None:
    assert rd.AttentionNames(fused="qkv", output="out").outputs == ("out",)
    assert rd.AttentionNames(fused="qkv", output=("out", "proj")).outputs == ("out", "proj")
    assert rd.AttentionNames(fused="qkv").outputs == ()


def test_no_known_row_is_hidden_by_an_earlier_one() -> None:
    """A row without a condition matches wherever all its projections exist, so none of its supersets may follow it."""
    for i, row in enumerate(FUSED):
        for earlier in FUSED[:i]:
            assert earlier.when is not None or not set(earlier.projections) <= set(row.projections), (earlier, row)


# ---- the grammar -----------------------------------------------------------------------------------------

#: Names of query, key, value and output that somebody has given them.
SPELLINGS = [
    "q_proj k_proj v_proj o_proj", "Wq Wk Wv Wo", "W_Q W_K W_V W_O", "wq wk wv wo",
    "linear_q linear_k linear_v linear_out", "lin_q lin_k lin_v lin_out", "to_q to_k to_v to_out",
    "toQ toK toV toOut", "toqueries tokeys tovalues unifyheads",
    "qProj kProj vProj oProj", "queryProj keyProj valueProj outProj", "QueryProj KeyProj ValueProj OutProj",
    "w_qs w_ks w_vs fc", "queries keys values fc_out", "query_layer key_layer value_layer out_layer",
    "proj_query proj_key proj_value proj_output", "dense_q dense_k dense_v dense_out", "Q K V O",
    "query_projection key_projection value_projection out_projection", "attn_q attn_k attn_v attn_output",
    "projection_query projection_key projection_value projection_output", "project_q project_k project_v attention_out",
    "img_q img_k img_v img_o", "W_query W_key W_value out_proj", "q_fc k_fc v_fc o_fc",
]  # fmt: skip


def _linears(*children: str) -> nn.Module:
    module = nn.Module()
    module.num_heads = 2
    for child in children:
        setattr(module, child, nn.Linear(8, 8, bias=False))
    return module


@pytest.mark.parametrize("names", SPELLINGS)
def test_three_names_that_differ_in_one_word_are_a_projection_each(names: str) -> None:
    given = names.split()
    model = nn.ModuleDict({"layers": nn.ModuleList([_linears(*given)])})
    found, unhandled = locate(ModuleSource(model))
    assert unhandled == []
    [layer] = found
    expected = [f"layers.0.{child}.weight" for child in given]
    assert [layer.places[role].parameter for role in ("query", "key", "value", "output")] == expected


@pytest.mark.parametrize(
    "name",
    ["sequence", "monkey", "keyword", "evaluate", "turkey_proj", "token_proj", "tok", "kernel", "qa_outputs",
     "q_norm", "k_bias", "query_embed", "q_lora_a", "ln_q", "queue", "vq", "quantize", "conv", "equal"],
)  # fmt: skip
def test_a_word_inside_another_says_nothing(name: str) -> None:
    assert not is_input_like(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [("to_q", "query"), ("add_k_proj", "key"), ("W_V", "value"), ("Wqkv", "fused"), ("to_kv", "fused"),
     ("qk_proj", "fused"), ("query_key_value", "fused"), ("key_value", "fused"), ("wk", "key"),
     ("in_proj_weight", "fused")],
)  # fmt: skip
def test_one_name_says_one_thing(name: str, says: str) -> None:
    kinds = {"query": is_query_like, "key": is_key_like, "value": is_value_like, "fused": is_fused_like}
    assert [kind for kind, is_like in kinds.items() if is_like(name)] == [says]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("q_norm", True), ("ln_query", True), ("norm_k", True), ("q_rmsnorm", True), ("qk_layernorm", True),
     ("kNorm", True), ("logit_scale", True), ("query_ln", True), ("q_a_layernorm", False), ("kv_a_layernorm", False),
     ("norm", False), ("input_layernorm", False), ("normal", False), ("q_proj", False), ("kv_norm", False)],
)  # fmt: skip
def test_norms_of_queries_and_keys(name: str, expected: bool) -> None:
    assert is_query_key_norm(name) == expected


# ---- models without attention ----------------------------------------------------------------------------

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
WITHOUT_ATTENTION = {
    "Mamba": _SMALL, "Mamba2": _SMALL | {"num_heads": 8, "head_dim": 8, "n_groups": 2}, "FalconMamba": _SMALL,
    "Rwkv": _SMALL, "ResNet": {}, "RegNet": {}, "ConvNext": {}, "ConvNextV2": {}, "MobileNetV1": {}, "MobileNetV2": {},
    "EfficientNet": {}, "Bit": {}, "FocalNet": {}, "PoolFormer": {}, "FNet": {}, "Encodec": {},
    "PatchTSMixer": {}, "UnivNet": {},
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_models_of_transformers_without_attention_raise_no_alarm(name: str) -> None:
    transformers = needs.package("transformers")
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**WITHOUT_ATTENTION[name]))
    assert locate(ModuleSource(model)) == ([], [])


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def _kernels() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


def _module(**children: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=name)
        for name, model in {
            "LSTM": nn.LSTM(8, 8, 2),
            "GRU": nn.GRU(8, 8),
            "MLP": _mlp(),
            "bilinear": nn.Bilinear(3, 4, 5),
            "MoCo": _module(encoder_q=_kernels(), encoder_k=_kernels()),
            "memory encoders": _module(query_encoder=_mlp(), key_encoder=_mlp(), value_encoder=_mlp()),
            "soft actor-critic": _module(q1=_mlp(), q2=_mlp(), v=nn.Linear(8, 1), policy=_mlp()),
            "duelling Q-network": _module(value=nn.Linear(8, 1), advantage=nn.Linear(8, 4)),
            "deep Q-network": _module(q_net=_mlp(), q_net_target=_mlp(), q=nn.Linear(8, 4)),
            "RWKV by hand": _module(
                att=_linears("key", "value", "receptance", "output"), ffn=_linears("key", "value", "receptance")
            ),
            "LSTM by hand": _linears("W_i", "W_f", "W_o", "W_c", "U_i", "U_f", "U_o", "U_c"),
            "gated MLP": _linears("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"),
            "VQ-VAE": _module(quantize=nn.Embedding(8, 8), pre_quant_conv=nn.Conv2d(8, 8, 1)),
            "keyed embedding": _module(key=nn.Embedding(4, 4), v=nn.Linear(16, 1)),
        }.items()
    ],
)
def test_other_models_without_attention_raise_no_alarm(model: nn.Module) -> None:
    assert locate(ModuleSource(model)) == ([], [])


# ---- several attentions in one module ---------------------------------------------------------------------

SETS = [
    ("to_q to_k to_v to_out", "to_q_t to_k_t to_v_t to_out_t"),
    ("to_q to_k to_v to_out", "to_q_cond to_k_cond to_v_cond to_out_cond"),
    ("q k v proj", "q_cross k_cross v_cross proj_cross"),
    ("q_proj k_proj v_proj o_proj", "q_proj_txt k_proj_txt v_proj_txt out_txt"),
    ("q_proj k_proj v_proj o_proj", "q_proj_moe_gen k_proj_moe_gen v_proj_moe_gen o_proj_moe_gen"),
    ("self_q self_k self_v self_out", "cross_q cross_k cross_v cross_out"),
]


def _linear_layers(*children: str) -> nn.Module:
    module = nn.ModuleDict({child: nn.Linear(32, 32, bias=False) for child in children})
    module.num_heads = 4  # pyright: ignore[reportArgumentType]
    return nn.ModuleDict({"attn": module})


@pytest.mark.parametrize("sets", SETS)
def test_each_attention_of_a_module_has_an_output_of_its_own(sets: tuple[str, str]) -> None:
    first, second = (names.split() for names in sets)
    model = _linear_layers(*second, *first)
    found = {tuple(view.parameter_name.split(".")[1] for view in layer.views) for layer in rd.find_attention(model)}
    assert found == {tuple(first), tuple(second)}
    roles = {n: group["role"] for group in rd.param_groups(model, rd.Frobenius(0.1)) for n in group["param_names"]}
    assert roles[f"attn.{second[-1]}.weight"] == "value_output"


@pytest.mark.parametrize("sets", SETS)
def test_the_output_of_one_attention_is_not_taken_for_that_of_another(sets: tuple[str, str]) -> None:
    first, second = (names.split() for names in sets)
    for whole, rest in ((first, second), (second, first)):
        found, unhandled = locate(ModuleSource(_linear_layers(*whole, *rest[:-1])))
        outputs = {layer.places["query"].parameter: layer.places.get("output") for layer in found}
        assert outputs[f"attn.{rest[0]}.weight"] is None
        kept = outputs[f"attn.{whole[0]}.weight"]
        assert kept is not None
        assert kept.parameter == f"attn.{whole[-1]}.weight"
        [told] = unhandled
        assert "its output projection was not found" in told.reason
        assert whole[-1] in told.reason


def test_an_output_with_any_name_is_of_one_attention() -> None:
    model = _linear_layers("query", "key", "value", "query_x", "key_x", "value_x", "dense")
    found, [told] = locate(ModuleSource(model))
    assert ["output" in layer.places for layer in found] == [True, False]
    assert "dense is that of another attention in the module" in told.reason
