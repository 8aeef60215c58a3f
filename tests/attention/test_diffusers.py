"""Attention of diffusers and open_clip: found as its own forward pass uses it, or named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention import AttentionLayer
from rankdecay.attention.locate import locate
from rankdecay.attention.source import open_source

from .rescaled import contradictions, randomise

X, TEXT = torch.randn(2, 9, 32), torch.randn(2, 5, 24)


def _checked(model: nn.Module, forward: Callable[[], object], names: list[str]) -> list[AttentionLayer]:
    randomise(model)
    layers = rd.find_attention(model)
    assert [layer.name for layer in layers] == names
    for layer in layers:
        assert layer.output is not None
        assert contradictions(model, layer, forward) == []
    return layers


# ---- diffusers ------------------------------------------------------------------------------------------------


def test_attention_of_one_input(diffusers):
    from diffusers.models.attention_processor import Attention

    attention = Attention(32, heads=4, dim_head=8, bias=True)
    [layer] = _checked(attention, lambda: attention(X), [""])
    assert (layer.num_heads, layer.head_dim, layer.qk_norm) == (4, 8, False)


def test_cross_attention_whose_keys_have_another_width(diffusers):
    from diffusers.models.attention_processor import Attention

    attention = Attention(32, cross_attention_dim=24, heads=4, dim_head=8)
    [layer] = _checked(attention, lambda: attention(X, encoder_hidden_states=TEXT), [""])
    assert (layer.query.shape, layer.key.shape, layer.value.shape) == ((32, 32), (32, 24), (32, 24))


def test_grouped_heads_and_norms_of_queries_and_keys(diffusers):
    from diffusers.models.attention_processor import Attention

    attention = Attention(32, heads=4, kv_heads=2, dim_head=8, qk_norm="rms_norm")
    layer = rd.find_attention(randomise(attention))[0]
    assert (layer.num_heads, layer.num_key_value_heads, layer.qk_norm) == (4, 2, True)


def test_joint_attention_of_two_inputs(diffusers):
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    attention = Attention(
        32, heads=4, dim_head=8, added_kv_proj_dim=24, context_pre_only=False, bias=True, out_dim=32,
        processor=JointAttnProcessor2_0(),
    )  # fmt: skip
    randomise(attention)
    layers = rd.find_attention(attention)
    assert [layer.name for layer in layers] == ["", ":add_q_proj"]
    assert [view.parameter_name for view in layers[1].views] == [
        "add_q_proj.weight", "add_k_proj.weight", "add_v_proj.weight", "to_add_out.weight",
    ]  # fmt: skip


def test_the_text_of_hidream_has_an_output_of_its_own(diffusers):
    from diffusers.models.transformers.transformer_hidream_image import HiDreamAttention, HiDreamAttnProcessor

    attention = HiDreamAttention(query_dim=32, heads=4, dim_head=8, processor=HiDreamAttnProcessor(), out_dim=32)
    image, text = rd.find_attention(nn.ModuleDict({"attn": attention}))
    assert [layer.output and layer.output.parameter_name for layer in (image, text)] == [
        "attn.to_out.weight", "attn.to_out_t.weight",
    ]  # fmt: skip


def test_text_that_is_not_passed_on_has_no_output(diffusers):
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    attention = Attention(  # the last layer of Stable Diffusion 3
        32, heads=4, dim_head=8, added_kv_proj_dim=24, context_pre_only=True, bias=True, out_dim=32,
        processor=JointAttnProcessor2_0(),
    )  # fmt: skip
    found, unhandled = locate(open_source(attention))
    assert [layer.places["query"].parameter for layer in found] == ["to_q.weight", "add_q_proj.weight"]
    assert "output" not in found[1].places
    assert unhandled == []


def test_keys_of_a_second_input_meet_the_same_queries(diffusers):
    from diffusers.models.attention_processor import Attention

    attention = Attention(32, heads=4, dim_head=8, added_kv_proj_dim=24, context_pre_only=None, qk_norm="rms_norm")
    layers = rd.find_attention(attention)
    assert [(layer.query.parameter_name, layer.key.parameter_name) for layer in layers] == [
        ("to_q.weight", "to_k.weight"),
        ("to_q.weight", "add_k_proj.weight"),
    ]
    assert all(layer.output is not None and layer.qk_norm for layer in layers)


def test_flux_has_outputs_that_an_mlp_shares_and_positions_that_nothing_states(diffusers):
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    double, added, single = rd.find_attention(randomise(model))
    assert "rotary" in single.unknown
    assert all(layer.qk_norm for layer in (double, added, single))
    assert str(single.output and single.output.window) == "columns[0:32]/160 by 8"
    assert (single.output and single.output.parameter_name) == "single_transformer_blocks.0.proj_out.weight"
    inputs = {
        "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 24),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.ones(1), "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3), "return_dict": False,
    }  # fmt: skip
    for layer in (double, added):  # values of each go to both outputs
        assert contradictions(model, layer, lambda: model(**inputs), bent=True) == []
    assert contradictions(model, single, lambda: model(**inputs)) == []


def test_what_is_named(diffusers):
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
    from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention

    with pytest.raises(ValueError, match="queries, keys, values and the hidden layer of an MLP"):
        rd.find_attention(Flux2ParallelSelfAttention(32, heads=4, dim_head=8))
    sana = SanaMultiscaleLinearAttention(32, 32, num_attention_heads=4, attention_head_dim=8)
    with pytest.raises(ValueError, match="linear attention"):
        rd.find_attention(sana)


def test_a_map_before_attention_is_no_projection(diffusers):
    mapped = nn.ModuleDict({"kv_mapper": nn.Sequential(nn.SiLU(), nn.Linear(24, 32)), "norm": nn.LayerNorm(32)})
    found, unhandled = locate(open_source(mapped))
    assert (found, unhandled) == ([], [])


#: Names of projections in classes of diffusers called attention; a new one fails, so that somebody looks at it.
SPELLINGS = set(
    """
    add_k_proj add_q_proj add_v_proj img_attn_qkv img_qkv_proj k k_img k_proj key kv_linear q q_img q_linear q_proj
    qkv query to_added_kv to_added_qkv to_k to_k_custom_diffusion to_k_ip to_k_t to_key to_kv to_q
    to_q_custom_diffusion to_q_t to_qkv to_qkv_mlp_proj to_query to_v to_v_custom_diffusion to_v_ip to_v_t to_value
    txt_attn_qkv txt_kv_proj v v_img v_proj value
    """.split()  # noqa: SIM905 - easier to read and sort as words
)


def test_every_name_of_a_projection_is_known(diffusers):
    said = set[str]()
    for file in Path(diffusers.__file__).parent.glob("models/**/*.py"):
        for part in re.split(r"^class ", file.read_text(), flags=re.M)[1:]:
            if re.match(r"\w*Att(entio)?n", part):
                said |= set(re.findall(r"self\.(\w+) = (?:torch\.)?nn\.(?:Linear|Conv\dd)\(", part))
    looks = re.compile(r"(?<![a-z])(q|k|v|qkv|kv|qk|query|key|value)(?![a-z])|qkv")
    assert {name for name in said if looks.search(name)} - SPELLINGS == set()


# ---- open_clip: modules of the structure of its own, whose package needs others to be imported ---------------------


class OpenClipAttention(nn.Module):
    """``open_clip.transformer.Attention``: one parameter for all, and a learned temperature of cosines."""

    def __init__(self, dim: int, num_heads: int, cosine: bool, norms: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.ln_q = nn.LayerNorm(self.head_dim) if norms else nn.Identity()
        self.ln_k = nn.LayerNorm(self.head_dim) if norms else nn.Identity()
        self.logit_scale = nn.Parameter(torch.ones(num_heads, 1, 1)) if cosine else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        q, k = self.ln_q(q), self.ln_k(k)
        if self.logit_scale is not None:
            scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT * self.logit_scale.exp()
        else:
            scores = self.scale * q @ k.mT
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("cosine", "norms"), [(False, False), (True, False), (False, True)])
def test_open_clip(cosine, norms):
    model = nn.ModuleDict({"attn": OpenClipAttention(32, 4, cosine, norms)})
    attention = model["attn"]
    if norms:  # a norm of layers lets a factor through where there is a bias before it
        attention.in_proj_bias.requires_grad_(False)
    [layer] = _checked(model, lambda: attention(X), ["attn"])
    assert layer.qk_norm == (cosine or norms)


class AttentionalPooler(nn.Module):
    """``open_clip.transformer.AttentionalPooler`` of CoCa: learned queries, keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 32))
        self.attn = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(32), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_k(x)
        return self.attn(self.ln_q(self.query).expand(len(x), -1, -1), x, x, need_weights=False)[0]


def test_pooler_with_learned_queries():
    pooler = AttentionalPooler()
    found, unhandled = locate(open_source(pooler))
    assert [layer.name for layer in found] == ["attn"]
    assert unhandled == []
    [layer] = _checked(pooler, lambda: pooler(TEXT), ["attn"])
    assert layer.key.shape == (32, 24)
    assert not layer.qk_norm


def test_linear_attention_by_its_processor(diffusers, tmp_path):
    """Sana's has the class and the names of any other; a file says the model's class."""
    from diffusers import SanaTransformer2DModel

    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=4,
    )  # fmt: skip
    sana.save_pretrained(tmp_path)
    for source in (sana, tmp_path):
        found, unhandled = locate(open_source(source))
        assert [layer.name for layer in found] == ["transformer_blocks.0.attn2"]
        [reason] = unhandled
        assert "linear attention: a ReLU of queries and keys, without a softmax" in str(reason)
