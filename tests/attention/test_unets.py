"""Heads of diffusers' U-Nets in files: as the live model has them, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import rankdecay as rd

DOWN, UP = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
SMALL: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16}
UNET = SMALL | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8}
CONTROL = SMALL | {"in_channels": 4, "norm_num_groups": 8, "conditioning_embedding_out_channels": (16, 32)}
DOWN_3D, UP_3D = ("CrossAttnDownBlock3D",) * 2, ("CrossAttnUpBlock3D",) * 2
MOTION = {"down_block_types": ("CrossAttnDownBlockMotion",) * 2, "motion_num_attention_heads": 8}
SIMPLE = {"down_block_types": ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
          "up_block_types": ("SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
          "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}  # fmt: skip
SPATIAL = {"down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 2,
           "up_block_types": ("CrossAttnUpBlockSpatioTemporal",) * 2, "addition_time_embed_dim": 32,
           "projection_class_embeddings_input_dim": 96}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1": ("UNet2DConditionModel", UNET | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", UP[0]),
        "attention_head_dim": 4}),
    "Stable Diffusion 2": ("UNet2DConditionModel", UNET | {
        "down_block_types": DOWN, "up_block_types": UP, "attention_head_dim": [2, 4]}),
    "DeepFloyd": ("UNet2DConditionModel", UNET | SIMPLE | {"attention_head_dim": [4, 8]}),
    "ControlNet": ("ControlNetModel", CONTROL | {"down_block_types": DOWN, "attention_head_dim": [2, 4]}),
    "SparseCtrl": ("SparseControlNetModel", CONTROL | MOTION | {"attention_head_dim": 4}),
    "Stable Video Diffusion": ("UNetSpatioTemporalConditionModel", SMALL | SPATIAL | {
        "sample_size": 8, "in_channels": 8, "out_channels": 4, "num_attention_heads": (2, 4)}),
    "ModelScope": ("UNet3DConditionModel", UNET | {
        "down_block_types": DOWN_3D, "up_block_types": UP_3D, "attention_head_dim": 4}),
    "I2VGen-XL": ("I2VGenXLUNet", UNET | {
        "down_block_types": DOWN_3D, "up_block_types": UP_3D, "attention_head_dim": 4, "num_attention_heads": 16}),
    "AnimateDiff": ("UNetMotionModel", UNET | MOTION | {
        "up_block_types": ("CrossAttnUpBlockMotion",) * 2, "num_attention_heads": (2, 4)}),
    "AnimateDiff's adapter": ("MotionAdapter", {
        "block_out_channels": (32, 64), "motion_layers_per_block": 1, "motion_norm_num_groups": 8,
        "motion_num_attention_heads": (2, 4)}),
    "Sana": ("SanaTransformer2DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 16, "sample_size": 8}),
}  # fmt: skip


def _heads(source: Any) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.num_heads, layer.head_dim) for layer in rd.find_attention(source)}


@pytest.mark.filterwarnings("ignore")  # deprecations of diffusers
@pytest.mark.parametrize("name", MODELS)
def test_heads_in_a_file_are_those_of_the_live_model(diffusers, tmp_path, name: str) -> None:
    import diffusers as library

    kind, how = MODELS[name]
    build: Callable[..., Any] = getattr(library, kind)
    model = build(**how)
    model.save_pretrained(tmp_path)
    live = _heads(model)
    assert live
    assert _heads(tmp_path) == live


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_is_not_known_is_refused(diffusers, tmp_path) -> None:
    import diffusers as library

    kind, how = MODELS["Stable Diffusion 2"]
    getattr(library, kind)(**how | {"attention_head_dim": 4}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "MyUNet"}))
    with pytest.raises(ValueError, match=r"the number of heads in its .* rows is unknown; pass num_heads="):
        rd.find_attention(tmp_path)
    assert {layer.num_heads for layer in rd.find_attention(tmp_path, num_heads=4)} == {4}
