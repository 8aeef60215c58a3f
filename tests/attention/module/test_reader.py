"""Where the matrices of a module lie: every family, head by head, against what the model itself computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention import AttentionLayer
from rankdecay.attention.products import Rotary
from tests import needs
from tests.attention import comparison
from tests.attention.computed import Products, check_layer, check_model, watched
from tests.attention.families import TOKENS, TRANSFORMERS, build, randomised, run
from tests.attention.interventions import check_heads, prepared
from tests.attention.layouts import LAYERS, LAYOUTS, build_layout


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
    with pytest.raises(ValueError, match=r"q_proj: its 24 rows do not split into 5 heads"):
        rd.find_attention(attention)
    with pytest.raises(ValueError, match=r"q_proj has 24 rows, but 4 heads of 5 have 20: omit head_dim= where"):
        rd.find_attention(attention, head_dim=5)


def test_weights_that_are_no_matrices_are_refused() -> None:
    convolution = nn.ModuleDict({"qkv": nn.Conv2d(8, 24, 3), "proj": nn.Conv2d(8, 8, 1)})
    with pytest.raises(ValueError, match=r"qkv.weight has shape \(24, 8, 3, 3\): not a matrix"):
        rd.find_attention(convolution)
    flat = nn.ParameterDict({"q_proj": torch.zeros(64), "k_proj": torch.zeros(64), "v_proj": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2"):
        rd.find_attention(flat)
    sharded = nn.Module()
    sharded.register_parameter("_flat_param", nn.Parameter(torch.zeros(64)))
    with pytest.raises(ValueError, match=r"_flat_param is a flattened FSDP1 parameter"):
        rd.find_attention(sharded)


# ---- layouts of their own --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_head_is_where_its_window_says(name: str, tmp_path: Path) -> None:
    model = build_layout(name)
    generator = torch.Generator().manual_seed(1)
    ids, image = torch.randint(3, 50, (1, 6), generator=generator), torch.randn(1, 3, 128, 128, generator=generator)
    given = image.double() if name == "levit" else ids
    layers = check_heads(model, lambda: model(given))
    assert len(layers) == LAYERS.get(name, 1)
    model.save_pretrained(tmp_path)
    _check_same(layers, rd.find_attention(tmp_path))


def _check_same(live: list[AttentionLayer], stored: list[AttentionLayer]) -> None:
    """A file has no modules, and yet is read as the model is; its names may be others."""
    assert len(live) == len(stored)
    for one, other in zip(live, stored, strict=True):
        for field in ("head_dim", "rotary", "qk_norm", "grouping", "no_product", "place"):
            assert getattr(one, field) == getattr(other, field), field
        assert [view.role for view in one.views] == [view.role for view in other.views]
        for mine, theirs in zip(one.views, other.views, strict=True):
            assert str(mine.window) == str(theirs.window)
            torch.testing.assert_close(mine.heads(), theirs.heads())
            assert (mine.bias() is None) == (theirs.bias() is None)


def _of_conditional_detr() -> tuple[nn.Module, Callable[[], object]]:
    from transformers.models.conditional_detr import modeling_conditional_detr as family

    config = family.ConditionalDetrConfig(d_model=32, decoder_attention_heads=4, decoder_ffn_dim=64)
    config._attn_implementation = "eager"
    layer = prepared(family.ConditionalDetrDecoderLayer(config))
    x, places, encoded, at = (torch.randn(1, n, 32) for n in (5, 5, 7, 7))
    how = {"spatial_position_embeddings": at, "query_position_embeddings": places, "query_sine_embed": places}
    return layer, lambda: layer(x, encoder_hidden_states=encoded, is_first=True, **how)


def _of_grounding_dino() -> tuple[nn.Module, Callable[[], object]]:
    from transformers.models.grounding_dino import modeling_grounding_dino as family

    config = family.GroundingDinoConfig(d_model=32, encoder_ffn_dim=64, encoder_attention_heads=8)
    fusion = prepared(family.GroundingDinoBiMultiHeadAttention(config))
    image, text = torch.randn(1, 5, 32), torch.randn(1, 7, 32)

    def run() -> tuple[Tensor, Tensor]:
        (of_image, _), (of_text, _) = fusion(image, text)
        return of_image, of_text

    return nn.ModuleDict({"fusion": fusion}), run


def _of_florence() -> tuple[nn.Module, Callable[[], object]]:
    from transformers.models.florence2 import modeling_florence2 as family

    config = family.Florence2VisionConfig(embed_dim=(32,), num_groups=(4,), num_heads=(2,), qkv_bias=True)
    config._attn_implementation = "eager"
    channels = prepared(family.Florence2VisionChannelAttention(config, 0))
    x = torch.randn(1, 6, 32)
    return nn.ModuleDict({"channel_attn": channels}), lambda: channels(x)


@pytest.mark.parametrize(
    ("build_part", "roles"),
    [
        pytest.param(_of_conditional_detr, [{"query_position", "key_position"}] * 2, id="conditional_detr"),
        pytest.param(_of_grounding_dino, [set(), set()], id="grounding_dino"),
        pytest.param(_of_florence, [set()], id="florence2"),
    ],
)
def test_each_head_of_a_part_is_where_its_window_says(build_part, roles: list[set[str]]) -> None:
    needs.package("transformers")
    torch.manual_seed(0)
    model, run = build_part()
    layers = check_heads(model, run)
    assert [set(layer.factors) - {"query_sine"} for layer in layers] == roles


def test_scores_of_channels_are_no_product() -> None:
    needs.package("transformers")
    [layer] = rd.find_attention(_of_florence()[0])
    assert layer.num_heads == 4  # groups
    with pytest.raises(ValueError, match=r"channel_attn takes its scores between channels, not tokens"):
        layer.query_key()


def test_a_gate_inside_the_queries_is_no_part_of_them() -> None:
    model = build_layout("qwen3_next")
    [layer] = rd.find_attention(model)
    attention = model.model.layers[0].self_attn
    queries = attention.q_proj.weight.detach().view(4, 2, 8, 32)
    assert torch.equal(layer.query.heads(), queries[:, 0])
    assert torch.equal(layer.factors["gate"].heads(), queries[:, 1])


def test_grouped_factors_of_outputs_are_a_matrix_for_each_group() -> None:
    model = build_layout("deepseek_v4")
    [layer] = rd.find_attention(model)
    assert layer.value.window == layer.key.window
    assert layer.factors["output_factor"].heads().shape == (2, 8, 32)
    seen: list[Tensor] = []
    module = model.model.layers[0].self_attn.o_a_proj
    handle = module.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
    model(torch.randint(3, 50, (1, 6)))
    handle.remove()
    expected = torch.einsum("btgi,goi->btgo", seen[0], layer.factors["output_factor"].heads())
    torch.testing.assert_close(seen[1].reshape(expected.shape), expected)


# ---- by hand ---------------------------------------------------------------------------------------------


class _Hand(nn.Module):
    """Attention of 4 query heads of 6 by a softmax, from queries, keys and values (batch, heads, tokens, 6)."""

    def __init__(self, **weights: Any) -> None:
        super().__init__()
        self.num_heads = 4
        for name, weight in weights.items():
            setattr(self, name, weight if isinstance(weight, nn.Module) else nn.Parameter(weight))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 6**0.5, -1) @ v


class _Stacked(_Hand):
    """TransformerLens: one (in, head_dim) matrix a head."""

    def __init__(self) -> None:
        shapes = {"W_Q": (4, 16, 6), "W_K": (2, 16, 6), "W_V": (2, 16, 6), "W_O": (4, 6, 16)}
        super().__init__(**{name: torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bti,hid->bhtd", x, w) for w in (self.W_Q, self.W_K, self.W_V))
        z = self.mix(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        return torch.einsum("bhtd,hdo->bto", z, self.W_O)


class _Convolved(_Hand):
    """Convolutions of one place, of an image."""

    def __init__(self) -> None:
        super().__init__(to_qkv=nn.Conv2d(16, 72, 1, bias=False), to_out=nn.Conv2d(24, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        image = x.mT.unflatten(-1, (2, -1))
        q, k, v = self.to_qkv(image).flatten(2).unflatten(1, (3, 4, 6)).mT.unbind(1)
        return self.to_out(self.mix(q, k, v).mT.flatten(1, 2).unflatten(-1, (2, -1))).flatten(2).mT


class _Strided(_Hand):
    """x-transformers: query head i meets key head i mod 2."""

    def __init__(self) -> None:
        linears = {"to_q": (16, 24), "to_k": (16, 12), "to_v": (16, 12), "to_out": (24, 16)}
        super().__init__(**{name: nn.Linear(*sizes, bias=False) for name, sizes in linears.items()})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, 6)).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.mix(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)).transpose(1, 2).flatten(2))


class _Behind(_Hand):
    """Projections behind a norm each, in a sequence."""

    def __init__(self) -> None:
        linears = {name: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24)) for name in ("q_proj", "k_proj", "v_proj")}
        super().__init__(**linears, o_proj=nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.mix(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [_Stacked, _Convolved, _Strided, _Behind])
def test_each_head_of_a_module_by_hand(kind: type[_Hand], tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = prepared(nn.ModuleDict({"layers": nn.ModuleList([kind()])})), torch.randn(1, 6, 16)
    names = ()
    if kind is _Strided:
        how = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out", "grouping": "strided"}
        names = (rd.AttentionNames(**how),)
        find = rd.find_attention
        monkeypatch.setattr(rd, "find_attention", lambda model: find(model, names))
    [layer] = check_heads(model, lambda: model["layers"][0](x))
    assert {view.role for view in layer.views} == {"query", "key", "value", "output"}
    monkeypatch.undo()
    torch.save(model.half().state_dict(), tmp_path / "weights.pt")
    [stored] = rd.find_attention(tmp_path / "weights.pt", names, num_heads=4)
    _check_same([layer], [stored])


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(16, 6, bias=False) for _ in range(3))


@pytest.mark.parametrize("called", ["heads", "sa"])
@pytest.mark.parametrize("stated", [None, 4])
def test_a_module_for_each_head(called: str, stated: int | None) -> None:
    attention = nn.Module()
    attention.add_module(called, nn.ModuleList([_Head() for _ in range(4)]))
    attention.proj = nn.Linear(24, 16)
    if stated:
        attention.num_heads = stated
    layers = rd.find_attention(nn.ModuleDict({"attention": attention}))
    assert [layer.num_heads for layer in layers] == [1] * 4
    for i, layer in enumerate(layers):
        assert torch.equal(layer.query.heads()[0], getattr(attention, called)[i].query.weight)
        assert torch.equal(layer.output.tensor(), attention.proj.weight[:, 6 * i : 6 * i + 6])


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({name: nn.Conv2d(16, 16, 1, groups=4) for name in ("q", "k", "v")},
         r"q\.weight is the weight of a grouped conv"),
        ({name: torch.zeros(4, 6, 16) for name in ("W_Q", "W_K", "W_V")},
         r"4 matrices of \(in, head_dim\) were expected"),
        ({name: nn.ModuleList([nn.Linear(16, 6) for _ in range(4)]) for name in ("q_proj", "k_proj", "v_proj")},
         r"q_proj holds several matrices \(0.weight, 1.weight, .*\), not one: merge them .* exclude="),
        ({"qkv": torch.zeros(3, 16, 16)}, r"qkv has shape \(3, 16, 16\): not a matrix; store it as"),
        ({"to_qk": nn.Linear(16, 32), "to_v": nn.Linear(16, 16)},
         r"to_qk \(32, 16\) holds queries and keys in an unknown .*fused='to_qk', value='to_v', order='qk' or 'kq'"),
        ({"to_qk": nn.Linear(16, 16), "to_v": nn.Linear(16, 16)},
         r"to_qk is no higher than to_v: its queries may be their own keys.*exclude="),
        ({"qkvg": nn.Linear(16, 64)}, r"qkvg \(64, 16\) holds"),
        ({"query_key_value": nn.Linear(16, 48)}, r"query_key_value \(48, 16\) holds"),
        ({name: nn.Linear(16, 16) for name in ("q1", "q2", "k1", "k2", "v")},
         r"q1 .* are named like projections to queries and keys"),
        ({name: nn.Linear(16, 16) for name in ("q_proj", "o_proj")}, r"queries without a projection to keys"),
        ({name: nn.Linear(16, 16) for name in ("key", "value")}, r"keys and values without a projection to queries"),
        ({name: nn.Linear(16, 16) for name in ("q_proj", "k_proj", "v_proj", "gk_proj")}, r"gated linear attention"),
    ],
)  # fmt: skip
def test_what_is_stored_otherwise_is_refused_by_name(weights: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rd.find_attention(nn.ModuleDict({"attention": _Hand(**weights)}))


def _of_linears(count: int, **widths: int) -> nn.Module:
    """Attention of `count` heads, from square projections but for those whose height is given."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    attention = nn.ModuleDict({name: nn.Linear(32, widths.get(name, 32), bias=False) for name in names})
    attention.num_heads = count
    return attention


