"""Where the matrices of a module lie: every family, head by head, against what the model itself computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.products import Rotary

from .computed import Products, check_layer, check_model, watched
from .families import TOKENS, TRANSFORMERS, build, randomised, run


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_each_head_is_what_the_model_computes(name: str) -> None:
    model = build(name)
    layers = rd.find_attention(model)
    assert len(layers) == TRANSFORMERS[name][-1]
    check_model(model, layers, lambda: run(name, model))


# ---- torch's own attention -------------------------------------------------------------------------------


def _attention(**how) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return randomised(nn.MultiheadAttention(32, 4, **how))


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_multihead_attention(batch_first: bool) -> None:
    attention = _attention(batch_first=batch_first).train()  # in eval mode it may be one fused kernel
    model = nn.ModuleDict({"attention": attention})
    x = torch.randn(2, TOKENS, 32)
    given = x if batch_first else x.transpose(0, 1)
    [layer] = rd.find_attention(model)
    assert layer.query.parameter_name == "attention.in_proj_weight"
    with watched(model, [layer]) as seen:
        out, _ = attention(given, given, given, need_weights=True, average_attn_weights=False)
    seen["attention"] = [x, out if batch_first else out.transpose(0, 1)]
    check_layer(layer, seen)


def test_multihead_attention_with_separate_widths() -> None:
    attention = _attention(kdim=24, vdim=16, batch_first=True)
    [layer] = rd.find_attention(attention)
    query, key, value = torch.randn(2, TOKENS, 32), torch.randn(2, 9, 24), torch.randn(2, 9, 16)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    products = Products()
    products.open.append(seen)
    with products:
        attention(query, key, value, need_weights=True)
    scores, mixing = [product for product in seen if product[0].shape[0] == 8]
    for view, x, formed in (
        (layer.query, query, scores[0]),
        (layer.key, key, scores[1].mT),
        (layer.value, value, mixing[1]),
    ):
        expected = torch.einsum("bti,hdi->bhtd", x, view.heads()) + view.bias().reshape(4, 1, -1)
        actual = formed.reshape(expected.shape)
        torch.testing.assert_close(actual / actual.norm(), expected / expected.norm())


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = randomised(nn.TransformerEncoder(block, 2, enable_nested_tensor=False))
    model.train()  # the inference path is one fused kernel, with nothing to watch inside
    layers = rd.find_attention(model)
    assert [layer.name for layer in layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    check_model(model, layers, lambda: model(torch.randn(2, TOKENS, 32)))


# ---- timm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 2),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "qk_norm": True}, 2),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 4}, 2),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}, 1),
    ],
)
def test_timm(timm, name: str, options: dict, count: int) -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=0, **options))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "rope") and name.startswith("eva"):
            module.rope = None
    layers = rd.find_attention(model)
    assert len(layers) == count
    size = options["img_size"]
    check_model(model, layers, lambda: model(torch.randn(2, 3, size, size)))


# ---- settings --------------------------------------------------------------------------------------------

ROTARY = {
    "gpt_neox": Rotary(2, False), "gptj": Rotary(4, True), "codegen": Rotary(4, True), "llama": Rotary(8, False),
    "mistral": Rotary(8, False), "qwen2": Rotary(8, False), "qwen3": Rotary(16, False), "gemma2": Rotary(16, False),
    "gemma3": Rotary(16, False), "olmo2": Rotary(8, False), "phi3": Rotary(8, False), "persimmon": Rotary(4, False),
    "modernbert": Rotary(8, False), "falcon-grouped": Rotary(8, False), "falcon-multi-head": Rotary(8, False),
    "falcon-multi-query": Rotary(8, False),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_positions_and_norms_are_seen(name):
    layer = rd.find_attention(build(name))[0]
    assert layer.rotary == ROTARY.get(name)
    assert layer.qk_norm == (name in ("qwen3", "gemma3", "olmo2", "persimmon"))


# ---- refusals --------------------------------------------------------------------------------------------


def test_heads_that_do_not_divide_are_refused() -> None:
    attention = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    attention.num_heads = 5
    with pytest.raises(ValueError, match=r"q_proj has 24 rows, and 5 heads"):
        rd.find_attention(attention)


def test_weights_that_are_no_matrices_are_refused() -> None:
    convolution = nn.ModuleDict({"qkv": nn.Conv2d(8, 24, 3), "proj": nn.Conv2d(8, 8, 1)})
    with pytest.raises(ValueError, match=r"qkv.weight has shape \(24, 8, 3, 3\), not that of a matrix"):
        rd.find_attention(convolution)
    flat = nn.ParameterDict({"q_proj": torch.zeros(64), "k_proj": torch.zeros(64), "v_proj": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2"):
        rd.find_attention(flat)
    sharded = nn.Module()
    sharded.register_parameter("_flat_param", nn.Parameter(torch.zeros(64)))
    with pytest.raises(ValueError, match=r"_flat_param is a flattened FSDP1 parameter"):
        rd.find_attention(sharded)


@pytest.mark.parametrize(
    "query", [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.ModuleList([nn.Linear(8, 4)] * 2)]
)
def test_a_projection_of_several_matrices_is_not_read_by_its_first(query) -> None:
    attention = nn.ModuleDict({"q": query, "k": nn.Linear(8, 8), "v": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
    attention.num_heads = 2
    with pytest.raises(ValueError, match="q is a sequence or a list of several matrices"):
        rd.find_attention(attention)


def test_queries_and_keys_in_one_projection() -> None:
    attention = nn.ModuleDict({"qk": nn.Linear(8, 16), "v": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
    attention.num_heads = 2
    [layer] = rd.find_attention(attention)
    assert [str(view.window) for view in layer.views[:2]] == ["rows[0:8]/16 by 4", "rows[8:16]/16 by 4"]
    attention["qk"] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="its queries may be their own keys"):
        rd.find_attention(attention)
    names = rd.AttentionNames(fused="qk", value="v", order="kq", output="proj")
    assert str(rd.find_attention(attention, names)[0].query.window) == "rows[4:8]/8 by 2"
