"""Shapes and types of tensors, as checkpoints state them."""

from __future__ import annotations

import torch

Shape = tuple[int, ...]
#: Names of torch's types, by the names that headers of safetensors files have for them.
_TYPES = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "BOOL": "bool", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
#: Name in the header of a safetensors file, by torch's type; without those that this version of torch does not have.
TYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, attribute): name for name, attribute in _TYPES.items() if hasattr(torch, attribute)
}


def stored_type(name: str) -> torch.dtype:
    """Return the torch type of a type in a safetensors header; uint8 if this version of torch does not have it."""
    return getattr(torch, _TYPES.get(name, "uint8"), torch.uint8)