LLAMA = rd.AttentionNames(query="q_proj", key="k_proj", value="v_proj", output="o_proj")


def test_what_a_refusal_says_to_do_is_not_refused() -> None:
    attention = _of_linears(5)  # by a setting that is wrong
    with pytest.raises(ValueError, match=r"5 heads.*; pass names=AttentionNames\(..., num_heads=...\)"):
        rd.find_attention(attention)
    assert rd.find_attention(attention, replace(LLAMA, num_heads=4))[0].head_dim == 8
    few = _of_linears(2, k_proj=96, v_proj=96)
    with pytest.raises(ValueError, match=r"2 query heads are not a multiple of 6 key heads; .* pass names="):
        rd.find_attention(few)
    stack = _Hand(**{name: torch.zeros(4, 6, 16) for name in ("W_Q", "W_K", "W_V")})
    with pytest.raises(ValueError, match=r"or pass names=AttentionNames\(..., head_dim=16\)"):
        rd.find_attention(stack)
    names = rd.AttentionNames(query="W_Q", key="W_K", value="W_V", head_dim=16)
    [group, *_] = [
        g for g in rd.param_groups(stack, query_key=rd.LowRank(0.1), names=names) if g["role"] == "query_key"
    ]
    assert group["param_names"] == ["W_Q", "W_K"]


