"""The configuration of a checkpoint: beside its files or inside them, in the spellings of several libraries."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.folders import check_inside, read_json
from rankdecay.attention.model_types import (
    HEAD_DIM,
    KEY_HEADS,
    NUM_HEADS,
    PARTIAL_ROTARY,
)
from rankdecay.files import read_bytes

#: Keys under which trainers keep the configuration of the model inside of a checkpoint.
_INSIDE = ("model_args", "model_config", "config", "gpt_config", "hyper_parameters", "hparams", "cfg", "args")
_META = re.compile(r"(?:(?:module|_orig_mod)\.)*layers\.\d+\.attention\.wq\.weight")
_META_TENSORS = re.compile(r"(?:.*\.)?(?:rope\.freqs|freqs_cis|freqs_cos|tok_embeddings\.weight)")
#: Tables of learned positions beside them, with which such a model turns nothing.
_LEARNED = re.compile(
    r"(?:(?:module|_orig_mod)\.)*(?:embed\w*\.)?(?:pos(?:ition(?:al)?)?_?(?:emb|enc)\w*|wpe)(?:\.\w+)?", re.IGNORECASE
)
_TABLES = re.compile(r"(?:.*\.)?(?:rope\.freqs|freqs_cis|freqs_cos)")
_LARGEST_YAML = 2**20
_MOST_SETTINGS, _MOST_PARTS = 10_000, 100
_PLAIN = (str, int, float, type(None))
#: Settings that are asked for, by what they have to be.
_TEXTS = ("model_type", "position_embedding_type", "rope_type")
_LISTS = ("layer_types", "kv_sharing_modes", "no_rope_layers")


def configuration(
    folders: Collection[Path], file: Path, shapes: Mapping[str, tuple[int, ...]], content: object
) -> dict[str, Any]:
    """Return the settings that state the numbers of heads and the positions of a checkpoint.

    Args:
        folders: where files of configuration may be, the nearest first.
        file: the (first) file of weights.
        shapes: shape of each of its tensors, by name.
        content: what the file holds beside the weights, if it is a pickle.

    Returns:
        The settings, those inside of the file before those beside it; empty if there are none.

    Raises:
        CheckpointError: If the settings are damaged, or the file is a part of what they describe.
    """
    inside = _inside(content)
    slices = inside.get("tensor_model_parallel_size")
    if isinstance(slices, int) and slices > 1:
        raise CheckpointError(
            f"{file} is one of {slices} tensor-parallel slices of Megatron-LM, each with a part of every matrix; "
            "convert all of them to one model, with its tools/checkpoint or as the framework that trained it does."
        )
    if is_meta(shapes, file, inside):
        config = _meta((_first(folders, "params.json") or _first(folders, "config.json")) | inside)
        _check_no_slice(config, shapes, file)
        return config
    if file.name.startswith("lit_model"):
        return _canonical(_first(folders, "model_config.yaml") or _first(folders, "lit_config.json")) | inside
    for name, read in (
        ("config.json", dict),
        ("params.json", partial(_meta, rotary=not has_learned_positions(shapes))),
        ("model_config.yaml", _canonical),
        ("lit_config.json", _canonical),
        ("open_clip_config.json", _open_clip),
    ):
        if found := _first(folders, name):
            return read(found) | inside
    return inside


def is_meta(names: Collection[str], file: Path, inside: Mapping[str, Any]) -> bool:
    """Whether names are those of Meta's Llama files and of llama2.c, whose rotary planes are neighbouring rows."""
    if not any(_META.fullmatch(name) for name in names):
        return False
    if has_learned_positions(names):
        return False
    known = file.name.startswith("consolidated") or "dim" in inside or "n_kv_heads" in inside
    return known or any(_META_TENSORS.fullmatch(name) for name in names)


def has_learned_positions(names: Collection[str]) -> bool:
    """Whether a file has a table of learned positions, and none of rotary ones."""
    return any(map(_LEARNED.fullmatch, names)) and not any(map(_TABLES.fullmatch, names))


