"""Every attention class of timm: found, and as its own forward pass uses it; or named; or listed here with the reason.

Two independent ways: :data:`MODELS` are built on the meta device, and a rule of this file's own says which of their
modules look like attention; :data:`MODULES` are built small by themselves and run.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.locate import SearchOptions, locate
from rankdecay.attention.source import open_source

from .rescaled import contradictions, planes_turned, randomise

#: One model, and mostly the smallest, for each class that looks like attention.
MODELS = """
    bat_resnext26ts beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_tiny coatnet_0_224 convit_tiny
    cpubone_b0_bfrobust crossvit_tiny_240 csatv2 davit_base_fl davit_tiny deepseek_vit_412m eca_botnext26ts_256
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
    fastvit_mci0 gcvit_xxtiny gemma4_vit_167m halonet_h1 hiera_tiny_224 iformer_t lambda_resnet26t levit_128s
    lowformer_b0 maxvit_tiny_pm_256 maxvit_tiny_tf_224 mobilenetv4_hybrid_medium_075 mobilevitv2_050 mvitv2_tiny
    nest_tiny nextvit_small pvt_v2_b0 resnest14d resnet50_clip sam2_hiera_tiny samvit_base_patch16_224 shvit_s1
    skresnet18 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_vit3
    test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny
    vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 volo_d1_224
    xcit_nano_12_p8_224 focalnet_tiny_srf convnext_atto
    """.split()  # noqa: SIM905 - a list of this length is easier to read and sort as words

#: Classes that look like attention and are named, never read: what the reason has to say.
NAMED = {
    "layers.diff_attention.DiffAttention": "differential attention",
    "layers.lambda_layer.LambdaLayer": "lambda layer",
    "models.coat.FactorAttnConvRelPosEnc": "factorised attention",
    "models.csatv2.SpatialTransformerBlock": "pass num_heads=",  # one channel, one head of size 1
    "models.efficientvit_mit.LiteMLA": "linear attention",
    "models.efficientvit_msra.CascadedGroupAttention": "one for each head",
    "models.iformer.SHMA": "values and a gate are in one projection",
    "models.mobilevit.LinearSelfAttention": "one score for each token",
    "models.shvit.SHSA": "pass num_heads=",  # one, of a share of the channels
    "models.swiftformer.EfficientAdditiveAttention": "additive attention",
    "models.vision_transformer.DiffParallelScalingBlock": "differential attention",
    "models.vision_transformer.ParallelScalingBlock": "the hidden layer of an MLP",
}
#: Classes that are found in one form, and named in another.
BOTH = {
    "models.gcvit.WindowAttentionGlobal": "tokens of the whole image",
    "models.nest.Attention": "its columns take the heads' channels in turn",  # of its output
}
#: Classes that are found and have no output projection, which the next layer is, or a transposed convolution.
WITHOUT_OUTPUT = {
    "layers.bottleneck_attn.BottleneckAttn",
    "layers.halo_attn.HaloAttn",
    "models.cpubone.ConvAttention",
    "models.nest.Attention",
    "models.lowformer.ConvAttention",
}
#: Classes called attention that have neither queries nor keys: nothing is said of them.
NO_QUERIES = {
    "layers.attention_pool.AttentionPoolPrr": "attention of the input to itself, without projections",
    "layers.cbam.ChannelAttn": "a gate per channel",
    "layers.cbam.LightChannelAttn": "a gate per channel",
    "layers.cbam.SpatialAttn": "a gate per place",
    "layers.cbam.LightSpatialAttn": "a gate per place",
    "layers.coord_attn.CoordAttn": "a gate per row and column",
    "layers.coord_attn.SimpleCoordAttn": "a gate per row and column",
    "layers.coord_attn.EfficientLocalAttn": "a gate per row and column",
    "layers.coord_attn.StripAttn": "a gate per row and column",
    "layers.non_local_attn.BatNonLocalAttn": "bilinear transforms of the image",
    "layers.non_local_attn.BilinearAttnTransform": "bilinear transforms of the image",
    "layers.non_local_attn.NonLocalAttn": "its projections are called t, p and g",
    "layers.selective_kernel.SelectiveKernelAttn": "a gate per kernel",
    "layers.split_attn.SplitAttn": "a gate per group",
    "models.nextvit.ConvAttention": "a grouped convolution",
    "models.volo.OutlookAttention": "weights by a linear layer, without keys",
}


# ---- the sweep -------------------------------------------------------------------------------------------

_PROJECTION = re.compile(
    r"(to_|w_?|in_|conv_?)?(q|k|v|qk|kv|qkv|qkvs|query|key|value|v_gate|in_proj)(_?(proj|linear|conv|bias|weight))*"
)
_CALLED_ATTENTION = re.compile(r"Att(entio)?n|XCA|MHSA|SHSA|SHMA|MLA|GPSA|LambdaLayer")


def looks_like_attention(module: nn.Module) -> bool:
    """Two children called as projections are, or one as a fused one, or the class's name and two matrices."""
    children = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    like = [child for child in children if _PROJECTION.fullmatch(child)]
    fused = any(child.strip("_") in ("qkv", "qk", "kv", "qkvs", "in_proj", "qkv_proj") for child in like)
    matrices = sum(parameter.ndim > 1 for parameter in module.parameters())
    return len(like) >= 2 or fused or bool(_CALLED_ATTENTION.search(type(module).__name__) and matrices >= 2)


