"""Tensors of classes that dequantise themselves: those of torchao and quanto, and torch's own quantised types."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from rankdecay.attention.quantised.formats import left_alone
from rankdecay.attention.quantised.stored import Refused, Stored, Weight


def own_dequantize(tensor: Tensor) -> bool:
    """Whether a tensor is of a quantised class or type with a ``dequantize`` of its own."""
    return tensor.is_quantized or type(tensor).dequantize is not Tensor.dequantize


def dequantize(tensor: Tensor, stored: Stored) -> Tensor:
    """Return the numbers of a tensor that dequantises itself.

    Raises:
        Refused: If it cannot.
    """
    if not own_dequantize(tensor):
        raise stored.refused(type(tensor).__name__)
    try:
        return tensor.dequantize()
    except (NotImplementedError, RuntimeError, AssertionError, ImportError) as error:
        raise stored.refused(f"{type(tensor).__name__} ({str(error).partition(chr(10))[0]})") from None


def flattened(stored: Stored, metadata: Mapping[str, str]) -> dict[str, Weight]:
    """Return the weights that torchao flattened into a safetensors file and described in its header."""
    found = {}
    for name, text in metadata.items():
        owner, _, leaf = name.rpartition(".")
        prefix = f"{owner}._{leaf}_" if owner else f"_{leaf}_"
        if left_alone(owner) or f"{prefix}qdata" not in stored.shapes:
            continue
        weight = stored.at(name)
        try:
            parts = json.loads(text)["_tensor_data_names"]
            names = {str(part): f"{prefix}{part}" for part in parts}
            held = {p: torch.empty(stored.shapes[n], dtype=stored.dtypes[n], device="meta") for p, n in names.items()}
            shape = tuple(_torchao_tensor(weight, text, held).shape)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise weight.wrong(f"torchao's description of it is incomplete ({error})") from None

        def read(weight: Stored = weight, text: str = text, names: dict[str, str] = names) -> Tensor:
            tensor = _torchao_tensor(weight, text, {part: weight.load(name) for part, name in names.items()})
            return dequantize(tensor, weight)

        found[name] = Weight(shape, read, tuple(names.values()), "torchao")
    return found


def _torchao_tensor(weight: Stored, text: str, parts: dict[str, Tensor]) -> Tensor:
    try:
        from torchao.prototype.safetensors.safetensors_utils import (  # pyright: ignore[reportMissingImports]
            ALLOWED_TENSORS_SUBCLASSES,
            object_from_dict,
        )
    except ImportError:
        raise Refused(f"{weight.name} is quantised by torchao; pip install torchao to read it.") from None
    described = json.loads(text)
    if described["_type"] not in ALLOWED_TENSORS_SUBCLASSES:
        raise weight.refused(f"torchao's {described['_type']}")
    return object_from_dict({"_type": described["_type"], "_data": described["_data"] | parts})
