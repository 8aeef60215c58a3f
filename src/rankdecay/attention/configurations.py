"""The configuration of a checkpoint: beside its files or inside them, in the spellings of several libraries."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rankdecay.attention.folders import read_json
from rankdecay.attention.names import HEAD_DIM, NUM_HEADS

#: Keys under which trainers keep the configuration of the model inside of a checkpoint.
_INSIDE = ("model_args", "model_config", "config", "gpt_config", "hyper_parameters", "hparams", "cfg", "args")
_META = re.compile(r"(?:(?:module|_orig_mod)\.)*layers\.\d+\.attention\.wq\.weight")
_META_TENSORS = re.compile(r"(?:.*\.)?(?:rope\.freqs|freqs_cis|freqs_cos|tok_embeddings\.weight)")
_LARGEST_YAML = 2**20


def configuration(folders: Collection[Path], file: Path, names: Collection[str], content: object) -> dict[str, Any]:
    """Return the settings that state the numbers of heads and the positions of a checkpoint.

    Args:
        folders: where files of configuration may be, the nearest first.
        file: the (first) file of weights.
        names: names of its tensors.
        content: what the file holds beside the weights, if it is a pickle.

    Returns:
        The settings, those inside of the file before those beside it; empty if there are none.
    """
    inside = _inside(content)
    if is_meta(names, file, inside):
        beside = _first(folders, "params.json") or _first(folders, "config.json")
        return _meta(beside | inside)
    if file.name.startswith("lit_model"):
        return _litgpt(_first(folders, "model_config.yaml") or _first(folders, "lit_config.json")) | inside
    for name, read in (
        ("config.json", dict),
        ("params.json", _meta),
        ("model_config.yaml", _litgpt),
        ("lit_config.json", _litgpt),
        ("open_clip_config.json", _open_clip),
    ):
        if found := _first(folders, name):
            return read(found) | inside
    return inside


def is_meta(names: Collection[str], file: Path, inside: Mapping[str, Any]) -> bool:
    """Whether names are those of Meta's Llama files and of llama2.c, whose rotary planes are neighbouring rows."""
    if not any(_META.fullmatch(name) for name in names):
        return False
    known = file.name.startswith("consolidated") or "dim" in inside or "n_kv_heads" in inside
    return known or any(_META_TENSORS.fullmatch(name) for name in names)


def _first(folders: Collection[Path], name: str) -> dict[str, Any]:
    for folder in folders:
        if (folder / name).is_file():
            return _flat_yaml(folder / name) if name.endswith(".yaml") else read_json(folder / name)
    return {}


def _inside(content: object) -> dict[str, Any]:
    """Return the mapping inside of a checkpoint that states heads, or the first that is a configuration at all."""
    if not isinstance(content, Mapping):
        return {}
    found = [part for key in _INSIDE if key in content for part in _parts(content[key], depth=2)]
    stating = [part for part in found if any(isinstance(part.get(key), int) for key in (*NUM_HEADS, *HEAD_DIM))]
    return _canonical(dict(stating[0])) if stating else {}


def _parts(value: object, depth: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, Mapping):
        return
    yield {str(key): item for key, item in value.items() if isinstance(item, (bool, int, float, str, dict, list))}
    if depth:
        for item in list(value.values())[:1000]:
            yield from _parts(item, depth - 1)


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
    """Add the usual names of settings for which some libraries have names of their own."""
    spelled = {
        "num_key_value_heads": ("n_query_groups", "num_query_groups", "n_kv_heads"),
        "rope_theta": ("rope_base",),
        "partial_rotary_factor": ("rotary_percentage",),
    }
    known = {
        name: next(config[other] for other in others if config.get(other) is not None)
        for name, others in spelled.items()
        if config.get(name) is None and any(config.get(other) is not None for other in others)
    }
    return config | known


def _meta(params: dict[str, Any]) -> dict[str, Any]:
    """Return Meta's ``params.json``: rotary positions always turn neighbouring coordinates."""
    config = {"rope_theta": 10000.0} | {key: value for key, value in params.items() if value is not None}
    vision = config.get("vision_encoder")  # Pixtral
    if isinstance(vision, dict):
        config["vision_config"] = {"rope_interleaved": True, **vision}
    return _canonical(config) | {"rope_interleaved": True}


def _litgpt(config: dict[str, Any]) -> dict[str, Any]:
    return _canonical(config)


def _open_clip(config: dict[str, Any]) -> dict[str, Any]:
    model = config.get("model_cfg", config)
    towers: dict[str, Any] = {}
    for tower, ours in (("vision_cfg", "vision_config"), ("text_cfg", "text_config")):
        part = model.get(tower) if isinstance(model, dict) else None
        if isinstance(part, dict):
            width, size = part.get("width"), part.get("head_width", 64)
            heads = part.get("heads")
            if heads is None and isinstance(width, int) and isinstance(size, int) and size > 0:
                heads = width // size
            towers[ours] = part | ({"num_heads": heads} if heads else {})
    return towers


def _flat_yaml(file: Path) -> dict[str, Any]:
    """Return the plain settings at the top level of a YAML file; anything nested is left out."""
    if file.stat().st_size > _LARGEST_YAML:
        return {}
    settings: dict[str, Any] = {}
    for line in file.read_text("utf-8", "replace").splitlines():
        found = len(line) < 1000 and re.fullmatch(r"([A-Za-z_]\w*):[ \t]+([^#\s].*?)\s*(?: #.*)?", line)
        if found:
            settings[found[1]] = _scalar(found[2])
    return settings


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "~": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return text.strip("'\"")
