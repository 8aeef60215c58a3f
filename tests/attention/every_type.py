"""Every model type of the installed transformers, built from its configuration with few layers.

:func:`describe` builds on the meta device, where only shapes exist, with the widths that the family really has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import nn

#: Settings that count layers, and those that only sound like it.
_LAYERS = re.compile(
    r"(.*_)?(num|n)_(\w*_)?(hidden_)?layers?|(encoder|decoder)_layers|(.*_)?depth|num_blocks|"
    r"num_(transformer|decoder|encoder)_blocks"
)
_NOT_LAYERS = re.compile(
    r"num_feat_extract_layers|num_res.*|.*kv_shared.*|.*adapter_layers|.*_dense_layers|num_nextn_predict_layers|"
    r"num_.*levels|iou_head_depth|.*postnet.*|.*predictor.*"
)
LAYERS = 8  # enough for each kind of layer of the hybrids, where no list of the configuration says how many

#: Settings of models whose layers are not all alike.
_HYBRID = re.compile(r"period|interval|frequency|pattern|offset|hybrid|every|_idx|indices|indexes|_layers$|interleave")

_RESNET: dict[str, Any] = {
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"], "depths": [1, 1, 1, 1]},
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
}
_RESNET_LAST = _RESNET | {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"], "depths": [1] * 4}}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_BY_KIND = dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)
_FORECAST: dict[str, Any] = {"prediction_length": 4, "context_length": 8}
_QSA: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_BLOCKS: dict[str, Any] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]} | {
    f"{way}_{ratio}ratio": [3, 1, 1]
    for way in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
    for ratio in ("long", "mid", "short")
}
_GLM_OCR = {"mlp_layer_types": ["dense"] + ["sparse"] * 11}

#: What a type cannot be built without, beyond the defaults of its configuration.
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": _FORECAST,
    "informer": _FORECAST,
    "time_series_transformer": _FORECAST,
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGBS": 5}},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000000|>": 6}},
    "cohere_compass_text": {"rope_parameters": _BY_KIND},
    "cohere_compass": {"text_config": {"model_type": "cohere_compass_text", "rope_parameters": _BY_KIND}},
    "conditional_detr": _RESNET_LAST,
    "dab-detr": _RESNET_LAST,
    "deformable_detr": _RESNET,
    "detr": _RESNET_LAST,
    "table-transformer": _RESNET_LAST,
    "omdet-turbo": _RESNET,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 1e4}},
    "deepseek_ocr2": {"text_config": _GLM_OCR},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0), (-2, 1)], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": _QSA,
    "qwen4_exp": {"text_config": _QSA},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "pp_ocrv6_medium_det": {"intraclass_block_config": _BLOCKS},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", "model_args": {"embed_dim": 64}}},
}

#: Types whose model AutoModel does not build from their configuration.
CLASSES = {
    "funnel": "FunnelModel",
    "evolla": "EvollaForProteinText2Text",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "voxtral_realtime_text": "models.voxtral_realtime.modeling_voxtral_realtime.VoxtralRealtimeTextModel",
}

#: Types that are nothing but timm's models, which are tested by themselves, or need a package to be built at all.
ELSEWHERE = {
    "timm_backbone": "a model of timm",
    "timm_wrapper": "a model of timm",
    "gemma3n_vision": "a model of timm",
    "higgs_audio_v2_tokenizer": "needs torchaudio",
    "layoutlmv2": "its backbone is detectron2's",
}


def types() -> list[str]:
    """Every entry of the mapping from configurations to models."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def configuration(kind: str) -> Any:
    """The configuration of a type with few layers."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
    _shorten(config)
    return config


def _shorten(config: Any) -> None:
    """Leave each kind of layer once: as many layers as show them all, two where they are all alike."""
    from transformers import PretrainedConfig

    wanted = _layers(vars(config))
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shorten(value)
        elif type(value) is int and value > wanted and _LAYERS.fullmatch(name) and not _NOT_LAYERS.fullmatch(name):
            setattr(config, name, wanted)
            if "num_kv_shared_layers" in vars(config):
                config.num_kv_shared_layers = min(config.num_kv_shared_layers, 2)


def _layers(settings: dict[str, Any]) -> int:
    found = (
        value for name, value in settings.items() if re.fullmatch(r"layers?_\w*types?|block_types", name) and value
    )
    if lists := list(found):
        kinds = (value.index(kind) + 1 for value in lists for kind in set(value))
        return max(LAYERS // 4, *kinds) + (2 if settings.get("num_kv_shared_layers") else 0)
    return LAYERS if any(_HYBRID.search(name) and value for name, value in settings.items()) else LAYERS // 4


@contextmanager
def without_packages() -> Iterator[None]:
    """Lets models be built whose forward pass needs packages that are not there; parts of timm are left empty."""
    import transformers
    from transformers.models.dinat import modeling_dinat
    from transformers.models.timm_backbone import modeling_timm_backbone
    from transformers.models.timm_wrapper import modeling_timm_wrapper

    def empty(cls: type, config: Any, **_: object) -> nn.Module:
        module = nn.Identity()
        module.config = config
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
        patch.setattr(transformers.utils.import_utils, "requires_backends", lambda *_: None)
        for owner in (modeling_timm_wrapper.TimmWrapperPreTrainedModel, modeling_timm_backbone.TimmBackbone):
            patch.setattr(owner, "_from_config", classmethod(empty))
        for layer in (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd):  # numbers that nobody reads
            patch.setattr(layer, "reset_parameters", lambda _: None)
        yield


#: Tasks whose classes are taken for use, the first that a type has one for.
_TASKS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
          "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "IMAGE_CLASSIFICATION")  # fmt: skip
#: Types that have one which its configuration does not build.
HEADLESS = {"reformer", "musicgen", "musicgen_melody", "pp_ocrv5_server_det", "pp_ocrv6_medium_det", "gemma4_assistant",
            "qwen3_omni_moe"}  # fmt: skip


def heads() -> dict[str, str]:
    """The class for use of each type that has one: the model with a head."""
    from transformers.models.auto import modeling_auto

    tables = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in _TASKS]
    named = {kind: names for table in reversed(tables) for kind, names in table.items()}
    return {kind: names if isinstance(names, str) else names[0] for kind, names in named.items()}


def describe(kind: str, cls: str | None = None) -> nn.Module:
    """The model of a type on the meta device, by default of the class that has no head."""
    import transformers

    config = configuration(kind)
    with torch.device("meta"), without_packages():
        if cls:
            return getattr(transformers, cls)(config)
        if kind in CLASSES:
            return attrgetter(CLASSES[kind])(transformers)(config)
        return transformers.AutoModel.from_config(config)
