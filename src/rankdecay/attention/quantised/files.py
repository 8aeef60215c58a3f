"""Quantised weights of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rankdecay.attention.quantised.formats import weights_in
from rankdecay.attention.quantised.stored import FLOAT, Load, Refused, Stored, Weight, settings_in
from rankdecay.attention.quantised.subclasses import dequantize, flattened, own_dequantize
from rankdecay.attention.tensors import Shape


def dequantised(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    config: Mapping[str, Any],
    load: Load,
    metadata: Mapping[str, str] | None = None,
    error: type[ValueError] = ValueError,
) -> tuple[dict[str, Shape], Load, dict[str, str]]:
    """Return the tensors of a file with each quantised weight under its own name and shape.

    Args:
        shapes: shape of every tensor as it is stored, by name.
        dtypes: type of every tensor as it is stored, by name.
        config: ``config.json``.
        load: reads a stored tensor.
        metadata: strings in the header of the safetensors files, where torchao describes its tensors.
        error: what to raise.

    Returns:
        The shapes, where the tensors a weight is made of are replaced by the weight; and a function that reads a
        tensor and dequantises it, to float32, which raises for a tensor of codes that belongs to no known weight; and
        what each quantised weight is stored as, by name.

    Raises:
        ValueError: If an attention weight is in a format that is not read, or its tensors contradict each other.
    """
    stored = Stored("", shapes, dtypes, load, settings_in(config))
    weights: dict[str, Weight] = {}
    try:
        weights.update(flattened(stored, metadata or {}))
        for name, weight in weights_in(stored, {part for known in weights.values() for part in known.parts}):
            weights[name] = weight
    except Refused as reason:
        raise error(str(reason)) from None
    parts = {part for weight in weights.values() for part in weight.parts}
    left = {name: shape for name, shape in shapes.items() if name not in parts}

    @lru_cache(maxsize=2)  # a fused weight is read once for its three matrices
    def read(name: str) -> Tensor:
        try:
            return weights[name].read()
        except Refused as reason:
            raise error(str(reason)) from None

    def load_weight(name: str) -> Tensor:
        if name in weights:
            return read(name)
        tensor = load(name)
        try:
            if own_dequantize(tensor):
                return dequantize(tensor, stored.at(name))
            if tensor.dtype not in FLOAT:
                raise stored.at(name).unknown()
        except Refused as reason:
            raise error(str(reason)) from None
        return tensor

    stored_as = {name: weight.format for name, weight in weights.items()}
    return left | {name: weight.shape for name, weight in weights.items()}, load_weight, stored_as