def test_heads_of_a_tower_that_its_configuration_does_not_state() -> None:
    model, _ = _of_conditional_detr()
    model.self_attn.config.num_attention_heads = 8  # of the encoder
    assert [layer.num_heads for layer in rd.find_attention(model)] == [4, 4]


def test_a_number_of_heads_given_reaches_latent_attention(tmp_path: Path) -> None:
    model = build_layout("deepseek_v3")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"kv_b_proj: the number of heads in its 56 rows is unknown"):
        rd.find_attention(tmp_path / "weights.pt")
    [live], [stored] = rd.find_attention(model), rd.find_attention(tmp_path / "weights.pt", num_heads=4)
    assert [str(view.window) for view in live.views] == [str(view.window) for view in stored.views]


@pytest.mark.parametrize(
    "query", [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.ModuleList([nn.Linear(8, 4)] * 2)]
)
def test_a_projection_of_several_matrices_is_not_read_by_its_first(query) -> None:
    attention = nn.ModuleDict({"q": query, "k": nn.Linear(8, 8), "v": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
    attention.num_heads = 2
    with pytest.raises(ValueError, match=r"q holds several matrices \(0.weight, .*\), not one"):
        rd.find_attention(attention)


def test_queries_and_keys_in_one_projection() -> None:
    attention = nn.ModuleDict({"qk": nn.Linear(8, 16), "v": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
    attention.num_heads = 2
    [layer] = rd.find_attention(attention)
    assert [str(view.window) for view in layer.views[:2]] == ["rows[0:8]/16 by 4", "rows[8:16]/16 by 4"]
    attention["qk"] = nn.Linear(8, 8)
    names = rd.AttentionNames(fused="qk", value="v", order="kq", output="proj")
    for given in (None, names, replace(names, output="missing")):
        with pytest.raises(ValueError, match=r"its queries may be their own keys.*exclude=.*head_dim="):
            rd.find_attention(attention, given)
    with pytest.raises(ValueError, match="2 heads of 4 queries and keys have 16: pass their actual size"):
        rd.find_attention(attention, replace(names, head_dim=4))
    assert str(rd.find_attention(attention, replace(names, head_dim=2))[0].query.window) == "rows[4:8]/8 by 2"
    del attention.num_heads
    assert rd.find_attention(attention, replace(names, head_dim=2))[0].num_heads == 2


def test_parameters_of_a_module_are_turned_as_shapes_tell_or_refused() -> None:
    def attention(*shapes: tuple[int, int]) -> nn.Module:
        module = nn.Module()
        for name, shape in zip(("w_q", "w_k", "w_v", "w_o"), shapes, strict=True):
            module.register_parameter(name, nn.Parameter(torch.randn(shape)))
        module.num_heads = 4
        return module

    turned = attention((8, 16), (8, 4), (8, 4), (16, 8))  # x @ W
    [layer] = rd.find_attention(turned)
    assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, 1, 4)
    assert torch.equal(layer.query.tensor(), turned.w_q.T)
    assert torch.equal(layer.output.tensor(), turned.w_o.T)
    square = attention(*[(8, 8)] * 4)
    with pytest.raises(ValueError, match=r"w_q and w_k and w_v are parameters .* transposed="):
        rd.find_attention(square)
    for transposed in (False, True):
        names = rd.AttentionNames(query="w_q", key="w_k", value="w_v", output="w_o", transposed=transposed)
        [layer] = rd.find_attention(square, names)
        assert torch.equal(layer.query.tensor(), square.w_q.T if transposed else square.w_q)


def test_separate_conv1d_layers_are_transposed_also_where_they_are_square() -> None:
    from transformers.pytorch_utils import Conv1D

    attention = nn.ModuleDict({name: Conv1D(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    attention.num_heads = 2
    [layer] = rd.find_attention(attention)
    assert torch.equal(layer.query.tensor(), attention["q_proj"].weight.T)
    assert torch.equal(layer.output.tensor(), attention["o_proj"].weight.T)


def test_what_to_do_about_weights_that_nothing_says_are_transposed(tmp_path: Path) -> None:
    """A GPT-2 without biases: to give the number of heads, which is known, would change nothing."""
    weights = {"attn.c_attn.weight": torch.randn(8, 24), "attn.c_proj.weight": torch.randn(8, 8)}
    torch.save(weights, tmp_path / "gpt2.pt")
    with pytest.raises(ValueError, match=r"do not split into 2 heads; .*AttentionNames\(..., transposed"):
        rd.find_attention(tmp_path / "gpt2.pt", num_heads=2)
    names = rd.AttentionNames(fused="c_attn", output="c_proj", transposed=True)
    [layer] = rd.find_attention(tmp_path / "gpt2.pt", names, num_heads=2)
    assert torch.equal(layer.key.tensor(), weights["attn.c_attn.weight"][:, 8:16].T)


# ---- rows that take turns, and key heads that do ---------------------------------------------------------


class _TakingTurns(nn.Module):
    """The order of rows of EDM's U-Nets: a row of the queries, one of the keys and one of the values in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x) * 4, 8, 3, -1).unbind(2)
        weights = torch.einsum("ncq,nck->nqk", q, k / 8**0.5).softmax(-1)
        return self.proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape))


def test_rows_that_take_turns_can_be_said() -> None:
    torch.manual_seed(0)
    attention = prepared(_TakingTurns())
    names = rd.AttentionNames(fused="qkv", layout="alternating", output="proj")
    [layer] = rd.find_attention(attention, names=names)
    assert str(layer.key.window) == "rows[1:2]/3*32 by 8"
    x = torch.randn(1, 32, 3, 3)
    with torch.no_grad():
        assert not list(comparison.check(attention, layer, lambda: attention(x)))
    [wrong] = rd.find_attention(attention)
    assert "order" in wrong.unknown
    with torch.no_grad():
        assert list(comparison.check(attention, wrong, lambda: attention(x)))
    assert any("layout=alternating" in note for note in rd.inspect(attention).notes)


def test_keys_and_values_may_take_turns_beside_queries() -> None:
    attention = nn.ModuleDict({"q": nn.Linear(32, 32), "kv": nn.Linear(32, 32), "proj": nn.Linear(32, 32)})
    names = rd.AttentionNames(query="q", fused="kv", layout="alternating", output="proj", num_heads=4)
    [layer] = rd.find_attention(attention, names=names)
    assert torch.equal(layer.value.tensor(), attention["kv"].weight[1::2])
    assert (layer.num_heads, layer.num_key_value_heads) == (4, 2)


def test_which_key_head_a_query_head_meets_may_be_unknown() -> None:
    attention = nn.ModuleDict({name: nn.Linear(32, size) for name, size in zip("qkvo", (32, 16, 16, 32), strict=True)})
    attention.num_heads = 4
    assert any("which key head each query head uses" in note for note in rd.inspect(attention).notes)
    said = rd.AttentionNames(query="q", key="k", value="v", output="o", grouping="strided")
    report = rd.inspect(attention, names=said)
    assert not any("which key head each query head uses" in note for note in report.notes)


class _Local(_Hand):
    """Values reach the output by a convolution over tokens, too: LePE of CSWin and BiFormer, `pe` of YOLO."""

    def __init__(self, convolution: nn.Module) -> None:
        linears = {name: nn.Linear(24, 24) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        super().__init__(**linears, lepe=convolution)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.mix(q, k, v)
        by_head = self.lepe.groups == 4
        local = self.lepe(v) if by_head else self.lepe(v.transpose(2, 3).flatten(1, 2)).unflatten(1, (4, 6)).mT
        return self.o_proj((out + local).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("convolution", "said"),
    [
        (nn.Conv1d(24, 24, 3, padding=1, groups=24), "has a convolution over tokens, lepe, which may be of its values"),
        (nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4), ""),  # of each head: Nyströmformer's
    ],
)
def test_a_convolution_of_values_beside_attention(convolution: nn.Module, said: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = prepared(nn.ModuleDict({"local": _Local(convolution)})), torch.randn(1, 6, 24)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for source in (model, tmp_path / "weights.pt"):
        [layer] = rd.find_attention(source, num_heads=4)
        assert layer.no_value_product == said
    assert not list(comparison.check(model, rd.find_attention(model)[0], lambda: model["local"](x)))


def test_a_convolution_of_values_in_branches_or_in_a_layer_of_its_own() -> None:
    def branch() -> nn.Module:
        return nn.ModuleDict({"get_v": nn.Conv2d(16, 16, 3, groups=16)})

    layer_of_its_own = nn.ModuleDict({"conv": nn.Conv2d(32, 32, 3, groups=32), "bn": nn.BatchNorm2d(32)})
    for others in ({"attns": nn.ModuleList([branch(), branch()])}, {"pe": layer_of_its_own}):
        [layer] = rd.find_attention(_of_heads(**others))
        assert layer.no_value_product.startswith("has a convolution over tokens, ")
    [layer] = rd.find_attention(_of_heads(sr=nn.Conv2d(32, 32, 2, 2, groups=32)))
    assert layer.has_value_product


class QKVAttentionLegacy(nn.Module):
    """OpenAI's: queries, keys and values of one head after another."""

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(1, (4, 3, 8)).unbind(2)
        return (v @ torch.softmax(q.mT @ k / 8**0.5, -1).mT).flatten(1, 2)


class AttentionBlock(nn.Module):
    """Of OpenAI's U-Nets and latent diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(4, 32), nn.Conv1d(32, 96, 1), nn.Conv1d(32, 32, 1)
        self.attention = QKVAttentionLegacy()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.attention(self.qkv(self.norm(x))))


def test_the_order_is_that_of_the_module_that_attends() -> None:
    torch.manual_seed(0)
    model, x = prepared(nn.ModuleDict({"middle": AttentionBlock()})), torch.randn(1, 32, 6)
    [layer] = rd.find_attention(model)
    assert "order" not in layer.unknown
    assert not list(comparison.check(model, layer, lambda: model["middle"](x)))


# ---- between heads and output ------------------------------------------------------------------------------


def _of_heads(**others: nn.Module | Tensor) -> nn.Module:
    """Attention of 4 heads of 8, with something beside its projections."""
    attention = _of_linears(4)
    for name, other in others.items():
        setattr(attention, name, nn.Parameter(other) if isinstance(other, Tensor) else other)
    return attention


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("linear_g", nn.Linear(32, 32)),  # EsmFold, OpenFold
        ("proj_g", nn.Linear(32, 32, bias=False)),  # Boltz
        ("to_v_gate", nn.Linear(32, 32)),  # x-transformers
        ("to_gates", nn.Sequential(nn.Linear(32, 32), nn.Sigmoid())),  # lucidrains' AlphaFold 3
        ("g_proj", nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))),
        ("wg", nn.Linear(32, 32)),
        ("output_gate", nn.Linear(32, 4)),
        ("to_gates", nn.Sequential(nn.Linear(32, 4), nn.Sigmoid())),
        ("gate_up_proj", nn.Linear(32, 32)),
    ],
)
def test_a_gate_between_heads_and_output_is_known_by_name_and_height(name: str, gate: nn.Module, tmp_path) -> None:
    each = not any(p.shape[0] == 32 for p in gate.parameters()) or "up" in name
    attention = _of_heads(**{name: gate})
    if name == "output_gate":
        with pytest.raises(ValueError, match="lightning attention"):
            rd.find_attention(attention)
        return
    torch.save(attention.state_dict(), tmp_path / "weights.pt")
    for source in (attention, tmp_path / "weights.pt"):
        [layer] = rd.find_attention(source, num_heads=4)
        assert layer.has_value_product == each
        assert each or layer.no_value_product == "gates what its heads give before the output projection"


def test_the_gate_of_esmfold_and_of_krea(diffusers) -> None:
    family = needs.package("transformers.models.esm.modeling_esmfold")
    from diffusers.models.transformers.transformer_krea2 import Krea2Attention

    gated = family.EsmFoldAttention(32, 32, 32, 8, 4, gating=True)
    for attention in (gated, Krea2Attention(32, 4, 4)):
        [layer] = rd.find_attention(attention, num_heads=4)
        assert layer.no_value_product == "gates what its heads give before the output projection"
    assert rd.find_attention(family.EsmFoldAttention(32, 32, 32, 8, 4, gating=False), num_heads=4)[0].has_value_product


@pytest.mark.parametrize("name", ["attn_ln", "out_norm", "sub_norm", "inner_attn_ln", "head_norm"])
def test_a_norm_between_heads_and_output_is_known_by_name(name: str) -> None:
    [layer] = rd.find_attention(_of_heads(**{name: nn.LayerNorm(32)}))
    assert layer.no_value_product == "normalises what its heads give before the output projection"


class MAB(_Hand):
    """Set Transformer's: the output projection is part of a network of what heads give."""

    def __init__(self) -> None:
        super().__init__(**{name: nn.Linear(24, 24) for name in ("fc_q", "fc_k", "fc_v", "fc_o")})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, 6)).transpose(1, 2) for linear in (self.fc_q, self.fc_k, self.fc_v))
        out = (q + self.mix(q, k, v)).transpose(1, 2).flatten(2)
        return out + torch.relu(self.fc_o(out))


def test_values_that_are_given_beside_the_output_projection_too() -> None:
    torch.manual_seed(0)
    model, x = prepared(nn.ModuleDict({"mab": MAB()})), torch.randn(1, 6, 24)
    [layer] = rd.find_attention(model)
    assert layer.no_value_product == "adds its values, too, to what its output projection gives"
    wrong = [said for said in comparison.check(model, layer, lambda: model["mab"](x)) if "values:" not in said]
    assert wrong == []


@pytest.mark.parametrize("part", ["vision_transformer.Attention", "eva.EvaAttention"])
def test_a_norm_of_what_heads_give_in_timm(timm, part: str) -> None:
    module, _, name = part.partition(".")
    build_attention = getattr(getattr(timm.models, module), name)
    for scaled in (False, True):
        [layer] = rd.find_attention(build_attention(32, 4, norm_layer=nn.LayerNorm, scale_norm=scaled))
        assert layer.has_value_product == (not scaled)


@pytest.mark.parametrize("called", ["norm", "ln", "layer_norm", "attn_norm", "norm_out"])
def test_a_norm_that_may_stand_on_either_side_is_told_by_its_width_or_said(called: str, tmp_path) -> None:
    def attention(width: int, **size: int) -> nn.Module:
        return _of_heads(**{called: nn.LayerNorm(width)}, **{k: nn.Linear(32, v, bias=False) for k, v in size.items()})

    wide = {"q_proj": 64, "k_proj": 64, "v_proj": 64}
    before = attention(32, **wide)
    before.o_proj = nn.Linear(64, 32)
    behind = attention(64, **wide)
    behind.o_proj = nn.Linear(64, 32)
    [one], [other] = rd.find_attention(before), rd.find_attention(behind)
    assert (one.has_value_product, one.remark) == (True, "")
    assert not other.has_value_product
    either = attention(32)
    torch.save(either.state_dict(), tmp_path / "weights.pt")
    for source in (either, tmp_path / "weights.pt"):
        assert any(f"its {called} is assumed to come before" in n for n in rd.inspect(source, num_heads=4).notes)


# ---- what scales or convolves queries and keys --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "of_channels"), [((), False), ((1,), False), ((4,), False), ((4, 1, 1), True), ((1, 1, 1), True)]
)
def test_a_temperature_is_of_channels_only_where_its_shape_says_so(shape, of_channels, tmp_path) -> None:
    """That of attention in a locality (LSA) is a number beside scores between tokens."""
    attention = _of_heads(temperature=torch.ones(shape))
    torch.save(attention.state_dict(), tmp_path / "weights.pt")
    for source in (attention, tmp_path / "weights.pt"):
        [layer] = rd.find_attention(source, num_heads=4)
        assert layer.has_score_product == layer.has_value_product == (not of_channels)


@pytest.mark.parametrize(
    ("name", "scale", "is_product"),
    [
        ("per_dim_scale", torch.ones(8), False),  # Gemma 3n's audio, VideoPrism
        ("scaling", torch.ones(8), False),  # TimesFM
        ("q_scale", torch.ones(32), False),
        ("sqk", torch.ones(32), False),  # nGPT
        ("k_scale", torch.ones(4, 1, 8)[:1], False),
        ("scale", torch.ones(1), True),
        ("scale", torch.ones(4, 1, 1), True),
        ("scale", torch.ones(32), True),  # of what the module gives
        ("temperature", torch.ones(4), True),
    ],
)
def test_a_scale_of_each_coordinate_is_no_product(name: str, scale: Tensor, is_product: bool, tmp_path) -> None:
    attention = _of_heads(**{name: scale})
    torch.save(attention.state_dict(), tmp_path / "weights.pt")
    for source in (attention, tmp_path / "weights.pt"):
        [layer] = rd.find_attention(source, num_heads=4)
        assert layer.has_score_product == is_product
    if not is_product:
        with pytest.raises(ValueError, match="scales queries or keys coordinate by coordinate"):
            layer.query_key()


def test_the_scale_of_timesfm() -> None:
    transformers = needs.package("transformers")
    config = transformers.TimesFmConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, head_dim=8, num_hidden_layers=1
    )
    [layer] = rd.find_attention(transformers.TimesFmModel(config))
    assert layer.no_product.startswith("scales queries or keys coordinate by coordinate")
    with pytest.raises(ValueError, match="its scores are not computed from"):
        layer.query_key()


class _Shifted(nn.Module):
    """Enformer, and the conformer of sooftware: a bias of the queries that meet keys, and another of positions."""

    def __init__(self, bias: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = 4
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.called = bias
        self.register_parameter(bias, nn.Parameter(torch.randn(shape)))

    def scores(self, x: Tensor) -> Tensor:
        q, k = (linear(x).unflatten(-1, (4, 8)).transpose(0, 1) for linear in (self.to_q, self.to_k))
        return (q + getattr(self, self.called).reshape(4, 1, 8)) @ k.mT


@pytest.mark.parametrize(("bias", "shape"), [("u_bias", (4, 8)), ("rel_content_bias", (1, 4, 1, 8))])
def test_what_is_added_to_queries_that_meet_keys_is_their_bias(bias: str, shape: tuple[int, ...], tmp_path) -> None:
    attention, x = _Shifted(bias, shape), torch.randn(5, 32)
    torch.save(attention.state_dict(), tmp_path / "weights.pt")
    for source in (attention, tmp_path / "weights.pt"):
        [layer] = rd.find_attention(source, num_heads=4)
        queries = (x @ layer.query.tensor().mT + layer.query.bias()).unflatten(-1, (4, 8)).transpose(0, 1)
        keys = (x @ layer.key.tensor().mT).unflatten(-1, (4, 8)).transpose(0, 1)
        torch.testing.assert_close(queries @ keys.mT, attention.scores(x))


MIXERS = {"mix_heads_pre_attn": (4, 4), "pre_softmax_talking_heads": (4, 4, 1, 1), "proj_l": (4, 4)}


@pytest.mark.parametrize("name", MIXERS)
def test_heads_whose_scores_are_mixed_are_spoken_of(name: str, tmp_path) -> None:
    attention = _of_heads(**{name: torch.randn(MIXERS[name])})
    torch.save(attention.state_dict(), tmp_path / "weights.pt")
    for source in (attention, tmp_path / "weights.pt"):
        notes = rd.inspect(source, num_heads=4).notes
        assert any("scores are mixed before the softmax" in note for note in notes)
    [layer] = rd.find_attention(_of_heads(proj_l=torch.randn(4, 32)))
    assert layer.remark == ""


def test_norms_of_queries_and_keys_may_be_one_child(tmp_path) -> None:
    """Flux's own code and files."""
    attention = _of_heads(norm=nn.ModuleDict({"query_norm": nn.RMSNorm(8), "key_norm": nn.RMSNorm(8)}))
    torch.save(attention.state_dict(), tmp_path / "weights.pt")
    for source in (attention, tmp_path / "weights.pt"):
        [layer] = rd.find_attention(source, num_heads=4)
        assert (layer.qk_norm, layer.has_value_product, layer.remark) == (True, True, "")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"proj_e": nn.Linear(32, 32)}, "by the edge between two nodes"),  # graph transformers
        ({"proj_e": nn.Linear(32, 4)}, ""),  # a bias of the scores of each head
        ({"bt_proj": nn.Linear(32, 4)}, "reflects keys by what stands between the tokens"),  # fla's PaTH
    ],
)
def test_what_weighs_each_coordinate_by_the_tokens_is_no_product(others: dict[str, nn.Module], said: str) -> None:
    [layer] = rd.find_attention(_of_heads(**others))
    assert layer.no_product.endswith(said)
    assert bool(layer.no_product) == bool(said)