def _check_no_slice(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse one of Meta's model-parallel shards without the others, each of which holds some heads of every layer."""
    width, heads, size = (config.get(name) for name in ("dim", "n_heads", "head_dim"))
    if not isinstance(heads, int) or heads <= 0:
        return
    if not isinstance(size, int):
        size = width // heads if isinstance(width, int) else 0
    for name, shape in shapes.items():
        if _META.fullmatch(name) and shape[0] < heads * size:
            raise CheckpointError(
                f"{file}: {name} has {shape[0]} rows, but its config has {heads} heads of {size}: it is one of "
                "several model-parallel shards, each with a part of every matrix; convert all of them to one model "
                "(for Llama: python -m transformers.models.llama.convert_llama_weights_to_hf)."
            )


def _first(folders: Collection[Path], name: str) -> dict[str, Any]:
    for folder in folders:
        file = folder / name
        if os.path.lexists(file):  # a pipe or a broken link of that name is said, not passed over
            return _checked(_flat_yaml(file) if name.endswith(".yaml") else read_json(file), file)
    return {}


def _checked(config: dict[str, Any], file: object, depth: int = 4) -> dict[str, Any]:
    """Return a configuration whose settings are of the kinds that are asked for.

    Raises:
        CheckpointError: If one is not, or there are more than any model has.
    """
    if depth < 0:
        raise CheckpointError(f"{file} nests configurations deeper than any model; restore it.")
    if len(config) > _MOST_SETTINGS:
        raise CheckpointError(f"{file} has {len(config)} settings in one place, more than a model has; restore it.")
    parts = sum(isinstance(value, dict) for value in config.values())
    if parts > _MOST_PARTS:  # each is compared with the path of every module
        raise CheckpointError(
            f"{file} has the settings of {parts} parts in one place, more than a model has; restore it."
        )
    for name, value in config.items():
        if name in _TEXTS and not isinstance(value, str | None):
            raise CheckpointError(f"{file}: {name} must be a string, not {_brief(value)}; restore it.")
        if name in PARTIAL_ROTARY and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise CheckpointError(f"{file}: {name} must be a share from 0 to 1, not {_brief(value)}; restore it.")
        if name in _LISTS and isinstance(value, list) and not all(isinstance(item, _PLAIN) for item in value):
            raise CheckpointError(f"{file}: {name} must be a list of plain values; restore it.")
        if isinstance(value, dict) and (
            "model_type" in value or name.endswith(("_config", "_cfg", "_parameters")) or name in ("encoder", "decoder")
        ):
            _checked(value, file, depth - 1)
    return config


def _brief(value: object) -> str:
    return repr(value)[:100]


def _inside(content: object) -> dict[str, Any]:
    """Return what states heads inside of a checkpoint; the parts of a model apart, where they state different ones."""
    for value in (content[key] for key in _INSIDE if key in content) if isinstance(content, Mapping) else ():
        stating = [part for part in _parts(value, depth=2) if _states(part)]
        if stating:
            alike = len({_numbers(part) for part in stating}) == 1
            found = dict(stating[0]) if alike else _apart(value, depth=2)
            return _canonical(_checked(found, "the configuration inside of the checkpoint"))
    return {}


def _states(part: Mapping[str, Any]) -> bool:
    """Whether a mapping states how many heads there are, or how wide."""
    return any(isinstance(part.get(key), int) for key in (*NUM_HEADS, *HEAD_DIM))


def _numbers(part: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return how many heads a mapping states, how wide, and how many of keys."""
    return tuple(
        next((part[key] for key in keys if isinstance(part.get(key), int)), None)
        for keys in (NUM_HEADS, HEAD_DIM, KEY_HEADS)
    )


def _apart(value: Any, depth: int) -> dict[str, Any]:
    """Return settings with those of each part of the model under its name, ``encoder_config``, as in config.json.

    Which part a module is in, its path then says; one that is in none of them has no number of heads.
    """
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    plain = {key: item for key, item in next(_parts(value, 0)).items() if not isinstance(item, dict)}
    parts = {
        str(key).removesuffix("_config").removesuffix("_cfg"): _apart(item, depth - 1)
        for key, item in islice(value.items(), 1000 if depth > 1 else 100)
        if depth and any(map(_states, _parts(item, depth - 1)))
    }
    if len(parts) == 1 and not _states(plain):  # what holds the configuration, as "model"
        return plain | next(iter(parts.values()))
    return plain | {f"{name}_config": _canonical(part) for name, part in parts.items()}


def _parts(value: object, depth: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, Mapping):
        return
    yield {str(key): item for key, item in value.items() if isinstance(item, (bool, int, float, str, dict, list))}
    if depth:
        for item in islice(value.values(), 1000 if depth > 1 else 100):  # mappings of mappings may be shared
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


def _meta(params: dict[str, Any], rotary: bool = True) -> dict[str, Any]:
    """Return Meta's ``params.json``: rotary positions always turn neighbouring coordinates."""
    if not rotary and params.get("rope_theta") is None:  # of a model with other positions
        return _canonical(params)
    config = {"rope_theta": 10000.0} | {key: value for key, value in params.items() if value is not None}
    vision = config.get("vision_encoder")  # Pixtral
    if isinstance(vision, dict):
        config["vision_config"] = {"rope_interleaved": True, **vision}
    return _canonical(config) | {"rope_interleaved": True}


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
    check_inside(file, file.parent)
    settings: dict[str, Any] = {}
    for line in read_bytes(file, _LARGEST_YAML, CheckpointError).decode("utf-8", "replace").splitlines():
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