def class_of(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__.removeprefix('timm.')}.{kind.__qualname__}"


@pytest.fixture(scope="module")
def verdicts(timm) -> dict[str, set[tuple[str, str]]]:
    """What is said of each class: (``found``, ``found without output``, ``named`` or ``silent``, the reason)."""
    said: dict[str, set[tuple[str, str]]] = {}
    for name in MODELS:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's own, about names of models
            model = timm.create_model(name)
        found, unhandled = locate(open_source(model))
        layers = {layer.module: layer for layer in found}
        reasons = {module.name: module.reason for module in unhandled}
        modules = dict(model.named_modules())
        for path in {*layers, *reasons, *(path for path, module in modules.items() if looks_like_attention(module))}:
            inside = [other for other in (*layers, *reasons) if other.startswith(path + "." if path else "")]
            if path in layers:
                found_as = "found" if "output" in layers[path].places else "found without output"
                said.setdefault(class_of(modules[path]), set()).add((found_as, ""))
            if path in reasons:
                said.setdefault(class_of(modules[path]), set()).add(("named", reasons[path]))
            if path not in layers and path not in reasons and not inside:
                said.setdefault(class_of(modules[path]), set()).add(("silent", name))
    return said


def test_every_class_is_found_or_named(verdicts):
    wrong = []
    for kind, said in verdicts.items():
        if kind in NAMED or kind in BOTH:
            expected = {"named"} if kind in NAMED else {"named", "found"}
            reason = NAMED.get(kind) or BOTH[kind]
            told = [why for what, why in said if what == "named"]
            ok = {what.split()[0] for what, _ in said} == expected and all(reason in why for why in told)
        elif kind in NO_QUERIES:
            ok = {what for what, _ in said} == {"silent"}
        else:
            ok = said == {("found without output" if kind in WITHOUT_OUTPUT else "found", "")}
        if not ok:
            wrong.append((kind, said))
    assert not wrong
    assert set(NAMED) | set(BOTH) | WITHOUT_OUTPUT <= set(verdicts)


def _classes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every class of timm's models and layers, with its source."""
    for file in sorted([*folder.glob("layers/*.py"), *folder.glob("models/*.py")]):
        parts = re.split(r"^class (\w+)", re.sub(r"^def .*", "", file.read_text(), flags=re.M), flags=re.M)
        for kind, source in zip(parts[1::2], parts[2::2], strict=True):
            yield f"{file.parent.name}.{file.stem}.{kind}", source