# ---- no softmax over scores -------------------------------------------------------------------------------


class LinearAttention(nn.ModuleDict):
    """As lucidrains and fla call theirs."""


class MultiScaleRetention(nn.ModuleDict):
    """As torchscale calls its own."""


class AFTFull(nn.ModuleDict):
    """An attention-free transformer."""


class HydraAttention(nn.ModuleDict):
    """As many heads as coordinates, without a softmax."""


class ABCAttention(nn.ModuleDict):
    """As fla calls its own."""


class TTTLinear(nn.ModuleDict):
    """As its authors call theirs."""


class LambdaLayer(nn.ModuleDict):
    """As lucidrains calls his."""


class BilinearAttentionPool(nn.ModuleDict):
    """Of a softmax."""


@pytest.mark.parametrize(
    ("kind", "others", "reason"),
    [
        (LinearAttention, {}, "linear attention by its class"),
        (MultiScaleRetention, {}, "retention by its class"),
        (AFTFull, {}, "an attention-free transformer"),
        (HydraAttention, {}, "linear attention"),
        (ABCAttention, {}, "a bounded memory"),
        (TTTLinear, {}, "trained by gradient steps on its keys"),
        (LambdaLayer, {}, "keys go through a softmax without queries"),
        (nn.ModuleDict, {"to_q_attn_logits": nn.Linear(8, 1, bias=False)}, "additive attention"),  # Fastformer
        (nn.ModuleDict, {"attn_mlp": nn.Linear(8, 8)}, "vector attention"),  # point transformers
        (BilinearAttentionPool, {}, None),
        (nn.ModuleDict, {"feature_map_q": nn.Linear(8, 8), "feature_map_k": nn.Linear(8, 8)}, "linear attention"),
        (nn.ModuleDict, {"g_proj": nn.Linear(32, 32), "group_norm": nn.GroupNorm(4, 32, affine=False)}, "retention"),
        (nn.ModuleDict, {"group_norm": nn.GroupNorm(4, 32)}, None),
    ],
)
def test_attention_without_a_softmax_is_named(kind: type[nn.ModuleDict], others: dict, reason: str | None) -> None:
    attention = kind({n: nn.Linear(32, 32) for n in ("q_proj", "k_proj", "v_proj", "o_proj")} | others)
    attention.num_heads = 4
    if reason is None:
        assert len(rd.find_attention(attention)) == 1
        return
    with pytest.raises(ValueError, match=reason):
        rd.find_attention(attention)


