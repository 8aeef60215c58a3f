"""Finds attention in a live model or in a checkpoint: the same recognition, over different sources."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from rankdecay.attention.checkpoints import open_checkpoint
from rankdecay.attention.layer import AttentionLayer, MatrixView, Role
from rankdecay.attention.modules import attention_of, named_parameters, reader
from rankdecay.attention.naming import KNOWN, AttentionNames, Found, Place, Shape, Unhandled, locate


def find_attention(
    model: nn.Module | str | Path, names: AttentionNames | None = None, num_heads: int | None = None
) -> list[AttentionLayer]:
    """Returns the attention layers of a model or a checkpoint, in the order of its parameters.

    Recognised by the names and shapes of parameters and by the numbers of heads that modules and configurations
    state (:mod:`rankdecay.attention.naming`), not by class; so a model wrapped by ``torch.compile``, DDP or PEFT is
    seen too, and cross-attention counts as a layer of its own. With a PEFT adapter the view reads the effective
    weight. Of a sharded parameter (a DTensor, by FSDP2 or tensor parallelism) names and shapes are those of the whole,
    and reading a view gathers it for that moment: in every process the same, so every process has to read it.

    Args:
        model: the model, or any part of it; or a path to a checkpoint (:mod:`rankdecay.attention.checkpoints`),
            of which nothing but shapes is read until a view is asked for its tensor.
        names: how your own attention names its projections; it is then the only naming looked for.
        num_heads: number of query heads, where neither module nor configuration says it.

    Returns:
        One :class:`~rankdecay.attention.AttentionLayer` per attention module.

    Raises:
        TypeError: If ``model`` is neither an ``nn.Module`` nor a path.
        ValueError: If no attention is found; the message lists what looked like it, and why it was not taken. Or if
            a checkpoint cannot be read.

    Warns:
        UserWarning: If some modules look like attention and could not be read, with the reason.

    Example:
        >>> attention = nn.MultiheadAttention(64, num_heads=4)
        >>> [layer] = find_attention(attention)
        >>> layer.key.parameter_name, str(layer.key.window), layer.key.heads().shape
        ('in_proj_weight', 'rows[64:128]/192 by 16', torch.Size([4, 16, 64]))
    """
    layers, unhandled = layers_in(model, names, num_heads)
    for module in unhandled:
        warnings.warn(f"{module.name or 'the model'} is not handled: {module.reason}.", stacklevel=2)
    return layers


def layers_in(
    model: nn.Module | str | Path, names: AttentionNames | None = None, num_heads: int | None = None
) -> tuple[list[AttentionLayer], list[Unhandled]]:
    """As :func:`find_attention`, with what is not handled returned instead of warned of."""
    rows = KNOWN if names is None else (names,)
    if num_heads is not None:
        rows = tuple(replace(row, num_heads=num_heads) for row in rows)
    if isinstance(model, nn.Module):
        found, unhandled = attention_of(model, rows)
        shapes: Mapping[str, Shape] = {name: tuple(p.shape) for name, p in named_parameters(model).items()}
        what, read = type(model).__name__, partial(reader, model)
    elif isinstance(model, (str, Path)):
        checkpoint = open_checkpoint(model)
        shapes, what, read = checkpoint.shapes, str(model), checkpoint.reader
        found, unhandled = locate(shapes, checkpoint.setting, rows)
    else:
        raise TypeError(f"model must be a torch.nn.Module or a path to a checkpoint, got {type(model).__name__}.")
    if not found:
        raise ValueError(_nothing(what, shapes, names, unhandled))
    return [_layer(layer, read) for layer in found], unhandled


def _layer(found: Found, read: Callable[[str], Callable[[], Tensor]]) -> AttentionLayer:
    views = {role: _view(role, place, read) for role, place in found.places.items()}
    return AttentionLayer(
        found.name,
        views["query"],
        views["key"],
        views["value"],
        views.get("output"),
        found.head_dim,
        found.rotary,
        found.qk_norm,
    )


def _view(role: Role, place: Place, read: Callable[[str], Callable[[], Tensor]]) -> MatrixView:
    return MatrixView(role, place.parameter, place.window, read(place.parameter), _bias(place, read))


def _bias(place: Place, read: Callable[[str], Callable[[], Tensor]]) -> Callable[[], Tensor] | None:
    if place.bias is None or place.bias_window is None:
        return None
    window, whole = place.bias_window, read(place.bias)
    return lambda: window.vector(whole())


def _nothing(what: str, shapes: Mapping[str, Shape], names: AttentionNames | None, unhandled: list[Unhandled]) -> str:
    text = f"no attention was found in {what}"
    if names is not None:
        text += f" under the names {', '.join(map(repr, names.projections))}"
    if unhandled:
        return text + ". Not handled: " + "; ".join(f"{m.name or 'the model'}: {m.reason}" for m in unhandled[:4]) + "."
    flat = [n for n, shape in shapes.items() if len(shape) == 1 and n.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        return text + f": {flat[0]} is a flattened FSDP1 parameter; shard with FSDP2 (fully_shard) instead."
    matrices = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) == 2]
    return (
        text + f". Its matrices are: {', '.join(matrices[:12]) or 'none'}{', …' if len(matrices) > 12 else ''}. "
        "Say which are the attention's with names=AttentionNames(query=..., key=..., value=..., output=..., "
        "num_heads=...)."
    )