#: Classes called attention that hold one of those above, or that no model above has and that are built below.
HOLD_ONE = re.compile(
    r".*(Block|AttentionCl|PartitionAttention(2d)?|MobileAttention|SpatialAttention|LocalWindowAttention|BlockClassAttn)"
)


def test_a_new_class_fails_here(timm, verdicts):
    built = {f"{module}.{kind}" for module, kind, *_ in MODULES}
    said_of = (
        set(verdicts)
        | built
        | set(NO_QUERIES)
        | {f"{module}.{kind}" for module, kind, *_ in NAMED_ALONE}
        | {POOL_FIRST}
    )
    missed = []
    for name, source in _classes(Path(timm.__file__).parent):
        projections = re.search(r"self\.(to_)?(q|qk|kv|qkv|qkvs|query|q_proj|qkv_proj|in_proj|to_query)\b *=", source)
        if (projections or _CALLED_ATTENTION.search(name.rpartition(".")[2])) and name not in said_of:
            missed.append(name)
    assert [name for name in missed if not HOLD_ONE.fullmatch(name)] == []


#: Classes with an activation between values and output.
BENT = {
    "models.efficientformer_v2.Attention2d",
    "models.efficientformer_v2.Attention2dDownsample",
    "models.levit.Attention",
    "models.levit.AttentionDownsample",
}

# ---- what the forward pass says -----------------------------------------------------------------------------