@pytest.mark.parametrize("name", ["{}_dconv", "{}_conv", "{}_short_conv", "{}_dwconv1d"])
def test_convolutions_behind_projections_are_no_product(name: str, tmp_path) -> None:
    """Primer's and Canon's: nothing of them is not handled, and nothing of the products is claimed."""
    for letters, scores, values in (("qkv", False, False), ("v", True, False), ("k", False, True)):
        convolutions = {name.format(letter): nn.Conv1d(32, 32, 3, groups=32) for letter in letters}
        attention = _of_heads(**convolutions)
        torch.save(attention.state_dict(), tmp_path / "weights.pt")
        for source in (attention, tmp_path / "weights.pt"):
            [layer] = rd.find_attention(source, num_heads=4)
            assert layer.has_score_product == scores
            assert layer.has_value_product == values
            assert rd.inspect(source, num_heads=4).unhandled == []


def test_a_convolution_behind_a_fused_projection_is_no_product() -> None:
    model = nn.ModuleDict({"qkv": nn.Conv2d(32, 96, 1), "qkv_dwconv": nn.Conv2d(96, 96, 3, groups=96)})
    model["project_out"] = nn.Conv2d(32, 32, 1)
    model.num_heads = 4
    [layer] = rd.find_attention(model)
    assert layer.no_product == "convolves queries or keys over tokens"
    assert layer.no_value_product == "convolves values over tokens"
    only = nn.ModuleDict({f"{n}_conv": nn.Conv1d(32, 32, 3, groups=32) for n in "qkv"})
    only.num_heads = 4
    with pytest.raises(ValueError, match="not a matrix"):
        rd.find_attention(only)


