"""Matrices in a parameter that holds several of W_Q, W_K and W_V, by its name and shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.layer import Window
from rankdecay.attention.locate import SearchOptions, locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.names import (
    FUSED,
    is_fused_like,
    is_input_like,
    is_output_like,
)
from rankdecay.attention.tensors import Shape

_LISTED = frozenset(row.fused for row in FUSED)


def is_fused(name: str, shape: Shape) -> bool:
    """Whether a parameter holds several of W_Q, W_K and W_V, by the last part of its name that says what it is.

    A listed name that also others have, such as ``in_proj``, says so if one side is three times the other.
    """
    parts = (
        part for part in reversed(name.split(".")) if part in _LISTED or is_input_like(part) or is_output_like(part)
    )
    part = next(parts, "")
    return is_fused_like(part) or (part in _LISTED and max(shape) == 3 * min(shape))


def proven_thirds(shapes: Mapping[str, Shape]) -> dict[str, tuple[Window, ...]]:
    """Return the windows of W_Q, W_K and W_V in the parameters that are proven to hold them one after the other.

    Two layouts are. ``in_proj_weight`` beside a module ``out_proj`` is torch's; apex, which may interleave heads, calls
    its own ``out_proj_weight``. ``c_attn`` stored (in, 3 · out) is GPT-2's; gpt_bigcode's, which may be interleaved, is
    (3 · out, in).

    Args:
        shapes: shape of every parameter of a model, by name.
    """
    # For any number of heads, which no name states, thirds are the same.
    layers, _ = locate(Checkpoint(Path("named_parameters"), shapes, {}, _unread), SearchOptions(num_heads=1))
    return {
        layer.places["query"].parameter: tuple(layer.places[role].window for role in ("query", "key", "value"))
        for layer in layers
        if _is_in_thirds(layer)
    }


def _is_in_thirds(layer: Found) -> bool:
    name, window = layer.places["query"].parameter, layer.places["query"].window
    output = layer.places["output"].parameter if "output" in layer.places else ""
    of_torch = name.endswith("in_proj_weight") and output.endswith("out_proj.weight")
    of_gpt2 = name.endswith("c_attn.weight") and window.transposed
    return (of_torch or of_gpt2) and window.size == 3 * window.stop


def _unread(name: str) -> Tensor:
    raise NotImplementedError(f"{name} is known by its shape alone.")