TOKENS, IMAGE, CHANNELS_LAST, WINDOW = (2, 16, 32), (2, 32, 4, 4), (2, 4, 4, 32), (3, 16, 32)
#: Module, class, arguments, shape of the input, further inputs of the forward pass.
MODULES: list[tuple[Any, ...]] = [
    ("layers.attention", "Attention", {"dim": 32, "num_heads": 4, "qkv_bias": True}, TOKENS),
    ("layers.attention", "Attention", {"dim": 32, "num_heads": 4, "qk_norm": True, "norm_layer": nn.LayerNorm}, TOKENS),
    ("layers.attention", "AttentionRope", {"dim": 32, "num_heads": 4}, TOKENS),
    ("layers.attention", "AttentionRope", {"dim": 32, "num_heads": 4, "qkv_fused": False}, TOKENS),
    ("layers.attention2d", "MultiQueryAttention2d", {"dim": 32, "num_heads": 4, "key_dim": 8, "value_dim": 6}, IMAGE),
    (
        "layers.attention2d",
        "MultiQueryAttention2d",
        {"dim": 32, "num_heads": 4, "query_strides": 2, "kv_stride": 2},
        IMAGE,
    ),
    ("layers.attention2d", "Attention2d", {"dim": 32, "num_heads": 4}, IMAGE),
    (
        "layers.attention_pool",
        "AttentionPoolLatent",
        {"in_features": 32, "num_heads": 4, "latent_len": 2, "pool_type": ""},
        TOKENS,
    ),
    ("layers.attention_pool2d", "AttentionPool2d", {"in_features": 32, "num_heads": 4, "feat_size": 4}, IMAGE),
    (
        "layers.attention_pool2d",
        "AttentionPool2d",
        {"in_features": 32, "num_heads": 4, "feat_size": 4, "qkv_separate": True},
        IMAGE,
    ),
    ("layers.attention_pool2d", "RotAttentionPool2d", {"in_features": 32, "num_heads": 4, "ref_feat_size": 4}, IMAGE),
    (
        "layers.bottleneck_attn",
        "BottleneckAttn",
        {"dim": 32, "feat_size": (4, 4), "num_heads": 4, "dim_head": 6},
        IMAGE,
    ),
    (
        "layers.halo_attn",
        "HaloAttn",
        {"dim": 32, "num_heads": 4, "dim_head": 6, "block_size": 2, "halo_size": 1},
        IMAGE,
    ),
    ("models.beit", "Attention", {"dim": 32, "num_heads": 4, "qkv_bias": True}, TOKENS),
    ("models.cait", "ClassAttn", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.cait", "TalkingHeadAttn", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.convit", "GPSA", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.convit", "MHSA", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.cpubone", "ConvAttention", {"input_dim": 120}, (2, 120, 8, 8)),
    ("models.lowformer", "ConvAttention", {"input_dim": 120}, (2, 120, 8, 8)),
    ("models.crossvit", "CrossAttention", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.davit", "WindowAttention", {"dim": 32, "window_size": (4, 4), "num_heads": 4}, TOKENS),
    ("models.davit", "ChannelAttentionV2", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.edgenext", "CrossCovarianceAttn", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.xcit", "XCA", {"dim": 32, "num_heads": 4}, TOKENS),
    (
        "models.efficientformer",
        "Attention",
        {"dim": 32, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": 4},
        TOKENS,
    ),
    (
        "models.efficientformer_v2",
        "Attention2d",
        {"dim": 32, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": 4},
        IMAGE,
    ),
    (
        "models.efficientformer_v2",
        "Attention2dDownsample",
        {"dim": 32, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": 4, "out_dim": 24},
        IMAGE,
    ),
    (
        "models.eva",
        "EvaAttention",
        {"dim": 32, "num_heads": 4, "norm_layer": nn.LayerNorm, "scale_norm": False, "qk_norm": False},
        TOKENS,
    ),
    (
        "models.eva",
        "EvaAttention",
        {"dim": 32, "num_heads": 4, "qkv_fused": False, "norm_layer": nn.LayerNorm, "scale_norm": False},
        TOKENS,
    ),
    ("models.fastvit", "Attention", {"dim": 32, "head_dim": 8}, IMAGE),
    (
        "models.gcvit",
        "WindowAttentionGlobal",
        {"dim": 32, "num_heads": 4, "window_size": (4, 4), "use_global": False},
        TOKENS,
    ),
    ("models.hiera", "MaskUnitAttention", {"dim": 32, "dim_out": 48, "heads": 4, "window_size": 16}, TOKENS),
    ("models.hieradet_sam2", "MultiScaleAttention", {"dim": 32, "dim_out": 48, "num_heads": 4}, CHANNELS_LAST),
    (
        "models.levit",
        "Attention",
        {"dim": 32, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": (4, 4)},
        TOKENS,
    ),
    (
        "models.levit",
        "Attention",
        {"dim": 32, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": (4, 4), "use_conv": True},
        IMAGE,
    ),
    (
        "models.levit",
        "AttentionDownsample",
        {"in_dim": 32, "out_dim": 24, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": (4, 4)},
        TOKENS,
    ),
    ("models.maxxvit", "Attention2d", {"dim": 32, "dim_head": 8}, IMAGE),
    ("models.maxxvit", "Attention2d", {"dim": 32, "dim_head": 8, "head_first": False}, IMAGE),
    ("models.maxxvit", "AttentionCl", {"dim": 32, "dim_head": 8}, CHANNELS_LAST),
    ("models.maxxvit", "AttentionCl", {"dim": 32, "dim_head": 8, "head_first": False}, CHANNELS_LAST),
    ("models.metaformer", "Attention", {"dim": 32, "head_dim": 8}, TOKENS),
    (
        "models.mvitv2",
        "MultiScaleAttention",
        {
            "dim": 32,
            "dim_out": 48,
            "feat_size": (4, 4),
            "num_heads": 4,
            "has_cls_token": False,
            "residual_pooling": False,
        },
        TOKENS,
        (4, 4),
    ),
    ("models.nextvit", "EfficientAttention", {"dim": 32, "head_dim": 8, "sr_ratio": 2}, TOKENS),
    ("models.pvt_v2", "Attention", {"dim": 32, "num_heads": 4, "sr_ratio": 2}, TOKENS, (4, 4)),
    ("models.pvt_v2", "Attention", {"dim": 32, "num_heads": 4, "linear_attn": True}, TOKENS, (4, 4)),
    ("models.swin_transformer", "WindowAttention", {"dim": 32, "num_heads": 4, "window_size": 4}, WINDOW),
    ("models.swin_transformer_v2", "WindowAttention", {"dim": 32, "num_heads": 4, "window_size": (4, 4)}, WINDOW),
    (
        "models.swin_transformer_v2_cr",
        "WindowMultiHeadAttention",
        {"dim": 32, "num_heads": 4, "window_size": (4, 4)},
        WINDOW,
    ),
    (
        "models.tiny_vit",
        "Attention",
        {"dim": 32, "key_dim": 6, "num_heads": 4, "attn_ratio": 2, "resolution": (4, 4)},
        TOKENS,
    ),
    ("models.tnt", "Attention", {"dim": 32, "hidden_dim": 24, "num_heads": 4}, TOKENS),
    ("models.twins", "LocallyGroupedAttn", {"dim": 32, "num_heads": 4, "ws": 2}, TOKENS, (4, 4)),
    ("models.twins", "GlobalSubSampleAttn", {"dim": 32, "num_heads": 4, "sr_ratio": 2}, TOKENS, (4, 4)),
    ("models.visformer", "Attention", {"dim": 32, "num_heads": 4, "head_dim_ratio": 0.5}, IMAGE),
    ("models.vision_transformer_relpos", "RelPosAttention", {"dim": 32, "num_heads": 4}, TOKENS),
    ("models.vision_transformer_sam", "Attention", {"dim": 32, "num_heads": 4}, CHANNELS_LAST),
    ("models.volo", "Attention", {"dim": 32, "num_heads": 4}, CHANNELS_LAST),
    ("models.volo", "ClassAttention", {"dim": 32, "num_heads": 4, "head_dim": 6}, TOKENS),
]


def build(
    name: str, kind: str, settings: dict[str, Any], shape: tuple[int, ...], *more: Any
) -> tuple[nn.Module, Callable]:
    torch.manual_seed(0)
    model = randomise(getattr(importlib.import_module(f"timm.{name}"), kind)(**settings))
    with torch.no_grad():
        for table in ("height_rel", "width_rel", "rel_pos_h", "rel_pos_w"):  # positions by products with the queries
            for part, parameter in model.named_parameters():
                if part.endswith(table):
                    parameter.zero_()
    x = torch.randn(shape)
    return model, lambda: model(x, *more)


@pytest.mark.parametrize("case", MODULES, ids=lambda case: f"{case[0]}.{case[1]}")
def test_matrices_are_those_of_the_forward_pass(timm, case):
    model, forward = build(*case)
    [layer] = rd.find_attention(model)
    kind = f"{case[0]}.{case[1]}"
    assert layer.output is not None or kind in WITHOUT_OUTPUT
    assert layer.num_heads == getattr(model, "num_heads", getattr(model, "heads", 4))
    assert contradictions(model, layer, forward, bent=kind in BENT) == []


#: Classes of which a file, without the class's attributes, has nothing that is called as projections are.
SILENT_IN_FILES = {"models.lowformer.ConvAttention", "models.cpubone.ConvAttention"}
#: Classes whose output in a file looks like that of others.
OUTPUT_IN_FILES = {"models.nest.Attention"}


@pytest.mark.parametrize("case", MODULES, ids=lambda case: f"{case[0]}.{case[1]}")
def test_a_file_has_the_same_matrices_or_is_refused_or_says_what_it_assumes(timm, case):
    """The number of heads alone is given, as a message asks for it."""
    model, _ = build(*case)
    [live] = rd.find_attention(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, refused = locate(Checkpoint(Path("file"), shapes, {}, torch.zeros), SearchOptions(num_heads=live.num_heads))
    kind = f"{case[0]}.{case[1]}"
    assert found or refused or kind in SILENT_IN_FILES
    for layer in found:
        same = {role: str(place.window) for role, place in layer.places.items()}
        windows = {view.role: str(view.window) for view in live.views}
        if kind in OUTPUT_IN_FILES:
            del same["output"]
        assert same == windows or "order" in layer.unknown
        assert windows["key"].count("by") == 1
        if "order" in layer.unknown:  # which is as wide for keys as for queries and values, or it would be refused
            assert layer.places["key"].window.num_heads == live.num_heads


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("levit_128s", r"qkv: its 256 rows are 4 query heads of 32 with 2 key heads, or keys and values of other"),
        ("gcvit_xxtiny", r"qkv: its 128 rows are 2 query heads of 32 with 1 key heads, or"),
    ],
)
def test_a_file_whose_keys_are_no_key_heads_of_others_is_refused(timm, name, said):
    """LeViT's values are wider than its keys, and GC ViT has keys and values alone: no third of the rows is each."""
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, refused = locate(Checkpoint(Path("file"), shapes, {}, torch.zeros), SearchOptions(head_dim=32))
    live = {layer.name for layer in locate(open_source(model))[0]}
    assert {layer.name for layer in found} <= live
    assert re.search(said, str(refused[0]))


def test_one_number_of_heads_in_a_pyramid_is_spoken_of(timm):
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    checkpoint = Checkpoint(Path("file"), shapes, {}, torch.zeros)
    live = {layer.name: layer.places for layer in locate(open_source(model))[0]}
    assert {layer.name: layer.places for layer in locate(checkpoint, SearchOptions(head_dim=32))[0]} == live
    assert all(
        layer.remark.startswith("num_heads=3 makes heads of 32, 64, 128, 256 in layers of several widths")
        for layer in locate(checkpoint, SearchOptions(num_heads=3))[0]
    )
    assert "num_heads=... or head_dim=..." in str(locate(checkpoint)[1][0]).replace(", or", " or")


#: Classes of no model above that are named: module, class, arguments, what is said.
NAMED_ALONE: list[tuple[str, str, dict[str, Any], str]] = [
    ("layers.attention2d", "MultiQueryAttentionV2",
     {"dim": 32, "num_heads": 4}, "query_proj has shape .*: not a matrix"),
    ("layers.other_pool", "SimPool2d",
     {"dim": 32, "num_heads": 4}, "like projections to queries and keys, but not recognised"),
    ("layers.other_pool", "SimPool1d",
     {"dim": 32, "num_heads": 4}, "like projections to queries and keys, but not recognised"),
]  # fmt: skip
POOL_FIRST = "models.mvitv2.MultiScaleAttentionPoolFirst"


@pytest.mark.parametrize(("name", "kind", "settings", "message"), NAMED_ALONE)
def test_named_alone(timm, name, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        rd.find_attention(getattr(importlib.import_module(f"timm.{name}"), kind)(**settings))


def test_convolutions_that_pool_queries_are_no_projections(timm):
    from timm.models.mvitv2 import MultiScaleAttentionPoolFirst

    attention = MultiScaleAttentionPoolFirst(32, 48, (4, 4), num_heads=4, has_cls_token=False, kernel_q=(3, 3))
    [layer] = rd.find_attention(attention)
    assert [view.parameter_name for view in layer.views] == ["q.weight", "k.weight", "v.weight", "proj.weight"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("models.eva", "EvaAttention"), ("layers.attention", "AttentionRope")])
def test_planes_of_rotary_positions(timm, name, kind, half):
    from timm.layers import RotaryEmbeddingCat

    torch.manual_seed(0)
    attention = getattr(importlib.import_module(f"timm.{name}"), kind)(
        32, 4, num_prefix_tokens=0, rotate_half=half, norm_layer=nn.LayerNorm
    )
    rope = RotaryEmbeddingCat(8, feat_shape=[4, 4], in_pixels=False, rotate_half=half)
    model = randomise(nn.ModuleDict({"rope": rope, "attn": attention}))
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    x = torch.randn(TOKENS)
    [layer] = rd.find_attention(model)
    assert layer.rotary == (8, not half)
    assert planes_turned(model, layer, lambda: attention(x, rope=rope.get_embed()))