@pytest.mark.parametrize(
    ("norms", "second", "expected"),
    [
        ("q_norm k_norm", "cross_{}", (True, False)),
        ("q_norm k_norm cross_q_norm cross_k_norm", "cross_{}", (True, True)),
        ("cross_q_norm cross_k_norm", "cross_{}", (False, True)),
        ("norm_q norm_k norm_added_q norm_added_k", "add_{}_proj", (True, True)),
        ("q_rms_norm q_rms_norm_t", "{}_proj_t", (True, True)),
        ("q_rms_norm_t", "{}_proj_t", (False, True)),
        ("attn_q_norm", "cross_{}", (True, False)),
    ],
)
def test_the_norms_of_one_attention_are_not_those_of_another(norms: str, second: str, expected) -> None:
    others = {second.format(letter): nn.Linear(32, 32) for letter in "qkvo"}
    attention = _of_heads(**others, **{name: nn.LayerNorm(8) for name in norms.split()})
    first, other = rd.find_attention(attention)
    assert (first.qk_norm, other.qk_norm) == expected
    for layer in (first, other):
        assert layer.qk_norm != ("qk_norm" in layer.unknown)
    [said] = rd.find_attention(_of_heads(q_norm=nn.LayerNorm(8)))
    assert said.qk_norm


