"""Heads of the models of diffusers whose configurations state them by block, or under another name.

``attention_head_dim`` is the number of heads in most of its U-Nets (its own comment calls the name a mistake), and the
size of a head elsewhere. A list of either has one value for each block on the way down; on the way up they are in
reverse, and the block between takes the last. Read in diffusers 0.42.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

#: Classes in which ``attention_head_dim`` is the number of heads, where ``num_attention_heads`` is not stated.
_NUMBER = ("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel", "SparseControlNetModel",
           "DreamLiteUNetModel", "AudioLDM2UNet2DConditionModel", "UNetFlatConditionModel")  # fmt: skip
#: Classes in which it is the size of a head whatever ``num_attention_heads`` states.
_SIZE = ("UNet3DConditionModel", "I2VGenXLUNet")
#: Classes that state the number of heads as others do, by block.
_BY_BLOCK = ("UNetSpatioTemporalConditionModel", "UNetMotionModel", "StableCascadeUNet", "MotionAdapter",
             "ControlNetXSAdapter", "UNetControlNetXSModel")  # fmt: skip
#: Kinds of blocks that take ``attention_head_dim`` as the size of a head in classes that else do not.
_SIZE_IN_BLOCK = re.compile(r"Simple|^Attn|^K(CrossAttn|Attn|Down|Up)")
#: Heads of attention outside of the blocks: as the class has them, and where the configuration states them.
_IN_CLASS = {"transformer_in": 8, "image_latents_temporal_encoder": 2}
_APART = {"add_embedding": "addition_embed_type_num_heads", "transformer_layes": "num_trans_head"}
_BLOCK = re.compile(r"(?:^|\.)(?:(down|up)_blocks\.(\d{1,9})|mid_block)\.")


def by_module(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
    """Return a configuration without the heads that it states otherwise than others do, and a function that tells them.

    The function takes the path of a module. Where a configuration leaves them open it returns nothing.
    """
    kind = config.get("_class_name")
    if kind in (*_NUMBER, *_SIZE, *_BY_BLOCK):
        rest = {key: value for key, value in config.items() if key not in ("num_attention_heads", "attention_head_dim")}
        return rest, partial(_of_unet, dict(config), str(kind))
    if "attention_head_dim" in config and "CrossAttn" in str(config.get("down_block_types")):
        rest = {key: value for key, value in config.items() if key != "attention_head_dim"}
        return rest, lambda path: {}  # a class that is not known here: either of the two
    if "num_cross_attention_heads" in config and "cross_attention_head_dim" in config:  # Sana
        return config, partial(_of_cross_attention, dict(config))
    return config, lambda path: {}


def _of_unet(config: Mapping[str, Any], kind: str, path: str) -> Mapping[str, Any]:
    found = _BLOCK.search(path)
    if not found:
        first = path.partition(".")[0]
        heads = _IN_CLASS.get(first) if kind in _SIZE else config.get(_APART.get(first, ""))
        return {"num_attention_heads": heads}
    way, number = found[1], int(found[2] or 0)

    def here(key: str, reversed_up: bool = True) -> Any:
        stated = config.get(key)
        if not isinstance(stated, list):
            return stated
        place = -1 if way is None else -1 - number if way == "up" and reversed_up else number
        return stated[place] if -len(stated) <= place < len(stated) else None

    if "motion_modules" in path.split(".") or kind == "MotionAdapter":
        return {"num_attention_heads": here("motion_num_attention_heads")}
    if kind in _SIZE:
        return {"attention_head_dim": here("attention_head_dim")}
    if kind in _BY_BLOCK:
        return {"num_attention_heads": here("ctrl_num_attention_heads" if ".ctrl_" in path else "num_attention_heads")}
    blocks = config.get("mid_block_type" if way is None else f"{way}_block_types")
    if isinstance(blocks, list):
        blocks = blocks[number] if number < len(blocks) else ""
    if _SIZE_IN_BLOCK.search(str(blocks or "")):
        return {"attention_head_dim": here("attention_head_dim", reversed_up=False)}
    stated = here("num_attention_heads")
    return {"num_attention_heads": here("attention_head_dim") if stated is None else stated}


def _of_cross_attention(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    if path.rpartition(".")[2] != "attn2":
        return {}
    keys = {"num_attention_heads": "num_cross_attention_heads", "attention_head_dim": "cross_attention_head_dim"}
    return {ours: config[theirs] for ours, theirs in keys.items()}