# ---- a part of the heads ---------------------------------------------------------------------------------


def _cut(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def test_pruned_heads_are_not_read_as_all_heads_of_another_size(tmp_path: Path) -> None:
    transformers = needs.package("transformers")
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50)
    weights, kept = transformers.GPT2Model(config).state_dict(), [*range(8), *range(16, 32)]
    for name in ("weight", "bias"):
        fused = weights[f"h.0.attn.c_attn.{name}"]
        weights[f"h.0.attn.c_attn.{name}"] = torch.cat([part[..., kept] for part in fused.split(32, -1)], -1)
    weights["h.0.attn.c_proj.weight"] = weights["h.0.attn.c_proj.weight"][kept]
    _cut(tmp_path, weights, config.to_dict() | {"pruned_heads": {"0": [1]}})
    report = rd.inspect(tmp_path)
    assert {row["layer"] for row in report.rows} == {1}
    assert "4 heads of 8 (width 32), but its weights hold only 3" in report.unhandled[0]
    first, second = rd.find_attention(tmp_path, rd.AttentionNames(fused="c_attn", output="c_proj", head_dim=8))
    assert [(layer.num_heads, layer.head_dim) for layer in (first, second)] == [(3, 8), (4, 8)]
    assert torch.equal(first.query.tensor(), weights["h.0.attn.c_attn.weight"][:, :24].T)


@pytest.mark.parametrize("fused", [True, False])
def test_a_slice_of_tensor_parallelism_is_refused(tmp_path: Path, fused: bool) -> None:
    """vLLM's sharded_state: each file has some heads of every layer."""
    shapes = {"qkv_proj": (64, 64)} if fused else {"q_proj": (32, 64), "k_proj": (16, 64), "v_proj": (16, 64)}
    weights = {
        f"model.layers.0.self_attn.{name}.weight": torch.randn(shape)
        for name, shape in (shapes | {"o_proj": (64, 32)}).items()
    }
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    _cut(tmp_path, weights, config)
    with pytest.raises(ValueError, match="hold only 2: either it is one of several tensor-parallel slices"):
        rd.find_attention(tmp_path)
    _cut(tmp_path, weights, config | {"head_dim": 8})  # stated to be as narrow
    assert [(layer.num_heads, layer.head_dim) for layer in rd.find_attention(tmp_path)] == [(4, 8)]
